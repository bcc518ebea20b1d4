"""The `interplay` command: push, analyze, show, export, list, cancel and delete over HTTP, and the way into the server.

Exit codes: 0 fine; 1 the analysis failed, was cancelled or took too long; 2 usage, which includes every problem that
the service answers with; 3 the service, or MLflow, cannot be reached. With --json stdout holds one JSON value and
nothing else; errors and progress go to stderr. `interplay gate` has codes of its own.
"""

import enum
import importlib.metadata
import io
import math
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from interplay import export, gate, rendering, server
from interplay.client import AnalysisFailed, Client, ProblemError, ServiceUnreachable, WaitTimeout
from interplay.options import (
    EXIT_FAILED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    BatchSize,
    Metadata,
    Permutations,
    PrecisionOption,
    Prefix,
    Samples,
    Seed,
    Timeout,
    Tokenizer,
    Tolerance,
    Url,
    evaluation_options,
    fail,
    finite,
    json_object,
    json_value,
    metadata_of,
    open_client,
    pair,
    print_body,
    progress_shown,
    stem,
)

app = typer.Typer(
    name="interplay",
    help="MIR, HDR and neural collapse of trained networks, from an Interplay service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
push = typer.Typer(no_args_is_help=True)
app.add_typer(push, name="push", help="Upload a checkpoint, a probe dataset or a feature set.")


class Listed(enum.StrEnum):
    """What `list` can list."""

    CHECKPOINTS = "checkpoints"
    PROBES = "probes"
    FEATURE_SETS = "feature-sets"
    ANALYSES = "analyses"
    REPORTS = "reports"
    GATES = "gates"


class Deletable(enum.StrEnum):
    """What `delete` can delete."""

    CHECKPOINTS = "checkpoints"
    PROBES = "probes"
    FEATURE_SETS = "feature-sets"


def _instant(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a time such as 2026-01-31T12:00") from None


File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, metavar="FILE", show_default=False)]
FileOrFolder = Annotated[Path, typer.Argument(exists=True, readable=True, metavar="FILE|FOLDER", show_default=False)]
Name = Annotated[str | None, typer.Option("--name", help="What people will call it. Default: the file's stem.")]


def main() -> None:
    """Run the command; an expected error ends as a message and an exit code, never as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that the terminal's encoding lacks is no reason to fail
    try:
        app(prog_name="interplay")
    except AnalysisFailed as error:
        problem = error.problem or {"title": f"The analysis was {error.analysis['status']}", "detail": ""}
        fail(EXIT_FAILED, problem.get("title", "The analysis failed"), problem.get("detail", ""), problem)
    except ProblemError as error:
        fail(EXIT_USAGE, error.title, error.detail, error.members)
    except ServiceUnreachable as error:
        fail(EXIT_UNREACHABLE, str(error), "", {})
    except WaitTimeout as error:
        fail(EXIT_FAILED, str(error), "", {})
    except OSError as error:  # a file that vanished or changed its rights after the arguments were checked
        fail(EXIT_USAGE, "A file cannot be read or written", str(error), {})


@app.callback()
def interplay(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda v: _version(v)),
    ] = False,
) -> None:
    """MIR, HDR and neural collapse of trained networks, from an Interplay service."""


@push.command("checkpoint")
def push_checkpoint(
    file: FileOrFolder,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="The network's description. Default: in the file, or config.json."),
    ] = None,
    name: Name = None,
    head: Annotated[str | None, typer.Option(help="Module name of the head. Default: by family.")] = None,
    prefix: Prefix = None,
    preprocess: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="Of images, where a probe gives none; also a preprocessor_config.json."),
    ] = None,
    tokenizer: Tokenizer = None,
    metadata: Metadata = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint: safetensors, or a Hugging Face folder (config.json, weights in one file or in shards)."""
    described = json_object("--architecture", architecture)
    brought = {
        "preprocess": json_object("--preprocess", preprocess),
        "tokenizer": json_object("--tokenizer", tokenizer),
        "metadata": metadata_of(metadata) or None,
    }
    with open_client(url, api_key) as client:
        body = client.push_checkpoint(
            file, name=name or stem(file), architecture=described, head=head, prefix=prefix, **brought
        )
    print_body(body, as_json, rendering.resource_text("checkpoint", body))


@push.command("probe")
def push_probe(
    file: FileOrFolder,
    name: Name = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help='A list such as ["cat", "dog"], in the order of the labels.')
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help='Such as {"resize": 256, "crop": 224, "mean": [0.5], "std": [0.2]}.'),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="image, text, label or split, such as image=photo; label= for texts without labels; may be repeated.",
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text that are kept.")] = None,
    metadata: Metadata = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload a probe dataset: tensors (safetensors, npz), or images or texts with labels.

    Images come as Parquet, as a zip of class folders, or as such a folder itself; texts as Parquet, CSV or JSON lines.
    For causal language models texts, or tensors with input_ids, need no labels.
    """
    names = json_value("--class-names", class_names)
    if names is not None and not (isinstance(names, list) and all(isinstance(entry, str) for entry in names)):
        raise typer.BadParameter("must be a JSON list of texts", param_hint="--class-names")
    prepared = json_object("--preprocess", preprocess)
    pairs = metadata_of(metadata)
    with open_client(url, api_key) as client:
        body = client.push_probe(
            file,
            name=name or file.resolve().stem,
            class_names=names,
            preprocess=prepared,
            columns={role: name or None for role, name in (pair(entry, "--column") for entry in column or ())} or None,
            tokenizer=json_object("--tokenizer", tokenizer),
            max_length=max_length,
            metadata=pairs or None,
        )
    print_body(body, as_json, rendering.resource_text("probe", body))


@push.command("features")
def push_features(
    file: File,
    name: Name = None,
    metadata: Metadata = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload features, labels and head of a network that the service cannot build (safetensors)."""
    pairs = metadata_of(metadata)
    with open_client(url, api_key) as client:
        body = client.push_feature_set(file, name=name or stem(file), metadata=pairs or None)
    print_body(body, as_json, rendering.resource_text("feature set", body))


@app.command()
def convert(
    file: FileOrFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", dir_okay=False, help="The safetensors file to write.")
    ],
    architecture: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="The network's description, to be embedded.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Where in the file the weights are, such as ema.state_dict. Default: found.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a PyTorch file (.pt, .pth, .ckpt, .bin) into safetensors, here, without running code of the file.

    A folder is one of torch.distributed.checkpoint, or a Hugging Face folder with pytorch_model.bin or its shards.
    """
    described = json_object("--architecture", architecture)
    if output.exists() and not overwrite:
        raise typer.BadParameter(f"{str(output)!r} is there already; --overwrite replaces it", param_hint="--output")
    try:
        conversion = importlib.import_module("analysis.saving.conversion")
    except ModuleNotFoundError as error:
        detail = f"`interplay convert` needs PyTorch ({error.name} is missing): pip install 'interplay[worker]'"
        fail(EXIT_USAGE, "Not installed", detail, {})
    try:
        weights = conversion.read_weights(file, key=key)
        conversion.write_safetensors(weights.tensors, output, architecture=described)
    except conversion.ConversionError as error:
        fail(EXIT_USAGE, "The file cannot be converted", str(error), {})
    body = {
        "output": str(output),
        "key": weights.key,
        "n_tensors": len(weights.tensors),
        "n_numbers": sum(tensor.numel() for tensor in weights.tensors.values()),
        "left_out": weights.left_out,
        "others": weights.others,
        "architecture": described,
    }
    print_body(body, as_json, rendering.conversion_text(body))


ProbeId = Annotated[str, typer.Option(metavar="ID", help="What each point is evaluated on.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end and show the report.")]
IdempotencyKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="The same key and request give the same analysis.")
]


@app.command()
def analyze(
    checkpoint: Annotated[str | None, typer.Option(metavar="ID", help="With --probe.")] = None,
    probe: Annotated[str | None, typer.Option(metavar="ID", help="With --checkpoint.")] = None,
    features: Annotated[str | None, typer.Option(metavar="ID", help="A feature set, alone.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    permutations: Permutations = None,
    seed: Seed = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = None,
    precision: PrecisionOption = None,
    samples: Samples = None,
    idempotency_key: IdempotencyKey = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Queue an evaluation of a checkpoint on a probe, or of a feature set.

    With --json it prints the analysis; its report_id is what `interplay show` takes.
    """
    if (features is None) == (checkpoint is None and probe is None) or (checkpoint is None) != (probe is None):
        raise typer.BadParameter("Give either --checkpoint and --probe, or --features alone.")
    with open_client(url, api_key) as client:
        analysis = client.create_analysis(
            checkpoint_id=checkpoint,
            probe_id=probe,
            feature_set_id=features,
            options=evaluation_options(permutations, seed, tolerance, batch_size, precision, samples),
            idempotency_key=idempotency_key,
        )
        _follow(client, analysis, wait, timeout, as_json)


@app.command("compare")
def analyze_comparison(
    checkpoint_a: Annotated[str, typer.Argument(metavar="A", help="What B is compared with.", show_default=False)],
    checkpoint_b: Annotated[str, typer.Argument(metavar="B", help="Its id.", show_default=False)],
    probe: Annotated[str, typer.Option(metavar="ID", help="The samples that both see.", show_default=False)],
    bootstrap: Annotated[bool, typer.Option("--bootstrap", help="Standard errors and biases from resamples.")] = False,
    resamples: Annotated[int | None, typer.Option(min=10, help="Of the bootstrap; default: 200.")] = None,
    confidence: Annotated[float | None, typer.Option(min=0.5, max=0.9999, help="Of intervals; default: 0.95.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    permutations: Permutations = None,
    seed: Seed = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = None,
    precision: PrecisionOption = None,
    samples: Samples = None,
    idempotency_key: IdempotencyKey = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Queue a comparison of two checkpoints on the same samples: the difference of every metric, and how sure it is."""
    if resamples is not None and not bootstrap:
        raise typer.BadParameter("are those of --bootstrap", param_hint="--resamples")
    options = evaluation_options(permutations, seed, tolerance, batch_size, precision, samples)
    if bootstrap:
        options["interval"] = "bootstrap"
    options |= {key: v for key, v in {"resamples": resamples, "confidence": confidence}.items() if v is not None}
    with open_client(url, api_key) as client:
        analysis = client.create_comparison(
            checkpoint_a, checkpoint_b, probe_id=probe, options=options, idempotency_key=idempotency_key
        )
        _follow(client, analysis, wait, timeout, as_json)


@app.command("path")
def analyze_path(
    checkpoint_a: Annotated[str, typer.Argument(metavar="A", help="The checkpoint at w = 0.", show_default=False)],
    checkpoint_b: Annotated[str, typer.Argument(metavar="B", help="The checkpoint at w = 1.", show_default=False)],
    probe: ProbeId,
    points: Annotated[int | None, typer.Option(min=2, help="So many points evenly; default: 25.")] = None,
    at: Annotated[
        list[float] | None, typer.Option(metavar="W", callback=finite, help="A point; may be repeated.")
    ] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Refine around the peak of the loss.")] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Take normalisation statistics anew between the ends.")
    ] = False,
    align: Annotated[bool, typer.Option("--align", help="Permute B's hidden units to match A's first.")] = False,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow --at beyond 0 and 1.")] = False,
    wait: Wait = False,
    timeout: Timeout = None,
    permutations: Permutations = None,
    seed: Seed = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = None,
    precision: PrecisionOption = None,
    samples: Samples = None,
    idempotency_key: IdempotencyKey = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Queue the straight line between the weights of two checkpoints: loss, error, MIR and HDR on it, and barriers."""
    if sum((points is not None, bool(at), adaptive)) > 1:
        raise typer.BadParameter("Give one of --points, --at and --adaptive.")
    options = evaluation_options(permutations, seed, tolerance, batch_size, precision, samples)
    if points is not None:
        options["grid"] = {"points": points}
    elif at:
        options["grid"] = {"values": at}
    elif adaptive:
        options["grid"] = "adaptive"
    if recalibrate:
        options["normalisation"] = "recalibrate"
    if align:
        options["alignment"] = "weight_matching"
    if extrapolate:
        options["extrapolate"] = True
    with open_client(url, api_key) as client:
        analysis = client.create_path(
            checkpoint_a, checkpoint_b, probe_id=probe, options=options, idempotency_key=idempotency_key
        )
        _follow(client, analysis, wait, timeout, as_json)


@app.command("prune")
def analyze_pruning(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Its id.", show_default=False)],
    probe: ProbeId,
    sparsity: Annotated[
        list[float] | None, typer.Option(metavar="S", min=0, max=1, help="Share that is pruned; may be repeated.")
    ] = None,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="The same share of each layer.")] = False,
    include_head: Annotated[bool, typer.Option("--include-head", help="Prune the classification head too.")] = False,
    wait: Wait = False,
    timeout: Timeout = None,
    permutations: Permutations = None,
    seed: Seed = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = None,
    precision: PrecisionOption = None,
    samples: Samples = None,
    idempotency_key: IdempotencyKey = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Queue a sweep of magnitude pruning over sparsities."""
    options = evaluation_options(permutations, seed, tolerance, batch_size, precision, samples)
    if sparsity:
        options["sparsities"] = sparsity
    if layerwise:
        options["scope"] = "layerwise"
    if include_head:
        options["include_head"] = True
    with open_client(url, api_key) as client:
        analysis = client.create_pruning(checkpoint, probe_id=probe, options=options, idempotency_key=idempotency_key)
        _follow(client, analysis, wait, timeout, as_json)


@app.command("series")
def analyze_series(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="X=CHECKPOINT...", help="Such as 0=ID 10=ID.", show_default=False)
    ],
    probe: ProbeId,
    axis: Annotated[str, typer.Option(help="What X is, such as epoch.")] = "step",
    wait: Wait = False,
    timeout: Timeout = None,
    permutations: Permutations = None,
    seed: Seed = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = None,
    precision: PrecisionOption = None,
    samples: Samples = None,
    idempotency_key: IdempotencyKey = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Queue a series of checkpoints, such as those of a training run, in the order of their numbers."""
    by_number: dict[float, str] = {}
    for number, checkpoint in (pair(entry, "X=CHECKPOINT") for entry in checkpoints):
        try:
            x = float(number)
        except ValueError:
            raise typer.BadParameter(f"{number!r} is no number; expected X=CHECKPOINT.") from None
        if not math.isfinite(x):
            raise typer.BadParameter(f"{number!r} is not a finite number; expected X=CHECKPOINT.")
        if x in by_number:
            raise typer.BadParameter(f"{number} is there twice.")
        by_number[x] = checkpoint
    with open_client(url, api_key) as client:
        options = evaluation_options(permutations, seed, tolerance, batch_size, precision, samples)
        analysis = client.create_series(
            axis, by_number, probe_id=probe, options=options, idempotency_key=idempotency_key
        )
        _follow(client, analysis, wait, timeout, as_json)


def _follow(client: Client, analysis: Any, wait: bool, timeout: float | None, as_json: bool) -> None:
    """Print an analysis that was just queued; with `wait` its end, and the report for people."""
    if not wait:
        print_body(analysis, as_json, f"analysis {analysis['id']}, {analysis['status']}")
        return
    try:
        with progress_shown() as show_progress:
            analysis = client.wait(analysis["id"], timeout_seconds=timeout, on_progress=show_progress)
    except AnalysisFailed as error:
        if as_json:
            print_body(error.analysis, True)
        raise
    except KeyboardInterrupt:
        typer.echo(f"It goes on; to stop it: interplay cancel {analysis['id']}", err=True)
        raise
    print_body(analysis, as_json, None if as_json else rendering.report_view(client.get_report(analysis["report_id"])))


@app.command()
def show(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="A report's id.", show_default=False)],
    chart: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Write a picture: .svg, .png, or .json for Vega-Lite."),
    ] = None,
    chart_name: Annotated[str, typer.Option(metavar="NAME", help="Which picture, such as loss or mir.")] = "overview",
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a report, or write a picture of it."""
    if chart is not None:
        format = chart.suffix.removeprefix(".").lower()
        if format not in ("svg", "png", "json"):
            raise typer.BadParameter("ends in .svg, .png or .json", param_hint="--chart")
        with open_client(url, api_key) as client:
            picture = client.get_chart(report, chart_name, format=format)
        try:
            chart.write_bytes(picture)
        except OSError as error:
            raise typer.BadParameter(f"cannot be written: {error.strerror}", param_hint="--chart") from None
        print_body({"file": str(chart), "bytes": len(picture)}, as_json, f"{chart}, {len(picture):,} bytes")
        return
    with open_client(url, api_key) as client:
        body = client.get_report(report)
    print_body(body, as_json, None if as_json else rendering.report_view(body))


@app.command("export")
def export_report(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="A report's id.", show_default=False)],
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Log a run to this MLflow tracking server.")] = None,
    experiment: Annotated[str, typer.Option(metavar="NAME", help="Of MLflow; made where there is none.")] = "interplay",
    run_name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: what the report looks at.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write a row for each number, as CSV.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", dir_okay=False, help="The same as Parquet.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Hand a report to other tools: MLflow, CSV, Parquet. docs/report.md says what is in them."""
    if mlflow is None and csv is None and parquet is None:
        raise typer.BadParameter("Give one or more of --mlflow, --csv and --parquet.")
    # MLflow tells its makers, and stdout, of each run; and it would try for minutes where nothing listens.
    for name, value in (
        ("DISABLE_TELEMETRY", "1"),
        ("SUPPRESS_PRINTING_URL_TO_STDOUT", "1"),
        ("HTTP_REQUEST_MAX_RETRIES", "3"),
    ):
        os.environ.setdefault(f"MLFLOW_{name}", value)
    with open_client(url, api_key) as client:
        body = client.get_report(report)
    done: dict[str, Any] = {"report_id": body["id"]}
    try:
        if csv is not None:
            done["csv"] = {"file": str(csv), "rows": export.write_csv(body, csv)}
        if parquet is not None:
            done["parquet"] = {"file": str(parquet), "rows": export.write_parquet(body, parquet)}
        if mlflow is not None:
            run = export.log_to_mlflow(body, mlflow, experiment=experiment, run_name=run_name)
            done["mlflow"] = run._asdict()
    except export.MissingExtra as error:
        fail(EXIT_USAGE, "Not installed", str(error), {})
    except export.ExportFailed as error:
        fail(EXIT_UNREACHABLE, str(error), "", {})
    except OSError as error:
        fail(EXIT_USAGE, "A file cannot be written", str(error), {})
    print_body(done, as_json, rendering.export_text(done))


@app.command("list")
def list_collection(
    collection: Annotated[Listed, typer.Argument(show_default=False)],
    name: Annotated[str | None, typer.Option(help="Exactly this name.")] = None,
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    kind: Annotated[str | None, typer.Option(help="Such as evaluation.")] = None,
    checkpoint: Annotated[str | None, typer.Option(metavar="ID", help="Of this checkpoint.")] = None,
    probe: Annotated[str | None, typer.Option(metavar="ID", help="On this probe.")] = None,
    features: Annotated[str | None, typer.Option(metavar="ID", help="Of this feature set.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Has this metadata; may be repeated.")
    ] = None,
    after: Annotated[
        datetime | None,
        typer.Option(
            metavar="TIME", parser=_instant, help="Created at or after, such as 2026-01-31 or 2026-01-31T12:00Z."
        ),
    ] = None,
    before: Annotated[
        datetime | None,
        typer.Option(metavar="TIME", parser=_instant, help="Created before; local time without a zone."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    everything: Annotated[bool, typer.Option("--all", help="All of them, whatever --limit says.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List a collection, newest first."""
    of_subject = {"kind": kind, "checkpoint": checkpoint, "probe": probe, "features": features}
    refused = {Listed.ANALYSES: {}, Listed.REPORTS: {"status": status}}.get(
        collection, {"status": status, **of_subject}
    )
    for option, value in refused.items():
        if value is not None:
            raise typer.BadParameter(f"{collection.value} are not filtered by it", param_hint=f"--{option}")
    wanted: dict[str, list[str]] = {}
    for key, text in map(pair, metadata or []):
        wanted.setdefault(key, []).append(text)
    with open_client(url, api_key) as client:
        listed = client.list(
            collection.value,
            limit=None if everything else limit,
            metadata=wanted,
            name=name,
            status=status,
            kind=kind,
            checkpoint_id=checkpoint,
            probe_id=probe,
            feature_set_id=features,
            created_after=after,
            created_before=before,
        )
        items = [*listed]
    print_body(items, as_json, rendering.collection_view(collection.value, items))


@app.command()
def cancel(
    analysis: Annotated[str, typer.Argument(metavar="ANALYSIS", help="An analysis' id.", show_default=False)],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Stop an analysis at its next step."""
    with open_client(url, api_key) as client:
        body = client.cancel(analysis)
    print_body(body, as_json, f"analysis {body['id']}, {body['status']}")


@app.command()
def delete(
    collection: Annotated[Deletable, typer.Argument(show_default=False)],
    resource: Annotated[str, typer.Argument(metavar="ID", show_default=False)],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete a checkpoint, probe or feature set that no analysis needs."""
    with open_client(url, api_key) as client:
        client.delete(collection.value, resource)
    print_body({"id": resource, "deleted": True}, as_json, f"deleted {rendering.printable(resource)}")


gate.register(app)


def _add_server_command(name: str, summary: str) -> None:
    def run(context: typer.Context) -> None:
        server.start(name, context.args)

    # Every argument, --help too, is for the program that takes over.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=summary, context_settings=settings, rich_help_panel="Server")(run)


for _name, _command in server.COMMANDS.items():
    _add_server_command(_name, _command.summary)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"interplay {importlib.metadata.version('interplay')}")
        raise typer.Exit


if __name__ == "__main__":
    main()

"""The `interplay` command: push, analyze, show, list, cancel and delete over HTTP, and the way into the server.

Exit codes: 0 fine; 1 the analysis failed, was cancelled or took too long; 2 usage, which includes every problem that
the service answers with; 3 the service cannot be reached. With --json stdout holds one JSON value and nothing else;
errors and progress go to stderr.
"""

import enum
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from interplay import rendering
from interplay.client import (
    DEFAULT_URL,
    AnalysisFailed,
    Body,
    Client,
    ProblemError,
    ServiceUnreachable,
    WaitTimeout,
)

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3

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


class Precision(enum.StrEnum):
    """What a network's forward pass computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


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


Url = Annotated[
    str | None,
    typer.Option("--url", envvar="INTERPLAY_URL", help=f"Where the service listens. Default: {DEFAULT_URL}."),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="INTERPLAY_API_KEY", help="Better in the environment than in a shell's history."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, nothing else.")]
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, metavar="FILE", show_default=False)]
FileOrFolder = Annotated[Path, typer.Argument(exists=True, readable=True, metavar="FILE|FOLDER", show_default=False)]
Tokenizer = Annotated[str | None, typer.Option(metavar="FILE|JSON", help="A tokenizer.json, for texts.")]
Name = Annotated[str | None, typer.Option("--name", help="What people will call it. Default: the file's stem.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="May be repeated; epoch=10 is stored as a number."),
]


def main() -> None:
    """Run the command; an expected error ends as a message and an exit code, never as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that the terminal's encoding lacks is no reason to fail
    try:
        app(prog_name="interplay")
    except AnalysisFailed as error:
        problem = error.problem or {"title": f"The analysis was {error.analysis['status']}", "detail": ""}
        _fail(EXIT_FAILED, problem.get("title", "The analysis failed"), problem.get("detail", ""), problem)
    except ProblemError as error:
        _fail(EXIT_USAGE, error.title, error.detail, error.members)
    except ServiceUnreachable as error:
        _fail(EXIT_UNREACHABLE, str(error), "", {})
    except WaitTimeout as error:
        _fail(EXIT_FAILED, str(error), "", {})
    except OSError as error:  # a file that vanished or changed its rights after the arguments were checked
        _fail(EXIT_USAGE, "A file cannot be read", str(error), {})


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
    described = _json_object("--architecture", architecture)
    brought = {
        "preprocess": _json_object("--preprocess", preprocess),
        "tokenizer": _json_object("--tokenizer", tokenizer),
    }
    pairs = _metadata(metadata)
    with _client(url, api_key) as client:
        body = client.push_checkpoint(
            file, name=name or _stem(file), architecture=described, head=head, **brought, metadata=pairs or None
        )
    _print(body, as_json, rendering.resource_text("checkpoint", body))


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
    names = _json_value("--class-names", class_names)
    if names is not None and not (isinstance(names, list) and all(isinstance(entry, str) for entry in names)):
        raise typer.BadParameter("must be a JSON list of texts", param_hint="--class-names")
    prepared = _json_object("--preprocess", preprocess)
    pairs = _metadata(metadata)
    with _client(url, api_key) as client:
        body = client.push_probe(
            file,
            name=name or file.resolve().stem,
            class_names=names,
            preprocess=prepared,
            columns={role: name or None for role, name in (_pair(entry, "--column") for entry in column or ())} or None,
            tokenizer=_json_object("--tokenizer", tokenizer),
            max_length=max_length,
            metadata=pairs or None,
        )
    _print(body, as_json, rendering.resource_text("probe", body))


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
    pairs = _metadata(metadata)
    with _client(url, api_key) as client:
        body = client.push_feature_set(file, name=name or _stem(file), metadata=pairs or None)
    _print(body, as_json, rendering.resource_text("feature set", body))


@app.command()
def convert(
    file: File,
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
    """Turn a PyTorch file (.pt, .pth, .ckpt, .bin) into safetensors, here, without running code of the file."""
    described = _json_object("--architecture", architecture)
    if output.exists() and not overwrite:
        raise typer.BadParameter(f"{str(output)!r} is there already; --overwrite replaces it", param_hint="--output")
    try:
        conversion = importlib.import_module("analysis.conversion")
    except ModuleNotFoundError as error:
        detail = f"`interplay convert` needs PyTorch ({error.name} is missing): pip install 'interplay[worker]'"
        _fail(EXIT_USAGE, "Not installed", detail, {})
    try:
        weights = conversion.read_weights(file, key=key)
        conversion.write_safetensors(weights.tensors, output, architecture=described)
    except conversion.ConversionError as error:
        _fail(EXIT_USAGE, "The file cannot be converted", str(error), {})
    body = {
        "output": str(output),
        "key": weights.key,
        "n_tensors": len(weights.tensors),
        "n_numbers": sum(tensor.numel() for tensor in weights.tensors.values()),
        "left_out": weights.left_out,
        "others": weights.others,
        "architecture": described,
    }
    _print(body, as_json, rendering.conversion_text(body))


ProbeId = Annotated[str, typer.Option(metavar="ID", help="What each point is evaluated on.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end and show the report.")]
Timeout = Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="Wait no longer; the analysis goes on.")]
Permutations = Annotated[int | None, typer.Option(min=0, help="Permutations of the null baseline.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of all that is drawn.")]
Tolerance = Annotated[float | None, typer.Option(min=0, help="Error of MIR that is small enough; 0 is exact.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Inputs at a time.")]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Of the forward pass; bfloat16 runs it under autocast. Default: float32.")
]
Samples = Annotated[int | None, typer.Option(min=2, help="So many of the probe's, drawn from each class and split.")]
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
    with _client(url, api_key) as client:
        analysis = client.create_analysis(
            checkpoint_id=checkpoint,
            probe_id=probe,
            feature_set_id=features,
            options=_options(permutations, seed, tolerance, batch_size, precision, samples),
            idempotency_key=idempotency_key,
        )
        _follow(client, analysis, wait, timeout, as_json)


@app.command("path")
def analyze_path(
    checkpoint_a: Annotated[str, typer.Argument(metavar="A", help="The checkpoint at w = 0.", show_default=False)],
    checkpoint_b: Annotated[str, typer.Argument(metavar="B", help="The checkpoint at w = 1.", show_default=False)],
    probe: ProbeId,
    points: Annotated[int | None, typer.Option(min=2, help="So many points evenly; default: 25.")] = None,
    at: Annotated[list[float] | None, typer.Option(metavar="W", help="A point; may be repeated.")] = None,
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
    options = _options(permutations, seed, tolerance, batch_size, precision, samples)
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
    with _client(url, api_key) as client:
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
    options = _options(permutations, seed, tolerance, batch_size, precision, samples)
    if sparsity:
        options["sparsities"] = sparsity
    if layerwise:
        options["scope"] = "layerwise"
    if include_head:
        options["include_head"] = True
    with _client(url, api_key) as client:
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
    for number, checkpoint in (_pair(entry, "X=CHECKPOINT") for entry in checkpoints):
        try:
            x = float(number)
        except ValueError:
            raise typer.BadParameter(f"{number!r} is no number; expected X=CHECKPOINT.") from None
        if x in by_number:
            raise typer.BadParameter(f"{number} is there twice.")
        by_number[x] = checkpoint
    with _client(url, api_key) as client:
        options = _options(permutations, seed, tolerance, batch_size, precision, samples)
        analysis = client.create_series(
            axis, by_number, probe_id=probe, options=options, idempotency_key=idempotency_key
        )
        _follow(client, analysis, wait, timeout, as_json)


def _options(
    permutations: int | None,
    seed: int | None,
    tolerance: float | None,
    batch_size: int | None,
    precision: Precision | None,
    samples: int | None,
) -> dict[str, Any]:
    chosen = {
        "null_permutations": permutations,
        "seed": seed,
        "tolerance": tolerance,
        "batch_size": batch_size,
        "precision": None if precision is None else precision.value,
        "samples": samples,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _follow(client: Client, analysis: Any, wait: bool, timeout: float | None, as_json: bool) -> None:
    """Print an analysis that was just queued; with `wait` its end, and the report for people."""
    if not wait:
        _print(analysis, as_json, f"analysis {analysis['id']}, {analysis['status']}")
        return
    try:
        with _progress() as show_progress:
            analysis = client.wait(analysis["id"], timeout_seconds=timeout, on_progress=show_progress)
    except AnalysisFailed as error:
        if as_json:
            _print(error.analysis, True)
        raise
    except KeyboardInterrupt:
        typer.echo(f"It goes on; to stop it: interplay cancel {analysis['id']}", err=True)
        raise
    _print(analysis, as_json, None if as_json else rendering.report_view(client.get_report(analysis["report_id"])))


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
        with _client(url, api_key) as client:
            picture = client.get_chart(report, chart_name, format=format)
        try:
            chart.write_bytes(picture)
        except OSError as error:
            raise typer.BadParameter(f"cannot be written: {error.strerror}", param_hint="--chart") from None
        _print({"file": str(chart), "bytes": len(picture)}, as_json, f"{chart}, {len(picture):,} bytes")
        return
    with _client(url, api_key) as client:
        body = client.get_report(report)
    _print(body, as_json, None if as_json else rendering.report_view(body))


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
    for key, text in map(_pair, metadata or []):
        wanted.setdefault(key, []).append(text)
    with _client(url, api_key) as client:
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
    _print(items, as_json, rendering.collection_view(collection.value, items))


@app.command()
def cancel(
    analysis: Annotated[str, typer.Argument(metavar="ANALYSIS", help="An analysis' id.", show_default=False)],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Stop an analysis at its next step."""
    with _client(url, api_key) as client:
        body = client.cancel(analysis)
    _print(body, as_json, f"analysis {body['id']}, {body['status']}")


@app.command()
def delete(
    collection: Annotated[Deletable, typer.Argument(show_default=False)],
    resource: Annotated[str, typer.Argument(metavar="ID", show_default=False)],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete a checkpoint, probe or feature set that no analysis needs."""
    with _client(url, api_key) as client:
        client.delete(collection.value, resource)
    _print({"id": resource, "deleted": True}, as_json, f"deleted {rendering.printable(resource)}")


# What each server command runs, the extra that brings it, and a module by which we see whether it is installed.
_SERVER_COMMANDS = {
    "serve": (["app", "serve"], {"worker": "torch", "server": "uvicorn"}, "Run the API and one worker."),
    "api": (["app", "api"], {"server": "uvicorn"}, "Run the API alone."),
    "worker": (["workers"], {"worker": "torch"}, "Run one worker."),
    "migrate": (["app", "migrate"], {"server": "uvicorn"}, "Bring the database to the current schema."),
}


def _add_server_command(name: str, module: list[str], needs: dict[str, str], summary: str) -> None:
    def run(context: typer.Context) -> None:
        for extra, witness in needs.items():
            if importlib.util.find_spec(witness) is None:
                detail = f"`interplay {name}` needs more than the client: pip install 'interplay[{extra}]'"
                _fail(EXIT_USAGE, "Not installed", detail, {})
        # The current folder must not shadow our packages: "app" is a name that many projects have. The variable,
        # unlike -P, holds for the processes that the service starts, too.
        os.environ["PYTHONSAFEPATH"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", *module, *context.args])  # noqa: S606

    # Every argument, --help too, is for the program that takes over.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=summary, context_settings=settings, rich_help_panel="Server")(run)


for _name, (_module, _needs, _summary) in _SERVER_COMMANDS.items():
    _add_server_command(_name, _module, _needs, _summary)


def _stem(path: Path) -> str:
    """What a file is called without its ending; a folder's own name, also of `.`."""
    return path.resolve().name if path.is_dir() else path.stem


def _client(url: str | None, api_key: str | None) -> Client:
    try:
        return Client(url, api_key)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url / --api-key") from None


def _print(body: Any, as_json: bool, text: Any = None) -> None:
    if as_json:
        typer.echo(json.dumps(body, indent=2))
    else:
        rendering.console().print(text, soft_wrap=isinstance(text, str))


def _fail(code: int, title: str, detail: str, members: Any) -> NoReturn:
    typer.echo(rendering.problem_text(title, detail, members), err=True)
    sys.exit(code)


@contextmanager
def _progress() -> Iterator[Callable[[Body], None]]:
    """Yields what to call with each look at an analysis: a bar on a terminal, elsewhere a line for each change."""
    err = rendering.console(stderr=True)
    if not err.is_terminal:
        seen = [""]

        def print_line(analysis: Body) -> None:
            line = rendering.progress_line(analysis)
            if line != seen[0]:
                typer.echo(line, err=True)
            seen[0] = line

        yield print_line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("queued", total=None)

        def move_bar(analysis: Body) -> None:
            progress = analysis["progress"]
            description = rendering.progress_line(analysis)
            bar.update(task, description=description, completed=progress["done"], total=progress["total"] or None)

        yield move_bar


def _pair(entry: str, hint: str = "--metadata") -> tuple[str, str]:
    key, separator, value = entry.partition("=")
    if not key or not separator:
        raise typer.BadParameter(f"{entry!r} is not of the form KEY=VALUE", param_hint=hint)
    return key, value


def _metadata(entries: list[str] | None) -> dict[str, Any]:
    return {key: _parsed(value) for key, value in map(_pair, entries or [])}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_not_json)
    except ValueError:
        return text


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _json_value(option: str, text: str | None) -> Any:
    """The JSON that an option holds, or that the file which it names holds."""
    if text is None:
        return None
    source = text
    if not text.lstrip().startswith(("{", "[")):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise typer.BadParameter(
                f"{text!r} is neither JSON nor a readable file: {reason}", param_hint=option
            ) from None
    try:
        return json.loads(source, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not valid JSON: {error}", param_hint=option) from None


def _json_object(option: str, text: str | None) -> dict[str, Any] | None:
    value = _json_value(option, text)
    if value is not None and not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    return value


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"interplay {importlib.metadata.version('interplay')}")
        raise typer.Exit


if __name__ == "__main__":
    main()

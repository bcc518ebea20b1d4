"""`interplay analyze`, `compare`, `path`, `prune` and `series`: queue analyses and wait for them."""

import math
from typing import Annotated, Any

import typer

from interplay.client import AnalysisFailed, Client
from interplay.command import rendering
from interplay.command.options import (
    ApiKey,
    AsJson,
    BatchSize,
    Permutations,
    PrecisionOption,
    Samples,
    Seed,
    Timeout,
    Tolerance,
    Url,
    evaluation_options,
    finite,
    open_client,
    pair,
    print_body,
    progress_shown,
)

commands = typer.Typer()
ProbeId = Annotated[str, typer.Option(metavar="ID", help="What each point is evaluated on.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end and show the report.")]
IdempotencyKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="The same key and request give the same analysis.")
]


@commands.command()
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


@commands.command("compare")
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


@commands.command("path")
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


@commands.command("prune")
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


@commands.command("series")
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
    """Print an analysis that was just queued; with `wait` print its end, and without `as_json` its report."""
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

"""`interplay analyze`, `compare`, `path`, `prune` and `series`: queue analyses and wait for them."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, validators

from interplay.client import AnalysisFailed, Client
from interplay.command import rendering
from interplay.command.options import COMMON, EVALUATION, QUEUE, Common, Evaluation, Queue
from interplay.command.progress import wait_for
from interplay.command.values import UsageError, finite, pair, whole

Id = Annotated[str, Parameter(metavar="ID")]
ProbeId = Annotated[str, Parameter(metavar="ID", help="The probe to evaluate on.")]


def analyze(
    *,
    checkpoint: Id | None = None,
    probe: Id | None = None,
    features: Id | None = None,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue an evaluation of a checkpoint on a probe, or of a feature set.

    With --json it prints the analysis; `interplay show` takes its report_id.

    Args:
        checkpoint: The checkpoint; needs --probe.
        probe: The probe; needs --checkpoint.
        features: A feature set, instead of a checkpoint and a probe.
    """
    if (features is None) == (checkpoint is None and probe is None) or (checkpoint is None) != (probe is None):
        raise UsageError("Give either --checkpoint and --probe, or --features alone.")
    with common.client() as client:
        analysis = client.create_analysis(
            checkpoint_id=checkpoint,
            probe_id=probe,
            feature_set_id=features,
            options=evaluation.chosen(),
            idempotency_key=queue.idempotency_key,
        )
        _follow(client, analysis, queue, common)


def compare(
    a: str,
    b: str,
    /,
    *,
    probe: ProbeId,
    bootstrap: bool = False,
    resamples: Annotated[int | None, Parameter(converter=whole, validator=validators.Number(gte=10))] = None,
    confidence: Annotated[float | None, Parameter(validator=(validators.Number(gte=0.5, lte=0.9999), finite))] = None,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue a comparison of two checkpoints on the same samples: the difference of every metric, with its interval.

    Args:
        a: Id of the reference checkpoint.
        b: Id of the checkpoint to compare with it.
        bootstrap: Take standard errors and biases from resamples.
        resamples: Number of resamples of the bootstrap; default: 200.
        confidence: Confidence of the intervals; default: 0.95.
    """
    if resamples is not None and not bootstrap:
        raise UsageError("needs --bootstrap", "--resamples")
    options = evaluation.chosen(interval="bootstrap" if bootstrap else None, resamples=resamples, confidence=confidence)
    with common.client() as client:
        analysis = client.create_comparison(
            a, b, probe_id=probe, options=options, idempotency_key=queue.idempotency_key
        )
        _follow(client, analysis, queue, common)


def path(
    a: str,
    b: str,
    /,
    *,
    probe: ProbeId,
    points: Annotated[int | None, Parameter(converter=whole, validator=validators.Number(gte=2))] = None,
    at: Annotated[list[float] | None, Parameter(metavar="W", validator=finite)] = None,
    adaptive: bool = False,
    recalibrate: bool = False,
    align: bool = False,
    extrapolate: bool = False,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue the straight line between the weights of two checkpoints: loss, error, MIR and HDR on it, and barriers.

    Args:
        a: Id of the checkpoint at w = 0.
        b: Id of the checkpoint at w = 1.
        points: Number of evenly spaced points; default: 25.
        at: A point; may be repeated.
        adaptive: Refine the points around the peak of the loss.
        recalibrate: Recompute normalisation statistics between the ends.
        align: Permute B's hidden units to match A's first.
        extrapolate: Allow --at below 0 and above 1.
    """
    if sum((points is not None, bool(at), adaptive)) > 1:
        raise UsageError("Give one of --points, --at and --adaptive.")
    grid: Any = {"points": points} if points is not None else {"values": at} if at else "adaptive" if adaptive else None
    options = evaluation.chosen(
        grid=grid,
        normalisation="recalibrate" if recalibrate else None,
        alignment="weight_matching" if align else None,
        extrapolate=extrapolate,
    )
    with common.client() as client:
        analysis = client.create_path(a, b, probe_id=probe, options=options, idempotency_key=queue.idempotency_key)
        _follow(client, analysis, queue, common)


def prune(
    checkpoint: str,
    /,
    *,
    probe: ProbeId,
    sparsity: Annotated[
        list[float] | None, Parameter(metavar="S", validator=(finite, validators.Number(gte=0, lte=1)))
    ] = None,
    layerwise: bool = False,
    include_head: bool = False,
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue a sweep of magnitude pruning over sparsities.

    Args:
        checkpoint: Id of the checkpoint.
        sparsity: Share of the weights to prune; may be repeated.
        layerwise: Prune the same share of each layer.
        include_head: Prune the classification head too.
    """
    options = evaluation.chosen(
        sparsities=sparsity or None, scope="layerwise" if layerwise else None, include_head=include_head
    )
    with common.client() as client:
        analysis = client.create_pruning(
            checkpoint, probe_id=probe, options=options, idempotency_key=queue.idempotency_key
        )
        _follow(client, analysis, queue, common)


def series(
    checkpoints: Annotated[list[str], Parameter("X=CHECKPOINT...")],
    /,
    *,
    probe: ProbeId,
    axis: Annotated[str, Parameter(show_default=True)] = "step",
    evaluation: Evaluation = EVALUATION,
    queue: Queue = QUEUE,
    common: Common = COMMON,
) -> None:
    """Queue a series of checkpoints, such as those of a training run, in the order of their numbers.

    Args:
        checkpoints: A number and the id of its checkpoint each, such as 0=ID 10=ID.
        axis: Name of the numbers, such as epoch.
    """
    by_number = _by_number(checkpoints)
    with common.client() as client:
        analysis = client.create_series(
            axis, by_number, probe_id=probe, options=evaluation.chosen(), idempotency_key=queue.idempotency_key
        )
        _follow(client, analysis, queue, common)


def _by_number(entries: Sequence[str]) -> dict[float, str]:
    found: dict[float, str] = {}
    for number, checkpoint in (pair(entry, "X=CHECKPOINT") for entry in entries):
        try:
            x = float(number)
        except ValueError:
            raise UsageError(f"{number!r} is not a number; expected X=CHECKPOINT.") from None
        if not math.isfinite(x):
            raise UsageError(f"{number!r} is not a finite number; expected X=CHECKPOINT.")
        if x in found:
            raise UsageError(f"The number {number} is given twice.")
        found[x] = checkpoint
    return found


def _follow(client: Client, analysis: Any, queue: Queue, common: Common) -> None:
    """Print an analysis that was just queued; with --wait print its end, and without --json its report."""
    if not queue.wait:
        common.print(analysis, f"analysis {analysis['id']}, {analysis['status']}")
        return
    try:
        ended = wait_for(client, analysis, queue.timeout)
    except AnalysisFailed as error:
        if common.as_json:
            common.print(error.analysis)
        raise
    common.print(ended, None if common.as_json else rendering.report_view(client.get_report(ended["report_id"])))

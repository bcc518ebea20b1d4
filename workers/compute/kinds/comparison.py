"""Compare two checkpoints on one probe's samples, each with its own preprocessing if the probe gives none.

The sides are computed apart, by one worker or by two, and their features kept; the comparison reads them again. On a
worker that computed a side, its features are still in memory.
"""

from dataclasses import asdict, dataclass

from analysis.clock import Clock
from workers.compute.context import Context, described, dtype_name, options_of
from workers.compute.features import Kept
from workers.compute.kinds.evaluation import faults_of_the_probe, features_of
from workers.compute.kinds.points import computed_on, where_computed
from workers.compute.probes import described_probe
from workers.tasks import ComparisonReportTask, ComparisonTask, Json, Known, SideAnswer, SideTask


@dataclass(frozen=True)
class _Sides:
    """Features of the sides that this process has computed, by the checkpoint's id."""

    kept: dict[str, Kept]


def side(task: SideTask, context: Context) -> SideAnswer:
    """Compute and keep the features of one side."""
    clock, checkpoint = Clock(), task.checkpoints[task.number]
    context.on_progress("loading", 0, 0)
    kept, reused = features_of(task, checkpoint, context, clock)
    _held(task, context).kept[checkpoint.id] = kept
    n_classes, n_features = kept.feature_set.head.shape
    known = Known(
        **dict(kept.network),
        n_features=n_features,
        n_classes=n_classes,
        batch_size=kept.batch_size,
        computed_on=computed_on(context.provenance),
    )
    return SideAnswer(known=known, timings_seconds={**clock.seconds}, reused=reused)


def compare_checkpoints(task: ComparisonReportTask, context: Context) -> Json:
    """Return the body of the report of two checkpoints."""
    # Imported late, for scipy: a worker is ready half a second earlier without it.
    from analysis.comparison import ComparisonOptions, compare

    clock, options = Clock(), options_of(ComparisonOptions, task)
    context.on_progress("loading", 0, 0)
    held = _held(task, context).kept
    sides = [
        (held[one.id], True) if one.id in held else features_of(task, one, context, clock) for one in task.checkpoints
    ]
    (a, _), (b, _) = sides
    with faults_of_the_probe():
        comparison = compare(
            a.feature_set, b.feature_set, device=context.device, options=options, progress=context.on_progress
        )
    timings = {**comparison.timings_seconds}
    for seconds in (clock.seconds, *(answer.timings_seconds for answer in task.points)):
        timings = {name: timings.get(name, 0.0) + seconds.get(name, 0.0) for name in {**timings, **seconds}}
    reused = [answer.reused for answer in task.points] or [reused for _, reused in sides]
    return {
        "subjects": [
            described(checkpoint, kept.network, n_features=entry.n_features, n_classes=entry.n_classes).model_dump(
                mode="json"
            )
            for checkpoint, entry, (kept, _) in zip(task.checkpoints, (comparison.a, comparison.b), sides, strict=True)
        ],
        "probe": described_probe(task.probe, a.probe).model_dump(mode="json"),
        "probe_b": described_probe(task.probe, b.probe).model_dump(mode="json"),
        "provenance": {
            **context.provenance,
            **where_computed([answer.known for answer in task.points]),
            "feature_dtype": dtype_name(a.feature_set.features),
            "precision": options.precision,
            "batch_size": min(kept.batch_size for kept, _ in sides),
            "features_reused": all(reused),
        },
        "timings_seconds": {**timings},
        "splits": {name: asdict(split) for name, split in comparison.splits.items()},
    }


def _held(task: ComparisonTask, context: Context) -> _Sides:
    return context.held.get(task.analysis_id, _Sides, lambda: _Sides({}))

"""Compare two checkpoints on one probe's samples, each with its own preprocessing if the probe gives none."""

from dataclasses import asdict

from analysis.clock import Clock
from workers.compute.context import Context, described, dtype_name, options_of
from workers.compute.kinds.evaluation import faults_of_the_probe, features_of
from workers.compute.probes import described_probe
from workers.tasks import ComparisonTask, Json


def compare_checkpoints(task: ComparisonTask, context: Context) -> Json:
    """Return the body of the report of two checkpoints."""
    # Imported late, for scipy: a worker is ready half a second earlier without it.
    from analysis.comparison import ComparisonOptions, compare

    clock, options = Clock(), options_of(ComparisonOptions, task)
    context.on_progress("loading", 0, 0)
    sides = [features_of(task, checkpoint, context, clock) for checkpoint in task.checkpoints]
    (a, _), (b, _) = sides
    with faults_of_the_probe():
        comparison = compare(
            a.feature_set, b.feature_set, device=context.device, options=options, progress=context.on_progress
        )
    timings = {**clock.seconds, **comparison.timings_seconds}
    timings["features"] += clock.seconds.get("features", 0.0)
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
            "feature_dtype": dtype_name(a.feature_set.features),
            "precision": options.precision,
            "batch_size": min(kept.batch_size for kept, _ in sides),
            "features_reused": all(reused for _, reused in sides),
        },
        "timings_seconds": {**timings},
        "splits": {name: asdict(split) for name, split in comparison.splits.items()},
    }

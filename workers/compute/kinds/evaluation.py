"""Evaluate a checkpoint on a probe, or a feature set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from analysis.clock import Clock
from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, capture, evaluate_features
from analysis.passes.parts import n_rows, samples_of_parts, spans
from app.schemas.reports import Subject
from workers.compute.context import Context, described, dtype_name, load, network_facts, options_of, splits_of
from workers.compute.features import Kept, name_of
from workers.compute.probes import described_probe, read_feature_set, read_probe
from workers.tasks import Checkpoint, EvaluationTask, FeatureSetTask, Json, NetworkTask, ShardedTask


def evaluate_checkpoint(task: EvaluationTask | ShardedTask, context: Context) -> Json:
    """Return the body of the report of a checkpoint; its features come from the cache if an analysis left them."""
    clock, [checkpoint] = Clock(), task.checkpoints
    context.on_progress("loading", 0, 0)
    kept, reused = features_of(task, checkpoint, context, clock)
    return evaluated(task, kept, context, clock.seconds, {"features_reused": reused})


def evaluated(
    task: EvaluationTask | ShardedTask, kept: Kept, context: Context, seconds: Mapping[str, float], provenance: Json
) -> Json:
    """Return the body of the report of a checkpoint whose features are there.

    Args:
        task: the task.
        kept: its features.
        context: of the step.
        seconds: that it took to get the features, by phase.
        provenance: members that say how.
    """
    [checkpoint], options = task.checkpoints, options_of(EvaluationOptions, task)
    with faults_of_the_probe():
        evaluation = evaluate_features(
            kept.feature_set, device=context.device, options=options, progress=context.on_progress
        )
    timings = {**seconds, **evaluation.timings_seconds}
    timings["features"] = evaluation.timings_seconds["features"] + seconds.get("features", 0.0)
    subject = described(checkpoint, kept.network, n_features=evaluation.n_features, n_classes=evaluation.n_classes)
    return {
        "subject": subject.model_dump(mode="json"),
        "probe": described_probe(task.probe, kept.probe).model_dump(mode="json"),
        "provenance": {
            **context.provenance,
            "feature_dtype": dtype_name(kept.feature_set.features),
            "precision": options.precision,
            "batch_size": kept.batch_size,
            **provenance,
        },
        "timings_seconds": {**timings},
        "splits": splits_of(evaluation),
    }


def evaluate_feature_set(task: FeatureSetTask, context: Context) -> Json:
    """Return the body of the report of a feature set."""
    clock, row = Clock(), task.feature_set
    context.on_progress("loading", 0, 0)
    with clock.phase("load"):
        feature_set, about = read_feature_set(task, context.files)
    evaluation = evaluate_features(
        feature_set,
        device=context.device,
        options=options_of(EvaluationOptions, task),
        progress=context.on_progress,
    )
    subject = Subject(
        kind="feature_set",
        id=row.id,
        name=row.name,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        n_parameters=None,
        architecture=None,
        head=None,
        n_features=evaluation.n_features,
        n_classes=evaluation.n_classes,
        metadata=row.metadata,
    )
    return {
        "subject": subject.model_dump(mode="json"),
        "probe": about.model_dump(mode="json"),
        "provenance": {
            **context.provenance,
            "feature_dtype": dtype_name(feature_set.features),
            "precision": None,
            "batch_size": None,
            "features_reused": False,
        },
        "timings_seconds": {**clock.seconds, **evaluation.timings_seconds},
        "splits": splits_of(evaluation),
    }


@contextmanager
def faults_of_the_probe() -> Iterator[None]:
    """Map `invalid-feature-set` to `invalid-probe`: faulty features of a checkpoint on a probe come from the probe."""
    try:
        yield
    except AnalysisError as error:
        if error.kind == "invalid-feature-set":
            raise AnalysisError("invalid-probe", error.detail, **error.members) from error
        raise


def features_of(task: NetworkTask, checkpoint: Checkpoint, context: Context, clock: Clock) -> tuple[Kept, bool]:
    """Return a checkpoint's features on the probe and whether they were cached; if not, compute and cache them."""
    if checkpoint.architecture["family"] == "custom":
        # Not cached: a cache name cannot cover the operator's own code.
        return _extracted(task, checkpoint, context, clock), False
    name = name_of(task, checkpoint, context.provenance)
    with clock.phase("load"):
        found = context.cache.find(name)
    if found is not None:
        return found, True
    computed = _extracted(task, checkpoint, context, clock)
    with clock.phase("keep"):
        context.cache.keep(name, computed)
    return computed, False


def _extracted(task: NetworkTask, checkpoint: Checkpoint, context: Context, clock: Clock) -> Kept:
    """Pass the probe through the network once; return a feature set with the network's logits or predictions."""
    options = options_of(EvaluationOptions, task)
    with clock.phase("load"):
        network = load(context, checkpoint)
        probe, facts = read_probe(task, context.files, network, checkpoint, brought=(checkpoint,))
    with clock.phase("features"):
        feature_set, batch_size = capture(
            network, probe, device=context.device, options=options, progress=context.on_progress
        )
    rows = None
    if task.shard_samples is not None:
        # As if the parts had been passed apart.
        size = samples_of_parts(task.shard_samples, batch_size)
        rows = {span: n_rows(probe, span) for span in spans(len(probe.labels), size)}
    return Kept(feature_set, network_facts(network), batch_size, facts, rows)

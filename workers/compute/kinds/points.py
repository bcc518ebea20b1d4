"""Parts that the kinds with points share: what is held between points, and the common members of their reports.

MIR and HDR of a summary are those of the sample level with global centring, as reports state under `measured`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from analysis.clock import Clock
from analysis.evaluation import Evaluation, EvaluationOptions
from analysis.networks.loading import LoadedNetwork
from analysis.probes.probe import Probe
from app.schemas.reports import ComputedOn, Interplay, Measured, ProbeSubject, SplitEvaluation, Subject
from workers.compute.context import Context, described, network_facts, options_of
from workers.compute.probes import ProbeFacts, described_probe, read_probe
from workers.tasks import Answer, Checkpoint, Json, Known, Network, PathPointTask, PointsTask, PruningPointTask

MEASURED = Measured(level="sample", centring="global")


@dataclass(frozen=True)
class LoadedProbe:
    """A probe prepared for repeated passes, and the `probe` section of the report."""

    probe: Probe
    about: ProbeSubject


def load_probe(task: PointsTask, context: Context, network: LoadedNetwork, checkpoint: Checkpoint) -> LoadedProbe:
    """Return the probe as read for a checkpoint; all checkpoints must bring the same preprocessing and tokenizer."""
    probe, facts = read_probe(task, context.files, network, checkpoint, brought=task.checkpoints)
    return LoadedProbe(probe.prepared(context.device), described_probe(task.probe, facts))


def within_point(context: Context) -> Context:
    """Return a context that tells only the phase of a point: the worker counts points, not samples."""
    tell = context.on_progress
    return replace(context, on_progress=lambda phase, _done, _total: tell(phase, 0, 0))


def options_of_point(task: PathPointTask | PruningPointTask) -> EvaluationOptions:
    """Return the options of a point's evaluation, with the batch size of the first point.

    All points are then passed alike, whichever workers compute them.
    """
    options = options_of(EvaluationOptions, task)
    return options if task.first is None else replace(options, batch_size=task.first.batch_size)


def known_of(network: LoadedNetwork, evaluation: Evaluation, about: ProbeSubject, context: Context) -> Known:
    """Return the facts that points of all kinds have."""
    return Known(
        **dict(network_facts(network)),
        n_features=evaluation.n_features,
        n_classes=evaluation.n_classes,
        batch_size=evaluation.batch_size,
        probe=about,
        computed_on=computed_on(context.provenance),
    )


def computed_on(provenance: Json) -> ComputedOn:
    """Return what of a provenance decides the last digits."""
    return ComputedOn.model_validate({name: provenance[name] for name in ComputedOn.model_fields})


def splits_of_point(evaluation: Evaluation) -> Json:
    """Return a point's splits: without predictions by class and confidence, which would outweigh all other numbers."""
    without: Json = {"by_class": None, "reliability": None}
    return {name: asdict(split) | without for name, split in evaluation.splits.items()}


def timings_of(clock: Clock, evaluation: Evaluation) -> dict[str, float]:
    """Return the seconds of a point by phase."""
    return {**clock.seconds, **evaluation.timings_seconds}


def common_members(task: PointsTask, points: Sequence[Answer], context: Context) -> Json:
    """Return the members common to the reports of all kinds with points."""
    timings: dict[str, float] = {}
    for point in points:
        for phase, seconds in point.timings_seconds.items():
            timings[phase] = timings.get(phase, 0.0) + seconds
    sizes = [point.known.batch_size for point in points if point.known.batch_size]
    # A point computed by an earlier version does not describe the probe.
    about = points[0].known.probe or described_probe(task.probe, ProbeFacts())
    return {
        "probe": about.model_dump(mode="json"),
        "provenance": {
            **context.provenance,
            **where_computed([point.known for point in points]),
            "feature_dtype": "float32",
            "precision": task.options.precision,
            "batch_size": min(sizes, default=None),
            "features_reused": False,
        },
        "timings_seconds": {**timings},
    }


def where_computed(known: Sequence[Known]) -> Json:
    """Return members of `provenance`: what computed the first point and, where they differ, what computed each."""
    found = [one.computed_on for one in known if one.computed_on is not None]
    if not found:
        return {}
    alike = all(one == found[0] for one in found)
    every = None if alike or len(found) < len(known) else [one.model_dump() for one in found]
    return {**found[0].model_dump(), "computed_on": every}


def described_with(checkpoint: Checkpoint, known: Known, network: Network | None = None) -> Subject:
    """Return a report's `subject` with the facts of a point, or those of another network of its size."""
    return described(checkpoint, network or known, n_features=known.n_features, n_classes=known.n_classes)


def measured(split: SplitEvaluation) -> Interplay:
    """Return the MIR and HDR that summaries are of."""
    return split.interplay.sample.global_


def defined(value: float | None) -> float:
    """Return a loss or an accuracy, which every network has on every probe."""
    assert value is not None, "a network predicts a class for each sample"
    return value

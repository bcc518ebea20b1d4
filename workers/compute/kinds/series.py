"""Evaluate checkpoints in order, and combine the points into a report. They are compared, not mixed, so their networks
may differ.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from analysis.clock import Clock
from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.adapting import Adaptable
from analysis.networks.loading import LoadedNetwork
from app import schemas
from app.schemas.reports import Generalisation, SeriesPoint, SeriesSplit, SeriesSummary
from workers.compute.context import Context, adaptable, load, options_of, put_on
from workers.compute.kinds.points import (
    MEASURED,
    LoadedProbe,
    common_members,
    defined,
    described_with,
    known_of,
    load_probe,
    measured,
    splits_of_point,
    timings_of,
    within_point,
)
from workers.tasks import Checkpoint, Json, Known, SeriesAnswer, SeriesPointTask, SeriesReportTask, SeriesTask


@dataclass(frozen=True)
class _LoadedProbe:
    """The probe as read for one description; checkpoints of equal descriptions share it."""

    architecture: Json
    loaded: LoadedProbe


@dataclass(frozen=True)
class _Origin:
    """What a network is loaded from, before an adapter is put on it."""

    sha256: str
    prefix: str | None
    architecture: str
    head: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_Origin":
        """Return the origin of a checkpoint, which for an adapter is its base."""
        root = checkpoint.base or checkpoint
        architecture = json.dumps(checkpoint.architecture, sort_keys=True)
        return cls(root.sha256, root.asked_prefix, architecture, checkpoint.head)


@dataclass(frozen=True)
class _LoadedBase:
    """A network on which adapters are put, one after the other."""

    origin: _Origin
    network: Adaptable


def series_point(task: SeriesPointTask, context: Context) -> SeriesAnswer:
    """Compute a point of a series."""
    clock, within, checkpoint = Clock(), within_point(context), task.checkpoints[task.number]
    with clock.phase("load"):
        network = network_of(task, checkpoint, context)
        probe = _probe_for(task, checkpoint, network, within)
    evaluation = evaluate_network(
        network,
        probe.probe,
        device=context.device,
        options=options_of(EvaluationOptions, task),
        progress=within.on_progress,
    )
    known = known_of(network, evaluation, probe.about, context)
    # Checked at each point and not only at the end, since a series may be long.
    if task.first is not None:
        require_comparable(task.first, known)
    point = {"x": task.place, "checkpoint_id": checkpoint.id, "reused_report_id": None}
    return SeriesAnswer(
        point=SeriesPoint.model_validate({**point, "splits": splits_of_point(evaluation)}),
        known=known,
        timings_seconds=timings_of(clock, evaluation),
    )


def series_report(task: SeriesReportTask, context: Context) -> Json:
    """Return the body of the report of all points of a series."""
    # Imported late, for scipy: a worker is ready half a second earlier without it.
    from analysis.sweeps.series import generalisation

    known, points = [answer.known for answer in task.points], [answer.point for answer in task.points]
    for one in known[1:]:
        # Points reused from existing reports have not been checked yet.
        require_comparable(known[0], one)
    names = points[0].splits
    came = None
    if "train" in names and "test" in names:
        moments = asdict(generalisation(task.axis.values, _accuracies(points, "train"), _accuracies(points, "test")))
        reasons = {name: "not_reached" for name, x in moments.items() if x is None}
        came = Generalisation(**moments, reasons=reasons)
    summary = SeriesSummary(
        splits={split: _series_split(points, split) for split in names}, measured=MEASURED, generalisation=came
    )
    return {
        "axis": task.axis.model_dump(mode="json"),
        "subjects": [
            described_with(checkpoint, one).model_dump(mode="json")
            for checkpoint, one in zip(task.checkpoints, known, strict=True)
        ],
        "points": [point.model_dump(mode="json", by_alias=True) for point in points],
        "summary": summary.model_dump(mode="json"),
        **common_members(task, task.points, context),
    }


def require_comparable(first: Known, other: Known) -> None:
    """Check that a point has the same classes and inputs as the first.

    Args:
        first: facts of the first point, from computing it or from an existing report.
        other: facts of the point.

    Raises:
        AnalysisError: `architectures-differ` for another number of classes; `invalid-probe` for inputs that were
            prepared differently.
    """
    if _classes(first) != _classes(other):
        differing = [{"member": "n_classes", "expected": first.n_classes, "found": other.n_classes}]
        raise AnalysisError(
            "architectures-differ",
            f"It has {other.n_classes} classes where the first checkpoint has {first.n_classes}: accuracy, MIR "
            "and HDR of the two say nothing beside each other.",
            differing=differing,
        )
    others = [
        what
        for what, differs in (
            ("preprocessing", _preprocess(first) != _preprocess(other)),
            ("tokenizer", _tokenizer(first) != _tokenizer(other)),
        )
        if differs
    ]
    if others:
        raise AnalysisError(
            "invalid-probe",
            f"Its network sees other inputs than the first: the {' and the '.join(others)} of the two differ. Give "
            "the probe one of its own.",
        )


def _classes(point: Known) -> int | None:
    """Return the number of classes; None for language models, whose classes are the probe's tokens."""
    return None if point.probe and point.probe.next_tokens else point.n_classes


def _preprocess(point: Known) -> schemas.Preprocess | None:
    return point.probe.preprocess if point.probe else None


def _tokenizer(point: Known) -> tuple[str, int | None] | None:
    tokenizer = point.probe.tokenizer if point.probe else None
    if tokenizer is None:
        return None
    # A maximum length that truncated nothing makes no difference, and padding is masked.
    return tokenizer.sha256, tokenizer.max_length if tokenizer.n_truncated else None


def _probe_for(task: SeriesTask, checkpoint: Checkpoint, network: LoadedNetwork, context: Context) -> LoadedProbe:
    """Return the probe as read for a checkpoint's description; it is read once for equal descriptions in a row."""

    def read() -> _LoadedProbe:
        context.on_progress("loading", 0, 0)
        return _LoadedProbe(checkpoint.architecture, load_probe(task, context, network, checkpoint))

    held = context.held.get(task.analysis_id, _LoadedProbe, read)
    if held.architecture != checkpoint.architecture:
        context.held.drop(task.analysis_id, _LoadedProbe)
        held = context.held.get(task.analysis_id, _LoadedProbe, read)
    return held.loaded


def network_of(task: SeriesTask, checkpoint: Checkpoint, context: Context) -> LoadedNetwork:
    """Return a checkpoint's network; that of a base and its adapters is loaded once for those in a row."""
    origin = _Origin.of(checkpoint)
    if not any(one.base is not None and _Origin.of(one) == origin for one in task.checkpoints):
        context.held.drop(task.analysis_id, _LoadedBase)
        return load(context, checkpoint)

    def load_base() -> _LoadedBase:
        return _LoadedBase(origin, adaptable(context, checkpoint))

    held = context.held.get(task.analysis_id, _LoadedBase, load_base)
    if held.origin != origin:
        # Its variable too, or two networks would be in memory while the second loads.
        del held
        context.held.drop(task.analysis_id, _LoadedBase)
        held = context.held.get(task.analysis_id, _LoadedBase, load_base)
    return put_on(context, checkpoint, held.network)


def _series_split(points: Sequence[SeriesPoint], split: Literal["all", "train", "test"]) -> SeriesSplit:
    from analysis.sweeps.series import spearman

    of_split, accuracies = [measured(point.splits[split]) for point in points], _accuracies(points, split)
    mir = spearman([one.mir for one in of_split], accuracies)
    hdr = spearman([one.hdr for one in of_split], accuracies)
    mir_distance = [one.distance_to_optimum.mir for one in of_split]
    hdr_distance = [one.distance_to_optimum.hdr for one in of_split]
    reasons = {}
    if mir is None:
        reasons["spearman_mir_accuracy"] = "too_few_or_constant"
    if hdr is None:
        reasons["spearman_hdr_accuracy"] = "too_few_or_constant"
    # The points have the reasons, which may differ between them.
    if None in mir_distance:
        reasons["mir_distance"] = "undefined_points"
    if None in hdr_distance:
        reasons["hdr_distance"] = "undefined_points"
    return SeriesSplit(
        spearman_mir_accuracy=mir,
        spearman_hdr_accuracy=hdr,
        mir_distance=mir_distance,
        hdr_distance=hdr_distance,
        reasons=reasons,
    )


def _accuracies(points: Sequence[SeriesPoint], split: Literal["all", "train", "test"]) -> list[float]:
    return [defined(point.splits[split].accuracy) for point in points]

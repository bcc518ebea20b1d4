"""Prune a checkpoint by magnitude and evaluate it at each sparsity, and combine the points into a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.clock import Clock
from analysis.evaluation import evaluate_network
from analysis.sweeps.pruning import Pruning, knee
from app.schemas.reports import PruningPoint, PruningSplit, PruningSummary
from workers.compute.context import Context, load
from workers.compute.kinds.points import (
    LoadedProbe,
    common_members,
    defined,
    described_with,
    known_of,
    load_probe,
    options_of_point,
    splits_of_point,
    timings_of,
    within_point,
)
from workers.tasks import Json, KnownOfPruning, PruningAnswer, PruningPointTask, PruningReportTask, PruningTask


@dataclass(frozen=True)
class _LoadedPruning:
    pruning: Pruning
    probe: LoadedProbe


def pruning_point(task: PruningPointTask, context: Context) -> PruningAnswer:
    """Compute a point of a pruning sweep."""
    clock, within = Clock(), within_point(context)
    with clock.phase("load"):
        loaded = context.held.get(task.analysis_id, _LoadedPruning, lambda: _load_pruning(task, within))
    pruning = loaded.pruning
    with clock.phase("prune"):
        n_pruned = pruning.prune_to(task.place)
    evaluation = evaluate_network(
        pruning.network,
        loaded.probe.probe,
        device=context.device,
        options=options_of_point(task),
        progress=within.on_progress,
    )
    known = known_of(pruning.network, evaluation, loaded.probe.about, context)
    return PruningAnswer(
        point=PruningPoint.model_validate(
            {"sparsity": task.place, "n_pruned": n_pruned, "splits": splits_of_point(evaluation)}
        ),
        known=KnownOfPruning(**dict(known), n_prunable=pruning.n_prunable),
        timings_seconds=timings_of(clock, evaluation),
    )


def pruning_report(task: PruningReportTask, context: Context) -> Json:
    """Return the body of the report of all points of a pruning sweep."""
    points, known = [answer.point for answer in task.points], task.points[0].known
    summary = PruningSummary(
        n_prunable=known.n_prunable,
        splits={split: PruningSplit(knee=_knee(points, split), reasons={}) for split in points[0].splits},
    )
    return {
        "subject": described_with(task.checkpoints[0], known).model_dump(mode="json"),
        "points": [point.model_dump(mode="json", by_alias=True) for point in points],
        "summary": summary.model_dump(mode="json"),
        **common_members(task, task.points, context),
    }


def _load_pruning(task: PruningTask, context: Context) -> _LoadedPruning:
    context.on_progress("loading", 0, 0)
    [checkpoint], options = task.checkpoints, task.options
    network = load(context, checkpoint)
    pruning = Pruning(network, options.scope, include_head=options.include_head)
    return _LoadedPruning(pruning, load_probe(task, context, network, checkpoint))


def _knee(points: Sequence[PruningPoint], split: Literal["all", "train", "test"]) -> float | None:
    accuracies = [defined(point.splits[split].accuracy) for point in points]
    return knee([point.sparsity for point in points], accuracies)

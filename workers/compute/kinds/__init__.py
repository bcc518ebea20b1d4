"""Compute one step of an analysis of any kind. Runs in the child.

A kind is one module of this folder: it computes the body of a report, or a point and the report of all points.
"""

from analysis.errors import AnalysisError
from workers.compute.context import Context
from workers.compute.kinds import comparison, evaluation, path, pruning, series, shards
from workers.tasks import (
    Answer,
    AnyStep,
    ComparisonReportTask,
    EvaluationTask,
    FeatureSetTask,
    Json,
    PathPointTask,
    PathReportTask,
    PointStep,
    PruningPointTask,
    PruningReportTask,
    SeriesPointTask,
    SeriesReportTask,
    ShardedReportTask,
    ShardTask,
    SideTask,
)


def compute(step: AnyStep, context: Context) -> Json:
    """Compute the body of a report, or the answer for a point, as JSON values.

    Raises:
        AnalysisError: the step cannot be computed.
    """
    match step:
        case EvaluationTask():
            return evaluation.evaluate_checkpoint(step, context)
        case FeatureSetTask():
            return evaluation.evaluate_feature_set(step, context)
        case ShardedReportTask():
            return shards.evaluate_shards(step, context)
        case ComparisonReportTask():
            return comparison.compare_checkpoints(step, context)
        case PathReportTask():
            return path.path_report(step, context)
        case PruningReportTask():
            return pruning.pruning_report(step, context)
        case SeriesReportTask():
            return series.series_report(step, context)
        case _:
            return _point(step, context).model_dump(mode="json", by_alias=True)


def _point(step: PointStep, context: Context) -> Answer:
    """Compute a point; a failure names the point and its place on the axis."""
    if isinstance(step, ShardTask):
        return shards.shard(step, context)
    if isinstance(step, SideTask):
        return comparison.side(step, context)
    try:
        match step:
            case PathPointTask():
                return path.path_point(step, context)
            case PruningPointTask():
                return pruning.pruning_point(step, context)
            case SeriesPointTask():
                return series.series_point(step, context)
    except AnalysisError as error:
        # The place is more useful than the number: points are not computed in the order of a path.
        number = step.number + 1
        detail = f"Point {number}, at {step.place_name()} {step.place:.15g}: {error.detail}"
        raise AnalysisError(error.kind, detail, **error.members, point=number, at=step.place) from error

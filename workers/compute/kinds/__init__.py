"""Compute one step of an analysis of any kind. Runs in the child.

A kind is one module of this folder: it computes the body of a report, or a point and the report of all points.
"""

from analysis.errors import AnalysisError
from workers.compute.context import Context
from workers.compute.kinds import comparison, evaluation, path, pruning, series
from workers.tasks import (
    Answer,
    ComparisonTask,
    EvaluationTask,
    FeatureSetTask,
    Json,
    PathPointTask,
    PathReportTask,
    PointStep,
    PruningPointTask,
    PruningReportTask,
    ReportStep,
    SeriesPointTask,
    SeriesReportTask,
    WholeStep,
)


def compute(step: WholeStep | PointStep | ReportStep, context: Context) -> Json:
    """Compute the body of a report, or the answer for a point, as JSON values.

    Raises:
        AnalysisError: the step cannot be computed.
    """
    context.held.keep_only(step.analysis_id)
    if isinstance(step, PointStep):
        return _point(step, context).model_dump(mode="json", by_alias=True)
    if isinstance(step, ReportStep):
        context.held.clear()
    match step:
        case EvaluationTask():
            return evaluation.evaluate_checkpoint(step, context)
        case FeatureSetTask():
            return evaluation.evaluate_feature_set(step, context)
        case ComparisonTask():
            return comparison.compare_checkpoints(step, context)
        case PathReportTask():
            return path.path_report(step, context)
        case PruningReportTask():
            return pruning.pruning_report(step, context)
        case SeriesReportTask():
            return series.series_report(step, context)


def _point(step: PointStep, context: Context) -> Answer:
    """Compute a point; a failure names the point and its place on the axis."""
    name, place = _place(step)
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
        number = len(step.known) + 1
        detail = f"Point {number}, at {name} {place:.15g}: {error.detail}"
        raise AnalysisError(error.kind, detail, **error.members, point=number, at=place) from error


def _place(step: PointStep) -> tuple[str, float]:
    """Return the name of the axis of a step's points, and the next point's place on it."""
    match step:
        case PathPointTask():
            return path.place_on_path(step)
        case PruningPointTask():
            return pruning.place_in_sweep(step)
        case SeriesPointTask():
            return series.place_in_series(step)

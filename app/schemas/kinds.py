"""The kinds of analysis: one table that charts, gates and baselines read."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.schemas.base import Kind, Strict
from app.schemas.reports import ComparisonReport, EvaluationReport, PathReport, PruningReport, SeriesReport


@dataclass(frozen=True)
class KindOfAnalysis:
    """The properties of a kind of analysis.

    Attributes:
        report: model of the report.
        measures: measures that its overview shows, in order; each has a chart of its own too.
        further: further charts.
        place: member of a point that holds its place on the axis; None for a kind without points.
        axis: title of the axis; None takes the name in the report's `axis`.
        grows: whether a later report may have more points, so that points are counted from the end.
        choices: paths in `provenance` (options) or the report (axis) that change numbers as much as the checkpoint
            does; two reports are comparable only where they agree.
        metrics: pattern of the paths by which lists of its reports are sorted and filtered.
        planned: whether it has several steps, which several workers may compute.
        also_judged_as: another kind whose gates judge its reports too, beside gates of its own kind.
    """

    report: type[Strict]
    measures: tuple[str, ...]
    place: str | None = None
    axis: str | None = None
    grows: bool = False
    choices: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    metrics: str = r"(splits|summary)(\.[a-z]\w*)+"
    planned: bool = True
    also_judged_as: Kind | None = None


_OF_MODEL = ("loss", "accuracy", "mir", "hdr")
_FURTHER = (
    "calibration_error",
    "effective_rank",
    "mutual_information",
    "entropy_features",
    "entropy_head",
    "entropy_joint",
    "nc1",
    "nc1_condition",
    "nc2_equinorm_means",
    "nc2_equinorm_head",
    "nc2_equiangularity_means",
    "nc2_equiangularity_head",
    "nc2_max_angle_means",
    "nc2_max_angle_head",
    "nc3",
    "nc4",
)
KINDS: Mapping[Kind, KindOfAnalysis] = {
    "evaluation": KindOfAnalysis(
        EvaluationReport, ("mir", "hdr"), further=("classes", "confusion", "reliability"), planned=False
    ),
    "comparison": KindOfAnalysis(
        ComparisonReport,
        ("accuracy", "loss", "mir", "hdr"),
        further=_FURTHER,
        # Both sides have reports of their own, and a difference has eight more numbers.
        metrics=r"splits\.[a-z]+\.(differences(\.[a-z]\w*)+\.difference|predictions\.[a-z]\w*)",
        also_judged_as="evaluation",
    ),
    "path": KindOfAnalysis(
        PathReport,
        ("loss", "error", "mir", "hdr"),
        further=_FURTHER,
        place="w",
        axis="w (0 is A, 1 is B)",
        choices=("options.grid", "options.normalisation", "options.alignment"),
    ),
    "pruning": KindOfAnalysis(
        PruningReport,
        _OF_MODEL,
        further=_FURTHER,
        place="sparsity",
        axis="sparsity",
        choices=("options.sparsities", "options.scope", "options.include_head"),
    ),
    "series": KindOfAnalysis(SeriesReport, _OF_MODEL, further=_FURTHER, place="x", grows=True, choices=("axis.name",)),
}
#: Kinds of several steps.
PLANNED = tuple(kind for kind, properties in KINDS.items() if properties.planned)

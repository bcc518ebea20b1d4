"""The charts of one report."""

from collections.abc import Callable
from typing import Any

from app.api.charts.comparisons import difference_of
from app.api.charts.evaluations import accuracy_of_classes, confusions, of_interplay, reliability
from app.api.charts.measures import OF_INTERPLAY
from app.api.charts.parts import Panel, Report, finished, short, title_of
from app.api.charts.points import over_points
from app.schemas import Kind
from app.schemas.kinds import KINDS

# Kinds with points are drawn over them.
_PANEL_OF: dict[Kind, Callable[[str], Callable[[Report], Panel]]] = {
    "evaluation": of_interplay,
    "comparison": difference_of,
}
# Charts that are not of one measure.
_OF_CLASSES = {"classes": accuracy_of_classes, "confusion": confusions, "reliability": reliability}
_PANELS = {
    name: {
        chart: _OF_CLASSES.get(chart) or _PANEL_OF.get(name, over_points)(chart)
        for chart in (*kind.measures, *kind.further)
    }
    for name, kind in KINDS.items()
}


def describe(report: Report, name: str) -> dict[str, Any]:
    """Return the chart's Vega-Lite specification, with its data.

    Args:
        report: a report of any kind.
        name: one of `drawing.names` of its kind.

    Raises:
        KeyError: the chart does not exist.
    """
    panels = _PANELS[report["kind"]]
    measures = KINDS[report["kind"]].measures if name == "overview" else [name]
    drawn = [panels[measure](report) for measure in measures]
    columns = min(len(drawn), 2)
    subjects = [short(subject["name"]) for subject in report.get("subjects") or [report["subject"]]]
    about = subjects[0] if len(subjects) == 1 else f"{subjects[0]} to {subjects[-1]}"
    notes = [f"on {short(report['probe']['name'])}"]
    notes.append("; ".join(sorted({words for _, key in drawn for words in key}, reverse=True)))
    if report["kind"] != "evaluation" and name in ("overview", "mir", "hdr"):
        notes.append("MIR and HDR: sample level, global centring")
    elif report["kind"] != "evaluation" and name in OF_INTERPLAY:
        notes.append("sample level, global centring")
    title = title_of(f"{report['kind'].capitalize()}: {about}", notes, columns)
    return finished([panel for panel, _ in drawn], title, columns)

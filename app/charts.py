"""Pictures of reports: one Vega-Lite description for each, which gives SVG and PNG here and the chart of a browser.

Altair and the renderer load with the first picture that is asked for: an API process that draws none stays small.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import altair as alt
import vl_convert

Report = dict[str, Any]
Rows = list[dict[str, Any]]
Panel = alt.LayerChart | alt.FacetChart

_WIDTH, _HEIGHT, _PNG_SCALE = 320, 190, 2.0
# Okabe and Ito's, which people of all colour vision tell apart.
_COLOURS = {"train": "#0072B2", "test": "#D55E00", "all": "#7F7F7F"}
# Of each measure: how its axis is called, and the end of the scale that is always shown.
_LABELS = {"loss": "loss (nats)", "error": "error", "accuracy": "accuracy", "mir": "MIR", "hdr": "HDR"}
_BARRIERS = {"loss": "loss_barrier", "error": "error_barrier", "mir": "mir_barrier", "hdr": "hdr_barrier"}
_COMPARED = ("accuracy", "loss", "mir", "hdr")
_LEGEND = alt.Legend(title=None, orient="bottom", symbolOpacity=1)
_NOTE = "MIR and HDR: sample level, global centring"


def names(kind: str) -> list[str]:
    """Which charts a report of this kind has; the first shows the whole of it."""
    return list(_CHARTS[kind])


def describe(report: Report, name: str) -> dict[str, Any]:
    """The chart's Vega-Lite specification, with its data.

    Args:
        report: of any kind.
        name: one of `names` of its kind.

    Raises:
        KeyError: there is no such chart.
    """
    chart = _CHARTS[report["kind"]][name](report).configure_view(stroke=None)
    specification: dict[str, Any] = chart.configure_axis(grid=True, gridOpacity=0.4).to_dict()
    return specification


def svg(specification: dict[str, Any]) -> str:
    """The picture as SVG."""
    drawn: str = vl_convert.vegalite_to_svg(specification)
    return drawn


def png(specification: dict[str, Any]) -> bytes:
    """The picture as PNG, two pixels for each unit."""
    drawn: bytes = vl_convert.vegalite_to_png(specification, scale=_PNG_SCALE)
    return drawn


def _overview(*panels: Callable[[Report], Panel], title: str) -> Callable[[Report], alt.ConcatChart]:
    def draw(report: Report) -> alt.ConcatChart:
        return alt.concat(*(panel(report) for panel in panels), columns=2, spacing=24).properties(
            title=alt.TitleParams(f"{title}: {_about(report)}", subtitle=[_on(report), _NOTE], anchor="start")
        )

    return draw


def _about(report: Report) -> str:
    subjects = report.get("subjects") or [report["subject"]]
    named = [subject["name"] for subject in subjects]
    return named[0] if len(named) == 1 else f"{named[0]} to {named[-1]}"


def _on(report: Report) -> str:
    return f"on {report['probe']['name']}"


def _panel(measure: str) -> Callable[[Report], Panel]:
    """A measure over the points of a path, a sweep or a series, a line for each split."""

    def draw(report: Report) -> Panel:
        rows, key, label = _rows(report), *_axis(report)
        colour = alt.Color("split:N", scale=_scale(rows), legend=_LEGEND)
        x = alt.X(f"{key}:Q", title=label)
        # Where the measure is not defined the line is broken: nobody shall read a value there.
        lines = (
            _chart(rows)
            .mark_line(invalid="break-paths-show-domains", point=alt.OverlayMarkDef(size=22), strokeWidth=1.6)
            .encode(x=x, y=alt.Y(f"{measure}:Q", title=_LABELS[measure], scale=alt.Scale(zero=False)), color=colour)
        )
        layers = [*_reference(report, measure, x, colour), lines, *_marks(report, measure, colour)]
        return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)

    return draw


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))


def _axis(report: Report) -> tuple[str, str]:
    match report["kind"]:
        case "path":
            return "w", "w (0 is A, 1 is B)"
        case "pruning":
            return "sparsity", "sparsity"
    return "x", report["axis"]["name"]


def _rows(report: Report) -> Rows:
    key = _axis(report)[0]
    return [
        {
            key: point[key],
            "split": name,
            "loss": split["loss"],
            "error": 1 - split["accuracy"],
            "accuracy": split["accuracy"],
            "mir": split["interplay"]["sample"]["global"]["mir"],
            "hdr": split["interplay"]["sample"]["global"]["hdr"],
            "optimum": split["interplay"]["sample"]["global"]["optimum"],
        }
        for point in report["points"]
        for name, split in point["splits"].items()
    ]


def _scale(rows: Rows) -> alt.Scale:
    present = {row["split"] for row in rows}
    known = [name for name in _COLOURS if name in present]
    return alt.Scale(domain=known, range=[_COLOURS[name] for name in known])


def _reference(report: Report, measure: str, x: alt.X, colour: alt.Color) -> Iterator[alt.Chart]:
    """What the measure is read against: the chord of a path, the optimum of a series or a sweep."""
    rows, key = _rows(report), _axis(report)[0]
    if report["kind"] == "path":
        rows = [row for row in rows if row[key] in (0, 1) and row[measure] is not None]
        y = alt.Y(f"{measure}:Q")
        yield _chart(rows).mark_line(strokeDash=[4, 3], opacity=0.55).encode(x=x, y=y, color=colour)
    elif measure in ("mir", "hdr"):
        optima = [{**row, "optimum": row["optimum"][measure]} for row in rows if row["optimum"][measure] is not None]
        y = alt.Y("optimum:Q")
        lines = _chart(optima)
        yield lines.mark_line(strokeDash=[2, 3], opacity=0.7).encode(x=x, y=y, color=colour)


def _marks(report: Report, measure: str, colour: alt.Color) -> Iterator[alt.Chart]:
    """Where a path's barriers are, and a sweep's knees."""
    key, summary = _axis(report)[0], report["summary"]["splits"]
    if report["kind"] == "path":
        rows = [row for name in summary for row in _barrier(report, measure, name)]
        base = _chart(rows)
        yield base.mark_rule(strokeWidth=2.5).encode(x="at:Q", y="from:Q", y2="to:Q", color=colour)
    elif report["kind"] == "pruning" and measure == "accuracy":
        rows = [{key: split["knee"], "split": name} for name, split in summary.items() if split["knee"] is not None]
        base = _chart(rows)
        yield base.mark_rule(strokeDash=[6, 3], opacity=0.8).encode(x=f"{key}:Q", color=colour)


def _barrier(report: Report, measure: str, split: str) -> Rows:
    """From what the value is compared with to the value, where it departs from it most."""
    found = report["summary"]["splits"][split][_BARRIERS[measure]]
    if found is None or found["value"] <= 0:
        return []
    value = next(row[measure] for row in _rows(report) if row["split"] == split and row["w"] == found["at"])
    sign = -1 if measure == "mir" else 1
    return [{"split": split, "at": found["at"], "from": value - sign * found["value"], "to": value}]


def _evaluation_of(measure: str) -> Callable[[Report], Panel]:
    """MIR or HDR of every level, centring and split, with its optimum and the null baseline of MIR."""

    def draw(report: Report) -> Panel:
        rows = list(_measured(report, measure))
        colour = alt.Color("split:N", scale=_scale(rows), legend=_LEGEND)
        y = alt.Y("place:N", title=None, sort=None, axis=alt.Axis(labelLimit=240))
        offset = alt.YOffset("split:N", sort=list(_COLOURS))
        base = _chart(rows)
        layers: list[alt.Chart] = [
            base.mark_tick(thickness=2, color="black").encode(x=alt.X("optimum:Q"), y=y, yOffset=offset),
            base.mark_point(filled=True, size=60).encode(
                x=alt.X("value:Q", title=_LABELS[measure], scale=alt.Scale(domain=[0, 1])),
                y=y,
                yOffset=offset,
                color=colour,
            ),
        ]
        if measure == "mir":
            layers.insert(
                0,
                base.mark_point(shape="cross", size=40, opacity=0.7).encode(
                    x=alt.X("null:Q"), y=y, yOffset=offset, color=colour
                ),
            )
        return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)

    return draw


def _measured(report: Report, measure: str) -> Iterator[dict[str, Any]]:
    for split, values in report["splits"].items():
        for level, centrings in values["interplay"].items():
            for centring, found in centrings.items():
                yield {
                    "split": split,
                    "place": f"{level.replace('_', ' ')}, {centring}",
                    "value": found[measure],
                    "optimum": found["optimum"][measure],
                    "null": found["null"]["mean"] if found["null"] else None,
                }


def _evaluation(report: Report) -> alt.ConcatChart:
    note = "ticks: optimum at neural collapse; crosses: mean of the permutation baseline"
    return alt.concat(*(_evaluation_of(measure)(report) for measure in ("mir", "hdr")), columns=2).properties(
        title=alt.TitleParams(f"Evaluation: {_about(report)}", subtitle=[_on(report), note], anchor="start")
    )


def _difference_of(measure: str) -> Callable[[Report], Panel]:
    """B - A of one measure with its interval, for each split."""
    path = measure if measure in ("accuracy", "loss") else f"interplay.sample.global.{measure}"

    def draw(report: Report) -> Panel:
        rows = [{"split": name, **split["differences"][path]} for name, split in report["splits"].items()]
        colour = alt.Color("split:N", scale=_scale(rows), legend=None)
        y = alt.Y("split:N", title=None, sort=list(_COLOURS))
        base = _chart(rows)
        layers = [
            _chart([{"zero": 0}]).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"),
            base.mark_rule(strokeWidth=2.5).encode(x=alt.X("low:Q"), x2="high:Q", y=y, color=colour),
            base.mark_point(filled=True, size=70, opacity=1).encode(
                x=alt.X("difference:Q", title=f"{_LABELS[measure]}, B - A"), y=y, color=colour
            ),
        ]
        return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT // 2)

    return draw


def _comparison(report: Report) -> alt.ConcatChart:
    confidence = f"{report['provenance']['options']['confidence'] * 100:g} %"
    note = f"lines: {confidence} intervals of the difference; {_NOTE}"
    return alt.concat(*(_difference_of(measure)(report) for measure in _COMPARED), columns=2).properties(
        title=alt.TitleParams(f"Comparison: {_about(report)}", subtitle=[_on(report), note], anchor="start")
    )


def _of_points(title: str, measures: Sequence[str]) -> dict[str, Callable[[Report], Any]]:
    panels = {measure: _panel(measure) for measure in measures}
    return {"overview": _overview(*panels.values(), title=title), **panels}


_CHARTS: dict[str, dict[str, Callable[[Report], Any]]] = {
    "evaluation": {"overview": _evaluation, "mir": _evaluation_of("mir"), "hdr": _evaluation_of("hdr")},
    "comparison": {"overview": _comparison, **{measure: _difference_of(measure) for measure in _COMPARED}},
    "path": _of_points("Path", ("loss", "error", "mir", "hdr")),
    "pruning": _of_points("Pruning", ("loss", "accuracy", "mir", "hdr")),
    "series": _of_points("Series", ("loss", "accuracy", "mir", "hdr")),
}

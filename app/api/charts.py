"""Pictures of reports: one Vega-Lite specification each, rendered as SVG and PNG here and as a chart in a browser.

`app.api.drawing` runs this as a separate process: Altair and the renderer take seconds to load and 200 MiB, and hold
the interpreter.
"""

import json
import logging
import math
import os
import queue
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import altair as alt
import vl_convert

from app.schemas import Kind
from app.schemas.kinds import KINDS

logger = logging.getLogger(__name__)

Report = dict[str, Any]
Rows = list[dict[str, Any]]
# A chart, and the meanings of its marks.
Panel = tuple[alt.LayerChart | alt.FacetChart, list[str]]

_WIDTH, _HEIGHT, _PNG_SCALE = 320, 190, 2.0
# Okabe and Ito's colours, distinguishable with any colour vision.
_COLOURS = {"train": "#0072B2", "test": "#D55E00", "all": "#7F7F7F"}
_GREY = "#555555"
_LABELS = {"loss": "loss (nats)", "error": "error", "accuracy": "accuracy", "mir": "MIR", "hdr": "HDR"}
_BARRIERS = {"loss": "loss_barrier", "error": "error_barrier", "mir": "mir_barrier", "hdr": "hdr_barrier"}
_REASONS = {"zero_entropy": "all directions coincide", "no_directions": "no vector has a direction"}
_LEGEND = alt.Legend(title=None, orient="bottom", symbolOpacity=1)
_OPTIMUM = "optimum under neural collapse"
# The drawing process ends after this long without a chart to draw.
_IDLE_SECONDS = 300.0
# Pixels between the bars or knees of two splits: at the same place they would cover each other.
_DODGE = 3
# Most characters of a name, and, per panel width, of an axis label, a title line and a subtitle line.
_NAME, _AXIS, _TITLE, _SUBTITLE = 60, 44, 48, 64


def describe(report: Report, name: str) -> dict[str, Any]:
    """Return the chart's Vega-Lite specification, with its data.

    Args:
        report: a report of any kind.
        name: one of `drawing.names` of its kind.

    Raises:
        KeyError: the chart does not exist.
    """
    panels = _PANELS[report["kind"]]
    drawn = [panels[measure](report) for measure in (panels if name == "overview" else [name])]
    columns = min(len(drawn), 2)
    subjects = [_short(subject["name"]) for subject in report.get("subjects") or [report["subject"]]]
    about = subjects[0] if len(subjects) == 1 else f"{subjects[0]} to {subjects[-1]}"
    notes = [f"on {_short(report['probe']['name'])}"]
    notes.append("; ".join(sorted({words for _, key in drawn for words in key}, reverse=True)))
    if report["kind"] != "evaluation" and name in ("overview", "mir", "hdr"):
        notes.append("MIR and HDR: sample level, global centring")
    title = alt.TitleParams(
        textwrap.wrap(f"{report['kind'].capitalize()}: {about}", columns * _TITLE),
        subtitle=[line for note in notes for line in textwrap.wrap(note, columns * _SUBTITLE)],
        anchor="start",
        # Names may use a script with wider characters than the line lengths assume.
        limit=columns * (_WIDTH + 50),
    )
    chart = alt.concat(*(panel for panel, _ in drawn), columns=columns, spacing=24).properties(title=title)
    chart = chart.configure_view(stroke=None).configure_axis(grid=True, gridOpacity=0.4)
    specification: dict[str, Any] = chart.to_dict()
    return specification


def svg(specification: dict[str, Any]) -> str:
    """Return the picture as SVG."""
    drawn: str = vl_convert.vegalite_to_svg(specification)
    return drawn


def png(specification: dict[str, Any]) -> bytes:
    """Return the picture as PNG, two pixels for each unit."""
    drawn: bytes = vl_convert.vegalite_to_png(specification, scale=_PNG_SCALE)
    return drawn


def _over_points(measure: str) -> Callable[[Report], Panel]:
    """Return a function that draws a measure over the points of a path, a sweep or a series, one line per split."""

    def draw(report: Report) -> Panel:
        at, label = _axis(report)
        rows = list(_points(report, measure))
        levels, marks = list(_levels(report, measure, rows)), list(_marks(report, measure, rows))
        colour, splits, missing = _colour(rows), _splits(rows), _missing(rows, measure)
        # For a single sparsity, the whole range.
        along = _domain([row[at] for row in rows], least=0 if len(report["points"]) > 1 else 1)
        values = [row[measure] for row in rows]
        undefined = all(value is None for value in values)
        # An optimum alone gives no scale: show the whole range, with room for text.
        values += [row["level"] for row in levels] + ([0, 1] if undefined else [])
        span = _domain(values, _least(measure, values), ceiling=math.inf if measure == "loss" else 1)
        x = alt.X(f"{at}:Q", title=_short(label, _AXIS), scale=_scale(along), axis=_ticks(along, titleLimit=_WIDTH))
        y = alt.Y(f"{measure}:Q", title=_LABELS[measure], scale=_scale(span), axis=_ticks(span))
        # The line is broken where the measure is not defined, so that no value can be read there.
        lines = _chart(rows).mark_line(invalid="break-paths-show-domains", point={"size": 22}, strokeWidth=1.6)
        layers = [lines.encode(x=x, y=y, color=colour)]
        for index, split in enumerate(splits if levels else []):
            level = _chart(_of(levels, split))
            if report["kind"] == "path":
                chord = level.mark_line(strokeDash=[4, 3], opacity=0.55)
                layers.insert(0, chord.encode(x=x, y="level:Q", color=colour))
            else:
                # The splits' optima are nearly the same: the dots of one lie in the gaps of the others.
                dots = [2, 4 * len(splits) - 2]
                optimum = level.mark_rule(strokeDash=dots, strokeDashOffset=4 * index, strokeWidth=2)
                layers.insert(0, optimum.encode(y="level:Q", color=colour))
        # Moved apart in the order of their places, so that two nearby marks do not overlap either.
        for index, mark in enumerate(sorted(marks, key=lambda mark: mark[at])):
            aside = _DODGE * (index - (len(marks) - 1) / 2)
            if report["kind"] == "path":
                bar = _chart([mark]).mark_rule(strokeWidth=2, xOffset=aside)
                layers.append(bar.encode(x=x, y="from:Q", y2="to:Q", color=colour))
            else:
                layers.append(_chart([mark]).mark_rule(strokeDash=[6, 3], xOffset=aside).encode(x=x, color=colour))
        if undefined:
            words = _chart([{"words": "\n".join(missing)}]).mark_text(color=_GREY, lineBreak="\n")
            layers.append(words.encode(text="words:N", x=alt.value(_WIDTH / 2), y=alt.value(_HEIGHT * 0.7)))
        key = [words for words, shown in zip(_key(report, measure), (levels, marks), strict=True) if shown]
        panel = alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)
        if missing and not undefined:
            title = alt.TitleParams(missing, anchor="start", fontSize=10, fontWeight="normal", color=_GREY)
            panel = panel.properties(title=title)
        return panel, key

    return draw


def _axis(report: Report) -> tuple[str, str]:
    """Return the member of a point that holds its place, and the title of the axis."""
    kind = KINDS[report["kind"]]
    assert kind.place is not None, "only kinds with points are drawn over them"
    return kind.place, kind.axis or report["axis"]["name"]


def _key(report: Report, measure: str) -> tuple[str, str]:
    """Return the meanings of the levels and of the marks."""
    if report["kind"] == "path":
        chord = "dashed (error): mean of the ends" if measure == "error" else "dashed: chord between the ends"
        return chord, "bar: barrier at its place, splits side by side"
    return f"dotted: {_OPTIMUM}", "dashed: knee, the largest sparsity within 1 point of the accuracy at 0"


def _points(report: Report, measure: str) -> Iterator[dict[str, Any]]:
    at, _ = _axis(report)
    for point in report["points"]:
        for name, split in point["splits"].items():
            value, reason = _read(split, measure)
            yield {at: point[at], "split": name, measure: value} | ({"reason": reason} if value is None else {})


def _levels(report: Report, measure: str, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield the reference levels of a measure: the chord of a path, the optimum of a series or a sweep."""
    for split in _splits(rows):
        if report["kind"] == "path":
            ends = [(row["w"], row[measure]) for row in _of(rows, split) if row["w"] in (0, 1)]
            if all(value is not None for _, value in ends):
                mean = sum(value for _, value in ends) / 2
                # The error's barrier is Frankle's, from the mean of the ends; the others are from the chord.
                for w, value in ends:
                    yield {"w": w, "split": split, "level": mean if measure == "error" else value}
        elif measure in ("mir", "hdr"):
            # The optimum follows from the class counts, which are those of the probe at every point.
            optimum = report["points"][0]["splits"][split]["interplay"]["sample"]["global"]["optimum"][measure]
            if optimum is not None:
                yield {"split": split, "level": optimum}


def _marks(report: Report, measure: str, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield a path's barriers, each from its reference value to the measured value, or a sweep's knees."""
    for split in _splits(rows):
        if report["kind"] == "path":
            found = report["summary"]["splits"][split][_BARRIERS[measure]]
            if found is not None and found["value"] > 0:
                value = next(row[measure] for row in _of(rows, split) if row["w"] == found["at"])
                sign = -1 if measure == "mir" else 1
                yield {"split": split, "w": found["at"], "from": value - sign * found["value"], "to": value}
        elif report["kind"] == "pruning" and measure == "accuracy":
            knee = report["summary"]["splits"][split]["knee"]
            if knee is not None:
                yield {"sparsity": knee, "split": split}


def _missing(rows: Rows, measure: str) -> list[str]:
    """Return one line per reason for missing values: for which splits, and at how many points."""
    found: dict[tuple[str, str], list[str]] = {}
    for split in _splits(rows):
        of_split = _of(rows, split)
        reasons = [row["reason"] for row in of_split if row[measure] is None]
        if reasons:
            where = "" if len(reasons) == len(of_split) else f" at {len(reasons)} of {len(of_split)} points"
            found.setdefault((where, ", ".join(sorted(set(reasons)))), []).append(split)
    lines = []
    for (where, reason), splits in found.items():
        of = "" if splits == _splits(rows) else f" for {', '.join(splits)}"
        lines.append(f"not defined{of}{where}: {reason}")
    return lines


def _evaluation_of(measure: str) -> Callable[[Report], Panel]:
    """Return a function that draws MIR or HDR of every level, centring and split.

    It also draws the optimum and the null baseline of MIR.
    """

    def draw(report: Report) -> Panel:
        rows = list(_measured(report, measure))
        colour = _colour(rows)
        x = alt.X("value:Q", title=_LABELS[measure], scale=alt.Scale(domain=[0, 1]))
        y = alt.Y("place:N", title=None, sort=None, axis=alt.Axis(labelLimit=240))
        offset = alt.YOffset("split:N", sort=list(_COLOURS))
        base = _chart(rows).encode(y=y, yOffset=offset)
        layers = [base.mark_point(filled=True, size=60).encode(x=x, color=colour)]
        key = []
        if any(row["null"] is not None for row in rows):
            key.append("cross: mean of the permutation baseline")
            layers.insert(0, base.mark_point(shape="cross", size=40, opacity=0.7).encode(x="null:Q", color=colour))
        if any(row["optimum"] is not None for row in rows):
            key.insert(0, f"tick: {_OPTIMUM}")
            layers.insert(0, base.mark_tick(thickness=2, color="black").encode(x="optimum:Q"))
        words = base.mark_text(align="left", fontSize=9, color=_GREY).encode(text="words:N", x=alt.value(8))
        return alt.layer(*layers, words).properties(width=_WIDTH, height=_HEIGHT), key

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
                    "null": found["null"]["mean"] if found["null"] and measure == "mir" else None,
                    "words": f"not defined: {_reason(found, measure)}" if found[measure] is None else "",
                }


def _difference_of(measure: str) -> Callable[[Report], Panel]:
    """Return a function that draws B - A of one measure with its interval, for each split."""
    path = measure if measure in ("accuracy", "loss") else f"interplay.sample.global.{measure}"

    def draw(report: Report) -> Panel:
        rows = [{"split": name, **split["differences"][path]} for name, split in report["splits"].items()]
        for row in rows:
            row["words"] = _without(report["splits"][row["split"]], row, measure)
        drawn = [row[end] for row in rows for end in ("low", "difference", "high")]
        there = any(row["difference"] is not None for row in rows)
        span = _domain(
            [0, *drawn] if there else [], _least(measure, [row[side] for row in rows for side in "ab"]), floor=-math.inf
        )
        x = alt.X(
            "difference:Q",
            title=f"{_LABELS[measure]}, B - A",
            scale=_scale(span, padding=8),
            axis=_ticks(span, tickCount=3),
        )
        y = alt.Y("split:N", title=None, sort=list(_COLOURS))
        base, colour = _chart(rows).encode(y=y), _colour(rows, legend=None)
        words = base.mark_text(align="left", fontSize=9, color=_GREY, dy=-9)
        layers = [
            _chart([{"zero": 0}] if there else []).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"),
            base.mark_rule(strokeWidth=2.5).encode(x="low:Q", x2="high:Q", color=colour),
            base.mark_point(filled=True, size=70, opacity=1).encode(x=x, color=colour),
            words.encode(text="words:N", x=alt.value(8)),
        ]
        confidence = f"{report['provenance']['options']['confidence'] * 100:g} %"
        key = [f"bar: {confidence} interval of the difference", "dashed: no difference"]
        return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT // 2), key

    return draw


def _without(split: Report, difference: Report, measure: str) -> str:
    """Return why a difference or its interval is missing; empty if neither is."""
    if difference["difference"] is None:
        sides = ((side.upper(), *_read(split[side], measure)) for side in ("a", "b"))
        reasons = {f"{reason} (of {side})" for side, value, reason in sides if value is None}
        return f"not defined: {', '.join(sorted(reasons))}"
    return f"no interval: {_in_words(difference['reason'])}" if difference["low"] is None else ""


def _read(split: Report, measure: str) -> tuple[float | None, str]:
    """Return a measure of an evaluated split, and the reason if it is not defined."""
    field = "accuracy" if measure == "error" else measure
    found = split["interplay"]["sample"]["global"] if field in ("mir", "hdr") else split
    if found[field] is None:
        return None, _reason(found, field)
    return (1 - found[field] if measure == "error" else found[field]), ""


def _reason(found: Report, field: str) -> str:
    return _in_words(found["reasons"].get(field))


def _in_words(reason: str | None) -> str:
    return _REASONS.get(reason or "", (reason or "no reason is given").replace("_", " "))


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))


def _of(rows: Rows, split: str) -> Rows:
    return [row for row in rows if row["split"] == split]


def _splits(rows: Rows) -> list[str]:
    present = {row["split"] for row in rows}
    return [name for name in _COLOURS if name in present]


def _colour(rows: Rows, legend: alt.Legend | None = _LEGEND) -> alt.Color:
    splits = _splits(rows)
    scale = alt.Scale(domain=splits, range=[_COLOURS[name] for name in splits])
    return alt.Color("split:N", scale=scale, legend=legend)


def _least(measure: str, values: Iterable[float | None]) -> float:
    """Return the least width of a scale: for shares 0.001, for the loss a thousandth of its size."""
    if measure != "loss":
        return 1e-3
    return max(1e-3 * max((abs(value) for value in values if value is not None), default=0), 1e-6)


def _domain(values: Iterable[float | None], least: float, floor: float = 0, ceiling: float = 1) -> tuple[float, float]:
    """Return the smallest and largest value; a narrower range is widened to the least width, within the bounds.

    So rounding errors do not fill the scale.
    """
    known = [value for value in values if value is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low < least:
        low = min(max((low + high - least) / 2, floor), ceiling - least)
        high = low + least
    return low, high


def _scale(domain: tuple[float, float], padding: int = 0) -> alt.Scale:
    return alt.Scale(domain=list(domain), nice=True, zero=False, padding=padding)


def _ticks(domain: tuple[float, float], **options: Any) -> alt.Axis:
    """Return an axis; very large and very small numbers get a power of ten, and digits enough to tell ticks apart."""
    size = max(map(abs, domain))
    if not 1e-3 <= size < 1e7:
        options["format"] = f".{3 + math.ceil(math.log10(max(size / (domain[1] - domain[0]), 1)))}~g"
    return alt.Axis(labelSeparation=6, **options)


def _short(name: str, most: int = _NAME) -> str:
    """Return a long name without its middle: names of one run often differ at their ends."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def draw(report: Report, name: str, format: str) -> bytes:
    """Draw a chart in one of its formats: SVG, PNG, or as json its specification; js is the library that draws it."""
    if format == "js":
        library: str = vl_convert.javascript_bundle(None)  # type: ignore[arg-type]  # its stub forgets the default
        return library.encode()
    specification = describe(report, name)
    match format:
        case "svg":
            return svg(specification).encode()
        case "png":
            return png(specification)
    return json.dumps(specification).encode()


def main() -> None:
    """Run the drawing process: read each chart as a line of JSON, write its size as a line and its bytes.

    It reads standard input and writes standard output. It ends when its input does, also in the middle of a chart, and
    after a while without requests.
    """
    # Output that libraries print must not get between the answers.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    while True:
        try:
            task = json.loads(tasks.get(timeout=_IDLE_SECONDS))
        except queue.Empty:
            os._exit(0)
        try:
            drawn = draw(json.loads(task["report"]), task["name"], task["format"])
            output.write(b"%d\n" % len(drawn) + drawn)
        except Exception:
            # A bug of ours, which must not end this process.
            logger.exception("%s.%s was not drawn", task["name"], task["format"])
            output.write(b"-1\n")
        output.flush()


def _read_tasks(tasks: "queue.SimpleQueue[bytes]") -> None:
    for line in sys.stdin.buffer:
        tasks.put(line)
    os._exit(0)


# Kinds with points are drawn over them.
_PANEL_OF: dict[Kind, Callable[[str], Callable[[Report], Panel]]] = {
    "evaluation": _evaluation_of,
    "comparison": _difference_of,
}
_PANELS = {
    name: {measure: _PANEL_OF.get(name, _over_points)(measure) for measure in kind.measures}
    for name, kind in KINDS.items()
}

if __name__ == "__main__":
    main()

"""Charts of measures over the points of a path, a pruning sweep or a series."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import altair as alt

from app.api.charts.measures import read
from app.api.charts.parts import (
    AXIS,
    GREY,
    HEIGHT,
    LABELS,
    OPTIMUM,
    SHARES,
    WIDTH,
    Panel,
    Report,
    Rows,
    chart_of,
    colour_of,
    domain_of,
    least_width,
    of_split,
    scale_of,
    short,
    splits_of,
    ticks_of,
)
from app.schemas.kinds import KINDS

_BARRIERS = {"loss": "loss_barrier", "error": "error_barrier", "mir": "mir_barrier", "hdr": "hdr_barrier"}
# Pixels between the bars or knees of two splits: at the same place they would cover each other.
_DODGE = 3


def over_points(measure: str) -> Callable[[Report], Panel]:
    """Return a function that draws a measure over the points of a path, a sweep or a series, one line per split."""

    def draw(report: Report) -> Panel:
        at, label = _axis(report)
        rows = list(_points(report, measure))
        levels, marks = list(_levels(report, measure, rows)), list(_marks(report, measure, rows))
        colour, splits, missing = colour_of(rows), splits_of(rows), _missing(rows, measure)
        # For a single sparsity, the whole range.
        along = domain_of([row[at] for row in rows], least=0 if len(report["points"]) > 1 else 1)
        values = [row[measure] for row in rows]
        undefined = all(value is None for value in values)
        # An optimum alone gives no scale: show the whole range, with room for text.
        values += [row["level"] for row in levels] + ([0, 1] if undefined else [])
        span = domain_of(values, least_width(measure, values), ceiling=1 if measure in SHARES else math.inf)
        x = alt.X(f"{at}:Q", title=short(label, AXIS), scale=scale_of(along), axis=ticks_of(along, titleLimit=WIDTH))
        y = alt.Y(f"{measure}:Q", title=LABELS[measure], scale=scale_of(span), axis=ticks_of(span))
        # The line is broken where the measure is not defined, so that no value can be read there.
        lines = chart_of(rows).mark_line(invalid="break-paths-show-domains", point={"size": 22}, strokeWidth=1.6)
        layers = [lines.encode(x=x, y=y, color=colour)]
        for index, split in enumerate(splits if levels else []):
            level = chart_of(of_split(levels, split))
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
                bar = chart_of([mark]).mark_rule(strokeWidth=2, xOffset=aside)
                layers.append(bar.encode(x=x, y="from:Q", y2="to:Q", color=colour))
            else:
                layers.append(chart_of([mark]).mark_rule(strokeDash=[6, 3], xOffset=aside).encode(x=x, color=colour))
        if undefined:
            words = chart_of([{"words": "\n".join(missing)}]).mark_text(color=GREY, lineBreak="\n")
            layers.append(words.encode(text="words:N", x=alt.value(WIDTH / 2), y=alt.value(HEIGHT * 0.7)))
        key = [words for words, shown in zip(_key(report, measure), (levels, marks), strict=True) if shown]
        panel = alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)
        if missing and not undefined:
            title = alt.TitleParams(missing, anchor="start", fontSize=10, fontWeight="normal", color=GREY)
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
    return f"dotted: {OPTIMUM}", "dashed: knee, the largest sparsity within 1 point of the accuracy at 0"


def _points(report: Report, measure: str) -> Iterator[dict[str, Any]]:
    at, _ = _axis(report)
    for point in report["points"]:
        for name, split in point["splits"].items():
            value, reason = read(split, measure)
            yield {at: point[at], "split": name, measure: value} | ({"reason": reason} if value is None else {})


def _levels(report: Report, measure: str, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield the reference levels of a measure: the chord of a path, the optimum of a series or a sweep."""
    for split in splits_of(rows):
        if report["kind"] == "path" and measure in _BARRIERS:
            ends = [(row["w"], row[measure]) for row in of_split(rows, split) if row["w"] in (0, 1)]
            if all(value is not None for _, value in ends):
                mean = sum(value for _, value in ends) / 2
                # The error's barrier is Frankle's, from the mean of the ends; the others are from the chord.
                for w, value in ends:
                    yield {"w": w, "split": split, "level": mean if measure == "error" else value}
        elif report["kind"] != "path" and measure in ("mir", "hdr"):
            # The optimum follows from the class counts, which are those of the probe at every point.
            optimum = report["points"][0]["splits"][split]["interplay"]["sample"]["global"]["optimum"][measure]
            if optimum is not None:
                yield {"split": split, "level": optimum}


def _marks(report: Report, measure: str, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield a path's barriers, each from its reference value to the measured value, or a sweep's knees."""
    for split in splits_of(rows):
        if report["kind"] == "path" and measure in _BARRIERS:
            found = report["summary"]["splits"][split][_BARRIERS[measure]]
            if found is not None and found["value"] > 0:
                value = next(row[measure] for row in of_split(rows, split) if row["w"] == found["at"])
                sign = -1 if measure == "mir" else 1
                yield {"split": split, "w": found["at"], "from": value - sign * found["value"], "to": value}
        elif report["kind"] == "pruning" and measure == "accuracy":
            knee = report["summary"]["splits"][split]["knee"]
            if knee is not None:
                yield {"sparsity": knee, "split": split}


def _missing(rows: Rows, measure: str) -> list[str]:
    """Return one line per reason for missing values: for which splits, and at how many points."""
    found: dict[tuple[str, str], list[str]] = {}
    for split in splits_of(rows):
        own = of_split(rows, split)
        reasons = [row["reason"] for row in own if row[measure] is None]
        if reasons:
            where = "" if len(reasons) == len(own) else f" at {len(reasons)} of {len(own)} points"
            found.setdefault((where, ", ".join(sorted(set(reasons)))), []).append(split)
    lines = []
    for (where, reason), splits in found.items():
        of = "" if splits == splits_of(rows) else f" for {', '.join(splits)}"
        lines.append(f"not defined{of}{where}: {reason}")
    return lines

"""Charts of a comparison: each difference with its interval."""

import math
from collections.abc import Callable

import altair as alt

from app.api.charts.measures import in_words, read, within
from app.api.charts.parts import (
    COLOURS,
    GREY,
    HEIGHT,
    LABELS,
    WIDTH,
    Panel,
    Report,
    chart_of,
    colour_of,
    domain_of,
    least_width,
    scale_of,
    ticks_of,
)


def difference_of(measure: str) -> Callable[[Report], Panel]:
    """Return a function that draws B - A of one measure with its interval, for each split."""
    path = ".".join([*within(measure), measure])

    def draw(report: Report) -> Panel:
        rows = [{"split": name, **split["differences"][path]} for name, split in report["splits"].items()]
        for row in rows:
            row["words"] = _without(report["splits"][row["split"]], row, measure)
        drawn = [row[end] for row in rows for end in ("low", "difference", "high")]
        there = any(row["difference"] is not None for row in rows)
        span = domain_of(
            [0, *drawn] if there else [],
            least_width(measure, [row[side] for row in rows for side in "ab"]),
            floor=-math.inf,
        )
        x = alt.X(
            "difference:Q",
            title=f"{LABELS[measure]}, B - A",
            scale=scale_of(span, padding=8),
            axis=ticks_of(span, tickCount=3),
        )
        y = alt.Y("split:N", title=None, sort=list(COLOURS))
        base, colour = chart_of(rows).encode(y=y), colour_of(rows, legend=None)
        words = base.mark_text(align="left", fontSize=9, color=GREY, dy=-9)
        layers = [
            chart_of([{"zero": 0}] if there else []).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"),
            base.mark_rule(strokeWidth=2.5).encode(x="low:Q", x2="high:Q", color=colour),
            base.mark_point(filled=True, size=70, opacity=1).encode(x=x, color=colour),
            words.encode(text="words:N", x=alt.value(8)),
        ]
        confidence = f"{report['provenance']['options']['confidence'] * 100:g} %"
        key = [f"bar: {confidence} interval of the difference", "dashed: no difference"]
        return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT // 2), key

    return draw


def _without(split: Report, difference: Report, measure: str) -> str:
    """Return why a difference or its interval is missing; empty if neither is."""
    if difference["difference"] is None:
        sides = ((side.upper(), *read(split[side], measure)) for side in ("a", "b"))
        reasons = {f"{reason} (of {side})" for side, value, reason in sides if value is None}
        return f"not defined: {', '.join(sorted(reasons))}"
    return f"no interval: {in_words(difference['reason'])}" if difference["low"] is None else ""

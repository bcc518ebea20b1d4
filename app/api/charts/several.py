"""Charts of several reports: measures over the points of each, and their metadata and metrics side by side."""

import math
from typing import Any

import altair as alt

from app.api.charts.parts import (
    AXIS,
    GREY,
    HEIGHT,
    LABELS,
    SHARES,
    WIDTH,
    chart_of,
    domain_of,
    finished,
    least_width,
    scale_of,
    short,
    ticks_of,
    title_of,
)

# Okabe and Ito's colours; with three dashes they tell 24 lines apart, with any colour vision.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_DASHES = ([1, 0], [6, 3], [2, 2])
_LABEL = 40
# Pixels of a picture over points, of one with parallel axes, and between two of these at least.
_OVER_POINTS, _ACROSS, _APART = 400, 2 * WIDTH, 100


def overlay(data: dict[str, Any]) -> dict[str, Any]:
    """Draw a measure over the points of several reports of one kind, one line each.

    Args:
        data: `measure`; `split`; `axis`, the title of the common axis; `lines`, each with `label` and `points`, a list
            of [place, value or null].
    """
    measure, lines = data["measure"], data["lines"]
    rows = [
        {"report": short(line["label"], _LABEL), "place": place, "value": value}
        for line in lines
        for place, value in line["points"]
    ]
    places, values = [row["place"] for row in rows], [row["value"] for row in rows]
    along = domain_of(places, least=0 if len(set(places)) > 1 else 1)
    span = domain_of(values, least_width(measure, values), ceiling=1 if measure in SHARES else math.inf)
    x = alt.X("place:Q", title=short(data["axis"], AXIS), scale=scale_of(along), axis=ticks_of(along))
    y = alt.Y("value:Q", title=LABELS[measure], scale=scale_of(span), axis=ticks_of(span))
    labels = [short(line["label"], _LABEL) for line in lines]
    colours = [_LINES[index % len(_LINES)] for index in range(len(labels))]
    dashes = [_DASHES[index // len(_LINES)] for index in range(len(labels))]
    legend = alt.Legend(title=None, orient="bottom", columns=1, labelLimit=_OVER_POINTS - 30, symbolOpacity=1)
    chart = (
        chart_of(rows)
        .mark_line(invalid="break-paths-show-domains", point={"size": 22}, strokeWidth=1.6)
        .encode(
            x=x,
            y=y,
            color=alt.Color("report:N", scale=alt.Scale(domain=labels, range=colours), legend=legend),
            strokeDash=alt.StrokeDash("report:N", scale=alt.Scale(domain=labels, range=dashes), legend=legend),
            tooltip=["report:N", alt.Tooltip("place:Q", title=data["axis"]), alt.Tooltip("value:Q", title=measure)],
        )
    )
    panel = alt.layer(chart).properties(width=_OVER_POINTS, height=HEIGHT + 60)
    notes = [f"split: {data['split']}"]
    missing = sum(value is None for value in values)
    if missing:
        notes.append(f"not defined at {missing} of {len(values)} points")
    return finished([panel], title_of(f"{LABELS[measure]} of {len(lines)} reports", notes, 1), 1)


def parallel(data: dict[str, Any]) -> dict[str, Any]:
    """Draw reports as lines across parallel axes, coloured by the last axis.

    Args:
        data: `split`; `axes`, each with `title` and `labels`, a list of [height from 0 to 1, text]; `lines`, each with
            `label`, `heights`, for each axis a height or null where the report has no value, and `words`, the values.
    """
    titles = [axis["title"] for axis in data["axes"]]
    width = max(_ACROSS, _APART * (len(titles) - 1))
    # Names of axes may be alike once they are shortened: their places tell them apart.
    rows = [
        {
            "report": short(line["label"], _LABEL),
            "axis": index,
            "title": titles[index],
            "height": height,
            "value": line["words"][index],
            "shade": line["heights"][-1],
        }
        for line in data["lines"]
        for index, height in enumerate(line["heights"])
    ]
    texts = [
        {"axis": index, "height": height, "words": short(text, 14)}
        for index, axis in enumerate(data["axes"])
        for height, text in axis["labels"]
    ]
    heads = [
        {"axis": index, "height": 1.08 + 0.08 * (index % 2), "words": short(title, 22)}
        for index, title in enumerate(titles)
    ]
    x = alt.X("axis:Q", scale=alt.Scale(domain=[0, max(len(titles) - 1, 1)], nice=False, padding=30), axis=None)
    y = alt.Y("height:Q", scale=alt.Scale(domain=[0, 1.2], nice=False), axis=None)
    shade = alt.Color("shade:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1]), legend=None)
    base = chart_of(rows).encode(
        x=x,
        y=y,
        color=shade,
        detail="report:N",
        tooltip=["report:N", "title:N", alt.Tooltip("value:N")],
    )
    posts = chart_of([{"axis": index, "height": 0, "top": 1} for index in range(len(titles))])
    labels = chart_of(texts).encode(x=x, y=y, text="words:N")
    layers = [
        posts.mark_rule(color=GREY, opacity=0.6).encode(x=x, y=y, y2="top:Q"),
        base.mark_line(strokeWidth=1.8, opacity=0.85, invalid="break-paths-show-domains"),
        base.mark_point(filled=True, size=32, opacity=1),
        # A white rim keeps labels readable on the lines.
        labels.mark_text(align="left", dx=6, fontSize=9, stroke="white", strokeWidth=3),
        labels.mark_text(align="left", dx=6, fontSize=9, color="black"),
        chart_of(heads).mark_text(fontSize=10, fontWeight="bold").encode(x=x, y=y, text="words:N"),
    ]
    panel = alt.layer(*layers).properties(width=width, height=HEIGHT + 90)
    notes = [f"split: {data['split']}", f"colour: {titles[-1]}, yellow where it is largest"]
    return finished([panel], title_of(f"{len(data['lines'])} reports", notes, 2), 2)

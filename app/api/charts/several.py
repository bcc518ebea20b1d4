"""Charts of several reports: measures over the points of each, over a run or over time, and all side by side."""

import math
from datetime import UTC, datetime
from typing import Any

import altair as alt

from app.api.charts.parts import (
    AXIS,
    GREY,
    HEIGHT,
    LABELS,
    LEGEND,
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
_COURSES = ("accuracy", "mir", "hdr")
_SHAPES = ("circle", "square", "triangle-up")
# Milliseconds of an axis of time at least, and by its length from how many on its labels have which form.
_LEAST_SPAN = 20_000
_INSTANTS = ((10 * 86_400_000, "%Y-%m-%d"), (7_200_000, "%m-%d %H:%M"), (300_000, "%H:%M"), (0, "%H:%M:%S"))
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
            tooltip=[
                "report:N",
                alt.Tooltip("place:Q", title=short(data["axis"], AXIS)),
                alt.Tooltip("value:Q", title=measure),
            ],
        )
    )
    panel = alt.layer(chart).properties(width=_OVER_POINTS, height=HEIGHT + 60)
    notes = [f"split: {data['split']}"]
    missing = sum(value is None for value in values)
    if missing:
        notes.append(f"not defined at {missing} of {len(values)} points")
    return finished([panel], title_of(f"{LABELS[measure]} of {len(lines)} reports", notes, 1), 1)


def course(data: dict[str, Any]) -> dict[str, Any]:
    """Draw accuracy, MIR and HDR of evaluations, one line each, over the epochs of a run or over time.

    Args:
        data: `about`; `split`; `axis`, its title; `is_time`, whether places are seconds since 1970; `joined`, whether
            lines join the points; `here`, a place to mark, or null; `points`, each with `place`, `report`, `created`
            and the measures, null where they are not defined.
    """
    points, is_time = data["points"], data["is_time"]
    rows = [
        {
            "measure": LABELS[measure],
            # Vega counts milliseconds.
            "place": 1000 * point["place"] if is_time else point["place"],
            "value": point[measure],
            "report": short(point["report"], _LABEL),
            "created": f"{point['created']} UTC",
        }
        for measure in _COURSES
        for point in points
    ]
    places, values = [row["place"] for row in rows], [row["value"] for row in rows]
    span = domain_of(values, 1e-3)
    title = short(data["axis"], AXIS)
    x = _instants(places, title) if is_time else _numbers(places, title)
    names = [LABELS[measure] for measure in _COURSES]
    colour = alt.Color("measure:N", scale=alt.Scale(domain=names, range=list(_LINES[: len(names)])), legend=LEGEND)
    tooltip: list[Any] = ["measure:N", alt.Tooltip("value:Q"), "report:N", "created:N"]
    tooltip += [] if is_time else [alt.Tooltip("place:Q", title=title)]
    base = chart_of(rows).encode(
        x=x, y=alt.Y("value:Q", title=None, scale=scale_of(span), axis=ticks_of(span)), color=colour, tooltip=tooltip
    )
    # Shapes tell the measures apart where colours do not.
    shape = alt.Shape("measure:N", scale=alt.Scale(domain=names, range=list(_SHAPES)), legend=LEGEND)
    layers = [base.mark_point(filled=True, size=30, opacity=1).encode(shape=shape)]
    if data["joined"]:
        layers.insert(0, base.mark_line(strokeWidth=1.6, invalid="break-paths-show-domains"))
    notes = [f"split: {data['split']}"]
    if data["here"] is not None:
        marked = chart_of([{"place": data["here"]}]).mark_rule(color=GREY, strokeDash=[4, 3]).encode(x=x)
        layers.insert(0, marked)
        notes.append("dashed rule: this checkpoint")
    missing = sum(value is None for value in values)
    if missing:
        notes.append(f"not defined at {missing} of {len(values)} points")
    panel = alt.layer(*layers).properties(width=_OVER_POINTS, height=HEIGHT + 30)
    return finished([panel], title_of(f"{len(points)} evaluations {data['about']}", notes, 1), 1)


def _numbers(places: list[float], title: str) -> alt.X:
    along = domain_of(places, least=0 if len(set(places)) > 1 else 1)
    return alt.X("place:Q", title=title, scale=scale_of(along), axis=ticks_of(along))


def _instants(places: list[float], title: str) -> alt.X:
    """Return an axis of milliseconds since 1970, of some seconds at least, with labels as exact as it is short."""
    first, last = min(places), max(places)
    spare = max(_LEAST_SPAN - (last - first), 0) / 2
    span = last - first + 2 * spare
    format = next(format for least, format in _INSTANTS if span >= least)
    scale = alt.Scale(type="utc", domain=[_instant(first - spare), _instant(last + spare)], padding=8)
    return alt.X("place:T", title=title, scale=scale, axis=alt.Axis(format=format, tickCount=4, labelSeparation=6))


def _instant(milliseconds: float) -> alt.DateTime:
    """Return an instant as a domain of time has it, where numbers are taken for data."""
    found = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return alt.DateTime(
        year=found.year,
        month=found.month,
        date=found.day,
        hours=found.hour,
        minutes=found.minute,
        seconds=found.second,
        milliseconds=found.microsecond // 1000,
        utc=True,
    )


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

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
_LABELS = {
    "loss": "loss (nats)",
    "error": "error",
    "accuracy": "accuracy",
    "mir": "MIR",
    "hdr": "HDR",
    "calibration_error": "calibration error",
    "effective_rank": "effective rank",
    "mutual_information": "mutual information (nats)",
    "entropy_features": "H of features (nats)",
    "entropy_head": "H of head rows (nats)",
    "entropy_joint": "joint H (nats)",
    "nc1": "NC1",
    "nc1_condition": "condition number of NC1",
    "nc2_equinorm_means": "NC2 equinorm, means",
    "nc2_equinorm_head": "NC2 equinorm, head",
    "nc2_equiangularity_means": "NC2 equiangularity, means",
    "nc2_equiangularity_head": "NC2 equiangularity, head",
    "nc2_max_angle_means": "NC2 maximal angle, means",
    "nc2_max_angle_head": "NC2 maximal angle, head",
    "nc3": "NC3",
    "nc4": "NC4",
}
_OF_INTERPLAY = ("mir", "hdr", "mutual_information", "entropy_features", "entropy_head", "entropy_joint")
# Measures between 0 and 1; others have no upper bound.
_SHARES = ("error", "accuracy", "mir", "hdr", "calibration_error", "nc4")
# Most classes that a chart lists, and most whose confusions it shows as a matrix.
_MOST_CLASSES, _MOST_IN_MATRIX = 30, 20
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
    measures = KINDS[report["kind"]].measures if name == "overview" else [name]
    drawn = [panels[measure](report) for measure in measures]
    columns = min(len(drawn), 2)
    subjects = [_short(subject["name"]) for subject in report.get("subjects") or [report["subject"]]]
    about = subjects[0] if len(subjects) == 1 else f"{subjects[0]} to {subjects[-1]}"
    notes = [f"on {_short(report['probe']['name'])}"]
    notes.append("; ".join(sorted({words for _, key in drawn for words in key}, reverse=True)))
    if report["kind"] != "evaluation" and name in ("overview", "mir", "hdr"):
        notes.append("MIR and HDR: sample level, global centring")
    elif report["kind"] != "evaluation" and name in _OF_INTERPLAY:
        notes.append("sample level, global centring")
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
        span = _domain(values, _least(measure, values), ceiling=1 if measure in _SHARES else math.inf)
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
        if report["kind"] == "path" and measure in _BARRIERS:
            ends = [(row["w"], row[measure]) for row in _of(rows, split) if row["w"] in (0, 1)]
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
    for split in _splits(rows):
        if report["kind"] == "path" and measure in _BARRIERS:
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
    path = ".".join([*_within(measure), measure])

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
    field, found = "accuracy" if measure == "error" else measure, split
    for name in _within(measure):
        found = found[name]
    if found[field] is None:
        return None, _reason(found, field)
    return (1 - found[field] if measure == "error" else found[field]), ""


def _within(measure: str) -> tuple[str, ...]:
    """Return where in a split a measure stands."""
    if measure in _OF_INTERPLAY:
        return "interplay", "sample", "global"
    return ("collapse",) if measure.startswith("nc") else ()


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
    """Return the least width of a scale: for shares 0.001, for others a thousandth of their size."""
    if measure in _SHARES:
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


def _accuracy_of_classes(report: Report) -> Panel:
    """Draw the accuracy of each class; of many classes, of those with the lowest."""
    if (missing := _without_classes(report)) is not None:
        return missing
    main = report["splits"][_main_split(report)]
    known = [label for label, accuracy in enumerate(main["by_class"]["accuracy"]) if accuracy is not None]
    lowest = sorted(known, key=lambda label: main["by_class"]["accuracy"][label])[:_MOST_CLASSES]
    rows = [
        {"class": _class_name(report, label), "split": name, "accuracy": split["by_class"]["accuracy"][label]}
        for label in sorted(lowest)
        for name, split in report["splits"].items()
    ]
    y = alt.Y("class:N", title=None, sort=None, axis=alt.Axis(labelLimit=140))
    x = alt.X("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    offset = alt.YOffset("split:N", sort=list(_COLOURS))
    points = _chart(rows).mark_point(filled=True, size=45).encode(x=x, y=y, yOffset=offset, color=_colour(rows))
    key = [] if len(lowest) == len(known) else [f"the {len(lowest)} of {len(known):,} classes with the lowest accuracy"]
    return alt.layer(points).properties(width=_WIDTH, height=max(_HEIGHT, 16 * len(lowest))), key


def _confusions(report: Report) -> Panel:
    """Draw the confusion matrix of the main split; of many classes, the largest confusions."""
    if (missing := _without_classes(report)) is not None:
        return missing
    name = _main_split(report)
    split = report["splits"][name]
    counts, found = split["class_counts"], split["by_class"]
    where = f"split: {name}"
    rows = [
        {
            "class": _class_name(report, entry["label"]),
            "predicted": _class_name(report, entry["predicted"]),
            "samples": entry["n_samples"],
            "share": entry["n_samples"] / counts[entry["label"]],
        }
        for entry in found["confusions"]
    ]
    if len(counts) > _MOST_IN_MATRIX:
        for row in rows:
            row["pair"] = f"{row['class']} as {row['predicted']}"
        x = alt.X("samples:Q", title="samples", axis=alt.Axis(tickMinStep=1))
        y = alt.Y("pair:N", title=None, sort=None, axis=alt.Axis(labelLimit=200))
        bars = _chart(rows[:_MOST_IN_MATRIX]).mark_bar(color=_COLOURS[name]).encode(x=x, y=y)
        return alt.layer(bars).properties(width=_WIDTH, height=300), [f"the largest confusions; {where}"]
    names = [_class_name(report, label) for label in range(len(counts))]
    for label, (accuracy, count) in enumerate(zip(found["accuracy"], counts, strict=True)):
        if count:
            right = round((accuracy or 0) * count)
            rows.append({"class": names[label], "predicted": names[label], "samples": right, "share": right / count})
    x = alt.X("predicted:N", title="predicted", sort=names, axis=alt.Axis(labelLimit=80, labelAngle=-45, grid=False))
    base = _chart(rows).encode(
        x=x, y=alt.Y("class:N", title="class", sort=names, axis=alt.Axis(labelLimit=120, grid=False))
    )
    shade = alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=None)
    dark = alt.condition("datum.share > 0.6", alt.value("white"), alt.value("black"))
    layers = [base.mark_rect().encode(color=shade), base.mark_text(fontSize=9).encode(text="samples:Q", color=dark)]
    size = max(_WIDTH, 22 * len(names))
    return alt.layer(*layers).properties(width=size, height=size), [f"shade: share of the class; {where}"]


def _reliability(report: Report) -> Panel:
    """Draw accuracy over mean confidence, by the bins of the calibration error."""
    if (missing := _without_classes(report)) is not None:
        return missing
    rows = [
        {"split": name, "confidence": one["confidence"], "accuracy": one["accuracy"], "samples": one["n_samples"]}
        for name, split in report["splits"].items()
        for one in split["reliability"]
        if one["n_samples"]
    ]
    x = alt.X("confidence:Q", title="mean probability of the predicted class", scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    diagonal = _chart([{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}])
    lines = _chart(rows).mark_line(strokeWidth=1.4).encode(x=x, y=y, color=_colour(rows))
    area = alt.Size("samples:Q", scale=alt.Scale(range=[12, 200]), legend=None)
    points = _chart(rows).mark_point(filled=True, opacity=0.8).encode(x=x, y=y, color=_colour(rows), size=area)
    layers = [diagonal.mark_line(strokeDash=[4, 3], color=_GREY).encode(x=x, y=y), lines, points]
    key = ["dashed: perfectly calibrated", "area of a point: samples in its bin"]
    return alt.layer(*layers).properties(width=_WIDTH, height=_WIDTH), key


def _main_split(report: Report) -> str:
    return next(name for name in ("test", "all", "train") if name in report["splits"])


def _class_name(report: Report, label: int | None) -> str:
    if label is None:
        return "no class"
    if (tokens := report["probe"].get("next_tokens")) is not None:
        return f"token {tokens['token_ids'][label]}"
    names = report["probe"]["class_names"]
    return _short(names[label], 40) if names and label < len(names) else str(label)


def _without_classes(report: Report) -> Panel | None:
    """Return a panel that says so if a report is older than predictions by class."""
    if all(split.get("by_class") for split in report["splits"].values()):
        return None
    words = _chart([{"words": "not in this report:\nit is older than predictions by class"}])
    text = words.mark_text(color=_GREY, lineBreak="\n").encode(
        text="words:N", x=alt.value(_WIDTH / 2), y=alt.value(_HEIGHT / 2)
    )
    return alt.layer(text).properties(width=_WIDTH, height=_HEIGHT), []


# Kinds with points are drawn over them.
_PANEL_OF: dict[Kind, Callable[[str], Callable[[Report], Panel]]] = {
    "evaluation": _evaluation_of,
    "comparison": _difference_of,
}
# Charts that are not of one measure.
_OF_CLASSES = {"classes": _accuracy_of_classes, "confusion": _confusions, "reliability": _reliability}
_PANELS = {
    name: {
        chart: _OF_CLASSES.get(chart) or _PANEL_OF.get(name, _over_points)(chart)
        for chart in (*kind.measures, *kind.further)
    }
    for name, kind in KINDS.items()
}

if __name__ == "__main__":
    main()

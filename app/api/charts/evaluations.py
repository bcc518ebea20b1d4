"""Charts of an evaluation: MIR and HDR, classes, confusions, reliability."""

from collections.abc import Callable, Iterator
from typing import Any

import altair as alt

from app.api.charts.measures import reason_of
from app.api.charts.parts import (
    COLOURS,
    GREY,
    HEIGHT,
    LABELS,
    OPTIMUM,
    WIDTH,
    Panel,
    Report,
    chart_of,
    colour_of,
    short,
)

# Most classes that a chart lists, and most whose confusions it shows as a matrix.
_MOST_CLASSES, _MOST_IN_MATRIX = 30, 20


def of_interplay(measure: str) -> Callable[[Report], Panel]:
    """Return a function that draws MIR or HDR of every level, centring and split.

    It also draws the optimum and the null baseline of MIR.
    """

    def draw(report: Report) -> Panel:
        rows = list(_measured(report, measure))
        colour = colour_of(rows)
        x = alt.X("value:Q", title=LABELS[measure], scale=alt.Scale(domain=[0, 1]))
        y = alt.Y("place:N", title=None, sort=None, axis=alt.Axis(labelLimit=240))
        offset = alt.YOffset("split:N", sort=list(COLOURS))
        base = chart_of(rows).encode(y=y, yOffset=offset)
        layers = [base.mark_point(filled=True, size=60).encode(x=x, color=colour)]
        key = []
        if any(row["null"] is not None for row in rows):
            key.append("cross: mean of the permutation baseline")
            layers.insert(0, base.mark_point(shape="cross", size=40, opacity=0.7).encode(x="null:Q", color=colour))
        if any(row["optimum"] is not None for row in rows):
            key.insert(0, f"tick: {OPTIMUM}")
            layers.insert(0, base.mark_tick(thickness=2, color="black").encode(x="optimum:Q"))
        words = base.mark_text(align="left", fontSize=9, color=GREY).encode(text="words:N", x=alt.value(8))
        return alt.layer(*layers, words).properties(width=WIDTH, height=HEIGHT), key

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
                    "words": f"not defined: {reason_of(found, measure)}" if found[measure] is None else "",
                }


def accuracy_of_classes(report: Report) -> Panel:
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
    offset = alt.YOffset("split:N", sort=list(COLOURS))
    points = chart_of(rows).mark_point(filled=True, size=45).encode(x=x, y=y, yOffset=offset, color=colour_of(rows))
    key = [] if len(lowest) == len(known) else [f"the {len(lowest)} of {len(known):,} classes with the lowest accuracy"]
    return alt.layer(points).properties(width=WIDTH, height=max(HEIGHT, 16 * len(lowest))), key


def confusions(report: Report) -> Panel:
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
        bars = chart_of(rows[:_MOST_IN_MATRIX]).mark_bar(color=COLOURS[name]).encode(x=x, y=y)
        return alt.layer(bars).properties(width=WIDTH, height=300), [f"the largest confusions; {where}"]
    names = [_class_name(report, label) for label in range(len(counts))]
    for label, (accuracy, count) in enumerate(zip(found["accuracy"], counts, strict=True)):
        if count:
            right = round((accuracy or 0) * count)
            rows.append({"class": names[label], "predicted": names[label], "samples": right, "share": right / count})
    x = alt.X("predicted:N", title="predicted", sort=names, axis=alt.Axis(labelLimit=80, labelAngle=-45, grid=False))
    base = chart_of(rows).encode(
        x=x, y=alt.Y("class:N", title="class", sort=names, axis=alt.Axis(labelLimit=120, grid=False))
    )
    shade = alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=None)
    dark = alt.condition("datum.share > 0.6", alt.value("white"), alt.value("black"))
    layers = [base.mark_rect().encode(color=shade), base.mark_text(fontSize=9).encode(text="samples:Q", color=dark)]
    size = max(WIDTH, 22 * len(names))
    return alt.layer(*layers).properties(width=size, height=size), [f"shade: share of the class; {where}"]


def reliability(report: Report) -> Panel:
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
    diagonal = chart_of([{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}])
    lines = chart_of(rows).mark_line(strokeWidth=1.4).encode(x=x, y=y, color=colour_of(rows))
    area = alt.Size("samples:Q", scale=alt.Scale(range=[12, 200]), legend=None)
    points = chart_of(rows).mark_point(filled=True, opacity=0.8).encode(x=x, y=y, color=colour_of(rows), size=area)
    layers = [diagonal.mark_line(strokeDash=[4, 3], color=GREY).encode(x=x, y=y), lines, points]
    key = ["dashed: perfectly calibrated", "area of a point: samples in its bin"]
    return alt.layer(*layers).properties(width=WIDTH, height=WIDTH), key


def _main_split(report: Report) -> str:
    return next(name for name in ("test", "all", "train") if name in report["splits"])


def _class_name(report: Report, label: int | None) -> str:
    if label is None:
        return "no class"
    if (tokens := report["probe"].get("next_tokens")) is not None:
        return f"token {tokens['token_ids'][label]}"
    names = report["probe"]["class_names"]
    return short(names[label], 40) if names and label < len(names) else str(label)


def _without_classes(report: Report) -> Panel | None:
    """Return a panel that says so if a report is older than predictions by class."""
    if all(split.get("by_class") for split in report["splits"].values()):
        return None
    words = chart_of([{"words": "not in this report:\nit is older than predictions by class"}])
    text = words.mark_text(color=GREY, lineBreak="\n").encode(
        text="words:N", x=alt.value(WIDTH / 2), y=alt.value(HEIGHT / 2)
    )
    return alt.layer(text).properties(width=WIDTH, height=HEIGHT), []

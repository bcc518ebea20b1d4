"""What charts have in common: colours, labels, scales and axes, and how a measure is read from a split."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from app.plain import plain

Report = dict[str, Any]
Rows = list[dict[str, Any]]
#: A chart, and the meanings of its marks.
Panel = tuple[alt.LayerChart | alt.FacetChart, list[str]]
#: Pixels of a panel.
WIDTH, HEIGHT = 320, 190
#: Okabe and Ito's colours, distinguishable with any colour vision.
COLOURS = {"train": "#0072B2", "test": "#D55E00", "all": "#7F7F7F"}
GREY = "#555555"
LABELS = {
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
#: Measures between 0 and 1; others have no upper bound.
SHARES = ("error", "accuracy", "mir", "hdr", "calibration_error", "nc4")
LEGEND = alt.Legend(title=None, orient="bottom", symbolOpacity=1)
OPTIMUM = "optimum under neural collapse"
#: Most characters of a name, and, per panel width, of an axis label, a title line and a subtitle line.
_NAME, AXIS, _TITLE, _SUBTITLE = 60, 44, 48, 64


def chart_of(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))


def of_split(rows: Rows, split: str) -> Rows:
    return [row for row in rows if row["split"] == split]


def splits_of(rows: Rows) -> list[str]:
    present = {row["split"] for row in rows}
    return [name for name in COLOURS if name in present]


def colour_of(rows: Rows, legend: alt.Legend | None = LEGEND) -> alt.Color:
    splits = splits_of(rows)
    scale = alt.Scale(domain=splits, range=[COLOURS[name] for name in splits])
    return alt.Color("split:N", scale=scale, legend=legend)


def least_width(measure: str, values: Iterable[float | None]) -> float:
    """Return the least width of a scale: for shares 0.001, for others a thousandth of their size."""
    if measure in SHARES:
        return 1e-3
    return max(1e-3 * max((abs(value) for value in values if value is not None), default=0), 1e-6)


def domain_of(
    values: Iterable[float | None], least: float, floor: float = 0, ceiling: float = 1
) -> tuple[float, float]:
    """Return the smallest and largest value; a narrower range is widened to the least width, within the bounds.

    So rounding errors do not fill the scale.
    """
    known = [value for value in values if value is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low < least:
        low = min(max((low + high - least) / 2, floor), ceiling - least)
        high = low + least
    return low, high


def scale_of(domain: tuple[float, float], padding: int = 0) -> alt.Scale:
    return alt.Scale(domain=list(domain), nice=True, zero=False, padding=padding)


def ticks_of(domain: tuple[float, float], **options: Any) -> alt.Axis:
    """Return an axis; very large and very small numbers get a power of ten, and digits enough to tell ticks apart."""
    size = max(map(abs, domain))
    if not 1e-3 <= size < 1e7:
        options["format"] = f".{3 + math.ceil(math.log10(max(size / (domain[1] - domain[0]), 1)))}~g"
    return alt.Axis(labelSeparation=6, **options)


def short(name: str, most: int = _NAME) -> str:
    """Return a long name without its middle: names of one run often differ at their ends."""
    name = plain(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def title_of(text: str, notes: Sequence[str], columns: int) -> alt.TitleParams:
    """Return the title of a picture of so many panels side by side, with notes under it, both wrapped to fit."""
    return alt.TitleParams(
        textwrap.wrap(plain(text), columns * _TITLE),
        subtitle=[line for note in notes for line in textwrap.wrap(plain(note), columns * _SUBTITLE)],
        anchor="start",
        # Names may use a script with wider characters than the line lengths assume.
        limit=columns * (WIDTH + 50),
    )


def finished(panels: Sequence[alt.LayerChart | alt.FacetChart], title: alt.TitleParams, columns: int) -> dict[str, Any]:
    """Return the Vega-Lite specification of panels side by side under a title."""
    chart = alt.concat(*panels, columns=columns, spacing=24).properties(title=title)
    chart = chart.configure_view(stroke=None).configure_axis(grid=True, gridOpacity=0.4)
    specification: dict[str, Any] = chart.to_dict()
    return specification

"""Charts in their formats."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import vl_convert

from app.api.charts import reports, several

_PNG_SCALE = 2.0
# Charts of several reports have names that no chart of one has.
_OF_SEVERAL: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "course": several.course,
    "overlay": several.overlay,
    "parallel": several.parallel,
}


def draw(data: Any, name: str, format: str) -> bytes:
    """Draw a chart in one of its formats: SVG, PNG, or as json its specification; js is the library that draws it.

    Args:
        data: a report, or what a chart of several needs.
        name: the chart's name.
        format: `svg`, `png`, `json` or `js`.
    """
    if format == "js":
        library: str = vl_convert.javascript_bundle(None)  # type: ignore[arg-type]  # its stub forgets the default
        return library.encode()
    specification = _OF_SEVERAL[name](data) if name in _OF_SEVERAL else reports.describe(data, name)
    match format:
        case "svg":
            return svg(specification).encode()
        case "png":
            return png(specification)
    return json.dumps(specification).encode()


def svg(specification: dict[str, Any]) -> str:
    """Return the picture as SVG."""
    drawn: str = vl_convert.vegalite_to_svg(specification)
    return drawn


def png(specification: dict[str, Any]) -> bytes:
    """Return the picture as PNG, two pixels for each unit."""
    drawn: bytes = vl_convert.vegalite_to_png(specification, scale=_PNG_SCALE)
    return drawn

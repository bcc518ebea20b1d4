"""HTML of the pages: the templates, the formats of numbers and times, and the headers that confine a page."""

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from app.api.sessions import SESSION_COOKIE, TOKEN_FIELD
from app.pages.visitors import Visitor
from app.plain import plain
from app.schemas import metadata_text

STATIC = Path(__file__).parent / "static"
_UNDEFINED = "–"
_HEADERS = {
    # Vega interprets its expressions (`ast`), so that no page needs unsafe-eval: docs/decisions has why.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "private, no-store",
}


def see_other(request: Request, path: str) -> RedirectResponse:
    """Return the answer to a form: a redirect to a page of this service, which begins with a slash."""
    return RedirectResponse(f"{request.scope.get('root_path', '')}{path}", status_code=303)


def page(
    request: Request, visitor: Visitor | None, template: str, *, status: int = 200, **context: Any
) -> HTMLResponse:
    """Return a page; a visitor without a session gets one with it."""
    html = (
        _environment()
        .get_template(template)
        .render(
            root=request.scope.get("root_path", ""),
            here=request.url.path,
            visitor=visitor,
            token_field=TOKEN_FIELD,
            **context,
        )
    )
    response = HTMLResponse(html, status_code=status, headers=_HEADERS)
    if visitor is not None and visitor.is_new:
        set_cookie(response, request, SESSION_COOKIE, visitor.cookie)
    return response


def set_cookie(response: Response, request: Request, name: str, value: str) -> None:
    """Have the browser keep a cookie that no script reads and that no other site's request carries."""
    response.set_cookie(name, value, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https")


def number(value: float | None, digits: int = 4) -> str:
    """Format a measurement; small and large ones keep their leading digits, an undefined one is a dash."""
    if value is None or not math.isfinite(value):
        return _UNDEFINED
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3e}"


def place(value: float) -> str:
    """Format a w, a sparsity or a number of an axis exactly, so that no two places look alike."""
    return repr(float(value) + 0.0).removesuffix(".0")  # + 0.0, as -0 is 0


def percent(value: float | None) -> str:
    """Format a share."""
    return _UNDEFINED if value is None else f"{100 * value:.2f} %"


def size(n_bytes: int) -> str:
    """Format a number of bytes."""
    value, unit = float(n_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def moment(value: datetime | str | None) -> Markup | str:
    """Format an instant in UTC, to the minute; machines read it to the second."""
    if value is None:
        return _UNDEFINED
    instant = datetime.fromisoformat(value) if isinstance(value, str) else value
    instant = instant.astimezone(UTC)
    exact = instant.isoformat(timespec="seconds")
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(
        exact, f"{instant:%Y-%m-%d %H:%M:%S}", f"{instant:%Y-%m-%d %H:%M}"
    )


def duration(seconds: float | None) -> str:
    """Format a time that something took."""
    if seconds is None:
        return _UNDEFINED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def name(text: object) -> Markup:
    """Return untrusted text: isolated, so that its writing direction is its own, and without controls."""
    return Markup("<bdi>{}</bdi>").format(plain(text))


def address(path: str, **parameters: Any) -> str:
    """Return a link: segments and parameters are escaped, those that are None left out."""
    given = {key: value for key, value in parameters.items() if value is not None and value != ""}
    return quote(path) + (f"?{urlencode(given, doseq=True)}" if given else "")


@cache
def asset(file: str) -> str:
    """Return the path of one of our static files; it changes with its content, so that browsers may keep it."""
    digest = hashlib.sha256((STATIC / file).read_bytes()).hexdigest()[:12]
    return f"/static/{file}?v={digest}"


def metadata_words(value: Any) -> str:
    """Return a value of metadata in words; of a list, its entries."""
    return ", ".join(map(metadata_text, value)) if isinstance(value, list) else metadata_text(value)


def metadata_filter(key: str, value: Any) -> list[str]:
    """Return the filters that find resources with this value of metadata."""
    return [f"{key}={metadata_text(entry)}" for entry in (value if isinstance(value, list) else [value])]


def further_members(problem: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a problem has beside the members that every problem has."""
    usual = ("type", "title", "detail", "status", "instance")
    return {key: value for key, value in (problem or {}).items() if key not in usual}


def json_of(value: Mapping[str, Any]) -> str:
    """Return readable JSON of a small object, such as metadata."""
    return json.dumps(value, ensure_ascii=False, indent=2)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "place": place,
        "size": size,
        "moment": moment,
        "duration": duration,
        "name": name,
        "plain": plain,
        "json": json_of,
    }
    environment.globals |= {
        "asset": asset,
        "address": address,
        "metadata_text": metadata_words,
        "metadata_filter": metadata_filter,
    }
    return environment

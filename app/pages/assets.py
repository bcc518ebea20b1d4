"""What pages load beside themselves, and the definitions of the metrics."""

from functools import cache
from itertools import pairwise
from pathlib import Path

from fastapi import APIRouter, Request, Response
from markdown_it import MarkdownIt
from markupsafe import Markup

from app.api.routes import ServiceDep
from app.pages.rendering import page
from app.pages.visitors import VisitorDep

router = APIRouter()
_UNCHANGING = {"Cache-Control": "public, max-age=86400", "X-Content-Type-Options": "nosniff"}


@router.get("/vega.js")
async def charts_library(service: ServiceDep) -> Response:
    """The library that draws charts in a browser, out of an installed package."""
    content, key = await service.drawings.library()
    return Response(content, media_type="text/javascript", headers={**_UNCHANGING, "ETag": f'"{key}"'})


@router.get("/definitions")
def definitions(request: Request, visitor: VisitorDep) -> Response:
    """What every number means: docs/metrics.md."""
    return page(request, visitor, "definitions.html", definitions=_definitions())


@cache
def _definitions() -> Markup:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse((Path(__file__).parent / "metrics.md").read_text(encoding="utf-8"))
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrSet("id", _anchor(inline.content))
        # Other documents are not among the pages: a link to one is its text.
        inline.children = [child for child in inline.children or [] if not child.type.startswith("link_")]
    html = parser.renderer.render(tokens, parser.options, {})
    html = html.replace("<table>", '<div class="scroll" role="group" aria-label="Table" tabindex="0"><table>')
    return Markup(html.replace("</table>", "</table></div>"))  # noqa: S704  our own document, without HTML


def _anchor(heading: str) -> str:
    words = "".join(char if char.isalnum() else " " for char in heading.split("[")[0].lower())
    return "-".join(words.split())

"""Charts that pages draw of several reports, from an extract of their numbers."""

import hashlib
from collections.abc import Mapping

from fastapi import Response

from app.api import drawing
from app.api.routes import Service

_MEDIA_TYPES: Mapping[str, str] = {"svg": "image/svg+xml", "png": "image/png", "json": "application/json"}


async def drawn(service: Service, name: str, text: str, format: drawing.Format) -> Response:
    """Return a chart that is drawn from a text; its hash is the chart's key in the cache."""
    chart = drawing.Chart(hashlib.sha256(text.encode()).hexdigest(), name, format)
    content = await service.drawings.get(chart, lambda: text)
    headers = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=_MEDIA_TYPES[format], headers=headers)

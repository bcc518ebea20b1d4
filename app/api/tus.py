"""The headers of tus 1.0.0, the protocol of resumable uploads, around the routes of app/api/routes/uploads.py."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

VERSION = "1.0.0"
_PLACE = "/v1/uploads"
_METHOD = b"x-http-method-override"


class Tus:
    """Adds the protocol's headers to every answer, problems included, and lets a POST stand for PATCH and DELETE.

    It stands before all other checks, which see the method that counts.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (scope["path"] == _PLACE or scope["path"].startswith(f"{_PLACE}/")):
            await self._app(scope, receive, send)
            return
        named = next((value for name, value in scope["headers"] if name == _METHOD), None)
        if named is not None and scope["method"] == "POST":
            scope = {**scope, "method": named.decode("latin-1").strip().upper()}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(b"tus-resumable", VERSION.encode()), (b"cache-control", b"no-store")]
                if message["status"] == 412:
                    added.append((b"tus-version", VERSION.encode()))
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers)

"""What holds for every request's body, as one ASGI middleware."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A client that is still sending does not look for an answer. So an early one waits until the body has come, but not
# for ever: then the connection is closed.
_LINGER_SECONDS = 10.0


class Bodies:
    """Bounds JSON bodies, and lets an answer that comes before the end of a body reach its client.

    FastAPI's own `max_body_size` answers in plain text where a route does not read the body; here every error is a
    problem.
    """

    def __init__(self, app: ASGIApp, *, max_json_bytes: int) -> None:
        self._app = app
        self._max_json_bytes = max_json_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # Uploads count their own bytes, part by part.
        bounded = not headers.get(b"content-type", b"").startswith(b"multipart/")
        waits_for_continue = headers.get(b"expect", b"").lower() == b"100-continue"
        complete = not (b"content-length" in headers or b"transfer-encoding" in headers)
        received_bytes, reading = 0, False

        async def watched_receive() -> Message:
            nonlocal complete, received_bytes, reading
            reading = True
            message = await receive()
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            received_bytes += len(message.get("body", b""))
            if bounded and received_bytes > self._max_json_bytes:
                raise HTTPException(413, f"The body has more than the {self._max_json_bytes} bytes that are allowed.")
            return message

        async def lingering_send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start" and not complete:
                # Who asked to go on first has sent nothing yet and hears the answer at once.
                if reading or not waits_for_continue:
                    complete = await _discard_body(receive)
                if not complete:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, watched_receive, lingering_send)


async def _discard_body(receive: Receive) -> bool:
    """Read on to the end of the body and forget it; False where it did not end in time."""
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return True
    except TimeoutError:
        return False

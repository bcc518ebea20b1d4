"""Who and what may come in, before a route sees the request: host, key, size of the body. One ASGI middleware."""

import asyncio
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import Forbidden, ServiceError, Unauthorized
from app.problems import problem_response
from app.settings import Settings

# These count the bytes of their form themselves, part by part.
_UPLOADS = {"/v1/checkpoints", "/v1/probes", "/v1/feature-sets"}
# A client that is still sending does not look for an answer. So an early one waits until the body has come, but not
# for ever: then the connection is closed.
_LINGER_SECONDS = 10.0


class Admission:
    """Refuses who may not call, bounds JSON bodies, and lets an early answer reach a client that is still sending.

    FastAPI's own dependencies run after it has parsed the body, and its `max_body_size` answers in plain text where a
    route does not read the body; here every error is a problem.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        unbounded = scope["method"] == "POST" and scope["path"] in _UPLOADS
        waits_for_continue = headers.get(b"expect", b"").lower() == b"100-continue"
        complete = not (b"content-length" in headers or b"transfer-encoding" in headers)
        received_bytes, reading = 0, False

        async def watched_receive() -> Message:
            nonlocal complete, received_bytes, reading
            reading = True
            message = await receive()
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            received_bytes += len(message.get("body", b""))
            if not unbounded and received_bytes > self._settings.max_spec_bytes:
                raise HTTPException(413)
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

        refusal = _refusal(self._settings, scope["path"], headers)
        if refusal is not None:
            await problem_response(refusal)(scope, watched_receive, lingering_send)
            return
        await self._app(scope, watched_receive, lingering_send)


def _refusal(settings: Settings, path: str, headers: dict[bytes, bytes]) -> ServiceError | None:
    """Why a request may not come in, if so. Keys with scopes will be looked up here."""
    if settings.api_key is None:
        # Without a key the service is this machine's alone. A browser on it must not be another site's way in: neither
        # by a name that resolves to this machine, nor by a form that posts to it.
        sources = [f"//{headers.get(b'host', b'').decode('latin-1')}", headers.get(b"origin", b"").decode("latin-1")]
        if not all(_names_this_machine(source) for source in sources if source):
            return Forbidden("Without an API key the service answers only to 127.0.0.1, [::1] and localhost.")
    elif path.startswith("/v1/"):
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        key = settings.api_key.get_secret_value().encode()
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token, key):
            return Unauthorized("Send the header 'Authorization: Bearer KEY' with the service's API key.")
    return None


def _names_this_machine(url: str) -> bool:
    try:
        host = urlsplit(url).hostname
        return host == "localhost" or (host is not None and ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


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

"""Checks before a route sees the request: host, key, size of the body. One ASGI middleware."""

import asyncio
import hmac
import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem_response
from app.api.sessions import Sessions
from app.errors import Forbidden, RequestTimeout, ServiceError, Unauthorized, UploadIncomplete
from app.settings import Settings

# These routes count the bytes of their form themselves, part by part.
_UPLOADS = {f"/{above}/{name}" for above in ("v1", "push") for name in ("checkpoints", "probes", "feature-sets")}
# These count theirs against the length that was announced.
_RESUMABLE = "/v1/uploads"
# A client that is still sending does not read an answer. So an early answer waits until the body has arrived, at most
# this long: then the connection is closed.
_LINGER_SECONDS = 10.0
# Statuses for a body that did not arrive in time: the rest of it is not awaited.
_TOO_SLOW = {UploadIncomplete.status, RequestTimeout.status}


class Admission:
    """Refuses calls without access, bounds JSON bodies, and lets an early answer reach a client that is still sending.

    FastAPI's own dependencies run after it has parsed the body, and its `max_body_size` answers in plain text if a
    route does not read the body; here every error is a problem.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, sessions: Sessions) -> None:
        self._app = app
        self._settings = settings
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if without_content := scope["method"] == "HEAD":
            # Every readable route has GET. The server omits the content because it knows the original method.
            scope = {**scope, "method": "GET"}
        unbounded = (scope["method"] == "POST" and scope["path"] in (*_UPLOADS, _RESUMABLE)) or (
            scope["method"] == "PATCH" and scope["path"].startswith(f"{_RESUMABLE}/")
        )
        waits_for_continue = headers.get(b"expect", b"").lower() == b"100-continue"
        complete = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        received_bytes, reading, answering, ended = 0, False, False, False
        deadline: float | None = None

        async def receive_in_time() -> Message:
            nonlocal deadline
            loop = asyncio.get_running_loop()
            deadline = deadline or loop.time() + self._settings.body_timeout_seconds
            try:
                async with asyncio.timeout_at(deadline):
                    return await receive()
            except TimeoutError:
                if answering:
                    return {"type": "http.disconnect"}
                seconds = self._settings.body_timeout_seconds
                raise HTTPException(408, f"The body did not come within {seconds:g} seconds.") from None

        async def watched_receive() -> Message:
            nonlocal complete, received_bytes, reading
            reading = True
            # An upload may take long and checks its own pace. After the body only the end of the connection follows.
            message = await (receive() if unbounded or complete else receive_in_time())
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            received_bytes += len(message.get("body", b""))
            if not unbounded and received_bytes > self._settings.max_spec_bytes:
                raise HTTPException(413)
            return message

        async def lingering_send(message: Message) -> None:
            nonlocal complete, answering, ended
            if message["type"] == "http.response.start" and not complete:
                answering = True
                # A client that waits for 100-continue has sent nothing yet and is answered at once, as is a slow one.
                if message["status"] not in _TOO_SLOW and (reading or not waits_for_continue):
                    complete = await _discard_body(receive)
                if not complete:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif without_content and message["type"] == "http.response.body":
                # The first part is the last one sent: the rest of a stream is dropped.
                if ended:
                    return
                ended = True
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await problem_response(refusal)(scope, watched_receive, lingering_send)
            return
        await self._app(scope, watched_receive, lingering_send)

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        """Return why a request is refused, or None. Keys with scopes will be looked up here."""
        if self._settings.api_key is None:
            # Without a key the service is for this machine only. Another site must not get in through a browser here:
            # neither by a name that resolves to this machine, nor by a form that posts to it.
            sources = [
                f"//{headers.get(b'host', b'').decode('latin-1')}",
                headers.get(b"origin", b"").decode("latin-1"),
            ]
            if not all(_names_this_machine(source) for source in sources if source):
                return Forbidden("Without an API key the service answers only to 127.0.0.1, [::1] and localhost.")
        elif (
            (path.startswith("/v1/") or path == "/metrics")
            and not holds_key(self._settings, headers.get(b"authorization", b""))
            and not self._sessions.admit(method, headers)
        ):
            return Unauthorized("Send the header 'Authorization: Bearer KEY' with the service's API key.")
        return None


def holds_key(settings: Settings, authorization: bytes) -> bool:
    """Return whether a header contains the service's key; False if the service has none."""
    if settings.api_key is None:
        return False
    scheme, _, token = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and is_key(settings, token)


def is_key(settings: Settings, given: bytes) -> bool:
    """Return whether bytes are the service's key; the time that it takes says nothing about the key."""
    key = settings.api_key
    return key is not None and hmac.compare_digest(given, key.get_secret_value().encode())


# The same few addresses recur, and parsing one takes longer than everything else here.
@lru_cache(maxsize=16)
def _names_this_machine(url: str) -> bool:
    try:
        host = urlsplit(url).hostname
        return host == "localhost" or (host is not None and ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


async def _discard_body(receive: Receive) -> bool:
    """Read and discard the rest of the body; return False if it did not end in time."""
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return True
    except TimeoutError:
        return False

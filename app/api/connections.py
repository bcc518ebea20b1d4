"""Limits on connections: their number, the time and size of a request's head, and how long an answer stays unread.

uvicorn has no timeout for a request's line and headers, no limit of connections that counts those without a request,
and no timeout for a client that does not read. All of them are checked once a second, so that a request costs no timer.
"""

import asyncio
import json
import logging
import resource
import time
from functools import partial
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import HeadersTooLarge, MalformedRequest, RequestTimeout, ServiceError, TooManyConnections, problem
from app.settings import Settings

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 2**10
# A client that reads nothing of an answer for this long is disconnected.
_UNREAD_SECONDS = 60.0
# How often all connections are checked, and how often those that were ended are logged, in one line.
_LOOK_SECONDS = 1.0
_LOG_SECONDS = 10.0
# A refused client has this long to read the answer: a socket with unread bytes that is closed at once loses it. Beyond
# this many lingering connections the answer may be lost.
_LINGER_SECONDS = 1.0
_MOST_LINGERING = 128
# Connections that asyncio accepts in one go, before it closes any of them or one that makes room for them.
BACKLOG = 128
# Open files other than connections, and files per connection: its socket, and perhaps the file of its upload.
_OTHER_FILES = 128
_FILES_EACH = 2


class Connections:
    """All open connections.

    At the limit, the one that has waited longest without a request makes room: connections that send nothing, or half
    a header, cannot keep others out. A new one is refused only if all are busy.
    """

    def __init__(self, settings: Settings) -> None:
        files = _raise_file_limit() - 2 * BACKLOG - _OTHER_FILES - _MOST_LINGERING
        self._limit = max(min(settings.max_connections, files // _FILES_EACH), 1)
        self._header_seconds = settings.header_timeout_seconds
        # In the order in which they began to wait.
        self.waiting: dict[Connection, None] = {}
        self.open: set[Connection] = set()
        self.lingering: set[Connection] = set()
        self._wrongs: dict[str, int] = {}
        self._looked_at = self._logged_at = time.monotonic()

    def make(self) -> Any:
        """Return the factory with which uvicorn makes a connection's protocol."""
        return partial(Connection, self)

    def admit(self, connection: "Connection") -> bool:
        """Admit a connection, at the limit in place of the oldest waiting one; return False if none waits."""
        if len(self.open) >= self._limit:
            oldest = next(iter(self.waiting), None)
            (oldest or connection).refuse(
                TooManyConnections(f"{self._limit} connections are open, as many as there may be.", limit=self._limit),
                "there were too many",
            )
            if oldest is None:
                return False
        self.open.add(connection)
        return True

    def look(self) -> None:
        """End connections that have taken too long. Call it often; it acts once a second."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        for connection in list(self.open):
            connection.look(now, self._header_seconds)
        if self._wrongs and now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            wrongs, self._wrongs = self._wrongs, {}
            logger.warning("connections ended: %s", "; ".join(f"{n} as {reason}" for reason, n in wrongs.items()))

    def count(self, reason: str) -> None:
        """Record why a connection was ended, for the next line of the log."""
        self._wrongs[reason] = self._wrongs.get(reason, 0) + 1


class Connection(HttpToolsProtocol):
    """One connection: waiting for a request's head, busy with a request, or refused."""

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._connections = connections
        self._began_at: float | None = None
        self._head_bytes = 0
        self._refused = False
        # Unread bytes of an answer at the last check, and the time since which nothing of it was read.
        self._unread_bytes, self._unread_since = 0, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        if self._connections.admit(self):
            self._wait()
            # A new connection must send its request now; a kept one may wait for uvicorn's own timeout.
            self._began_at = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        for group in (self._connections.open, self._connections.lingering):
            group.discard(self)
        self._connections.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        waited = self in self._connections.waiting
        if waited and self._began_at is None:
            self._began_at = time.monotonic()
        super().data_received(data)
        if waited and self in self._connections.waiting:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                text = f"A request's line and headers may have at most {MAX_HEAD_BYTES} bytes."
                self.refuse(HeadersTooLarge(text, limit_bytes=MAX_HEAD_BYTES), "headers were too large")

    def on_headers_complete(self) -> None:
        self._connections.waiting.pop(self, None)
        self._began_at = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self._wait()

    def send_400_response(self, msg: str) -> None:
        self.refuse(MalformedRequest("What came is not a request of HTTP/1.1."), "no HTTP/1.1 came")

    def look(self, now: float, header_seconds: float) -> None:
        """End this connection if a head, or the reading of an answer, has taken too long."""
        if self._began_at is not None and now - self._began_at > header_seconds:
            text = f"The request's line and headers did not come within {header_seconds:g} seconds."
            self.refuse(RequestTimeout(text), "no request came in time")
            return
        unread = self.transport.get_write_buffer_size()
        if unread == 0 or unread < self._unread_bytes or self._unread_bytes == 0:
            self._unread_since = now
        elif now - self._unread_since > _UNREAD_SECONDS:
            self._connections.count("an answer was not read")
            self.transport.abort()
        self._unread_bytes = unread

    def refuse(self, error: ServiceError, reason: str) -> None:
        """Answer with a problem, unless another answer has begun, and close."""
        connections = self._connections
        connections.count(reason)
        connections.waiting.pop(self, None)
        connections.open.discard(self)
        self._refused, self._began_at = True, None
        self._unset_keepalive_if_required()
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self.cycle.response_started:
            self.transport.close()
            return
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(_bytes_of(error))
        if len(connections.lingering) >= _MOST_LINGERING or not self.transport.can_write_eof():
            self.transport.close()
            return
        connections.lingering.add(self)
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _wait(self) -> None:
        self._connections.waiting[self] = None
        self._began_at, self._head_bytes = None, 0

    def _unsupported_upgrade_warning(self) -> None:
        self._connections.count("another protocol was asked for, which went on in HTTP/1.1")


def _bytes_of(error: ServiceError) -> bytes:
    """Return a problem as a complete answer, for connections that do not reach the application."""
    body = json.dumps(problem(error.kind, error.title, error.detail, status=error.status, **error.members)).encode()
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/problem+json\r\n"
    if error.status == 503:
        head += "retry-after: 5\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


def _raise_file_limit() -> int:
    """Raise this process's limit of open files as far as allowed; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return 65_536 if soft == resource.RLIM_INFINITY else soft

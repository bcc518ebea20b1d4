"""Server-sent events: the states of analyses as they change.

A stream holds no thread and no database connection. One task of the process polls all analyses that have listeners,
with one query, four times a second; streams wait for its changes. Every event holds the whole analysis, so that a
client that was cut off connects again and has missed nothing that matters.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import sqlalchemy as sa
from fastapi.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app import analyses, schemas
from app.errors import TooManyStreams

logger = logging.getLogger(__name__)

_ENDED = ("succeeded", "failed", "cancelled")
_POLL_SECONDS = 0.25
# A comment is sent this often where nothing changes: proxies do not close the stream, and the client can tell a dead
# connection from a quiet analysis. It (interplay/waiting.py) gives up a stream after one and a half of these.
HEARTBEAT_SECONDS = 5.0


@dataclass
class _Watched:
    """An analysis with listeners. `changed` is set, and replaced by a new event, when its state changes.

    `gone` once it was deleted, which may happen before its end was seen.
    """

    state: schemas.Analysis
    gone: bool = False
    listeners: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, state: schemas.Analysis) -> None:
        self.state = state
        self.wake()

    def wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Events:
    """The open streams of this process. All methods run on the event loop; only database queries run in threads.

    Args:
        engine: of the database.
        limit: the most streams at a time.
    """

    def __init__(self, engine: sa.Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._open = 0
        self._watched: dict[str, _Watched] = {}
        self._polling: asyncio.Task[None] | None = None
        self._closed = False

    async def listen(self, analysis_id: str, seen: str | None) -> "EventStream":
        """Return the response that streams one analysis and ends after its final event.

        Args:
            analysis_id: id of the analysis.
            seen: id of the last event that the client has received; that state is not sent again.

        Raises:
            NotFound: there is no such analysis.
            TooManyStreams: the limit is reached.
        """
        if self._open >= self._limit:
            raise TooManyStreams(
                f"{self._limit} streams of events are open; ask GET /v1/analyses/ID every now and then instead.",
                limit=self._limit,
            )
        # Count before the first await: other requests run during it.
        self._open += 1
        try:
            state = await run_in_threadpool(analyses.get, self._engine, analysis_id)
        except BaseException:
            self.leave()
            raise
        return EventStream(self, self._stream(state, seen))

    @property
    def n_open(self) -> int:
        """The number of open streams."""
        return self._open

    def leave(self) -> None:
        """Free the place of a stream that has ended, or never began."""
        self._open -= 1

    def close(self) -> None:
        """End all streams, so that the server can stop. Clients connect again."""
        self._closed = True
        for watched in self._watched.values():
            watched.wake()

    async def _stream(self, state: schemas.Analysis, seen: str | None) -> AsyncIterator[bytes]:
        watched = self._watched.setdefault(state.id, _Watched(state))
        watched.listeners += 1
        try:
            if self._polling is None or self._polling.done():
                self._polling = asyncio.create_task(self._poll())
            yield b"retry: 1000\n\n"
            last: schemas.Analysis | None = None
            while not self._closed and not watched.gone:
                changed, state = watched.changed, watched.state
                ended = state.status in _ENDED
                if state != last:
                    event, id_ = _event(state, last)
                    # Always send a final event: a client that has it already would wait for ever.
                    if id_ != seen or ended:
                        yield event
                if ended:
                    return
                last, seen = state, None
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    if self._polling.done():  # it failed, as the log says: end the stream rather than keep it silent
                        return
                    yield b": it goes on\n\n"
        finally:
            watched.listeners -= 1
            if not watched.listeners:
                del self._watched[state.id]

    async def _poll(self) -> None:
        """Poll all analyses that have listeners, until none has."""
        while self._watched and not self._closed:
            await asyncio.sleep(_POLL_SECONDS)
            asked = dict(self._watched)
            try:
                states = await run_in_threadpool(analyses.get_several, self._engine, [*asked])
            except sa.exc.SQLAlchemyError as error:
                # Streams stay open: clients could learn no more by polling.
                logger.warning("the database does not answer: %s", error)
                continue
            for state in states:
                watched = self._watched.get(state.id)
                if watched is not None and watched.state != state:
                    watched.update(state)
            for id_ in {*asked} - {state.id for state in states}:
                asked[id_].gone = True
                asked[id_].wake()


class EventStream(StreamingResponse):
    """The response of a stream. Its place is freed however it ends, even before its first byte."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, stream: AsyncIterator[bytes]) -> None:
        # No cache may store it, and nginx must not buffer it.
        super().__init__(stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.leave()


def _event(state: schemas.Analysis, last: schemas.Analysis | None) -> tuple[bytes, str]:
    """Encode a state as an event named after what changed; return it with its id, the same in every process."""
    if state.status in _ENDED:
        name = "final"
    else:
        name = "progress" if last is not None and last.status == state.status else "status"
    data = state.model_dump_json()
    id_ = hashlib.sha256(data.encode()).hexdigest()[:16]
    return f"event: {name}\nid: {id_}\ndata: {data}\n\n".encode(), id_

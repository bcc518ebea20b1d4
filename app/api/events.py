"""Analyses as they go on, for whoever waits: server-sent events.

A stream holds no thread and no connection of the database. One task of the process looks, a few times a second and
with one query, at all analyses that somebody listens to; streams wait for what it finds. Every event has the whole
analysis, so whoever was cut off connects again and has missed nothing that matters.
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
_LOOK_SECONDS = 0.25
# So often something is sent where nothing happens: it keeps proxies from closing, and tells a silent line from a quiet
# analysis. The client (interplay/waiting.py) gives up a stream that is silent for one and a half of these.
HEARTBEAT_SECONDS = 5.0


@dataclass
class _Watched:
    """An analysis that somebody listens to; `changed` is set, and replaced, when its state has changed."""

    state: schemas.Analysis
    listeners: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def turn(self, state: schemas.Analysis) -> None:
        self.state = state
        self.wake()

    def wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Events:
    """The open streams of this process. Everything but the look at the database happens on the event loop.

    Args:
        engine: of the database.
        limit: of streams at a time.
    """

    def __init__(self, engine: sa.Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._open = 0
        self._watched: dict[str, _Watched] = {}
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    async def listen(self, analysis_id: str, seen: str | None) -> "EventStream":
        """The answer that tells of one analysis, and ends after its last event.

        Args:
            analysis_id: which.
            seen: id of the event that the listener had last; that state is not sent again.

        Raises:
            NotFound: there is none.
            TooManyStreams: the limit is reached.
        """
        if self._open >= self._limit:
            raise TooManyStreams(
                f"{self._limit} streams of events are open; ask GET /v1/analyses/ID every now and then instead.",
                limit=self._limit,
            )
        # Counted before the first await, as others come in meanwhile.
        self._open += 1
        try:
            state = await run_in_threadpool(analyses.get, self._engine, analysis_id)
        except BaseException:
            self.leave()
            raise
        return EventStream(self, self._stream(state, seen))

    def leave(self) -> None:
        """A stream has ended, or has never begun."""
        self._open -= 1

    def close(self) -> None:
        """End all streams, so that the server can stop: their listeners connect again, to whoever comes next."""
        self._closed = True
        for watched in self._watched.values():
            watched.wake()

    async def _stream(self, state: schemas.Analysis, seen: str | None) -> AsyncIterator[bytes]:
        watched = self._watched.setdefault(state.id, _Watched(state))
        watched.listeners += 1
        try:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            yield b"retry: 1000\n\n"
            last: schemas.Analysis | None = None
            while not self._closed:
                changed, state = watched.changed, watched.state
                ended = state.status in _ENDED
                if state != last:
                    event, id_ = _event(state, last)
                    # A final event is never left out: a listener that has it already would wait for ever.
                    if id_ != seen or ended:
                        yield event
                if ended:
                    return
                last, seen = state, None
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    if self._looking.done():  # a fault, which is in the log: better no stream than a silent one
                        return
                    yield b": it goes on\n\n"
        finally:
            watched.listeners -= 1
            if not watched.listeners:
                del self._watched[state.id]

    async def _look(self) -> None:
        """Look at what is listened to, until nobody listens."""
        while self._watched and not self._closed:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                states = await run_in_threadpool(analyses.get_several, self._engine, [*self._watched])
            except sa.exc.SQLAlchemyError as error:
                # Streams stay open: their listeners could learn no more by asking themselves.
                logger.warning("the database does not answer: %s", error)
                continue
            for state in states:
                watched = self._watched.get(state.id)
                if watched is not None and watched.state != state:
                    watched.turn(state)


class EventStream(StreamingResponse):
    """A stream as an answer; however it ends, also before its first byte, its place is free again."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, stream: AsyncIterator[bytes]) -> None:
        # No cache may keep it, and nginx is told not to gather it.
        super().__init__(stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.leave()


def _event(state: schemas.Analysis, last: schemas.Analysis | None) -> tuple[bytes, str]:
    """A state as an event, named after what is new in it, and its id, which is the same in every process."""
    if state.status in _ENDED:
        name = "final"
    else:
        name = "progress" if last is not None and last.status == state.status else "status"
    data = state.model_dump_json()
    id_ = hashlib.sha256(data.encode()).hexdigest()[:16]
    return f"event: {name}\nid: {id_}\ndata: {data}\n\n".encode(), id_

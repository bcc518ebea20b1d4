"""Whether an analysis sent now would run: checked at most once a second, and with a timeout.

Each part is checked in a thread of its own, so that routes that wait for a part do not delay the check, and checks that
hang take no threads from routes. A part that has not answered the last check is not checked a second time.
"""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa

from app.database import clock, read
from app.errors import first_line
from app.models import Worker
from app.storage import Storage, StorageUnavailable

logger = logging.getLogger(__name__)

_KEEP_SECONDS = 1.0
# Timeout of a check: nearly all of an answer's time, with some left for the answer itself.
_LOOK_SECONDS = 1.8
# A worker writes its heartbeat every second or two; one that has missed several does not count.
_HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Part:
    """The result of a check: text that any caller may see, and the error's own words for callers with a key."""

    told: str = "ok"
    error: str | None = None


_WITHOUT_DATABASE = Part("unknown without the database")


class Readiness:
    """The last results, and the checks in progress."""

    def __init__(self, engine: sa.Engine, storage: Storage) -> None:
        self._looks: dict[str, Callable[[], dict[str, Part]]] = {
            "database": lambda: _look_at_database(engine),
            "storage": lambda: _look_at_storage(storage),
        }
        self._pending: dict[str, concurrent.futures.Future[dict[str, Part]]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._found: dict[str, Part] = {}
        self._found_at = 0.0

    async def look(self) -> dict[str, Part]:
        """Return the state of database, worker and storage, by name. Concurrent callers wait for the same check."""
        if not self._found or time.monotonic() - self._found_at > _KEEP_SECONDS:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)
        return self._found

    async def _look(self) -> None:
        found: dict[str, Part] = {}
        for parts in await asyncio.gather(*(self._look_at(name) for name in self._looks)):
            found |= parts
        for name, part in found.items():
            if part.error is not None and part != self._found.get(name):
                logger.warning("the %s %s: %s", name, part.told, part.error)
        self._found, self._found_at = found, time.monotonic()

    async def _look_at(self, name: str) -> dict[str, Part]:
        future = self._pending.get(name)
        if future is None or future.done():
            future = self._pending[name] = _in_thread(self._looks[name])
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), _LOOK_SECONDS)
        except TimeoutError:
            silent = Part("does not answer", f"said nothing for {_LOOK_SECONDS:g} s")
            unknown = {"worker": _WITHOUT_DATABASE} if name == "database" else {}
            return {name: silent, **unknown}


def living_workers(engine: sa.Engine) -> list[Worker]:
    """Return the workers that have not ended and whose heartbeat is recent."""
    with read(engine) as session:
        heard = clock(session) - timedelta(seconds=_HEARTBEAT_SECONDS)
        return list(session.scalars(sa.select(Worker).where(Worker.ended_at.is_(None), Worker.heartbeat_at > heard)))


def _look_at_database(engine: sa.Engine) -> dict[str, Part]:
    # Imported here: it loads alembic, which nothing else in a running API needs.
    import migrations

    try:
        if told := migrations.lacking(engine):
            return {"database": Part(told), "worker": Part("unknown without the tables")}
        worker = Part() if living_workers(engine) else Part("no worker has been heard of in the last 10 seconds")
    except sa.exc.SQLAlchemyError as error:
        told = first_line(error.orig if isinstance(error, sa.exc.DBAPIError) else error)
        return {"database": Part("does not answer", told), "worker": _WITHOUT_DATABASE}
    return {"database": Part(), "worker": worker}


def _look_at_storage(storage: Storage) -> dict[str, Part]:
    try:
        storage.check()
    except StorageUnavailable as error:
        return {"storage": Part("does not answer", first_line(error))}
    return {"storage": Part()}


def _in_thread(look: Callable[[], dict[str, Part]]) -> concurrent.futures.Future[dict[str, Part]]:
    future: concurrent.futures.Future[dict[str, Part]] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(look())
        except BaseException as error:  # noqa: BLE001  a bug of ours is whoever asked's to see
            future.set_exception(error)

    # A daemon: a process that ends does not wait for it.
    threading.Thread(target=run, name="readiness", daemon=True).start()
    return future

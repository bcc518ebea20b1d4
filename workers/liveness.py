"""Detect dead and hung workers, and resume their work.

A worker holds a lock under its id for as long as its process lives: a locked file beside a SQLite database, a session's
advisory lock on PostgreSQL. A worker is dead if its lock is free. On PostgreSQL its heartbeat must be old as well,
since a restart of the server frees every lock at once. A worker is hung if its lock is held and its heartbeat has been
old for long. Heartbeats are written and compared in the database's time, so the machines' clocks do not matter.
"""

import fcntl
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
from dbos._error import DBOSException

from app import queue
from app.database import clock, read, write
from app.errors import problem
from app.models import Analysis, Fetch, Worker, now
from app.settings import Settings
from app.storage import Storage
from workers import attempts, turns
from workers.fetching.running import remove_leftovers
from workers.tasks import Hello, Result

logger = logging.getLogger("interplay")

_ROUND_SECONDS = 1.0
_DEAD_AFTER = timedelta(seconds=4)
_HUNG_AFTER = timedelta(seconds=60)
# Rounds after which a run that the queue assigns to this worker, but that does not run here, is resumed.
_STRANDED_ROUNDS = 3
# How long the queue's record of an ended run, and an ended worker's row, are kept.
_KEEP_RUNS = timedelta(days=1)


class FileLocks:
    """Locks between the processes of one machine, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def hold(self, name: str) -> None:
        """Hold a lock until this process ends."""
        if name not in self._held:
            descriptor = self._open(name)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._held[name] = descriptor

    @contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """Try to hold a lock for a block; yield whether it was free."""
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        else:
            free = True
        try:
            yield free
        finally:
            if free:  # the name is never used again
                self.forget(name)
            os.close(descriptor)

    def forget(self, name: str) -> None:
        """Remove the file of a lock that is not used again."""
        (self._folder / f"{name}.lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Free every lock that is held."""
        for descriptor in self._held.values():
            os.close(descriptor)

    def _open(self, name: str) -> int:
        return os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


class AdvisoryLocks:
    """Locks between all clients of one PostgreSQL database, held by the session of one connection."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: sa.Connection | None = None
        self._held: set[str] = set()

    def hold(self, name: str) -> None:
        """Hold a lock until this process ends; take it again if the connection was lost."""
        if self._connection is None or self._connection.invalidated:
            lost, self._connection = self._connection, None
            self._held.clear()
            if lost is not None:
                lost.close()
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if name not in self._held and self._call("pg_try_advisory_lock", name):
            self._held.add(name)
        elif name in self._held:
            self._connection.exec_driver_sql("SELECT 1")  # detects a connection that was lost meanwhile

    @contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """Try to hold a lock for a block; yield whether it was free."""
        free = self._call("pg_try_advisory_lock", name)
        try:
            yield free
        finally:
            if free:
                self._call("pg_advisory_unlock", name)

    def forget(self, name: str) -> None:
        """Do nothing: a lock leaves nothing behind when its session ends."""

    def close(self) -> None:
        """Free every lock that is held."""
        if self._connection is not None:
            self._connection.invalidate()  # the session must end, not go back to the pool with its locks
            self._connection.close()

    def _call(self, function: str, name: str) -> bool:
        assert self._connection is not None, "hold comes first"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        return bool(self._connection.exec_driver_sql(f"SELECT {function}({key})").scalar())


@dataclass(frozen=True)
class _Seen:
    """What a round finds in the database.

    Attributes:
        own_runs: the runs that the queue assigns to this worker.
        silences: of other workers without a recent heartbeat, since when.
        ended: owners of runs that are no living worker.
    """

    own_runs: list[str]
    silences: dict[str, timedelta]
    ended: set[str]


class Presence:
    """Sends this worker's heartbeat and resumes the work of dead workers, in one round each second."""

    def __init__(self, settings: Settings, engine: sa.Engine, worker_id: str, active: set[str]) -> None:
        """`active` holds the ids of the analyses that run in this process now."""
        self._engine = engine
        self._id = worker_id
        self._active = active
        # Runs that the queue assigns to this worker but that do not run here, with the number of rounds.
        self._stranded: dict[str, int] = {}
        self._rounds = 0
        # Since when every round has succeeded: a worker that was suspended itself must not judge others' silence.
        self._steady_since = self._last_round = time.monotonic()
        sqlite = engine.dialect.name == "sqlite"
        # A file's lock is free only after its process has ended; a database's also after the server restarted.
        self._dead_after = timedelta(0) if sqlite else _DEAD_AFTER
        self._locks = FileLocks(settings.data_dir / "workers") if sqlite else AdvisoryLocks(engine)
        self._client = queue.make_client(engine)
        self._storage = Storage(settings)

    def register(self, description: Hello) -> None:
        """Take the lock, then insert the worker's row, so that a visible row always has its lock held."""
        self._locks.hold(self._id)
        with write(self._engine) as session:
            moment = clock(session)
            place = {"host": socket.gethostname(), "pid": os.getpid(), "started_at": moment, "heartbeat_at": moment}
            session.add(Worker(id=self._id, **place, **dict(description)))

    def withdraw(self) -> None:
        """Mark this worker as ended, so that its work is taken over at once."""
        with write(self._engine) as session:
            _mark_ended(session, self._id)
        self._locks.forget(self._id)

    def close(self) -> None:
        """Release the lock and the connections."""
        self._locks.close()
        self._client.destroy()

    def keep_up(self, stopping: threading.Event) -> None:
        """Run a round each second until `stopping` is set or other workers have marked this one as ended."""
        while not stopping.wait(_ROUND_SECONDS):
            if time.monotonic() - self._last_round > _DEAD_AFTER.total_seconds():
                self._steady_since = time.monotonic()  # this process, or its machine, was suspended
            self._last_round = time.monotonic()
            try:
                self._locks.hold(self._id)
                seen = self._beat()
                if seen is None:
                    if not stopping.is_set():  # else it has withdrawn meanwhile
                        logger.error("other workers have taken this one for dead, and its work over; it ends")
                    return
                self._resume_lost_work(seen)
                if self._rounds % 10 == 0:
                    self._settle_lost_runs()
                if self._rounds % 600 == 0:
                    self._storage.remove_abandoned()
                    remove_leftovers(self._engine, self._storage)
                if self._rounds % 3600 == 0:
                    self._forget_old_runs()
                self._rounds += 1
            except (sa.exc.SQLAlchemyError, DBOSException, OSError) as error:
                # The database may be unavailable for a while; a failed round is no reason to stop.
                logger.warning("a liveness round failed: %s", error)
                self._steady_since = time.monotonic()

    def _beat(self) -> "_Seen | None":
        """Write the heartbeat and look at other workers; return None if this one was marked as ended.

        One transaction, since every worker does this every second.
        """
        with write(self._engine) as session:
            moment = clock(session)
            own = sa.update(Worker).where(Worker.id == self._id, Worker.ended_at.is_(None))
            if not session.execute(own.values(heartbeat_at=moment)).rowcount:  # type: ignore[attr-defined]
                return None
            before = moment - self._dead_after
            owners = queue.held(session, self._id, before)
            others = sa.select(Worker.id, Worker.heartbeat_at).where(
                Worker.id != self._id, Worker.ended_at.is_(None), Worker.heartbeat_at <= before
            )
            silences = {worker_id: moment - heartbeat for worker_id, heartbeat in session.execute(others)}
        return _Seen(owners.pop(self._id, []), silences, {*owners} - {*silences})

    def _resume_lost_work(self, seen: "_Seen") -> None:
        self._resume_stranded(seen.own_runs)
        steady = timedelta(seconds=time.monotonic() - self._steady_since)
        for owner, told in {**seen.silences, **dict.fromkeys(seen.ended, _HUNG_AFTER)}.items():
            silence = min(told, steady)
            if silence < self._dead_after:
                continue
            with self._locks.attempt(owner) as dead:
                if dead:
                    self._take_over(owner)
            if not dead and silence > _HUNG_AFTER:
                with self._locks.attempt(f"hung-{owner}") as first:
                    if first:
                        self._take_over(owner)

    def _take_over(self, owner: str) -> None:
        # At once: it writes nothing from the moment on at which others may have its work.
        with write(self._engine) as session:
            _mark_ended(session, owner)
            lost = queue.release(session, owner)
        logger.warning("worker %s is gone; its runs are queued again: %s", owner, ", ".join(lost) or "none")

    def _resume_stranded(self, pending: list[str]) -> None:
        """Queue runs again that this worker holds but does not run: an error in the queue ended their thread."""
        idle = [run_id for run_id in pending if run_id not in self._active]
        self._stranded = {run_id: self._stranded.get(run_id, 0) + 1 for run_id in idle}
        stranded = [run_id for run_id, rounds in self._stranded.items() if rounds > _STRANDED_ROUNDS]
        if stranded:
            logger.warning("runs were stranded; they are queued again: %s", ", ".join(stranded))
            with write(self._engine) as session:
                queue.release(session, self._id, stranded)
            for run_id in stranded:
                del self._stranded[run_id]

    def _settle_lost_runs(self) -> None:
        """Fail what ended in the queue without an outcome: a fault of the service that must not look like waiting."""
        for model in (Analysis, Fetch):
            ended = queue.has_ended(self._engine.dialect.name, model)
            with read(self._engine) as session:
                before = clock(session) - timedelta(seconds=10)
                lost = sa.select(model.id).where(model.outcome.is_(None), model.created_at < before, ended)
                ids = list(session.scalars(lost.limit(100)))
            for run_id in ids:
                logger.error("run %s ended without an outcome", run_id)
                body = problem("internal-error", "Internal error", "Its run ended without an outcome; ask again.")
                attempts.end(self._engine, model, run_id, Result(outcome="failed", problem=body))

    def _forget_old_runs(self) -> None:
        before = (now() - _KEEP_RUNS).isoformat()
        runs = self._client.list_workflows(
            status=list(queue.ENDED), completed_before=before, limit=10_000, load_input=False, load_output=False
        )
        if runs:
            self._client.delete_workflows([run.workflow_id for run in runs])
        with write(self._engine) as session:
            session.execute(sa.delete(Worker).where(Worker.ended_at < clock(session) - _KEEP_RUNS))
            turns.clean(session, clock(session) - _KEEP_RUNS)


def _mark_ended(session: sa.orm.Session, worker_id: str) -> None:
    living = sa.update(Worker).where(Worker.id == worker_id, Worker.ended_at.is_(None))
    session.execute(living.values(ended_at=clock(session)))

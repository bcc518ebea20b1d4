"""Detect dead and hung workers, and resume their work.

A worker holds a lock under its id for as long as its process lives: a locked file beside a SQLite database, a session's
advisory lock on PostgreSQL. A worker is dead if its lock is free. On PostgreSQL its heartbeat must be old as well,
since a restart of the server frees every lock at once. A worker is hung if its lock is held and its heartbeat has been
old for long. Heartbeats are written and compared in the database's time, so the machines' clocks do not matter.

Every worker sends its heartbeat each second. Few look after the others as often: those that hold one of a few locks.
All do now and then, so that the work of a fleet goes on even if those few stand still.
"""

import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from dbos._error import DBOSException

from app import queue
from app.database import clock, instant, read, write
from app.errors import problem
from app.models import Analysis, Fetch, Worker, now
from app.settings import Settings
from app.storage import Storage
from workers import attempts, turns
from workers.fetching.running import remove_leftovers
from workers.locks import AdvisoryLocks, FileLocks, Line
from workers.tasks import Hello, Result

logger = logging.getLogger("interplay")

_ROUND_SECONDS = 1.0
# How many workers look after the others in every round.
_WATCHERS = 3
# Every how many rounds the rest look as well, and try to become one of these.
_LOOK_ROUNDS = 15
_TRY_ROUNDS = 4
# Rounds after a failed one in which every worker looks: what fails for one moment strands runs.
_ALERT_ROUNDS = 30
_DEAD_AFTER = timedelta(seconds=4)
_HUNG_AFTER = timedelta(seconds=60)
# Rounds after which a run that the queue assigns to this worker, but that does not run here, is resumed.
_STRANDED_ROUNDS = 3
_SERVER_STARTED = sa.select(sa.func.pg_postmaster_start_time(type_=sa.DateTime(timezone=True)))
# How long the queue's record of an ended run, and an ended worker's row, are kept.
_KEEP_RUNS = timedelta(days=1)


@dataclass(frozen=True)
class _Seen:
    """What a round finds in the database.

    Attributes:
        own_runs: the runs that the queue assigns to this worker.
        silences: of other workers without a recent heartbeat, since when.
        ended: owners of runs that are no living worker.
        server_age: time since the server started; locks were freed then.
        workers: number of living workers.
        computing: number of runs that workers compute.
    """

    own_runs: list[str]
    silences: dict[str, timedelta]
    ended: set[str]
    server_age: timedelta
    workers: int
    computing: int


class Presence:
    """Sends this worker's heartbeat and resumes the work of dead workers, in one round each second."""

    def __init__(self, settings: Settings, engine: sa.Engine, worker_id: str, active: set[str]) -> None:
        """`active` holds the ids of the analyses that run in this process now."""
        self._engine = engine
        self.line = Line(engine)
        # Told the number of living workers, and how many of them compute.
        self.on_fleet: Callable[[int, int], None] = lambda _workers, _computing: None
        self._id = worker_id
        self._active = active
        # Runs that the queue assigns to this worker but that do not run here, with the number of rounds.
        self._stranded: dict[str, int] = {}
        self._rounds = self._looks = self._next_look = self._alert_until = 0
        # Since when every round has succeeded: a worker that was suspended itself must not judge others' silence. One
        # that has just started was not; what a restart of the server does to all, the server's own age says.
        self._steady_since, self._last_round = -math.inf, time.monotonic()
        self._is_local = sqlite = engine.dialect.name == "sqlite"
        # A file's lock is free only after its process has ended; a database's also after the server restarted.
        self._dead_after = timedelta(0) if sqlite else _DEAD_AFTER
        self._locks = FileLocks(settings.data_dir / "workers") if sqlite else AdvisoryLocks(self.line)
        living = sa.update(Worker).where(Worker.id == worker_id, Worker.ended_at.is_(None))
        self._heartbeat = living.values(heartbeat_at=instant(engine.dialect.name))
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
        self.line.close()
        self._client.destroy()

    def keep_up(self, stopping: threading.Event) -> None:
        """Run a round each second until `stopping` is set or other workers have marked this one as ended."""
        pause = 0.0
        while not stopping.wait(pause):
            pause = _ROUND_SECONDS
            if time.monotonic() - self._last_round > _DEAD_AFTER.total_seconds():
                self._steady_since = time.monotonic()  # this process, or its machine, was suspended
            self._last_round = time.monotonic()
            try:
                self._locks.hold(self._id)
                # No row: others have marked this worker as ended.
                if not self.line.change(self._heartbeat):
                    if not stopping.is_set():  # else it has withdrawn meanwhile
                        logger.error("other workers have taken this one for dead, and its work over; it ends")
                    return
                if self._watches() or self._rounds >= self._next_look or self._rounds < self._alert_until:
                    self._look_after_others()
                if self._rounds % 600 == 0:
                    self._storage.remove_abandoned()
                    remove_leftovers(self._engine, self._storage)
            except (sa.exc.SQLAlchemyError, DBOSException, OSError) as error:
                # The database may be unavailable for a while; a failed round is no reason to stop.
                logger.warning("a liveness round failed: %s", error)
                self._steady_since = time.monotonic()
                self._alert_until = self._rounds + _ALERT_ROUNDS
            self._rounds += 1

    def _watches(self) -> bool:
        """Return whether this worker is one of the few that look after the others in every round."""
        names = [f"watch-{number}" for number in range(_WATCHERS)]
        if any(self._locks.holds(name) for name in names):
            return True
        return self._rounds % _TRY_ROUNDS == 0 and any(self._locks.hold(name) for name in names)

    def _look_after_others(self) -> None:
        seen = self._look()
        self._resume_lost_work(seen)
        self.on_fleet(seen.workers, seen.computing)
        if self._looks % 10 == 0:
            self._settle_lost_runs()
        if self._looks % 3600 == 0:
            self._forget_old_runs()
        self._looks += 1
        # Not all at one moment, although all may have started at one.
        self._next_look = self._rounds + random.randint(_LOOK_ROUNDS // 2, _LOOK_ROUNDS)  # noqa: S311

    def _look(self) -> "_Seen":
        """Look at this worker's runs and at other workers."""
        with read(self._engine) as session:
            moment = clock(session)
            before = moment - self._dead_after
            owners = queue.held(session, self._id, before)
            living = sa.select(Worker.id, Worker.heartbeat_at).where(Worker.ended_at.is_(None))
            silences = {worker_id: moment - heartbeat for worker_id, heartbeat in session.execute(living)}
            computing = queue.count_computing(session)
            server_age = timedelta.max if self._is_local else moment - session.scalars(_SERVER_STARTED).one()
        silent = {id_: told for id_, told in silences.items() if id_ != self._id and told >= self._dead_after}
        return _Seen(owners.pop(self._id, []), silent, {*owners} - {*silent}, server_age, len(silences), computing)

    def _resume_lost_work(self, seen: "_Seen") -> None:
        self._resume_stranded(seen.own_runs)
        steady = min(seen.server_age, _seconds(time.monotonic() - self._steady_since))
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


def _seconds(number: float) -> timedelta:
    return timedelta.max if math.isinf(number) else timedelta(seconds=number)


def _mark_ended(session: sa.orm.Session, worker_id: str) -> None:
    living = sa.update(Worker).where(Worker.id == worker_id, Worker.ended_at.is_(None))
    session.execute(living.values(ended_at=clock(session)))

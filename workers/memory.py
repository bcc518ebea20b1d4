"""Which workers have enough device memory for an analysis.

What an analysis needs is not known exactly before it is computed. A worker estimates it from the weights before it
loads anything, and learns more when memory runs out with one input at a time. An analysis that needs more than its
worker has goes to workers that have enough. It fails where none has, with both figures.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import queue
from app.database import clock
from app.errors import problem
from app.models import Worker
from workers.tasks import Json, Result


@dataclass(frozen=True)
class Memories:
    """The device memory of workers, in bytes.

    Attributes:
        living: of each living worker.
        largest: the largest of these, and of those that ended a short while ago; 0 if there are none.
        is_settled: whether some worker has lived for that while, so that others had the time to start.
    """

    living: tuple[int, ...]
    largest: int
    is_settled: bool

    @classmethod
    def now(cls, session: Session, patience_seconds: float) -> "Memories":
        """Return the memories of the fleet as the database knows it; the short while is `patience_seconds`."""
        since = clock(session) - timedelta(seconds=patience_seconds)
        late = sa.or_(Worker.ended_at.is_(None), Worker.ended_at > since)
        told = session.execute(
            sa.select(Worker.memory_bytes, Worker.started_at, Worker.ended_at).where(
                Worker.memory_bytes.is_not(None), late
            )
        ).all()
        living = [(memory, started) for memory, started, ended in told if ended is None and memory is not None]
        return cls(
            tuple(sorted(memory for memory, _ in living)),
            max((memory for memory, _, _ in told if memory is not None), default=0),
            any(started <= since for _, started in living),
        )

    def may_have(self, needs_bytes: int) -> bool:
        """Return whether a worker has enough, or one that is about to start may have."""
        return self.largest >= needs_bytes or not self.is_settled


def living(session: Session, needs_bytes: int) -> list[str]:
    """Return the queues of the living workers that have enough, one for each worker, smallest memory first."""
    enough = sa.select(Worker.memory_bytes).where(Worker.ended_at.is_(None), Worker.memory_bytes >= needs_bytes)
    return [queue.sized(memory) for memory in session.scalars(enough.order_by(Worker.memory_bytes)) if memory]


def least_taken(session: Session, queues: Sequence[str], count: int) -> list[str]:
    """Return on which of these queues, one for each worker, so many further turns wait for the fewest others."""
    workers = {name: queues.count(name) for name in queues}
    turns = dict.fromkeys(workers, 0) | queue.turns_on(session, [*workers])
    chosen: list[str] = []
    for _ in range(count):
        # Of equals the first one, which has the least memory.
        name = min(workers, key=lambda name: (turns[name] + 1) / workers[name])
        turns[name] += 1
        chosen.append(name)
    return chosen


def of_worker(session: Session, worker_id: str) -> int:
    """Return the device memory of a worker, in bytes; a worker that has not told it has enough for everything."""
    memory_bytes = session.get_one(Worker, worker_id).memory_bytes
    return sys.maxsize if memory_bytes is None else memory_bytes


def needed(result: Result) -> int | None:
    """Return what a step needs at least that ran out of its worker's device memory; None if it did not."""
    return None if result.too_little_bytes is None else result.too_little_bytes + 1


def too_little(needs_bytes: int, largest_bytes: int, cause: Json | None = None) -> Result:
    """Return the failure of an analysis for which no worker has enough memory.

    Args:
        needs_bytes: what it needs at least.
        largest_bytes: the most that a worker has.
        cause: the problem that a worker met, if it was not the estimate.
    """
    has = _in_words(largest_bytes)
    detail = f"It needs at least {_in_words(needs_bytes)} of device memory; the largest worker has {has}."
    if cause is not None:
        detail = f"{cause['detail']} {detail}"
    body = problem("out-of-memory", "Memory ran out", detail, needs_bytes=needs_bytes, largest_bytes=largest_bytes)
    return Result(outcome="failed", problem={**(cause or {}), **body})


def _in_words(n_bytes: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"

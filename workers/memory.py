"""Which workers have enough device memory for an analysis.

What an analysis needs is not known exactly before it is computed. A worker estimates it from the weights before it
loads anything, and learns more when memory runs out with one input at a time. An analysis that needs more than its
worker has goes to workers that have enough. It fails where none has, with both figures.
"""

import sys
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import queue
from app.database import clock
from app.errors import problem, problem_type
from app.models import Worker
from workers.tasks import Json, Result

# A worker that restarts, as all do at an upgrade, is waited for so long.
_PATIENCE = timedelta(seconds=60)
_OUT_OF_MEMORY = problem_type("out-of-memory")


@dataclass(frozen=True)
class Memories:
    """The device memory of workers, in bytes.

    Attributes:
        living: of each living worker that has told it.
        largest: the largest of these, and of those that ended within the last minute; 0 if there are none.
    """

    living: tuple[int, ...]
    largest: int

    @classmethod
    def now(cls, session: Session) -> "Memories":
        """Return the memories of the fleet as the database knows it."""
        late = sa.or_(Worker.ended_at.is_(None), Worker.ended_at > clock(session) - _PATIENCE)
        rows = session.execute(
            sa.select(Worker.memory_bytes, Worker.ended_at).where(Worker.memory_bytes.is_not(None), late)
        ).all()
        told = [(memory, ended_at is None) for memory, ended_at in rows if memory is not None]
        living = tuple(sorted(memory for memory, lives in told if lives))
        return cls(living, max((memory for memory, _ in told), default=0))

    def queues(self, needs_bytes: int) -> list[str]:
        """Return the queues of the living workers that have enough, one for each worker."""
        return [queue.sized(memory) for memory in self.living if memory >= needs_bytes]


def of_worker(session: Session, worker_id: str) -> int:
    """Return the device memory of a worker, in bytes; a worker that has not told it has enough for everything."""
    memory_bytes = session.get_one(Worker, worker_id).memory_bytes
    return sys.maxsize if memory_bytes is None else memory_bytes


def needed(result: Result, memory_bytes: int) -> int | None:
    """Return what a step needs at least that ran out of a worker's memory; None if it did not."""
    ran_out = result.problem is not None and result.problem["type"] == _OUT_OF_MEMORY
    return memory_bytes + 1 if ran_out and memory_bytes < sys.maxsize else None


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

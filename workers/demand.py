"""Say when a worker claims: one query asks for all its queues whether anything waits, and an idle worker is cheap.

The queue's library reads each queue's settings and its waiting runs in two transactions at every look, and looks for
delayed and timed out runs, which there are none of, every second: fifty statements a second in a worker that does
nothing. Here a queue's thread claims only where something waits, and looks less often the more workers wait with it.
docs/decisions/0069-idle-workers.md and 0076-fleets.md have the measurements.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from app import queue
from workers.locks import Line

if TYPE_CHECKING:
    from dbos import DBOS, Queue

# The library's own jobs, none of which this service needs.
_BACKGROUND_SECONDS = 60.0
# Longer than a claim takes.
_CLAIM_SECONDS = 2.0
# Looks a second of all workers together for something to compute, and for the rest; one alone may look more often.
_LOOKS_PER_SECOND = 200.0
_OTHER_LOOKS_PER_SECOND = 40.0
# Longest pause between two looks of a worker that waits, and between two at queues of what nobody waits for.
_LONGEST_SECONDS = 1.0
_LONGEST_OF_OTHERS_SECONDS = 5.0
# Its own queue, on which this service puts nothing either.
_OF_THE_LIBRARY = "_dbos_internal_queue"


class Demand:
    """Tells which queues have runs that wait, in one query for all of them, and from which of them to claim.

    A worker computes one run at a time, whichever of its queues it comes from: while it does, nothing is claimed from
    these, so that other workers may have it. Where runs wait on several of them, they take turns.

    Args:
        line: of the worker.
        dialect: of the database.
        ages: the queues that the worker listens to, and how old an answer may be for each, in seconds.
        computing: those of them whose runs compute.
        is_busy: returns whether a run of these is under way here.
    """

    def __init__(
        self,
        line: Line,
        dialect: str,
        ages: Mapping[str, float],
        computing: Collection[str],
        is_busy: Callable[[], bool],
    ) -> None:
        self._line = line
        self._given = {_OF_THE_LIBRARY: max(ages.values()), **ages}
        self._ages = dict(self._given)
        self._computing, self._is_busy = computing, is_busy
        self._query = queue.waiting(dialect, [*self._ages])
        self._asking = threading.Lock()
        self._asked_at = -math.inf
        self._waiting: frozenset[str] = frozenset()
        # Queues, and their pauses in a worker that is alone.
        self._pauses: list[tuple[Queue, float]] = []
        # The queue that was last told to claim, among those whose runs compute, and when.
        self._last, self._told_at = "", -math.inf

    def is_for(self, name: str) -> bool:
        """Return whether to claim from a queue now; true of a queue that is not among those of `ages`."""
        if name not in self._ages:
            return True
        with self._asking:
            computes = name in self._computing
            if computes and self._is_busy():
                return False
            if time.monotonic() - self._asked_at > self._ages[name]:
                (row,) = self._line.rows(self._query)
                self._waiting = frozenset(name for name, waits in zip(self._ages, row, strict=True) if waits)
                self._asked_at = time.monotonic()
            return name in self._waiting and (not computes or self._is_next(name))

    def join(self, queues: Iterable["Queue"]) -> None:
        """Take the queues, whose threads pause between two looks for as long as they say, in a worker that is alone."""
        self._pauses = [(one, one._polling_interval_sec) for one in queues]

    def share(self, workers: int, computing: int) -> None:
        """Look only as often as is enough if all workers look.

        Args:
            workers: number of living workers.
            computing: how many of them compute.
        """
        waiting = max(workers - computing, 0)
        for one, pause in self._pauses:
            if one.name in self._computing:
                enough = min(waiting / _LOOKS_PER_SECOND, _LONGEST_SECONDS)
            else:
                enough = min(workers / _OTHER_LOOKS_PER_SECOND, _LONGEST_OF_OTHERS_SECONDS)
            one._polling_interval_sec = max(pause, enough)
            self._ages[one.name] = self._given[one.name] * one._polling_interval_sec / pause

    def _is_next(self, name: str) -> bool:
        """Return whether a queue comes next of those whose runs compute."""
        if name != self._last and time.monotonic() - self._told_at < _CLAIM_SECONDS:
            return False  # the thread of the last one may be claiming
        if name == self._last and any(other in self._waiting for other in self._computing if other != name):
            return time.monotonic() - self._told_at > 2 * _CLAIM_SECONDS  # unless nobody takes it
        self._last, self._told_at = name, time.monotonic()
        return True


def launch(library: "DBOS", register: Callable[[], Iterable["Queue"]], demand: Demand) -> None:
    """Launch the queue's library; its threads claim by demand, and take the queues as they were registered.

    What is replaced is no public interface of the library; tests/workers/test_contract.py fails where an upgrade
    changes it.

    Args:
        library: configured.
        register: registers all queues that the worker listens to, once the library is launched.
        demand: asked before every claim.
    """
    from dbos import _workflow_commands

    _workflow_commands._BACKGROUND_JOBS_INTERVAL_SEC = _BACKGROUND_SECONDS
    library.launch()
    own = {one.name: one for one in register()}
    for one in own.values():
        one.database_backed_queue = False
    # On the library's own queue nothing waits that is urgent.
    demand.join([*own.values(), library._registry.get_internal_queue()])
    system = library._sys_db
    system.get_queue = lambda name, **_: own.get(name)  # type: ignore[method-assign]
    system.list_queues = lambda **_: list(own.values())  # type: ignore[method-assign]
    system.dequeue_scopes = lambda queue_name: [None] if demand.is_for(queue_name) else []  # type: ignore[method-assign]

"""Measure seconds by phase, as reports state them, and the share of the work that is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

# Numbers of one part, where progress is counted.
_NUMBERS = 100
# Called with the share of a task that is done, 0 to 1.
Tell = Callable[[float], None]


def silent(_share: float) -> None:
    """Tell nobody."""


@dataclass
class Course:
    """When which phase was measured, of all clocks of a thread.

    Attributes:
        phases: name, beginning and end in nanoseconds since 1970, and the index of the phase within which it was; in
            the order of their beginnings. An end of 0 has not come.
    """

    phases: list[tuple[str, int, int, int | None]] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)

    def begin(self, name: str) -> None:
        """Note that a phase begins."""
        self.phases.append((name, time.time_ns(), 0, self._open[-1] if self._open else None))
        self._open.append(len(self.phases) - 1)

    def end(self) -> None:
        """Note that the innermost phase ends."""
        index = self._open.pop()
        name, began, _, parent = self.phases[index]
        self.phases[index] = (name, began, time.time_ns(), parent)


# Notes the phases of this thread, where somebody wants to know more than their sums.
course: ContextVar[Course | None] = ContextVar("course", default=None)


class Clock:
    """Measure seconds by phase. Phases nest: the time of an inner phase is not part of the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block under a name."""
        self._turn()
        self._open.append(name)
        noted = course.get()
        if noted is not None:
            noted.begin(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()
            if noted is not None:
                noted.end()

    def _turn(self) -> None:
        """Add the time since the last change of phase to the phase that ran."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class Steps:
    """Report progress over the parts of all splits: the phase, and a number that never falls."""

    def __init__(self, progress: Callable[[str, int, int], None] | None, parts: int) -> None:
        self.progress, self.parts, self.ended, self.told = progress, parts, 0, 0

    def inside(self, phase: str, share: float) -> None:
        """Report this many parts, or this share of one, as done beyond those that ended."""
        self.told = max(self.told, min(int(_NUMBERS * (self.ended + share)), _NUMBERS * self.parts))
        if self.progress:
            self.progress(phase, self.told, _NUMBERS * self.parts)

    def end(self, phase: str, parts: int = 1) -> None:
        """Report this many parts as ended."""
        self.ended += parts
        self.inside(phase, 0.0)

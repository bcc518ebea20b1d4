"""Seconds by phase, as reports give them, and what share of the work is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Numbers of one part, where progress is counted.
_NUMBERS = 100
# Told what share of a task is done, 0 to 1.
Tell = Callable[[float], None]


def silent(_share: float) -> None:
    """Tell nobody."""


class Clock:
    """Seconds by phase. Within one phase another may begin; what it takes is counted under its own name alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside under a name."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Count the time since the last turn for the phase that ran."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class Steps:
    """Progress over the parts of all splits: a phase by name, and numbers that only rise."""

    def __init__(self, progress: Callable[[str, int, int], None] | None, parts: int) -> None:
        self.progress, self.parts, self.ended, self.told = progress, parts, 0, 0

    def inside(self, phase: str, share: float) -> None:
        """So many parts, or this share of one, are done beyond those that ended."""
        self.told = max(self.told, min(int(_NUMBERS * (self.ended + share)), _NUMBERS * self.parts))
        if self.progress:
            self.progress(phase, self.told, _NUMBERS * self.parts)

    def end(self, phase: str, parts: int = 1) -> None:
        self.ended += parts
        self.inside(phase, 0.0)

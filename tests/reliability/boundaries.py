"""Kills a worker's process at an exact place of its work, in the campaigns alone.

The variable KILLED_AT has a module, a function of it, a moment and a file: once the file exists, the next call of the
function kills the process. Moments: `before` the call; `commit`, before the first commit in it; `after` it; `during`
it, within half a second of its beginning.

The tests' own sitecustomize (tests/operators) loads this module where the variable is set, before anything else.
"""

import importlib.util
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_LONGEST_DELAY_SECONDS = 0.5


class _Place(MetaPathFinder):
    """Where to kill this process: replaces a function once its module is imported."""

    def __init__(self, module: str, function: str, moment: str, armed: str) -> None:
        self._module, self._function, self._moment, self._armed = module, function, moment, Path(armed)
        # Whether the function runs in this thread, and is to be killed at its commit.
        self._within = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        spec.loader = _Loading(spec.loader, self._replace)
        return spec

    def _replace(self, module: ModuleType) -> None:
        *path, name = self._function.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part)
        function = getattr(owner, name)
        if self._moment == "commit":
            self._watch_commits()

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if not self._armed.exists():
                return function(*args, **kwargs)
            if self._moment == "before":
                _die()
            if self._moment == "during":
                threading.Timer(random.uniform(0, _LONGEST_DELAY_SECONDS), _die).start()
            self._within.now = True
            try:
                result = function(*args, **kwargs)
            finally:
                self._within.now = False
            if self._moment == "after":
                _die()
            return result

        setattr(owner, name, replaced)

    def _watch_commits(self) -> None:
        from sqlalchemy import Engine, event

        def commits(_connection: object) -> None:
            if getattr(self._within, "now", False):
                _die()

        event.listen(Engine, "commit", commits)


class _Loading(Loader):
    """Loads a module, and then changes it."""

    def __init__(self, real: Loader, change: Callable[[ModuleType], None]) -> None:
        self._real, self._change = real, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        self._change(module)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


# The worker alone, not the processes that it starts.
if sys.orig_argv[1:3] == ["-m", "workers"]:
    sys.meta_path.insert(0, _Place(*os.environ["KILLED_AT"].split()))

"""Charts on request: each is drawn once, in a separate process, and cached.

Drawing a picture takes a third of a second and holds the interpreter meanwhile: in the API's process other calls would
wait for it. A chart's call holds no thread while it waits for its turn. The process starts with the first chart and
ends after a while without requests.
"""

import asyncio
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Literal
from uuid import uuid4

from app.environment import plain_environment
from app.errors import Unavailable
from app.schemas import Kind
from app.schemas.kinds import KINDS
from app.settings import Settings

logger = logging.getLogger(__name__)

Format = Literal["svg", "png", "json"]

# Most waiting charts, and the timeout of one; a picture of two panels takes 0.3 s, the first one 2 s.
_MOST_WAITING = 200
_DRAWING_SECONDS = 60.0


def names(kind: Kind) -> list[str]:
    """Return the names of the charts of a report of this kind; the first shows the main measures together."""
    return ["overview", *KINDS[kind].measures, *KINDS[kind].further]


@dataclass(frozen=True)
class Chart:
    """One picture, identified by the sha256 of its data.

    Attributes:
        data_sha256: of the text that it is drawn from: a report, or for a chart of several what it needs of them.
        name: one of `names` of the report's kind, or `course`, `overlay` or `parallel`, which show several.
        format: its format.
    """

    data_sha256: str
    name: str
    format: Format | Literal["js"]

    @property
    def key(self) -> str:
        """The cache key: a hash of the data, the chart, and the code and libraries that draw it."""
        return hashlib.sha256(json.dumps([*astuple(self), _drawn_by()]).encode()).hexdigest()


@cache
def _drawn_by() -> str:
    files = sorted(Path(__file__).with_name("charts").glob("*.py"))
    source = b"".join(file.read_bytes() for file in [*files, Path(__file__)])
    versions = [importlib.metadata.version(name) for name in ("altair", "vl-convert-python")]
    return " ".join([*versions, hashlib.sha256(source).hexdigest()])


# The library that draws charts in a browser, which is cached as if it were one.
_LIBRARY = Chart("", "vega", "js")


class DrawingFailed(Exception):
    """The drawing process failed at a chart, or ended or timed out twice."""


class Drawings:
    """The charts of this process; its methods are called on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._kept = KeptCharts(settings.data_dir / "charts", settings.max_charts_bytes)
        self._process = _DrawingProcess()
        # One thread talks to the one process; another reads cached charts, which must not wait for it.
        self._drawing = ThreadPoolExecutor(1, "drawing")
        self._reading = ThreadPoolExecutor(1, "kept-charts")
        self._coming: dict[str, asyncio.Task[bytes]] = {}

    async def get(self, chart: Chart, data: Callable[[], str]) -> bytes:
        """Return the chart from the cache, or draw it once for all concurrent callers.

        Args:
            chart: the chart to return.
            data: returns the text that it is drawn from, if it must be drawn; called in a thread.

        Raises:
            Unavailable: too many charts wait for their turn.
        """
        key = chart.key
        if key not in self._coming:
            if len(self._coming) >= _MOST_WAITING:
                raise Unavailable(f"{_MOST_WAITING} charts are being drawn; try again in a few seconds.")
            self._coming[key] = asyncio.create_task(self._get(key, chart, data))
            self._coming[key].add_done_callback(lambda task: self._forget(key, task))
        # A client that disconnects does not cancel the chart for the others.
        return await asyncio.shield(self._coming[key])

    async def library(self) -> tuple[bytes, str]:
        """Return the JavaScript that draws charts in a browser, vega-embed with Vega-Lite, and its key.

        Raises:
            Unavailable: as for `get`.
        """
        return await self.get(_LIBRARY, lambda: "null"), _LIBRARY.key

    def close(self) -> None:
        """End the process and cancel waiting calls."""
        self._drawing.shutdown(wait=False, cancel_futures=True)
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._process.close()

    def _forget(self, key: str, task: "asyncio.Task[bytes]") -> None:
        del self._coming[key]
        if not task.cancelled():
            task.exception()  # retrieved here in case no caller awaits it any more

    async def _get(self, key: str, chart: Chart, data: Callable[[], str]) -> bytes:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._reading, self._kept.read, key)
        if found is None:
            text = await loop.run_in_executor(self._reading, data)
            found = await loop.run_in_executor(self._drawing, self._process.draw, chart, text)
            await loop.run_in_executor(self._reading, self._kept.write, key, found)
        return found


class _DrawingProcess:
    """`python -m app.api.charts`: takes a chart as a line of JSON and returns its size as a line and its bytes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._closed = False

    def draw(self, chart: Chart, data: str) -> bytes:
        """Draw one chart; replace a process that has ended, or ends during it, once.

        Raises:
            DrawingFailed: the process could not draw it (see its log), the second one ended too, or this is closed.
        """
        task = json.dumps({"data": data, "name": chart.name, "format": chart.format}).encode() + b"\n"
        for _ in range(2):
            process = self._running()
            with suppress(BrokenPipeError):
                if (drawn := self._ask(process, task)) is not None:
                    return drawn
            _end(process)
        raise DrawingFailed(f"{chart.name}.{chart.format} of the data with the sha256 {chart.data_sha256}")

    def close(self) -> None:
        """End the process; do not start another."""
        with self._starting:
            self._closed = True
            if self._process is not None:
                _end(self._process)

    def _running(self) -> "subprocess.Popen[bytes]":
        with self._starting:
            if self._closed:
                raise DrawingFailed("the service ends")
            if self._process is None or self._process.poll() is not None:
                if self._process is not None:
                    _end(self._process)
                self._process = self._start()
            return self._process

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"{__package__}.charts"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=plain_environment())
        # It ends by itself once nobody asks for charts; until it is waited for, it stays in the list of processes.
        threading.Thread(target=process.wait, daemon=True).start()
        return process

    def _ask(self, process: "subprocess.Popen[bytes]", task: bytes) -> bytes | None:
        """Return the process's answer; None if it ends without one, by itself or at the timeout."""
        assert process.stdin is not None
        assert process.stdout is not None
        limit = threading.Timer(_DRAWING_SECONDS, process.kill)
        limit.start()
        try:
            process.stdin.write(task)
            process.stdin.flush()
            line = process.stdout.readline()
            if not line.endswith(b"\n"):
                return None
            if (size := int(line)) < 0:
                raise DrawingFailed("the chart cannot be drawn; the log says more")
            drawn = process.stdout.read(size)
            return drawn if len(drawn) == size else None
        finally:
            limit.cancel()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process, wait for it, and close its pipes except those that a thread still reads or writes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        # Unsent data is lost; its receiver is gone.
        with suppress(OSError, ValueError):
            pipe.close()


class KeptCharts:
    """A cache of drawn charts: files in a folder shared by all API processes of a machine; the longest unused go first.

    A file begins with the hash of its content, so that one truncated by a crash counts as missing. If the disk fails,
    charts are drawn again.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder = folder
        self._most_bytes = most_bytes

    def read(self, key: str) -> bytes | None:
        path = self._folder / key
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest, drawn = content[:32], content[32:]
        return drawn if hashlib.sha256(drawn).digest() == digest else None

    def write(self, key: str, drawn: bytes) -> None:
        if len(drawn) + 32 > self._most_bytes:
            return
        part = self._folder / f"{uuid4()}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(drawn).digest() + drawn)
            part.replace(self._folder / key)
            self._make_room()
        except OSError as error:
            logger.warning("a chart was not kept: %s", error)
            part.unlink(missing_ok=True)

    def _make_room(self) -> None:
        with os.scandir(self._folder) as entries:
            found = [(entry.stat(), entry.path) for entry in entries]
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            if total <= self._most_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= stat.st_size

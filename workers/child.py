"""The compute process: torch runs here, in a child of the worker that can be killed.

A cancellation, a timeout, exhausted memory or a crash in native code ends the child, never the worker. The child stays
warm between analyses. The two exchange lines of JSON over the child's standard input and output: the worker sends
`tasks.Work`, the child `tasks.Hello` once, then for each step `tasks.OfAnalysis` with progress any number of times and
with a body or a problem at the end.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from app import traces
from app.environment import plain_environment
from app.errors import problem
from app.settings import Settings
from workers.tasks import MESSAGES, Hello, OfAnalysis, Progress, Result, Work

logger = logging.getLogger("interplay")

# How often a running analysis is checked for cancellation, and how stale its progress may be.
_TICK_SECONDS = 0.25
# Share of one processor below which a process counts as idle.
_IDLE_SHARE = 0.01

# Defaults for torch in the process; the operator's environment overrides them.
ARITHMETIC = {
    # How long threads spin while they wait for each other. By default they spin so long that a thread which lost its
    # core to another process delays all the others: eigvalsh of 512 x 512 on two threads of two busy cores took 0.3 to
    # 6 s instead of 0.03 s. On idle cores it took 0.06 s without spinning, and 0.015 s with this value.
    "GOMP_SPINCOUNT": "1000",
    # Up to 256 MiB of freed memory is kept for reuse: returning it and getting it again, page by page, took 5 to 10 %
    # of the time of the passes and the metrics of a small network.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}


class ChildDied(Exception):
    """The compute process ended in the middle of a task."""


class ComputeChild:
    """The worker's side: starts the process, gives it one task at a time, and kills it when a task must stop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # A run that another worker took over may still be computing here when the next one comes.
        self._one_at_a_time = threading.Lock()
        self.description: Hello | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: queue.SimpleQueue[OfAnalysis | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the process if it is not running; it loads torch before the first task comes."""
        if self.is_running():
            return
        environment = {**ARITHMETIC, **plain_environment(self._settings, storage=True)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.compute.main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._messages = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process, self._messages), daemon=True).start()

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def run(self, work: Work, on_tick: Callable[[Progress | None], bool]) -> Result:
        """Compute one step. `on_tick` gets new progress, if any, several times a second; if it returns True, or the
        step takes longer than `analysis_timeout_seconds`, the process is killed.

        Raises:
            ChildDied: the process ended by itself, and only its exit status is known, or it was killed because it
                was idle.
        """
        with self._one_at_a_time:
            try:
                return self._run(work, on_tick)
            except ChildDied:
                raise
            except BaseException:
                # It would go on, and its answer would be taken for that to the next step.
                self.kill()
                raise

    def _run(self, work: Work, on_tick: Callable[[Progress | None], bool]) -> Result:
        self.start()
        self._send(work)
        deadline = time.monotonic() + self._settings.analysis_timeout_seconds
        next_tick = time.monotonic() + _TICK_SECONDS
        progress: Progress | None = None
        watch = _Watch(self._process_id(), self._settings.stall_seconds)
        while True:
            with contextlib.suppress(queue.Empty):
                message = self._messages.get(timeout=max(0.0, next_tick - time.monotonic()))
                watch.heard()
                match message:
                    case None:
                        raise ChildDied(self._exit_status())
                    case OfAnalysis(analysis_id=other) if other != work.step.analysis_id:
                        logger.error("the compute process answered for analysis %s", other)
                    case OfAnalysis(body=body, phases=phases) if body is not None:
                        traces.record([traces.Timed(*phase) for phase in phases])
                        return Result(outcome="succeeded", body=body)
                    case OfAnalysis(problem=what, phases=phases) if what is not None:
                        traces.record([traces.Timed(*phase) for phase in phases])
                        return Result(outcome="failed", problem=what)
                    case OfAnalysis(progress=told):
                        progress = told
            now = time.monotonic()
            if now > deadline:
                self.kill()
                limit = self._settings.analysis_timeout_seconds
                detail = f"It had not ended after {limit:g} s, the limit that the service's operator has set."
                body = problem("analysis-timeout", "The analysis took too long", detail, limit_seconds=limit)
                return Result(outcome="failed", problem=body)
            if watch.is_stalled():
                self.kill()
                raise ChildDied(f"it neither computed nor told progress for {self._settings.stall_seconds:g} s")
            if now >= next_tick:
                next_tick = now + _TICK_SECONDS
                if on_tick(progress):
                    self.kill()
                    return Result(outcome="cancelled")
                progress = None

    def _process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _send(self, work: Work) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        line = work.model_dump_json(by_alias=True).encode() + b"\n"
        # A dead process closes its end of the pipe; the reader detects and reports that too. So it does where another
        # thread has killed it, which closes this end.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[bytes], messages: "queue.SimpleQueue[OfAnalysis | None]") -> None:
        assert process.stdout is not None
        # A last line may be cut off in the middle.
        with process.stdout, contextlib.suppress(ValueError):
            for line in process.stdout:
                message = MESSAGES.validate_json(line)
                if isinstance(message, Hello):
                    self.description = message
                else:
                    messages.put(message)
        messages.put(None)

    def _exit_status(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        if status >= 0:
            return f"it ended with status {status}"
        return f"it was ended by {signal.Signals(-status).name}"


class _Watch:
    """Detects a stalled process: one that for long has sent no message and used no processor time.

    Waiting for a GPU keeps a thread of the process busy; a deadlock, a read that never returns and a lost device do
    not.
    """

    def __init__(self, process_id: int, patience_seconds: float) -> None:
        self._process_id, self._patience_seconds = process_id, patience_seconds
        self.heard()

    def heard(self) -> None:
        """Restart the wait: the process has sent a message or used processor time."""
        self._since, self._computed_seconds = time.monotonic(), self._processor_seconds()

    def is_stalled(self) -> bool:
        """Return whether the process was idle for all of `patience_seconds`; False if its processor time is unknown."""
        if time.monotonic() - self._since < self._patience_seconds:
            return False
        now = self._processor_seconds()
        if now is None or self._computed_seconds is None:
            return False
        # A thread that only polls now and then, as in some libraries, does not count.
        if now - self._computed_seconds > _IDLE_SHARE * self._patience_seconds:
            self.heard()
            return False
        return True

    def _processor_seconds(self) -> float | None:
        """Return the processor time of all threads of the process together; None if /proc cannot be read."""
        try:
            # The name, in parentheses, may hold anything; user and system time are the 12th and 13th field after it.
            fields = Path(f"/proc/{self._process_id}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

"""A service for an example: started on a free port, asked, and stopped at the end, whatever happened."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from interplay import InterplayError

START_SECONDS, STOP_SECONDS = 60.0, 15.0

console = Console(highlight=False)

# The signals that came; `check_signals` looks at them between two steps.
_received: list[int] = []


class Stopped(Exception):
    """Ctrl-C, or another signal that asks for the end."""


class ServiceFailed(Exception):
    """The service did not start, or ended by itself."""


def run_example(name: str, body: Callable[[], None]) -> int:
    """Run the body to its end or to a signal; the exit code is 0, 130 where it was stopped, 1 where it failed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _note_signal)
    try:
        body()
    except (Stopped, KeyboardInterrupt):
        console.print("Stopped.")
        return 130
    except (InterplayError, ServiceFailed) as error:
        print(f"The {name} failed: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True)
class Service:
    """A service that listens on `url`; `process` supervises its worker."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def service(data_dir: Path) -> Iterator[Service]:
    """A service on a free port, SQLite and a local folder, one worker; its output goes beside its data."""
    # An example's service must not end up in a database or a bucket that the shell is configured for.
    kept = ("INTERPLAY_DEVICE", "INTERPLAY_THREADS")
    environment = {key: value for key, value in os.environ.items() if key in kept or not key.startswith("INTERPLAY_")}
    environment["INTERPLAY_DATA_DIR"] = str(data_dir)
    # Matrices this small gain nothing from a second thread, and where cores are shared two that wait for each other
    # lose much: 27 s with one, 151 s with two, beside other work on two cores.
    environment.setdefault("INTERPLAY_THREADS", "1")
    output, log = (data_dir / name for name in ("service.out", "service.log"))
    with output.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop it after our last request
        )
    try:
        yield Service(_wait_for_url(process, output), process)
    except (InterplayError, ServiceFailed):
        print(f"The service said:\n{log.read_text(errors='replace')[-5000:]}", file=sys.stderr)
        raise
    finally:
        _stop(process)


def check_signals() -> None:
    """End here if a signal came.

    The handler itself does not raise: an exception in the middle of an import or a destructor may be swallowed.
    """
    if _received:
        raise Stopped


def _wait_for_url(process: subprocess.Popen[bytes], output: Path) -> str:
    """The URL that the service's first line names."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        check_signals()
        ended = process.poll()
        first_line, newline, _ = output.read_text().partition("\n")
        if newline:
            found = re.fullmatch(r"Interplay is listening on (http://\S+)", first_line)
            if not found:
                raise ServiceFailed(f"its first line was {first_line!r}")
            return found[1]
        if ended is not None:
            raise ServiceFailed(f"the service ended with exit code {ended} before it listened")
        time.sleep(0.05)
    raise ServiceFailed(f"the service did not listen within {START_SECONDS:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the service and its worker: asked first, then, after a while, killed."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _note_signal(number: int, frame: FrameType | None) -> None:
    if _received:  # somebody insists
        raise KeyboardInterrupt
    _received.append(number)

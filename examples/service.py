"""Run a service for an example: started on a free port and always stopped at the end."""

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

# The received signals; `check_signals` checks them between two steps.
_received: list[int] = []


class Stopped(Exception):
    """Raised after Ctrl-C or another termination signal."""


class ServiceFailed(Exception):
    """Raised if the service did not start, or ended by itself."""


def run_example(name: str, body: Callable[[], None]) -> int:
    """Run the body to its end or to a signal; return exit code 0, 130 if it was stopped, 1 if it failed."""
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
    """Run a service on a free port, SQLite and a local folder, with one worker; its log goes beside its data."""
    # An example's service must not use a database or a bucket that the shell is configured for.
    kept = ("INTERPLAY_DEVICE", "INTERPLAY_THREADS")
    environment = {key: value for key, value in os.environ.items() if key in kept or not key.startswith("INTERPLAY_")}
    environment["INTERPLAY_DATA_DIR"] = str(data_dir)
    # Matrices this small gain nothing from a second thread. On shared cores two threads that wait for each other lose
    # much: 27 s with one, 151 s with two, beside other work on two cores.
    environment.setdefault("INTERPLAY_THREADS", "1")
    output, log = (data_dir / name for name in ("service.out", "service.log"))
    with output.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the service after its last request
        )
    try:
        yield Service(_wait_for_url(process, output), process)
    except (InterplayError, ServiceFailed):
        print(f"The service said:\n{log.read_text(errors='replace')[-5000:]}", file=sys.stderr)
        raise
    finally:
        _stop(process)


def check_signals() -> None:
    """Raise if a signal was received.

    The handler itself does not raise: an exception in the middle of an import or a destructor may be swallowed.
    """
    if _received:
        raise Stopped


def _wait_for_url(process: subprocess.Popen[bytes], output: Path) -> str:
    """Return the URL in the service's first line."""
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
    """Stop the service and its worker: ask first, kill after a timeout."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _note_signal(number: int, frame: FrameType | None) -> None:
    if _received:  # a second signal arrived
        raise KeyboardInterrupt
    _received.append(number)

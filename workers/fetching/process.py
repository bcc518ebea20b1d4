"""The worker's side of a fetching process: start it, hear it, and end it once it is not wanted any more."""

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from app.environment import STORES, plain_environment
from app.errors import SourceDenied, problem
from app.settings import Settings
from app.sources import BUCKETS, entry_for, parse_source
from workers.fetching.main import BEARER
from workers.fetching.messages import TOLD, Fetched, Order, Told
from workers.tasks import Json, Progress

logger = logging.getLogger("interplay")

_TICK_SECONDS = 0.5
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
# Added to twice the patience: a process that hashes what is there, or waits for the disk, says nothing for a while.
_SILENCE_SECONDS = 600.0
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def run(settings: Settings, order: Order, on_tick: Callable[[Progress | None], bool]) -> Fetched | Json | None:
    """Fetch a file.

    Args:
        settings: the service's settings.
        order: what to fetch.
        on_tick: called twice a second with the progress, if there is any; returns whether to stop.

    Returns:
        The file; the problem that prevented it; None if it was stopped.
    """
    deaths, before = 0, -1
    while True:
        try:
            return _run(settings, order, on_tick)
        except _Died as error:
            logger.error("the process that fetches %s died: %s", parse_source(order.source).shown, error)
            # One that has brought more than the one before may be followed by another.
            deaths = 1 if error.done_bytes > before else deaths + 1
            before = max(before, error.done_bytes)
            if deaths >= _ATTEMPTS:
                detail = f"The process that fetches the file died {deaths} times at one place: {error}."
                return problem("fetch-crashed", "The fetching process died", f"{detail} Memory may have run out.")
        time.sleep(_PAUSE_SECONDS)


class _Died(Exception):
    """The process ended without a result, or was silent for too long.

    Attributes:
        done_bytes: how much of the file it had.
    """

    def __init__(self, why: str, done_bytes: int) -> None:
        super().__init__(why)
        self.done_bytes = done_bytes


def _run(settings: Settings, order: Order, on_tick: Callable[[Progress | None], bool]) -> Fetched | Json | None:
    lines: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
    with subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.main"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment_of(settings, order),
    ) as process:
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(order.model_dump_json().encode() + b"\n")
                process.stdin.flush()
            threading.Thread(target=_read, args=(process, lines), daemon=True).start()
            return _hear(process, lines, 2 * settings.fetch_patience_seconds + _SILENCE_SECONDS, on_tick)
        finally:
            process.kill()


def _hear(
    process: "subprocess.Popen[bytes]",
    lines: "queue.SimpleQueue[Told | None]",
    most_silent_seconds: float,
    on_tick: Callable[[Progress | None], bool],
) -> Fetched | Json | None:
    progress: Progress | None = None
    done_bytes, heard_at = 0, time.monotonic()
    next_tick = time.monotonic() + _TICK_SECONDS
    while True:
        with suppress(queue.Empty):
            told = lines.get(timeout=max(0.0, next_tick - time.monotonic()))
            heard_at = time.monotonic()
            if told is None:
                raise _Died(f"exit status {process.wait()}", done_bytes)
            if told.fetched is not None or told.problem is not None:
                return told.fetched or told.problem
            progress = told.progress
            done_bytes = max(done_bytes, progress.done if progress else 0)
        if time.monotonic() - heard_at > most_silent_seconds:
            raise _Died(f"it was silent for {most_silent_seconds:g} s", done_bytes)
        if time.monotonic() >= next_tick:
            next_tick = time.monotonic() + _TICK_SECONDS
            if on_tick(progress):
                return None
            progress = None


def _read(process: "subprocess.Popen[bytes]", lines: "queue.SimpleQueue[Told | None]") -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(TOLD.validate_json(line))
    except ValueError:
        pass  # a line that was cut off
    lines.put(None)


def environment_of(settings: Settings, order: Order, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a process that fetches from one source: its credentials, by their usual names."""
    source = parse_source(order.source)
    found = plain_environment(settings, given=given)
    found |= {name: given[name] for name in _CERTIFICATES if name in given}
    entry = entry_for(settings.allowed_sources, source)
    name = entry.credentials if entry else ""
    if not name:
        return found
    if source.scheme not in BUCKETS:
        return found | ({BEARER: _one_line(name, given[name])} if given.get(name) else {})
    # PARTNER_B's variables begin with PARTNER_ too.
    longer = tuple(f"{one.credentials}_" for one in settings.allowed_sources if one.credentials.startswith(f"{name}_"))
    begin = STORES[source.scheme]
    return found | {
        f"{begin}{key.removeprefix(f'{name}_')}": _one_line(key, value)
        for key, value in given.items()
        if key.startswith(f"{name}_") and not key.startswith(longer)
    }


def _one_line(name: str, value: str) -> str:
    """Return a credential without blanks around it, as files of secrets have them.

    Raises:
        SourceDenied: it cannot be one; its value is not told.
    """
    value = value.strip()
    # Keys of Google's service accounts are JSON, of many lines.
    if not value.startswith("{") and not (value.isascii() and value.isprintable()):
        raise SourceDenied(f"The worker's variable {name} holds more than one line of printable characters.")
    return value

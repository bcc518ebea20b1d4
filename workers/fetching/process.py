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

from app.environment import plain_environment
from app.errors import problem
from app.settings import Settings
from app.sources import BUCKETS, Allowed, entry_for, parse_source
from workers.fetching.main import TOKEN
from workers.fetching.messages import TOLD, Fetched, Order, Told
from workers.tasks import Json, Progress

logger = logging.getLogger("interplay")

_TICK_SECONDS = 0.5
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
# How the variables begin that obstore reads, by scheme.
_USUAL = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
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
    death = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            return _run(settings, order, on_tick)
        except _Died as error:
            death = str(error)
            logger.error("the process that fetches %s died: %s", parse_source(order.source).shown, death)
    detail = f"The process that fetches the file died {_ATTEMPTS} times: {death}. Memory may have run out."
    return problem("fetch-crashed", "The fetching process died", detail)


class _Died(Exception):
    """The process ended without a result."""


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
            return _hear(process, lines, on_tick)
        finally:
            process.kill()


def _hear(
    process: "subprocess.Popen[bytes]",
    lines: "queue.SimpleQueue[Told | None]",
    on_tick: Callable[[Progress | None], bool],
) -> Fetched | Json | None:
    progress: Progress | None = None
    next_tick = time.monotonic() + _TICK_SECONDS
    while True:
        with suppress(queue.Empty):
            told = lines.get(timeout=max(0.0, next_tick - time.monotonic()))
            if told is None:
                raise _Died(f"exit status {process.wait()}")
            if told.fetched is not None or told.problem is not None:
                return told.fetched or told.problem
            progress = told.progress
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
    entry: Allowed | None = entry_for(settings.allowed_sources, source)
    name = entry.credentials if entry else ""
    if not name:
        return found
    if source.scheme in BUCKETS:
        usual = _USUAL[source.scheme]
        named = {key: value for key, value in given.items() if key.startswith(f"{name}_")}
        return found | {f"{usual}{key.removeprefix(name)}": value for key, value in named.items()}
    return found | ({TOKEN: given[name]} if given.get(name) else {})

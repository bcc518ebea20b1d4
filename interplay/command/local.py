"""A service in a temporary folder, for one analysis of files on this machine."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interplay import server
from interplay.client import Client
from interplay.command import rendering
from interplay.command.options import EXIT_FAILED, EXIT_USAGE, fail, note

# Settings that a temporary service takes over; all others say where another one's data lie, or who may use it.
_KEPT = ("INTERPLAY_DEVICE", "INTERPLAY_THREADS", "INTERPLAY_RETRY_SECONDS")
_ENDING_SECONDS = 20.0
# Most of a service's log that a failure shows.
_LAST_LINES = 10


@contextmanager
def temporary_service() -> Iterator[Client]:
    """Start a service with one worker, yield a client of it, and end it; its files are deleted.

    It listens on loopback, and a key that nobody else knows protects it.
    """
    command = server.COMMANDS["serve"]
    if not command.installed():
        detail = f"without a service, files are analysed by one of this machine: pip install '{command.requirement}'"
        fail(EXIT_USAGE, "Not installed", detail, {})
    with tempfile.TemporaryDirectory(prefix="interplay-") as folder:
        key = os.urandom(24).hex()
        log = Path(folder) / "log"
        note("starting a service in a temporary folder")
        process = _start(command, Path(folder) / "data", log, key)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().partition(" on ")[2].partition(";")[0].strip()
            if not url:
                process.wait(_ENDING_SECONDS)
                lines = rendering.printable_lines(log.read_text(errors="replace"))[-_LAST_LINES:]
                fail(EXIT_FAILED, "The temporary service did not start", "", {"log": lines})
            with Client(url, key) as client:
                yield client
        finally:
            _end(process)


def _start(command: server.ServerCommand, data: Path, log: Path, key: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INTERPLAY_") or name in _KEPT}
    # As in interplay.server: a folder `app` where the command runs must not be taken for the service.
    environment = {**kept, "INTERPLAY_DATA_DIR": str(data), "INTERPLAY_API_KEY": key, "PYTHONSAFEPATH": "1"}
    with log.open("wb") as written:
        return subprocess.Popen(
            [sys.executable, "-m", *command.module, "--port", "0"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            # Ctrl-C is for this process, which then ends the service.
            start_new_session=True,
        )


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()

"""The check for stalled compute processes, by their messages and the processor time that they use."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.services import until
from workers.child import _Watch

PATIENCE_SECONDS = 1.0


@contextmanager
def _process(code: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_process_that_sleeps_is_stalled() -> None:
    """A sleeping process is stalled only once the patience is over; a message starts the wait again."""
    with _process("import time; time.sleep(60)") as process_id:
        time.sleep(1)  # Python itself uses processor time to start
        watch = _Watch(process_id, PATIENCE_SECONDS)
        assert not watch.is_stalled()
        until(watch.is_stalled, seconds=20)
        watch.heard()
        assert not watch.is_stalled()


def test_a_process_that_computes_is_not_stalled() -> None:
    """A process that computes is never stalled, however long it sends no message."""
    with _process("while True: pass") as process_id:
        watch = _Watch(process_id, PATIENCE_SECONDS)
        end = time.monotonic() + 4 * PATIENCE_SECONDS
        while time.monotonic() < end:
            assert not watch.is_stalled()
            time.sleep(0.05)

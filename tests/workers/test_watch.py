"""The check for stalled compute processes, by their messages and the processor time that they use."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests import services
from tests.services import Service, until
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


def test_an_analysis_whose_process_hangs_is_computed_by_another(
    tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A stopped compute process is replaced, and the analysis succeeds."""
    with services.running(tmp_path / "data", stall_seconds="3") as service:
        checkpoint = service.post("/v1/checkpoints", {"name": "net"}, mlp_checkpoint_file).json()["id"]
        probe = service.post("/v1/probes", {"name": "digits"}, digits_probe_file).json()["id"]
        child = service.compute_child()
        os.kill(child.pid, signal.SIGSTOP)
        analysis = service.analyze(checkpoint_id=checkpoint, probe_id=probe, options={"null_permutations": 0})
        assert service.wait(analysis["id"])["status"] == "succeeded"
        assert _is_gone(service, child)


def _is_gone(service: Service, child: psutil.Process) -> bool:
    return service.compute_child().pid != child.pid and not child.is_running()

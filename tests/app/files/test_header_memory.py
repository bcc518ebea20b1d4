"""Memory of the API while many files with large headers arrive at once."""

import threading
import time
from pathlib import Path

import pytest

from app.errors import Unavailable
from app.files import tensorfile
from tests import services
from tests.services import Service

N_TENSORS = 30_000


def _file(n_tensors: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return tensorfile.header_bytes({f"layers.{i:06d}.attention.weight": entry for i in range(n_tensors)})


def _peak_kib(service: Service) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.slow
def test_many_large_headers_take_the_memory_of_one(tmp_path: Path) -> None:
    """Six uploads at once after one take no more memory: they reuse the memory of the first."""
    content = _file(N_TENSORS)
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": [2, 2]}}
    with services.running(tmp_path / "data", command="api") as service:
        answers: list[int] = []

        def post() -> None:
            answers.append(
                service.post("/v1/checkpoints", {"name": "n", "architecture": architecture}, content).status_code
            )

        service.post("/v1/checkpoints", {"name": "n", "architecture": architecture}, _file(1))
        before = _peak_kib(service)
        post()
        of_one = _peak_kib(service) - before
        threads = [threading.Thread(target=post) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [201] * 7
        assert of_one > 10_000
        # Six in memory at once would be five times as much again; each also stages and buffers its own bytes.
        assert _peak_kib(service) - before < 2 * of_one + 6 * len(content) // 1024


def test_who_would_wait_for_long_is_told(tmp_path: Path) -> None:
    """Uploads beyond the few that may wait are refused at once; a small header never waits."""
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(_file(5_000))
    small.write_bytes(_file(1))
    refused, done = [], threading.Event()

    def wait() -> None:
        try:
            with tensorfile.in_turn(large):
                pass
        except Unavailable as error:
            refused.append(error)

    threads = [threading.Thread(target=wait) for _ in range(tensorfile._MOST_WAITING + 3)]
    with tensorfile.in_turn(large):
        for thread in threads:
            thread.start()
        end = time.monotonic() + 20
        while len(refused) < 3 and time.monotonic() < end:
            done.wait(0.01)
        with tensorfile.in_turn(small):
            pass
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    with tensorfile.in_turn(large):
        pass


@pytest.mark.parametrize("content", [b"", b"x", b"\x00" * 9])
def test_what_is_no_safetensors_waits_for_nothing(content: bytes, tmp_path: Path) -> None:
    """A file that is not safetensors never waits, however short it is."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with tensorfile.in_turn(path):
        pass

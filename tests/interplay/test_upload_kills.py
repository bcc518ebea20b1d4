"""Clients and services that are killed while a large file goes up: it arrives as it is, and little is sent twice."""

import hashlib
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests import services
from tests.campaigns import campaign
from tests.services import Service

_MEBIBYTE = 2**20
_PATIENCE_SECONDS = 60.0
# Pushes a file as anybody would, and writes down how much it has handed to its connection, in memory that outlives it.
_CLIENT = """
import mmap, struct, sys
from interplay import Client, resumable
url, path, counter, least = sys.argv[1:]
resumable.LEAST_BYTES = int(least)
with open(counter, "r+b") as file:
    shared = mmap.mmap(file.fileno(), 16)
sent, last = 0, None
def count(done, size):
    global sent, last
    sent += max(done - (done if last is None else last), 0)
    last = done
    shared[:16] = struct.pack("<qq", sent, done)
with Client(url, retry_seconds=120) as client:
    print(client.push_feature_set(path, name="killed", on_progress=count)["sha256"], flush=True)
"""


def write_features(path: Path, size_bytes: int) -> None:
    """Write a feature set of about this size, of 520 bytes a row."""
    rows, dim = size_bytes // 520, 128
    ends = [rows * dim * 4, rows * (dim * 4 + 8), rows * (dim * 4 + 8) + 4 * dim * 4]
    tensors = {
        "features": {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, ends[0]]},
        "labels": {"dtype": "I64", "shape": [rows], "data_offsets": [ends[0], ends[1]]},
        "head": {"dtype": "F32", "shape": [4, dim], "data_offsets": [ends[1], ends[2]]},
    }
    header = json.dumps(tensors).encode()
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, rows, 2**16):
            values = generator.standard_normal((min(2**16, rows - start), dim), np.float32)
            file.write(values.tobytes())
        file.write((np.arange(rows) % 4).astype("<i8").tobytes())
        file.write(generator.standard_normal((4, dim), np.float32).tobytes())


class Campaign:
    """A service and a client that sends it one file; both can be killed and are started again.

    Attributes:
        kills: how often each was killed.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self._folder, self._file = folder, file
        self._size_bytes = file.stat().st_size
        self._services = ExitStack()
        self._port = 0
        self._counters: list[Path] = []
        self.kills = {"client": 0, "service": 0}
        self.service = self._start_service()
        self._client = self._start_client()

    def _start_service(self) -> Service:
        service = self._services.enter_context(
            services.running(self._folder / "data", command="api", port=self._port, tables=self._port == 0)
        )
        self._port = urlsplit(service.url).port or 0
        return service

    def _start_client(self) -> "subprocess.Popen[str]":
        counter = self._folder / f"sent-{len(self._counters)}"
        counter.write_bytes(bytes(16))
        self._counters.append(counter)
        arguments = [self.service.url, str(self._file), str(counter), str(_MEBIBYTE)]
        return subprocess.Popen(
            [sys.executable, "-c", _CLIENT, *arguments],
            env={**os.environ, "XDG_CACHE_HOME": str(self._folder / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _counted(self) -> list[tuple[int, int]]:
        return [struct.unpack("<qq", counter.read_bytes()) for counter in self._counters]

    @property
    def sent_bytes(self) -> int:
        """All bytes that clients have handed to their connections."""
        return sum(sent for sent, _ in self._counted())

    def wait_for(self, offset_bytes: int) -> None:
        """Wait until the present client has come so far, or has ended."""
        with self._counters[-1].open("rb") as file, mmap.mmap(file.fileno(), 16, prot=mmap.PROT_READ) as shared:
            deadline = time.monotonic() + 3 * _PATIENCE_SECONDS
            while struct.unpack("<qq", shared[:16])[1] < offset_bytes and self._client.poll() is None:
                assert time.monotonic() < deadline, "the client does not come on"
                time.sleep(0.0005)

    def kill_client(self) -> None:
        """Kill -9 the client, and start another one of the same file."""
        self._client.kill()
        self._client.communicate()
        self.kills["client"] += 1
        self._client = self._start_client()

    def kill_service(self) -> None:
        """Kill -9 the service, and start it again at the same port."""
        self.service.process.kill()
        self.service.process.wait()
        self._services.close()
        self.kills["service"] += 1
        self.service = self._start_service()

    def finish(self) -> str:
        """Wait until the client has ended; return the sha256 that the service told it."""
        out, err = self._client.communicate(timeout=5 * _PATIENCE_SECONDS)
        assert self._client.returncode == 0, err
        return out.strip()

    def close(self) -> None:
        """End both."""
        self._client.kill()
        self._client.communicate()
        self._services.close()


@contextmanager
def campaign_of(folder: Path, size_bytes: int) -> Iterator[tuple[Campaign, Path]]:
    """Yield a campaign that has begun to send a new file, and that file."""
    file = folder / "features.safetensors"
    write_features(file, size_bytes)
    campaign = Campaign(folder, file)
    try:
        yield campaign, file
    finally:
        campaign.close()


def killed_at_random(folder: Path, size_bytes: int, n_kills: int, seed: int, say: Callable[[str], None]) -> None:
    """Kill one side at so many random moments of an upload, and check what arrived and what that cost."""
    moments = random.Random(seed)
    began = time.monotonic()
    with campaign_of(folder, size_bytes) as (campaign, file):
        expected = hashlib.sha256(file.read_bytes()).hexdigest()
        for moment in sorted(moments.uniform(0, 0.99) for _ in range(n_kills)):
            campaign.wait_for(int(moment * file.stat().st_size))
            time.sleep(moments.uniform(0, 0.03))
            kill = moments.choice([campaign.kill_client, campaign.kill_service])
            kill()
        assert campaign.finish() == expected
        stored = campaign.service.data_dir / "blobs" / expected[:2] / expected
        assert hashlib.sha256(stored.read_bytes()).hexdigest() == expected
        twice = campaign.sent_bytes - file.stat().st_size
        say(
            f"{campaign.kills} of {n_kills}, {twice:,} of {file.stat().st_size:,} bytes sent twice "
            f"({twice / file.stat().st_size:.2%}), {time.monotonic() - began:.0f} s"
        )
        assert sum(campaign.kills.values()) == n_kills
        assert 0 <= twice <= 0.02 * file.stat().st_size
        assert len(campaign.service.client.get("/v1/feature-sets").json()["items"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kills", campaign([4, 10], often=[4]))
def test_killed_some_times(tmp_path: Path, kills: int) -> None:
    """Kill -9 of client or service at random moments of 100 MiB: the right file, and at most 2 % sent twice."""
    killed_at_random(tmp_path, 100 * _MEBIBYTE, kills, 0, print)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1])
def test_killed_a_hundred_times(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Kill -9 of client or service at 100 random moments of 1 GiB: the right file, and at most 2 % sent twice."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    killed_at_random(tmp_path, 1024 * _MEBIBYTE, 100, seed, say)

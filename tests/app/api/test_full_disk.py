"""A disk that is really full: a small file system in memory, which this test mounts and unmounts."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests import services
from tests.services import Service

_MEBIBYTE = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "interplay-test", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a disk that is full needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _features(mebibytes: float) -> bytes:
    rows = int(mebibytes * _MEBIBYTE) // (64 * 4)
    values = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
    return save({"features": values, "labels": np.arange(rows) % 4, "head": values[:4].copy()})


def _left(disk: Path) -> list[str]:
    return [path.name for path in (disk / "data" / "blobs").rglob("*.part")]


def _fill(disk: Path) -> Path:
    """Fill the remaining space with a file that the service did not write."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (_MEBIBYTE, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def test_uploads_and_rows_that_find_no_room_are_507(small_disk: Path) -> None:
    """Uploads and rows without space are 507 and leave nothing; reads go on, and writes once there is space again."""
    with services.running(small_disk / "data", command="api") as service:
        small, large = _features(1), _features(20)
        first = service.post("/v1/feature-sets", {"name": "first"}, small)
        assert first.status_code == 201, first.text
        _requires_507(service, large)
        assert _left(small_disk) == []
        # A file that nearly fits.
        _requires_507(service, _features(14))
        assert _left(small_disk) == []

        filler = _fill(small_disk)
        # The smaller one stays in a buffer until it is flushed.
        for mebibytes in (2, 0.005):
            _requires_507(service, _features(mebibytes))
        listed = service.client.get("/v1/feature-sets")
        assert [item["name"] for item in listed.json()["items"]] == ["first"]
        filler.unlink()
        assert service.post("/v1/feature-sets", {"name": "second"}, _features(2)).status_code == 201
        assert [path.name for path in small_disk.iterdir()] == ["data"]


def _requires_507(service: Service, file: bytes) -> None:
    answer = service.post("/v1/feature-sets", {"name": "none"}, file)
    assert answer.status_code == 507, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:interplay:problem:insufficient-storage"
    assert "Retry-After" not in answer.headers

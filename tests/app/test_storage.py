"""Blobs in a local folder and in an object store."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import obstore
import pytest

from app.settings import Settings
from app.storage import Storage

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage; the remote one speaks to its store as to a bucket, which lives in memory."""
    return Storage(Settings(data_dir=tmp_path, storage_url="memory:///" if request.param == "remote" else ""))


def test_blob_is_kept_under_its_hash(storage: Storage) -> None:
    """What was staged can be read under its sha256, as often as wanted, until it is deleted."""
    assert not storage.has(SHA256)
    for _ in range(2):
        with storage.stage() as staged:
            for start in range(0, len(CONTENT), 1_000_000):
                staged.write(CONTENT[start : start + 1_000_000])
            assert staged.sha256 == SHA256
            storage.put(staged)
        assert not staged.path.exists()
    for _ in range(2):
        with storage.local_copy(SHA256) as path:
            assert path.read_bytes() == CONTENT
    assert list(storage.blobs_older_than(-60)) == [SHA256]
    assert list(storage.blobs_older_than(60)) == []
    storage.check()
    storage.delete(SHA256)
    storage.delete(SHA256)
    assert not storage.has(SHA256)


def test_missing_blob_is_an_error(storage: Storage) -> None:
    """A blob that does not exist cannot be read."""
    with pytest.raises(FileNotFoundError), storage.local_copy(SHA256):
        pass


def test_other_bytes_under_a_hash_are_not_taken_for_the_blob(tmp_path: Path) -> None:
    """A store that answers with other bytes is not believed, and nothing of it stays in the cache."""
    storage = Storage(Settings(data_dir=tmp_path, storage_url="memory:///"))
    obstore.put(storage._store, f"{SHA256[:2]}/{SHA256}", b"something else")
    with pytest.raises(FileNotFoundError, match="other bytes"), storage.local_copy(SHA256):
        pass
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_upload_that_is_not_put_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    """A staged file that nobody keeps is gone at the end of its block."""
    with storage.stage() as staged:
        staged.write(CONTENT)
        assert staged.path.exists()
    assert not any(path.is_file() for path in tmp_path.rglob("*.part"))


def test_only_abandoned_files_are_swept(tmp_path: Path) -> None:
    """The sweep takes the staged file of a process that was killed and leaves that of a running one."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from app.storage import Storage; from app.settings import Settings\n"
        "staged = Storage(Settings(data_dir=Path(sys.argv[1]))).stage(); print(staged.path, flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        storage = Storage(Settings(data_dir=tmp_path))
        with storage.stage() as running:
            assert storage.remove_abandoned() == 0
            process.kill()
            process.wait()
            time.sleep(0.1)
            assert storage.remove_abandoned() == 1
            assert running.path.exists()
            assert not left.exists()

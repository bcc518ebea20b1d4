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
from app.storage import BlobDamaged, Storage

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return an empty storage; the remote one uses an in-memory store in place of a bucket."""
    return Storage(Settings(data_dir=tmp_path, storage_url="memory:///" if request.param == "remote" else ""))


def test_blob_is_kept_under_its_hash(storage: Storage) -> None:
    """A staged blob can be read under its sha256 repeatedly until it is deleted."""
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
    """Reading a missing blob is an error."""
    with pytest.raises(FileNotFoundError), storage.local_copy(SHA256):
        pass


def test_other_bytes_under_a_hash_are_not_taken_for_the_blob(tmp_path: Path) -> None:
    """Other bytes from a store are refused, and nothing of them stays in the cache."""
    storage = Storage(Settings(data_dir=tmp_path, storage_url="memory:///"))
    obstore.put(storage._store, f"{SHA256[:2]}/{SHA256}", b"something else")
    with pytest.raises(BlobDamaged, match=SHA256), storage.local_copy(SHA256):
        pass
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def _put(storage: Storage, content: bytes) -> str:
    with storage.stage() as staged:
        staged.write(content)
        storage.put(staged)
        return staged.sha256


def _damage(path: Path, *, quietly: bool) -> None:
    """Flip one bit without a change of the file's time, as a disk may."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    if quietly:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("quietly", [False, True])
def test_a_turned_bit_is_found_at_first_use(storage: Storage, tmp_path: Path, quietly: bool) -> None:
    """A flipped bit is found at first use, also in a machine's cache; the same file, sent again, replaces it."""
    _put(storage, CONTENT)
    with storage.local_copy(SHA256) as path:
        _damage(path, quietly=quietly)
    # Another process: the one that fetched the file has hashed it.
    other = Storage(Settings(data_dir=tmp_path, storage_url="")) if storage._folder else storage
    other._verified.clear()
    with pytest.raises(BlobDamaged) as caught, other.verified_copy(SHA256):
        pass
    assert caught.value.found != SHA256
    _put(storage, CONTENT)
    for _ in range(2):
        with storage.verified_copy(SHA256) as path:
            assert path.read_bytes() == CONTENT


def test_a_file_is_hashed_again_once_it_was_written(storage: Storage) -> None:
    """A process verifies a file once, and again only if the file has changed."""
    _put(storage, CONTENT)
    with storage.verified_copy(SHA256) as path:
        verified = dict(storage._verified)
    with storage.verified_copy(SHA256):
        assert storage._verified == verified
    _damage(path, quietly=False)
    with pytest.raises(BlobDamaged), storage.verified_copy(SHA256):
        pass


def test_what_lies_in_the_store_can_be_hashed_and_set_aside(storage: Storage) -> None:
    """The hash is of the present bytes; a file set aside is no longer a blob, and can be uploaded again."""
    _put(storage, CONTENT)
    assert storage.sha256_of(SHA256) == SHA256
    obstore.put(storage._store, f"{SHA256[:2]}/{SHA256}", CONTENT[:-1])
    assert storage.sha256_of(SHA256) == hashlib.sha256(CONTENT[:-1]).hexdigest()
    assert obstore.get(storage._store, storage.set_aside(SHA256)).bytes() == CONTENT[:-1]
    assert not storage.has(SHA256)
    with pytest.raises(FileNotFoundError):
        storage.sha256_of(SHA256)
    _put(storage, CONTENT)
    assert storage.sha256_of(SHA256) == SHA256


def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    """Beyond its limit the cache drops the least recently used blob, and never one being read."""
    storage = Storage(Settings(data_dir=tmp_path, storage_url="memory:///", cache_bytes=3_000))
    first, second, third, fourth = (_put(storage, bytes([number]) * 1_000) for number in range(4))

    def cached() -> set[str]:
        return {path.name for path in (tmp_path / "cache").glob("??/*")}

    for sha256 in (first, second, third):
        with storage.local_copy(sha256):
            pass
    assert cached() == {first, second, third}
    with storage.local_copy(first), storage.local_copy(fourth):
        # The second was used before all others.
        assert cached() == {first, third, fourth}
    small = Storage(Settings(data_dir=tmp_path, storage_url="memory:///", cache_bytes=0))
    small._store = storage._store
    with storage.local_copy(first) as path, small.local_copy(third):
        assert {first, third} <= cached()
        assert path.read_bytes() == bytes(1_000)


def test_upload_that_is_not_put_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    """A staged file that is not stored is gone at the end of its block."""
    with storage.stage() as staged:
        staged.write(CONTENT)
        assert staged.path.exists()
    assert not any(path.is_file() for path in tmp_path.rglob("*.part"))


def test_only_abandoned_files_are_swept(tmp_path: Path) -> None:
    """The sweep removes a killed process's staged file and keeps that of a running one."""
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

"""Blobs in a local folder and in an object store."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import obstore
import pytest

from app.settings import Settings
from app.storage import BlobDamaged, Storage, StorageUnavailable
from tests.buckets import BucketServer, bucket_server

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def bucket(s3: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings of a storage with nothing in it, in a bucket."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Settings(data_dir=tmp_path, storage_url=s3.fresh_url())


@pytest.fixture(params=["local", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return an empty storage: a folder, and a bucket of an S3 server."""
    if request.param == "local":
        return Storage(Settings(data_dir=tmp_path, storage_url=""))
    return Storage(request.getfixturevalue("bucket"))


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


def test_other_bytes_under_a_hash_are_not_taken_for_the_blob(bucket: Settings, tmp_path: Path) -> None:
    """Other bytes from a store are refused, and nothing of them stays in the cache."""
    storage = Storage(bucket)
    obstore.put(storage.store, f"{SHA256[:2]}/{SHA256}", b"something else")
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
    obstore.put(storage.store, f"{SHA256[:2]}/{SHA256}", CONTENT[:-1])
    assert storage.sha256_of(SHA256) == hashlib.sha256(CONTENT[:-1]).hexdigest()
    assert obstore.get(storage.store, storage.set_aside(SHA256)).bytes() == CONTENT[:-1]
    assert not storage.has(SHA256)
    with pytest.raises(FileNotFoundError):
        storage.sha256_of(SHA256)
    _put(storage, CONTENT)
    assert storage.sha256_of(SHA256) == SHA256


def test_the_cache_keeps_what_was_used_last(bucket: Settings, tmp_path: Path) -> None:
    """Beyond its limit the cache drops the least recently used blob, and never one being read."""
    storage = Storage(bucket.model_copy(update={"cache_bytes": 3_000}))
    first, second, third, fourth = (_put(storage, bytes([number]) * 1_000) for number in range(4))

    def cached() -> set[str]:
        return {path.name for path in (tmp_path / "cache").glob("??/*")}

    for sha256 in (first, second, third):
        with storage.local_copy(sha256):
            pass
    assert cached() == {first, second, third}
    assert storage.cached_bytes() == 3_000
    with storage.local_copy(first), storage.local_copy(fourth):
        # The second was used before all others.
        assert cached() == {first, third, fourth}
    small = Storage(bucket.model_copy(update={"cache_bytes": 0}))
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


def test_large_blob_goes_in_parts(bucket: Settings) -> None:
    """A file of many parts arrives as it is; another machine fetches it once, and reads its own copy afterwards."""
    content = os.urandom(40_000_000)
    storage = Storage(bucket)
    sha256 = _put(storage, content)
    assert storage.is_near(sha256) is False
    with storage.verified_copy(sha256) as path:
        assert path.read_bytes() == content
    assert storage.is_near(sha256)
    other = Storage(bucket.model_copy(update={"data_dir": bucket.data_dir / "other"}))
    with other.local_copy(sha256) as path:
        assert path.read_bytes() == content
    storage.delete(sha256)
    assert not other.has(sha256)
    with other.local_copy(sha256) as path:
        assert path.stat().st_size == len(content)


def test_features_are_kept_and_listed(storage: Storage) -> None:
    """Kept features are read, listed with their size and origins, and deleted."""
    name = f"{'a' * 64}-{'b' * 64}-c"
    for content in (b"first", b"first"):
        with storage.stage() as staged:
            staged.write(content)
            storage.put_features(name, staged)
    with storage.features(name) as path:
        assert path.read_bytes() == b"first"
    assert [storage.features_part(name, *part) for part in ((0, 2), (1, 4), (0, 5))] == [b"fi", b"irs", b"first"]
    with pytest.raises(FileNotFoundError):
        storage.features_part("other", 0, 1)
    (entry,) = storage.list_features()
    assert (entry.name, entry.size_bytes, entry.origins) == (name, 5, {"a" * 64, "b" * 64})
    assert (entry.entry, replace(entry, name=f"{name}.592").entry) == (name, name)
    assert list(storage.blobs_older_than(-60)) == []
    storage.delete_features(name)
    storage.delete_features(name)
    assert storage.list_features() == []


def test_list_of_many_pages(bucket: Settings) -> None:
    """More blobs than a bucket lists in one answer are all listed."""
    storage = Storage(bucket)
    names = {hashlib.sha256(str(index).encode()).hexdigest() for index in range(1100)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: obstore.put(storage.store, f"{name[:2]}/{name}", b""), names))
    assert set(storage.blobs_older_than(-60)) == names


@pytest.mark.slow
def test_bucket_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server is down every call ends within its deadline; once it is back, nothing is missing."""
    with bucket_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        settings = Settings(data_dir=tmp_path, storage_url=server.fresh_url())
        storage = Storage(settings)
        kept = [_put(storage, os.urandom(6_000_000)) for _ in range(3)]
        server.kill()
        calls: list[Callable[[], object]] = [
            lambda: storage.has(kept[0]),
            lambda: _put(storage, CONTENT),
            lambda: storage.sha256_of(kept[0]),
            lambda: storage.delete(kept[0]),
            lambda: list(storage.blobs_older_than(0)),
            storage.list_features,
            storage.check,
        ]
        for call in calls:
            started = time.monotonic()
            with pytest.raises(StorageUnavailable):
                call()
            # Nobody listens, so its three retries are quick; the rest is for a machine that is busy with other tests.
            assert time.monotonic() - started < 20
        assert not any(path.suffix == ".part" for path in tmp_path.rglob("*"))
        server.start()
        for sha256 in kept:
            assert storage.sha256_of(sha256) == sha256
        assert _put(storage, CONTENT) == SHA256
        assert set(storage.blobs_older_than(-60)) == {*kept, SHA256}


def test_server_wants_its_key(s3: BucketServer) -> None:
    """The server of these tests is a real one in that it refuses who has no key."""
    assert httpx.get(f"{s3.environment['AWS_ENDPOINT_URL']}/interplay/there").status_code == 403

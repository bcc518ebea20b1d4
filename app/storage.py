"""Blobs: files named by their sha256, in a local folder or an object store.

An upload is staged in a local file and hashed while it streams, so a crash leaves no half blob under a final name.
A local store gets the staged file by rename, with the file and its folder synced; a remote one by one atomic put.
"""

import errno
import fcntl
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import obstore
import obstore.exceptions
from obstore.store import LocalStore, ObjectStore, from_url

from app.settings import Settings

# Where workers keep features, beside the blobs.
_FEATURES = "features"
# Bytes of a staged file after which the kernel is asked to start writing them.
_WRITEBACK_BYTES = 2**24
_MOST_TURNS = 20
# How long a call waits for its turn while no other call ends.
_STALLED_SECONDS = 1.0
# Parts of a large file that are sent to a remote store at a time, each within the store's timeout.
_PARTS = 4
# Prefixes of the environment variables that obstore reads for a store, and the options of its HTTP client.
_ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "read_timeout",
    "root_certificate",
    "timeout",
    "user_agent",
)


class StorageUnavailable(Exception):
    """The store, or the disk that uploads are staged on, failed a read or a write."""


class StorageFull(StorageUnavailable):
    """No room is left where files are stored or staged: a retry will not help."""


class BlobDamaged(Exception):
    """A blob's bytes do not match its name.

    Attributes:
        sha256: the blob's name.
        found: the sha256 of the stored bytes.
    """

    def __init__(self, sha256: str, found: str) -> None:
        super().__init__(f"blob {sha256} has bytes of the sha256 {found}")
        self.sha256, self.found = sha256, found


class _Turns:
    """Limits the storage to half of the threads that routes run in (40); if it does not answer, the others stay free.

    A further caller waits only while turns end.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._taken = 0
        self._ended_at = -math.inf
        self._holder = threading.local()

    def __enter__(self) -> None:
        # Reentrant: the holder of a turn may call functions that take one.
        self._holder.depth = getattr(self._holder, "depth", 0) + 1
        if self._holder.depth > 1:
            return
        with self._free:
            while self._taken >= _MOST_TURNS:
                if not self._free.wait(_STALLED_SECONDS) and time.monotonic() - self._ended_at > _STALLED_SECONDS:
                    self._holder.depth -= 1
                    raise StorageUnavailable(f"{_MOST_TURNS} calls wait for it already")
            self._taken += 1

    def __exit__(self, *_: object) -> None:
        self._holder.depth -= 1
        if self._holder.depth == 0:
            with self._free:
                self._taken -= 1
                self._ended_at = time.monotonic()
                self._free.notify()


_turns = _Turns()


@contextmanager
def _reaching_storage() -> Iterator[None]:
    """Map failures of the disk and the store to StorageUnavailable; a missing blob stays FileNotFoundError."""
    try:
        with _turns:
            yield
    except FileNotFoundError:
        raise
    except (OSError, obstore.exceptions.BaseError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(os.strerror(error.errno)) from error
        raise StorageUnavailable(f"{type(error).__name__}: {error}") from error


class StagedFile:
    """A file being written, removed at the end of its `with` block unless the storage took it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.size_bytes = 0
        self._writing_bytes = 0
        self._hash = hashlib.sha256()
        while True:
            self.path = folder / f"{uuid4()}.part"
            self._file = self.path.open("wb")
            # Locked while this process lives, so that `remove_abandoned` can tell a crashed upload from a running one.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if os.fstat(self._file.fileno()).st_nlink:
                break
            self._file.close()  # removed by another process between its creation and the lock

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append to the file and to its hash."""
        with _reaching_storage():
            self._file.write(data)
            self.size_bytes += len(data)
            if self.size_bytes - self._writing_bytes >= _WRITEBACK_BYTES:
                self._file.flush()
                self._start_writeback()
        # Outside of the turn: hashing does not use the storage.
        self._hash.update(data)

    def _start_writeback(self) -> None:
        """Make the kernel start writing the data without waiting for it, so that `sync` has little left to do."""
        length = self.size_bytes - self._writing_bytes
        # Advice only: where the system or the file system lacks it, `sync` takes longer.
        with suppress(AttributeError, OSError):
            os.posix_fadvise(self._file.fileno(), self._writing_bytes, length, os.POSIX_FADV_DONTNEED)
        self._writing_bytes = self.size_bytes

    def flush(self) -> None:
        """Flush the written data, so that it can be read at `path`."""
        with _reaching_storage():
            self._file.flush()

    def sync(self) -> None:
        """Write everything so far to the disk before returning."""
        with _reaching_storage():
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "StagedFile":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)
        # On a full disk `close` tries to write the rest once more and fails; the file is gone anyway.
        with suppress(OSError):
            self._file.close()


@dataclass(frozen=True)
class Upload:
    """A complete form: the text of `spec` and the staged `file`, if one was sent."""

    spec: bytes
    file: StagedFile | None


@dataclass(frozen=True)
class StoredFeatures:
    """Features that workers keep; the name begins with the sha256 of a checkpoint and of a probe's data.

    If a probe's data have no sha256 yet, it is that of its file.
    """

    name: str
    size_bytes: int
    stored_at: datetime

    @property
    def origins(self) -> set[str]:
        return set(self.name.split("-")[:2])


class Storage:
    """The store of blobs. The database's `blobs` rows say which of them exist; this class only moves bytes."""

    def __init__(self, settings: Settings) -> None:
        self._staging = settings.data_dir / "staging"
        self._cache = settings.data_dir / "cache"
        url = urlsplit(settings.effective_storage_url)
        self._cache_bytes = settings.cache_bytes
        # Files hashed by this process, with their state then: a file that has changed since is hashed again.
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._folder: Path | None = None
        self._store: ObjectStore
        if url.scheme == "file":
            self._folder = Path(unquote(url.path))
            # Stage beside the blobs: a rename is atomic only within one file system.
            self._staging = self._folder / "staging"
            self._store = LocalStore(prefix=self._folder, mkdir=True)
        else:
            self._store = _remote_store(settings)

    def stage(self) -> StagedFile:
        with _reaching_storage():
            return StagedFile(self._staging)

    def put(self, staged: StagedFile) -> None:
        """Give the staged file its final name, replacing an existing file: the same bytes, unless damaged."""
        with _reaching_storage():
            self._put(staged)

    def _put(self, staged: StagedFile) -> None:
        staged.sync()
        sha256 = staged.sha256
        if self._folder is None:
            # Overwrite an existing blob: it may be damaged.
            with staged.path.open("rb") as file:
                obstore.put(self._store, _key(sha256), file, max_concurrency=_PARTS)
            return
        final = self._folder / _key(sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        # A link, because `staged` still removes its own name at the end of its block: the file always has an owner. It
        # replaces an existing file, which has the same bytes unless the disk has damaged them.
        linked = staged.path.with_suffix(".whole")
        os.link(staged.path, linked)
        linked.replace(final)
        _sync_folder(final.parent)
        _sync_folder(final.parent.parent)

    def has(self, sha256: str) -> bool:
        try:
            with _reaching_storage():
                obstore.head(self._store, _key(sha256))
        except FileNotFoundError:
            return False
        return True

    def is_near(self, sha256: str) -> bool:
        """Return whether `local_copy` yields a blob without fetching it from a remote store."""
        return self._folder is not None or (self._cache / _key(sha256)).is_file()

    def delete(self, sha256: str) -> None:
        with suppress(FileNotFoundError), _reaching_storage():
            obstore.delete(self._store, _key(sha256))

    @contextmanager
    def local_copy(self, sha256: str) -> Iterator[Path]:
        """Yield a path at which the blob can be read during the block.

        A blob of a remote store is fetched once and kept in the cache folder. Above `cache_bytes` the least recently
        used blobs are removed.

        Raises:
            FileNotFoundError: the blob does not exist.
            BlobDamaged: the store returned other bytes.
            StorageUnavailable: the store does not answer.
        """
        if self._folder is not None:
            path = self._folder / _key(sha256)
            if not path.is_file():
                raise FileNotFoundError(sha256)
            yield path
            return
        path = self._cache / _key(sha256)
        with _reaching_storage():
            held = self._hold_cached(path)
            while held is None:
                self._fetch(sha256, path)
                held = self._hold_cached(path)
        with held:
            self._trim_cache()
            yield path

    @contextmanager
    def verified_copy(self, sha256: str) -> Iterator[Path]:
        """Yield the `local_copy` of a blob whose bytes this process has hashed since the file was last written.

        Raises:
            BlobDamaged: the bytes differ; nothing may be computed from them.
        """
        with self.local_copy(sha256) as path:
            with _reaching_storage():
                self._verify(sha256, path)
            yield path

    def _verify(self, sha256: str, path: Path) -> None:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            state = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._verified.get(sha256) == state:
                return
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            if self._folder is None:
                # Only a cached copy: the next attempt fetches it again.
                path.unlink(missing_ok=True)
            raise BlobDamaged(sha256, found)
        self._verified[sha256] = state

    def _hold_cached(self, path: Path) -> BinaryIO | None:
        """Open a cached file, which is not removed while it is open; return None if it is missing."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:
            file.close()  # removed between its opening and the lock
            return None
        # Record the last use, which decides what is removed first. Keep the modification time: `_verify` compares it.
        os.utime(path, ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
        return file

    def _fetch(self, sha256: str, cached: Path) -> None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with StagedFile(self._staging) as staged:
            for chunk in obstore.get(self._store, _key(sha256)).stream(min_chunk_size=8 * 2**20):
                staged.write(bytes(chunk))
            staged.sync()
            if staged.sha256 != sha256:
                raise BlobDamaged(sha256, staged.sha256)
            with suppress(FileExistsError):
                os.link(staged.path, cached)
            status = cached.stat()
            self._verified[sha256] = (status.st_ino, status.st_mtime_ns, status.st_size)

    def _trim_cache(self) -> None:
        """Remove cached blobs that are not being read, the least recently used first, down to `cache_bytes`."""
        entries = []
        for path in self._cache.glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_atime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in entries) - self._cache_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                excess -= size

    def sha256_of(self, sha256: str) -> str:
        """Return the sha256 of the bytes now stored under a blob's name, read from the store and not from the cache.

        Raises:
            FileNotFoundError: the blob does not exist.
            StorageUnavailable: the store does not answer.
        """
        digest = hashlib.sha256()
        with _reaching_storage():
            for chunk in obstore.get(self._store, _key(sha256)).stream(min_chunk_size=8 * 2**20):
                digest.update(chunk)
        return digest.hexdigest()

    def set_aside(self, sha256: str) -> str:
        """Move a blob to a key that is never read, so that the same file can be sent again; return that key."""
        aside = f"damaged/{sha256}"
        with _reaching_storage():
            obstore.rename(self._store, _key(sha256), aside)
        return aside

    def put_features(self, name: str, staged: StagedFile) -> None:
        """Keep features under a name, atomically; local features that exist already stay."""
        with _reaching_storage():
            staged.flush()
            if self._folder is None:
                with staged.path.open("rb") as file:
                    obstore.put(self._store, f"{_FEATURES}/{name}", file, max_concurrency=_PARTS)
                return
            final = self._folder / _FEATURES / name
            final.parent.mkdir(exist_ok=True)
            staged.sync()
            with suppress(FileExistsError):
                os.link(staged.path, final)

    @contextmanager
    def features(self, name: str) -> Iterator[Path]:
        """Yield a path at which kept features can be read during the block.

        Raises:
            FileNotFoundError: no features of this name exist.
        """
        if self._folder is not None:
            yield self._folder / _FEATURES / name
            return
        with self.stage() as staged:
            with _reaching_storage():
                for chunk in obstore.get(self._store, f"{_FEATURES}/{name}").stream(min_chunk_size=8 * 2**20):
                    staged.write(bytes(chunk))
                staged.flush()
            yield staged.path

    def list_features(self) -> list[StoredFeatures]:
        """Return all kept features."""
        with _reaching_storage():
            return [
                StoredFeatures(entry["path"].rpartition("/")[2], entry["size"], entry["last_modified"])
                for entries in obstore.list(self._store, prefix=_FEATURES)
                for entry in entries
            ]

    def delete_features(self, name: str) -> None:
        with suppress(FileNotFoundError), _reaching_storage():
            obstore.delete(self._store, f"{_FEATURES}/{name}")

    def blobs_older_than(self, seconds: float) -> Iterator[str]:
        """Yield the sha256 of every stored blob older than `seconds`."""
        limit = datetime.now(UTC) - timedelta(seconds=seconds)
        with _reaching_storage():
            for entries in obstore.list(self._store):
                for entry in entries:
                    sha256 = entry["path"].rpartition("/")[2]
                    if entry["path"] == _key(sha256) and entry["last_modified"] < limit:
                        yield sha256

    def check(self) -> None:
        """Raise StorageUnavailable if blobs could not be stored now."""
        with _reaching_storage():
            self._staging.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._staging).free < 2**20:
                raise StorageUnavailable("less than 1 MiB is free where uploads are staged")
        self.has("0" * 64)

    def remove_abandoned(self) -> int:
        """Remove files left by uploads whose process died; return the number of files."""
        removed = 0
        for path in (*self._staging.glob("*.part"), *self._staging.glob("*.whole")):
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def _remote_store(settings: Settings) -> ObjectStore:
    """Return the store of the configured URL. A large transfer may take long; silence may not."""
    url = urlsplit(settings.effective_storage_url)
    if url.scheme == "memory":
        return from_url(settings.effective_storage_url)
    silence = timedelta(seconds=settings.storage_timeout_seconds)
    options: Any = {"connect_timeout": min(silence, timedelta(seconds=5)), "read_timeout": silence, "timeout": "1 day"}
    # Options passed here replace all that the environment sets, so its values are passed as well.
    prefix = _ENVIRONMENT[url.scheme]
    for name in _CLIENT_OPTIONS:
        if (value := os.environ.get(f"{prefix}{name.upper()}")) is not None:
            options[name] = value
    retries: Any = {"max_retries": 3, "retry_timeout": silence}
    return from_url(settings.effective_storage_url, client_options=options, retry_config=retries)


def _key(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

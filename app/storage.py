"""Blobs: files named by their sha256, in a local folder or an object store.

An upload is staged in a local file and hashed while it streams, so a crash leaves no half blob under a final name.
A local store gets the staged file by rename, with the file and its folder synced; a remote one by one atomic put.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from app.environment import STORES
from app.settings import Settings
from app.staging import Hashed, PartialFile, StagedFile, StorageFull, StorageUnavailable, reaching_storage, sync_folder

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["BlobDamaged", "StagedFile", "Storage", "StorageFull", "StorageUnavailable", "StoredFeatures", "Upload"]

# Where workers keep features, beside the blobs.
_FEATURES = "features"
# How the files of resumable uploads end; `remove_abandoned` leaves them alone.
_PARTIAL = ".upload"
# How those of fetches end.
_FETCHED = ".fetch"
# Beside it lies what it is made of.
_PLAN = ".plan"
# Parts of a large file that are sent to a remote store at a time, each within the store's timeout.
_PARTS = 4
# Options of obstore's HTTP client.
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


class BlobDamaged(Exception):
    """A blob's bytes do not match its name.

    Attributes:
        sha256: the blob's name.
        found: the sha256 of the stored bytes.
    """

    def __init__(self, sha256: str, found: str) -> None:
        super().__init__(f"blob {sha256} has bytes of the sha256 {found}")
        self.sha256, self.found = sha256, found


@dataclass(frozen=True)
class Upload:
    """What a resource is made of: a complete form, or what was fetched in its place.

    Attributes:
        spec: the text of the form's `spec`.
        file: the staged file, if there is one.
        use: called with the resource's id in the transaction that makes it, to note that the file is used.
        origin: where the file was fetched from; None if it was sent.
        brought: members of the spec that came with the file, for those that the spec leaves out.
    """

    spec: bytes
    file: StagedFile | None
    use: "Callable[[Session, str], None] | None" = None
    origin: dict[str, Any] | None = None
    brought: Mapping[str, Any] = field(default_factory=dict)


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

    @property
    def entry(self) -> str:
        """The name of the pass whose features these are: a large one's lie in several files, each of some samples."""
        return self.name.partition(".")[0]


class Storage:
    """The store of blobs. The database's `blobs` rows say which of them exist; this class only moves bytes."""

    def __init__(self, settings: Settings) -> None:
        self._staging = settings.data_dir / "staging"
        self._cache = settings.data_dir / "cache"
        url = urlsplit(settings.effective_storage_url)
        self._cache_bytes = settings.cache_bytes
        #: Most bytes of kept features that stay once no analysis needs them.
        self.max_features_bytes = settings.max_features_bytes
        # Files hashed by this process, with their state then: a file that has changed since is hashed again.
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._hashed: dict[str, Hashed] = {}
        self._folder: Path | None = None
        self.store: ObjectStore
        if url.scheme == "file":
            self._folder = Path(unquote(url.path))
            # Stage beside the blobs: a rename is atomic only within one file system.
            self._staging = self._folder / "staging"
            self.store = LocalStore(prefix=self._folder, mkdir=True)
        else:
            self.store = _remote_store(settings)

    def stage(self) -> StagedFile:
        with reaching_storage():
            return StagedFile(self._staging)

    def partial(self, name: str, *, create: bool = False) -> PartialFile:
        """Open the file of a resumable upload and lock it.

        Raises:
            FileNotFoundError: it does not exist; not raised with `create`.
            BlockingIOError: another request or process has locked it.
        """
        with reaching_storage():
            path = self._partial_path(name)
            if not create or path.exists():
                return PartialFile(path, self._hashed, create=create)
            self._staging.mkdir(parents=True, exist_ok=True)
            file = PartialFile(path, self._hashed, create=True)
            sync_folder(self._staging)
            return file

    def partial_bytes(self, name: str) -> int | None:
        """Return the size of a resumable upload's file; None if there is none."""
        with reaching_storage(), suppress(FileNotFoundError):
            return self._partial_path(name).stat().st_size
        return None

    def remove_partial(self, name: str) -> None:
        """Remove the file of a resumable upload, if there is one; a request that writes to it notices at its end."""
        self._hashed.pop(name, None)
        with reaching_storage():
            self._partial_path(name).unlink(missing_ok=True)

    def partials(self) -> list[str]:
        """Return the names of all files of resumable uploads that lie here."""
        with reaching_storage():
            return [path.stem for path in self._staging.glob(f"*{_PARTIAL}")]

    def place(self) -> str:
        """Return the id of the folder of staged files: with a remote storage each machine has one of its own."""
        path = self._staging / "place"
        with reaching_storage():
            while True:
                with suppress(FileNotFoundError):
                    return path.read_text()
                self._staging.mkdir(parents=True, exist_ok=True)
                written = path.with_suffix(f".{uuid4()}")
                written.write_text(str(uuid4()))
                # A link, as another process may do the same.
                with suppress(FileExistsError):
                    os.link(written, path)
                written.unlink()

    def free_bytes(self) -> int:
        """Return the bytes that are free where files are staged."""
        with reaching_storage():
            self._staging.mkdir(parents=True, exist_ok=True)
            return shutil.disk_usage(self._staging).free

    def _partial_path(self, name: str) -> Path:
        return self._staging / f"{name}{_PARTIAL}"

    def fetched_path(self, name: str) -> Path:
        """Return where the file of a fetch is written; its folder exists."""
        with reaching_storage():
            self._staging.mkdir(parents=True, exist_ok=True)
        return self._staging / f"{name}{_FETCHED}"

    def fetched_names(self) -> list[str]:
        """Return the names of all fetches of which a file lies here."""
        with reaching_storage():
            return sorted({path.stem for suffix in (_FETCHED, _PLAN) for path in self._staging.glob(f"*{suffix}")})

    def put(self, staged: StagedFile) -> None:
        """Give the staged file its final name, replacing an existing file: the same bytes, unless damaged."""
        with reaching_storage():
            self._put(staged)

    def _put(self, staged: StagedFile) -> None:
        staged.sync()
        sha256 = staged.sha256
        if self._folder is None:
            # Overwrite an existing blob: it may be damaged.
            with staged.path.open("rb") as file:
                obstore.put(self.store, _key(sha256), file, max_concurrency=_PARTS)
            return
        final = self._folder / _key(sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        # A link, because `staged` still removes its own name at the end of its block: the file always has an owner. It
        # replaces an existing file, which has the same bytes unless the disk has damaged them.
        linked = staged.path.with_suffix(".whole")
        os.link(staged.path, linked)
        linked.replace(final)
        sync_folder(final.parent)
        sync_folder(final.parent.parent)

    def has(self, sha256: str) -> bool:
        try:
            with reaching_storage():
                obstore.head(self.store, _key(sha256))
        except FileNotFoundError:
            return False
        return True

    def is_near(self, sha256: str) -> bool:
        """Return whether `local_copy` yields a blob without fetching it from a remote store."""
        return self._folder is not None or (self._cache / _key(sha256)).is_file()

    def delete(self, sha256: str) -> None:
        with suppress(FileNotFoundError), reaching_storage():
            obstore.delete(self.store, _key(sha256))

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
        with reaching_storage():
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
            with reaching_storage():
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
            for chunk in obstore.get(self.store, _key(sha256)).stream(min_chunk_size=8 * 2**20):
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
        entries = [*self._cached()]
        excess = sum(size for _, size, _ in entries) - self._cache_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                excess -= size

    def _cached(self) -> Iterator[tuple[int, int, Path]]:
        """Yield the last use of each cached blob in nanoseconds, its bytes, and its path."""
        for path in self._cache.glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_atime_ns, status.st_size, path

    def cached_bytes(self) -> int:
        """Return the bytes of a remote store's blobs that this machine keeps; 0 where the storage is a folder."""
        if self._folder is not None:
            return 0
        with reaching_storage():
            return sum(size for _, size, _ in self._cached())

    def sha256_of(self, sha256: str) -> str:
        """Return the sha256 of the bytes now stored under a blob's name, read from the store and not from the cache.

        Raises:
            FileNotFoundError: the blob does not exist.
            StorageUnavailable: the store does not answer.
        """
        digest = hashlib.sha256()
        with reaching_storage():
            for chunk in obstore.get(self.store, _key(sha256)).stream(min_chunk_size=8 * 2**20):
                digest.update(chunk)
        return digest.hexdigest()

    def set_aside(self, sha256: str) -> str:
        """Move a blob to a key that is never read, so that the same file can be sent again; return that key."""
        aside = f"damaged/{sha256}"
        with reaching_storage():
            obstore.rename(self.store, _key(sha256), aside)
        return aside

    def put_features(self, name: str, staged: StagedFile) -> None:
        """Keep features under a name, atomically; local features that exist already stay."""
        with reaching_storage():
            staged.flush()
            if self._folder is None:
                with staged.path.open("rb") as file:
                    obstore.put(self.store, f"{_FEATURES}/{name}", file, max_concurrency=_PARTS)
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
            with reaching_storage():
                for chunk in obstore.get(self.store, f"{_FEATURES}/{name}").stream(min_chunk_size=8 * 2**20):
                    staged.write(bytes(chunk))
                staged.flush()
            yield staged.path

    def features_part(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of kept features from start up to stop, or up to their end.

        Raises:
            FileNotFoundError: no features of this name exist.
        """
        with reaching_storage():
            if self._folder is None:
                return bytes(obstore.get_range(self.store, f"{_FEATURES}/{name}", start=start, end=stop))
            with (self._folder / _FEATURES / name).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)

    def list_features(self) -> list[StoredFeatures]:
        """Return all kept features."""
        with reaching_storage():
            return [
                StoredFeatures(entry["path"].rpartition("/")[2], entry["size"], entry["last_modified"])
                for entries in obstore.list(self.store, prefix=_FEATURES)
                for entry in entries
            ]

    def delete_features(self, name: str) -> None:
        with suppress(FileNotFoundError), reaching_storage():
            obstore.delete(self.store, f"{_FEATURES}/{name}")

    def blobs_older_than(self, seconds: float) -> Iterator[str]:
        """Yield the sha256 of every stored blob older than `seconds`."""
        limit = datetime.now(UTC) - timedelta(seconds=seconds)
        with reaching_storage():
            for entries in obstore.list(self.store):
                for entry in entries:
                    sha256 = entry["path"].rpartition("/")[2]
                    if entry["path"] == _key(sha256) and entry["last_modified"] < limit:
                        yield sha256

    def check(self) -> None:
        """Raise StorageUnavailable if blobs could not be stored now."""
        with reaching_storage():
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
    if settings.effective_storage_url.startswith("memory:"):
        return from_url(settings.effective_storage_url)
    return open_store(settings.effective_storage_url, settings.storage_timeout_seconds)


def open_store(url: str, silence_seconds: float, *, signed: bool = True) -> ObjectStore:
    """Return the store of a URL, with the credentials in this process's environment.

    Args:
        url: s3://, gs:// or az://, with a prefix or without.
        silence_seconds: it may send nothing for so long; a large transfer may take longer.
        signed: whether requests carry credentials.
    """
    silence = timedelta(seconds=silence_seconds)
    options: Any = {"connect_timeout": min(silence, timedelta(seconds=5)), "read_timeout": silence, "timeout": "1 day"}
    # Options passed here replace all that the environment sets, so its values are passed as well.
    prefix = STORES[urlsplit(url).scheme]
    for name in _CLIENT_OPTIONS:
        if (value := os.environ.get(f"{prefix}{name.upper()}")) is not None:
            options[name] = value
    retries: Any = {"max_retries": 3, "retry_timeout": silence}
    unsigned: dict[str, Any] = {} if signed else {"skip_signature": True}
    return from_url(url, client_options=options, retry_config=retries, **unsigned)


def _key(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256}"

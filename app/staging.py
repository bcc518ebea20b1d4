"""Files that are being received: hashed as they are written, and moved or removed once they are whole."""

import errno
import fcntl
import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import obstore.exceptions

# Bytes of a staged file after which the kernel is asked to start writing them.
_WRITEBACK_BYTES = 2**24
_MOST_TURNS = 20
# How long a call waits for its turn while no other call ends.
_STALLED_SECONDS = 1.0
# Partial files whose hashes a process keeps, a few hundred bytes each, and bytes that are hashed at a time.
_MOST_HASHED = 1000
_HASH_BYTES = 2**20


class StorageUnavailable(Exception):
    """The store, or the disk that uploads are staged on, failed a read or a write."""


class StorageFull(StorageUnavailable):
    """No room is left where files are stored or staged: a retry will not help."""


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
def reaching_storage() -> Iterator[None]:
    """Map failures of the disk and the store to StorageUnavailable.

    A missing blob stays FileNotFoundError, a locked file BlockingIOError.
    """
    try:
        with _turns:
            yield
    except (FileNotFoundError, BlockingIOError):
        raise
    except (OSError, obstore.exceptions.BaseError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(os.strerror(error.errno)) from error
        raise StorageUnavailable(f"{type(error).__name__}: {error}") from error


class StagedFile:
    """A file being written, removed at the end of its `with` block unless the storage took it."""

    _file: BufferedWriter | FileIO

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
        with reaching_storage():
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
        with reaching_storage():
            self._file.flush()

    def sync(self) -> None:
        """Write everything so far to the disk before returning."""
        with reaching_storage():
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
class Hashed:
    """How far this process has hashed a partial file; the state of a hash cannot be stored."""

    size_bytes: int
    state: "hashlib._Hash"


class PartialFile(StagedFile):
    """The file of a resumable upload, locked for its one writer; it stays at the end of its block.

    Args:
        path: where it lies.
        hashed: what this process has hashed of such files, by their names.
        create: whether to make the file if there is none.

    Raises:
        FileNotFoundError: there is none.
        BlockingIOError: another request or process has locked it.
    """

    def __init__(self, path: Path, hashed: dict[str, Hashed], *, create: bool) -> None:
        self.path = path
        self._all_hashed = hashed
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
            self._file: FileIO = os.fdopen(descriptor, "r+b", buffering=0)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(self._file.fileno())
            except BaseException:
                self._file.close()
                raise
            if status.st_nlink:
                break
            self._file.close()  # removed between its opening and the lock
        self.size_bytes = self._writing_bytes = status.st_size
        self._file.seek(self.size_bytes)
        self._forget()
        self._take_up()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append to the file, and to its hash if that reaches so far."""
        with reaching_storage():
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) or 0 :]
        hashed = self._hashed_bytes == self.size_bytes
        self.size_bytes += len(data)
        if self.size_bytes - self._writing_bytes >= _WRITEBACK_BYTES:
            self._start_writeback()
        if hashed:
            self._hash.update(data)
            self._hashed_bytes += len(data)

    def truncate(self, size_bytes: int) -> None:
        """Cut off what lies beyond a size, from the hash as well."""
        with reaching_storage():
            if size_bytes < self.size_bytes and os.fstat(self._file.fileno()).st_nlink > 1:
                self._part_from_blob(size_bytes)
            else:
                self._file.truncate(size_bytes)
                self._file.seek(size_bytes)
        self.size_bytes = self._writing_bytes = size_bytes
        if self._hashed_bytes > size_bytes:
            self._forget()
            self._take_up()

    def _part_from_blob(self, size_bytes: int) -> None:
        """Go on in a file of this one's own: the storage has linked it as a blob, whose bytes must stay."""
        new = self.path.with_suffix(f".{uuid4()}.part")
        descriptor = os.open(new, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o666)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            with self.path.open("rb") as old:
                copied = 0
                while copied < size_bytes and (block := old.read(min(_HASH_BYTES, size_bytes - copied))):
                    copied += file.write(block) or 0
            new.replace(self.path)
        except BaseException:
            file.close()
            new.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = file

    def sync(self) -> None:
        super().sync()
        self._all_hashed[self.path.stem] = Hashed(self._hashed_bytes, self._hash.copy())
        while len(self._all_hashed) > _MOST_HASHED:
            self._all_hashed.pop(next(iter(self._all_hashed)))

    def hash_rest(self) -> None:
        """Hash what has not been: all that came before this process began, or through another one."""
        with self.path.open("rb") as file:
            file.seek(self._hashed_bytes)
            while self._hashed_bytes < self.size_bytes:
                with reaching_storage():
                    block = file.read(min(_HASH_BYTES, self.size_bytes - self._hashed_bytes))
                if not block:
                    raise StorageUnavailable(f"{self.path} is shorter than it was")
                self._hash.update(block)
                self._hashed_bytes += len(block)

    @property
    def sha256(self) -> str:
        """The hash of the whole file, once `hash_rest` has been called."""
        assert self._hashed_bytes == self.size_bytes
        return self._hash.hexdigest()

    def _forget(self) -> None:
        self._hashed_bytes, self._hash = 0, hashlib.sha256()

    def _take_up(self) -> None:
        """Go on from what this process has hashed before."""
        known = self._all_hashed.get(self.path.stem)
        if known is not None and known.size_bytes <= self.size_bytes:
            self._hashed_bytes, self._hash = known.size_bytes, known.state.copy()

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which ends the lock."""
        self._file.close()


class WholeFile(PartialFile):
    """A file that another process has written and hashed.

    Args:
        path: where it lies. Beside it lies a `.plan`, of which that process has written the last line at the end.
        sha256: of its bytes.

    Raises:
        FileNotFoundError: it is not there.
        BlockingIOError: a process writes it, or has begun to write it again.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        super().__init__(path, {}, create=False)
        self._sha256 = sha256
        if not path.with_suffix(".plan").read_text().endswith(f"\n{sha256} {self.size_bytes}\n"):
            self.close()
            raise BlockingIOError(f"{path} is written again")

    @property
    def sha256(self) -> str:
        return self._sha256


def sync_folder(folder: Path) -> None:
    """Write a folder's own entries to the disk before returning."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def boot_id() -> str | None:
    """Return the id of this machine's run: another one after it has started anew; None where the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None

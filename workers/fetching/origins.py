"""What buckets, the Hub and the web have in common: files with an identity, which are read by ranges."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Files of a folder that are looked at.
MOST_FILES = 200_000
# Bytes that a look into a file asks for at least.
_LOOK_BYTES = 2**18
_INDEX = ".safetensors.index.json"


class Interrupted(Exception):
    """The source did not answer, or broke off: the same request may succeed later.

    Attributes:
        answered: whether it has answered other requests since it was last heard of.
    """

    answered = False


class Changed(Exception):
    """The file is another one than when it was looked at."""


@dataclass(frozen=True)
class Remote:
    """A file at its source.

    Attributes:
        name: its name within its folder, or the last part of its address.
        address: the key in its bucket, or its URL.
        size_bytes: its size.
        mark: the source's own mark of its content, which is recorded; it may be weak, or a date.
        identity: a mark that changes with any byte; without one a transfer that broke off begins again.
        version: the bucket's version.
        sha256: its hash, if the source announces it.
    """

    name: str
    address: str
    size_bytes: int
    mark: str | None = None
    identity: str | None = None
    version: str | None = None
    sha256: str | None = None


Files = Mapping[PurePosixPath, Remote]


@dataclass(frozen=True)
class Found:
    """What lies at an address: a file, or the files of a folder by their paths in it.

    Attributes:
        file: the file; None of a folder.
        files: of a folder.
        revision: the commit, where the source has such.
    """

    file: Remote | None
    files: Files
    revision: str | None = None


class Origin(Protocol):
    """A source, opened."""

    def look(self) -> Found:
        """Return what lies at the address.

        Raises:
            Interrupted: the source does not answer.
            SourceMissing, SourceDenied, SourceNotAllowed: it says no.
        """
        ...

    def read(self, file: Remote, begin: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of a range, in order, all of them.

        Raises:
            Changed: the file is another one than `look` found.
            Interrupted, SourceMissing, SourceDenied, SourceNotAllowed: as for `look`, also after some of the bytes.
        """
        ...

    def close(self) -> None:
        """End its connections."""
        ...


class Ranged(io.RawIOBase):
    """A file at its source, as one that can be read from its beginning."""

    def __init__(self, size_bytes: int, read: Callable[[int, int], bytes]) -> None:
        self._size_bytes, self._read = size_bytes, read
        self._at = 0

    @classmethod
    def opened(cls, size_bytes: int, read: Callable[[int, int], bytes]) -> io.BufferedReader:
        return io.BufferedReader(cls(size_bytes, read), _LOOK_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer)
        end = min(self._at + len(target), self._size_bytes)
        if end == self._at:
            return 0
        data = self._read(self._at, end)
        target[: len(data)] = data
        self._at = end
        return len(data)


def is_index(name: str) -> bool:
    return name.endswith(_INDEX)


def around_index(files: Files, index: str) -> Files:
    """Return the files of a folder without weights other than those of one index."""
    return {
        path: file
        for path, file in files.items()
        if path.name == index or not (is_index(path.name) or path.name == "model.safetensors")
    }

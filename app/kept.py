"""Entries of kept features: the files of one pass, and which of them go first. Loads nothing of the database."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from app.storage import Storage, StoredFeatures

#: Share of all kept features that one entry may have, so that one evaluation does not evict all others.
LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class Entry:
    """The kept features of one pass, in one file or several; it is as old as the newest of them."""

    files: tuple[StoredFeatures, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def stored_at(self) -> datetime:
        return max(file.stored_at for file in self.files)

    def delete(self, storage: Storage) -> None:
        """Delete its files, the first one last: without that the others are found by nobody."""
        for file in sorted(self.files, key=lambda file: file.name, reverse=True):
            storage.delete_features(file.name)


def entries(files: Iterable[StoredFeatures]) -> dict[str, Entry]:
    """Return the entries of kept features by name, the oldest first."""
    found: dict[str, list[StoredFeatures]] = {}
    for file in files:
        found.setdefault(file.entry, []).append(file)
    by_name = {name: Entry(tuple(some)) for name, some in found.items()}
    return dict(sorted(by_name.items(), key=lambda item: item[1].stored_at))


def make_room(storage: Storage, size_bytes: int, *, limit_bytes: int, but: str) -> None:
    """Delete the oldest entries, but one, until so many further bytes are within the limit of all kept features."""
    found = entries(storage.list_features())
    excess = sum(entry.size_bytes for entry in found.values()) + size_bytes - limit_bytes
    for name, entry in found.items():
        if excess > 0 and name != but:
            entry.delete(storage)
            excess -= entry.size_bytes

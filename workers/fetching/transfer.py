"""Bring a file from its source to the disk: planned, then by ranges, from where the last attempt ended.

A folder's shards become one file as they come: the plan has read their headers, and what follows are ranges of theirs,
one after the other. So each byte is sent once, lies on the disk once, and the size of what is there says where to go
on. Beside the file lies what it is made of (`.plan`): an attempt that finds another plan begins again.
"""

import hashlib
import io
import json
import math
import platform
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from app.errors import InsufficientStorage, InvalidFile, SourceChanged, SourceUnavailable, TooLarge
from app.files.archives import Extent, Member, folder_of, merged
from app.files.tensorfile import MAX_HEADER_BYTES
from app.staging import PartialFile, boot_id
from workers.fetching.messages import Fetched, FetchedFile, Order
from workers.fetching.messages import Origin as Recorded
from workers.fetching.origins import Changed, Found, Interrupted, Origin, Ranged, Remote
from workers.tasks import Progress

T = TypeVar("T")
Tell = Callable[[Progress], None]

# Raise it when the same plan would write other bytes.
_FORMAT = 1
_HASH_BYTES = 2**20
# Bytes a second that a source must bring, counted over the patience.
_LEAST_RATE = 1024
_MOST_CHANGES = 3
_TELL_SECONDS = 0.5
# Files of a folder that a resource's origin names.
_MOST_RECORDED = 100
# Suffixes of probes that are one file.
_DATA = (".safetensors", ".npz", ".csv", ".jsonl", ".zip")
# The earliest time that a zip can store, and the system whose file permissions it stores.
_NO_TIME, _UNIX = (1980, 1, 1, 0, 0, 0), 3
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0


@dataclass(frozen=True)
class Plan:
    """What a file is made of.

    Attributes:
        extents: ranges of the source's files, in the order in which they follow each other.
        files: all files that are used, by their names in the extents.
        revision: the commit, where the source has such.
        zipped: whether it is a zip of the files.
        beginning: its first bytes, which are no source's.
        heads: the bytes of a shard before its first extent, which its hash is of too.
        descriptions: see `Fetched`.
        described: the files that the descriptions were read from.
    """

    extents: list[Extent]
    files: Mapping[str, Remote]
    revision: str | None
    zipped: bool = False
    beginning: bytes = b""
    heads: Mapping[str, bytes] = field(default_factory=dict)
    descriptions: Mapping[str, Any] = field(default_factory=dict)
    described: Sequence[FetchedFile] = ()

    @property
    def size_bytes(self) -> int:
        """The size of the file; of a zip without its own bytes, of which each file has a few hundred."""
        return len(self.beginning) + sum(extent.end - extent.begin for extent in self.extents)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the file's bytes, and of this run of the machine; "" if a file has no identity.

        After a sudden end of the machine the file's size says nothing of what is on the disk.
        """
        if any(file.identity is None for file in self.files.values()):
            return ""
        beginning = hashlib.sha256(self.beginning).hexdigest()
        extents, files = [*map(asdict, self.extents)], [*map(asdict, self.files.values())]
        # The library that writes a zip decides some of its bytes.
        form = f"zip of Python {platform.python_version()}" if self.zipped else "extents"
        text = json.dumps([_FORMAT, form, beginning, extents, files, boot_id()])
        return hashlib.sha256(text.encode()).hexdigest()


class Patience:
    """Waits for a source that does not answer, longer each time, until it has brought too little for too long."""

    def __init__(self, seconds: float, tell: Tell) -> None:
        self._seconds, self._tell = seconds, tell
        self.heard()

    def heard(self) -> None:
        """Note that the source has answered."""
        self._since, self._came_bytes, self._pause = time.monotonic(), 0, _FIRST_PAUSE_SECONDS

    def came(self, n_bytes: int) -> None:
        """Note that the source has brought bytes, which count once they are enough.

        Raises:
            SourceUnavailable: they come too slowly.
        """
        self._came_bytes += n_bytes
        self._pause = _FIRST_PAUSE_SECONDS
        if self._came_bytes >= _LEAST_RATE * self._seconds:
            self.heard()
        elif time.monotonic() > self._since + self._seconds:
            raise SourceUnavailable(f"The source brought {self._came_bytes} bytes in {self._seconds:g} s.")

    def wait(self, error: Interrupted, progress: Progress) -> None:
        """Wait before the next try.

        Raises:
            SourceUnavailable: it has been silent for too long.
        """
        if error.answered:
            self.heard()
        left = self._since + self._seconds - time.monotonic()
        if left <= 0:
            came = f"{self._came_bytes} bytes" if self._came_bytes else "nothing"
            raise SourceUnavailable(f"The source brought {came} for {self._seconds:g} s: {error}.") from None
        self._tell(progress.model_copy(update={"phase": "waiting for the source"}))
        time.sleep(min(self._pause, left))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)

    def over(self, call: Callable[[], T]) -> T:
        """Return what a call returns, again until it does."""
        while True:
            try:
                value = call()
            except Interrupted as error:
                self.wait(error, Progress(phase="looking", done=0, total=0))
            else:
                self.heard()
                return value


def transfer(origin: Origin, order: Order, shown: str, tell: Tell) -> Fetched:
    """Fetch a file, or a folder as one file, to `order.path`.

    Args:
        origin: the source.
        order: what to fetch.
        shown: the address, as it is recorded.
        tell: told of progress.

    Raises:
        ServiceError: the source has no such file, refuses it, is silent for too long or changes too often; the file is
            larger than allowed or than the disk, or a folder's files do not fit together.
    """
    patience = Patience(order.patience_seconds, tell)
    path = Path(order.path)
    why = ""
    for _ in range(_MOST_CHANGES):
        tell(Progress(phase="looking", done=0, total=0))
        try:
            plan = _plan(origin, order, patience)
            _require_room(plan, order, path)
            with _locked(path, patience) as file:
                return _filled(file, origin, plan, shown, patience, tell)
        except Changed as error:
            why = str(error)
    raise SourceChanged(f"{shown} could not be fetched in {_MOST_CHANGES} tries: {why}.")


def _locked(path: Path, patience: Patience) -> PartialFile:
    """Open the file once no other process writes it: one whose worker has just been killed may not have ended yet."""

    def open_it() -> PartialFile:
        try:
            return PartialFile(path, {}, create=True)
        except BlockingIOError:
            raise Interrupted("another process fetches the same file") from None

    return patience.over(open_it)


def _plan(origin: Origin, order: Order, patience: Patience) -> Plan:
    found = patience.over(origin.look)
    if found.file is not None:
        file = found.file
        return Plan([_all_of(file)], {file.name: file}, found.revision)
    if order.makes == "probe":
        return _probe_plan(found)
    return _checkpoint_plan(origin, found, order, patience)


def _all_of(file: Remote) -> Extent:
    return Extent(file.name, 0, file.size_bytes)


def _probe_plan(found: Found) -> Plan:
    """Return the plan of a probe's folder: a zip of its Parquet files, or of its images; or the one file of data."""
    # Here, as most fetches do without it, and it takes a while to load.
    from app.files.datafile.folders import SUFFIXES, is_litter

    names = sorted(str(path) for path in found.files if not is_litter(str(path)))
    for suffixes in ((".parquet",), SUFFIXES, _DATA):
        chosen = [name for name in names if name.lower().endswith(suffixes)]
        if chosen:
            break
    if not chosen or (suffixes == _DATA and len(chosen) > 1):
        wanted = "no file of data" if not chosen else f"{len(chosen)} files of data, of which a probe is one"
        listed = (chosen or names)[:20]
        raise InvalidFile(f"The folder holds {wanted}: {', '.join(listed)}.", files=listed)
    files = {name: replace(found.files[PurePosixPath(name)], name=name) for name in chosen}
    _require_identities(files)
    return Plan([_all_of(file) for file in files.values()], files, found.revision, zipped=len(files) > 1)


def _require_identities(files: Mapping[str, Remote]) -> None:
    """Check that several files can be joined: nobody would notice that one of them is of another version."""
    without = [name for name, file in files.items() if file.identity is None]
    if len(files) > 1 and without:
        raise SourceUnavailable(
            f"The source gives no strong ETag of {without[0]!r}, so nothing says that all {len(files)} files are "
            "of one version. Send the folder instead, or join the files first."
        )


def _checkpoint_plan(origin: Origin, found: Found, order: Order, patience: Patience) -> Plan:
    """Return the plan of a checkpoint's folder; its descriptions and its shards' headers are read for it."""
    described: list[FetchedFile] = []

    def read(file: Remote, begin: int, end: int) -> bytes:
        return patience.over(lambda: b"".join(origin.read(file, begin, end)))

    def opened(file: Remote) -> io.BufferedReader | io.BytesIO:
        if not file.name.endswith(".json"):
            return Ranged.opened(file.size_bytes, partial(read, file))
        # Small, and read as a whole.
        content = read(file, 0, file.size_bytes) if file.size_bytes else b""
        found = _recorded(file, hashlib.sha256(content).hexdigest())
        _require_announced(file, found)
        described.append(found)
        return io.BytesIO(content)

    members = {
        path: Member(file.size_bytes, cast(Any, partial(opened, file)))
        for path, file in found.files.items()
        # Those of other folders belong to other networks.
        if len(path.parts) == 1
    }
    folder = folder_of(members, of_adapter=order.of_adapter)
    beginning, extents = merged(folder)
    files = {name: found.files[PurePosixPath(name)] for name in folder.shards}
    _require_identities(files)
    first = {extent.name: extent.begin for extent in reversed(extents)}
    # More than a header is a tensor that is left out.
    heads = {name: read(files[name], 0, begin) for name, begin in first.items() if 0 < begin <= MAX_HEADER_BYTES + 8}
    named = {name: getattr(folder, name) for name in ("config", "preprocessor", "tokenizer", "adapter")}
    descriptions = {name: value for name, value in named.items() if value is not None}
    return Plan(
        extents,
        files,
        found.revision,
        beginning=beginning,
        heads=heads,
        descriptions=descriptions,
        described=described,
    )


def _require_room(plan: Plan, order: Order, path: Path) -> None:
    limit = order.max_bytes
    if plan.size_bytes > limit:
        raise TooLarge(f"The file has {plan.size_bytes} bytes; at most {limit} are fetched.", limit_bytes=limit)
    there = 0
    with suppress(FileNotFoundError):
        there = path.stat().st_size
    free = shutil.disk_usage(path.parent).free
    if plan.size_bytes - there > free:
        raise InsufficientStorage(
            f"The file has {plan.size_bytes} bytes, and {free} are free where files are staged.", free_bytes=free
        )


def _filled(file: PartialFile, origin: Origin, plan: Plan, shown: str, patience: Patience, tell: Tell) -> Fetched:
    """Bring what the file lacks, and return what it is."""
    beside = file.path.with_suffix(".plan")
    known = beside.read_text().partition("\n")[0] if beside.exists() else ""
    if not plan.fingerprint or known != plan.fingerprint:
        file.truncate(0)
    beside.write_text(f"{plan.fingerprint}\n")
    tell(Progress(phase="hashing", done=0, total=plan.size_bytes))
    file.hash_rest()
    target = _Resumed(file)
    fetching = _Fetching(target, plan, origin, patience, tell)
    hashes = fetching.write_zip() if plan.zipped else fetching.write_extents()
    if target.at < file.size_bytes:
        # A plan is as long as its file: this one was written by something else.
        file.truncate(0)
        raise Changed("what was left of an earlier try is not its beginning")
    tell(Progress(phase="storing", done=plan.size_bytes, total=plan.size_bytes))
    file.sync()
    fetched = _fetched(file, plan, hashes, shown)
    # Says that the file is whole, to whoever opens it next.
    beside.write_text(f"{plan.fingerprint}\n{fetched.sha256} {fetched.size_bytes}\n")
    return fetched


class _Resumed(io.RawIOBase):
    """A file that is written from its beginning once more, of which the bytes that it has are passed over.

    Attributes:
        at: the place of the next byte.
        ended: whether a transfer has failed: what a zip still writes as it closes must not get into the file.
    """

    def __init__(self, file: PartialFile) -> None:
        self.file, self.at, self.ended = file, 0, False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left_out = min(max(self.file.size_bytes - self.at, 0), len(data))
        if left_out < len(data) and not self.ended:
            self.file.write(memoryview(data)[left_out:])
        self.at += len(data)
        return len(data)


class _Fetching:
    """The one transfer of a plan; what the file has is read from it, the rest from the source."""

    def __init__(self, target: _Resumed, plan: Plan, origin: Origin, patience: Patience, tell: Tell) -> None:
        self._target, self._plan, self._origin, self._patience, self._tell = target, plan, origin, patience, tell
        self._done, self._told_at = len(plan.beginning), -math.inf

    def write_extents(self) -> dict[str, str]:
        """Write the beginning, and the extents one after the other; return the hashes of files, by name."""
        plan, hashes = self._plan, dict[str, str]()
        if not plan.beginning:
            # One file, as it is: its hash is that of the target, which is made of the same bytes once.
            [extent] = plan.extents
            for chunk in self._chunks(extent):
                self._target.write(chunk)
            return {extent.name: self._target.file.sha256}
        self._target.write(plan.beginning)
        parts = Counter(extent.name for extent in plan.extents)
        for extent in plan.extents:
            head = plan.heads.get(extent.name, b"")
            digest = hashlib.sha256(head)
            for chunk in self._chunks(extent):
                self._target.write(chunk)
                digest.update(chunk)
            # Of a file of which only parts are taken nobody knows the hash.
            whole = len(head) == extent.begin and extent.end == plan.files[extent.name].size_bytes
            if whole and parts[extent.name] == 1:
                hashes[extent.name] = digest.hexdigest()
        return hashes

    def write_zip(self) -> dict[str, str]:
        """Write a zip of the files, uncompressed; return their hashes, by name. The same files give the same zip."""
        hashes: dict[str, str] = {}
        with zipfile.ZipFile(cast(Any, self._target), "w") as archive:
            for extent in self._plan.extents:
                entry = zipfile.ZipInfo(extent.name, _NO_TIME)
                entry.create_system, entry.external_attr = _UNIX, 0o100644 << 16
                digest = hashlib.sha256()
                with archive.open(entry, "w", force_zip64=True) as member:
                    for chunk in self._chunks(extent):
                        member.write(chunk)
                        digest.update(chunk)
                hashes[extent.name] = digest.hexdigest()
        return hashes

    def _chunks(self, extent: Extent) -> Iterator[bytes]:
        """Yield the bytes of an extent, which come next in the target; each must be written before the next.

        Raises:
            Changed: the source's file is another one now, or may be.
        """
        first = self._target.at
        try:
            yield from self._there(extent)
            while (begin := extent.begin + self._target.at - first) < extent.end:
                yield from self._missing(extent, begin)
            # However small it was.
            self._patience.heard()
        except BaseException:
            self._target.ended = True
            raise

    def _missing(self, extent: Extent, begin: int) -> Iterator[bytes]:
        """Yield an extent's bytes from `begin` as long as they come, then wait before the next try."""
        remote = self._plan.files[extent.name]
        try:
            for chunk in self._origin.read(remote, begin, extent.end):
                self._patience.came(len(chunk))
                yield chunk
                self._note(len(chunk))
        except Interrupted as error:
            self._patience.wait(error, self._progress())
            if remote.identity is None:
                # Nothing says that what comes next is of the same file.
                raise Changed(f"{remote.name} broke off, and its source gives no strong ETag to go on with") from None

    def _there(self, extent: Extent) -> Iterator[bytes]:
        """Yield what the file has of an extent that comes next."""
        file = self._target.file
        left = min(file.size_bytes - self._target.at, extent.end - extent.begin)
        if left <= 0:
            return
        with file.path.open("rb") as there:
            there.seek(self._target.at)
            while left and (chunk := there.read(min(_HASH_BYTES, left))):
                left -= len(chunk)
                yield chunk
                self._note(len(chunk))

    def _note(self, n_bytes: int) -> None:
        self._done += n_bytes
        if time.monotonic() - self._told_at > _TELL_SECONDS:
            self._told_at = time.monotonic()
            self._tell(self._progress())

    def _progress(self) -> Progress:
        return Progress(phase="fetching", done=self._done, total=self._plan.size_bytes)


def _fetched(file: PartialFile, plan: Plan, hashes: Mapping[str, str], shown: str) -> Fetched:
    """Return what the whole file is.

    Raises:
        Changed: its bytes are not those that the source has announced; it is emptied.
    """
    files = [_recorded(remote, hashes.get(name)) for name, remote in plan.files.items()]
    try:
        for remote, found in zip(plan.files.values(), files, strict=True):
            _require_announced(remote, found)
    except Changed:
        file.truncate(0)
        raise
    all_files = [*plan.described, *files]
    origin = Recorded(
        source=shown,
        revision=plan.revision,
        fetched_at=datetime.now(UTC),
        n_files=len(all_files),
        files=all_files[:_MOST_RECORDED],
    )
    return Fetched(sha256=file.sha256, size_bytes=file.size_bytes, origin=origin, descriptions=dict(plan.descriptions))


def _recorded(file: Remote, sha256: str | None) -> FetchedFile:
    return FetchedFile(name=file.name, size_bytes=file.size_bytes, etag=file.mark, version=file.version, sha256=sha256)


def _require_announced(file: Remote, found: FetchedFile) -> None:
    if file.sha256 is not None and found.sha256 not in (None, file.sha256):
        raise Changed(f"{file.name} has not the sha256 that its source announces")

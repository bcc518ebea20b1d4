"""Resumable uploads: each a row, and a file in the staging folder that grows by what its client sends.

The row's offset moves only once fsync has returned, so that it never exceeds what is on the disk. What a request wrote
beyond it when its process was killed is still in the kernel's memory: as long as the machine has not started anew, the
file's size is the true offset. Then it is synced, and the row follows. One request at a time writes: it holds a lock on
the file, which ends with its process.
"""

import base64
import binascii
import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import models, parts
from app.database import clock, read, write
from app.errors import (
    ChecksumMismatch,
    IdempotencyConflict,
    InsufficientStorage,
    InvalidRequest,
    NotFound,
    OffsetDiffers,
    TooLarge,
    TooManyUploads,
    UploadBusy,
    UploadElsewhere,
    UploadUnfinished,
)
from app.settings import Settings
from app.staging import PartialFile, StorageUnavailable, boot_id
from app.storage import Storage

logger = logging.getLogger(__name__)

ALGORITHMS = ("sha256", "sha1")
# Bytes of one request after which they are synced, and the row follows.
_SYNC_BYTES = 64 * 2**20
_MOST_METADATA_CHARACTERS = 4096
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_METADATA_PAIR = re.compile(r"[!-+\--~]+( [A-Za-z0-9+/]*={0,2})?")


@dataclass(frozen=True)
class Checksum:
    """The hash that a request announces for its own bytes."""

    algorithm: str
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the value of the header Upload-Checksum: an algorithm, and a digest in base64.

        Raises:
            InvalidRequest: the algorithm is not known, or the digest is none of it.
        """
        algorithm, _, encoded = text.strip().partition(" ")
        if algorithm not in ALGORITHMS:
            raise InvalidRequest(f"Upload-Checksum begins with one of {', '.join(ALGORITHMS)}, then base64.")
        try:
            digest = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            digest = b""
        expected_bytes = hashlib.new(algorithm, usedforsecurity=False).digest_size
        if len(digest) != expected_bytes:
            raise InvalidRequest(f"Upload-Checksum must have {expected_bytes} bytes of {algorithm} in base64.")
        return cls(algorithm, digest)


def create(
    engine: sa.Engine,
    storage: Storage,
    settings: Settings,
    size_bytes: int,
    metadata: str | None,
    *,
    in_parts: bool = False,
) -> models.Upload:
    """Begin an upload.

    Args:
        engine: of the service's database.
        storage: will hold the file.
        settings: limits.
        size_bytes: of the whole file.
        metadata: the header Upload-Metadata; kept as it is.
        in_parts: whether its bytes should go straight into the bucket, in parts, if there is one.

    Raises:
        TooLarge: a file may not have so many bytes.
        TooManyUploads: as many are open as there may be.
        InsufficientStorage: the disk has no room for it beside what other uploads have announced.
        InvalidRequest: the metadata are not of the form of the header.
    """
    if size_bytes > settings.max_upload_bytes:
        limit = settings.max_upload_bytes
        raise TooLarge(f"The file has {size_bytes} bytes; {limit} are allowed.", limit_bytes=limit)
    metadata_of(metadata)
    part_bytes = parts.part_bytes_of(storage, size_bytes) if in_parts else None
    uploads, place, free_bytes = models.Upload, storage.place(), storage.free_bytes()
    with write(engine) as session:
        now = clock(session)
        still_open = (uploads.resource_id.is_(None), uploads.expires_at > now)
        n_open = session.scalar(sa.select(sa.func.count()).select_from(uploads).where(*still_open)) or 0
        if n_open >= settings.max_open_uploads:
            limit = settings.max_open_uploads
            raise TooManyUploads(f"{n_open} uploads are open; at most {limit} may be.", limit=limit)
        missing = sa.func.coalesce(sa.func.sum(uploads.size_bytes - uploads.offset_bytes), 0)
        announced_bytes = int(session.scalar(sa.select(missing).where(*still_open, uploads.place == place)) or 0)
        if announced_bytes + size_bytes > free_bytes:
            raise InsufficientStorage(
                f"{free_bytes} bytes are free where uploads are staged, of which others will need {announced_bytes}; "
                f"the file has {size_bytes}."
            )
        row = uploads(
            size_bytes=size_bytes,
            part_bytes=part_bytes,
            metadata_=metadata,
            place=place,
            boot=boot_id(),
            expires_at=now + timedelta(seconds=settings.upload_expires_seconds),
        )
        session.add(row)
    return row


def get(engine: sa.Engine, storage: Storage, id_: str) -> models.Upload:
    """Return an upload with its true offset, which the disk has.

    While another request writes, it is the offset that this one has reached for certain.

    Raises:
        NotFound: there is none, or it has expired.
        UploadElsewhere: its file is on another machine.
    """
    row = _row(engine, id_)
    if row.part_bytes is not None and row.resource_id is None:
        lacking = parts.missing(storage, id_, row.size_bytes, row.part_bytes)
        # What lies in the bucket without a gap.
        row.offset_bytes = row.part_bytes * lacking[0] if lacking else row.size_bytes
        return row
    if row.resource_id is not None or storage.partial_bytes(id_) == row.offset_bytes:
        return row
    with suppress(UploadBusy), _lock(storage, row) as file:
        return _settled(engine, id_, file)
    return row


@dataclass(frozen=True)
class Part:
    """A part of an upload that the bucket lacks, and the URL that takes it by PUT."""

    number: int
    offset_bytes: int
    size_bytes: int
    url: str


def missing_parts(
    engine: sa.Engine, storage: Storage, settings: Settings, id_: str, limit: int
) -> tuple[int, list[Part]]:
    """Return the bytes that the bucket lacks and the first parts of them; asking puts the end of the upload off.

    Raises:
        NotFound: there is no such upload.
        InvalidRequest: its bytes do not go to the bucket in parts.
        StorageUnavailable: the bucket does not answer.
    """
    row = _row(engine, id_)
    if row.part_bytes is None:
        raise InvalidRequest("The bytes of this upload come by PATCH, in no parts.")
    if row.resource_id is not None:
        return 0, []
    numbers = parts.missing(storage, id_, row.size_bytes, row.part_bytes)
    _move(engine, id_, 0, row.boot, settings.upload_expires_seconds)
    places = parts.extents(row.size_bytes, row.part_bytes)
    missing_bytes = sum(places[number][1] for number in numbers)
    first = numbers[:limit]
    urls = parts.signed(storage, id_, first) if first else []
    return missing_bytes, [Part(number, *places[number], url) for number, url in zip(first, urls, strict=True)]


class Append:
    """What one request adds to an upload: written and hashed as it comes.

    Without a checksum all that came is kept, also if the request ends early. With one all of it is kept or nothing.
    Use it as a context manager; its functions block, so call them in threads.

    Args:
        engine: of the service's database.
        storage: holds the file.
        settings: limits.
        id_: of the upload.
        offset_bytes: where the caller believes it to be.
        checksum: of all the bytes of the request.

    Raises:
        NotFound: there is no such upload.
        UploadBusy: another request writes.
        OffsetDiffers: it is elsewhere.
    """

    def __init__(
        self,
        engine: sa.Engine,
        storage: Storage,
        settings: Settings,
        id_: str,
        offset_bytes: int,
        checksum: Checksum | None = None,
    ) -> None:
        self._engine, self._storage, self._settings, self._id = engine, storage, settings, id_
        self._checksum = checksum
        self._hash = None if checksum is None else hashlib.new(checksum.algorithm, usedforsecurity=False)
        row = _row(engine, id_)
        if row.part_bytes is not None:
            raise InvalidRequest(
                f"The bytes of this upload go into the bucket: GET /v1/uploads/{id_}/parts tells where."
            )
        self._file = _lock(storage, row)
        try:
            row = _settled(engine, id_, self._file)
            if row.resource_id is not None:
                raise NotFound(f"The upload {id_!r} has become {row.resource_id!r}.")
            if row.offset_bytes != offset_bytes:
                raise OffsetDiffers(
                    f"The upload is at {row.offset_bytes} bytes, not at {offset_bytes}; HEAD tells where.",
                    offset_bytes=row.offset_bytes,
                )
            self.size_bytes = row.size_bytes
            self._began_at = self._synced_at = offset_bytes
            # Bytes whose checksum is not known yet must not be taken for good ones after a crash.
            boot = None if checksum is not None else boot_id()
            if row.boot != boot:
                self._move(boot)
        except BaseException:
            self._file.close()
            raise

    def require_room(self, n_bytes: int) -> None:
        """Check that the upload lacks at least so many bytes.

        Raises:
            TooLarge: it does not.
        """
        lacking = self.size_bytes - self._began_at
        if n_bytes > lacking:
            raise TooLarge(f"The upload lacks {lacking} bytes; {n_bytes} or more came.", limit_bytes=lacking)

    def write(self, data: bytes | bytearray) -> None:
        """Write bytes after those before; now and then all of them go to the disk, and the row follows.

        Raises:
            TooLarge: more came than the upload lacks; nothing of this request is kept.
            NotFound: the upload was removed meanwhile.
            StorageUnavailable: the disk failed, or is full.
        """
        came_bytes = self._file.size_bytes - self._began_at + len(data)
        if self._began_at + came_bytes > self.size_bytes:
            self._file.truncate(self._began_at)
            self.require_room(came_bytes)
        self._file.write(data)
        if self._hash is not None:
            self._hash.update(data)
        elif self._file.size_bytes - self._synced_at >= _SYNC_BYTES:
            self._keep()

    def finish(self, *, complete: bool = True) -> models.Upload:
        """Put everything on the disk and return the upload, at its new offset.

        Args:
            complete: whether the request came to its end.

        Raises:
            ChecksumMismatch: the bytes do not have their checksum; none of them is kept.
            NotFound, StorageUnavailable: as of `write`.
        """
        if self._hash is not None and self._checksum is not None:
            found = self._hash.digest()
            if not complete or found != self._checksum.digest:
                self._file.truncate(self._began_at)
                row = self._move(boot_id())
                if complete:
                    raise ChecksumMismatch(
                        f"The bytes have the {self._checksum.algorithm} {found.hex()}, not "
                        f"{self._checksum.digest.hex()}; send them again.",
                        offset_bytes=self._began_at,
                    )
                return row
        return self._keep()

    def _keep(self) -> models.Upload:
        try:
            self._file.sync()
        except StorageUnavailable:
            # What a failed sync has left in the kernel's memory cannot be told; the disk has what was synced before.
            with suppress(StorageUnavailable):
                self._file.truncate(self._synced_at)
            raise
        row = self._move(boot_id())
        self._synced_at = self._file.size_bytes
        return row

    def _move(self, boot: str | None) -> models.Upload:
        return _move(self._engine, self._id, self._file.size_bytes, boot, self._settings.upload_expires_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def remove(engine: sa.Engine, storage: Storage, id_: str) -> None:
    """Remove an upload and its file, whoever writes to it now: that request finds it gone.

    Raises:
        NotFound: there is none.
    """
    row = _row(engine, id_)
    with write(engine) as session:
        session.execute(sa.delete(models.Upload).where(models.Upload.id == id_))
    storage.remove_partial(id_)
    if row.part_bytes is not None:
        parts.remove(storage, id_)


def used_for(session: Session, id_: str, spec: bytes) -> str | None:
    """Return the id of the resource that an upload has become with this spec; None if it is still to be used.

    Raises:
        IdempotencyConflict: it has become one with another spec.
    """
    query = sa.select(models.Upload.resource_id, models.Upload.request_sha256).where(models.Upload.id == id_)
    found = session.execute(query).one_or_none()
    if found is None or found.resource_id is None:
        return None
    if found.request_sha256 != hashlib.sha256(spec).hexdigest():
        raise IdempotencyConflict(
            f"The upload has become {found.resource_id!r} by another spec; name the sha256 of that in place of it.",
            resource_id=found.resource_id,
        )
    resource_id: str = found.resource_id
    return resource_id


@contextmanager
def whole_file(engine: sa.Engine, storage: Storage, id_: str) -> Iterator[PartialFile]:
    """Yield the file of a complete upload, hashed and locked; it is removed at the end of a block without an error.

    Hashing takes a while where this process has not received the file from its beginning.

    Raises:
        NotFound: there is no such upload.
        UploadUnfinished: bytes are missing.
        UploadBusy: another request has it.
    """
    row = _row(engine, id_)
    with _lock(storage, row) as file:
        row = _row(engine, id_) if row.part_bytes is not None else _settled(engine, id_, file)
        if row.resource_id is not None:
            raise UploadBusy("Another request has just made a resource of the upload.")
        if row.part_bytes is not None:
            with _fetched(storage, row, row.part_bytes, file):
                yield file
            parts.remove(storage, id_)
            return
        _require_whole(row)
        file.hash_rest()
        yield file
        storage.remove_partial(id_)


@contextmanager
def _fetched(storage: Storage, row: models.Upload, part_bytes: int, file: PartialFile) -> Iterator[None]:
    """Fetch an upload's parts into its file, which is removed at the end of the block."""
    lacking = parts.missing(storage, row.id, row.size_bytes, part_bytes)
    row.offset_bytes = part_bytes * lacking[0] if lacking else row.size_bytes
    _require_whole(row)
    try:
        file.truncate(0)
        parts.fetch(storage, row.id, row.size_bytes, part_bytes, file)
        yield
    finally:
        storage.remove_partial(row.id)


def _require_whole(row: models.Upload) -> None:
    if row.offset_bytes != row.size_bytes:
        raise UploadUnfinished(
            f"The upload has {row.offset_bytes} of {row.size_bytes} bytes.",
            offset_bytes=row.offset_bytes,
            size_bytes=row.size_bytes,
        )


def use(session: Session, resource_id: str, *, id_: str, spec: bytes) -> None:
    """Note what an upload has become, in the transaction that makes it.

    Raises:
        NotFound: the upload was removed meanwhile.
    """
    uploads = models.Upload
    values = {"resource_id": resource_id, "request_sha256": hashlib.sha256(spec).hexdigest()}
    done = session.execute(
        sa.update(uploads).where(uploads.id == id_, uploads.resource_id.is_(None)).values(values).returning(uploads.id)
    )
    if done.one_or_none() is None:
        raise _missing(id_)


def sweep(engine: sa.Engine, storage: Storage) -> None:
    """Remove uploads that have expired, and files of uploads that are not there or have become resources."""
    uploads = models.Upload
    # Before the rows: a row is always older than its file.
    files, in_bucket = set(storage.partials()), parts.ids(storage)
    with read(engine) as session:
        expired = set(session.scalars(sa.select(uploads.id).where(uploads.expires_at <= clock(session))))
        needed = set(session.scalars(sa.select(uploads.id).where(uploads.resource_id.is_(None))))
    for id_ in expired:
        with suppress(BlockingIOError, FileNotFoundError):
            if id_ in files:
                storage.partial(id_).close()  # nobody writes to it
            with write(engine) as session:
                gone = sa.delete(uploads).where(uploads.id == id_, uploads.expires_at <= clock(session))
                session.execute(gone)
            storage.remove_partial(id_)
            needed.discard(id_)
    for id_ in in_bucket - needed:
        parts.remove(storage, id_)
    for id_ in files - needed:
        with suppress(BlockingIOError, FileNotFoundError), storage.partial(id_):
            storage.remove_partial(id_)


def metadata_of(header: str | None) -> dict[str, str]:
    """Return the pairs of the header Upload-Metadata; values are base64, of text.

    Raises:
        InvalidRequest: it has not that form, or is too long.
    """
    found: dict[str, str] = {}
    for pair in filter(None, map(str.strip, (header or "").split(","))):
        key, _, value = pair.partition(" ")
        try:
            if not _METADATA_PAIR.fullmatch(pair) or key in found:
                raise ValueError
            found[key] = base64.b64decode(value, validate=True).decode("utf-8", "replace")
        except ValueError:
            raise InvalidRequest(f"Upload-Metadata has {pair[:80]!r}, which is not 'key base64'.") from None
    if len(header or "") > _MOST_METADATA_CHARACTERS:
        raise InvalidRequest(f"Upload-Metadata may have {_MOST_METADATA_CHARACTERS} characters.")
    return found


def _row(engine: sa.Engine, id_: str) -> models.Upload:
    if not _ID.fullmatch(id_):
        raise _missing(id_)
    with read(engine) as session:
        row = session.get(models.Upload, id_)
        if row is None or row.expires_at <= clock(session):
            raise _missing(id_)
        return row


def _missing(id_: str) -> NotFound:
    return NotFound(f"There is no upload {id_!r}; it was never begun, cancelled, or has expired.")


def _lock(storage: Storage, row: models.Upload) -> PartialFile:
    """Open the file of an upload, which its first writer makes."""
    busy = UploadBusy("Another request writes to the upload, or makes a resource of it; try again once it has ended.")
    try:
        try:
            return storage.partial(row.id)
        except FileNotFoundError:
            if row.place != storage.place() and row.part_bytes is None:
                raise UploadElsewhere("Each machine stages its own uploads; send its requests to that one.") from None
            return storage.partial(row.id, create=True)
    except BlockingIOError:
        raise busy from None


def _settled(engine: sa.Engine, id_: str, file: PartialFile) -> models.Upload:
    """Return the upload, once its row and its locked file agree on an offset that the disk has."""
    row = _row(engine, id_)
    if row.resource_id is not None:
        return row
    trusted_bytes = row.size_bytes if row.boot is not None and row.boot == boot_id() else row.offset_bytes
    offset_bytes = min(file.size_bytes, trusted_bytes)
    if file.size_bytes > offset_bytes:
        file.truncate(offset_bytes)
    if offset_bytes != row.offset_bytes:
        if offset_bytes < row.offset_bytes:
            logger.warning("the file of upload %s has lost %d bytes", id_, row.offset_bytes - offset_bytes)
        file.sync()
        return _move(engine, id_, offset_bytes, row.boot, None)
    return row


def _move(
    engine: sa.Engine, id_: str, offset_bytes: int, boot: str | None, expires_seconds: float | None
) -> models.Upload:
    """Set the offset of an upload, of which the disk has so much; with a number of seconds it lasts for these."""
    uploads = models.Upload
    with write(engine) as session:
        values: dict[str, object] = {"offset_bytes": offset_bytes, "boot": boot}
        if expires_seconds is not None:
            values["expires_at"] = clock(session) + timedelta(seconds=expires_seconds)
        query = sa.update(uploads).where(uploads.id == id_, uploads.resource_id.is_(None)).values(values)
        row = session.scalars(query.returning(uploads)).one_or_none()
    if row is None:
        raise _missing(id_)
    return row

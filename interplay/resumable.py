"""Send a large file so that a broken connection, a restart of the service or the end of this process costs little.

The protocol is tus 1.0.0. A file goes in requests that end with an answer: what was answered for is on the service's
disk. Their size is a part of what came since the last break, so that a break costs little however often there is one.
Where the service has a bucket that signs requests, parts go there, several at a time (interplay/parts.py).
A note in the user's cache folder names the upload of a file, so that another process goes on with it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Self

import httpx

from interplay import parts
from interplay.transport import Body, InterplayError, ProblemError, ServiceUnreachable, Transport

# Smaller files go in one form.
LEAST_BYTES = 64 * 2**20
# A request brings this part of what came since the last break, and at least so many bytes: before the first break, and
# after one. So a hundred breaks in a gibibyte cost less than two percent of it, wherever they are.
_PARTS, _LEAST_BYTES = (1 / 32, 1 / 64), (2**20, 2**17)
_MOST_BYTES = 2**26
_BLOCK_BYTES = 2**17
_HASHED_BYTES = 2**20
# A service removes an upload after a day unless it is told otherwise; notes that are older are of no use.
_NOTE_SECONDS = 30 * 86400.0
# Making a resource of an upload the service may hash the file and move it to a slow bucket.
_ANSWER_SECONDS = 600.0
_HEADERS = {"Tus-Resumable": "1.0.0"}
_CONFLICT, _TOO_MANY = (f"urn:interplay:problem:{kind}" for kind in ("idempotency-conflict", "too-many-uploads"))

Progress = Callable[[int, int], None]


def push(
    transport: Transport,
    collection: str,
    path: Path,
    spec: Mapping[str, Any],
    source: Path,
    on_progress: Progress | None,
) -> Body | None:
    """Upload a file and make a resource of it; go on with an upload of it that was not finished.

    Args:
        transport: to the service.
        collection: checkpoints, probes or feature-sets.
        path: the file.
        spec: its description for the service.
        source: what a person calls it: the file, or the folder that it was packed from.
        on_progress: called with the bytes that were handed over, and those of the file; after a break with fewer.

    Returns:
        The resource; None if the service takes no resumable upload, so that the file must go in a form.

    Raises:
        ProblemError, ServiceUnreachable: the service did not store it.
        OSError: the file cannot be read.
    """
    with _noted(transport.url, path, source) as note:
        while True:
            upload = _Upload(transport, path, note, on_progress or (lambda *_: None))
            sha256 = upload.send()
            if sha256 is None:
                return None
            try:
                body = _resource(transport, collection, {**spec, "upload_id": note.upload_id, "sha256": sha256})
            except ProblemError as error:
                if error.type == _CONFLICT:
                    # An earlier process made a resource of it, by another spec, and ended before it could say so.
                    note.forget()
                    continue
                if "found" in error.members:
                    # The file has changed on the way: what the service has is of no use.
                    with contextlib.suppress(InterplayError):
                        transport.send("DELETE", f"/v1/uploads/{note.upload_id}", headers=_HEADERS)
                    note.forget()
                raise
            note.forget()
            return body


def _resource(transport: Transport, collection: str, spec: Mapping[str, Any]) -> Body:
    timeout = httpx.Timeout(transport.timeout)
    timeout.read = max(_ANSWER_SECONDS, timeout.read or 0.0)
    parts = [("spec", (None, json.dumps(spec).encode(), "application/json"))]
    # Safe to repeat: the upload becomes one resource.
    return transport.call("POST", f"/v1/{collection}", files=parts, timeout=timeout, repeatable=True)


class _Upload:
    """One file on its way: where it is, and how much the next request may bring."""

    def __init__(self, transport: Transport, path: Path, note: "_Note", on_progress: Progress) -> None:
        self._transport, self._path, self._note, self._on_progress = transport, path, note, on_progress
        self._size_bytes = path.stat().st_size
        self._offset_bytes: int | None = None
        self._since_break_bytes = 0
        self._most_bytes = _MOST_BYTES
        # Whether there has been a break; an upload that is not new has had one.
        self._broken = note.upload_id is not None
        self._retries = transport.retries()
        self._begun, self._reached = 0, False
        # Whether bytes go into the bucket; None until the service says so.
        self._in_parts: bool | None = None
        self._bucket_reached = True

    def send(self) -> str | None:
        """Send what is missing; return the sha256 of the file, or None if the service takes no resumable upload."""
        with self._path.open("rb") as file, _Hashing(self._path) as hashing:
            while True:
                try:
                    if self._note.upload_id is None and not self._begin():
                        return None
                    if self._in_parts is None:
                        told = self._transport.call("GET", self._place, headers=_HEADERS)
                        self._in_parts = told.get("part_bytes") is not None
                    if self._in_parts:
                        self._bring_parts(hashing)
                        return hashing.sha256()
                    if self._offset_bytes is None:
                        self._offset_bytes = self._ask()
                    self._reached = True
                    self._on_progress(self._offset_bytes, self._size_bytes)
                    hashing.reach(self._offset_bytes)
                    if self._offset_bytes == self._size_bytes:
                        return hashing.sha256()
                    self._bring(file, self._offset_bytes)
                except parts.BucketUnreachable:
                    continue
                except (ProblemError, ServiceUnreachable) as error:
                    self._bear(error)

    @property
    def _place(self) -> str:
        return f"/v1/uploads/{self._note.upload_id}"

    def _begin(self) -> bool:
        try:
            headers = {**_HEADERS, "Upload-Length": str(self._size_bytes)}
            if self._bucket_reached:
                headers["Upload-Parts"] = "presigned"
            made = self._transport.call("POST", "/v1/uploads", headers=headers)
        except ProblemError as error:
            if error.status in (404, 405) or error.type == _TOO_MANY:
                return False
            raise
        self._note.keep(made["id"])
        self._begun += 1
        self._in_parts = made.get("part_bytes") is not None
        self._offset_bytes = 0
        return True

    def _bring_parts(self, hashing: "_Hashing") -> None:
        """Send the parts that the bucket lacks; begin anew without parts if it cannot be reached from here."""
        hashing.reach(self._size_bytes)
        try:
            parts.send(self._transport, str(self._note.upload_id), self._path, self._on_progress)
        except parts.BucketUnreachable:
            self._bucket_reached = False
            self._transport.send("DELETE", self._place, headers=_HEADERS)
            self._note.forget()
            self._in_parts = self._offset_bytes = None
            raise

    def _ask(self) -> int:
        answer = self._transport.send("HEAD", self._place, headers=_HEADERS)
        offset = answer.headers.get("Upload-Offset", "")
        if not offset.isdecimal():
            raise ServiceUnreachable(f"{self._transport.url} is not an Interplay service: it told no offset.")
        return int(offset)

    def _bring(self, file: BinaryIO, offset_bytes: int) -> None:
        wanted = max(int(self._since_break_bytes * _PARTS[self._broken]), _LEAST_BYTES[self._broken])
        count = min(wanted, self._most_bytes, self._size_bytes - offset_bytes)
        headers = {
            **_HEADERS,
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(count),
            "Upload-Offset": str(offset_bytes),
        }
        try:
            self._transport.send("PATCH", self._place, headers=headers, content=self._blocks(file, offset_bytes, count))
        except ProblemError as error:
            if error.status == 413 and not error.type.startswith("urn:interplay:") and count > _BLOCK_BYTES:
                # Between here and the service something takes less in one request.
                self._most_bytes = count // 2
                return
            raise
        self._offset_bytes = offset_bytes + count
        self._since_break_bytes += count
        self._retries = self._transport.retries()

    def _blocks(self, file: BinaryIO, offset_bytes: int, count: int) -> Iterator[bytes]:
        file.seek(offset_bytes)
        end = offset_bytes + count
        while offset_bytes < end:
            block = file.read(min(_BLOCK_BYTES, end - offset_bytes))
            if not block:
                raise OSError(f"{self._path} has become shorter while it was sent")
            offset_bytes += len(block)
            self._on_progress(offset_bytes, self._size_bytes)
            yield block

    def _bear(self, error: InterplayError) -> None:
        """Prepare for the next request after an error, and pause; raise it if no other request would end otherwise."""
        self._offset_bytes = None
        self._since_break_bytes, self._broken = 0, True
        if isinstance(error, ProblemError):
            if error.status == 404 and self._note.upload_id is not None and self._begun < 2:
                # Expired, or cancelled: from the beginning.
                self._note.forget()
                self._in_parts = None
                return
            # The offset was another one, or the bytes were damaged on their way: HEAD tells.
            self._retries.pause(error, passing=error.status in (409, 460) or None)
            return
        # What became of bytes that were not answered for HEAD tells.
        self._retries.pause(error, passing=self._reached or None)


class _Hashing:
    """Hashes a file as far as it has been sent, in a thread beside the sending."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._position = 0
        self._ended = Event()

    def reach(self, offset_bytes: int) -> None:
        """Have everything before an offset hashed; one that was reached before changes nothing."""
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._pool.submit(self._advance, offset_bytes)

    def sha256(self) -> str:
        """Wait until all is hashed that was asked for, and return the hash."""
        if self._last is not None:
            self._last.result()
        return self._hash.hexdigest()

    def _advance(self, offset_bytes: int) -> None:
        while self._position < offset_bytes and not self._ended.is_set():
            block = self._file.read(min(_HASHED_BYTES, offset_bytes - self._position))
            if not block:
                raise OSError("the file has become shorter while it was sent")
            self._hash.update(block)
            self._position += len(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)
        self._file.close()


class _Note:
    """What is known of a file's upload, also by a process that comes later."""

    def __init__(self, file: BinaryIO | None, path: Path) -> None:
        self._file, self._path = file, path
        self.upload_id: str | None = None
        if file is not None:
            text = file.read().decode("ascii", "replace")
            self.upload_id = text if len(text) == 36 else None

    def keep(self, upload_id: str) -> None:
        """Note an upload."""
        self.upload_id = upload_id
        if self._file is not None:
            self._write(upload_id)

    def forget(self) -> None:
        """Remove the note: its upload is done, or of no use."""
        self.upload_id = None
        if self._file is not None:
            self._write("")

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text.encode())
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            if self.upload_id is None:
                self._path.unlink(missing_ok=True)
            self._file.close()


@contextmanager
def _noted(url: str, path: Path, source: Path) -> Iterator[_Note]:
    """Yield the note of a file's upload to a service.

    It is locked: another process that sends the same file meanwhile begins an upload of its own, as does one that has
    no folder to keep notes in.
    """
    identity = json.dumps([url, str(source.resolve()), path.stat().st_size, *_states(source)])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "interplay" / "uploads"
    place = folder / hashlib.sha256(identity.encode()).hexdigest()
    file: BinaryIO | None = None
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_old(folder)
        file = os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            file = None
    note = _Note(file, place)
    try:
        yield note
    finally:
        note.close()


def _states(source: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the name, size and modification time, in ns, of a file or of each file in a folder."""
    if not source.is_dir():
        status = source.stat()
        yield source.name, status.st_size, status.st_mtime_ns
        return
    for root, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            with contextlib.suppress(OSError):
                status = Path(root, name).stat()
                yield str(Path(root, name).relative_to(source)), status.st_size, status.st_mtime_ns


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _NOTE_SECONDS:
                path.unlink()

"""Uploads: a multipart form that is parsed as it streams; its file is written and hashed once, directly in staging.

The form has a part `spec` (JSON) and at most one part `file`, in any order. The file is not kept in memory. An upload
that ends early (client, limit or timeout) leaves neither a file nor a row. A request of a resumable upload is its bytes
alone, and leaves what came.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from app import models
from app.errors import InvalidRequest, TooLarge, UnsupportedMedia, UploadIncomplete
from app.settings import Settings
from app.storage import StagedFile, Storage, Upload
from app.uploads import Append

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# A thread hashes and writes one batch at a time: small enough to stay in cache, large enough to be rare.
_BATCH_BYTES = 2**20
# Bytes of a form beside its two parts: boundaries and part headers.
_FORM_BYTES = 64 * 2**10
# A form that people fill in has a dozen.
_MOST_FIELDS = 50


@asynccontextmanager
async def receive(
    request: Request,
    storage: Storage,
    settings: Settings,
    spec_of: Callable[[Mapping[str, str]], bytes] | None = None,
) -> AsyncIterator[Upload]:
    """Receive a form; its staged file is removed at the end of the block unless the storage took it.

    Args:
        request: with the form as its body.
        storage: stages the file.
        settings: limits.
        spec_of: makes the spec from the form's fields, for a form that people fill in: it then has fields of any name
            in place of `spec`.

    Raises:
        UnsupportedMedia: the body is neither a multipart form nor JSON, which is then the spec and has no file.
        TooLarge: the file, the spec or the whole body exceeds its limit; counted as it arrives.
        UploadIncomplete: the body ended before the form did, or came slower than `min_upload_rate` for
            `upload_idle_seconds`.
        InvalidRequest: the form is malformed, or has unknown, repeated or missing parts.
    """
    if spec_of is None and _is_json(request):
        yield Upload(await _whole_spec(request, settings), None)
        return
    parts = _Parts(settings, with_fields=spec_of is not None)
    parser = MultipartParser(_boundary(request), parts.callbacks())
    _refuse_announced_size(request, settings)
    async with AsyncExitStack() as stack:
        writer: _Writer | None = None
        file: StagedFile | None = None
        received_bytes = 0
        async for chunk in _chunks(request, settings):
            received_bytes += len(chunk)
            if received_bytes > _largest_body(settings):
                raise _too_large(settings, received_bytes)
            try:
                parser.write(chunk)
            except FormParserError as error:
                raise InvalidRequest(f"The multipart form is malformed: {error}.") from None
            if parts.has_file and writer is None:
                file = stack.enter_context(await run_in_threadpool(storage.stage))
                writer = await stack.enter_async_context(_Writer(file))
            if writer is not None and len(parts.pending) >= _BATCH_BYTES:
                await writer.write(parts.take())
        if not parts.ended:
            raise UploadIncomplete("The body ended before the form's last boundary.")
        if writer is not None:
            await writer.write(parts.take())
            await writer.finish()
        if spec_of is not None:
            spec = spec_of(parts.texts())
        elif (given := parts.fields.get("spec")) is not None:
            spec = bytes(given)
        else:
            raise InvalidRequest("The form has no part named 'spec' (JSON).")
        yield Upload(spec, file if parts.has_content else None)


async def append(request: Request, addition: Append, settings: Settings) -> models.Upload:
    """Write a request's body to a resumable upload as it arrives; what came is kept, also if the body ends early.

    Args:
        request: with the bytes as its body.
        addition: to the upload.
        settings: limits.

    Raises:
        TooLarge: the upload lacks fewer bytes; nothing is kept.
        UploadIncomplete: the body ended early, or came too slowly.
        ChecksumMismatch: it is not what was announced; nothing is kept.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        addition.require_room(int(announced))
    incomplete = None
    async with _Writer(addition) as writer:
        try:
            async for chunk in _chunks(request, settings):
                await writer.write(chunk)
        except UploadIncomplete as error:
            incomplete = error
        await writer.finish()
    row = await run_in_threadpool(partial(addition.finish, complete=incomplete is None))
    if incomplete is not None:
        raise incomplete
    return row


class _Writer:
    """Writes and hashes what has come in a thread while more comes; a batch is all that came during the last one."""

    def __init__(self, file: StagedFile | Append) -> None:
        self._file = file
        self._pending = bytearray()
        self._taken = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def write(self, data: bytearray | bytes) -> None:
        """Start writing data as soon as all before is written; wait while a batch or more is pending.

        Raises:
            StorageUnavailable: data before could not be written.
        """
        if self._writing is not None and self._writing.done():
            await self.finish()
        self._pending += data
        if self._writing is None:
            self._writing = asyncio.create_task(self._drain())
        while len(self._pending) >= _BATCH_BYTES and not self._writing.done():
            self._taken.clear()
            await self._taken.wait()

    async def finish(self) -> None:
        """Wait until all is written; raise the errors of `write`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def _drain(self) -> None:
        try:
            while self._pending:
                batch, self._pending = self._pending, bytearray()
                self._taken.set()
                await run_in_threadpool(self._file.write, batch)
        finally:
            self._taken.set()

    async def __aenter__(self) -> "_Writer":
        return self

    async def __aexit__(self, *_: object) -> None:
        # The file is closed next, so no thread may still write to it. The error that ended the upload is reported.
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)


def _is_json(request: Request) -> bool:
    kind, _ = parse_options_header(request.headers.get("content-type", ""))
    return kind.lower() == b"application/json"


async def _whole_spec(request: Request, settings: Settings) -> bytes:
    """Return a body that is the spec."""
    body = bytearray()
    limit = settings.max_spec_bytes + settings.max_tokenizer_bytes
    async for chunk in _chunks(request, settings):
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"The spec has more than the {limit} bytes that are allowed.", limit_bytes=limit)
    return bytes(body)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise UnsupportedMedia(
            "Send multipart/form-data with a part 'spec' (JSON) and a part 'file', or the spec alone as JSON."
        )
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 200:
        raise InvalidRequest("The Content-Type has no usable boundary.")
    return boundary


def _refuse_announced_size(request: Request, settings: Settings) -> None:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > _largest_body(settings):
        raise _too_large(settings, int(announced))


def _largest_body(settings: Settings) -> int:
    return settings.max_upload_bytes + settings.max_spec_bytes + settings.max_tokenizer_bytes + _FORM_BYTES


def _too_large(settings: Settings, size_bytes: int) -> TooLarge:
    limit = settings.max_upload_bytes
    return TooLarge(f"The body has {size_bytes} bytes or more; a file may have {limit}.", limit_bytes=limit)


async def _chunks(request: Request, settings: Settings) -> AsyncIterator[bytes]:
    """Yield the body as it arrives and enforce the minimum rate; only time spent waiting for the client counts."""
    stream, loop = request.stream(), asyncio.get_running_loop()
    patience_seconds = settings.upload_idle_seconds
    least_bytes = max(settings.min_upload_rate * patience_seconds, 1)
    waited_seconds, came_bytes = 0.0, 0
    while True:
        asked_at = loop.time()
        try:
            async with asyncio.timeout(patience_seconds - waited_seconds):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UploadIncomplete(
                f"{came_bytes or 'No'} bytes came in {patience_seconds:g} seconds; send at least {least_bytes:.0f}."
            ) from None
        except ClientDisconnect:
            raise UploadIncomplete("The connection was closed before the upload was complete.") from None
        waited_seconds += loop.time() - asked_at
        came_bytes += len(chunk)
        if came_bytes >= least_bytes:
            waited_seconds, came_bytes = 0.0, 0
        yield chunk


class _Parts:
    """The parts parsed so far; `pending` holds bytes of the file that wait to be written."""

    def __init__(self, settings: Settings, *, with_fields: bool) -> None:
        self._settings = settings
        self._with_fields = with_fields
        self._field = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._name = ""
        self._file_bytes = 0
        self._field_bytes = 0
        self.fields: dict[str, bytearray] = {}
        self.has_file = False
        self.pending = bytearray()
        self.ended = False

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": self._add,
            "on_end": self._end,
        }

    @property
    def has_content(self) -> bool:
        """Whether there is a file; of a browser's form in which none was chosen, its part is empty."""
        return self._file_bytes > 0 or not self._with_fields

    def texts(self) -> dict[str, str]:
        """Return the fields as text."""
        return {name: bytes(value).decode("utf-8", "replace") for name, value in self.fields.items()}

    def take(self) -> bytearray:
        batch, self.pending = self.pending, bytearray()
        return batch

    def _begin_part(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode("latin-1")
        if name not in ("spec", "file") and not self._with_fields:
            raise InvalidRequest(f"The form has a part named {name[:80]!r}; only 'spec' and 'file' are known.")
        self._name = name
        if self.has_file if name == "file" else name in self.fields:
            raise InvalidRequest(f"The form has two parts named {name[:80]!r}.")
        if name == "file":
            self.has_file = True
        elif len(self.fields) < _MOST_FIELDS:
            self.fields[name] = bytearray()
        else:
            raise InvalidRequest(f"The form has more than {_MOST_FIELDS} fields.")

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._file_bytes += end - start
            if self._file_bytes > self._settings.max_upload_bytes:
                limit = self._settings.max_upload_bytes
                raise TooLarge(f"The file has more than the {limit} bytes that are allowed.", limit_bytes=limit)
            self.pending += memoryview(data)[start:end]
            return
        self.fields[self._name] += memoryview(data)[start:end]
        self._field_bytes += end - start
        # The spec may contain a tokenizer beside its other fields.
        limit = self._settings.max_spec_bytes + self._settings.max_tokenizer_bytes
        if self._field_bytes > limit:
            raise TooLarge(f"The spec has more than the {limit} bytes that are allowed.", limit_bytes=limit)

    def _end(self) -> None:
        self.ended = True

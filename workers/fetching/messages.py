"""What a worker and its fetching process tell each other, one line of JSON each."""

from datetime import datetime
from typing import Any

from pydantic import TypeAdapter

from app.errors import ServiceError, first_line, problem
from app.schemas.base import Makes
from app.staging import StorageFull, StorageUnavailable
from workers.tasks import Frozen, Json, Progress


class Order(Frozen):
    """Worker to process: what to fetch.

    Attributes:
        source: address of the file or the folder.
        of_adapter: whether a folder is an adapter's, and not a network's.
        makes: what the file becomes.
        path: where the file is written; what lies there already is gone on with.
        sources: INTERPLAY_SOURCES, which decides where redirects may lead.
        hub_url: the Hub, or its mirror.
        silence_seconds: a connection may bring nothing for so long.
        patience_seconds: all connections together may.
        max_bytes: largest file.
    """

    source: str
    of_adapter: bool
    makes: Makes
    path: str
    sources: str
    hub_url: str
    silence_seconds: float
    patience_seconds: float
    max_bytes: int


class FetchedFile(Frozen):
    """A file that was fetched, as its source named it then.

    Attributes:
        name: within its folder, or the last part of its address.
        size_bytes: its size.
        etag: the source's own mark of its content, if it gives one.
        version: the bucket's version of it, likewise.
        sha256: of its bytes; None if only some of them were fetched.
    """

    name: str
    size_bytes: int
    etag: str | None
    version: str | None
    sha256: str | None


class Origin(Frozen):
    """Where a resource's file came from.

    Attributes:
        source: the address, without its query.
        revision: of the Hub: the commit.
        fetched_at: when the last byte came.
        n_files: the number of files that it was made of.
        files: the first of them.
    """

    source: str
    revision: str | None
    fetched_at: datetime
    n_files: int
    files: list[FetchedFile]


class Fetched(Frozen):
    """A whole file.

    Attributes:
        sha256: of the file.
        size_bytes: its size.
        origin: where it came from.
        descriptions: the folder's config.json, preprocessor_config.json, tokenizer.json and adapter_config.json, by
            `config`, `preprocessor`, `tokenizer` and `adapter`; empty for a single file.
    """

    sha256: str
    size_bytes: int
    origin: Origin
    descriptions: dict[str, Any]


class Told(Frozen):
    """Process to worker: one of progress, the file, and the problem that prevented it."""

    progress: Progress | None = None
    fetched: Fetched | None = None
    problem: Json | None = None


TOLD: TypeAdapter[Told] = TypeAdapter(Told)


def problem_of(error: Exception) -> Json:
    """Return the problem of a fetch that an error has ended."""
    match error:
        case ServiceError():
            return error.problem()
        case StorageFull():
            return problem("insufficient-storage", "The disk or the storage is full", f"{error}.")
        case StorageUnavailable():
            return problem("storage-unavailable", "The storage does not answer", f"{error}.")
        case BlockingIOError():
            return problem("storage-unavailable", "The storage does not answer", "Another process writes the file.")
    return problem("unavailable", "The database does not answer", f"{first_line(error)}.")

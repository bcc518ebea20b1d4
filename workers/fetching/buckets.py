"""Files in buckets (s3://, gs://, az://), through obstore, which the blobs are stored with too."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError

from app.errors import SourceDenied, SourceMissing, first_line
from app.sources import Source
from app.storage import open_store
from workers.fetching.origins import MOST_FILES, Changed, Found, Interrupted, Remote, around_index, is_index

if TYPE_CHECKING:
    from obstore import GetOptions

_CHUNK_BYTES = 2**20
# What obstore says of answers that trying again does not change: 4xx but for those that ask for patience, which have no
# class of their own, and a bucket of another region.
_FINAL = re.compile(r"status code: 4(?!08|25|29)\d\d|incorrectly configured region|invalid peer certificate")


class Bucket:
    """A bucket. Its credentials are those in this process's environment, by the usual names.

    Args:
        source: the address.
        signed: whether there are credentials; without, requests are those of a stranger.
        silence_seconds: a connection may bring nothing for so long.

    Raises:
        SourceDenied: what the environment holds cannot be credentials.
    """

    def __init__(self, source: Source, *, signed: bool, silence_seconds: float) -> None:
        self._source = source
        try:
            self._store = open_store(f"{source.scheme}://{source.place}", silence_seconds, signed=signed)
        except (BaseError, ValueError) as error:
            raise SourceDenied(
                f"The credentials for {source.shown} are not complete, or none: {first_line(error)}."
            ) from None

    def look(self) -> Found:
        """Return the object of this key, or, if there is none, those below it."""
        key = self._source.path
        if key and not key.endswith("/"):
            with self._errors(key):
                try:
                    found = self._remote(obstore.head(self._store, key), key.rpartition("/")[2])
                except FileNotFoundError:
                    found = None
            if found is not None and is_index(found.name):
                folder, _, name = key.rpartition("/")
                return Found(None, around_index(self._below(folder), name))
            if found is not None:
                return Found(found, {})
        files = self._below(key.rstrip("/"))
        if not files:
            raise SourceMissing(f"{self._source.shown} holds no such file, and nothing lies below that name.")
        return Found(None, files)

    def read(self, file: Remote, begin: int, end: int) -> Iterator[bytes]:
        """Yield a range of an object, if it is still the same."""
        options: GetOptions = {"range": (begin, end)}
        # Not by its version, which other permissions are needed for.
        if file.identity is not None:
            options["if_match"] = file.identity
        left = end - begin
        with self._errors(file.address):
            result = obstore.get(self._store, file.address, options=options)
            # Also where the server does not know If-Match.
            if (result.meta["size"], result.meta["e_tag"]) != (file.size_bytes, file.mark):
                raise Changed(f"{file.name} is another file now")
            for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
                left -= len(chunk)
                yield bytes(chunk)
        if left:
            raise Interrupted(f"{file.name} ended {left} bytes early")

    def close(self) -> None:
        """Nothing is open between two requests."""

    def _below(self, folder: str) -> dict[PurePosixPath, Remote]:
        files: dict[PurePosixPath, Remote] = {}
        with self._errors(folder):
            for entries in obstore.list(self._store, prefix=folder or None):
                for entry in entries:
                    name = entry["path"].removeprefix(f"{folder}/" if folder else "")
                    files[PurePosixPath(name)] = self._remote(entry, name)
                if len(files) > MOST_FILES:
                    raise SourceMissing(
                        f"More than {MOST_FILES} files lie below {self._source.shown}; name one folder."
                    )
        return files

    @staticmethod
    def _remote(entry: "obstore.ObjectMeta", name: str) -> Remote:
        mark = entry["e_tag"]
        identity = None if mark is None or mark.startswith("W/") else mark
        return Remote(name, entry["path"], entry["size"], mark, identity, entry["version"])

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Say what an error of the store means."""
        try:
            yield
        except FileNotFoundError:
            raise SourceMissing(f"The bucket of {self._source.shown} has no {key!r}.") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise SourceDenied(f"The bucket of {self._source.shown} refuses: {first_line(error)}.") from None
        except PreconditionError:
            raise Changed(f"{key} is another file now") from None
        except (BaseError, OSError, ValueError) as error:
            # What follows is a page of XML; the address may hold a password.
            said = re.sub(r"https?://\S+", "it", first_line(error).partition(": <?xml")[0])
            if "status code: 404" in said:
                raise SourceMissing(f"There is no bucket of {self._source.shown}: {said}.") from None
            if _FINAL.search(said):
                raise SourceDenied(f"The bucket of {self._source.shown} refuses: {said}.") from None
            raise Interrupted(said) from None

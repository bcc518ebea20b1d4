"""Upload files to the service, also when a response is lost: large ones in a resumable way, others in a form.

Sending a form twice creates two resources. So an upload is retried at once only if the service did nothing (it was
busy, or refused the connection). If that is unknown, the client first asks the service whether it has the file.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from interplay import resumable
from interplay.transport import Body, ProblemError, Retries, ServiceUnreachable, Transport, may_be_done

# After the last byte of an upload the service still moves the file to its storage, which may be a slow bucket.
_ANSWER_SECONDS = 600.0


def push(
    transport: Transport,
    collection: str,
    path: Path,
    spec: Mapping[str, Any],
    *,
    source: Path | None = None,
    on_progress: resumable.Progress | None = None,
) -> Body:
    """Upload a file with its spec; it streams from disk, whatever its size.

    Args:
        transport: to the service.
        collection: checkpoints, probes or feature-sets.
        path: the file.
        spec: its description for the service, with its `name`.
        source: the folder that the file was packed from; default: the file itself.
        on_progress: called with the bytes of a large file that were handed over, and with its size.

    Raises:
        ProblemError, ServiceUnreachable: the service did not store it, or that is unknown.
    """
    if path.stat().st_size > resumable.LEAST_BYTES:
        made = resumable.push(transport, collection, path, spec, source or path, on_progress)
        if made is not None:
            return made
    began, retries = time.monotonic(), transport.retries()
    while True:
        try:
            return _send(transport, collection, path, spec)
        except (ProblemError, ServiceUnreachable) as error:
            unknown = may_be_done(error)
            if unknown and not _is_stored_as_it_is(collection, path):
                raise  # the service could not say whether it has it
            retries.pause(error)
        if unknown and (kept := _kept(transport, retries, collection, path, spec["name"], began)):
            return kept


def _send(transport: Transport, collection: str, path: Path, spec: Mapping[str, Any]) -> Body:
    timeout = httpx.Timeout(transport.timeout)
    timeout.read = max(_ANSWER_SECONDS, timeout.read or 0.0)
    with path.open("rb") as file:
        # The spec goes first, so that an upload in progress shows its description.
        parts = [
            ("spec", (None, json.dumps(spec).encode(), "application/json")),
            ("file", (path.name, file, "application/octet-stream")),
        ]
        return transport.call("POST", f"/v1/{collection}", files=parts, timeout=timeout)


def _kept(transport: Transport, retries: Retries, collection: str, path: Path, name: str, began: float) -> Body | None:
    """Return the resource of an upload whose response was lost: same file, same name, created since it began."""
    place = f"/v1/{collection}"
    asked = transport.send("GET", place, params={"name": name, "limit": 1}, repeatable=True, retries=retries)
    try:
        # The service's own clock, which gives whole seconds.
        now = parsedate_to_datetime(asked.headers.get("Date", ""))
    except ValueError:
        raise ServiceUnreachable(
            f"It is unknown whether {transport.url} stored the file: its response has no date."
        ) from None
    since = now - timedelta(seconds=time.monotonic() - began + 2)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    query = {"name": name, "created_after": since.isoformat(), "limit": 100}
    items: list[Body] = transport.call("GET", place, params=query, repeatable=True, retries=retries)["items"]
    return next((item for item in items if item["sha256"] == sha256), None)


def _is_stored_as_it_is(collection: str, path: Path) -> bool:
    """Return whether the service's sha256 is the file's own; for a checkpoint in an archive it is the weights'."""
    if collection != "checkpoints":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"

"""Send a file straight into the service's bucket: parts, several at a time, to URLs that the service has signed."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import httpx

from interplay.transport import Body, InterplayError, ServiceUnreachable, Transport

_AT_A_TIME = 4
# URLs are asked for in few steps, so that they are used long before they end.
_URLS = 16
_BLOCK_BYTES = 2**17


class BucketUnreachable(InterplayError):
    """This machine does not reach the bucket: it may be in a network of the service's own."""


def send(transport: Transport, upload_id: str, path: Path, on_progress: Callable[[int, int], None]) -> None:
    """Send all parts of a file that the bucket lacks.

    Args:
        transport: to the service.
        upload_id: of an upload in parts.
        path: the file.
        on_progress: called with the bytes that the bucket has or was handed, and those of the file; after a part that
            failed with fewer.

    Raises:
        BucketUnreachable: no connection to the bucket comes about.
        ProblemError, ServiceUnreachable: service or bucket fail for longer than calls are retried.
        OSError: the file cannot be read.
    """
    retries = transport.retries()
    size_bytes, lock = path.stat().st_size, Lock()
    at = size_bytes - _missing(transport, upload_id)["missing_bytes"]
    on_progress(at, size_bytes)

    def count(n_bytes: int) -> None:
        nonlocal at
        with lock:
            at += n_bytes
            on_progress(at, size_bytes)

    # Without the service's key: the URLs are enough, and the bucket may be somebody else's.
    with httpx.Client(timeout=transport.timeout) as bucket, ThreadPoolExecutor(_AT_A_TIME) as pool:
        reached = False
        while parts := _missing(transport, upload_id)["missing"]:
            outcomes = list(pool.map(lambda part: _put(bucket, path, part, count), parts))
            failures = [outcome for outcome in outcomes if outcome is not None]
            if not failures:
                retries = transport.retries()
            elif not reached and all(isinstance(failure, httpx.ConnectError) for failure in failures):
                raise BucketUnreachable(f"The bucket cannot be reached from here: {failures[0]}.")
            else:
                retries.pause(ServiceUnreachable(f"The bucket does not take the file: {failures[0]}.", passing=True))
            reached = reached or len(failures) < len(outcomes)


def _missing(transport: Transport, upload_id: str) -> Body:
    return transport.call("GET", f"/v1/uploads/{upload_id}/parts", params={"limit": _URLS}, repeatable=True)


def _put(bucket: httpx.Client, path: Path, part: Body, count: Callable[[int], None]) -> Exception | None:
    """Send one part; return why it did not arrive, or None."""
    sent = 0

    def blocks() -> Iterator[bytes]:
        nonlocal sent
        with path.open("rb") as file:
            file.seek(part["offset_bytes"])
            while left := part["size_bytes"] - sent:
                block = file.read(min(_BLOCK_BYTES, left))
                if not block:
                    raise OSError(f"{path} has become shorter while it was sent")
                sent += len(block)
                count(len(block))
                yield block

    try:
        answer = bucket.put(part["url"], content=blocks(), headers={"Content-Length": str(part["size_bytes"])})
    except httpx.HTTPError as error:
        count(-sent)
        return error
    if answer.is_success:
        return None
    count(-sent)
    return OSError(f"it answered {answer.status_code} {answer.text[:200]}")

"""Waiting for an analysis: told by the service as it goes on, or by asking again and again where that is not to be had.

A stream may be missing (an older service, one with too many listeners), be held back by a proxy that gathers what it
passes on, or end at any moment, as at a restart. So between two streams the service is asked; a stream that told
nothing while it was open, or that there is not, is not tried for ever.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

from interplay.transport import Body, InterplayError, ServiceUnreachable, Transport, WaitTimeout, segment

# The service sends something every 5 s, its first event at once: who says nothing for so long is no live stream.
_SILENCE_SECONDS = 7.5
# The last seconds of a wait with an end are asked for, not listened to: a read that has begun cannot be shortened.
_TOO_SHORT_SECONDS = 10.0
_USELESS_STREAMS = 3


class _NoStream(InterplayError):
    """There is no stream here, and will be none."""


def looks(
    transport: Transport, analysis_id: str, *, poll_seconds: float, timeout_seconds: float | None
) -> Iterator[Body]:
    """The states of an analysis, as they come; the caller stops at the one that it waits for.

    Args:
        transport: to the service.
        analysis_id: which.
        poll_seconds: pause between two questions, where there is no stream.
        timeout_seconds: give up after so long.

    Raises:
        WaitTimeout: the time was up.
        ProblemError, ServiceUnreachable: the service was asked, and there was no answer within the retries.
    """
    path = f"/v1/analyses/{segment(analysis_id)}"
    end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    useless = 0
    while True:
        if useless < _USELESS_STREAMS and _left(end) > _TOO_SHORT_SECONDS:
            useless += 1
            try:
                for state in _told(transport, f"{path}/events", end):
                    useless = 0
                    yield state
            except _NoStream:
                useless = _USELESS_STREAMS
            except ServiceUnreachable as error:
                # Silence from the beginning is a proxy that holds everything back; anything else may pass.
                if useless and not error.passing:
                    useless = _USELESS_STREAMS
        yield transport.call("GET", path, repeatable=True)
        if _left(end) <= 0:
            raise WaitTimeout(f"Analysis {analysis_id} has not ended within {timeout_seconds:g} s; it goes on.")
        time.sleep(min(poll_seconds, max(_left(end), 0.0)))


def _left(end: float | None) -> float:
    return float("inf") if end is None else end - time.monotonic()


def _told(transport: Transport, path: str, end: float | None) -> Iterator[Body]:
    """The states that a stream tells, until it ends, or there is too little time left to listen.

    Raises:
        _NoStream: what answers is no stream.
        ServiceUnreachable: it broke, or fell silent.
    """
    with transport.stream(path, silence_seconds=_SILENCE_SECONDS) as response:
        if response.status_code >= 500:
            return
        if response.status_code != 200 or not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise _NoStream(f"{response.status_code} in place of a stream of events")
        data: list[bytes] = []
        for line in _lines(response.iter_bytes()):
            if line.startswith(b"data:"):
                data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and data:
                yield _state(b"\n".join(data))
                data = []
            if _left(end) <= _TOO_SHORT_SECONDS:
                return


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines by the ends that the format knows; text may hold others, such as U+2028, that httpx would break it at."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")


def _state(data: bytes) -> Body:
    try:
        state: Any = json.loads(data)
    except ValueError:
        state = None
    if not (isinstance(state, dict) and "status" in state):
        raise _NoStream("an event that is no analysis")
    return state

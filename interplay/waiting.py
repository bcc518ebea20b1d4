"""Wait for an analysis: by server-sent events, and by polling where there are none. Wait for a fetch: by polling.

A stream may be missing (an older service, one with too many listeners), be buffered by a proxy, or end at any moment,
as at a restart. So the service is polled between two streams. After a few streams without an event only polling goes
on.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

from interplay.transport import Body, InterplayError, ServiceUnreachable, Transport, WaitTimeout, segment

# The service sends something every 5 s, and its first event at once: a stream that is silent for longer is dead.
_SILENCE_SECONDS = 7.5
# The last seconds before the timeout are polled: a read that has begun cannot be shortened.
_TOO_SHORT_SECONDS = 10.0
_USELESS_STREAMS = 3
# Of fetches.
_FIRST_POLL_SECONDS, _POLL_SECONDS, _OFTEN_SECONDS = 0.2, 1.0, 4.0


def poll_states(
    transport: Transport, analysis_id: str, *, poll_seconds: float, timeout_seconds: float | None
) -> Iterator[Body]:
    """Yield the states of an analysis as they change; the caller stops at the one that it waits for.

    Args:
        transport: to the service.
        analysis_id: which.
        poll_seconds: pause between two polls, where there is no stream.
        timeout_seconds: give up after so long.

    Raises:
        WaitTimeout: the timeout has passed.
        ProblemError, ServiceUnreachable: a poll failed, also after its retries.
    """
    path = f"/v1/analyses/{segment(analysis_id)}"
    end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    useless = 0
    while True:
        if useless < _USELESS_STREAMS and _left(end) > _TOO_SHORT_SECONDS:
            useless += 1
            try:
                for state in _stream_states(transport, f"{path}/events", end):
                    useless = 0
                    yield state
            except _NoStream:
                useless = _USELESS_STREAMS
            except ServiceUnreachable as error:
                # Silence from the beginning means that a proxy buffers the stream; other failures may be temporary.
                if useless and not error.passing:
                    useless = _USELESS_STREAMS
        yield transport.call("GET", path, repeatable=True)
        if _left(end) <= 0:
            raise WaitTimeout(f"Analysis {analysis_id} has not ended within {timeout_seconds:g} s; it continues.")
        time.sleep(min(poll_seconds, max(_left(end), 0.0)))


def poll_fetch(transport: Transport, fetch_id: str, *, timeout_seconds: float | None) -> Iterator[Body]:
    """Yield the states of a fetch, of which the service has no stream; the caller stops at the one that it waits for.

    Args:
        transport: to the service.
        fetch_id: which.
        timeout_seconds: give up after so long.

    Raises:
        WaitTimeout: the timeout has passed.
        ProblemError, ServiceUnreachable: a poll failed, also after its retries.
    """
    began = time.monotonic()
    end = None if timeout_seconds is None else began + timeout_seconds
    while True:
        yield transport.call("GET", f"/v1/fetches/{segment(fetch_id)}", repeatable=True)
        if _left(end) <= 0:
            raise WaitTimeout(f"Fetch {fetch_id} has not ended within {timeout_seconds:g} s; it continues.")
        # A small file is there at once; of a large one nobody sees the difference.
        pause = _FIRST_POLL_SECONDS if time.monotonic() - began < _OFTEN_SECONDS else _POLL_SECONDS
        time.sleep(min(pause, max(_left(end), 0.0)))


class _NoStream(InterplayError):
    """The service has no stream for this analysis."""


def _left(end: float | None) -> float:
    return float("inf") if end is None else end - time.monotonic()


def _stream_states(transport: Transport, path: str, end: float | None) -> Iterator[Body]:
    """Yield the states of one stream until it ends, or too little time is left.

    Raises:
        _NoStream: the answer is not a stream of events.
        ServiceUnreachable: the stream broke or fell silent.
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
    """Split at line feeds alone: httpx would also split at U+2028, which data may hold."""
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

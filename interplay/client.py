"""The HTTP client of an Interplay service.

    with Client() as client:
        checkpoint = client.push_checkpoint("net.safetensors", name="net", metadata={"epoch": 10})
        probe = client.push_probe("digits.safetensors", name="digits")
        analysis = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe["id"])
        report = client.get_report(client.wait(analysis["id"])["report_id"])

Results are plain dictionaries, as the service sends them; interplay/results.py gives editors and mypy their keys.
Transient failures are retried: interplay/transport.py documents which, and the exceptions that callers can catch.
"""

import os
from types import TracebackType
from typing import Self

from interplay.calls.analyzing import AnalyzingCalls
from interplay.calls.collections import Collection, NotOne
from interplay.calls.judging import JudgingCalls
from interplay.calls.pushing import PushingCalls
from interplay.transport import (
    DEFAULT_URL,
    AnalysisFailed,
    Body,
    FetchFailed,
    InterplayError,
    ProblemError,
    ServiceUnreachable,
    Transport,
    WaitTimeout,
    segment,
)

__all__ = [
    "DEFAULT_URL",
    "AnalysisFailed",
    "Body",
    "Client",
    "FetchFailed",
    "InterplayError",
    "NotOne",
    "ProblemError",
    "ServiceUnreachable",
    "WaitTimeout",
]

_RETRY_SECONDS = 30.0


class Client(PushingCalls, AnalyzingCalls, JudgingCalls):
    """One service, over HTTP. Use it as a context manager, or call `close`.

    Args:
        url: the service's URL; default: the variable INTERPLAY_URL, else http://127.0.0.1:8321.
        api_key: sent as a bearer token; default: the variable INTERPLAY_API_KEY, else none.
        timeout: seconds without network activity after which a call gives up.
        retry_seconds: how long a call is retried after transient failures, in growing pauses; 0 tries once. Default:
            the variable INTERPLAY_RETRY_SECONDS, else 30.

    Raises:
        ValueError: `url` is not an http or https URL, or INTERPLAY_RETRY_SECONDS is not a number of seconds.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        retry_seconds: float | None = None,
    ) -> None:
        self._transport = Transport(
            url or os.environ.get("INTERPLAY_URL") or DEFAULT_URL,
            api_key or os.environ.get("INTERPLAY_API_KEY"),
            timeout,
            _retry_seconds() if retry_seconds is None else retry_seconds,
        )
        self.url = self._transport.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def readiness(self) -> Body | None:
        """Return what the service says of its database, its storage and its workers at /readyz; None without a word."""
        return self._transport.peek("/readyz")

    def page_of(self, collection: Collection, resource_id: str) -> str:
        """Return the address of the page that shows a resource to people."""
        return f"{self.url}/{collection}/{segment(resource_id)}"


def _retry_seconds() -> float:
    text = os.environ.get("INTERPLAY_RETRY_SECONDS") or str(_RETRY_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"INTERPLAY_RETRY_SECONDS is {text!r}; it must be a number of seconds, at least 0.")
    return seconds

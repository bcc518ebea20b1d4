"""HTTP to an Interplay service: what can go wrong, told apart, and what is tried again.

    InterplayError          what a caller can expect to catch
    ├── ProblemError        the service answered with a problem (RFC 9457)
    ├── ServiceUnreachable  nothing answered at the URL, or what answered is no Interplay service
    ├── AnalysisFailed      an analysis that was waited for ended as failed or cancelled
    └── WaitTimeout         it had not ended when the time was up

Tried again is what may pass by itself (429, 502, 503, 504, a connection that broke, one that is refused by a service
which answered before) and what does no harm when it is done twice; who calls says which that is.
"""

import ipaddress
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import httpx

DEFAULT_URL = "http://127.0.0.1:8321"
Body = dict[str, Any]

# uvicorn closes a connection that was idle for 5 s. Ours must go first: a request that is written while the other
# side closes is lost, and an upload cannot always be sent twice behind the caller's back.
_KEEPALIVE_SECONDS = 2.0
_PASSING = (429, 502, 503, 504)
# Of these whoever answered says that it did nothing; of the others nobody knows.
_REFUSING = (429, 503)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0


class InterplayError(Exception):
    """Base of what this client raises; its text is meant for a person."""


class ProblemError(InterplayError):
    """The service answered with a problem.

    Attributes:
        status: HTTP status.
        type: identifier of the kind of problem; docs/problems.md lists them.
        title: the kind in words.
        detail: what was wrong this time.
        members: the problem's other members, such as lists of names.
        retry_after: seconds after which the service wants to be asked again, where it says so.
    """

    def __init__(self, status: int, problem: Mapping[str, Any], retry_after: float | None = None) -> None:
        members = dict(problem)
        members.pop("status", None)
        self.status = status
        self.type = str(members.pop("type", "about:blank"))
        self.title = str(members.pop("title", f"HTTP {status}"))
        self.detail = str(members.pop("detail", ""))
        self.members: Body = members
        self.retry_after = retry_after
        super().__init__(f"{self.title}: {self.detail}" if self.detail else self.title)


class ServiceUnreachable(InterplayError):
    """Nothing answered at the URL in time, or what answered is no Interplay service.

    Attributes:
        passing: whether it is worth trying again.
        refused: no connection was made, so nothing was done.
    """

    def __init__(self, text: str, *, passing: bool = False, refused: bool = False) -> None:
        super().__init__(text)
        self.passing, self.refused = passing, refused


class AnalysisFailed(InterplayError):
    """An analysis that was waited for ended as `failed` or `cancelled`.

    Attributes:
        analysis: its last state.
        problem: why, as the service says it; None where it was cancelled.
    """

    def __init__(self, analysis: Mapping[str, Any]) -> None:
        self.analysis = analysis
        self.problem: Body | None = analysis.get("problem")
        reason = f"{self.problem.get('title')}: {self.problem.get('detail')}" if self.problem else analysis["status"]
        super().__init__(f"Analysis {analysis['id']}: {reason}")


class WaitTimeout(InterplayError):
    """The analysis had not ended when the time was up; it goes on."""


class Retries:
    """The further attempts of one call: pauses that double, with jitter, within a number of seconds in all.

    Args:
        seconds: from the first failure; no attempt begins later. 0 for none.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self.used = 0

    def pause(self, error: InterplayError) -> None:
        """Sleep before the next attempt.

        Raises:
            InterplayError: the error itself, where trying again is of no use or the time is up.
        """
        if not is_passing(error):
            raise error
        now = time.monotonic()
        self._deadline = now + self._seconds if self._deadline is None else self._deadline
        longest = min(_FIRST_PAUSE_SECONDS * 2**self.used, _LONGEST_PAUSE_SECONDS)
        # Half of it by chance: clients that one outage has cut off do not come back at one instant.
        seconds = longest * random.uniform(0.5, 1)  # noqa: S311 - nobody gains by guessing it
        seconds += getattr(error, "retry_after", None) or 0.0
        if now + seconds > self._deadline:
            raise error
        time.sleep(seconds)
        self.used += 1


def is_passing(error: InterplayError) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, ProblemError):
        return error.status in _PASSING
    return isinstance(error, ServiceUnreachable) and error.passing


def may_be_done(error: InterplayError) -> bool:
    """Whether the service may have done what was asked, though its answer did not come."""
    if isinstance(error, ProblemError):
        return error.status not in _REFUSING
    return not (isinstance(error, ServiceUnreachable) and error.refused)


class Transport:
    """The connections to one service.

    Args:
        url: http or https.
        key: sent as a bearer token.
        timeout: seconds without a sign of life after which a call gives up.
        retry_seconds: for how long a call is tried again.

    Raises:
        ValueError: `url` is not an http or https URL, or no header can carry the key.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retry_seconds: float) -> None:
        self.url = url.rstrip("/")
        host = _host(self.url)
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("The API key holds characters that a header cannot carry.")
        self._retry_seconds = retry_seconds
        self._answered = False
        self.timeout = httpx.Timeout(timeout)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.timeout,
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS),
            # A proxy from the environment is for other machines; it cannot reach our loopback.
            trust_env=not _is_loopback(host),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def retries(self) -> Retries:
        """The further attempts of a call that is about to begin."""
        return Retries(self._retry_seconds)

    def call(self, method: str, path: str, **request: Any) -> Body:
        """What `send` answers, which must be a JSON object."""
        response = self.send(method, path, **request)
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ServiceUnreachable(f"What answers at {self.url} is no Interplay service: its answer is not JSON.")
        return body

    def send(
        self, method: str, path: str, *, repeatable: bool = False, retries: Retries | None = None, **request: Any
    ) -> httpx.Response:
        """Send a request and give its answer, which is a success.

        Args:
            method: of HTTP.
            path: below the service's URL.
            repeatable: doing it twice does no harm, so it is tried again.
            retries: those of a larger call that this is a part of; default: its own.
            request: what httpx takes.

        Raises:
            ProblemError: the answer is a problem.
            ServiceUnreachable: there is no answer.
            ValueError: a number that should be sent is NaN or infinite.
        """
        _require_finite(request.get("json"), ())
        left = retries or self.retries()
        while True:
            try:
                with self._errors():
                    response = self._http.request(method, path, **request)
                self._answered = True
                if response.is_success:
                    return response
                raise self._problem(response)
            except (ProblemError, ServiceUnreachable) as error:
                if not repeatable:
                    raise
                left.pause(error)

    @contextmanager
    def stream(self, path: str, *, silence_seconds: float) -> Iterator[httpx.Response]:
        """GET whose answer is read as it comes; whatever its status.

        Raises:
            ServiceUnreachable: it breaks, or nothing comes for so many seconds.
        """
        timeout = httpx.Timeout(self.timeout)
        timeout.read = silence_seconds
        with (
            self._errors(),
            self._http.stream("GET", path, timeout=timeout, headers={"Accept": "text/event-stream"}) as response,
        ):
            self._answered = True
            yield response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What httpx raises, as what callers of this module catch."""
        try:
            yield
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            text = f"The connection to {self.url} broke: {error or type(error).__name__}."
            raise ServiceUnreachable(text, passing=True) from error
        except httpx.TimeoutException as error:
            raise ServiceUnreachable(f"{self.url} did not answer in time ({type(error).__name__}).") from error
        except httpx.TransportError as error:
            # Who has answered before is starting again; who never has may not be there at all.
            text = f"{self.url} cannot be reached: {error or type(error).__name__}."
            refused = isinstance(error, httpx.ConnectError)
            raise ServiceUnreachable(text, passing=refused and self._answered, refused=refused) from error
        except httpx.DecodingError as error:
            raise ServiceUnreachable(f"What answers at {self.url} is no Interplay service: {error}.") from error

    def _problem(self, response: httpx.Response) -> ProblemError:
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            # Not ours: a proxy between here and the service, or another server.
            problem = {"title": f"{self.url} answered {response.status_code}", "detail": response.text[:300].strip()}
        return ProblemError(response.status_code, problem, _retry_after(response.headers.get("Retry-After", "")))


def segment(identifier: str) -> str:
    """An identifier as one segment of a path."""
    # An id is typed by people: "a/b" or "?x" must stay one unknown id, never become another route.
    return quote(identifier, safe="") or "%20"


def _require_finite(value: Any, place: tuple[str, ...]) -> None:
    """What JSON has no way to say is told by its place, as httpx's own words name none."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{'.'.join(place)} is {value}, which is not a finite number.")
    if isinstance(value, Mapping):
        for key, member in value.items():
            _require_finite(member, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            _require_finite(member, (*place, str(index)))


def _retry_after(text: str) -> float | None:
    """Seconds, of a header that gives them or an instant."""
    if text.isdecimal():
        return float(text[:9])
    try:
        instant = parsedate_to_datetime(text)
    except ValueError:
        return None
    instant = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    return max((instant - datetime.now(UTC)).total_seconds(), 0.0)


def _host(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is not a URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is not an http or https URL, such as {DEFAULT_URL}")
    return parsed.host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

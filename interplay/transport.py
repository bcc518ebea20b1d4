"""HTTP to an Interplay service: its exceptions and its retries.

    InterplayError          base of the exceptions that a caller can catch
    ├── ProblemError        the service responded with a problem (RFC 9457)
    ├── ServiceUnreachable  no response from the URL, or one that is not from an Interplay service
    ├── AnalysisFailed      an analysis that was waited for ended as failed or cancelled
    ├── FetchFailed         the same of a fetch
    └── WaitTimeout         it had not ended when the timeout passed

A request is retried if its failure may be transient (423, 429, 502, 503, 504, a broken connection, or one refused by a
service that responded before) and if the caller marks it as safe to repeat.
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

# uvicorn closes a connection that was idle for 5 s. The client must close first: a request written while the other side
# closes is lost, and an upload cannot always be retried without the caller knowing.
_KEEPALIVE_SECONDS = 2.0
_PASSING = (423, 429, 502, 503, 504)
# With these the server states that it did nothing; with the others the effect is unknown.
_REFUSING = (423, 429, 503)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0


class InterplayError(Exception):
    """Base of this client's exceptions; its text is meant for a person."""


class ProblemError(InterplayError):
    """The service responded with a problem.

    Attributes:
        status: HTTP status.
        type: identifier of the kind of problem; docs/problems.md lists them.
        title: the kind in words.
        detail: the fault in this case.
        members: the problem's other members, for example lists of names.
        retry_after: seconds until the service wants a retry, if it sent them.
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
    """The URL did not respond in time, or the response is not from an Interplay service.

    Attributes:
        passing: whether a retry may succeed.
        refused: whether no connection was made, so that the service did nothing.
    """

    def __init__(self, text: str, *, passing: bool = False, refused: bool = False) -> None:
        super().__init__(text)
        self.passing, self.refused = passing, refused


class AnalysisFailed(InterplayError):
    """An analysis that was waited for ended as `failed` or `cancelled`.

    Attributes:
        analysis: its last state.
        problem: the service's problem; None if it was cancelled.
    """

    def __init__(self, analysis: Mapping[str, Any]) -> None:
        self.analysis = analysis
        self.problem: Body | None = analysis.get("problem")
        super().__init__(f"Analysis {analysis['id']}: {_reason(analysis)}")


class FetchFailed(InterplayError):
    """A fetch that was waited for ended as `failed` or `cancelled`.

    Attributes:
        fetch: its last state.
        problem: the service's problem; None if it was cancelled.
    """

    def __init__(self, fetch: Mapping[str, Any]) -> None:
        self.fetch = fetch
        self.problem: Body | None = fetch.get("problem")
        super().__init__(f"Fetch {fetch['id']}: {_reason(fetch)}")


class WaitTimeout(InterplayError):
    """The analysis or the fetch had not ended when the timeout passed; it continues."""


class Retries:
    """The retries of one call: pauses that double, with jitter, within a total number of seconds.

    Args:
        seconds: from the first failure; no retry begins later. 0 for no retries.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self.used = 0

    def pause(self, error: InterplayError, *, passing: bool | None = None) -> None:
        """Sleep before the next attempt.

        Args:
            error: of the last attempt.
            passing: whether a caller knows that a retry may succeed; default: what `is_passing` says.

        Raises:
            InterplayError: the error itself, if it is not transient or the time is up.
        """
        if not (is_passing(error) if passing is None else passing):
            raise error
        now = time.monotonic()
        self._deadline = now + self._seconds if self._deadline is None else self._deadline
        longest = min(_FIRST_PAUSE_SECONDS * 2**self.used, _LONGEST_PAUSE_SECONDS)
        # Half of it is random, so that clients cut off by one outage do not all return at one instant.
        seconds = longest * random.uniform(0.5, 1)  # noqa: S311 - nobody gains by guessing it
        seconds += getattr(error, "retry_after", None) or 0.0
        if now + seconds > self._deadline:
            raise error
        time.sleep(seconds)
        self.used += 1


def is_passing(error: InterplayError) -> bool:
    """Return whether a retry may succeed."""
    if isinstance(error, ProblemError):
        return error.status in _PASSING
    return isinstance(error, ServiceUnreachable) and error.passing


def may_be_done(error: InterplayError) -> bool:
    """Return whether the service may have carried out the request, though its response did not come."""
    if isinstance(error, ProblemError):
        return error.status not in _REFUSING
    return not (isinstance(error, ServiceUnreachable) and error.refused)


class Transport:
    """The connections to one service.

    Args:
        url: http or https.
        key: sent as a bearer token.
        timeout: seconds without network activity after which a call gives up.
        retry_seconds: how long a call is retried.

    Raises:
        ValueError: `url` is not an http or https URL, or no header can carry the key.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retry_seconds: float) -> None:
        self.url = url.rstrip("/")
        host = _host(self.url)
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("The API key contains characters that a header cannot carry.")
        self._retry_seconds = retry_seconds
        self._answered = False
        self.timeout = httpx.Timeout(timeout)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.timeout,
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS),
            # A proxy from the environment is for other machines; it cannot reach this machine's loopback. Whom to trust
            # (SSL_CERT_FILE) is for all.
            trust_env=not _is_loopback(host),
            verify=httpx.create_ssl_context(),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def retries(self) -> Retries:
        """Return the retries of a new call."""
        return Retries(self._retry_seconds)

    def call(self, method: str, path: str, **request: Any) -> Body:
        """Send a request as `send` does and return its response, which must be a JSON object."""
        response = self.send(method, path, **request)
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ServiceUnreachable(f"{self.url} is not an Interplay service: its response is not JSON.")
        return body

    def send(
        self, method: str, path: str, *, repeatable: bool = False, retries: Retries | None = None, **request: Any
    ) -> httpx.Response:
        """Send a request and return its successful response.

        Args:
            method: HTTP method.
            path: below the service's URL.
            repeatable: whether the request is safe to repeat, and so is retried.
            retries: those of a larger call that this is a part of; default: its own.
            request: further arguments of httpx.

        Raises:
            ProblemError: the response is a problem.
            ServiceUnreachable: there is no response.
            ValueError: a number to be sent is NaN or infinite.
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
        """Yield the streamed response of a GET, whatever its status.

        Raises:
            ServiceUnreachable: the stream breaks, or nothing comes for `silence_seconds`.
        """
        timeout = httpx.Timeout(self.timeout)
        timeout.read = silence_seconds
        with (
            self._errors(),
            self._http.stream("GET", path, timeout=timeout, headers={"Accept": "text/event-stream"}) as response,
        ):
            self._answered = True
            yield response

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield the body of a GET as it comes.

        Raises:
            ProblemError: the response is a problem.
            ServiceUnreachable: there is no response, or it breaks off.
        """
        with self._errors(), self._http.stream("GET", path) as response:
            self._answered = True
            if not response.is_success:
                response.read()
                raise self._problem(response)
            yield from response.iter_raw()

    def peek(self, path: str) -> Body | None:
        """Return the JSON object at a path, whatever its status, without retries; None if there is none."""
        try:
            with self._errors():
                body: Any = self._http.get(path).json()
        except (ServiceUnreachable, ValueError):
            return None
        return body if isinstance(body, dict) else None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Map exceptions of httpx to ServiceUnreachable."""
        try:
            yield
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            text = f"The connection to {self.url} broke: {error or type(error).__name__}."
            raise ServiceUnreachable(text, passing=True) from error
        except httpx.TimeoutException as error:
            raise ServiceUnreachable(f"{self.url} did not respond in time ({type(error).__name__}).") from error
        except httpx.TransportError as error:
            # A service that responded before is restarting; one that never did may not exist.
            text = f"{self.url} cannot be reached: {error or type(error).__name__}."
            refused = isinstance(error, httpx.ConnectError)
            raise ServiceUnreachable(text, passing=refused and self._answered, refused=refused) from error
        except httpx.DecodingError as error:
            raise ServiceUnreachable(f"{self.url} is not an Interplay service: {error}.") from error

    def _problem(self, response: httpx.Response) -> ProblemError:
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            # Not from the service: a proxy between here and the service, or another server.
            problem = {
                "title": f"{self.url} responded with {response.status_code}",
                "detail": response.text[:300].strip(),
            }
        return ProblemError(response.status_code, problem, _retry_after(response.headers.get("Retry-After", "")))


def _reason(ended: Mapping[str, Any]) -> str:
    """Return why an analysis or a fetch has nothing to show."""
    problem = ended.get("problem")
    return f"{problem.get('title')}: {problem.get('detail')}" if problem else str(ended["status"])


def segment(identifier: str) -> str:
    """Return an identifier quoted as one segment of a path."""
    # People type ids: "a/b" or "?x" must stay one unknown id, never become another route.
    return quote(identifier, safe="") or "%20"


def _require_finite(value: Any, place: tuple[str, ...]) -> None:
    """Check that all numbers are finite; name the place of one that is not, as httpx's own error does not."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{'.'.join(place)} is {value}, which is not a finite number.")
    if isinstance(value, Mapping):
        for key, member in value.items():
            _require_finite(member, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            _require_finite(member, (*place, str(index)))


def _retry_after(text: str) -> float | None:
    """Return the seconds of a Retry-After header, which gives seconds or an instant; None if it is neither."""
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

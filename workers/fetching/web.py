"""Files on the web, over HTTP. Each request, redirects too, goes only where the operator allows."""

import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import httpx

from app.errors import ServiceError, SourceDenied, SourceMissing, SourceNotAllowed, SourceUnavailable, first_line
from app.files.archives import DESCRIPTIONS, shards_of_index
from app.sources import Allowed, Source, entry_for, parse_source
from workers.fetching.origins import Changed, Found, Interrupted, Remote, is_index

_MOST_REDIRECTS = 5
_MAX_INDEX_BYTES = 32 * 2**20
_CONNECT_SECONDS = 10.0
# Answers after which the same request may succeed.
_PASSING = (408, 425, 429)
# Addresses that stand for IPv4 ones.
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
# All that the internet routes of IPv6; other ranges are local, or stand for addresses in ways of their own.
_UNICAST = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True)
class Reached:
    """What a request may do that goes to an address.

    Attributes:
        inside: whether the address may be one of a private network.
        with_token: whether the token goes with it.
    """

    inside: bool
    with_token: bool


# Says what a request to an address may do; None if it may not go there.
Reach = Callable[[Source], Reached | None]


def reach_of(allowed: tuple[Allowed, ...], *, own: Allowed | None) -> Reach:
    """Return where requests may go: below the operator's entries, with the token below the source's own alone."""

    def reach(source: Source) -> Reached | None:
        entry = entry_for(allowed, source)
        return None if entry is None else Reached(inside=entry.inside, with_token=entry == own)

    return reach


def client_for(reach: Reach, *, token: str | None, silence_seconds: float) -> httpx.Client:
    """Return a client that goes only where `reach` permits, and sends the token where `reach` says so."""
    headers = {"User-Agent": "interplay", "Accept-Encoding": "identity"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return httpx.Client(
        transport=_Guarded(reach),
        headers=headers,
        follow_redirects=True,
        max_redirects=_MOST_REDIRECTS,
        timeout=httpx.Timeout(silence_seconds, connect=min(silence_seconds, _CONNECT_SECONDS)),
        # Neither a proxy nor a .netrc of the environment.
        trust_env=False,
    )


class Web:
    """A file, or an index of shards with the files beside it.

    Args:
        source: the address.
        client: of `client_for`.
    """

    def __init__(self, source: Source, client: httpx.Client) -> None:
        self._source, self._client = source, client
        # What has been answered in a look that broke off; errors too, as most folders lack some descriptions.
        self._probed: dict[str, Remote | ServiceError] = {}

    def look(self) -> Found:
        """Return the file; if it is an index, its shards and the descriptions beside it."""
        probed = len(self._probed)
        try:
            found = self._look()
        except Interrupted as error:
            error.answered = len(self._probed) > probed
            raise
        # Looked at anew if it turns out to have changed.
        self._probed.clear()
        return found

    def _look(self) -> Found:
        url = self._source.shown + (f"?{self._source.query}" if self._source.query else "")
        file = self._probe(url, self._source.shown)
        if not is_index(file.name):
            return Found(file, {})
        if file.size_bytes > _MAX_INDEX_BYTES:
            raise SourceMissing(f"{self._source.shown} has {file.size_bytes} bytes: it is no index of shards.")
        shards = shards_of_index(file.name, b"".join(self.read(file, 0, file.size_bytes)))
        folder = self._source.shown.rpartition("/")[0]
        files = {PurePosixPath(file.name): file}
        for name in (*shards, *DESCRIPTIONS):
            try:
                files[PurePosixPath(name)] = self._probe(f"{folder}/{name}", f"{folder}/{name}")
            except (SourceMissing, SourceDenied):
                # Some servers refuse what is not there.
                if name in shards:
                    raise
        return Found(None, files)

    def _probe(self, url: str, shown: str) -> Remote:
        if url not in self._probed:
            try:
                self._probed[url] = probe(self._client, url, shown)
            except ServiceError as error:
                self._probed[url] = error
        found = self._probed[url]
        if isinstance(found, ServiceError):
            raise found
        return found

    def read(self, file: Remote, begin: int, end: int) -> Iterator[bytes]:
        return read_range(self._client, file, begin, end)

    def close(self) -> None:
        self._client.close()


def probe(client: httpx.Client, url: str, shown: str) -> Remote:
    """Look at a file by a request for its first byte: addresses that are signed permit nothing else but GET.

    Args:
        client: of `client_for`.
        url: of the file.
        shown: the address in messages.

    Raises:
        Interrupted, SourceMissing, SourceDenied, SourceNotAllowed: see `Origin.look`.
        SourceUnavailable: the server does not say how large the file is.
    """
    with _asked(client, url, {"Range": "bytes=0-0"}, shown) as response:
        size_bytes = _total(response)
        if size_bytes is None:
            raise SourceUnavailable(f"The server of {shown} does not say how large the file is.")
        etag, modified = response.headers.get("etag"), response.headers.get("last-modified")
        name = unquote(shown.rpartition("/")[2]) or "file"
        return Remote(name, url, size_bytes, etag or modified, _identity(response))


def _identity(response: httpx.Response) -> str | None:
    """Return a strong validator of an answer (RFC 9110, 8.8): its ETag, or the date of the last change.

    A date counts seconds, so that it says nothing of a file that changed within the minute before the answer.
    """
    etag, modified = response.headers.get("etag"), response.headers.get("last-modified")
    if etag is not None:
        return None if etag.startswith("W/") else str(etag)
    try:
        age = parsedate_to_datetime(response.headers["date"]) - parsedate_to_datetime(modified or "")
    except (KeyError, ValueError, TypeError):
        return None
    return modified if age >= timedelta(seconds=60) else None


def read_range(client: httpx.Client, file: Remote, begin: int, end: int, *, pinned: bool = False) -> Iterator[bytes]:
    """Yield a range of a file; see `Origin.read`. A pinned address is that of one content for ever."""
    headers = {"Range": f"bytes={begin}-{end - 1}"}
    if file.identity is not None and not pinned:
        headers["If-Range"] = file.identity
    left = end - begin
    with _asked(client, file.address, headers, file.name) as response:
        if _total(response) not in (None, file.size_bytes) or not (pinned or _is_same(response, file)):
            raise Changed(f"{file.name} is another file now")
        at = _begin(response)
        if at > begin:
            raise Interrupted(f"the server of {file.name} sent another range than it was asked for")
        # As it comes: what is in a buffer when the connection breaks would have to be sent again.
        for chunk in response.iter_raw():
            # A server without ranges sends the file from its beginning.
            wanted = chunk[max(begin - at, 0) :][:left]
            at += len(chunk)
            left -= len(wanted)
            if wanted:
                yield wanted
            if not left:
                return
    raise Interrupted(f"{file.name} ended {left} bytes early")


def answer(client: httpx.Client, url: str, shown: str, most_bytes: int) -> bytes:
    """Return the whole body of an answer; it may have `most_bytes`."""
    body = bytearray()
    with _asked(client, url, {}, shown) as response:
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > most_bytes:
                raise SourceMissing(f"The answer on {shown} has more than {most_bytes} bytes.")
    return bytes(body)


@contextmanager
def _asked(client: httpx.Client, url: str, headers: dict[str, str], shown: str) -> Iterator[httpx.Response]:
    """Ask for a file, and say what a refusal means."""
    try:
        with client.stream("GET", url, headers=headers) as response:
            status = response.status_code
            reason = response.headers.get("x-error-message") or response.reason_phrase
            said = f"{status} {reason}".strip()[:300]
            if status in (401, 403, 407, 451):
                raise SourceDenied(f"The server of {shown} refuses the file: {said}.")
            if status in (404, 410):
                raise SourceMissing(f"The server has no {shown}: {said}.")
            if status in (412, 416):
                if (total := _total(response)) == 0:
                    raise SourceMissing(f"{shown} is empty.")
                raise Changed(f"{shown} is another file now, of {total} bytes")
            if status in _PASSING or status >= 500:
                raise Interrupted(said)
            if status not in (200, 206):
                raise SourceMissing(f"The server of {shown} answers {said} in place of the file.")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise SourceMissing(f"The server of {shown} sends the file encoded, although asked not to.")
            yield response
    except httpx.TooManyRedirects:
        raise SourceMissing(f"The server of {shown} redirects more than {_MOST_REDIRECTS} times.") from None
    except httpx.LocalProtocolError:
        # What cannot be sent may be a secret.
        raise SourceUnavailable(f"No request can be made for {shown}.") from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        if _is_of_certificate(error):
            raise SourceDenied(f"The server of {shown} has no valid certificate: {first_line(error)}.") from None
        raise Interrupted(first_line(error)) from None


def _is_of_certificate(error: BaseException | None) -> bool:
    """Return whether a connection failed because of its certificate, which trying again does not help."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _total(response: httpx.Response) -> int | None:
    """Return the size of the whole file, as the answer says it."""
    if response.status_code in (206, 416):
        text = response.headers.get("content-range", "").rpartition("/")[2]
    else:
        text = response.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _begin(response: httpx.Response) -> int:
    """Return the place in the file at which the answer begins."""
    if response.status_code != 206:
        return 0
    text = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise Interrupted("the server sent a range without saying which")
    return int(text)


def _is_same(response: httpx.Response, file: Remote) -> bool:
    """Return whether the answer is of the file that was looked at, as far as its marks say."""
    marks = (response.headers.get("etag"), response.headers.get("last-modified"))
    if file.identity is not None:
        # An answer that does not name it may be of any file.
        return file.identity in marks
    return file.mark is None or not any(marks) or file.mark in marks


class _Guarded(httpx.BaseTransport):
    """Sends a request only where it may go, to an address that was looked at before.

    The name of a host is resolved here, once, and the connection goes to what was found: a name that gives one
    address to the check and another one to the connection gains nothing. Each host has connections of its own, as a
    certificate is checked when one is opened, and two names may have one address.
    """

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        # Of the environment only the certificates of authorities are taken, by SSL_CERT_FILE. Reading them takes long.
        self._authorities = httpx.create_ssl_context(trust_env=True)
        self._transports: dict[str, httpx.HTTPTransport] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        try:
            source = parse_source(str(url))
        except ValueError as error:
            raise SourceNotAllowed(f"The source leads to an address that is none: {error}.") from None
        reached = self._reach(source) if source.is_web else None
        if reached is None:
            raise SourceNotAllowed(
                f"The source leads to {source.shown}, which the service's operator does not list in INTERPLAY_SOURCES.",
                address=source.shown,
            )
        if not reached.with_token:
            request.headers.pop("authorization", None)
        # As it is asked for in the end, and not as people read it.
        host = url.raw_host.decode("ascii")
        response = self._sent(request, host, _addresses(host, url, inside=reached.inside))
        if not response.has_redirect_location:
            return response
        # Only where it leads is of use; its body may have any size.
        response.close()
        return httpx.Response(response.status_code, headers={"Location": response.headers["Location"]})

    def _sent(self, request: httpx.Request, host: str, addresses: list[str]) -> httpx.Response:
        place = request.url.netloc.decode("ascii")
        if place not in self._transports:
            self._transports[place] = httpx.HTTPTransport(verify=self._authorities, trust_env=False)
        transport = self._transports[place]
        extensions: dict[str, Any] = {**request.extensions, "sni_hostname": host}
        failure: httpx.TransportError | None = None
        for address in addresses:
            url = request.url.copy_with(host=address)
            sent = httpx.Request(
                request.method, url, headers=request.headers, stream=request.stream, extensions=extensions
            )
            try:
                return transport.handle_request(sent)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure or httpx.ConnectError(f"{host} has no address")

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _addresses(host: str, url: httpx.URL, *, inside: bool) -> list[str]:
    """Return the addresses of a URL's host.

    Raises:
        SourceNotAllowed: one of them is not of the public internet, and may not be otherwise.
    """
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"{host} cannot be resolved: {error}") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not inside and (private := [address for address in addresses if not is_public(address)]):
        raise SourceNotAllowed(
            f"{host} has the address {private[0]}, which is not of the public internet. An entry of "
            "INTERPLAY_SOURCES permits that by the word `inside`.",
            address=private[0],
        )
    return addresses


def is_public(text: str) -> bool:
    """Return whether an IP address is one of the public internet, also if it stands for another one.

    >>> is_public("93.184.216.34"), is_public("169.254.169.254"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        stands_for = address.ipv4_mapped or address.sixtofour
        if address in _TRANSLATED:
            stands_for = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.teredo is not None:
            stands_for = address.teredo[1]
        if stands_for is not None:
            return is_public(str(stands_for))
        if address not in _UNICAST:
            return False
    return address.is_global and not address.is_multicast

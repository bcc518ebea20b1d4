"""Where files may lie that the service fetches by itself: INTERPLAY_SOURCES lists what an operator allows.

    INTERPLAY_SOURCES="s3://models AWS, hf://our-org HF_TOKEN, https://files.example.com/nets/"

An entry is a beginning of addresses and, if it needs credentials, their name in the environment. For buckets that is
how the names of the variables begin: `AWS` stands for AWS_ACCESS_KEY_ID and so on, `PARTNER` for
PARTNER_ACCESS_KEY_ID. For `hf://` and `https://` it is the variable that holds a bearer token. Without a name no
credentials are sent, whatever the environment holds. `inside` as the last word permits addresses of private networks
and of this machine, which are refused otherwise.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

BUCKETS = ("s3", "gs", "az")
_WEB = ("https", "http")
SCHEMES = (*BUCKETS, "hf", *_WEB)
MAX_LENGTH = 2000
_PORTS = {"https": 443, "http": 80}
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{0,254}")
_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*|\[[0-9a-f:.]+\]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# As the Hub has them: letters, digits and ._-, with no two dots or hyphens in a row and none at either end.
_REPO = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True)
class Source:
    """An address of a file, or of a folder.

    Attributes:
        scheme: one of SCHEMES.
        place: the bucket or container; of the web the host with its port, unless that is the usual one; of the Hub
            the repository, `org/name`, after `datasets/` for one of data. In an allowed entry it may be empty, or an
            organisation alone.
        path: within that, without a leading slash; of the web as it is written, of others literally.
        revision: of the Hub: a branch, a tag or a commit; "" for the main branch.
        query: of the web: what follows `?`, which may be a signature, so it is sent and never shown.
    """

    scheme: str
    place: str
    path: str = ""
    revision: str = ""
    query: str = ""

    @property
    def shown(self) -> str:
        """The address without its query."""
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.scheme}://{self.place}{at}" + (f"/{self.path}" if self.path or self.scheme in _WEB else "")

    @property
    def is_web(self) -> bool:
        return self.scheme in _WEB


@dataclass(frozen=True)
class Allowed:
    """An entry of the operator's list.

    Attributes:
        beginning: addresses that begin so are allowed.
        credentials: their name in the environment; "" sends none.
        inside: whether the address may be one of a private network or of this machine.
    """

    beginning: Source
    credentials: str
    inside: bool

    def covers(self, source: Source) -> bool:
        """Return whether an address lies below this one; `models` covers `models/a` and not `models-private`."""
        begin = self.beginning
        if begin.scheme != source.scheme:
            return False
        if begin.scheme == "hf":
            return _is_below(f"{begin.place}/{begin.path}", f"{source.place}/{source.path}") and (
                begin.revision in ("", source.revision)
            )
        return begin.place == source.place and _is_below(begin.path, source.path)


def parse_source(text: str) -> Source:
    """Return the address that a text names.

    Raises:
        ValueError: it is none; the message says why.
    """
    scheme, rest = _scheme_of(text)
    if scheme == "hf":
        return _hub_source(rest)
    if scheme in BUCKETS:
        place, _, path = rest.partition("/")
        if not _BUCKET.fullmatch(place):
            raise ValueError(f"{place[:80]!r} is no name of a bucket")
        _check_path(path)
        return Source(scheme, place, path)
    return _web_source(text)


def parse_allowed(text: str) -> tuple[Allowed, ...]:
    """Return the entries of INTERPLAY_SOURCES.

    Raises:
        ValueError: an entry has not the form `ADDRESS [CREDENTIALS] [inside]`; the message names it.
    """
    entries = [entry.split() for entry in text.split(",") if entry.strip()]
    return tuple(_entry(number, words) for number, words in enumerate(entries, 1))


def entry_for(allowed: Iterable[Allowed], source: Source) -> Allowed | None:
    """Return the entry that covers an address, the longest if several do; None if it is not allowed."""
    covering = [entry for entry in allowed if entry.covers(source)]
    return max(covering, key=lambda entry: len(entry.beginning.shown), default=None)


def _entry(number: int, words: list[str]) -> Allowed:
    """Return an entry; messages name it by its number, as people write secrets where their names belong."""
    address, *more = words
    inside = bool(more) and more[-1] == "inside"
    credentials = more[:-1] if inside else more
    if len(credentials) > 1 or not all(map(_VARIABLE.fullmatch, credentials)):
        raise ValueError(f"entry {number} is not ADDRESS [NAME_OF_CREDENTIALS] [inside]")
    try:
        beginning = _hub_beginning(address) if address.startswith("hf://") else parse_source(address)
        if beginning.query:
            raise ValueError("an address has no query here")
    except ValueError as error:
        raise ValueError(f"in entry {number} {error}") from None
    return Allowed(beginning, "".join(credentials), inside)


def _scheme_of(text: str) -> tuple[str, str]:
    if len(text) > MAX_LENGTH or not text.isprintable():
        raise ValueError(f"an address has printable characters, and {MAX_LENGTH} of them at most")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValueError(f"an address begins with one of {', '.join(f'{one}://' for one in SCHEMES)}")
    if " " in text and scheme not in BUCKETS:
        raise ValueError("it has a space, which is written as %20")
    return scheme, rest


def _hub_source(rest: str) -> Source:
    head = "datasets/" if rest.startswith("datasets/") else ""
    parts = rest.removeprefix(head).split("/", 1)
    if len(parts) < 2:
        raise ValueError("an address of the Hub is hf://ORG/NAME, with @REVISION and /FILE or /FOLDER if you like")
    organisation, rest = parts
    # A revision may have slashes, as refs/pr/1 does, which the Hub writes as %2F.
    name, _, path = rest.partition("/")
    name, _, revision = name.partition("@")
    revision = unquote(revision)
    if not (_REPO.fullmatch(organisation) and _REPO.fullmatch(name)):
        raise ValueError(f"{f'{organisation}/{name}'[:80]!r} is no repository of the Hub")
    if revision and not _REVISION.fullmatch(revision):
        raise ValueError(f"{revision[:80]!r} is no revision")
    _check_path(path)
    return Source("hf", f"{head}{organisation}/{name}", path, revision)


def _hub_beginning(text: str) -> Source:
    """Return an address of the Hub, or of an organisation, or of all the Hub."""
    scheme, rest = _scheme_of(text)
    place = rest.rstrip("/")
    words = place.removeprefix("datasets").strip("/")
    if "/" in words:
        return _hub_source(rest)
    if words and not _REPO.fullmatch(words):
        raise ValueError(f"{words[:80]!r} is no organisation of the Hub")
    return Source(scheme, place)


def _web_source(text: str) -> Source:
    parts = urlsplit(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("its port is none") from None
    if not host or parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("it names a host, and neither a user nor a fragment")
    try:
        host = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError:
        raise ValueError(f"{host[:80]!r} is no host") from None
    host = f"[{host}]" if ":" in host else host.rstrip(".")
    if not _HOST.fullmatch(host) or len(host) > 253:
        raise ValueError(f"{host[:80]!r} is no host")
    # As servers read it: a path that is written otherwise must not get round an entry.
    _check_path(unquote(parts.path).removeprefix("/"))
    place = host if port in (None, _PORTS[parts.scheme]) else f"{host}:{port}"
    # Letters beyond ASCII are written in one way, in entries and in what redirects say.
    path = quote(parts.path.removeprefix("/"), safe="%/:@!$&'()*+,;=~")
    return Source(parts.scheme, place, path, query=parts.query)


def _check_path(path: str) -> None:
    segments = path.removesuffix("/").split("/") if path else []
    # Some servers take `..;x` and `.. ` for `..`.
    if any(segment.partition(";")[0].strip() in ("", ".", "..") for segment in segments):
        raise ValueError("its path has an empty part, or one that is . or ..")
    if not path.isprintable() or "\\" in path or "\ufffd" in path:
        raise ValueError("its path has characters that are not printable, not of UTF-8, or backslashes")


def _is_below(beginning: str, path: str) -> bool:
    beginning = beginning.rstrip("/").lstrip("/")
    path = path.lstrip("/")
    return not beginning or path.rstrip("/") == beginning or path.startswith(f"{beginning}/")

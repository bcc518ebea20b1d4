"""Requests on the web: over TLS, to addresses that were looked at, and what answers of servers mean."""

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.errors import ServiceError, SourceDenied, SourceMissing, SourceUnavailable
from app.sources import Allowed, Source, entry_for, parse_allowed, parse_source
from tests.buckets import BucketServer
from tests.sources import SourceServer, source_server
from tests.workers.fetching.test_transfer import CONTENT, Fetching, sha256
from workers.fetching import hub
from workers.fetching.web import Reached, client_for, is_public


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """Return a server's context with a certificate of this name, and the file of who vouches for it: itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context, path


@pytest.mark.parametrize("name", ["localhost", "elsewhere.example"])
def test_tls_checks_the_name_although_the_address_was_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The certificate must be of the host's name, not of its address; another one is refused at once."""
    context, authority = certificate(tmp_path, name)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with source_server(context) as server:
        server.files["/nets/a.bin"] = CONTENT
        fetching = Fetching(server, tmp_path / "one.fetch")
        if name == "localhost":
            assert fetching.a().sha256 == sha256(CONTENT)
        else:
            with pytest.raises(SourceDenied, match="certificate"):
                fetching.a()


def test_a_second_name_of_one_address_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect to another host at the same address and port opens a connection of its own, for its own name."""
    context, authority = certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with source_server(context) as server:
        server.files["/nets/b"] = CONTENT
        other = server.url.replace("localhost", "127.0.0.1")
        server.redirects["/nets/a.bin"] = f"{other}/nets/b"
        with pytest.raises(SourceDenied, match="certificate"):
            Fetching(server, tmp_path / "one.fetch")(
                f"{server.url}/nets/a.bin", sources=f"{server.url}/nets inside, {other}/nets inside"
            )


def test_a_host_is_asked_for_as_it_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is written in ASCII is not read as letters, and written again by other rules."""
    asked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        raise OSError("nobody")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    client = client_for(lambda _: Reached(inside=True, with_token=False), token=None, silence_seconds=1)
    with pytest.raises(httpx.ConnectError), client:
        client.get("http://xn--strae-oqa.example/a")
    assert asked == ["xn--strae-oqa.example"]


def test_a_certificate_of_nobody_is_refused(tmp_path: Path) -> None:
    context, _ = certificate(tmp_path, "localhost")
    with source_server(context) as server:
        server.files["/nets/a.bin"] = CONTENT
        with pytest.raises(SourceDenied, match="certificate"):
            Fetching(server, tmp_path / "one.fetch").a()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::",
        "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    """Private ones, those of the machine and of its network, and whatever stands for one of them."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_what_the_hub_may_lead_to() -> None:
    """Its own stores and what is listed; a mirror leads to itself alone."""
    allowed = parse_allowed("hf://org, https://cdn.example.com/a")

    def reach(hub_url: str, url: str) -> bool | None:
        """Return whether the request may go inside; None if it may not go at all."""
        found = hub.reach_of(hub_url, allowed)(parse_source(url))
        return None if found is None else found.inside

    assert reach(hub.OFFICIAL, "https://huggingface.co/x") is True
    assert reach(hub.OFFICIAL, "https://cas-bridge.xethub.hf.co/x?sig=1") is False
    assert reach(hub.OFFICIAL, "https://cdn-lfs.huggingface.co/x") is False
    assert reach(hub.OFFICIAL, "https://cdn.example.com/a/b") is False
    assert reach(hub.OFFICIAL, "http://cdn-lfs.hf.co/x") is None
    assert reach(hub.OFFICIAL, "https://evilhf.co/x") is None
    assert reach(hub.OFFICIAL, "https://hf.co.evil.com/x") is None
    assert reach("https://mirror.example", "https://mirror.example/x") is True
    assert reach("https://mirror.example", "https://mirror.example:8443/x") is None
    assert reach("https://mirror.example", "https://cdn-lfs.hf.co/x") is None


@pytest.mark.parametrize(
    ("beginning", "inside", "outside"),
    [
        ("s3://b", ["s3://b/a", "s3://b"], ["s3://b2/a", "gs://b/a", "s3://B/a"]),
        ("s3://b/models/", ["s3://b/models/a", "s3://b/models"], ["s3://b/models2", "s3://b/model", "s3://b/a/models/b"]),
        ("hf://", ["hf://o/n", "hf://datasets/o/n@v/f"], ["https://o/n"]),
        ("hf://o", ["hf://o/n", "hf://o/n@x/a/b"], ["hf://o2/n", "hf://datasets/o/n"]),
        ("hf://o/n", ["hf://o/n@main/a", "hf://o/n"], ["hf://o/n2", "hf://o/m"]),
        ("hf://o/n@v1", ["hf://o/n@v1/a"], ["hf://o/n", "hf://o/n@v2", "hf://o/n@v10"]),
        ("https://h/a", ["https://h/a/b?q=1", "https://H:443/a", "https://h./a/b"],
         ["http://h/a", "https://h/ab", "https://h:8443/a", "https://h.evil/a", "https://hh/a", "https://h/%61/b"]),
        ("https://h", ["https://h/x", "https://h"], ["https://h2/x", "https://x.h/"]),
    ],
)  # fmt: skip
def test_what_an_entry_covers(beginning: str, inside: list[str], outside: list[str]) -> None:
    """Whole parts of a path, of exactly this place."""
    allowed = parse_allowed(beginning)
    assert [source for source in inside if entry_for(allowed, parse_source(source)) is None] == []
    assert [source for source in outside if entry_for(allowed, parse_source(source)) is not None] == []


def test_the_longest_entry_counts() -> None:
    allowed = parse_allowed("s3://b A, s3://b/deep/er B inside, s3://b/deep C")

    def entry(source: str) -> Allowed | None:
        return entry_for(allowed, parse_source(source))

    assert entry("s3://b/x") == Allowed(Source("s3", "b"), "A", inside=False)
    assert entry("s3://b/deep/x") == Allowed(Source("s3", "b", "deep"), "C", inside=False)
    assert entry("s3://b/deep/er/x") == Allowed(Source("s3", "b", "deep/er"), "B", inside=True)


@pytest.fixture
def server() -> Iterator[SourceServer]:
    with source_server() as running:
        running.files["/nets/a.bin"] = CONTENT
        yield running


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "source-missing"), (401, "source-denied"), (403, "source-denied"), (404, "source-missing"),
     (410, "source-missing"), (451, "source-denied"), (500, None), (503, None), (429, None), (408, None)],
)  # fmt: skip
def test_what_an_answer_means(server: SourceServer, tmp_path: Path, status: int, kind: str | None) -> None:
    """Refusals are final; what passes is asked for again."""
    server.faults.failing, server.faults.status = 1, status
    fetching = Fetching(server, tmp_path / "one.fetch")
    if kind is None:
        assert fetching.a().sha256 == sha256(CONTENT)
        return
    with pytest.raises(ServiceError) as caught:
        fetching.a()
    assert caught.value.kind == kind


@pytest.mark.parametrize(("status", "kind"), [(400, "source-denied"), (403, "source-denied"), (404, "source-missing")])
def test_what_an_answer_of_a_bucket_means(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, kind: str
) -> None:
    server.faults.failing, server.faults.status = 10_000, status
    given: dict[str, Any] = {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "REGION": "us-east-1",
        "ALLOW_HTTP": "true",
    }
    for name, value in {**given, "ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(ServiceError) as caught:
        Fetching(server, tmp_path / "one.fetch")("s3://bucket/a", sources="s3://bucket AWS")
    assert caught.value.kind == kind


def test_the_password_of_an_endpoint_is_not_told(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
    for name, value in {**given, "ENDPOINT_URL": "http://user:SECRET@127.0.0.1:9"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(SourceUnavailable) as caught:
        Fetching(server, tmp_path / "one.fetch")("s3://b/a", sources="s3://b AWS", patience_seconds=0.5)
    assert "SECRET" not in caught.value.detail


@pytest.mark.parametrize(
    ("source", "given"),
    [("az://container/a", {}), ("gs://bucket/a", {"GOOGLE_SERVICE_ACCOUNT_KEY": "not JSON"})],
)
def test_credentials_that_are_none_are_named(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, given: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    scheme = source.partition(":")[0]
    with pytest.raises(SourceDenied, match="credentials"):
        Fetching(server, tmp_path / "one.fetch")(source, sources=f"{source} {scheme.upper()}")


def test_a_bucket_that_does_not_exist_is_missing(
    s3: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: SourceServer
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceMissing):
        Fetching(server, tmp_path / "one.fetch")("s3://no-such-bucket/a", sources="s3://no-such-bucket AWS")


@pytest.mark.parametrize(
    "path",
    ["nets/../a", "nets/%2e%2e/a", "nets/.%2e/a", "nets/..;/a", "nets/%2e%2e;x/a", "nets/..%3b/a", "nets/..%20/a",
     "nets/%c0%ae%c0%ae/a", "nets/..%5ca", "nets//a", "nets/./a", "nets/%00", "nets/;/a"],
)  # fmt: skip
def test_paths_that_servers_read_otherwise_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        parse_source(f"https://h/{path}")


@pytest.mark.parametrize(
    "host", ["a" * 64 + ".example", "a..example", ".example", "a.example:x", "", "exa mple", "[::1"]
)
def test_hosts_that_are_none_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match=r"host|port|space|Invalid"):
        parse_source(f"https://{host}/a")


def test_letters_of_a_path_are_written_one_way() -> None:
    allowed = parse_allowed("https://h/b\u00fccher")
    for source in ("https://h/b\u00fccher/a", "https://h/b%C3%BCcher/a"):
        assert entry_for(allowed, parse_source(source)) is not None


def test_hosts_are_written_one_way() -> None:
    """However a host is written, an entry covers it or does not."""
    assert parse_source("https://EXAMPLE.com:443/a") == parse_source("https://example.com/a")
    assert parse_source("https://bücher.example/a").place == "xn--bcher-kva.example"
    assert ipaddress.ip_address(parse_source("https://[2606:4700::1]/a").place.strip("[]")).version == 6

"""The service under pressure: dependencies that accept and never answer, slow clients, too many clients."""

import asyncio
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from app import logs
from app.database import make_engine, read
from app.settings import Settings
from tests import services
from tests.app.api.test_uploads import begin_upload, problem, raw_connection
from tests.databases import fresh_database
from tests.services import Service, until

KEY = "a key that nobody guesses"
AUTHORISED = {"Authorization": f"Bearer {KEY}"}


@contextmanager
def silent_server(backend: str | None = None) -> Iterator[tuple[int, threading.Event]]:
    """Open a port that accepts and never answers; with a `backend` (a Unix socket) forward until the event is set."""
    silent = threading.Event()
    if backend is None:
        silent.set()
    held: list[socket.socket] = []

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not silent.is_set():
                    target.sendall(data)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            held.append(client)
            if backend is not None:
                server = socket.socket(socket.AF_UNIX)
                server.connect(backend)
                held.append(server)
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield listener.getsockname()[1], silent
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for connection in held:
                connection.close()
            acceptor.join(5)


def pressed(service: Service, request: dict[str, Any], *, quick: list[str]) -> list[httpx.Response]:
    """Send a request 45 times at once; meanwhile healthz is quick, readyz fails, and `quick` are answered."""

    async def scenario() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits, trust_env=False) as client:
            assert (await client.get("/healthz")).status_code == 200
            started = time.monotonic()
            calls = [asyncio.create_task(client.request(**request)) for _ in range(45)]
            await asyncio.sleep(0.5)
            assert not any(call.done() for call in calls)
            took = []
            for _ in range(21):
                asked = time.monotonic()
                assert (await client.get("/healthz")).status_code == 200
                took.append(time.monotonic() - asked)
            # The median: on a busy machine single answers are slow as well.
            assert sorted(took)[10] < 0.1
            asked = time.monotonic()
            assert (await client.get("/readyz")).status_code == 503
            assert time.monotonic() - asked < 2.5
            for path in quick:
                asked = time.monotonic()
                assert (await client.get(path, headers=AUTHORISED)).status_code == 200
                assert time.monotonic() - asked < 2.5
            answers = await asyncio.gather(*calls)
            assert time.monotonic() - started < 40
            return answers

    return asyncio.run(scenario())


def test_silent_database_leaves_the_service_alive(tmp_path: Path) -> None:
    """With 45 calls blocked on a silent database, healthz takes under 100 ms; all calls end."""
    with silent_server() as (port, _):
        url = f"postgresql://secret-user@127.0.0.1:{port}/secret-name"
        with services.running(
            tmp_path / "data", command="api", tables=False, database_url=url, database_timeout_seconds="3"
        ) as service:
            answers = pressed(service, {"method": "GET", "url": "/v1/probes"}, quick=[])
            for answer in answers:
                problem(answer, 503, "unavailable")
            told = service.client.get("/readyz")
            assert told.json() == {
                "ready": False,
                "database": "does not answer",
                "storage": "ok",
                "worker": "unknown without the database",
            }


def test_database_that_falls_silent_is_given_up(tmp_path: Path, postgres: str) -> None:
    """A connection whose server falls silent ends at its deadline, and the next one works."""
    with fresh_database(postgres) as database:
        url = sa.make_url(database)
        with silent_server(f"{url.query['host']}/.s.PGSQL.5432") as (port, silent):
            there = url.set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
            engine = make_engine(Settings(data_dir=tmp_path, database_url=there, database_timeout_seconds=0.5))
            with read(engine) as session:
                assert session.scalar(sa.text("SHOW statement_timeout")) == "500ms"
                silent.set()
                started = time.monotonic()
                with pytest.raises(sa.exc.OperationalError, match=r"said nothing for 2\.5 s"):
                    session.scalar(sa.text("SELECT 1"))
                assert time.monotonic() - started < 20
            silent.clear()
            with read(engine) as session:
                assert session.scalar(sa.text("SELECT 1")) == 1
                with pytest.raises(sa.exc.OperationalError, match="statement timeout"):
                    session.scalar(sa.text("SELECT pg_sleep(20)"))
            engine.dispose()


def test_silent_storage_leaves_the_service_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 45 calls blocked on a silent storage, requests that do not need it are answered."""
    with silent_server() as (port, _):
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "nowhere",
        }.items():
            monkeypatch.setenv(name, value)
        with services.running(
            tmp_path / "data",
            command="api",
            storage_url="s3://secret-bucket/prefix",
            storage_timeout_seconds="3",
            api_key=KEY,
        ) as service:
            request = {"method": "DELETE", "url": "/v1/probes/none", "headers": AUTHORISED}
            answers = pressed(service, request, quick=["/v1/probes", "/v1/analyses"])
            for answer in answers:
                problem(answer, 503, "unavailable")
            told = service.client.get("/readyz")
            assert told.json()["storage"] == "does not answer"
            assert "secret" not in told.text
            assert str(port) not in told.text
            # At first the reason may be that so many calls wait for it.
            until(lambda: "said nothing" in service.client.get("/readyz", headers=AUTHORISED).json()["storage"])


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service with room for 40 connections and deadlines of a few seconds."""
    with services.running(
        tmp_path_factory.mktemp("tight") / "data",
        command="api",
        max_connections="40",
        header_timeout_seconds="2",
        body_timeout_seconds="4",
        upload_idle_seconds="1",
        min_upload_rate="1000",
    ) as service:
        yield service


@contextmanager
def connections(service: Service, number: int, begun: bytes) -> Iterator[list[socket.socket]]:
    """Open the given number of connections, each with the beginning of a request."""
    with ExitStack() as stack:
        opened = []
        for _ in range(number):
            connection = stack.enter_context(raw_connection(service))
            connection.sendall(begun)
            opened.append(connection)
        yield opened


def told(connection: socket.socket) -> bytes:
    """Return everything that a connection sends until it is closed."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def statuses(opened: list[socket.socket]) -> set[bytes]:
    """Return the statuses of connections that are closed with a problem each."""
    answers = [told(connection) for connection in opened]
    assert all(b"application/problem+json" in answer for answer in answers)
    return {answer.split(b" ")[1] for answer in answers}


POST_JSON = (
    b"POST /v1/analyses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
)
HALF_A_HEAD = b"GET /healthz HTTP/1.1\r\nHost: localh"


def test_half_heads_do_not_shut_others_out(tight: Service) -> None:
    """Connections with half a header make room for new ones, receive 503 or 408, and cost the log a line."""
    log = tight.data_dir / "stderr.txt"
    before = len(log.read_text().splitlines())
    with connections(tight, 100, HALF_A_HEAD) as opened:
        for _ in range(5):
            with httpx.Client(base_url=tight.url, timeout=10, trust_env=False) as client:
                assert client.get("/healthz").status_code == 200
        assert statuses(opened) == {b"503", b"408"}
    until(lambda: "connections ended" in log.read_text())
    assert len(log.read_text().splitlines()) - before <= 2


def test_head_that_trickles_is_ended(tight: Service) -> None:
    """A header sent byte by byte ends at the deadline, on a new connection and on a kept-alive one."""
    with connections(tight, 1, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") as (kept,):
        answer = b""
        while b'"ok"}' not in answer:
            answer += kept.recv(65536)
        with connections(tight, 1, b"") as (new,):
            for byte in HALF_A_HEAD + b"x" * 100:
                if select.select([kept, new], [], [], 0.1)[0]:
                    break
                for connection in (kept, new):
                    connection.sendall(bytes([byte]))
            assert statuses([kept, new]) == {b"408"}


def test_endless_head_is_refused(tight: Service) -> None:
    """A header without an end is refused long before it fills the memory."""
    with connections(tight, 1, b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 80_000) as (opened,):
        answer = told(opened)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"headers-too-large" in answer


def test_what_is_no_http_is_a_problem(tight: Service) -> None:
    """Bytes of another protocol are answered with a problem."""
    with connections(tight, 1, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n") as opened:
        assert statuses(opened) == {b"400"}


def test_busy_connections_are_kept_and_others_refused(tight: Service) -> None:
    """If all connections are busy with a request, a new one receives 503 with a Retry-After."""
    continued = POST_JSON.replace(b"Host", b"Expect: 100-continue\r\nHost")
    with connections(tight, 40, continued) as busy:
        for connection in busy:
            assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        with connections(tight, 1, HALF_A_HEAD) as (new,):
            answer = told(new)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: " in answer
        assert b"too-many-connections" in answer
        # Their own deadline is that of a body.
        assert statuses(busy) == {b"408"}


def trickle(connection: socket.socket, data: bytes, pause: float) -> None:
    """Send byte by byte until an answer comes."""
    for byte in data:
        if select.select([connection], [], [], pause)[0]:
            return
        connection.sendall(bytes([byte]))
    raise AssertionError("nobody minded")


def test_body_that_trickles_is_ended(tight: Service) -> None:
    """A JSON body has a deadline as a whole, however steadily it comes."""
    with connections(tight, 1, POST_JSON) as (opened,):
        trickle(opened, b" " * 500, 0.1)
        assert statuses([opened]) == {b"408"}


def test_upload_that_trickles_is_ended(tight: Service) -> None:
    """An upload below the minimum rate is dropped, though it never pauses; at the minimum rate it may last."""
    spec = b'--b\r\nContent-Disposition: form-data; name="spec"\r\n\r\n{}\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    before = set((tight.data_dir / "blobs").rglob("*.part"))
    with raw_connection(tight) as opened:
        begin_upload(opened, spec + file, 10**6)
        trickle(opened, bytes(500), 0.05)
        answer = told(opened)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"upload-incomplete" in answer
    assert set((tight.data_dir / "blobs").rglob("*.part")) == before
    rest = bytes(1000) + b"\r\n--b--\r\n"
    with raw_connection(tight) as opened:
        begin_upload(opened, spec + file, len(spec) + len(file) + 10_000 + len(rest))
        for _ in range(20):
            opened.sendall(bytes(500))
            time.sleep(0.1)
        opened.sendall(rest)
        assert opened.recv(65536).startswith(b"HTTP/1.1 422 ")


def test_repeated_lines_are_counted_rather_than_written() -> None:
    """Lines that differ only in their arguments are logged once in ten seconds, with the number left out."""
    repeated, written = logs._Repeated(), []

    def log(text: str, at: float) -> None:
        record = logging.LogRecord("app.api.problems", logging.WARNING, __file__, 1, text, ("x",), None)
        record.created = at
        if repeated.filter(record):
            written.append(record.getMessage())

    for i in range(1000):
        log("the storage does not answer: %s", i / 1000)
    log("the database does not answer: %s", 1.0)
    log("the storage does not answer: %s", 11.0)
    assert written == [
        "the storage does not answer: x",
        "the database does not answer: x",
        "the storage does not answer: x (and 999 more like it)",
    ]

"""A web server on loopback for tests of fetches: files with ranges and ETags, a Hub's API, and faults on demand."""

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Faults:
    """What the server does wrong; all of it is off at first.

    Attributes:
        cut_after_bytes: end the connection once so many bytes of a body were sent, ...
        cuts: ... so many times.
        failing: answer `status` so many times.
        status: 503, or another one.
        bytes_per_second: send that slowly.
        without_ranges: ignore them.
        without_etags: give none.
        weak_etags: give one that is the same for all contents.
        modified: the time of the last change, told in place of an ETag.
        marks_once: give marks only to whoever asks for the first byte.
        redirect_body: sent with redirects.
        without_length: send bodies in chunks.
    """

    cut_after_bytes: int | None = None
    cuts: int = 0
    failing: int = 0
    status: int = 503
    bytes_per_second: int | None = None
    without_ranges: bool = False
    without_etags: bool = False
    weak_etags: bool = False
    modified: str | None = None
    marks_once: bool = False
    redirect_body: bytes = b""
    without_length: bool = False


@dataclass
class SourceServer:
    """The running server.

    Attributes:
        files: by path; a path of the Hub is `/ORG/NAME/resolve/COMMIT/FILE`.
        redirects: addresses by path.
        token: what requests must carry, if anything.
        faults: see there.
        failing_each: answer 503 to each such request; 0 to none.
        requests: the path and the Range of each request, in order.
        sent_bytes: of bodies, by path.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    faults: Faults = field(default_factory=Faults)
    failing_each: int = 0
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    tokens: dict[str, str | None] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)

    def add_repository(self, name: str, files: dict[str, bytes], *, sizes: bool = True) -> None:
        """Add a repository of the Hub, at one commit, which is also its `main`; datasets begin with `datasets/`."""
        kind = "" if name.startswith("datasets/") else "models/"
        siblings: list[dict[str, Any]] = []
        for path, content in files.items():
            self.files[f"/{name}/resolve/{COMMIT}/{path}"] = content
            entry: dict[str, Any] = {"rfilename": path}
            if sizes:
                entry |= {"size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                if path.endswith((".safetensors", ".parquet")):
                    entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            siblings.append(entry)
        for revision in ("main", "v1.0", COMMIT):
            answer = {"id": name, "sha": COMMIT, "siblings": siblings}
            self.files[f"/api/{kind}{name}/revision/{revision}"] = json.dumps(answer).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: "_Server"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        served, faults = self.server.served, self.server.served.faults
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range")
        served.requests.append((path, asked))
        served.tokens[path] = self.headers.get("Authorization")
        if served.token is not None and self.headers.get("Authorization") != f"Bearer {served.token}":
            return self._refuse(401, "Invalid username or password.")
        if served.failing_each and len(served.requests) % served.failing_each == 0:
            return self._refuse(503, "busy")
        if faults.failing:
            faults.failing -= 1
            return self._refuse(faults.status, "busy")
        if path in served.redirects:
            self.send_response(302)
            self.send_header("Location", served.redirects[path])
            self.send_header("Content-Length", str(len(faults.redirect_body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(faults.redirect_body)
            return None
        if path not in served.files:
            return self._refuse(404, "Entry not found")
        return self._send(path, served.files[path], asked)

    def _send(self, path: str, content: bytes, asked: str | None) -> None:
        faults = self.server.served.faults
        etag = 'W/"a"' if faults.weak_etags else f'"{hashlib.md5(content).hexdigest()}"'
        marks = {} if faults.without_etags or faults.modified else {"ETag": etag}
        marks |= {"Last-Modified": faults.modified} if faults.modified else {}
        condition = self.headers.get("If-Range")
        begin, end = 0, len(content)
        partial = asked is not None and not faults.without_ranges and condition in (None, *marks.values())
        if partial and asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(content), len(content))
            if begin >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        if not faults.marks_once or asked == "bytes=0-0":
            for name, value in marks.items():
                self.send_header(name, value)
        if faults.without_length:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command != "HEAD":
            self._send_slowly(path, content[begin:end])

    def _send_slowly(self, path: str, body: bytes) -> None:
        served, faults = self.server.served, self.server.served.faults
        step = 2**16 if faults.bytes_per_second is None else max(faults.bytes_per_second // 20, 1)
        sent = 0
        with suppress(OSError):
            for at in range(0, len(body), step):
                if faults.cut_after_bytes is not None and faults.cuts and sent >= faults.cut_after_bytes:
                    faults.cuts -= 1
                    self.close_connection = True
                    self.connection.close()
                    return
                self.wfile.write(body[at : at + step])
                sent += len(body[at : at + step])
                served.sent_bytes[path] = served.sent_bytes.get(path, 0) + len(body[at : at + step])
                if faults.bytes_per_second is not None and self.server.ending.wait(0.05):
                    return

    def _refuse(self, status: int, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, served: SourceServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.served = served
        self.ending = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that were cut off."""


@contextmanager
def source_server(tls: ssl.SSLContext | None = None) -> Iterator[SourceServer]:
    """Run a server for a block, over TLS if there is a context with a certificate."""
    served = SourceServer()
    server = _Server(served)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        served.url = f"https://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()

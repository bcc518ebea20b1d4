"""A loopback server that simulates faults: broken connections, pages of proxies, 503s."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Answer = tuple[int, bytes] | tuple[int, bytes, dict[str, str]]
BREAK = (0, b"")  # close the connection in place of an answer
HOLD = b"hold"  # in a stream: say nothing more until the other side goes away


@dataclass
class Seen:
    """A received request; of its body the length and both ends."""

    method: str
    target: str
    headers: dict[str, str]
    body_bytes: int
    body_start: bytes
    body_end: bytes


@dataclass
class Scripted:
    """Where the server listens, what it will answer (the last answer for ever) and what it was asked.

    Streams of events are a script of their own; where that has ended there is no such route.
    """

    url: str
    answers: list[Answer]
    streams: list[list[bytes]]
    seen: list[Seen] = field(default_factory=list)

    def asked(self) -> list[Seen]:
        """Return the received requests, except those for streams of events."""
        return [seen for seen in self.seen if not seen.target.endswith("/events")]


def answer(body: Any, status: int = 200, **headers: str) -> Answer:
    """Return a JSON response; `retry_after` is the header Retry-After."""
    return status, json.dumps(body).encode(), {name.replace("_", "-"): value for name, value in headers.items()}


def event(body: Any, name: str = "status") -> bytes:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


@contextmanager
def scripted(*answers: Answer, streams: Sequence[list[bytes]] = ()) -> Iterator[Scripted]:
    """Run a server that gives these responses in turn; a stream is the data that it sends before it closes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def respond(self) -> None:
            length = left = int(self.headers.get("Content-Length", 0))
            start = end = b""
            while left:
                chunk = self.rfile.read(min(left, 2**16))
                start, end, left = start or chunk, (end + chunk)[-200:], left - len(chunk)
            script.seen.append(Seen(self.command, self.path, dict(self.headers), length, start, end))
            if self.path.endswith("/events"):
                self.stream(script.streams.pop(0) if script.streams else None)
                return
            status, body, *headers = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if (status, body) == BREAK:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers[0].items() if headers else ():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def stream(self, chunks: list[bytes] | None) -> None:
            self.close_connection = True
            self.send_response(404 if chunks is None else 200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for chunk in chunks or ():
                if chunk == HOLD:
                    self.connection.recv(1)
                    return
                self.wfile.write(chunk)
                self.wfile.flush()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = respond  # noqa: N815 - names of http.server

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script = Scripted(f"http://127.0.0.1:{server.server_address[1]}", list(answers), list(streams))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A loopback server that plays faults which a sound service does not have: broken connections, proxies' pages, 503s."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

BREAK = (0, b"")  # close the connection in place of an answer


@dataclass
class Seen:
    """A request as it arrived; of a body, its length and both ends."""

    method: str
    target: str
    headers: dict[str, str]
    body_bytes: int
    body_start: bytes
    body_end: bytes


@dataclass
class Scripted:
    """Where the server listens, what it will answer (the last answer for ever) and what it was asked."""

    url: str
    answers: list[tuple[int, bytes]]
    seen: list[Seen] = field(default_factory=list)


def answer(body: Any, status: int = 200) -> tuple[int, bytes]:
    """A JSON answer."""
    return status, json.dumps(body).encode()


@contextmanager
def scripted(*answers: tuple[int, bytes]) -> Iterator[Scripted]:
    """A server that gives these answers, one after the other."""

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
            status, body = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if (status, body) == BREAK:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = respond  # noqa: N815 - names of http.server

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script = Scripted(f"http://127.0.0.1:{server.server_address[1]}", list(answers))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

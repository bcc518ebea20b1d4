"""A receiver of traces on loopback, which decodes what OpenTelemetry's exporters send by OTLP over HTTP."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Span:
    """A span as it was received; ids are hexadecimal."""

    trace_id: str
    id: str
    parent_id: str
    name: str
    service: str
    began_ns: int
    ended_ns: int
    failed: bool
    attributes: dict[str, object]


@dataclass
class Collector:
    """The receiver; with a `silence` it answers that late, with a `status` so."""

    url: str
    spans: list[Span] = field(default_factory=list)
    requests: int = 0
    silence_seconds: float = 0.0
    status: int = 200

    def take(self, body: bytes) -> None:
        """Keep the spans of a request."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                for one in scope.spans:
                    values = {
                        pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in one.attributes
                    }
                    self.spans.append(
                        Span(
                            one.trace_id.hex(),
                            one.span_id.hex(),
                            one.parent_span_id.hex(),
                            one.name,
                            about["service.name"],
                            one.start_time_unix_nano,
                            one.end_time_unix_nano,
                            one.status.code == 2,
                            values,
                        )
                    )


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a receiver; end it at the end."""
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.requests += 1
            ending.wait(collector.silence_seconds)
            if collector.status == 200:
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                collector.take(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            with suppress(OSError):  # who asked may have gone
                self.send_response(collector.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector
    finally:
        ending.set()
        server.shutdown()
        server.server_close()
        thread.join()

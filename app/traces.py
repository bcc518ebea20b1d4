"""OpenTelemetry traces: one from a request to its report. Off unless an endpoint is set; nothing is imported then.

The standard variables say where spans go: OTEL_EXPORTER_OTLP_ENDPOINT and the others of OpenTelemetry's exporter for
OTLP over HTTP. The context of a request is stored with what it asks for, as W3C's `traceparent`, so that workers
continue its trace. Spans are sent by a thread of their own: a receiver that is slow or away costs spans, never time.
"""

import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

# Loaded where traces are on; the extra `traces` brings it.
if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger("interplay")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# How long a process that ends waits for its last spans to go.
_LAST_SECONDS = 2.0
Attributes = Mapping[str, str | int | float | bool]


class CannotTrace(Exception):
    """The reason why traces are wanted and impossible, in one sentence that an operator can act on."""


class Timed(NamedTuple):
    """Work that was timed elsewhere, to become a span.

    Attributes:
        name: what was done.
        began_ns: when, in nanoseconds since 1970.
        ended_ns: when it had been done.
        parent: the index of the one in the same list within which it was done; None within none of them.
    """

    name: str
    began_ns: int
    ended_ns: int
    parent: int | None = None


class _On(NamedTuple):
    tracer: "Tracer"
    provider: "TracerProvider"


_on: _On | None = None


def are_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the standard variables ask for traces."""
    off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    elsewhere = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() not in ("otlp", "")
    return any(environment.get(name) for name in _ENDPOINTS) and not off and not elsewhere


def start(role: str) -> None:
    """Begin to trace this process, if that is wanted.

    Args:
        role: the process's part in the service, such as `api`; its service.name is interplay-ROLE, unless
            OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has another.

    Raises:
        CannotTrace: traces are wanted, and the extra is missing or the protocol is not OTLP over HTTP.
    """
    global _on
    if not are_wanted():
        return
    named = next(name for name in _ENDPOINTS if os.environ.get(name))
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise CannotTrace(f"Traces go by OTLP over HTTP alone (http/protobuf), not by {protocol!r}.")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise CannotTrace(
            f"{named} asks for traces, which need the extra `traces`: pip install 'interplay-server[traces]', or set "
            "OTEL_SDK_DISABLED=true."
        ) from error
    own = {"service.version": importlib.metadata.version("interplay")}
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in given:
        own["service.name"] = f"interplay-{role}"
    provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _on = _On(provider.get_tracer("interplay"), provider)


def stop() -> None:
    """Send what was not sent yet, for two seconds at most."""
    if _on is not None:
        # In a thread, as a receiver that does not answer would keep it for longer.
        last = threading.Thread(target=_on.provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_SECONDS)


def is_on() -> bool:
    """Return whether this process traces."""
    return _on is not None


def span(
    name: str, *, parent: str | None = None, began_ns: int | None = None, **attributes: str | float | None
) -> "AbstractContextManager[Span | None]":
    """Trace a block, as a part of the span that is open here, or of the one that `parent` names; else do nothing.

    Args:
        name: what is done.
        parent: a stored context.
        began_ns: when it began, in nanoseconds since 1970, if that was before the block.
        attributes: what more there is to say, beginning with `interplay.`; None says nothing.
    """
    if _on is None or (parent is None and not _is_open()):
        return nullcontext()
    context = _read({"traceparent": parent}) if parent is not None else None
    return _on.tracer.start_as_current_span(name, context=context, attributes=_named(attributes), start_time=began_ns)


@contextmanager
def request_span(method: str, headers: Sequence[tuple[bytes, bytes]]) -> "Iterator[Span | None]":
    """Trace a request, as a part of the trace that its `traceparent` names, if it has one."""
    if _on is None:
        yield None
        return
    from opentelemetry.trace import SpanKind

    wanted = (b"traceparent", b"tracestate")
    carried = {name.decode(): value.decode("latin-1") for name, value in headers if name in wanted}
    with _on.tracer.start_as_current_span(
        method, context=_read(carried), kind=SpanKind.SERVER, attributes={"http.request.method": method}
    ) as opened:
        yield opened


def answered(opened: "Span | None", *, method: str, route: str, status: int, request_id: str) -> None:
    """Say in a request's span which route answered, and how."""
    if opened is None:
        return
    from opentelemetry.trace import StatusCode

    opened.update_name(f"{method} {route}")
    opened.set_attributes(
        {"http.route": route, "http.response.status_code": status, "interplay.request_id": request_id}
    )
    if status >= 500:
        opened.set_status(StatusCode.ERROR)


def current() -> str | None:
    """Return the context of the span that is open here, to be stored; None if this process does not trace."""
    if _on is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def record(timed: Sequence[Timed], *, parent: str | None = None, **attributes: str | float | None) -> None:
    """Make spans of work that was timed elsewhere, within the span that is open here, or that `parent` names."""
    if _on is None or (parent is None and not _is_open()):
        return
    from opentelemetry.trace import set_span_in_context

    outer = _read({"traceparent": parent}) if parent is not None else None
    opened: list[Span] = []
    for one in timed:
        context = outer if one.parent is None else set_span_in_context(opened[one.parent])
        opened.append(
            _on.tracer.start_span(one.name, context=context, start_time=one.began_ns, attributes=_named(attributes))
        )
    for made, one in zip(opened, timed, strict=True):
        made.end(one.ended_ns)


def waited(seconds: float, *, parent: str | None) -> None:
    """Trace a wait that ends now, within a stored context."""
    if _on is not None and parent is not None:
        ended = time.time_ns()
        record([Timed("wait in the queue", ended - int(max(seconds, 0.0) * 1e9), ended)], parent=parent)


def failed(opened: "Span | None", what: str | None) -> None:
    """Say in a span that its work failed, and by which problem; None says nothing."""
    if opened is not None and what is not None:
        from opentelemetry.trace import StatusCode

        opened.set_status(StatusCode.ERROR, what)


def _is_open() -> bool:
    """Return whether a span is open here, of a request or of work for one."""
    from opentelemetry.trace import get_current_span

    return get_current_span().get_span_context().is_valid


def _read(carried: Mapping[str, str]) -> "Context":
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # Of nothing else: what is open here belongs to another trace.
    return TraceContextTextMapPropagator().extract(carried, context=Context())


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"interplay.{name}": value for name, value in attributes.items() if value is not None}

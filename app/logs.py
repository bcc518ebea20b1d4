"""Logs on standard error: lines for people, or JSON objects, which say what request and what run they belong to."""

import logging
import math
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from app.errors import first_line
from app.settings import Settings

# What this thread or task works for: request_id, analysis_id, fetch_id.
_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=MappingProxyType({}))
# Loggers that clients and dependencies can make repeat the same message endlessly.
_TALKATIVE = (
    "app.api.events",
    "app.api.problems",
    "asyncio",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk.trace.export",
    "uvicorn.error",
)
_REPEAT_SECONDS = 10.0


def start_logging(settings: Settings) -> None:
    """Log to standard error. Libraries log every step at level INFO; only `debug` shows those."""
    level = settings.log_level.upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _json_formatter()
        if settings.log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level, handlers=[handler])
    # It has a handler and a form of its own, unless there is one.
    logging.getLogger("dbos").addHandler(logging.NullHandler())
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_Repeated())
    if level == "INFO":
        for name in ("alembic", "dbos", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def about(**members: str | None) -> Iterator[None]:
    """Say in what is logged during the block what it is about; None says nothing."""
    given = {name: value for name, value in members.items() if value is not None}
    token = _about.set({**_about.get(), **given})
    try:
        yield
    finally:
        _about.reset(token)


def current_request() -> str | None:
    """Return the id of the request that is being answered."""
    return _about.get().get("request_id")


def _json_formatter() -> logging.Formatter:
    # Here, as most services log text.
    import structlog

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_what_it_is_about,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _without_colour,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
    )


def _without_colour(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Leave out what uvicorn adds for terminals."""
    event.pop("color_message", None)
    return event


def _add_what_it_is_about(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.update(_about.get())
    return event


class _Repeated(logging.Filter):
    """Passes one log record of a kind in ten seconds, with the number of similar ones dropped since."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is the first of its kind for a while.

        The kind is the text without arguments, and the exception.
        """
        kind = f"{record.msg} {record.exc_info[1]!r}" if record.exc_info else str(record.msg)
        kind = first_line(kind)[:200]
        if record.created - self._said_at.get(kind, -math.inf) < _REPEAT_SECONDS:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        if len(self._said_at) > 1000:
            self._said_at.clear()
        self._said_at[kind] = record.created
        if left_out := self._left_out.pop(kind, 0):
            record.msg = f"{record.msg} (and {left_out} more like it)"
        return True

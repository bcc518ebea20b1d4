"""What an operator sees: `GET /metrics` for Prometheus, and an id and a line of the log for each request.

Figures of the database are the whole service's, whichever of its API processes is asked; they are read at most every
few seconds. Those of requests are this process's own.
"""

import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import queue, retention, traces
from app.api.events import Events
from app.api.readiness import living_workers
from app.database import clock, read
from app.logs import about
from app.models import Analysis, Blob, Fetch, Point, Report, Turn
from app.storage import Storage, StorageUnavailable

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)
access = logging.getLogger("interplay.access")

# Prometheus asks every 15 s or so; several of them, or people, must not cost more.
_KEEP_SECONDS = 5.0
# To list what a bucket keeps takes requests to it.
_KEEP_STORED_SECONDS = 60.0
_RECENTLY = timedelta(minutes=1)
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
_PLACE = "interplay.route"
_REQUEST_ID = b"x-request-id"
_NOT_TRACED = ("/healthz", "/readyz", "/metrics", "/static/")
_PLAIN = re.compile(r"[A-Za-z0-9._:/=+-]{1,64}")


class Measures:
    """What this process measures, and what it reads for whoever asks.

    Args:
        engine: of the database.
        storage: of the blobs.
        events: the streams of this process.
    """

    def __init__(self, engine: sa.Engine, storage: Storage, events: Events) -> None:
        self.registry = CollectorRegistry()
        # The times at which counters began would be as many series again.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.requests = Histogram(
            "interplay_http_request_seconds",
            "Time from a request's headers to its answer's last byte, without streams of events.",
            ["method", "route", "status"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.received = Counter(
            "interplay_http_received_bytes", "Bytes of requests' bodies.", ["route"], registry=self.registry
        )
        self.sent = Counter("interplay_http_sent_bytes", "Bytes of answers' bodies.", ["route"], registry=self.registry)
        self._removed = Counter(
            "interplay_retention_removed",
            "Rows that this process removed by their age.",
            ["what"],
            registry=self.registry,
        )
        self._removed_bytes = Counter(
            "interplay_retention_removed_bytes",
            "Bytes of reports and files that this process removed by their age.",
            registry=self.registry,
        )
        self._retained_at = Gauge(
            "interplay_retention_finished_timestamp_seconds",
            "When this process last removed all that is old, since 1970; 0 if it has not.",
            registry=self.registry,
        )
        for what in retention.NOUNS:
            self._removed.labels(what)
        ProcessCollector(registry=self.registry)
        self.registry.register(_OfService(engine, storage, events))

    def count_removed(self, what: str, size_bytes: int) -> None:
        """Count a row that has gone by its age."""
        self._removed.labels(what).inc()
        self._removed_bytes.inc(size_bytes)

    def note_retention(self) -> None:
        """Note that all that is old has gone."""
        self._retained_at.set_to_current_time()


class Measured:
    """Measures, names and logs each request; the outermost middleware, so that refusals count too.

    A request has the id that its X-Request-ID gives, or a new one. The answer has it, and so has what is logged of it
    here and where the analysis that it asks for is computed.
    """

    def __init__(self, app: ASGIApp, *, measures: Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, streams = time.monotonic(), 500, False
        received = sent = 0
        place: dict[str, str] = {}
        request_id = _id_of(scope)

        async def hear() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def note(message: Message) -> None:
            nonlocal status, streams, sent
            sent += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = (b"content-type", b"text/event-stream") in {
                    (name.lower(), value.partition(b";")[0]) for name, value in message["headers"]
                }
                headers = [*message["headers"], (_REQUEST_ID, request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        with about(request_id=request_id), self._span(scope) as opened:
            try:
                await self._app({**scope, _PLACE: place}, hear, note)
            finally:
                seconds, route = time.monotonic() - began, place.get("route", "none")
                traces.answered(opened, method=scope["method"], route=route, status=status, request_id=request_id)
                if not streams:
                    self._measures.requests.labels(scope["method"], route, str(status)).observe(seconds)
                self._measures.received.labels(route).inc(received)
                self._measures.sent.labels(route).inc(sent)
                # Neither the path, which may be a name, nor the query, which may be anything.
                about_it = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6)}
                access.info("%s %s: %d", scope["method"], route, status, extra=about_it)

    def _span(self, scope: Scope) -> "AbstractContextManager[Span | None]":
        # What machines ask all the time would bury what people ask.
        if not traces.is_on() or scope["path"].startswith(_NOT_TRACED):
            return nullcontext()
        return traces.request_span(scope["method"], scope["headers"])


def _id_of(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"").decode("latin-1")
    return given if _PLAIN.fullmatch(given) else uuid4().hex


class Named:
    """Tells `Measured` which route has answered; stands directly before the routes, which write it into the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            route = scope.get("route")
            if route is not None and _PLACE in scope:
                # FastAPI gives the path within its router, of which those of the API have one prefix.
                prefix = "/v1" if scope["path"].startswith("/v1/") else ""
                scope[_PLACE]["route"] = prefix + route.path.removeprefix(prefix)


class _OfService(Collector):
    """Reads the figures of the whole service, no more often than every few seconds."""

    def __init__(self, engine: sa.Engine, storage: Storage, events: Events) -> None:
        self._engine, self._storage, self._events = engine, storage, events
        self._reading = threading.Lock()
        self._found: list[GaugeMetricFamily] = []
        self._found_at = self._stored_at = float("-inf")
        self._stored: list[GaugeMetricFamily] = []

    def describe(self) -> Iterable[Any]:
        """Return nothing: names are known once something was read, and none is registered twice."""
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._reading:
            if time.monotonic() - self._found_at > _KEEP_SECONDS:
                self._found, self._found_at = [*self._read()], time.monotonic()
            yield from self._found
        yield _gauge("interplay_event_streams", "Streams of events that are open in this process.", self._events.n_open)

    def _read(self) -> Iterator[GaugeMetricFamily]:
        up = True
        try:
            yield from self._of_database()
        except sa.exc.SQLAlchemyError as error:
            logger.warning("the database does not answer: %s", error)
            up = False
        yield _gauge("interplay_database_up", "Whether the database answered.", up)
        try:
            yield _gauge(
                "interplay_staging_free_bytes", "Room where this machine stages files.", self._storage.free_bytes()
            )
            if time.monotonic() - self._stored_at > _KEEP_STORED_SECONDS:
                self._stored, self._stored_at = [*self._of_storage()], time.monotonic()
            yield from self._stored
        except StorageUnavailable as error:
            logger.warning("the storage does not answer: %s", error)

    def _of_storage(self) -> Iterator[GaugeMetricFamily]:
        kept = self._storage.list_features()
        yield _gauge("interplay_features", "Passes whose features are kept.", len({file.entry for file in kept}))
        yield _gauge("interplay_feature_bytes", "Bytes of kept features.", sum(file.size_bytes for file in kept))
        yield _gauge(
            "interplay_cache_bytes", "Bytes of a bucket's files that this machine keeps.", self._storage.cached_bytes()
        )

    def _of_database(self) -> Iterator[GaugeMetricFamily]:
        dialect = self._engine.dialect.name
        runs = GaugeMetricFamily(
            "interplay_runs", "Analyses and fetches that have not ended.", labels=["kind", "status"]
        )
        wait = GaugeMetricFamily(
            "interplay_oldest_wait_seconds", "Time since the oldest queued run was asked for.", labels=["kind"]
        )
        attempts = GaugeMetricFamily(
            "interplay_most_attempts", "Attempts of the run that has had most, of those that go on.", labels=["kind"]
        )
        with read(self._engine) as session:
            now = clock(session)
            for kind, status, n_runs, oldest, most in (
                *session.execute(_open_runs(Analysis, Analysis.kind, dialect)),
                *session.execute(_open_runs(Fetch, sa.literal("fetch"), dialect)),
            ):
                runs.add_metric([kind, status], n_runs)
                if status == "queued":
                    wait.add_metric([kind], (now - oldest).total_seconds())
                attempts.add_metric([kind], most)
            yield from _of_points(session, now)
            wanted = _wanted_workers(session)
            n_blobs, n_bytes = session.execute(sa.select(sa.func.count(), sa.func.sum(Blob.size_bytes))).one()
            n_reports = session.scalar(sa.select(sa.func.count()).select_from(Report))
        yield from (runs, wait, attempts)
        yield _gauge("interplay_wanted_workers", "Workers that would have something to do now.", wanted)
        yield _gauge("interplay_blobs", "Stored files.", n_blobs)
        yield _gauge("interplay_blob_bytes", "Bytes of all stored files.", n_bytes or 0)
        yield _gauge("interplay_reports", "Reports.", n_reports or 0)
        workers = GaugeMetricFamily("interplay_workers", "Workers that have been heard of lately.", labels=["device"])
        silence = GaugeMetricFamily(
            "interplay_worker_silence_seconds", "Time since a worker's last heartbeat.", labels=["worker", "host"]
        )
        memory = GaugeMetricFamily(
            "interplay_worker_memory_bytes",
            "Memory of a worker's device, or as much of it as analyses may use.",
            labels=["worker", "host", "device"],
        )
        counts: dict[str, int] = {}
        for worker in living_workers(self._engine):
            counts[worker.device or "starting"] = counts.get(worker.device or "starting", 0) + 1
            if worker.device is not None and worker.memory_bytes is not None:
                memory.add_metric([worker.id, worker.host, worker.device], worker.memory_bytes)
            silence.add_metric([worker.id, worker.host], max((now - worker.heartbeat_at).total_seconds(), 0.0))
        for device, n_workers in sorted(counts.items()):
            workers.add_metric([device], n_workers)
        yield from (workers, silence, memory)


def _of_points(session: Session, now: datetime) -> Iterator[GaugeMetricFamily]:
    """Count the points of planned analyses that go on, the turns at them, and the points of the last minute."""
    points = GaugeMetricFamily(
        "interplay_points", "Points of planned analyses that go on and are planned so far.", labels=["status"]
    )
    status = sa.case(
        (Point.finished_at.is_not(None), "finished"), (Point.turn_id.is_not(None), "running"), else_="waiting"
    )
    going_on = sa.select(Analysis.id).where(Analysis.outcome.is_(None))
    counted = sa.select(status, sa.func.count()).where(Point.analysis_id.in_(going_on)).group_by(status)
    for name, n_points in session.execute(counted):
        points.add_metric([name], n_points)
    turns = GaugeMetricFamily("interplay_turns", "Turns at planned analyses that have not ended.", labels=["status"])
    began = sa.case((Turn.began_at.is_(None), "waiting"), else_="running")
    for name, n_turns in session.execute(
        sa.select(began, sa.func.count()).where(Turn.ended_at.is_(None)).group_by(began)
    ):
        turns.add_metric([name], n_turns)
    recent = sa.select(sa.func.count()).where(Point.finished_at > now - _RECENTLY)
    yield from (points, turns)
    yield _gauge(
        "interplay_points_finished_recently", "Points finished in the last minute.", session.scalar(recent) or 0
    )


def _wanted_workers(session: Session) -> int:
    """Return how many workers would have something to do: what waits and what runs, so that it falls at its end.

    A worker computes one analysis of one step, or one point, and meanwhile fetches some files.
    """
    unfinished = sa.select(sa.func.count()).where(Point.analysis_id == Analysis.id, Point.finished_at.is_(None))
    # One that no worker has planned yet has no points.
    points = sa.case((sa.exists().where(Point.analysis_id == Analysis.id), unfinished.scalar_subquery()), else_=1)
    open_ones = sa.select(sa.func.sum(points)).where(Analysis.outcome.is_(None))
    n_computed = session.scalar(open_ones) or 0
    n_fetches = session.scalar(sa.select(sa.func.count()).where(Fetch.outcome.is_(None))) or 0
    return max(int(n_computed), -(-n_fetches // queue.FETCHES_AT_A_TIME))


def _open_runs(model: type[Analysis] | type[Fetch], kind: Any, dialect: str) -> sa.Select[Any]:
    """Select kind, status, number, oldest request and most attempts of the runs that have not ended."""
    status = queue.status_of(dialect, model)
    columns = (kind, status, sa.func.count(), sa.func.min(model.created_at), sa.func.max(model.attempts))
    return sa.select(*columns).where(model.outcome.is_(None)).group_by(kind, status)


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, value=float(value))

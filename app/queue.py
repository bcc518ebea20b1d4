"""The queue: DBOS Transact on the service's own database. docs/decisions/0004-queue.md has the measurements.

Our tables `analyses` and `fetches` own the request, the request to cancel and the outcome; the queue owns which worker
runs it now. The id of an analysis, or of a fetch, is the id of its workflow, and a workflow's only input is that id.
"""

import threading
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.errors import NotCancellable
from app.models import Run, now

# The library takes a third of a second to load: an API process loads it once it answers, a worker while torch loads.
if TYPE_CHECKING:
    from dbos import DBOSClient as Client
    from dbos import DBOSPortableJSONSerializer

QUEUE = "analyses"
WORKFLOW = "run_analysis"
# Fetches need no device, so they wait for none.
FETCHES = "fetches"
FETCH_WORKFLOW = "run_fetch"
QUEUES = (QUEUE, FETCHES)
APPLICATION = "interplay"
# Increase it only when the order of a workflow's steps changes, and after draining the queue: a worker runs only
# workflows of its own version. The library's default hashes source code, which strands runs at every upgrade.
VERSION = "engine-1"
# Lower goes first, and runs without a priority go before all others: so every analysis has one.
PRIORITY = 100
# The queue's statuses of a run that has ended.
ENDED = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")


def serializer() -> "DBOSPortableJSONSerializer":
    """Return the serializer with which every process writes the queue's values."""
    from dbos import DBOSPortableJSONSerializer

    return DBOSPortableJSONSerializer()


def close_pickle() -> None:
    """Make this process refuse to unpickle any row of the queue's tables, whatever format the row declares.

    dbos unpickles a row marked as pickled even if another serializer is set, merely by listing it: anyone who could
    write to the database could run code. Every process that uses the queue calls this first.
    """
    from dbos import _serialization

    def refuse(*_: Any) -> NoReturn:
        raise ValueError("the queue holds JSON only: a pickled value is never opened")

    for name in ("serialize", "deserialize"):
        setattr(_serialization.DefaultSerializer, name, refuse)


def migrate(engine: sa.Engine) -> None:
    """Create or upgrade the queue's own tables; harmless if they are up to date."""
    import dbos

    dbos.DBOS.migrate(engine.url.render_as_string(hide_password=False))


def make_client(engine: sa.Engine) -> "Client":
    """Return a client to enqueue with.

    It shares the engine, so that a row and its enqueueing commit together, and connects lazily.
    """
    from dbos import DBOSClient

    close_pickle()
    return DBOSClient(
        system_database_engine=engine,
        serializer=serializer(),
        application_name=APPLICATION,
        lazy=True,
        retry_connection_errors=False,
    )


class LateClient:
    """A client that is created at first use, once for all threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._making = threading.Lock()
        self._client: Client | None = None

    def get(self) -> "Client":
        with self._making:
            if self._client is None:
                self._client = make_client(self._engine)
            return self._client

    def destroy(self) -> None:
        with self._making:
            if self._client is not None:
                self._client.destroy()


def enqueue(client: "Client", session: Session, run_id: str, *, workflow: str = WORKFLOW, queue: str = QUEUE) -> None:
    """Queue an analysis or a fetch in the caller's transaction: it runs if, and only if, the transaction commits."""
    client.enqueue_in_transaction(
        session,
        {
            "workflow_name": workflow,
            "queue_name": queue,
            "workflow_id": run_id,
            "app_version": VERSION,
            "priority": PRIORITY,
        },
        run_id,
    )


def status_of(dialect: str, run: type[Run]) -> sa.ColumnElement[str]:
    """Return SQL of the status that clients see, of the two that own it: our outcome, else the queue's claim."""
    claimed = is_claimed(dialect, run.id.expression)
    return sa.func.coalesce(run.outcome, sa.case((claimed, "running"), else_="queued"))


def cancel(session: Session, dialect: str, row: Run) -> None:
    """Record the request to cancel a locked run; a queued one ends here, a running one is stopped by its worker.

    Raises:
        NotCancellable: it has already succeeded or failed.
    """
    if row.outcome not in (None, "cancelled"):
        raise NotCancellable(f"{row.id!r} has {row.outcome} already.")
    if row.outcome is not None:
        return
    row.cancel_requested_at = row.cancel_requested_at or now()
    if not session.scalar(sa.select(is_claimed(dialect, sa.literal(row.id)))):
        row.outcome, row.finished_at = "cancelled", now()


def is_claimed(dialect: str, run_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Return SQL that is true while a worker holds the run; `dialect` is the database's."""
    return has_status(dialect, run_id, "PENDING")


def has_status(dialect: str, run_id: sa.ColumnElement[str], *statuses: str) -> sa.ColumnElement[bool]:
    """Return SQL that is true where the queue gives a run one of these statuses of its own."""
    schema = None if dialect == "sqlite" else "dbos"
    runs = sa.table("workflow_status", sa.column("workflow_uuid"), sa.column("status"), schema=schema)
    return sa.exists().where(runs.c.workflow_uuid == run_id, runs.c.status.in_(statuses))

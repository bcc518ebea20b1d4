"""The queue: DBOS Transact on the service's own database. docs/decisions/0004-queue.md has the measurements.

Our tables `analyses` and `fetches` own the request, the request to cancel and the outcome; the queue owns which worker
runs it now. The id of an analysis, or of a fetch, is the id of its workflow, and a workflow's only input is that id.

An analysis of one step waits on the queue of those who compute. A planned one has a plan, which holds no device and
waits on a queue of its own, and turns on the queue of those who compute. Whatever needs more device memory than some
workers have is planned, and its turns wait on queues of workers that have enough. So is an evaluation whose pass is
cut into shards.
"""

import logging
import threading
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.database import clock, read
from app.errors import NotCancellable
from app.models import Analysis, Run, Turn, Worker, now
from app.schemas.kinds import PLANNED

# The library takes a third of a second to load: an API process loads it once it answers, a worker while torch loads.
if TYPE_CHECKING:
    from dbos import DBOSClient as Client
    from dbos import DBOSPortableJSONSerializer

logger = logging.getLogger(__name__)

QUEUE = "analyses"
WORKFLOW = "run_analysis"
TURN_WORKFLOW = "run_turn"
PLANS = "plans"
PLAN_WORKFLOW = "run_plan"
# Fetches need no device, so they wait for none.
FETCHES = "fetches"
FETCH_WORKFLOW = "run_fetch"
# Of a worker, beside what it computes.
FETCHES_AT_A_TIME = 2
QUEUES = (QUEUE, PLANS, FETCHES)
# Of the workers whose device has a certain memory: what needs more than others have. Begins so.
_SIZED = f"{QUEUE}-"
# At the end of the id of a plan whose analysis began as one step, which has its id.
_OF_PLAN = ".plan"
APPLICATION = "interplay"
# Increase it only when the order of a workflow's steps changes, and after draining the queue: a worker runs only
# workflows of its own version. The library's default hashes source code, which strands runs at every upgrade.
VERSION = "engine-2"
# Versions whose waiting runs this one adopts, once its tables are made.
_ADOPTED = ("engine-1",)
# Lower goes first, and runs without a priority go before all others: so every analysis has one.
PRIORITY = 100
# Ids of plans and of turns begin with their analysis's.
_ID_CHARACTERS = 36
_MOST_STRAYS = 1000
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
    """Create or upgrade the queue's own tables, once ours are made; harmless if they are up to date."""
    import dbos

    dbos.DBOS.migrate(engine.url.render_as_string(hide_password=False))
    with engine.begin() as connection:
        _adopt(connection)


def _adopt(connection: sa.Connection) -> None:
    """Make runs of earlier versions, queued or of workers that have stopped, runs of this one.

    Planned analyses were one run with a step for each point; what has been computed of them is computed again.
    """
    runs = _runs(connection.dialect.name, "application_version", "queue_name", "name")
    theirs = sa.update(runs).where(runs.c.application_version.in_(_ADOPTED), runs.c.status.in_(("ENQUEUED", "PENDING")))
    planned = sa.select(Analysis.id).where(Analysis.kind.in_(PLANNED))
    connection.execute(
        theirs.where(runs.c.name == WORKFLOW, runs.c.workflow_uuid.in_(planned)).values(
            name=PLAN_WORKFLOW, queue_name=PLANS
        )
    )
    connection.execute(theirs.values(application_version=VERSION))


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


def enqueue_analysis(client: "Client", session: Session, row: Analysis) -> None:
    """Queue an analysis in the caller's transaction; a planned one with its first turn, which has its place."""
    if is_planned(row):
        enqueue(client, session, row.id, workflow=PLAN_WORKFLOW, queue=PLANS)
        enqueue_turns(client, session, row.id, [QUEUE])
    else:
        enqueue(client, session, row.id)


def sized(memory_bytes: int) -> str:
    """Return the queue of the workers whose device has so much memory."""
    return f"{_SIZED}{memory_bytes}"


def is_planned(row: Analysis) -> bool:
    """Return whether an analysis has a plan and turns.

    It has by its kind, as its pass is cut into shards, or as it needs more memory than a worker had.
    """
    return row.kind in PLANNED or row.shard_samples is not None or row.needs_bytes is not None


def plan_later(client: "Client", session: Session, row: Analysis, needs_bytes: int) -> None:
    """Make a locked analysis of one step, which a worker has taken that has too little memory, a planned one."""
    row.needs_bytes = needs_bytes
    enqueue(client, session, plan_of(row.id), workflow=PLAN_WORKFLOW, queue=PLANS)


def plan_of(analysis_id: str) -> str:
    """Return the id of the plan of an analysis that began as one step; other plans have that of their analysis."""
    return f"{analysis_id}{_OF_PLAN}"


def analysis_of_plan(plan_id: str) -> str:
    """Return the id of a plan's analysis."""
    return plan_id.removesuffix(_OF_PLAN)


def enqueue_turns(client: "Client", session: Session, analysis_id: str, queues: Sequence[str]) -> None:
    """Queue a turn at a planned analysis, whose row the caller has locked or just made, on each of these queues."""
    if not queues:
        return
    before = session.scalar(sa.select(sa.func.count()).where(Turn.analysis_id == analysis_id)) or 0
    moment = clock(session)
    ids = [f"{analysis_id}.{number}" for number, _ in enumerate(queues, start=before)]
    session.add_all(Turn(id=id_, analysis_id=analysis_id, created_at=moment) for id_ in ids)
    session.flush()
    for id_, name in zip(ids, queues, strict=True):
        enqueue(client, session, id_, workflow=TURN_WORKFLOW, queue=name)


def close_turns(session: Session, analysis_id: str) -> None:
    """End all turns at an analysis, which has ended: those that wait find nothing to do."""
    still = sa.update(Turn).where(Turn.analysis_id == analysis_id, Turn.ended_at.is_(None))
    session.execute(still.values(ended_at=clock(session)))


def enqueue(client: "Client", session: Session, run_id: str, *, workflow: str = WORKFLOW, queue: str = QUEUE) -> None:
    """Queue a run in the caller's transaction: it runs if, and only if, the transaction commits."""
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
    """Return SQL of the status that clients see, of the two that own it: our outcome, else the queue's claim.

    A planned analysis runs once its first point was begun: workers hold its points, not the analysis.
    """
    runs = is_claimed(dialect, run.id.expression)
    if issubclass(run, Analysis):
        planned = sa.or_(run.kind.in_(PLANNED), run.shard_samples.is_not(None), run.needs_bytes.is_not(None))
        runs = sa.case((planned, run.started_at.is_not(None)), else_=runs)
    return sa.func.coalesce(run.outcome, sa.case((runs, "running"), else_="queued"))


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
    if isinstance(row, Analysis) and is_planned(row):
        runs = row.started_at is not None
        if not runs:
            close_turns(session, row.id)
    else:
        runs = bool(session.scalar(sa.select(is_claimed(dialect, sa.literal(row.id)))))
    if not runs:
        row.outcome, row.finished_at = "cancelled", now()


def is_claimed(dialect: str, run_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Return SQL that is true while a worker holds the run; `dialect` is the database's."""
    return has_status(dialect, run_id, "PENDING")


def has_status(dialect: str, run_id: sa.ColumnElement[str], *statuses: str) -> sa.ColumnElement[bool]:
    """Return SQL that is true where the queue gives a run one of these statuses of its own."""
    runs = _runs(dialect)
    return sa.exists().where(runs.c.workflow_uuid == run_id, runs.c.status.in_(statuses))


def count_waiting(session: Session, *, most: int) -> int:
    """Return how many analyses of one step wait for a worker, counted up to a number."""
    runs = _runs(session.get_bind().dialect.name, "queue_name", "name", "application_version")
    waiting = sa.select(runs.c.workflow_uuid).where(
        runs.c.queue_name == QUEUE,
        runs.c.status == "ENQUEUED",
        runs.c.name == WORKFLOW,
        runs.c.application_version == VERSION,
    )
    return session.scalar(sa.select(sa.func.count()).select_from(waiting.limit(most).subquery())) or 0


def count_computing(session: Session) -> int:
    """Return how many runs workers compute: analyses of one step, and turns."""
    runs = _runs(session.get_bind().dialect.name, "queue_name")
    computes = sa.or_(runs.c.queue_name == QUEUE, runs.c.queue_name.startswith(_SIZED, autoescape=True))
    return session.scalar(sa.select(sa.func.count()).where(runs.c.status == "PENDING", computes)) or 0


def waiting(dialect: str, queues: Sequence[str]) -> sa.Select[*tuple[bool, ...]]:
    """Return SQL of one row: for each of these queues, whether a run waits there that this version may claim."""
    runs = _runs(dialect, "queue_name", "application_version")
    # SQLite takes an index of the runs in flight only where a literal of its condition stands in the query.
    in_flight: list[sa.ColumnElement[str]] = [sa.literal_column(f"'{status}'") for status in ("ENQUEUED", "PENDING")]
    waits = sa.exists().where(runs.c.status == in_flight[0], runs.c.status.in_(in_flight))
    ours = sa.or_(runs.c.application_version == VERSION, runs.c.application_version.is_(None))
    return sa.select(*(waits.where(runs.c.queue_name == name, ours).label(name) for name in queues))


def held(session: Session, worker_id: str, seen_since: datetime) -> dict[str, list[str]]:
    """Return the runs of a worker, and those of owners that are no worker with a heartbeat since then, by owner."""
    runs = _runs(session.get_bind().dialect.name, "queue_name", "executor_id")
    alive = sa.select(Worker.id).where(Worker.ended_at.is_(None), Worker.heartbeat_at >= seen_since)
    owner = sa.func.coalesce(runs.c.executor_id, "")
    theirs = sa.or_(owner == worker_id, owner.not_in(alive))
    found: dict[str, list[str]] = {}
    for name, run_id in session.execute(
        sa.select(owner, runs.c.workflow_uuid).where(runs.c.status == "PENDING", _is_ours(runs), theirs)
    ):
        found.setdefault(name, []).append(run_id)
    return found


def release(session: Session, worker_id: str, run_ids: Collection[str] | None = None) -> list[str]:
    """Queue the runs again that a worker holds, or those of them that are given; return their ids.

    Runs that another worker has claimed meanwhile are left alone; the library's own call resumes a run whoever holds
    it.
    """
    columns = ("queue_name", "executor_id", "owner_xid", "started_at_epoch_ms", "recovery_attempts")
    runs = _runs(session.get_bind().dialect.name, *columns)
    held = sa.update(runs).where(runs.c.status == "PENDING", runs.c.executor_id == worker_id, _is_ours(runs))
    if run_ids is not None:
        held = held.where(runs.c.workflow_uuid.in_(run_ids))
    # Attempts are counted in our tables: the library must not give up a run by its own count.
    again = held.values(status="ENQUEUED", owner_xid=None, started_at_epoch_ms=None, recovery_attempts=0)
    return list(session.scalars(again.returning(runs.c.workflow_uuid)))


def _is_ours(runs: sa.TableClause) -> sa.ColumnElement[bool]:
    """Return SQL that is true for runs of our queues, not of those that the library keeps for itself."""
    return sa.or_(runs.c.queue_name.in_(QUEUES), runs.c.queue_name.startswith(_SIZED, autoescape=True))


def has_ended(dialect: str, run: type[Run]) -> sa.ColumnElement[bool]:
    """Return SQL that is true once the queue runs nothing more for an analysis, or for a fetch."""
    run_id = run.id.expression
    if issubclass(run, Analysis):
        later = sa.and_(run.kind.not_in(PLANNED), run.shard_samples.is_(None), run.needs_bytes.is_not(None))
        run_id = sa.case((later, run.id + _OF_PLAN), else_=run.id)
    return has_status(dialect, run_id, *ENDED)


def forget(client: LateClient, engine: sa.Engine, run_ids: Sequence[str]) -> None:
    """Delete the queue's record of runs whose analyses are gone, those that a worker holds excepted.

    Such a one finds nothing to do and ends; `forget_strays` deletes it then, as it does what a kill has left.
    """
    runs = _runs(engine.dialect.name)
    ours = sa.select(runs.c.workflow_uuid).where(runs.c.workflow_uuid.in_(run_ids), runs.c.status != "PENDING")
    with read(engine) as session:
        found = list(session.scalars(ours))
    _delete(client, found)


def forget_strays(client: LateClient, engine: sa.Engine) -> None:
    """Delete the queue's record of ended runs of analyses that are gone, at most a thousand at a time."""
    runs = _runs(engine.dialect.name, "name")
    analysis_id = sa.func.substr(runs.c.workflow_uuid, 1, _ID_CHARACTERS)
    strays = sa.select(runs.c.workflow_uuid).where(
        runs.c.status.in_(ENDED),
        runs.c.name.in_((WORKFLOW, PLAN_WORKFLOW, TURN_WORKFLOW)),
        ~sa.exists().where(Analysis.id == analysis_id),
    )
    with read(engine) as session:
        found = list(session.scalars(strays.limit(_MOST_STRAYS)))
    _delete(client, found)


def _delete(client: LateClient, run_ids: list[str]) -> None:
    from dbos._error import DBOSException

    if not run_ids:
        return
    try:
        client.get().delete_workflows(run_ids)
    except (sa.exc.SQLAlchemyError, DBOSException) as error:
        # Nothing refers to these records, and what they are of has gone: the next sweep tries again.
        logger.warning("the records of %d runs were not deleted: %s", len(run_ids), error)


def turns_on(session: Session, queues: Collection[str]) -> dict[str, int]:
    """Return how many turns wait or run on each of these queues that has any."""
    runs = _runs(session.get_bind().dialect.name, "queue_name")
    open_ones = (
        sa.select(runs.c.queue_name, sa.func.count())
        .join(runs, runs.c.workflow_uuid == Turn.id)
        .where(Turn.ended_at.is_(None), runs.c.queue_name.in_(queues), runs.c.status.in_(("ENQUEUED", "PENDING")))
        .group_by(runs.c.queue_name)
        .select_from(Turn)
    )
    return dict(iter(session.execute(open_ones)))


def waiting_for_nobody(session: Session, analysis_id: str, queues: Collection[str]) -> list[str]:
    """Return turns at an analysis that wait for workers of a certain memory, on none of these queues."""
    runs = _runs(session.get_bind().dialect.name, "queue_name")
    waiting = sa.select(Turn.id).join(runs, runs.c.workflow_uuid == Turn.id)
    waiting = waiting.where(Turn.analysis_id == analysis_id, Turn.ended_at.is_(None), runs.c.status == "ENQUEUED")
    elsewhere = sa.and_(runs.c.queue_name.startswith(_SIZED, autoescape=True), runs.c.queue_name.not_in([*queues]))
    return list(session.scalars(waiting.where(elsewhere)))


def _runs(dialect: str, *columns: str) -> sa.TableClause:
    """Return the queue's table of runs, with its id, its status and further columns."""
    schema = None if dialect == "sqlite" else "dbos"
    return sa.table("workflow_status", *map(sa.column, ("workflow_uuid", "status", *columns)), schema=schema)

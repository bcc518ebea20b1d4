"""The liveness rounds of a worker, on both databases: lost runs of the queue are recovered."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dbos import DBOSClient

from app import queue
from app.database import read, write
from app.models import Analysis, Worker, now
from app.settings import Settings
from tests.services import until
from workers.liveness import Presence
from workers.tasks import Hello

DESCRIPTION = Hello(memory_bytes=2**30, device="cpu", torch_version="2", families=["builtin"], untried=[])


@pytest.fixture
def engine(engine_with_tables: sa.Engine) -> sa.Engine:
    return engine_with_tables


@pytest.fixture
def settings(engine: sa.Engine, empty_database: Settings) -> Settings:
    """Return settings of a database that has all tables."""
    return empty_database


@pytest.fixture
def client(queue_client: DBOSClient) -> DBOSClient:
    return queue_client


@contextmanager
def present(settings: Settings, engine: sa.Engine, worker_id: str, active: set[str]) -> Iterator[threading.Thread]:
    """Return a worker's liveness without the worker."""
    presence = Presence(settings, engine, worker_id, active)
    presence.register(DESCRIPTION)
    stopping = threading.Event()
    thread = threading.Thread(target=presence.keep_up, args=(stopping,))
    thread.start()
    try:
        yield thread
    finally:
        stopping.set()
        thread.join()
        presence.withdraw()
        presence.close()


def queued(engine: sa.Engine, client: DBOSClient, *, age: timedelta = timedelta(0)) -> str:
    """Queue an analysis; return its id."""
    with write(engine) as session:
        row = Analysis(
            kind="evaluation", name="a", options={}, request_sha256="0" * 64, created_at=now() - age, id=str(uuid4())
        )
        session.add(row)
        session.flush()
        queue.enqueue(client, session, row.id)
        return row.id


def claim(engine: sa.Engine, analysis_id: str, worker_id: str) -> None:
    """Set the queue's row as it is while a worker holds a run."""
    table = "workflow_status" if engine.dialect.name == "sqlite" else "dbos.workflow_status"
    with write(engine) as session:
        session.execute(
            sa.text(f"UPDATE {table} SET status = 'PENDING', executor_id = :worker WHERE workflow_uuid = :id"),
            {"worker": worker_id, "id": analysis_id},
        )


def status_of(client: DBOSClient, analysis_id: str) -> str:
    return str(client.list_workflows(workflow_ids=[analysis_id])[0].status)


def test_a_run_that_nobody_runs_is_queued_again(settings: Settings, engine: sa.Engine, client: DBOSClient) -> None:
    """A pending run of a living worker that is not active in it is resumed; an active one is left alone."""
    me = str(uuid4())
    stranded, active = queued(engine, client), queued(engine, client)
    claim(engine, stranded, me)
    claim(engine, active, me)
    with present(settings, engine, me, {active}):
        until(lambda: status_of(client, stranded) == "ENQUEUED", seconds=20)
        assert status_of(client, active) == "PENDING"


def test_the_work_of_a_dead_worker_is_queued_again(settings: Settings, engine: sa.Engine, client: DBOSClient) -> None:
    """A worker without its lock and with an old heartbeat is marked as ended, and its run is resumed."""
    dead, orphaned = str(uuid4()), queued(engine, client)
    claim(engine, orphaned, dead)
    long_ago = now() - timedelta(seconds=30)
    with write(engine) as session:
        session.add(Worker(id=dead, host="h", pid=1, started_at=long_ago, heartbeat_at=long_ago, **dict(DESCRIPTION)))
    with present(settings, engine, str(uuid4()), set()):
        until(lambda: status_of(client, orphaned) == "ENQUEUED", seconds=20)
        with read(engine) as session:
            until(lambda: session.scalar(sa.select(Worker.ended_at).where(Worker.id == dead)), seconds=5)


def test_a_worker_that_has_just_started_judges_at_once(settings: Settings, engine: sa.Engine) -> None:
    """All workers may have died together; but a server that has just started has freed the locks of living ones."""
    dead, long_ago = str(uuid4()), now() - timedelta(seconds=30)
    with write(engine) as session:
        session.add(Worker(id=dead, host="h", pid=1, started_at=long_ago, heartbeat_at=long_ago, **dict(DESCRIPTION)))
    presence = Presence(settings, engine, str(uuid4()), set())
    presence.register(DESCRIPTION)
    seen = presence._look()
    assert timedelta(seconds=29) < seen.silences[dead] < timedelta(seconds=60)
    ended = sa.select(Worker.ended_at).where(Worker.id == dead)
    with read(engine) as session:
        if engine.dialect.name == "postgresql":
            assert timedelta(0) < seen.server_age < timedelta(hours=4)
            presence._resume_lost_work(replace(seen, server_age=timedelta(seconds=3.9)))
            assert session.scalar(ended) is None
        presence._resume_lost_work(replace(seen, server_age=timedelta(seconds=4)))
        session.rollback()
        assert session.scalar(ended) is not None
    presence.withdraw()
    presence.close()


def test_a_living_worker_is_left_alone(settings: Settings, engine: sa.Engine, client: DBOSClient) -> None:
    """Two living workers never take each other's work, however often they poll."""
    first, second = str(uuid4()), str(uuid4())
    held = queued(engine, client)
    claim(engine, held, first)
    with present(settings, engine, first, {held}) as one, present(settings, engine, second, set()) as other:
        other.join(8)
        assert one.is_alive()
        assert other.is_alive()
        assert status_of(client, held) == "PENDING"


def test_a_worker_whose_clock_is_ahead_takes_nobody_for_dead(
    settings: Settings, engine: sa.Engine, client: DBOSClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock three minutes ahead affects neither a worker's judgement of others nor theirs of it."""
    ahead: set[threading.Thread] = set()

    def crooked() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=180 * (threading.current_thread() in ahead))

    for module in ("app.models", "workers.liveness"):
        monkeypatch.setattr(f"{module}.now", crooked)
    # The silence after which other workers act: a minute would be long for a test.
    monkeypatch.setattr("workers.liveness._HUNG_AFTER", timedelta(seconds=4))
    good, wrong = str(uuid4()), str(uuid4())
    held = queued(engine, client)
    claim(engine, held, good)
    with present(settings, engine, good, {held}) as one, present(settings, engine, wrong, set()) as other:
        ahead.add(other)
        other.join(8)
        assert one.is_alive()
        assert other.is_alive()
        assert status_of(client, held) == "PENDING"
        with read(engine) as session:
            beats = [worker.heartbeat_at for worker in session.scalars(sa.select(Worker))]
        assert max(beats) - min(beats) < timedelta(seconds=4)


def test_a_worker_that_was_marked_as_ended_stops(settings: Settings, engine: sa.Engine) -> None:
    """A worker that others have marked as dead notices at its next round and stops."""
    me = str(uuid4())
    with present(settings, engine, me, set()) as thread:
        with write(engine) as session:
            session.execute(sa.update(Worker).where(Worker.id == me).values(ended_at=now()))
        thread.join(10)
        assert not thread.is_alive()


def test_a_run_that_ended_without_an_outcome_fails_its_analysis(
    settings: Settings, engine: sa.Engine, client: DBOSClient
) -> None:
    """An analysis whose run ended in the queue without an outcome fails; a queued one keeps waiting."""
    lost = queued(engine, client, age=timedelta(minutes=1))
    waiting = queued(engine, client, age=timedelta(minutes=1))
    client.cancel_workflow(lost)
    with present(settings, engine, str(uuid4()), set()):

        def outcome(analysis_id: str) -> str | None:
            with read(engine) as session:
                return session.scalar(sa.select(Analysis.outcome).where(Analysis.id == analysis_id))

        until(lambda: outcome(lost) == "failed", seconds=20)
        assert outcome(waiting) is None


def test_runs_that_ended_long_ago_are_forgotten(settings: Settings, engine: sa.Engine, client: DBOSClient) -> None:
    """The queue's record of a run is deleted a day after its end; the analysis stays."""
    old, recent = queued(engine, client), queued(engine, client)
    for run in (old, recent):
        client.cancel_workflow(run)
    table = "workflow_status" if engine.dialect.name == "sqlite" else "dbos.workflow_status"
    two_days_ago = int((now() - timedelta(days=2)).timestamp() * 1000)
    with write(engine) as session:
        session.execute(
            sa.text(f"UPDATE {table} SET completed_at = :then WHERE workflow_uuid = :id"),
            {"then": two_days_ago, "id": old},
        )
    with present(settings, engine, str(uuid4()), set()):
        until(lambda: [run.workflow_id for run in client.list_workflows()] == [recent], seconds=20)
    with read(engine) as session:
        assert session.get(Analysis, old) is not None

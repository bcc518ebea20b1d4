"""What the queue library once got wrong, as reported to its authors, cannot strand or repeat a run of ours.

Each test is named after an issue of dbos-inc/dbos-transact-py, all of which are closed. They run at every version of
the library (docs/upgrading.md says how to change it).
"""

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa
from dbos import DBOSClient
from sqlalchemy.orm import Session

import migrations
from app import queue
from app.database import make_engine, read, write
from app.models import Worker, now
from app.settings import Settings
from tests.databases import fresh_database, postgres_server
from tests.services import Service, until
from tests.workers.test_liveness import DESCRIPTION, claim, present, queued, status_of
from workers.demand import Demand
from workers.locks import Line


@pytest.fixture
def engine(engine_with_tables: sa.Engine) -> sa.Engine:
    return engine_with_tables


@pytest.fixture
def client(queue_client: DBOSClient) -> DBOSClient:
    return queue_client


def worker_row(engine: sa.Engine, *, ended: bool = False) -> str:
    """Add a worker that has been silent for long; return its id."""
    id_, then = str(uuid4()), now() - timedelta(seconds=120)
    with write(engine) as session:
        about = {"host": "h", "pid": 1, "started_at": then, "heartbeat_at": then, **dict(DESCRIPTION)}
        session.add(Worker(id=id_, ended_at=then if ended else None, **about))
    return id_


def all_queued(client: DBOSClient, runs: list[str]) -> bool:
    return {str(run.status) for run in client.list_workflows(workflow_ids=runs)} == {"ENQUEUED"}


def answers(url: str) -> bool:
    """Return whether a database takes connections."""
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def test_716_the_database_restarts_while_work_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL crashes in the middle of a takeover of a hundred runs: none stays with the dead worker."""
    with postgres_server() as server, fresh_database(server.url) as url:
        settings = Settings(data_dir=tmp_path, database_url=url)
        engine = make_engine(settings)
        migrations.upgrade(engine)
        queue.migrate(engine)
        client = queue.make_client(engine)
        dead, runs = worker_row(engine), [queued(engine, client) for _ in range(100)]
        for run in runs:
            claim(engine, run, dead)
        takeovers = 0
        release = queue.release

        def interrupted(session: Session, *args: Any) -> list[str]:
            nonlocal takeovers
            released = release(session, *args)
            if not takeovers:
                server.restart()
                until(partial(answers, url), seconds=30)
            takeovers += 1
            return released

        monkeypatch.setattr("app.queue.release", interrupted)
        with present(settings, engine, str(uuid4()), set()):
            until(lambda: takeovers >= 1, seconds=30)
            until(partial(all_queued, client, runs), seconds=60)
        assert takeovers >= 2
        client.destroy()
        engine.dispose()


def test_742_a_takeover_with_an_old_list_leaves_what_another_has_claimed(engine: sa.Engine, client: DBOSClient) -> None:
    """Two take over one dead worker, and a third has claimed a run in between: only the dead worker's run is queued."""
    dead, third = worker_row(engine), worker_row(engine)
    taken, left = queued(engine, client), queued(engine, client)
    for run in (taken, left):
        claim(engine, run, dead)
    with read(engine) as session:
        seen_by_both = queue.held(session, third, now() - timedelta(seconds=5))[dead]
    assert set(seen_by_both) == {taken, left}
    claim(engine, taken, third)
    with write(engine) as session:
        assert queue.release(session, dead, seen_by_both) == [left]
    assert (status_of(client, taken), status_of(client, left)) == ("PENDING", "ENQUEUED")


def test_804_a_worker_that_claims_while_it_ends_keeps_nothing(
    empty_database: Settings, engine: sa.Engine, client: DBOSClient
) -> None:
    """A run that a worker has claimed after it was marked as ended, on its way out, goes to another."""
    ended, run = worker_row(engine, ended=True), queued(engine, client)
    claim(engine, run, ended)
    with present(empty_database, engine, str(uuid4()), set()):
        until(lambda: status_of(client, run) == "ENQUEUED", seconds=20)


def test_805_a_run_that_stops_between_two_steps_is_begun_again(
    empty_database: Settings, engine: sa.Engine, client: DBOSClient
) -> None:
    """A run that its living worker holds, with a recorded step, but that no thread of it runs, is queued again."""
    me, run = str(uuid4()), queued(engine, client)
    claim(engine, run, me)
    table = "operation_outputs" if engine.dialect.name == "sqlite" else "dbos.operation_outputs"
    with write(engine) as session:
        session.execute(
            sa.text(
                f"INSERT INTO {table} (workflow_uuid, function_id, function_name, output) VALUES (:id, 1, 'x', '1')"
            ),
            {"id": run},
        )
    with present(empty_database, engine, me, set()):
        until(lambda: status_of(client, run) == "ENQUEUED", seconds=20)


def test_attempts_are_not_counted_by_the_library(engine: sa.Engine, client: DBOSClient) -> None:
    """A run that is taken over again and again is never given up by the library's own limit of attempts."""
    run = queued(engine, client)
    table = "workflow_status" if engine.dialect.name == "sqlite" else "dbos.workflow_status"
    for _ in range(3):
        worker = worker_row(engine)
        claim(engine, run, worker)
        with write(engine) as session:
            session.execute(
                sa.text(f"UPDATE {table} SET recovery_attempts = 99 WHERE workflow_uuid = :id"), {"id": run}
            )
            assert queue.release(session, worker) == [run]
    with read(engine) as session:
        query = sa.text(f"SELECT status, recovery_attempts FROM {table} WHERE workflow_uuid = :id")
        assert tuple(session.execute(query, {"id": run}).one()) == ("ENQUEUED", 0)


def test_a_worker_knows_where_something_waits(engine: sa.Engine, client: DBOSClient, line: Line) -> None:
    """Of the queues, those with a run that this version may claim; an answer serves for as long as it may."""

    def asked(names: list[str]) -> list[bool]:
        demand = Demand(line, engine.dialect.name, dict.fromkeys(names, 0.0), [], lambda: False)
        return [demand.is_for(name) for name in names]

    names = [*queue.QUEUES, queue.sized(5)]
    assert asked(names) == [False] * 4
    run = queued(engine, client)
    assert asked(names) == [name == queue.QUEUE for name in names]
    plans_alone = Demand(line, engine.dialect.name, {queue.PLANS: 0.0}, [], lambda: False)
    assert plans_alone.is_for("a queue that it was not given")
    kept = Demand(line, engine.dialect.name, dict.fromkeys(names, 3600.0), [], lambda: False)
    assert kept.is_for(queue.QUEUE)
    claim(engine, run, worker_row(engine))
    assert asked(names) == [False] * 4
    assert kept.is_for(queue.QUEUE)
    table = "workflow_status" if engine.dialect.name == "sqlite" else "dbos.workflow_status"
    with write(engine) as session:
        again = f"UPDATE {table} SET status = 'ENQUEUED', application_version = 'another'"
        session.execute(sa.text(again))
    assert asked(names) == [False] * 4


def test_runs_of_living_workers_are_not_looked_at(engine: sa.Engine, client: DBOSClient) -> None:
    """A round reads its own runs, those of silent and of ended workers, and those that belong to nobody known."""
    own, living, silent, ended = worker_row(engine), worker_row(engine), worker_row(engine), worker_row(engine)
    with write(engine) as session:
        session.execute(sa.update(Worker).where(Worker.id.in_([own, living])).values(heartbeat_at=now()))
        session.execute(sa.update(Worker).where(Worker.id == ended).values(heartbeat_at=now(), ended_at=now()))
    owners = [own, living, silent, ended, "nobody"]
    runs = {owner: queued(engine, client) for owner in owners}
    for owner, run in runs.items():
        claim(engine, run, owner)
    with read(engine) as session:
        found = queue.held(session, own, now() - timedelta(seconds=5))
    assert found == {owner: [run] for owner, run in runs.items() if owner != living}


def test_an_idle_worker_asks_the_database_little(service_on_postgres: Service) -> None:
    """The library's threads ask for nothing but what waits: what `workers.demand` replaces is still what they call."""
    url = service_on_postgres.environment["INTERPLAY_DATABASE_URL"]
    service_on_postgres.worker()
    transactions = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"

    def in_five_seconds() -> int:
        with psycopg.connect(url, autocommit=True) as connection:
            before = connection.execute(transactions).fetchone()
            time.sleep(5)
            connection.execute("SELECT pg_stat_clear_snapshot()")
            after = connection.execute(transactions).fetchone()
        assert before is not None
        assert after is not None
        return int(after[0]) - int(before[0])

    # Two looks for work, a heartbeat and a look after others a second, and those of the API. 150 without `demand`.
    until(lambda: in_five_seconds() < 35, seconds=120)

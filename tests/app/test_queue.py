"""Properties of the queue's library that we rely on, on both databases: a new version must keep them."""

import base64
import pickle
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dbos import DBOSClient

from app import queue
from app.database import read, write


@pytest.fixture
def engine(engine_with_tables: sa.Engine) -> sa.Engine:
    return engine_with_tables


@pytest.fixture
def client(queue_client: DBOSClient) -> DBOSClient:
    return queue_client


def test_enqueueing_commits_and_rolls_back_with_our_transaction(engine: sa.Engine, client: DBOSClient) -> None:
    """A run exists once the transaction that queued it commits, and does not after a rollback."""
    kept, dropped = str(uuid4()), str(uuid4())
    with write(engine) as session:
        queue.enqueue(client, session, kept)
    with write(engine) as session:
        queue.enqueue(client, session, dropped)
        session.rollback()
    runs = client.list_workflows()
    assert [(run.workflow_id, run.status, run.queue_name, run.app_version, run.priority) for run in runs] == [
        (kept, "ENQUEUED", queue.QUEUE, queue.VERSION, queue.PRIORITY)
    ]
    assert runs[0].input == {"args": (kept,), "kwargs": {}}


def test_status_is_readable_in_sql(engine: sa.Engine, client: DBOSClient) -> None:
    """The queue's table and status words are those of our queries."""
    run = str(uuid4())
    with write(engine) as session:
        queue.enqueue(client, session, run)

    def has(*statuses: str) -> bool:
        with read(engine) as session:
            return bool(session.scalar(sa.select(queue.has_status(engine.dialect.name, sa.literal(run), *statuses))))

    assert has("ENQUEUED")
    assert not has("PENDING")
    with read(engine) as session:
        assert not session.scalar(sa.select(queue.is_claimed(engine.dialect.name, sa.literal(run))))
    client.cancel_workflow(run)
    assert has("CANCELLED")
    assert has(*queue.ENDED)


def test_pickled_rows_are_never_opened(engine: sa.Engine, client: DBOSClient, tmp_path: Path) -> None:
    """A row that is marked as pickled does not run its code, not even when it is listed."""
    run, trap = str(uuid4()), tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (trap,))

    with write(engine) as session:
        queue.enqueue(client, session, run)
    schema = "" if engine.dialect.name == "sqlite" else "dbos."
    text = base64.b64encode(pickle.dumps(Trap())).decode()
    with write(engine) as session:
        session.execute(sa.text(f"UPDATE {schema}workflow_status SET serialization = 'py_pickle'"))
        session.execute(sa.text(f"UPDATE {schema}workflow_input SET inputs = :text"), {"text": text})
    with read(engine) as session:
        assert session.scalars(sa.text(f"SELECT inputs FROM {schema}workflow_input")).all() == [text]
    assert [found.workflow_id for found in client.list_workflows()] == [run]
    assert not trap.exists()

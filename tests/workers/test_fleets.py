"""What keeps hundreds of workers cheap: one connection each, few that look after the others, looks that get rarer."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa

from app import queue
from app.database import read
from app.models import Worker
from app.settings import Settings
from tests.services import until
from tests.workers.test_liveness import DESCRIPTION, present
from workers.demand import Demand
from workers.liveness import Presence
from workers.locks import AdvisoryLocks, FileLocks, Line


@pytest.fixture
def engine(engine_with_tables: sa.Engine) -> sa.Engine:
    return engine_with_tables


@pytest.fixture
def settings(engine: sa.Engine, empty_database: Settings) -> Settings:
    """Return settings of a database that has all tables."""
    return empty_database


def test_a_line_leaves_the_pool_as_it_was(engine: sa.Engine, line: Line) -> None:
    """Its connection commits by itself and never goes back to the pool, where a transaction would not begin."""

    def kind() -> object:
        with engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            return raw.isolation_level if engine.dialect.name == "sqlite" else raw.autocommit

    before = kind()
    assert line.rows(sa.select(sa.literal(1)))[0][0] == 1
    line.close()
    assert [kind() for _ in range(5)] == [before] * 5
    assert line.rows(sa.select(sa.literal(2)))[0][0] == 2
    assert line.session == 2


def test_a_lock_is_lost_with_its_session_and_taken_again(settings: Settings, engine: sa.Engine, line: Line) -> None:
    """What ends the session, as a server's restart does, frees the lock of a worker that lives on; a file's stays."""
    other = Line(engine)
    if engine.dialect.name == "sqlite":
        folder = settings.data_dir / "workers"
        mine, theirs = FileLocks(folder), FileLocks(folder)
    else:
        mine, theirs = AdvisoryLocks(line), AdvisoryLocks(other)  # type: ignore[assignment]
    assert mine.hold("a")
    assert not theirs.hold("a")
    assert not theirs.holds("a")
    if engine.dialect.name == "sqlite":
        line.close()
        assert not theirs.hold("a")
        mine.close()
        assert theirs.hold("a")
        theirs.close()
        return
    (row,) = line.rows(sa.text("SELECT pg_backend_pid()"))
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [row[0]])
    assert theirs.hold("a")
    with pytest.raises(sa.exc.DBAPIError):
        line.rows(sa.select(sa.literal(1)))
    assert not mine.hold("a")
    other.close()
    until(lambda: mine.hold("a"), seconds=5)


def test_three_workers_look_after_the_others(settings: Settings, engine: sa.Engine) -> None:
    """Others take their places when they end; all of them know how many workers there are."""
    told: dict[str, list[tuple[int, int]]] = {}
    presences = []
    for _ in range(5):
        one = Presence(settings, engine, str(uuid4()), set())
        one.register(DESCRIPTION)
        presences.append(one)
    watching = [one for one in presences if one._watches()]
    assert watching == presences[:3]
    presences[1].withdraw()
    presences[1].close()
    assert [one for one in presences[2:] if one._watches()] == presences[2:4]
    for number, one in enumerate(presences):
        if number != 1:
            one.on_fleet = lambda *fleet, number=number: told.setdefault(str(number), []).append(fleet)
            one._look_after_others()
            one.withdraw()
            one.close()
    assert told == {"0": [(4, 0)], "2": [(3, 0)], "3": [(2, 0)], "4": [(1, 0)]}


def test_all_workers_find_a_dead_one(settings: Settings, engine: sa.Engine) -> None:
    """The three that look in every round may stand still: everybody looks now and then."""
    stuck = [Line(engine) for _ in range(3)]
    folder = settings.data_dir / "workers"
    with ExitStack() as stack:
        for number, line in enumerate(stuck):
            locks = FileLocks(folder) if engine.dialect.name == "sqlite" else AdvisoryLocks(line)
            stack.callback(locks.close)
            stack.callback(line.close)
            assert locks.hold(f"watch-{number}")
        dead = Presence(settings, engine, str(uuid4()), set())
        dead.register(DESCRIPTION)
        dead.close()
        with present(settings, engine, str(uuid4()), set()), read(engine) as session:
            query = sa.select(Worker.ended_at).where(Worker.id == dead._id)
            until(lambda: session.scalar(query), seconds=60)


def test_the_more_workers_wait_the_less_often_each_looks(engine: sa.Engine, line: Line) -> None:
    """A worker alone looks as often as it is told; of 200 that wait each looks once a second, and never less often."""
    queues = [SimpleNamespace(name=name, _polling_interval_sec=pause) for name, pause in
              ((queue.QUEUE, 0.1), (queue.PLANS, 1.0))]  # fmt: skip
    ages = {queue.QUEUE: 0.05, queue.PLANS: 1.0}
    demand = Demand(line, engine.dialect.name, ages, [queue.QUEUE], lambda: False)
    demand.join(queues)  # type: ignore[arg-type]

    def pauses(workers: int, computing: int) -> list[float]:
        demand.share(workers, computing)
        return [one._polling_interval_sec for one in queues]

    assert pauses(1, 0) == [0.1, 1.0]
    assert pauses(40, 0) == [0.2, 1.0]
    assert pauses(200, 0) == [1.0, 5.0]
    assert pauses(2000, 0) == [1.0, 5.0]
    assert pauses(200, 200) == [0.1, 5.0]
    assert pauses(200, 201) == [0.1, 5.0]
    assert pauses(1, 1) == [0.1, 1.0]

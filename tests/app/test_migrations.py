"""Migrations on real SQLite and real PostgreSQL."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

import migrations
from app.database import make_engine
from app.models import Base
from app.settings import Settings

OURS = set(Base.metadata.tables)


@pytest.fixture
def settings(empty_database: Settings) -> Settings:
    """Settings of an empty database."""
    return empty_database


@pytest.fixture
def engine(settings: Settings) -> Iterator[sa.Engine]:
    engine = make_engine(settings)
    yield engine
    engine.dispose()


def _tables(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def test_upgrade_from_empty_makes_what_the_models_say(engine: sa.Engine) -> None:
    """An empty database, once upgraded, does not differ from app.models; before that every table is missing."""
    assert {difference[1].name for difference in migrations.check(engine) if difference[0] == "add_table"} == OURS
    assert migrations.current(engine) is None
    migrations.upgrade(engine)
    assert migrations.check(engine) == []
    assert migrations.current(engine) == "0018" == migrations.head()
    assert ScriptDirectory(str(Path(migrations.__file__).parent)).get_heads() == [migrations.head()]
    assert _tables(engine) == OURS | {"alembic_version"}


def test_the_migrated_tables_have_the_names_that_the_models_give(engine: sa.Engine) -> None:
    """Keys, constraints and indexes carry the names of the naming convention, which later migrations rely on."""
    migrations.upgrade(engine)
    found = sa.MetaData()
    found.reflect(engine, only=sorted(OURS))
    for name, table in Base.metadata.tables.items():
        assert {c.name for c in found.tables[name].constraints} == {c.name for c in table.constraints}
        assert {i.name for i in found.tables[name].indexes} == {i.name for i in table.indexes}


def test_upgrade_twice_is_harmless(engine: sa.Engine) -> None:
    """A second upgrade keeps rows and tables."""
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Base.metadata.tables["blobs"]).values(sha256="a" * 64, size_bytes=2**40))
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.select(Base.metadata.tables["blobs"])).all() == [("a" * 64, 2**40)]
    assert migrations.check(engine) == []


def test_downgrade_to_base_leaves_nothing(engine: sa.Engine) -> None:
    """After a downgrade only alembic's own table is left, empty, and an upgrade starts over."""
    migrations.upgrade(engine)
    migrations.downgrade(engine, "base")
    assert _tables(engine) == {"alembic_version"}
    assert migrations.current(engine) is None
    migrations.upgrade(engine)
    assert migrations.check(engine) == []


@pytest.mark.parametrize("table", ["workflow_status", "queues"])
def test_tables_of_others_are_left_alone(engine: sa.Engine, table: str) -> None:
    """Tables that are not ours are no difference, and a downgrade does not drop them."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql(f"CREATE INDEX ix_{table} ON {table} (id)")
    migrations.upgrade(engine)
    assert migrations.check(engine) == []
    migrations.downgrade(engine, "base")
    assert table in _tables(engine)


@pytest.mark.parametrize(
    "change",
    [
        "DROP INDEX ix_reports_name",
        "ALTER TABLE probes ADD COLUMN extra INTEGER",
        "ALTER TABLE analyses DROP COLUMN attempts",
        "DROP TABLE workers",
    ],
)
def test_check_sees_a_difference(engine: sa.Engine, change: str) -> None:
    """A missing or additional index, column or table is reported."""
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(change)
    assert len(migrations.check(engine)) == 1


def test_upgrades_at_the_same_time_are_safe(settings: Settings) -> None:
    """Four engines that upgrade one empty database at the same time all succeed, and the tables are there once."""
    barrier = Barrier(4)

    def upgrade(_: int) -> str | None:
        engine = make_engine(settings)
        try:
            barrier.wait(30)
            migrations.upgrade(engine)
            return migrations.current(engine)
        finally:
            engine.dispose()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(upgrade, range(4))) == ["0018"] * 4


def test_processes_that_upgrade_at_the_same_time_are_safe(settings: Settings, engine: sa.Engine) -> None:
    """Three processes that upgrade at the same time all succeed, as when machines start at once."""
    code = (
        "import sys, migrations\n"
        "from app.database import make_engine\n"
        "from app.settings import Settings\n"
        "migrations.upgrade(make_engine(Settings(data_dir=sys.argv[1], database_url=sys.argv[2])))\n"
    )
    arguments = [sys.executable, "-c", code, str(settings.data_dir), settings.database_url]
    processes = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert migrations.check(engine) == []


def test_a_failed_upgrade_leaves_nothing_behind(engine: sa.Engine) -> None:
    """If a table blocks the last step, every step before it is rolled back."""
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE workers (id INTEGER PRIMARY KEY)")
    with pytest.raises(sa.exc.DBAPIError, match="workers"):
        migrations.upgrade(engine)
    assert _tables(engine) == {"workers"}
    assert migrations.current(engine) is None


def test_foreign_keys_are_enforced_after_an_upgrade(engine: sa.Engine) -> None:
    """The connection that ran the upgrade returns to the pool with foreign keys enforced."""
    migrations.upgrade(engine)
    reports = Base.metadata.tables["reports"]
    row = {column.name: "x" for column in reports.columns} | {"created_at": None}
    with engine.begin() as connection, pytest.raises(sa.exc.IntegrityError, match=r"(?i)foreign key"):
        connection.execute(sa.insert(reports).values(row | {"created_at": sa.func.current_timestamp()}))


def test_what_an_analysis_looked_at_survives_the_second_migration(engine: sa.Engine) -> None:
    """An analysis' checkpoint moves to the table of places, and back on downgrade; an analysis without one has none."""
    migrations.upgrade(engine, "0001")
    now = sa.func.current_timestamp()
    before = sa.MetaData()
    before.reflect(engine, only=["analyses"])
    empty = {"kind": "evaluation", "name": "x", "options": "{}", "request_sha256": "0", "attempts": 0}
    empty |= {"progress_done": 0, "progress_total": 0, "progress_phase": "queued"}
    with engine.begin() as connection:
        for id_, checkpoint_id in (("a", "net"), ("b", None)):
            row = {**empty, "id": id_, "checkpoint_id": checkpoint_id, "created_at": now}
            connection.execute(sa.insert(before.tables["analyses"]).values(row))
    migrations.upgrade(engine)
    places = Base.metadata.tables["analysis_checkpoints"]
    with engine.begin() as connection:
        assert connection.execute(sa.select(places)).all() == [("a", 0, "net")]
        connection.execute(sa.insert(places).values(analysis_id="b", position=0, checkpoint_id="one"))
        connection.execute(sa.insert(places).values(analysis_id="b", position=1, checkpoint_id="two"))
    migrations.downgrade(engine, "0001")
    with engine.connect() as connection:
        query = sa.text("SELECT id, checkpoint_id FROM analyses ORDER BY id")
        assert connection.execute(query).all() == [("a", "net"), ("b", None)]


def test_a_history_outlives_its_reports(engine: sa.Engine) -> None:
    """A move to a report that is gone stays in the history; a downgrade, whose table cannot name it, drops it."""
    migrations.upgrade(engine)
    tables, moment = Base.metadata.tables, datetime(2026, 1, 1, tzinfo=UTC)
    row = {"id": "b", "created_at": moment}
    move = {"baseline_id": "b", "report_id": "gone", "done": True, "created_at": moment, "id": "m"}
    with engine.begin() as connection:
        connection.execute(sa.insert(tables["baselines"]).values(**row, name="main"))
        connection.execute(sa.insert(tables["baseline_moves"]).values(move))
    migrations.downgrade(engine, "0015")
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.select(tables["baselines"].c.name)).all() == [("main",)]
        assert connection.execute(sa.select(tables["baseline_moves"].c.id)).all() == []

"""Alembic migrations of the service's own tables, run without an alembic.ini.

The queue keeps its tables beside ours (in the same SQLite file, in the schema `dbos` of PostgreSQL); nothing here
touches them. Alembic is imported only to run a migration: the database's revision and the required one are read
without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import sqlalchemy as sa

from app.models import Base

# An arbitrary fixed number that nothing else on the same database uses.
_ADVISORY_LOCK = 0x696E746572706C61
# Alembic keeps its state in module globals: one migration at a time in a process, whatever the database.
_alembic = Lock()
# The table in which alembic records the database's revision.
_VERSION = sa.table("alembic_version", sa.column("version_num", sa.String))


class OtherTables(Exception):
    """The database's tables belong to another version; the message says what to do."""


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Bring the tables to `revision` in one transaction: either every change takes effect or none.

    Processes that start together may all call it; the first does the work, the others wait and find it done.

    Raises:
        OtherTables: a newer version has made the tables.
    """
    found = current(engine)
    if found is not None and found not in _revisions():
        raise OtherTables(lacking(engine))
    if revision != "head" or found != head():
        _migrate(engine, "upgrade", revision)


def downgrade(engine: sa.Engine, revision: str) -> None:
    """Take the tables back to `revision`; `base` removes them all, and alembic's own table stays, empty."""
    _migrate(engine, "downgrade", revision)


def current(engine: sa.Engine) -> str | None:
    """Return the database's revision, None before the first upgrade."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(_VERSION.name):
            return None
        return connection.scalar(sa.select(_VERSION.c.version_num))


def head() -> str | None:
    """Return the revision that this version of the code needs."""
    return max(_revisions(), default=None)


def _revisions() -> set[str]:
    """Return the revisions: a migration's file is named after its revision, and revisions are numbered in order."""
    return {path.name.split("_")[0] for path in Path(__file__).parent.glob("versions/[0-9]*.py")}


def lacking(engine: sa.Engine) -> str | None:
    """Return what is wrong with the database's tables and what to do, None if they match this version."""
    found, wanted = current(engine), head()
    if found == wanted:
        return None
    if found is not None and found not in _revisions():
        return (
            f"its tables are at revision {found}, which a newer version of Interplay has made; this one knows up to "
            f"{wanted}, and `interplay migrate` takes nothing back: install that version, or restore a backup"
        )
    return f"its tables are at revision {found}, this version needs {wanted}: run `interplay migrate`"


def check(engine: sa.Engine) -> list[Any]:
    """Return the differences between the database's tables and app.models, in alembic's words; empty if they agree."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": is_ours})
        return list(compare_metadata(context, Base.metadata))


def is_ours(name: str | None, kind: str, _parents: Any) -> bool:
    """Return whether alembic should compare the database object of this name."""
    return kind != "table" or name in Base.metadata.tables


def _migrate(engine: sa.Engine, step: Literal["upgrade", "downgrade"], revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    # In the syntax of the configuration file, which parses this value, % starts an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with _alembic, _exclusively(engine) as connection:
        config.attributes["connection"] = connection
        getattr(command, step)(config, revision)


@contextmanager
def _exclusively(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that excludes every other migration."""
    if engine.dialect.name == "sqlite":
        with _exclusively_on_sqlite(engine) as connection:
            yield connection
        return
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        yield connection


@contextmanager
def _exclusively_on_sqlite(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        # SQLite alters a table by copying and dropping it, and a drop counts as deleting every row. So foreign keys are
        # not enforced meanwhile but checked at the end. The pragma does nothing inside a transaction.
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                raise RuntimeError(f"the migration would leave a row whose foreign key leads nowhere: {tuple(broken)}")
            connection.commit()
        finally:
            connection.rollback()
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")

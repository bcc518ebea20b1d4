"""The database engine, for SQLite and PostgreSQL alike, and the two ways to open a session."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from app.settings import Settings

# How long a writer waits for another one.
_SQLITE_PATIENCE_SECONDS = 30


def make_engine(settings: Settings) -> sa.Engine:
    """The engine that our tables and the queue share, so that both can commit in one transaction."""
    url = sa.make_url(settings.effective_database_url)
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        return _sqlite_engine(url)
    return _postgresql_engine(url.set(drivername="postgresql+psycopg"))


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # Writers queue up for the lock at BEGIN, where waiting is safe, not in the middle of a transaction.
        connection.isolation_level = "IMMEDIATE"
        connection.execute(f"PRAGMA busy_timeout={_SQLITE_PATIENCE_SECONDS * 1000}")
        connection.execute("PRAGMA foreign_keys=ON")
        _use_write_ahead_log(connection)

    return engine


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Readers do not wait for writers. The mode stays with the file; only the first switch takes a lock.

    That one does not wait for the busy timeout where several processes open a new file at once, so it is tried again.
    """
    deadline = time.monotonic() + _SQLITE_PATIENCE_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _postgresql_engine(url: sa.URL) -> sa.Engine:
    import psycopg  # here: most services are on SQLite, and it takes a while to load

    dialect = url.get_dialect()()
    args, kwargs = dialect.create_connect_args(url)
    kwargs.setdefault("connect_timeout", 10)

    def connect() -> "psycopg.Connection[Any]":
        try:
            return psycopg.connect(*args, **kwargs)
        except psycopg.OperationalError as error:
            # dbos 3.4.0 retries only errors that say "connection failed"; psycopg 3.3 words a missing socket and a
            # failed name lookup differently, and a run that meets those would stay pending under a living worker.
            if "connection failed" in str(error):
                raise
            raise psycopg.OperationalError(f"connection failed: {error}") from error

    return sa.create_engine(url, creator=connect, pool_pre_ping=True, pool_size=10, max_overflow=20)


@contextmanager
def read(engine: sa.Engine) -> Iterator[Session]:
    """A session to read with."""
    with Session(engine) as session:
        yield session


@contextmanager
def write(engine: sa.Engine) -> Iterator[Session]:
    """A session whose transaction commits at the end of the block and rolls back on any error.

    On SQLite it holds the write lock from its first statement, so that what it reads stays true until it commits;
    on PostgreSQL callers lock the rows they decide upon with `with_for_update`.
    """
    with Session(engine, expire_on_commit=False) as session, session.begin():
        if engine.dialect.name == "sqlite":
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        yield session

"""The database engine, for SQLite and PostgreSQL, and the two ways to open a session."""

import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from app.settings import Settings

# How long a call waits for a connection while none is returned, and while some are.
_STALLED_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 10.0
_PATIENT_SECONDS = 24 * 3600.0
# The server itself ends a statement that takes too long; this much later its silence counts as a failure.
_GRACE_SECONDS = 2.0
# Longest pause inside a transaction, after which PostgreSQL ends the session.
_IDLE_MS = 60_000


def make_engine(settings: Settings, *, patient: bool = False, few: bool = False) -> sa.Engine:
    """Return the engine that our tables and the queue share, so that both can commit in one transaction.

    Args:
        settings: name the database; every statement has their timeout, `database_timeout_seconds`.
        patient: raise the timeout to a day, as for a migration.
        few: keep two connections to a PostgreSQL server open between calls, as a worker among many does.
    """
    patience_seconds = _PATIENT_SECONDS if patient else settings.database_timeout_seconds
    url = sa.make_url(settings.effective_database_url)
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        return _sqlite_engine(url, patience_seconds)
    return _postgresql_engine(url.set(drivername="postgresql+psycopg"), patience_seconds, kept=2 if few else _MOST)


class _Pool(sa.QueuePool):
    """A small pool of connections. A caller that finds none waits only while other callers return theirs."""

    _returned_at = -math.inf

    def _do_get(self) -> sa.pool.ConnectionPoolEntry:
        asked_at = time.monotonic()
        while True:
            try:
                return super()._do_get()
            except sa.exc.TimeoutError:
                now = time.monotonic()
                if now - self._returned_at > _STALLED_SECONDS or now - asked_at > _LONGEST_WAIT_SECONDS:
                    raise

    def _do_return_conn(self, record: sa.pool.ConnectionPoolEntry) -> None:
        self._returned_at = time.monotonic()
        super()._do_return_conn(record)


# Half of the threads that routes run in (40): a database that does not answer leaves the others free.
_MOST = 20
_POOL: dict[str, Any] = {"poolclass": _Pool, "pool_timeout": _STALLED_SECONDS}


def _sqlite_engine(url: sa.URL, patience_seconds: float) -> sa.Engine:
    engine = sa.create_engine(url, pool_size=_MOST, max_overflow=0, **_POOL)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # Writers queue up for the lock at BEGIN, where waiting is safe, not in the middle of a transaction.
        connection.isolation_level = "IMMEDIATE"
        connection.execute(f"PRAGMA busy_timeout={math.ceil(patience_seconds * 1000)}")
        connection.execute("PRAGMA foreign_keys=ON")
        _use_write_ahead_log(connection, patience_seconds)

    return engine


def _use_write_ahead_log(connection: sqlite3.Connection, patience_seconds: float) -> None:
    """Set WAL mode, so that readers do not wait for writers.

    The mode stays with the file; only the first switch takes a lock. That one ignores the busy timeout if several
    processes open a new file at once, so it is retried.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _postgresql_engine(url: sa.URL, patience_seconds: float, *, kept: int) -> sa.Engine:
    import psycopg  # here: most services use SQLite, and it takes a while to load

    from app.postgresql import PatientConnection

    dialect = url.get_dialect()()
    args, kwargs = dialect.create_connect_args(url)
    defaults = {
        "connect_timeout": math.ceil(min(patience_seconds, 5)),
        # A host that disappears without closing the connection is noticed as soon.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": math.ceil((patience_seconds + _GRACE_SECONDS) * 1000),
    }
    kwargs = {**defaults, **kwargs}

    def connect() -> "psycopg.Connection[Any]":
        try:
            connection = PatientConnection.connect(*args, **kwargs)
        except psycopg.OperationalError as error:
            # dbos 3.4.0 retries only errors that say "connection failed". psycopg 3.3 words a missing socket and a
            # failed name lookup differently; a run with such an error would stay pending under a living worker.
            if "connection failed" in str(error):
                raise
            raise psycopg.OperationalError(f"connection failed: {error}") from error
        connection.patience_seconds = patience_seconds + _GRACE_SECONDS
        # Not as a connection option: poolers such as PgBouncer do not pass those on.
        milliseconds = math.ceil(patience_seconds * 1000)
        # A process that is suspended between two statements must not hold its locks for as long.
        for name, value in (("statement_timeout", milliseconds), ("idle_in_transaction_session_timeout", _IDLE_MS)):
            connection.execute("SELECT set_config(%s, %s, false)", [name, str(value)])
        connection.commit()
        return connection

    size = {"pool_size": kept, "max_overflow": _MOST - kept}
    return sa.create_engine(url, creator=connect, pool_pre_ping=True, **size, **_POOL)


def clock(session: Session) -> datetime:
    """Return the database's own time: times that several machines compare must not depend on their clocks.

    Args:
        session: any session; on PostgreSQL the time is that of the call, not of the transaction's start.

    Returns:
        An instant in UTC.
    """
    if session.get_bind().dialect.name == "sqlite":
        text = session.execute(sa.text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')")).scalar_one()
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    moment: datetime = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return moment.astimezone(UTC)


def instant(dialect: str) -> sa.ColumnElement[datetime]:
    """Return SQL of the database's own time, as `clock` has it, for a statement that stores it."""
    if dialect == "sqlite":
        return sa.literal_column("strftime('%Y-%m-%d %H:%M:%f000', 'now')")
    return sa.func.clock_timestamp()


@contextmanager
def read(engine: sa.Engine) -> Iterator[Session]:
    """Open a session for reading."""
    with Session(engine) as session:
        yield session


@contextmanager
def write(engine: sa.Engine) -> Iterator[Session]:
    """Open a session whose transaction commits at the end of the block and rolls back on any error.

    On SQLite it holds the write lock from its first statement, so that what it reads stays true until it commits;
    on PostgreSQL callers lock the rows that they decide on with `with_for_update`.
    """
    with Session(engine, expire_on_commit=False) as session, session.begin():
        if engine.dialect.name == "sqlite":
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        yield session

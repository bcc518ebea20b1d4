"""The database engine, for SQLite and PostgreSQL alike, and the two ways to open a session."""

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

# So long a call waits for a connection while none comes back, and so long while some do.
_STALLED_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 10.0
_PATIENT_SECONDS = 24 * 3600.0
# A server ends a statement that takes too long, and says so; this much later its silence counts as an answer.
_GRACE_SECONDS = 2.0


def make_engine(settings: Settings, *, patient: bool = False) -> sa.Engine:
    """The engine that our tables and the queue share, so that both can commit in one transaction.

    Every statement has a deadline, `database_timeout_seconds`; `patient` takes it off for what may last, a migration.
    """
    patience_seconds = _PATIENT_SECONDS if patient else settings.database_timeout_seconds
    url = sa.make_url(settings.effective_database_url)
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        return _sqlite_engine(url, patience_seconds)
    return _postgresql_engine(url.set(drivername="postgresql+psycopg"), patience_seconds)


class _Pool(sa.QueuePool):
    """Connections, of which there are few. Who finds none waits while others give theirs back, and not otherwise."""

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
_POOL: dict[str, Any] = {"poolclass": _Pool, "pool_size": 20, "max_overflow": 0, "pool_timeout": _STALLED_SECONDS}


def _sqlite_engine(url: sa.URL, patience_seconds: float) -> sa.Engine:
    engine = sa.create_engine(url, **_POOL)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # Writers queue up for the lock at BEGIN, where waiting is safe, not in the middle of a transaction.
        connection.isolation_level = "IMMEDIATE"
        connection.execute(f"PRAGMA busy_timeout={math.ceil(patience_seconds * 1000)}")
        connection.execute("PRAGMA foreign_keys=ON")
        _use_write_ahead_log(connection, patience_seconds)

    return engine


def _use_write_ahead_log(connection: sqlite3.Connection, patience_seconds: float) -> None:
    """Readers do not wait for writers. The mode stays with the file; only the first switch takes a lock.

    That one does not wait for the busy timeout where several processes open a new file at once, so it is tried again.
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


def _postgresql_engine(url: sa.URL, patience_seconds: float) -> sa.Engine:
    import psycopg  # here: most services are on SQLite, and it takes a while to load

    from app.postgresql import PatientConnection

    dialect = url.get_dialect()()
    args, kwargs = dialect.create_connect_args(url)
    defaults = {
        "connect_timeout": math.ceil(min(patience_seconds, 5)),
        # A machine that is gone, without a word, is noticed as soon.
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
            # dbos 3.4.0 retries only errors that say "connection failed"; psycopg 3.3 words a missing socket and a
            # failed name lookup differently, and a run that meets those would stay pending under a living worker.
            if "connection failed" in str(error):
                raise
            raise psycopg.OperationalError(f"connection failed: {error}") from error
        connection.patience_seconds = patience_seconds + _GRACE_SECONDS
        # Not among the options of the connection, which poolers such as PgBouncer do not pass on.
        milliseconds = math.ceil(patience_seconds * 1000)
        connection.execute("SELECT set_config('statement_timeout', %s, false)", [str(milliseconds)])
        connection.commit()
        return connection

    return sa.create_engine(url, creator=connect, pool_pre_ping=True, **_POOL)


def clock(session: Session) -> datetime:
    """The database's own time: what several machines compare must not hang on their clocks.

    Args:
        session: any; on PostgreSQL the time is that of the call, not of the transaction's start.

    Returns:
        An instant in UTC.
    """
    if session.get_bind().dialect.name == "sqlite":
        text = session.execute(sa.text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')")).scalar_one()
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    moment: datetime = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return moment.astimezone(UTC)


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

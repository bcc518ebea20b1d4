"""What a worker holds for as long as its process lives: one connection of its own, and locks under names.

A lock is a locked file beside a SQLite database, and an advisory lock of the connection's session on PostgreSQL.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa


class Line:
    """One connection of a worker for all that it asks every second; each statement is a transaction of its own.

    The pool would test a connection before every use, begin, and commit: four round trips for one statement.

    Attributes:
        session: counts the connections: another number, and what the session held is lost.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._connection: sa.Connection | None = None
        self._one_at_a_time = threading.Lock()
        self.session = 0

    def rows(self, statement: sa.Executable) -> Sequence[sa.Row[Any]]:
        """Execute a query; return its rows.

        Raises:
            sqlalchemy.exc.DBAPIError: the database cannot be reached, or refuses; the next call connects again.
        """
        with self._one_at_a_time:
            return self._opened().execute(statement).all()

    def change(self, statement: sa.Executable) -> int:
        """Execute an update; return the number of rows.

        Raises:
            sqlalchemy.exc.DBAPIError: as of `rows`.
        """
        with self._one_at_a_time:
            return self._opened().execute(statement).rowcount

    def open(self) -> int:
        """Connect if there is no connection; return `session`."""
        with self._one_at_a_time:
            self._opened()
            return self.session

    def close(self) -> None:
        """End the session, and with it all that it holds."""
        with self._one_at_a_time:
            self._drop()

    def _opened(self) -> sa.Connection:
        if self._connection is not None and self._connection.invalidated:
            self._drop()
        if self._connection is None:
            self._connection = self._engine.connect()
            self.session += 1
            if self._engine.dialect.name == "postgresql":
                # A heartbeat need not survive a crash of the server, so it need not wait for the disk.
                self._connection.exec_driver_sql("SET synchronous_commit = off")
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            if not self._connection.invalidated:
                self._connection.invalidate()  # the session must end, not go back to the pool with its locks
            self._connection.close()
            self._connection = None


class FileLocks:
    """Locks between the processes of one machine, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def holds(self, name: str) -> bool:
        """Return whether a lock is held here."""
        return name in self._held

    def hold(self, name: str) -> bool:
        """Try to hold a lock until this process ends; return whether it is held here now."""
        if name not in self._held:
            descriptor = self._open(name)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._held[name] = descriptor
        return True

    @contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """Try to hold a lock for a block; yield whether it was free."""
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        else:
            free = True
        try:
            yield free
        finally:
            if free:  # the name is never used again
                self.forget(name)
            os.close(descriptor)

    def forget(self, name: str) -> None:
        """Remove the file of a lock that is not used again."""
        (self._folder / f"{name}.lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Free every lock that is held."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def _open(self, name: str) -> int:
        return os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


class AdvisoryLocks:
    """Locks between all clients of one PostgreSQL database, held by the session of one connection."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._session = 0
        self._held: set[str] = set()

    def holds(self, name: str) -> bool:
        """Return whether a lock is held here, as far as is known."""
        return self._session == self._line.session and name in self._held

    def hold(self, name: str) -> bool:
        """Try to hold a lock until this process ends, again if the connection was lost; return whether it is held."""
        session = self._line.open()
        if session != self._session:
            self._session = session
            self._held.clear()
        if name not in self._held and self._call("pg_try_advisory_lock", name):
            self._held.add(name)
        return name in self._held

    @contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """Try to hold a lock for a block; yield whether it was free."""
        free = self._call("pg_try_advisory_lock", name)
        try:
            yield free
        finally:
            if free:
                self._call("pg_advisory_unlock", name)

    def forget(self, name: str) -> None:
        """Do nothing: a lock leaves nothing behind when its session ends."""

    def close(self) -> None:
        """Free every lock that is held."""
        self._line.close()

    def _call(self, function: str, name: str) -> bool:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        return bool(self._line.rows(sa.text(f"SELECT {function}(:key)").bindparams(key=key))[0][0])

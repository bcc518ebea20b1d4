"""Connections to PostgreSQL. A module of its own: psycopg takes a while to load, and most services use SQLite."""

import math
from collections.abc import Generator
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.errors import _WaitTimeout


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is closed if its server has been silent for too long.

    The server's own `statement_timeout` comes first; this is for a server that accepts data but never answers, which no
    setting of the socket detects.
    """

    patience_seconds = math.inf
    _listening = False

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        deadline = timeout is None and not self._listening and self.patience_seconds < math.inf
        try:
            return super().wait(gen, interval, timeout=self.patience_seconds if deadline else timeout)
        except _WaitTimeout:
            if not deadline:
                raise
            self.pgconn.finish()
            raise psycopg.OperationalError(
                f"connection failed: the server said nothing for {self.patience_seconds:g} s"
            ) from None

    def notifies(self, *, timeout: float | None = None, stop_after: int | None = None) -> Generator[psycopg.Notify]:
        # A listener, such as the queue's library, waits without a timeout until something happens.
        self._listening = True
        try:
            yield from super().notifies(timeout=timeout, stop_after=stop_after)
        finally:
            self._listening = False

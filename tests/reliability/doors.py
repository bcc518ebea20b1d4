"""A way to PostgreSQL that can be shut, and a record of who writes there."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

import psycopg
import sqlalchemy as sa

# All tables that work is recorded in.
_TABLES = (
    "analyses", "points", "turns", "reports", "checkpoints", "workers",
    "dbos.workflow_status", "dbos.operation_outputs",
)  # fmt: skip


class Door:
    """A server on loopback that passes on what clients and the database say; `url` leads through it.

    A shut door is silent, as a network is that loses packets: it takes connections and bytes and passes nothing on
    until it is open again. Or it refuses: it ends all connections, and takes none.
    """

    def __init__(self, url: str, name: str) -> None:
        parsed = sa.make_url(url)
        self._socket_path = f"{parsed.query['host']}/.s.PGSQL.{parsed.port or 5432}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        query = {"application_name": name, "sslmode": "disable"}
        place = parsed.set(host="127.0.0.1", port=self._listener.getsockname()[1], query=query)
        self.url = place.render_as_string(hide_password=False)
        self._is_open, self._refuses = threading.Event(), False
        self._is_open.set()
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def shut(self, *, refusing: bool) -> None:
        """Pass nothing on."""
        self._refuses = refusing
        if refusing:
            self._end_connections()
        else:
            self._is_open.clear()

    def open(self) -> None:
        """Pass on everything, first what has come meanwhile."""
        self._refuses = False
        self._is_open.set()

    def close(self) -> None:
        """End the server."""
        self._refuses = True
        self._is_open.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._end_connections()
        for thread in self._threads:
            thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refuses:
                client.close()
                continue
            thread = threading.Thread(target=self._connect, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _connect(self, client: socket.socket) -> None:
        self._is_open.wait()
        server = socket.socket(socket.AF_UNIX)
        self._sockets |= {client, server}
        with client, server, suppress(OSError):
            server.connect(self._socket_path)
            back = threading.Thread(target=self._pass_on, args=(server, client))
            back.start()
            self._pass_on(client, server)
            back.join()
        self._sockets -= {client, server}

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(2**16):
                self._is_open.wait()
                target.sendall(content)
        # An end too is passed on only through an open door.
        self._is_open.wait()
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def _end_connections(self) -> None:
        for one in list(self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def door_to(url: str, name: str) -> Iterator[Door]:
    """Open a door to a database on a Unix socket, whose users have this name; end it at the end."""
    door = Door(url, name)
    try:
        yield door
    finally:
        door.close()


def record_writes(url: str) -> None:
    """Make the database record who writes each row, and when."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            """
            CREATE TABLE written (who text, what text, at timestamptz);
            CREATE FUNCTION record_write() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO public.written
                VALUES (current_setting('application_name'), TG_TABLE_NAME, clock_timestamp());
                RETURN NULL;
            END $$;
            """
        )
        for table in _TABLES:
            connection.execute(
                f"CREATE TRIGGER recorded AFTER INSERT OR UPDATE OR DELETE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION record_write()"
            )


def written_by(url: str, name: str, since: datetime) -> list[tuple[str, datetime]]:
    """Return what a user of that name has written since an instant: tables, with the time of each row."""
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT what, at FROM written WHERE who = %s AND at > %s", (name, since))
        return [(str(what), at) for what, at in rows]

"""`python -m app serve|api|migrate|verify|retention`: the service, its HTTP side alone, tables, files, what goes.

Workers start before anything large is imported here: their compute processes take longest to load.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from app import traces
from app.logs import start_logging
from app.settings import Settings, load_settings
from app.supervision import DEVICES, Workers, devices_of

if TYPE_CHECKING:
    import sqlalchemy as sa

    from app.api.connections import Connections
    from app.api.events import Events

logger = logging.getLogger("interplay")

# The C library's number of the parameter M_ARENA_MAX.
_ARENA_MAX = -8


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code, 2 for a problem that the operator has to correct."""
    parser = argparse.ArgumentParser(prog="interplay", description="Settings are environment variables: INTERPLAY_...")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "the HTTP service and its workers on this machine; migrates the database first"),
        ("api", "the HTTP service alone"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--host", help="address to bind (INTERPLAY_HOST)")
        command.add_argument("--port", type=int, help="port to bind, 0 for a free one (INTERPLAY_PORT)")
        if name == "serve":
            command.add_argument("--devices", help=DEVICES)
    commands.add_parser("migrate", help="create or upgrade the tables of the service and of its queue")
    text = "read and hash every stored file; say which are damaged, and which reports rest on them"
    scrub = commands.add_parser("verify", help=text, description=f"{text}. Status 1 where one is.")
    scrub.add_argument(
        "--set-aside", action="store_true", help="move damaged files away, so that they can be sent again"
    )
    text = "delete what is older than INTERPLAY_KEEP_... say, as the service itself does every ten minutes"
    retain = commands.add_parser("retention", help=text, description=f"{text}; docs/operations.md has the rules.")
    retain.add_argument("--dry-run", action="store_true", help="list what would go, and delete nothing")
    retain.add_argument("--json", action="store_true", help="print one JSON value on standard output")
    options = parser.parse_args(arguments)
    settings = load_settings(host=getattr(options, "host", None), port=getattr(options, "port", None))
    start_logging(settings)
    if options.command == "migrate":
        return _refusing(settings, lambda: _migrate_alone(settings))
    if options.command == "verify":
        return _refusing(settings, lambda: _verify(settings, set_aside=options.set_aside))
    if options.command == "retention":
        return _refusing(settings, lambda: _retain(settings, dry_run=options.dry_run, as_json=options.json))
    if not settings.binds_loopback and settings.api_key is None:
        return _refuse(
            f"Refusing to bind {settings.host}: everybody who reaches it could use the service. Set INTERPLAY_API_KEY, "
            "or bind 127.0.0.1 (the default)."
        )
    try:
        devices = devices_of(options.devices, settings) if options.command == "serve" else []
        traces.start("api")
    except (ValueError, traces.CannotTrace) as error:
        return _refuse(str(error))
    return _serve(settings, devices)


def _refusing(settings: Settings, run: Callable[[], int]) -> int:
    from app.refusals import CannotStart, starting

    try:
        with starting(settings):
            return run()
    except CannotStart as refusal:
        return _refuse(str(refusal))


def _migrate_alone(settings: Settings) -> int:
    import sqlalchemy as sa

    _migrate(settings)
    url = sa.make_url(settings.effective_database_url)
    sys.stdout.write(f"The database {url.render_as_string()} is up to date.\n")
    return 0


def _refuse(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 2


def _migrate(settings: Settings) -> None:
    import migrations
    from app import queue
    from app.database import make_engine

    engine = make_engine(settings, patient=True)
    migrations.upgrade(engine)
    queue.migrate(engine)
    engine.dispose()


def _verify(settings: Settings, *, set_aside: bool) -> int:
    from app import verification
    from app.storage import Storage

    with _engine_with_tables(settings) as engine:
        return 1 if verification.verify(engine, Storage(settings), set_aside=set_aside) else 0


def _retain(settings: Settings, *, dry_run: bool, as_json: bool) -> int:
    from app import queue, retention
    from app.storage import Storage

    if not retention.is_set(settings):
        sys.stderr.write("Nothing goes by its age: no INTERPLAY_KEEP_DAYS, _FAILED_DAYS or _FILES_DAYS is set.\n")
    with _engine_with_tables(settings) as engine:
        held = retention.kept(engine, settings)
        if dry_run:
            items = list(retention.would_go(engine, settings))
        else:
            client = queue.LateClient(engine)
            with retention.alone(engine, settings, wait=True):
                items = list(retention.remove(engine, client, Storage(settings), settings))
            client.destroy()
    if as_json:
        sys.stdout.write(json.dumps(retention.as_json(items, held, dry_run=dry_run), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in retention.text_of(items, held, dry_run=dry_run))
    return 0


@contextlib.contextmanager
def _engine_with_tables(settings: Settings) -> "Iterator[sa.Engine]":
    """Yield a patient engine on a database with the tables of this version."""
    import migrations
    from app.database import make_engine

    engine = make_engine(settings, patient=True)
    try:
        if lacking := migrations.lacking(engine):
            raise migrations.OtherTables(lacking)
        yield engine
    finally:
        engine.dispose()


def _make_tables(settings: Settings, tables: "Future[None]", workers: Workers, server: "_AnnouncedServer") -> None:
    """Upgrade the database to the current schema and let the workers begin; on failure, end the server."""
    try:
        _migrate(settings)
    except Exception as error:  # noqa: BLE001  raised again by who waits for the tables
        tables.set_exception(error)
        server.should_exit = True
    else:
        tables.set_result(None)
        workers.let_begin()


def _serve(settings: Settings, devices: Sequence[str]) -> int:
    try:
        listener = _bind(settings)
    except OSError as error:
        return _refuse(f"Cannot bind {settings.host}:{settings.port}: {error.strerror or error}.")
    _share_memory()
    workers = Workers(settings, devices)
    # Both ways of being stopped end in the `finally` below; uvicorn raises the signal again once it has shut down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        workers.start()
        return _refusing(settings, lambda: _run_server(settings, listener, workers if devices else None))
    except KeyboardInterrupt:
        return 0
    finally:
        workers.stop()
        traces.stop()
        listener.close()


def _share_memory() -> None:
    """Let all threads of this process allocate from one arena, so that memory freed by one is used by another.

    By default the C library gives each thread its own: eight concurrent uploads with headers of 8 MiB took the process
    from 147 to 1,217 MiB. With one arena, and one large header parsed at a time, it grew from 149 to 321.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def _run_server(settings: Settings, listener: socket.socket, workers: Workers | None) -> int:
    import migrations
    from app.api.connections import BACKLOG, Connections
    from app.main import create_app

    tables: Future[None] = Future()
    app = create_app(settings, tables)
    connections = Connections(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=connections.make(),
        backlog=BACKLOG,
        log_config=None,
        # Ours has the request's id, its route and its time, and no query.
        access_log=False,
        log_level=settings.log_level,
        timeout_graceful_shutdown=3,
    )
    server = _AnnouncedServer(config, settings, app.state.service.events, connections)
    if workers is None:
        tables.set_result(None)
    else:
        # A database that does not answer must fail before the service announces that it listens. Creating the tables
        # takes as long as everything else, and happens while serving.
        migrations.current(app.state.service.engine)
        server.then = partial(_make_tables, settings, tables, workers, server)
    server.run(sockets=[listener])
    if tables.done():
        tables.result()
    return 0


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is explicit: asyncio sends answers at once (TCP_NODELAY) only on sockets that name their protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    return listener


def _places(settings: Settings) -> str:
    """Return where the data of a service lie, without a password."""
    from sqlalchemy import make_url

    found = f"Its data lie in {settings.data_dir.resolve()}"
    if settings.database_url:
        url = make_url(settings.database_url).render_as_string(hide_password=True)
        found += f", its tables in {url}"
    if settings.storage_url:
        found += f", its files in {settings.storage_url}"
    return found


class _AnnouncedServer(uvicorn.Server):
    """Prints its address as the first line of standard output, then runs `then` in a thread.

    On shutdown it ends event streams first: it would wait for them otherwise.
    """

    def __init__(
        self, config: uvicorn.Config, settings: Settings, events: "Events", connections: "Connections"
    ) -> None:
        super().__init__(config)
        self._settings = settings
        self._events = events
        self._connections = connections
        self.then: Callable[[], None] | None = None

    async def on_tick(self, counter: int) -> bool:
        self._connections.look()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        sys.stdout.write(f"Interplay is listening on http://{address}:{port}\n{_places(self._settings)}\n")
        sys.stdout.flush()
        if self.then is not None:
            threading.Thread(target=self.then, daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._events.close()
        await super().shutdown(sockets)


if __name__ == "__main__":
    sys.exit(main())

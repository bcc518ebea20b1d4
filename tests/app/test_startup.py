"""The service during its start."""

import asyncio
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import httpx

import migrations
from app import queue
from app.database import make_engine
from app.main import create_app
from app.settings import Settings


def test_calls_wait_for_the_tables(tmp_path: Path) -> None:
    """While tables are created, health is answered and calls of /v1 wait; then they are answered normally."""

    async def scenario() -> None:
        settings, tables = Settings(data_dir=tmp_path), Future[None]()
        app = create_app(settings, tables)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            waiting = [asyncio.create_task(client.get(path)) for path in ("/v1/probes", "/v1/analyses")]
            assert (await client.get("/healthz")).status_code == 200
            await asyncio.sleep(0.2)
            assert not any(call.done() for call in waiting)
            engine = make_engine(settings)
            migrations.upgrade(engine)
            queue.migrate(engine)
            engine.dispose()
            tables.set_result(None)
            assert [(await call).status_code for call in waiting] == [200, 200]
            assert (await client.get("/v1/reports")).status_code == 200
        app.state.service.engine.dispose()

    asyncio.run(scenario())


def test_a_call_that_gives_up_takes_the_tables_from_nobody(tmp_path: Path) -> None:
    """A client that disconnects while it waits does not affect the other waiting clients."""

    async def scenario() -> None:
        tables = Future[None]()
        app = create_app(Settings(data_dir=tmp_path), tables)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            first, second = (asyncio.create_task(client.get("/v1/gates/schema")) for _ in range(2))
            await asyncio.sleep(0.1)
            first.cancel()
            await asyncio.sleep(0.1)
            assert not tables.cancelled()
            assert not second.done()
            tables.set_result(None)
            assert (await second).status_code == 200
        app.state.service.engine.dispose()

    asyncio.run(scenario())


def test_nothing_large_is_loaded_before_it_is_needed(tmp_path: Path) -> None:
    """The API listens, and the compute process is ready, without modules that only some requests and analyses need."""
    for module, unloaded in (
        ("app.main", ("dbos", "alembic", "psycopg", "numpy", "pyarrow", "altair", "vl_convert")),
        ("interplay.server", ("httpx", "cyclopts", "rich")),
        ("workers.compute.runner", ("scipy", "sqlalchemy", "dbos", "transformers")),
    ):
        script = f"import sys, {module}; print([name for name in {unloaded!r} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "[]", (module, done.stdout, done.stderr)

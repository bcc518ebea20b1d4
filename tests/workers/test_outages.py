"""Databases that become unavailable during work, and workers that hang: no result is lost or duplicated."""

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import services
from tests.app.api.test_events import events
from tests.app.test_analyses import SLOW, pair
from tests.databases import PostgresServer, fresh_database, postgres_server
from tests.services import Service, until
from tests.workers.test_kills import reports_of, status


@dataclass(frozen=True)
class OnPostgres:
    """A service, and the PostgreSQL server of its database, which nobody else uses."""

    service: Service
    server: PostgresServer


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnPostgres]:
    """Run a service on a PostgreSQL server of its own."""
    with (
        postgres_server() as server,
        fresh_database(server.url) as url,
        services.running(tmp_path_factory.mktemp("own") / "data", database_url=url) as service,
    ):
        yield OnPostgres(service, server)


@pytest.mark.slow
def test_a_stream_outlives_an_outage(own: OnPostgres, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A stream outlives a restart of the database, and then sends the end."""
    service = own.service
    queued = service.analyze(**pair(service, mlp_checkpoint_file, digits_probe_file), options=SLOW)
    path = f"/v1/analyses/{queued['id']}"
    with service.client.stream("GET", f"{path}/events") as stream:
        found = events(stream.iter_lines())
        assert next(found)["event"] == "status"
        own.server.restart(away_seconds=2)
        with httpx.Client(base_url=service.url, trust_env=False) as other:
            until(lambda: other.post(f"{path}/cancel").status_code == 200)
        assert [*found][-1]["data"]["status"] == "cancelled"


@pytest.mark.timeout(600)
def test_postgres_restarted_under_queued_work(
    own: OnPostgres, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """PostgreSQL crashes and restarts twice under running and queued analyses: every one succeeds, once."""
    service = own.service
    ids = pair(service, mlp_checkpoint_file, digits_probe_file)
    analyses = [service.analyze(**ids) for _ in range(4)]
    moments = random.Random(0)
    for _ in range(2):
        time.sleep(moments.uniform(0.2, 2.0))
        own.server.restart()
    for analysis in analyses:
        done = until(partial(_ended, service, analysis))
        assert done["status"] == "succeeded", done
        assert len(reports_of(service, analysis)) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_outlive_an_outage_of_the_database(
    own: OnPostgres, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """PostgreSQL is away for longer than a worker may be silent: none marks another as dead, and all work goes on."""
    service = own.service
    with services.worker(service) as second:
        ids = pair(service, mlp_checkpoint_file, digits_probe_file)
        until(lambda: len(service.client.get("/v1/version").json()["workers"]) == 2)
        first = service.worker()
        # Points of a sweep begin and end while it is away.
        sweep = {
            "kind": "pruning",
            **ids,
            "options": {"null_permutations": 1, "sparsities": [number / 60 for number in range(60)]},
        }
        running = [service.analyze(**ids, options={"null_permutations": 100}), service.analyze(**sweep)]
        until(lambda: all(status(service, one)["status"] == "running" for one in running))
        own.server.restart(away_seconds=8.0)
        for analysis in running:
            done = until(partial(_ended, service, analysis))
            assert done["status"] == "succeeded", done
            assert done["attempts"] == 1
        time.sleep(8)
        assert service.worker() == first
        assert second.poll() is None
        assert len(service.client.get("/v1/version").json()["workers"]) == 2


@pytest.mark.timeout(600)
def test_hung_worker_is_replaced(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A worker that hangs for a minute loses its work to another; when it resumes, it notices and ends."""
    ids = pair(service, mlp_checkpoint_file, digits_probe_file)
    analysis = service.analyze(**ids, options={"null_permutations": 100})
    until(lambda: status(service, analysis)["status"] == "running")
    hung, child = service.worker(), service.compute_child()
    child.suspend()
    until(lambda: _suspended_outside_transactions(service, hung))
    try:
        with services.worker(service):
            done = service.wait(analysis["id"], seconds=150)
            assert done["status"] == "succeeded"
            assert done["attempts"] == 2
            hung.resume()
            child.resume()
            hung.wait(30)
            until(lambda: service.worker().pid != hung.pid)
            assert len(reports_of(service, analysis)) == 1
    finally:
        # Whatever fails above, no suspended process stays behind.
        for process in (child, hung):
            with suppress(psutil.NoSuchProcess):
                process.resume()


def _suspended_outside_transactions(service: Service, worker: psutil.Process) -> bool:
    """Suspend a worker; if it holds the lock of SQLite, which cannot be taken from it, resume it and try again."""
    worker.suspend()
    with closing(sqlite3.connect(service.data_dir / "interplay.db", timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            worker.resume()
            return False
        connection.execute("ROLLBACK")
    return True


def _ended(service: Service, analysis: dict[str, Any]) -> dict[str, Any] | None:
    response = service.client.get(f"/v1/analyses/{analysis['id']}")
    if response.status_code == 503:  # the pool still held a connection from before the restart
        return None
    body = dict(response.json())
    return body if body["status"] in ("succeeded", "failed", "cancelled") else None

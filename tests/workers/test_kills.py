"""Workers, compute processes and databases that die in the middle of an analysis: nothing is lost, or there twice."""

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import services
from tests.app.test_analyses import pair, without_identity
from tests.databases import fresh_database, postgres_server
from tests.services import Service, until

# Long enough to be killed in the middle of, short enough to be repeated.
OPTIONS = {"null_permutations": 300}


@pytest.fixture(params=["sqlite", "postgresql"])
def restless(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """A service of its own, whose worker may be killed and is started again at once."""
    with ExitStack() as stack:
        url = ""
        if request.param == "postgresql":
            url = stack.enter_context(fresh_database(request.getfixturevalue("postgres")))
        yield stack.enter_context(
            services.running(tmp_path / "data", worker_restart_max_seconds="0.2", database_url=url)
        )


def reports_of(service: Service, analysis: dict[str, Any]) -> list[dict[str, Any]]:
    """Every report that the service holds of an analysis."""
    page = service.client.get("/v1/reports", params={"checkpoint_id": analysis["checkpoint_id"], "limit": 200}).json()
    assert page["next_cursor"] is None
    return [item for item in page["items"] if item["analysis_id"] == analysis["id"]]


def status(service: Service, analysis: dict[str, Any]) -> dict[str, Any]:
    return dict(service.client.get(f"/v1/analyses/{analysis['id']}").json())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wanted", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_worker_killed_many_times(
    restless: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, wanted: int
) -> None:
    """Kill -9 in the middle of analyses, at random moments: each ends with the report it has without a kill, once."""
    ids = pair(restless, mlp_checkpoint_file, digits_probe_file)
    undisturbed = restless.wait(restless.analyze(**ids, options=OPTIONS)["id"])
    expected = without_identity(restless.report(undisturbed))
    moments, kills = random.Random(0), 0
    analyses: list[dict[str, Any]] = []
    while kills < wanted:
        analyses.append(restless.analyze(**ids, options=OPTIONS))
        kills += killed_until_it_ended(restless, analyses[-1], moments, at_most=wanted - kills)
    for one in analyses:
        done = restless.wait(one["id"])
        assert without_identity(restless.report(done)) == expected
        assert [report["id"] for report in reports_of(restless, one)] == [done["report_id"]]
    assert sum(status(restless, one)["attempts"] for one in analyses) >= kills


def killed_until_it_ended(service: Service, analysis: dict[str, Any], moments: random.Random, *, at_most: int) -> int:
    """Kill the worker at a random moment of each attempt; how often, before the analysis ended all the same."""
    kills = 0
    while kills < at_most:
        until(partial(has_begun_or_ended, service, analysis, kills + 1))
        time.sleep(moments.uniform(0, 3.0))
        worker = service.worker()
        if has_ended(service, analysis):
            break
        worker.kill()
        worker.wait(15)
        kills += 1
    return kills


def has_begun_or_ended(service: Service, analysis: dict[str, Any], attempt: int) -> bool:
    now = status(service, analysis)
    return now["attempts"] >= attempt or now["status"] in ("succeeded", "failed", "cancelled")


def has_ended(service: Service, analysis: dict[str, Any]) -> bool:
    return status(service, analysis)["status"] in ("succeeded", "failed", "cancelled")


def test_compute_child_killed(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """One death of the compute process is made good by a fresh one; two on one task fail it, and the worker lives."""
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file)
    worker = any_service.worker()

    def kill_child(analysis: dict[str, Any], phase: str) -> None:
        until(lambda: status(any_service, analysis)["progress"]["phase"] not in (phase, "queued", "starting"))
        child = any_service.compute_child()
        child.kill()
        until(lambda: not child.is_running())

    once = any_service.analyze(**ids, options={"null_permutations": 100})
    kill_child(once, "")
    done = any_service.wait(once["id"])
    assert done["status"] == "succeeded", done
    assert done["attempts"] == 1
    assert len(reports_of(any_service, once)) == 1

    twice = any_service.analyze(**ids, options={"null_permutations": 1000})
    kill_child(twice, "")
    kill_child(twice, "starting again")
    failed = any_service.wait(twice["id"])
    assert failed["status"] == "failed"
    assert failed["problem"]["type"] == "urn:interplay:problem:compute-crashed"
    assert "SIGKILL" in failed["problem"]["detail"]
    assert any_service.worker() == worker
    assert any_service.wait(any_service.analyze(**ids)["id"])["status"] == "succeeded"


@pytest.mark.timeout(600)
def test_postgres_restarted_under_queued_work(
    tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """PostgreSQL crashes and restarts five times under running and queued analyses: every one succeeds, once."""
    with (
        postgres_server() as server,
        fresh_database(server.url) as url,
        services.running(tmp_path / "data", database_url=url) as service,
    ):
        ids = pair(service, mlp_checkpoint_file, digits_probe_file)
        analyses = [service.analyze(**ids) for _ in range(8)]
        moments = random.Random(0)
        for _ in range(5):
            time.sleep(moments.uniform(0.2, 2.0))
            server.restart()
        for analysis in analyses:
            done = until(partial(_ended, service, analysis))
            assert done["status"] == "succeeded", done
            assert len(reports_of(service, analysis)) == 1


@pytest.mark.timeout(600)
def test_workers_outlive_an_outage_of_the_database(
    tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """PostgreSQL is away for longer than a worker may be silent: no worker takes another for dead, and work goes on."""
    with (
        postgres_server() as server,
        fresh_database(server.url) as url,
        services.running(tmp_path / "data", database_url=url) as service,
        services.worker(service) as second,
    ):
        ids = pair(service, mlp_checkpoint_file, digits_probe_file)
        until(lambda: len(service.client.get("/v1/version").json()["workers"]) == 2)
        first = service.worker()
        running = [service.analyze(**ids, options={"null_permutations": 200}) for _ in range(2)]
        until(lambda: all(status(service, one)["status"] == "running" for one in running))
        server.restart(away_seconds=8.0)
        for analysis in running:
            done = until(partial(_ended, service, analysis))
            assert done["status"] == "succeeded", done
            assert done["attempts"] == 1
        time.sleep(8)
        assert service.worker() == first
        assert second.poll() is None
        assert len(service.client.get("/v1/version").json()["workers"]) == 2


@pytest.mark.timeout(600)
def test_hung_worker_is_replaced(tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A worker that hangs for a minute loses its work to another; when it wakes, it notices and ends."""
    with services.running(tmp_path / "data", worker_restart_max_seconds="0.2") as service:
        ids = pair(service, mlp_checkpoint_file, digits_probe_file)
        analysis = service.analyze(**ids, options={"null_permutations": 300})
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
            # Whatever fails above, no stopped process stays behind.
            for process in (child, hung):
                with suppress(psutil.NoSuchProcess):
                    process.resume()


def _suspended_outside_transactions(service: Service, worker: psutil.Process) -> bool:
    """Suspend a worker; where it holds the lock of SQLite, which nobody can take from it, let it go on."""
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


def test_cancel_survives_the_death_of_the_worker(
    tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A cancel that nobody was there to heed ends the analysis when a worker comes back."""
    with services.running(tmp_path / "data", worker_restart_max_seconds="2") as service:
        analysis = service.analyze(**pair(service, mlp_checkpoint_file, digits_probe_file), options=OPTIONS)
        until(lambda: status(service, analysis)["status"] == "running")
        service.worker().kill()
        assert service.client.post(f"/v1/analyses/{analysis['id']}/cancel").status_code == 200
        done = service.wait(analysis["id"])
        assert done["status"] == "cancelled"
        assert reports_of(service, analysis) == []


def test_attempts_are_limited(tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """An analysis whose worker dies in every attempt is given up with a problem."""
    with services.running(tmp_path / "data", max_attempts="2", worker_restart_max_seconds="0.2") as service:
        analysis = service.analyze(
            **pair(service, mlp_checkpoint_file, digits_probe_file), options={"null_permutations": 1000}
        )
        for attempt in (1, 2):
            until(partial(has_begun_or_ended, service, analysis, attempt))
            service.worker().kill()
        failed = service.wait(analysis["id"])
        assert failed["status"] == "failed"
        assert failed["problem"]["type"] == "urn:interplay:problem:too-many-attempts"


def test_timeout_fails_the_analysis(tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """What computes for longer than the operator allows is stopped with a problem, and the worker goes on."""
    with services.running(tmp_path / "data", analysis_timeout_seconds="4") as service:
        ids = pair(service, mlp_checkpoint_file, digits_probe_file)
        failed = service.wait(service.analyze(**ids, options={"null_permutations": 1000})["id"])
        assert failed["status"] == "failed"
        assert failed["problem"]["type"] == "urn:interplay:problem:analysis-timeout"


def test_missing_blob_fails_the_analysis(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A file that somebody removed from the storage is a problem that names it."""
    ids = pair(service, mlp_checkpoint_file, digits_probe_file, name="lost")
    sha256 = service.client.get(f"/v1/checkpoints/{ids['checkpoint_id']}").json()["sha256"]
    path = service.data_dir / "blobs" / sha256[:2] / sha256
    content = path.read_bytes()
    path.unlink()
    try:
        failed = service.wait(service.analyze(**ids)["id"])
    finally:
        path.write_bytes(content)
    assert failed["status"] == "failed"
    assert failed["problem"]["type"] == "urn:interplay:problem:blob-missing"
    assert sha256 in failed["problem"]["detail"]


def test_two_workers_share_the_work(restless: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A second worker takes over what the first one leaves when it is killed and not started again."""
    ids = pair(restless, mlp_checkpoint_file, digits_probe_file)
    with services.worker(restless) as first, services.worker(restless) as second:
        until(lambda: len(restless.client.get("/v1/version").json()["workers"]) == 3)
        analyses = [restless.analyze(**ids, options=OPTIONS) for _ in range(6)]
        until(lambda: sum(status(restless, one)["status"] == "running" for one in analyses) == 3)
        first.kill()
        second.terminate()
        for one in analyses:
            assert restless.wait(one["id"])["status"] == "succeeded"
            assert len(reports_of(restless, one)) == 1


@pytest.mark.timeout(600)
def test_worker_killed_in_the_middle_of_a_path(
    restless: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Kill -9 three times on a path of 25 points: it ends with the points that it has without a kill, and points that
    were done are not computed again."""
    ids = pair(restless, mlp_checkpoint_file, digits_probe_file)
    other = restless.post("/v1/checkpoints", {"name": "other"}, mlp_checkpoint_file).json()["id"]
    path = {
        "kind": "path",
        "checkpoint_a_id": ids["checkpoint_id"],
        "checkpoint_b_id": other,
        "probe_id": ids["probe_id"],
        "options": {"null_permutations": 5, "grid": {"points": 25}},
    }
    expected = restless.report(restless.wait(restless.analyze(**path)["id"]))
    analysis = restless.analyze(**path)
    done_before: list[int] = []
    for kill, wanted in enumerate((4, 10, 17), start=1):
        until(partial(_at_point, restless, analysis, attempt=kill, point=wanted))
        done_before.append(status(restless, analysis)["progress"]["done"])
        worker = restless.worker()
        worker.kill()
        worker.wait(15)
    lowest: dict[int, int] = {}
    while not has_ended(restless, analysis):
        now = status(restless, analysis)
        if now["progress"]["total"] == 25:
            lowest[now["attempts"]] = min(lowest.get(now["attempts"], 25), now["progress"]["done"])
        time.sleep(0.02)
    done = restless.wait(analysis["id"])
    assert done["attempts"] == 4
    assert restless.report(done)["points"] == expected["points"]
    # The step at work when the worker died is the only one that may run again.
    assert lowest[4] >= done_before[2] - 1


def _at_point(service: Service, analysis: dict[str, Any], *, attempt: int, point: int) -> bool:
    now = status(service, analysis)
    return bool(now["attempts"] == attempt and now["progress"]["total"] == 25 and now["progress"]["done"] >= point)

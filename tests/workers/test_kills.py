"""Workers and compute processes that die during an analysis: no result is lost or duplicated."""

import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import services
from tests.app.test_analyses import pair, without_identity
from tests.campaigns import DATABASES, campaign
from tests.services import Service, until

# Long enough to be killed during the computation, short enough to be repeated.
OPTIONS = {"null_permutations": 300}


def reports_of(service: Service, analysis: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every report that the service holds of an analysis."""
    page = service.client.get("/v1/reports", params={"checkpoint_id": analysis["checkpoint_id"], "limit": 200}).json()
    assert page["next_cursor"] is None
    return [item for item in page["items"] if item["analysis_id"] == analysis["id"]]


def status(service: Service, analysis: dict[str, Any]) -> dict[str, Any]:
    return dict(service.client.get(f"/v1/analyses/{analysis['id']}").json())


@pytest.mark.parametrize("any_service", campaign(DATABASES, often=["sqlite"]), indirect=True)
def test_worker_killed_at_its_moments(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Kill -9 at the start of an attempt and during computation: one report, equal to the one without a kill."""
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file)
    # Long enough that the second kill still meets it, on fast machines too.
    options = {"null_permutations": 500}
    undisturbed = any_service.wait(any_service.analyze(**ids, options=options)["id"])
    expected = without_identity(any_service.report(undisturbed))
    analysis = any_service.analyze(**ids, options=options)
    until(lambda: status(any_service, analysis)["attempts"] == 1)
    killed(any_service.worker())
    until(
        lambda: status(any_service, analysis)["attempts"] == 2 and status(any_service, analysis)["progress"]["done"] > 0
    )
    killed(any_service.worker())
    done = any_service.wait(analysis["id"])
    assert done["attempts"] == 3
    assert without_identity(any_service.report(done)) == expected
    assert [report["id"] for report in reports_of(any_service, analysis)] == [done["report_id"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_worker_killed_many_times(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Kill -9 at 20 random moments of analyses: each ends with one report, equal to the one without a kill."""
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file)
    undisturbed = any_service.wait(any_service.analyze(**ids, options=OPTIONS)["id"])
    expected = without_identity(any_service.report(undisturbed))
    moments, kills = random.Random(0), 0
    analyses: list[dict[str, Any]] = []
    while kills < 20:
        analyses.append(any_service.analyze(**ids, options=OPTIONS))
        kills += killed_until_it_ended(any_service, analyses[-1], moments, at_most=20 - kills)
    for one in analyses:
        done = any_service.wait(one["id"])
        assert without_identity(any_service.report(done)) == expected
        assert [report["id"] for report in reports_of(any_service, one)] == [done["report_id"]]
    assert sum(status(any_service, one)["attempts"] for one in analyses) >= kills


def killed_until_it_ended(service: Service, analysis: dict[str, Any], moments: random.Random, *, at_most: int) -> int:
    """Kill the worker at a random moment of each attempt; return the number of kills before the analysis ended."""
    kills = 0
    while kills < at_most:
        until(partial(has_begun_or_ended, service, analysis, kills + 1))
        time.sleep(moments.uniform(0, 3.0))
        worker = service.worker()
        if has_ended(service, analysis):
            break
        killed(worker)
        kills += 1
    return kills


def killed(worker: psutil.Process) -> None:
    """Kill a worker and wait for its end."""
    worker.kill()
    worker.wait(15)


def has_begun_or_ended(service: Service, analysis: dict[str, Any], attempt: int) -> bool:
    now = status(service, analysis)
    return now["attempts"] >= attempt or now["status"] in ("succeeded", "failed", "cancelled")


def has_ended(service: Service, analysis: dict[str, Any]) -> bool:
    return status(service, analysis)["status"] in ("succeeded", "failed", "cancelled")


@pytest.mark.slow
@pytest.mark.parametrize("any_service", campaign(DATABASES, often=["sqlite"]), indirect=True)
def test_compute_child_killed(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """After one death of the compute process a new one takes over; two on one task fail it, and the worker lives."""
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


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service that allows two attempts, three seconds of silence, and is without a worker for two seconds."""
    data_dir = tmp_path_factory.mktemp("strict") / "data"
    with services.running(data_dir, worker_restart_max_seconds="2", max_attempts="2", stall_seconds="3") as service:
        yield service


def test_cancel_survives_the_death_of_the_worker(
    strict: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A cancel requested while no worker runs ends the analysis when a worker comes back."""
    analysis = strict.analyze(**pair(strict, mlp_checkpoint_file, digits_probe_file), options=OPTIONS)
    until(lambda: status(strict, analysis)["status"] == "running")
    strict.worker().kill()
    assert strict.client.post(f"/v1/analyses/{analysis['id']}/cancel").status_code == 200
    done = strict.wait(analysis["id"])
    assert done["status"] == "cancelled"
    assert reports_of(strict, analysis) == []


@pytest.mark.slow
def test_attempts_are_limited(strict: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """An analysis whose worker dies in every attempt fails with a problem."""
    ids = pair(strict, mlp_checkpoint_file, digits_probe_file)
    analysis = strict.analyze(**ids, options={"null_permutations": 1000})
    for attempt in (1, 2):
        until(partial(has_begun_or_ended, strict, analysis, attempt))
        strict.worker().kill()
    failed = strict.wait(analysis["id"])
    assert failed["status"] == "failed"
    assert failed["problem"]["type"] == "urn:interplay:problem:too-many-attempts"


def test_an_analysis_whose_process_hangs_is_computed_by_another(
    strict: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A stopped compute process is replaced, and the analysis succeeds."""
    ids = pair(strict, mlp_checkpoint_file, digits_probe_file)
    child = strict.compute_child()
    child.suspend()
    analysis = strict.analyze(**ids, options={"null_permutations": 0})
    assert strict.wait(analysis["id"])["status"] == "succeeded"
    assert strict.compute_child().pid != child.pid
    assert not child.is_running()


def test_timeout_fails_the_analysis(tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A computation beyond the operator's time limit is stopped with a problem, and the worker goes on."""
    with services.running(tmp_path / "data", analysis_timeout_seconds="1") as service:
        ids = pair(service, mlp_checkpoint_file, digits_probe_file)
        failed = service.wait(service.analyze(**ids, options={"null_permutations": 1000})["id"])
        assert failed["status"] == "failed"
        assert failed["problem"]["type"] == "urn:interplay:problem:analysis-timeout"


def test_missing_blob_fails_the_analysis(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A file missing from the storage fails the analysis with a problem that names it."""
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


@pytest.mark.slow
@pytest.mark.parametrize("any_service", campaign(DATABASES, often=["postgresql"]), indirect=True)
def test_two_workers_share_the_work(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A second worker takes over the work of a worker that is killed and not restarted."""
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file)
    with services.worker(any_service) as first, services.worker(any_service) as second:
        until(lambda: len(any_service.client.get("/v1/version").json()["workers"]) >= 3)
        analyses = [any_service.analyze(**ids, options={"null_permutations": 60}) for _ in range(4)]
        until(lambda: sum(status(any_service, one)["status"] == "running" for one in analyses) == 3)
        first.kill()
        second.terminate()
        for one in analyses:
            assert any_service.wait(one["id"])["status"] == "succeeded"
            assert len(reports_of(any_service, one)) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", campaign([[10], [4, 10, 17]], often=[[10]]))
@pytest.mark.parametrize("any_service", campaign(DATABASES, often=["postgresql"]), indirect=True)
def test_worker_killed_in_the_middle_of_a_path(
    any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, kills: list[int]
) -> None:
    """Kill -9 at these of 25 points: the path has the same points as without a kill, and finished points are not
    computed again.
    """
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file)
    other = any_service.post("/v1/checkpoints", {"name": "other"}, mlp_checkpoint_file).json()["id"]
    path = {
        "kind": "path",
        "checkpoint_a_id": ids["checkpoint_id"],
        "checkpoint_b_id": other,
        "probe_id": ids["probe_id"],
        "options": {"null_permutations": 5, "grid": {"points": 25}},
    }
    expected = any_service.report(any_service.wait(any_service.analyze(**path)["id"]))
    analysis = any_service.analyze(**path)
    for wanted in kills:
        until(partial(_at_point, any_service, analysis, point=wanted))
        done_before = status(any_service, analysis)["progress"]["done"]
        killed(any_service.worker())
    lowest = 25
    while not has_ended(any_service, analysis):
        now = status(any_service, analysis)
        if now["progress"]["total"] == 25:
            lowest = min(lowest, now["progress"]["done"])
        time.sleep(0.02)
    done = any_service.wait(analysis["id"])
    # A kill between two points costs nothing, and one within a point this point.
    assert 1 <= done["attempts"] <= len(kills) + 1
    assert any_service.report(done)["points"] == expected["points"]
    assert lowest >= done_before


def _at_point(service: Service, analysis: dict[str, Any], *, point: int) -> bool:
    now = status(service, analysis)
    return bool(now["progress"]["total"] == 25 and now["progress"]["done"] >= point)

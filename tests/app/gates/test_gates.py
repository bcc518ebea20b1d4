"""Gates, verdicts and baselines over HTTP, on both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.gates.form import file_schema
from tests.app.api.test_uploads import problem
from tests.services import Service

Reports = list[dict[str, Any]]


def named(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex[:8]}"


def checks(**check: Any) -> list[dict[str, Any]]:
    return [{"metric": "splits.test.accuracy", **check}]


def make_gate(service: Service, *listed: dict[str, Any], name: str | None = None, **members: Any) -> dict[str, Any]:
    body = {"name": name or named("gate"), "checks": [*listed], **members}
    response = service.client.post("/v1/gates", json=body)
    assert response.status_code in (200, 201), response.text
    return dict(response.json())


@pytest.fixture(scope="module")
def all_reports(
    service: Service, service_on_postgres: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> dict[str, Reports]:
    """Return three evaluations on each database: two on one probe with other seeds, one on another probe."""
    return {one.url: evaluations(one, mlp_checkpoint_file, digits_probe_file) for one in (service, service_on_postgres)}


@pytest.fixture
def reports(any_service: Service, all_reports: dict[str, Reports]) -> Reports:
    return all_reports[any_service.url]


def evaluations(service: Service, checkpoint_file: Path, probe_file: Path) -> Reports:
    checkpoint = service.post("/v1/checkpoints", {"name": "gated"}, checkpoint_file).json()
    probe = service.post("/v1/probes", {"name": "gating", "preprocess": {"scale": 0.0625}}, probe_file).json()
    other = service.post("/v1/probes", {"name": "other", "preprocess": {"scale": 0.05}}, probe_file).json()
    queued = [
        service.analyze(checkpoint_id=checkpoint["id"], probe_id=on["id"], options={"seed": seed})
        for on, seed in ((probe, 0), (probe, 1), (other, 0))
    ]
    return [service.report(service.wait(analysis["id"])) for analysis in queued]


def judge(service: Service, report: dict[str, Any], **request: Any) -> dict[str, Any]:
    response = service.client.post(f"/v1/reports/{report['id']}/gate", json=request)
    assert response.status_code == 200, response.text
    return dict(response.json())


# --- gates ----------------------------------------------------------------------------------------------------------


def test_a_gate_is_versioned_and_never_changes(any_service: Service) -> None:
    """New content is the next version; the current content is the same version, with 200; reverting is a new one."""
    name = named("gate")
    bodies = [{"name": name, "checks": checks(min=bound)} for bound in (0.9, 0.9, 0.95, 0.9)]
    answers = [any_service.client.post("/v1/gates", json=body) for body in bodies]
    assert [answer.status_code for answer in answers] == [201, 200, 201, 201]
    assert [answer.json()["version"] for answer in answers] == [1, 1, 2, 3]
    assert answers[0].json() == answers[1].json()
    for answer in answers:
        assert any_service.client.get(answer.headers["Location"]).json() == answer.json()
    listed = any_service.client.get("/v1/gates", params={"name": name}).json()["items"]
    assert [(item["version"], item["n_checks"]) for item in listed] == [(3, 1), (2, 1), (1, 1)]
    assert listed[0]["id"] == answers[3].json()["id"]


def test_defaults_that_are_spelled_out_are_the_same_gate(any_service: Service) -> None:
    """A gate with its defaults written out is the same gate."""
    name = named("gate")
    first = make_gate(any_service, *checks(min=0.9), name=name)
    again = make_gate(any_service, *checks(min=0.9, severity="fail", when_undefined=None), name=name, kind="evaluation")
    assert again["id"] == first["id"]


def test_gates_that_come_at_once_are_versions_of_their_own(any_service: Service) -> None:
    """Of eight simultaneous requests, four with the same content make one version, four others make four."""
    name = named("gate")
    bounds = [0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9]
    barrier = threading.Barrier(len(bounds))

    def post(bound: float) -> dict[str, Any]:
        barrier.wait(30)
        return make_gate(any_service, *checks(min=bound), name=name)

    with ThreadPoolExecutor(len(bounds)) as pool:
        made = [*pool.map(post, bounds)]
    versions = {gate["id"]: gate["version"] for gate in made}
    assert sorted(versions.values()) == [*range(1, len(versions) + 1)]
    assert 5 <= len(versions) <= 8


def test_a_gate_of_paths_that_do_not_exist_is_refused(any_service: Service) -> None:
    """A 422 names the check, the member and the nearest existing path."""
    body = {"name": "g", "checks": [*checks(min=0.9), {"metric": "splits.test.acuracy", "min": 0.9}]}
    found = problem(any_service.client.post("/v1/gates", json=body), 422, "invalid-request")
    (error,) = found["errors"]
    assert error["loc"] == ["checks", "1", "metric"]
    assert "nearest is 'splits.test.accuracy'" in error["message"]
    for check in ({"metric": "splits.test.accuracy", "min": "0.9"}, {"metric": "splits.test.accuracy"}):
        answer = any_service.client.post("/v1/gates", json={"name": "g", "checks": [check]})
        problem(answer, 422, "invalid-request")


def test_the_published_schema_is_the_one_of_the_code(service: Service) -> None:
    """The published schema for editors is the code's; tests/interplay compares the copy in the repository."""
    answer = service.client.get("/v1/gates/schema")
    assert answer.status_code == 200
    assert answer.json() == file_schema()


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_a_verdict_has_every_check_with_its_reason(any_service: Service, reports: Reports) -> None:
    """A verdict has each check's value, bounds, status and sentence, the report, the gate's version and the counts."""
    gate = make_gate(
        any_service,
        *checks(min=0.5),
        *checks(max=0.5),
        *checks(max=0.4, severity="warn"),
        *checks(min_change=0),
    )
    verdict = judge(any_service, reports[0], gate_id=gate["id"])
    accuracy = reports[0]["splits"]["test"]["accuracy"]
    assert [check["status"] for check in verdict["checks"]] == ["pass", "fail", "warn", "undefined"]
    assert {check["value"] for check in verdict["checks"]} == {accuracy}
    assert verdict["checks"][1]["why"] == f"{accuracy:.6g} is above max 0.5."
    assert verdict["status"] == "fail"
    assert verdict["counts"] == {"pass": 1, "fail": 1, "warn": 1, "undefined": 1, "skip": 0}
    assert verdict["gate"] == {"id": gate["id"], "name": gate["name"], "version": 1}
    assert (verdict["subject"], verdict["probe"], verdict["baseline"]) == ("gated", "gating", None)
    assert all(0 <= check["seconds"] < 1 for check in verdict["checks"])


def test_a_change_is_judged_against_the_report_of_the_baseline(any_service: Service, reports: Reports) -> None:
    """A change is judged against the baseline's report, or against the report at which a caller has seen it."""
    name = named("main")
    gate = make_gate(any_service, *checks(min_change=0), {"metric": "splits.all.loss", "max_relative_change": 0})
    any_service.client.put(f"/v1/baselines/{name}", json={"report_id": reports[0]["id"]}).raise_for_status()
    verdict = judge(any_service, reports[1], gate_id=gate["id"], baseline=name)
    assert verdict["status"] == "pass", verdict
    assert verdict["baseline"] == {"name": name, "report_id": reports[0]["id"], "subject": "gated"}
    any_service.client.put(f"/v1/baselines/{name}", json={"report_id": reports[2]["id"]}).raise_for_status()
    seen = judge(any_service, reports[1], gate_id=gate["id"], baseline=name, baseline_report_id=reports[0]["id"])
    assert seen["baseline"] == verdict["baseline"]


def test_a_baseline_of_another_probe_is_refused(any_service: Service, reports: Reports) -> None:
    """A baseline of another probe is refused with the difference; here the same file with another preprocessing."""
    gate = make_gate(any_service, *checks(min_change=0))
    request = {"gate_id": gate["id"], "baseline_report_id": reports[2]["id"]}
    answer = any_service.client.post(f"/v1/reports/{reports[0]['id']}/gate", json=request)
    found = problem(answer, 422, "not-comparable")
    assert found["differing"][0]["member"] == "probe.preprocess"


def test_a_baseline_that_is_not_there_yet_is_undefined_not_an_error(any_service: Service, reports: Reports) -> None:
    """A missing baseline is undefined, so that a pipeline's first run has a verdict, which the gate may let pass."""
    name = named("first")
    gate = make_gate(any_service, *checks(min_change=0), *checks(min_change=0, when_undefined="pass", name="lenient"))
    verdict = judge(any_service, reports[0], gate_id=gate["id"], baseline=name)
    assert [check["status"] for check in verdict["checks"]] == ["undefined", "skip"]
    assert verdict["status"] == "undefined"
    assert verdict["checks"][0]["why"] == f"Undefined: there is no baseline '{name}' yet."
    assert verdict["baseline"] == {"name": name, "report_id": None, "subject": None}


def test_unknown_names_are_404(any_service: Service, reports: Reports) -> None:
    """An unknown report, gate, baseline report or baseline is 404."""
    client, gate = any_service.client, make_gate(any_service, *checks(min=0))
    here = f"/v1/reports/{reports[0]['id']}/gate"
    problem(client.post("/v1/reports/nothing/gate", json={"gate_id": gate["id"]}), 404, "not-found")
    problem(client.post(here, json={"gate_id": "nothing"}), 404, "not-found")
    problem(client.post(here, json={"gate_id": gate["id"], "baseline_report_id": "x"}), 404, "not-found")
    problem(client.get("/v1/gates/nothing"), 404, "not-found")
    problem(client.get("/v1/baselines/nothing"), 404, "not-found")
    problem(client.get("/v1/baselines/nothing/history"), 404, "not-found")
    problem(client.put("/v1/baselines/x", json={"report_id": "nothing"}), 404, "not-found")
    problem(client.put("/v1/baselines/a%20b", json={"report_id": reports[0]["id"]}), 422, "invalid-request")
    problem(client.get("/v1/baselines/x"), 404, "not-found")


# --- baselines ------------------------------------------------------------------------------------------------------


def history(service: Service, name: str) -> list[dict[str, Any]]:
    items = service.client.get(f"/v1/baselines/{name}/history").json()["items"]
    return [dict(item) for item in items]


def test_a_baseline_points_where_it_was_put_and_keeps_its_history(any_service: Service, reports: Reports) -> None:
    """A baseline points at its last report; its history is newest first, with the previous report and the note."""
    name, client = named("main"), any_service.client
    first = client.put(f"/v1/baselines/{name}", json={"report_id": reports[0]["id"], "note": "by hand"})
    assert first.status_code == 200
    assert first.json() == client.get(f"/v1/baselines/{name}").json()
    assert first.json()["checkpoint_id"] == reports[0]["subject"]["id"]
    assert (first.json()["report_kind"], first.json()["probe_id"]) == ("evaluation", reports[0]["probe"]["id"])
    client.put(f"/v1/baselines/{name}", json={"report_id": reports[1]["id"]}).raise_for_status()
    moves = history(any_service, name)
    assert [(move["report_id"], move["before_report_id"], move["done"], move["note"]) for move in moves] == [
        (reports[1]["id"], reports[0]["id"], True, None),
        (reports[0]["id"], None, True, "by hand"),
    ]
    (listed,) = client.get("/v1/baselines", params={"name": name}).json()["items"]
    assert listed["report_id"] == reports[1]["id"]


def test_a_baseline_moves_only_from_where_it_was_seen(any_service: Service, reports: Reports) -> None:
    """With a stale `expected_report_id`, null for none yet, a move is refused with the current report, and recorded."""
    name, client = named("main"), any_service.client
    ids = [report["id"] for report in reports]

    def put(report_id: str, expected: str | None) -> Any:
        body = {"report_id": report_id, "expected_report_id": expected}
        return client.put(f"/v1/baselines/{name}", json=body)

    refused = problem(put(ids[0], ids[1]), 409, "baseline-moved")
    assert (refused["report_id"], refused["expected_report_id"]) == (None, ids[1])
    problem(client.get(f"/v1/baselines/{name}"), 404, "not-found")
    assert client.get("/v1/baselines", params={"name": name}).json()["items"] == []
    assert put(ids[0], None).status_code == 200
    assert problem(put(ids[1], None), 409, "baseline-moved")["report_id"] == ids[0]
    assert put(ids[1], ids[0]).status_code == 200
    assert [move["done"] for move in history(any_service, name)] == [True, False, True, False]


@pytest.mark.parametrize("start", ["new", "old"])
def test_of_promotions_at_once_one_wins_and_the_history_shows_all(
    any_service: Service, reports: Reports, start: str
) -> None:
    """Of eight simultaneous promotions from the same state, one succeeds, seven are refused; the history shows all."""
    name, seen = named("race"), None
    if start == "old":
        seen = reports[2]["id"]
        any_service.client.put(f"/v1/baselines/{name}", json={"report_id": seen}).raise_for_status()
    barrier = threading.Barrier(8)

    def promote(number: int) -> int:
        body = {"report_id": reports[number % 2]["id"], "expected_report_id": seen, "note": f"run {number}"}
        barrier.wait(30)
        return any_service.client.put(f"/v1/baselines/{name}", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = [*pool.map(promote, range(8))]
    assert sorted(statuses) == [200] + [409] * 7
    moves = history(any_service, name)[:8]
    assert sorted(move["note"] for move in moves) == [f"run {number}" for number in range(8)]
    (winner,) = [move for move in moves if move["done"]]
    assert winner["note"] == f"run {statuses.index(200)}"
    assert any_service.client.get(f"/v1/baselines/{name}").json()["report_id"] == winner["report_id"]

"""The page of one resource: charts of its evaluations over a run and over time, the form that deletes it, its file."""

from html import unescape
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save
from safetensors.torch import load_file, save_file

from app.api.charts.rendering import draw
from tests.app.pages.test_comparing import _rows_of as rows_of
from tests.app.pages.test_pages import read, token_of
from tests.app.test_analyses import SLOW, pair
from tests.services import Service

RUN, EPOCHS = "run <b>1</b>", (3, 1, 2.5)
PATHS = {"accuracy": "accuracy", "MIR": "interplay.sample.global.mir", "HDR": "interplay.sample.global.hdr"}


@pytest.fixture(scope="module")
def run(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Evaluate three checkpoints of a run, one of them twice, and one of no run twice, on one probe."""
    file = tmp_path_factory.mktemp("run") / "scaled.safetensors"
    weights = load_file(mlp_checkpoint_file)
    with safe_open(mlp_checkpoint_file, "pt") as opened:
        architecture = opened.metadata()
    ids = []
    for epoch in EPOCHS:
        save_file({name: value * epoch / 3 for name, value in weights.items()}, file, metadata=architecture)
        spec = {"name": f"at {epoch}", "metadata": {"run": RUN, "epoch": epoch, "step": 7}}
        ids.append(service.post("/v1/checkpoints", spec, file).json()["id"])
    ids.append(service.post("/v1/checkpoints", {"name": "alone <b>"}, mlp_checkpoint_file).json()["id"])
    spec = {"name": "digits <&>", "preprocess": {"scale": 0.0625}}
    probe = service.post("/v1/probes", spec, digits_probe_file).json()["id"]
    asked = [(ids[0], 1), (ids[0], 2), (ids[1], 1), (ids[2], 1), (ids[3], 1), (ids[3], 2)]
    queued = [
        service.analyze(checkpoint_id=id_, probe_id=probe, options={"null_permutations": permutations})["id"]
        for id_, permutations in asked
    ]
    return {"ids": ids, "probe": probe, "reports": [service.report(service.wait(one)) for one in queued]}


def values_of(report: dict[str, Any]) -> list[float]:
    """Return accuracy, MIR and HDR of the test split."""
    split = report["splits"]["test"]
    return [split["accuracy"], *(split["interplay"]["sample"]["global"][name] for name in ("mir", "hdr"))]


def course_of(service: Service, path: str) -> tuple[str, list[dict[str, Any]]]:
    """Return what the chart of a page says in its title, and its points."""
    address = unescape(read(service.client, path).partition('data-chart="')[2].partition('"')[0])
    specification = service.client.get(address).json()
    picture = service.client.get(address.replace(".json", ".svg"))
    assert picture.headers["content-type"] == "image/svg+xml"
    return " ".join(specification["title"]["text"]), rows_of(specification, "measure")


def test_a_run_lies_over_its_epochs(service: Service, run: dict[str, Any]) -> None:
    """A checkpoint stands among those of its run, each with its newest report, whatever order they came in."""
    for index in range(3):
        title, rows = course_of(service, f"/checkpoints/{run['ids'][index]}")
        assert title == f"3 evaluations of run {RUN} on digits <&>, over epoch"
        _, newest, second, third, *_ = run["reports"]
        expected = {3: values_of(newest), 1: values_of(second), 2.5: values_of(third)}
        for place, name in enumerate(PATHS):
            own = {row["place"]: row["value"] for row in rows if row["measure"] == name}
            assert list(own) == [1, 2.5, 3]
            assert own == {epoch: values[place] for epoch, values in expected.items()}


@pytest.mark.slow
def test_a_checkpoint_of_no_run_lies_over_time(service: Service, run: dict[str, Any]) -> None:
    """Its own evaluations follow on each other."""
    title, rows = course_of(service, f"/checkpoints/{run['ids'][3]}")
    assert title.startswith("2 evaluations of alone <b> on digits <&>, over the time")
    *_, first, second = run["reports"]
    assert [row["value"] for row in rows] == [
        value for pair in zip(values_of(first), values_of(second), strict=True) for value in pair
    ]
    assert rows[0]["place"] < rows[1]["place"]
    assert rows[0]["created"] == first["created_at"].replace("T", " ")[:19] + " UTC"


def test_a_probe_has_all_evaluations_on_it(service: Service, run: dict[str, Any]) -> None:
    """Points of different networks are not joined."""
    title, rows = course_of(service, f"/probes/{run['probe']}")
    assert title.startswith("6 evaluations on digits <&>, over the time")
    assert len(rows) == 18
    assert [row["report"] for row in rows[:6]] == ["at 3", "at 3", "at 1", "at 2.5", "alone <b>", "alone <b>"]


def test_charts_that_there_are_not(service: Service, run: dict[str, Any], mlp_checkpoint_file: Path) -> None:
    """One evaluation makes no chart; another probe, another name and another collection have none either."""
    new = service.post("/v1/checkpoints", {"name": "new", "metadata": {"run": RUN}}, mlp_checkpoint_file).json()["id"]
    assert "data-chart" not in read(service.client, f"/checkpoints/{new}")
    chart = f"/checkpoints/{run['ids'][0]}/charts/run.svg?probe_id={run['probe']}"
    assert service.client.get(chart).status_code == 200
    for address in (
        chart.replace(run["ids"][0], new), chart.replace("charts/run", "charts/time"), chart.partition("?")[0],
        chart.replace("checkpoints", "probes"), chart.replace(run["probe"], new),
    ):  # fmt: skip
        assert service.client.get(address).status_code == 404, address


@pytest.mark.parametrize("seconds", [0.1, 100, 10_000, 1e7])
def test_axes_of_time(seconds: float) -> None:
    """Reports of one second, and of a year, lie on an axis with labels."""
    points = [
        {"place": 1.8e9 + index * seconds, "report": "a", "created": "", "accuracy": 0.5, "mir": 0.1, "hdr": None}
        for index in range(4)
    ]
    data = {
        "about": "on a", "axis": "created (UTC)", "is_time": True, "joined": True, "here": None, "split": "all",
        "points": points,
    }  # fmt: skip
    drawn = draw(data, "course", "svg").decode()
    assert drawn.count("2027-") >= 2 if seconds == 1e7 else drawn.count(":") >= 4
    assert "not defined at 4 of 12 points" in drawn


@pytest.mark.parametrize("collection", ["checkpoints", "probes", "feature-sets"])
def test_a_resource_is_deleted_by_its_form(
    service: Service, collection: str, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """The form of its own session deletes and leads to the list; without the token nothing happens."""
    arrays: dict[str, Any] = {"features": np.eye(6, dtype=np.float32), "labels": np.arange(6) % 3}
    arrays["head"] = arrays["features"][:3].copy()
    files: dict[str, Path | bytes] = {
        "checkpoints": mlp_checkpoint_file,
        "probes": digits_probe_file,
        "feature-sets": save(arrays),
    }
    id_ = service.post(f"/v1/{collection}", {"name": "short-lived"}, files[collection]).json()["id"]
    path = f"/{collection}/{id_}"
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
        page = read(client, path)
        assert f'<a href="/v1{path}/file" download>' in page
        for data in ({}, {"csrf_token": "0"}):
            assert client.post(f"{path}/delete", data=data).status_code == 403
        assert client.get(f"{path}/delete").status_code == 405
        read(client, path)
        done = client.post(f"{path}/delete", data={"csrf_token": token_of(page)})
        assert (done.status_code, done.headers["location"]) == (303, f"/{collection}")
        assert "There is no" in read(client, path, status=404)
        assert client.post(f"{path}/delete", data={"csrf_token": token_of(page)}).status_code == 404


def test_what_an_analysis_needs_is_not_deleted(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """The refusal is a page that says why; once the analysis has ended, nothing refuses."""
    asked = pair(service, mlp_checkpoint_file, digits_probe_file)
    analysis = service.analyze(**asked, options=SLOW)
    path = f"/probes/{asked['probe_id']}"
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
        token = {"csrf_token": token_of(read(client, path))}
        refused = client.post(f"{path}/delete", data=token)
        assert refused.status_code == 409
        assert "is needed by 1 analyses that have not ended" in refused.text
        service.client.post(f"/v1/analyses/{analysis['id']}/cancel")
        service.wait(analysis["id"])
        assert client.post(f"{path}/delete", data=token).status_code == 303


def test_results_gates_and_baselines_are_deleted_by_their_forms(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Each form leads to its list; what a baseline needs is refused by a page that links to the baseline."""
    options = {"null_permutations": 0}
    analysis = service.wait(
        service.analyze(**pair(service, mlp_checkpoint_file, digits_probe_file), options=options)["id"]
    )
    report_id, name = analysis["report_id"], f"base-{uuid4().hex[:8]}"
    service.client.put(f"/v1/baselines/{name}", json={"report_id": report_id})
    gate = {"name": name, "checks": [{"metric": "splits.test.accuracy", "min": 0.5}]}
    gate_id = service.client.post("/v1/gates", json=gate).json()["id"]
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
        for path in (f"/reports/{report_id}", f"/analyses/{analysis['id']}"):
            refused = client.post(f"{path}/delete", data={"csrf_token": token_of(read(client, path))})
            assert refused.status_code == 409
            assert f'<a href="/baselines/{name}">' in refused.text
        for path in (f"/gates/{gate_id}", f"/baselines/{name}", f"/reports/{report_id}", f"/analyses/{analysis['id']}"):
            token = token_of(read(client, path))
            assert client.post(f"{path}/delete", data={"csrf_token": "0"}).status_code == 403
            done = client.post(f"{path}/delete", data={"csrf_token": token})
            assert (done.status_code, done.headers["location"]) == (303, path.rpartition("/")[0])
            read(client, path, status=404)

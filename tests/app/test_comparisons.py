"""Comparisons over HTTP and from the command line: values, intervals, reuse and refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.schemas.reports import ComparisonReport
from tests.app.api.test_uploads import problem
from tests.app.test_points import FEW, _checkpoint, _noisy, _normed, _report
from tests.campaigns import on_one_database
from tests.services import Service


@pytest.fixture
def probe_id(any_service: Service, digits_probe_file: Path) -> str:
    made = any_service.post("/v1/probes", {"name": "data", "preprocess": {"scale": 0.0625}}, digits_probe_file)
    return str(made.json()["id"])


@pytest.fixture
def pair(any_service: Service, mlp_checkpoint_file: Path) -> dict[str, str]:
    """Upload a trained network, and the same with noise."""
    first = _checkpoint(any_service, mlp_checkpoint_file, name="trained", metadata={"run": "a"})
    second = _checkpoint(any_service, _noisy(mlp_checkpoint_file, 0.1), name="noisy", metadata={"run": "b"})
    return {"checkpoint_a_id": first, "checkpoint_b_id": second}


def test_a_comparison_of_two_checkpoints(any_service: Service, pair: dict[str, str], probe_id: str) -> None:
    """Both sides equal the checkpoints' own evaluations to the last digit, and the effect of the noise is detected."""
    own = [_report(any_service, checkpoint_id=id_, probe_id=probe_id, options=FEW) for id_ in pair.values()]
    report = _report(any_service, kind="comparison", **pair, probe_id=probe_id, options=FEW)
    ComparisonReport.model_validate(report)
    assert [subject["name"] for subject in report["subjects"]] == ["trained", "noisy"]
    assert [subject["head"] for subject in report["subjects"]] == ["head", "head"]
    assert report["provenance"]["options"]["interval"] == "delta"
    assert report["provenance"]["features_reused"] is True
    assert report["probe_b"] == report["probe"]
    assert list(report["splits"]) == ["all", "train", "test"]
    for name, split in report["splits"].items():
        assert split["a"] == own[0]["splits"][name]
        assert split["b"] == own[1]["splits"][name]
        found = split["differences"]["accuracy"]
        assert found["difference"] == split["b"]["accuracy"] - split["a"]["accuracy"]
        counts = split["predictions"]
        only = counts["only_b_correct"] - counts["only_a_correct"]
        assert found["difference"] == pytest.approx(only / split["a"]["n_samples"])
    loss = report["splits"]["train"]["differences"]["loss"]
    assert loss["significant"] is True
    assert 0 < loss["low"] < loss["difference"] < loss["high"]
    assert report["splits"]["all"]["differences"]["interplay.sample.global.mir"]["bias"] is None
    listed = any_service.client.get("/v1/reports", params={"kind": "comparison", "metadata": "run=b"}).json()
    assert report["id"] in [item["id"] for item in listed["items"]]


@on_one_database
def test_networks_of_different_architectures(any_service: Service, mlp_checkpoint_file: Path, probe_id: str) -> None:
    """Networks of different widths, which cannot lie on a path, can be compared."""
    ids = {
        "checkpoint_a_id": _checkpoint(any_service, mlp_checkpoint_file),
        "checkpoint_b_id": _checkpoint(
            any_service,
            _normed(0),
            architecture={"family": "builtin", "name": "mlp", "args": {"sizes": [64, 16, 10], "norm": "batch"}},
        ),
    }
    refused = any_service.client.post("/v1/analyses", json={"kind": "path", **ids, "probe_id": probe_id})
    problem(refused, 422, "architectures-differ")
    options = {**FEW, "interval": "bootstrap", "resamples": 20, "confidence": 0.9}
    report = _report(any_service, kind="comparison", **ids, probe_id=probe_id, options=options)
    assert [subject["n_features"] for subject in report["subjects"]] == [32, 16]
    accuracy = report["splits"]["all"]["differences"]["accuracy"]
    assert accuracy["high"] < -0.5
    assert report["splits"]["all"]["differences"]["interplay.sample.global.mir"]["bias_a"] > 0


def test_what_is_refused(any_service: Service, pair: dict[str, str], probe_id: str) -> None:
    """Options out of range, a single checkpoint and an unknown checkpoint are refused."""
    request = {"kind": "comparison", **pair, "probe_id": probe_id}
    for options in ({"resamples": 5}, {"confidence": 1}, {"interval": "guess"}, {"grid": "adaptive"}):
        problem(any_service.client.post("/v1/analyses", json={**request, "options": options}), 422, "invalid-request")
    one = {key: value for key, value in request.items() if key != "checkpoint_b_id"}
    problem(any_service.client.post("/v1/analyses", json=one), 422, "invalid-request")
    problem(any_service.client.post("/v1/analyses", json={**request, "checkpoint_a_id": "none"}), 404, "not-found")


@pytest.mark.slow
def test_the_command(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """`interplay compare --wait` shows the differences of each split; --json the analysis."""
    ids = [_checkpoint(service, content) for content in (mlp_checkpoint_file, _noisy(mlp_checkpoint_file, 0.1))]
    made = service.post("/v1/probes", {"name": "data", "preprocess": {"scale": 0.0625}}, digits_probe_file)
    command = ("compare", *ids, "--probe", made.json()["id"], "--permutations", "0", "--wait")

    def run(*further: str) -> subprocess.CompletedProcess[str]:
        whole: list[Any] = [sys.executable, "-m", "interplay.command", *command, *further, "--url", service.url]
        return subprocess.run(whole, capture_output=True, text=True, timeout=90, check=False)

    shown = run("--bootstrap", "--resamples", "20")
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "1,437 samples. Same prediction for" in words
    assert "McNemar p =" in words
    assert "a paired bootstrap" in words
    assert "/60 resamples" in shown.stderr
    told = run("--confidence", "0.99", "--json")
    analysis = json.loads(told.stdout)
    assert analysis["options"]["confidence"] == 0.99
    report = service.client.get(f"/v1/reports/{analysis['report_id']}").json()
    assert report["provenance"]["options"]["confidence"] == 0.99
    assert run("--resamples", "20").returncode == 2

"""Analyses and reports over HTTP: idempotent requests, cancellation, reading, and refusal of invalid input."""

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from app.schemas import AnalysisRequest, Kind
from app.schemas.reports import EvaluationReport
from tests.app.api.test_uploads import problem
from tests.conftest import MLP
from tests.services import Service, until

Tensors = dict[str, torch.Tensor]


def pair(service: Service, checkpoint: Path | bytes, probe: Path | bytes, **spec: Any) -> dict[str, str]:
    """Upload a checkpoint and a probe; return their ids."""
    made = service.post("/v1/checkpoints", {"name": "net", **spec}, checkpoint)
    assert made.status_code == 201, made.text
    data = service.post("/v1/probes", {"name": "data", "preprocess": {"scale": 0.0625}}, probe)
    assert data.status_code == 201, data.text
    return {"checkpoint_id": made.json()["id"], "probe_id": data.json()["id"]}


def without_identity(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without members that differ between two runs of an analysis, the second with cached features."""
    kept = {key: report[key] for key in ("kind", "provenance", "splits", "schema_version", "definitions_version")}
    kept["provenance"] = {key: value for key, value in report["provenance"].items() if key != "features_reused"}
    return kept


def test_evaluation_of_a_checkpoint(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A trained network and real data give a report with every value of the schema."""
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file, metadata={"epoch": 30})
    queued = any_service.analyze(**ids)
    assert queued["status"] in ("queued", "running")
    analysis = any_service.wait(queued["id"])
    report = any_service.report(analysis)
    EvaluationReport.model_validate(report)
    assert report["analysis_id"] == analysis["id"]
    assert report["subject"]["head"] == "head"
    assert report["subject"]["metadata"] == {"epoch": 30}
    assert {name: split["n_samples"] for name, split in report["splits"].items()} == {
        "all": 1797, "train": 1437, "test": 360,
    }  # fmt: skip
    for split in report["splits"].values():
        assert split["accuracy"] > 0.7
        classes, counts = split["by_class"], split["class_counts"]
        right = sum(accuracy * count for accuracy, count in zip(classes["accuracy"], counts, strict=True))
        assert right == pytest.approx(split["accuracy"] * split["n_samples"], rel=1e-12)
        assert (
            sum(classes["predicted_counts"]) == split["n_samples"] == sum(b["n_samples"] for b in split["reliability"])
        )
        confused = sum(confusion["n_samples"] for confusion in classes["confusions"])
        assert confused + classes["n_confused_otherwise"] == pytest.approx(split["n_samples"] - right)
        for level in ("sample", "class_mean"):
            for centring in ("none", "global"):
                values = split["interplay"][level][centring]
                assert 0 <= values["mir"] <= 1
                assert values["method"]["error_estimate"] <= 1e-3
                assert values["null"]["n"] == 10
    assert analysis["attempts"] == 1
    assert analysis["started_at"] <= analysis["finished_at"]


def test_report_is_immutable_and_cacheable(
    any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A report has an ETag, is cacheable for ever, and answers 304 for a matching tag."""
    analysis = any_service.wait(any_service.analyze(**pair(any_service, mlp_checkpoint_file, digits_probe_file))["id"])
    url = f"/v1/reports/{analysis['report_id']}"
    first = any_service.client.get(url)
    assert "immutable" in first.headers["cache-control"]
    again = any_service.client.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""
    assert any_service.client.get(url, headers={"If-None-Match": '"other"'}).content == first.content


def test_feature_set_gives_the_same_numbers(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Features that a user extracted give the same values as the network itself."""
    weights, data = load_file(mlp_checkpoint_file), load_arrays(digits_probe_file)
    inputs = torch.from_numpy(data["inputs"]) * 0.0625
    features = torch.relu(inputs @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    tensors = {
        "features": features.numpy(),
        "labels": data["labels"],
        "split": data["split"],
        "head": weights["head.weight"].numpy(),
        "head_bias": weights["head.bias"].numpy(),
    }
    made = service.post("/v1/feature-sets", {"name": "mine", "metadata": {"of": "mlp"}}, save(tensors))
    assert made.status_code == 201, made.text
    assert made.json()["n_features"] == 32
    mine = service.report(service.wait(service.analyze(feature_set_id=made.json()["id"])["id"]))
    theirs = service.report(
        service.wait(service.analyze(**pair(service, mlp_checkpoint_file, digits_probe_file))["id"])
    )
    assert mine["subject"]["kind"] == mine["probe"]["kind"] == "feature_set"
    assert mine["provenance"]["precision"] is None
    for name, split in mine["splits"].items():
        other = theirs["splits"][name]
        assert split["accuracy"] == other["accuracy"]
        assert split["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert split["collapse"]["nc1"] == pytest.approx(other["collapse"]["nc1"], rel=1e-4)
        for level, centring in (("sample", "none"), ("sample", "global"), ("class_mean", "none")):
            ours, others = (s["interplay"][level][centring] for s in (split, other))
            assert ours["mir"] == pytest.approx(others["mir"], abs=1e-6)
            assert ours["hdr"] == pytest.approx(others["hdr"], abs=1e-6)


def test_idempotency_key(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """The same key and body give the same analysis, ten times at once too; the same key with another body is a 409."""
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file)
    headers = {"Idempotency-Key": uuid4().hex}
    body = {"kind": "evaluation", **ids}

    def ask(_: int) -> Any:
        return any_service.client.post("/v1/analyses", json=body, headers=headers)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(10)))
    assert [answer.status_code for answer in answers] == [202] * 10
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = any_service.client.post("/v1/analyses", json={**body, "options": {"seed": 1}}, headers=headers)
    conflict = problem(other, 409, "idempotency-conflict")
    assert conflict["analysis_id"] == answers[0].json()["id"]
    assert any_service.wait(answers[0].json()["id"])["attempts"] == 1


def test_cancel(any_service: Service, slow_ids: Callable[[Service], dict[str, str]]) -> None:
    """A running and a queued analysis can be cancelled; the worker then continues; an ended one cannot be cancelled."""
    ids = slow_ids(any_service)
    running, waiting = (any_service.analyze(**ids, options=SLOW) for _ in range(2))

    def status(analysis: dict[str, Any]) -> str:
        return str(any_service.client.get(f"/v1/analyses/{analysis['id']}").json()["status"])

    until(lambda: status(running) == "running")
    assert status(waiting) == "queued"
    child = any_service.compute_child()
    problem(any_service.client.delete(f"/v1/checkpoints/{ids['checkpoint_id']}"), 409, "in-use")
    for analysis in (waiting, running):
        assert any_service.client.post(f"/v1/analyses/{analysis['id']}/cancel").status_code == 200
    assert status(waiting) == "cancelled"
    ended = any_service.wait(running["id"], seconds=20)
    assert ended["status"] == "cancelled"
    assert ended["report_id"] is None
    until(lambda: not child.is_running())
    assert any_service.client.post(f"/v1/analyses/{running['id']}/cancel").status_code == 200
    done = any_service.wait(any_service.analyze(**ids)["id"])
    assert done["status"] == "succeeded"
    problem(any_service.client.post(f"/v1/analyses/{done['id']}/cancel"), 409, "not-cancellable")
    assert any_service.client.delete(f"/v1/checkpoints/{ids['checkpoint_id']}").status_code == 204
    assert any_service.client.get(f"/v1/reports/{done['report_id']}").status_code == 200


# Enough permutations to keep a worker busy for a while.
SLOW = {"null_permutations": 1000}


@pytest.fixture(scope="session")
def slow_ids(mlp_checkpoint_file: Path, digits_probe_file: Path) -> Callable[[Service], dict[str, str]]:
    """Ids whose evaluation takes long with the options SLOW."""
    return lambda service: pair(service, mlp_checkpoint_file, digits_probe_file)


def test_lists_of_analyses_and_reports(
    any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Analyses and reports can be filtered by status, kind, subject and their subject's metadata."""
    mark = uuid4().hex
    ids = pair(any_service, mlp_checkpoint_file, digits_probe_file, metadata={"mark": mark})
    done = any_service.wait(any_service.analyze(**ids)["id"])

    def listed(collection: str, **params: str) -> list[str]:
        response = any_service.client.get(f"/v1/{collection}", params=params)
        assert response.status_code == 200, response.text
        return [item["id"] for item in response.json()["items"]]

    for params in (
        {"checkpoint_id": ids["checkpoint_id"]},
        {"probe_id": ids["probe_id"]},
        {"metadata": f"mark={mark}"},
        {"kind": "evaluation", "metadata": f"mark={mark}"},
    ):
        assert listed("analyses", **params) == [done["id"]]
        assert listed("reports", **params) == [done["report_id"]]
    assert listed("analyses", status="succeeded", metadata=f"mark={mark}") == [done["id"]]
    assert listed("analyses", status="queued", metadata=f"mark={mark}") == []
    assert listed("analyses", kind="path", metadata=f"mark={mark}") == []
    assert any_service.client.delete(f"/v1/checkpoints/{ids['checkpoint_id']}").status_code == 204
    assert listed("reports", metadata=f"mark={mark}") == [done["report_id"]]


BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "unknown kind": {"kind": "magic", "feature_set_id": "x"},
    "no subject": {"kind": "evaluation"},
    "half a subject": {"kind": "evaluation", "checkpoint_id": "x"},
    "two subjects": {"kind": "evaluation", "checkpoint_id": "x", "probe_id": "y", "feature_set_id": "z"},
    "unknown option": {"kind": "evaluation", "feature_set_id": "x", "options": {"seeds": 1}},
    "negative permutations": {"kind": "evaluation", "feature_set_id": "x", "options": {"null_permutations": -1}},
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_refused(service: Service, case: str) -> None:
    """An ambiguous or incomplete request is a problem that names the place."""
    body = problem(service.client.post("/v1/analyses", json=BAD_REQUESTS[case]), 422, "invalid-request")
    assert body["errors"]


def test_body_that_is_no_json_is_refused(service: Service) -> None:
    """A body that is not JSON, or is far too long, is a problem."""
    headers = {"Content-Type": "application/json"}
    problem(service.client.post("/v1/analyses", content=b"{nonsense", headers=headers), 422, "invalid-request")
    long = b'{"kind": "' + b"x" * 2**21 + b'"}'
    for content_type in ("application/json", "multipart/x"):
        answer = service.client.post("/v1/analyses", content=long, headers={"Content-Type": content_type})
        assert problem(answer, 413, "too-large")["limit_bytes"] == 2**20


def test_text_that_no_database_takes_is_refused(any_service: Service) -> None:
    """NUL, lone surrogates and years out of range are problems or unknown, never faults, on both databases."""
    client = any_service.client
    for path in ("/v1/probes?name=%00", "/v1/probes/%00", "/v1/reports/%00", "/v1/analyses?kind=%00"):
        problem(client.get(path), 422, "invalid-request")
    problem(client.get("/v1/probes?metadata=a=%00"), 422, "invalid-request")
    problem(client.get("/v1/probes", params={"created_after": "0001-01-01T00:00:00+23:59"}), 422, "invalid-request")
    far = base64.urlsafe_b64encode(b"0001-01-01T00:00:00+23:59 x").decode()
    problem(client.get("/v1/probes", params={"cursor": far}), 422, "invalid-request")
    for text in (r"\u0000", r"\ud800"):
        body = b'{"kind": "evaluation", "feature_set_id": "' + text.encode() + b'"}'
        answer = client.post("/v1/analyses", content=body, headers={"Content-Type": "application/json"})
        problem(answer, 422, "invalid-request")


@pytest.mark.parametrize("kind", get_args(Kind))
def test_kinds_are_known_to_requests_errors_and_filters(service: Service, kind: str) -> None:
    """A filter accepts each kind, and errors of a request of each kind name places of its body, not the kind."""
    for collection in ("analyses", "reports"):
        assert service.client.get(f"/v1/{collection}", params={"kind": kind}).status_code == 200
    answer = service.client.post("/v1/analyses", json={"kind": kind, "options": {"tolerance": 1}})
    places = [error["loc"] for error in problem(answer, 422, "invalid-request")["errors"]]
    assert ["body", "options", "tolerance"] in places
    assert not [place for place in places if kind in place]


def test_kinds_are_those_of_requests() -> None:
    """The kinds of filters and errors are those of requests."""
    requests = get_args(get_args(AnalysisRequest)[0])
    assert [*get_args(Kind)] == [get_args(request.model_fields["kind"].annotation)[0] for request in requests]


def test_unknown_kind_is_no_filter(service: Service) -> None:
    """A mistyped kind is refused instead of giving an empty list."""
    for path in ("/v1/reports?kind=paths", "/v1/analyses?kind=paths", "/v1/analyses?kind="):
        (error,) = problem(service.client.get(path), 422, "invalid-request")["errors"]
        assert error["loc"] == ["query", "kind"]
        assert "'comparison', 'path'" in error["message"]


PATH = {"kind": "path", "checkpoint_a_id": "a", "checkpoint_b_id": "b", "probe_id": "p"}
PRUNING = {"kind": "pruning", "checkpoint_id": "a", "probe_id": "p"}
SERIES = {"kind": "series", "checkpoint_ids": ["a", "b"], "probe_id": "p"}
NO_FORM = 'give one of {"points": 25}, {"values": [0.25, 0.5]} and "adaptive"'
NO_NUMBER = "Input should be a valid number"


@pytest.mark.parametrize(
    ("grid", "place", "message"),
    [
        ({"points": 5000}, "points", "Input should be less than or equal to 1001"),
        ({"points": 5, "steps": 1}, "steps", "Extra inputs are not permitted"),
        ({"values": []}, "values", "List should have at least 1 item after validation, not 0"),
        ({"values": [True]}, "values.0", NO_NUMBER),
        ({"values": [0, "0.5"]}, "values.1", NO_NUMBER),
        ({"points": 5, "values": [0.5]}, "", NO_FORM),
        ({}, "", NO_FORM),
        ("adaptiv", "", NO_FORM),
        (None, "", NO_FORM),
    ],
    ids=str,
)
def test_a_grid_is_held_against_its_own_form(service: Service, grid: Any, place: str, message: str) -> None:
    """An error of a grid refers to its given form, at its place in the body; without a form it names all three."""
    answer = service.client.post("/v1/analyses", json={**PATH, "options": {"grid": grid}})
    loc = ["body", "options", "grid", *filter(None, place.split("."))]
    assert problem(answer, 422, "invalid-request")["errors"] == [{"loc": loc, "message": message}]


@pytest.mark.parametrize("grid", [{"points": 5}, {"values": [0, 0.5]}, {"values": [1]}, "adaptive"], ids=str)
def test_grids_that_are_taken(service: Service, grid: Any) -> None:
    """Each form is accepted; integers are accepted as numbers."""
    answer = service.client.post("/v1/analyses", json={**PATH, "options": {"grid": grid}})
    problem(answer, 404, "not-found")


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        ({**PRUNING, "options": {"sparsities": [True]}}, "options.sparsities.0"),
        ({**PRUNING, "options": {"sparsities": [0, "0.5"]}}, "options.sparsities.1"),
        ({**SERIES, "axis": {"name": "x", "values": [False, 2]}}, "axis.values.0"),
        ({**SERIES, "axis": {"name": "x", "values": [1, "2"]}}, "axis.values.1"),
    ],
)
def test_places_are_numbers(service: Service, request_: dict[str, Any], place: str) -> None:
    """Neither true nor a text is accepted as a sparsity or an axis value."""
    body = problem(service.client.post("/v1/analyses", json=request_), 422, "invalid-request")
    assert body["errors"] == [{"loc": ["body", *place.split(".")], "message": NO_NUMBER}]


@pytest.mark.parametrize(
    ("values", "index", "bound"),
    [([-1.7e308, 1.7e308], 0, "greater than or equal to -1"), ([0, 1.0001e15], 1, "less than or equal to 1")],
)
def test_an_axis_has_bounds(service: Service, values: list[float], index: int, bound: str) -> None:
    """Axis values beyond 1e15, whose difference could overflow, are refused at once; the bounds are accepted."""
    answer = service.client.post("/v1/analyses", json={**SERIES, "axis": {"name": "x", "values": values}})
    error = problem(answer, 422, "invalid-request")["errors"][0]
    assert error["loc"] == ["body", "axis", "values", str(index)]
    assert error["message"] == f"Input should be {bound}000000000000000"
    answer = service.client.post("/v1/analyses", json={**SERIES, "axis": {"name": "x", "values": [-1e15, 1e15]}})
    problem(answer, 404, "not-found")


def test_messages_are_in_words(service: Service) -> None:
    """Messages contain neither the library's prefix nor a regular expression for control characters."""
    answer = service.client.post("/v1/analyses", json={**SERIES, "axis": {"name": "a\nb", "values": [1, 2]}})
    body = problem(answer, 422, "invalid-request")
    assert body["errors"] == [{"loc": ["body", "axis", "name"], "message": "must not have control characters"}]
    answer = service.post("/v1/feature-sets", {"name": "a\nb", "sha256": "0" * 64})
    assert "spec.name: must not have control characters" in problem(answer, 422, "invalid-request")["detail"]
    answer = service.client.post("/v1/analyses", json={**SERIES, "axis": {"name": "x", "values": [2, 1]}})
    body = problem(answer, 422, "invalid-request")
    assert "body.axis: the values of an axis rise" in body["detail"]
    assert body["errors"][0]["message"].startswith("the values of an axis rise")


def test_unknown_filter_is_refused(service: Service) -> None:
    """An unknown filter of a collection is a problem; otherwise it would return everything."""
    for path in ("/v1/reports?status=failed", "/v1/probes?kind=evaluation", "/v1/analyses?checkpoint=x"):
        problem(service.client.get(path), 422, "invalid-request")


def renamed(tensors: Tensors) -> Tensors:
    return {f"layer_{number}": value for number, value in enumerate(tensors.values())}


def many_names(tensors: Tensors) -> Tensors:
    return {**tensors, **{f"extra.{i}": torch.zeros(1) for i in range(30)}}


def transposed(tensors: Tensors) -> Tensors:
    return {name: value.T.contiguous() if value.ndim == 2 else value for name, value in tensors.items()}


def poisoned(value: float) -> Callable[[Tensors], Tensors]:
    def poison(tensors: Tensors) -> Tensors:
        name = max(tensors)
        tensors[name].view(-1)[3] = value
        return tensors

    return poison


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "names that do not fit": (renamed, {}, "checkpoint-mismatch"),
    "30 tensors too many": (many_names, {}, "checkpoint-mismatch"),
    "shapes that do not fit": (transposed, {}, "checkpoint-mismatch"),
    "an architecture of absurd size": (
        lambda tensors: tensors,
        {"architecture": {**MLP, "args": {"sizes": [64, *[1_000_000] * 20, 10]}}},
        "checkpoint-mismatch",
    ),
    "NaN in a weight": (poisoned(float("nan")), {}, "non-finite-values"),
    "infinity in a weight": (poisoned(float("inf")), {}, "non-finite-values"),
    "a head that is not there": (lambda tensors: tensors, {"head": "classifier"}, "head-not-found"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_fails_with_a_problem(
    service: Service, case: str, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Weights that do not fit or are not numbers fail their analysis with the reason; the worker lives."""
    change, spec, kind = BAD_CHECKPOINTS[case]
    content = save_tensors(change(load_file(mlp_checkpoint_file)), metadata={"architecture": json.dumps(MLP)})
    worker = service.worker()
    analysis = service.wait(service.analyze(**pair(service, content, digits_probe_file, **spec))["id"])
    assert analysis["status"] == "failed", analysis
    body = analysis["problem"]
    assert body["type"] == f"urn:interplay:problem:{kind}", body
    if case == "names that do not fit":
        assert len(body["missing"]) == len(body["unexpected"]) == 4
    if case == "30 tensors too many":
        assert len(body["unexpected"]) == 20
        assert body["n_unexpected"] == 30
    if case == "shapes that do not fit":
        assert {"name", "expected", "found"} == set(body["misshaped"][0])
    if kind == "non-finite-values":
        assert body["tensor"] == max(load_file(mlp_checkpoint_file))
    assert service.worker() == worker
    done = service.wait(service.analyze(**pair(service, mlp_checkpoint_file, digits_probe_file))["id"])
    assert done["status"] == "succeeded"


def probe_arrays(**changes: Any) -> bytes:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(40, 64)).astype(np.float32)
    arrays: dict[str, Any] = {"inputs": inputs, "labels": np.arange(40) % 10}
    return save({**arrays, **changes})


def with_nan() -> np.ndarray[Any, Any]:
    inputs = np.ones((40, 64), np.float32)
    inputs[7, 9] = np.nan
    return inputs


BAD_PROBES: dict[str, tuple[Callable[[], bytes], str]] = {
    "inputs of another width": (lambda: probe_arrays(inputs=np.ones((40, 63), np.float32)), "inputs-refused"),
    "labels beyond the head": (lambda: probe_arrays(labels=np.arange(40) % 11), "invalid-probe"),
    "NaN in the inputs": (lambda: probe_arrays(inputs=with_nan()), "non-finite-values"),
}


@pytest.mark.parametrize("case", BAD_PROBES)
def test_probe_that_does_not_fit_fails_with_a_problem(service: Service, case: str, mlp_checkpoint_file: Path) -> None:
    """A probe that the network cannot take fails the analysis with the reason."""
    content, kind = BAD_PROBES[case]
    analysis = service.wait(service.analyze(**pair(service, mlp_checkpoint_file, content()))["id"])
    assert analysis["status"] == "failed", analysis
    assert analysis["problem"]["type"] == f"urn:interplay:problem:{kind}", analysis["problem"]


@pytest.mark.parametrize("name", ["features", "head", "head_bias", "logits"])
def test_non_finite_feature_set_fails_with_a_problem(service: Service, name: str) -> None:
    """NaN in a feature set fails the analysis and names the tensor."""
    generator = np.random.default_rng(0)
    tensors = {
        "features": generator.normal(size=(40, 8)),
        "head": generator.normal(size=(4, 8)),
        "head_bias": np.zeros(4),
        "logits": generator.normal(size=(40, 4)),
    }
    tensors[name].flat[1] = np.nan
    content = save({**{key: value.astype(np.float32) for key, value in tensors.items()}, "labels": np.arange(40) % 4})
    made = service.post("/v1/feature-sets", {"name": "nan"}, content)
    analysis = service.wait(service.analyze(feature_set_id=made.json()["id"])["id"])
    assert analysis["status"] == "failed", analysis
    assert analysis["problem"]["type"] == "urn:interplay:problem:non-finite-values"
    assert analysis["problem"]["tensor"] == name

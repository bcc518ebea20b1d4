"""Paths, pruning sweeps and series over HTTP: points, summaries, reuse and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from app.database import make_engine, write
from app.models import Report
from app.schemas.reports import PathReport, PruningReport, SeriesReport
from app.settings import Settings
from tests.app.api.test_uploads import problem
from tests.campaigns import on_one_database
from tests.conftest import MLP
from tests.services import Service

NORMED = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 16, 10], "activation": "relu", "norm": "batch"}}
FEW = {"null_permutations": 0}


def of_point(report: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's splits as a point has them: without predictions by class and confidence."""
    return {name: {**split, "by_class": None, "reliability": None} for name, split in report["splits"].items()}


def _checkpoint(service: Service, content: bytes | Path, **spec: Any) -> str:
    made = service.post("/v1/checkpoints", {"name": "net", **spec}, content)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def _normed(seed: int) -> bytes:
    """Return a network with batch normalisation, at random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.weight": (16, 64), "layers.0.bias": (16,), "head.weight": (10, 16), "head.bias": (10,)}
    shapes |= {f"norms.0.{name}": (16,) for name in ("weight", "bias", "running_mean")}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return save_tensors({**tensors, "norms.0.running_var": torch.rand(16, generator=generator) + 0.5})


def _noisy(path: Path, amount: float) -> bytes:
    """Return the trained network, with noise on its weights."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor += amount * torch.randn(tensor.shape, generator=generator)
    return save_tensors(tensors, metadata={"architecture": json.dumps(MLP)})


@pytest.fixture
def probe_id(any_service: Service, digits_probe_file: Path) -> str:
    made = any_service.post("/v1/probes", {"name": "data", "preprocess": {"scale": 0.0625}}, digits_probe_file)
    return str(made.json()["id"])


@pytest.fixture
def ends(any_service: Service, mlp_checkpoint_file: Path) -> tuple[str, str]:
    """Upload a trained network, and the same with noise."""
    first = _checkpoint(any_service, mlp_checkpoint_file, name="trained", metadata={"run": "a", "epoch": 30})
    return first, _checkpoint(any_service, _noisy(mlp_checkpoint_file, 0.3), name="noisy", metadata={"run": "b"})


def _report(service: Service, **body: Any) -> dict[str, Any]:
    return service.report(service.wait(service.analyze(**body)["id"]))


def test_a_path_between_two_checkpoints(any_service: Service, ends: tuple[str, str], probe_id: str) -> None:
    """A path's ends equal the checkpoints' own evaluations to the last digit; barriers are those of its points."""
    first, second = ends
    own = [_report(any_service, checkpoint_id=id_, probe_id=probe_id, options=FEW) for id_ in ends]
    request = {"kind": "path", "checkpoint_a_id": first, "checkpoint_b_id": second, "probe_id": probe_id}
    queued = any_service.analyze(**request, options={**FEW, "grid": {"points": 5}})
    analysis = any_service.wait(queued["id"])
    assert analysis["checkpoint_ids"] == [first, second]
    assert analysis["checkpoint_id"] is None
    assert (analysis["progress"]["done"], analysis["progress"]["total"]) == (5, 5)
    report = any_service.report(analysis)
    PathReport.model_validate(report)
    assert [point["w"] for point in report["points"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [subject["name"] for subject in report["subjects"]] == ["trained", "noisy"]
    for point, alone in ((report["points"][0], own[0]), (report["points"][-1], own[1])):
        assert point["splits"] == of_point(alone)
    losses = [point["splits"]["test"]["loss"] for point in report["points"]]
    errors = [1 - point["splits"]["test"]["accuracy"] for point in report["points"]]
    summary = report["summary"]["splits"]["test"]
    chord = [
        loss - ((1 - w) * losses[0] + w * losses[-1]) for w, loss in zip((0, 0.25, 0.5, 0.75, 1), losses, strict=True)
    ]
    assert summary["loss_barrier"]["value"] == pytest.approx(max(0, *chord))
    assert summary["error_barrier"]["value"] == pytest.approx(max(errors) - (errors[0] + errors[-1]) / 2)
    assert summary["connected"] == (summary["error_barrier"]["value"] <= 0.02)
    assert summary["loss_forms"]["midpoint"] == pytest.approx(losses[2] - (losses[0] + losses[-1]) / 2)
    assert report["summary"]["l2_distance"] == pytest.approx(0.3 * (64 * 32 + 32 + 320 + 10) ** 0.5, rel=0.1)
    assert report["summary"]["measured"] == {"level": "sample", "centring": "global"}


@on_one_database
def test_a_path_finds_its_own_points(any_service: Service, ends: tuple[str, str], probe_id: str) -> None:
    """Named points get both ends and are sorted; points beyond them need permission; adaptive takes over 17 points."""
    first, second = ends
    request = {"kind": "path", "checkpoint_a_id": first, "checkpoint_b_id": second, "probe_id": probe_id}
    named = {"grid": {"values": [0.7, -0.5, 0.2]}, "extrapolate": True}
    report = _report(any_service, **request, options={**FEW, **named})
    assert [point["w"] for point in report["points"]] == [-0.5, 0, 0.2, 0.7, 1]
    report = _report(any_service, **request, options={**FEW, "grid": "adaptive"})
    assert 17 < len(report["points"]) <= 65
    assert report["provenance"]["options"]["grid"] == "adaptive"


def _bumpy(w: float) -> dict[str, torch.Tensor]:
    """Return an end of a path on which two hidden units make narrow bumps of the first logit, the higher at 0.97."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) / 8
        for name, shape in (("layers.0.weight", (16, 64)), ("layers.0.bias", (16,)), ("head.weight", (10, 16)))
    }
    tensors["layers.0.weight"][:4] = 0
    edges = [(at - width, at + width, width) for at, width in ((0.4062, 0.006), (0.97, 0.004))]
    biases = [(w - edge) / width for *pair, width in edges for edge in pair]
    tensors["layers.0.bias"][:4] = torch.tensor(biases)
    tensors["head.weight"][:, :4] = 0
    tensors["head.weight"][0, :4] = torch.tensor([3.0, -3.0, 3.6, -3.6])
    return {**tensors, "head.bias": torch.zeros(10)}


def test_an_adaptive_path_looks_before_it_evaluates(service: Service, digits_probe_file: Path) -> None:
    """Of two bumps between the first 17 points the higher is found, and the report gives the resolution."""
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 16, 10], "activation": "tanh"}}
    first, second = (_checkpoint(service, save_tensors(_bumpy(w)), architecture=architecture) for w in (0.0, 1.0))
    made = service.post("/v1/probes", {"name": "data", "preprocess": {"scale": 0.0625}}, digits_probe_file)
    request = {"kind": "path", "checkpoint_a_id": first, "checkpoint_b_id": second, "probe_id": made.json()["id"]}
    report = _report(service, **request, options={**FEW, "grid": "adaptive", "samples": 900})
    rows = report["summary"]["splits"]["all"]["loss_barrier"]
    assert rows["at"] == pytest.approx(0.97, abs=2e-3)
    even = _report(service, **request, options={**FEW, "grid": {"points": 17}, "samples": 900})
    assert even["summary"]["splits"]["all"]["loss_barrier"]["value"] < 0.2 * rows["value"]
    assert (even["summary"]["resolution"], even["summary"]["look"]) == (1 / 16, None)
    summary = report["summary"]
    assert summary["resolution"] == 1 / 256
    assert summary["look"]["n_samples"] == 512
    assert 257 < summary["look"]["n_points"] <= 290
    assert summary["look"]["loss_barrier"]["value"] == pytest.approx(rows["value"], rel=0.1)
    assert 17 < len(report["points"]) <= 65
    assert report["timings_seconds"]["look"] > 0
    # The same as torch itself computes, on the samples that were not drawn as well.
    probe = load_file(digits_probe_file)
    inputs, labels = probe["inputs"].float() / 16, probe["labels"].long()
    losses = []
    for w in (0.0, rows["at"], 1.0):
        tensors = _bumpy(w)
        hidden = torch.tanh(inputs @ tensors["layers.0.weight"].T + tensors["layers.0.bias"])
        losses.append(float(torch.nn.functional.cross_entropy(hidden @ tensors["head.weight"].T, labels)))
    chord = (1 - rows["at"]) * losses[0] + rows["at"] * losses[2]
    assert rows["value"] == pytest.approx(losses[1] - chord, rel=0.05)


@on_one_database
def test_recalibration_changes_what_lies_between_the_ends(any_service: Service, probe_id: str) -> None:
    """Statistics are recomputed only between the ends, reproducibly; the report counts the layers."""
    ids = [_checkpoint(any_service, _normed(seed), architecture=NORMED) for seed in (0, 1)]
    request = {"kind": "path", "checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "probe_id": probe_id}
    options = {**FEW, "grid": {"points": 3}}
    plain = _report(any_service, **request, options=options)
    again, fresh = (
        _report(any_service, **request, options={**options, "normalisation": "recalibrate"}) for _ in range(2)
    )
    assert fresh["points"] == again["points"]
    assert [a == b for a, b in zip(plain["points"], fresh["points"], strict=True)] == [True, False, True]
    assert plain["summary"]["recalibrated_layers"] is None
    assert fresh["summary"]["recalibrated_layers"] == 1


@on_one_database
def test_alignment_takes_a_permutation_out_of_a_path(
    any_service: Service, mlp_checkpoint_file: Path, probe_id: str
) -> None:
    """A permuted copy is far away without alignment and the same network with it."""
    first = _checkpoint(any_service, mlp_checkpoint_file)
    tensors, order = load_file(mlp_checkpoint_file), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    moved = {name: tensors[name][order].contiguous() for name in ("layers.0.weight", "layers.0.bias")}
    moved["head.weight"] = tensors["head.weight"][:, order].contiguous()
    second = _checkpoint(any_service, save_tensors({**tensors, **moved}), architecture=MLP)
    request = {"kind": "path", "checkpoint_a_id": first, "checkpoint_b_id": second, "probe_id": probe_id}
    options = {**FEW, "grid": {"points": 5}}
    plain = _report(any_service, **request, options=options)["summary"]
    found = _report(any_service, **request, options={**options, "alignment": "weight_matching"})["summary"]
    assert plain["splits"]["all"]["loss_barrier"]["value"] > 0.1
    assert plain["l2_distance"] > 1
    assert plain["alignment"] is None
    assert found["splits"]["all"]["loss_barrier"]["value"] < 1e-3
    assert found["l2_distance"] == 0
    assert found["alignment"]["n_groups"] == 1
    assert 0 <= found["alignment"]["change_of_logits"] < 1e-5


def test_a_pruning_sweep(any_service: Service, ends: tuple[str, str], probe_id: str) -> None:
    """At sparsity 0 a sweep equals the checkpoint's own evaluation; the knee is the last sparsity within a point."""
    own = _report(any_service, checkpoint_id=ends[0], probe_id=probe_id, options=FEW)
    options = {**FEW, "sparsities": [0.5, 0.9, 0.99], "scope": "layerwise"}
    report = _report(any_service, kind="pruning", checkpoint_id=ends[0], probe_id=probe_id, options=options)
    PruningReport.model_validate(report)
    assert [(point["sparsity"], point["n_pruned"]) for point in report["points"]] == [
        (0, 0), (0.5, 1024), (0.9, 1843), (0.99, 2027),
    ]  # fmt: skip
    assert report["points"][0]["splits"] == of_point(own)
    assert report["summary"]["n_prunable"] == 2048
    accuracies = [point["splits"]["test"]["accuracy"] for point in report["points"]]
    within = [
        s for s, accuracy in zip((0, 0.5, 0.9, 0.99), accuracies, strict=True) if accuracies[0] - accuracy <= 0.01
    ]
    assert report["summary"]["splits"]["test"]["knee"] == max(within)


def test_a_series_reuses_evaluations_that_there_are(
    any_service: Service, ends: tuple[str, str], probe_id: str, mlp_checkpoint_file: Path
) -> None:
    """An evaluation of the same checkpoint, probe and options is reused; one of other options is not."""
    third = _checkpoint(any_service, _noisy(mlp_checkpoint_file, 1.0), name="lost")
    own = _report(any_service, checkpoint_id=ends[1], probe_id=probe_id, options=FEW)
    request = {
        "kind": "series",
        "axis": {"name": "noise", "values": [0, 0.3, 1]},
        "checkpoint_ids": [*ends, third],
        "probe_id": probe_id,
    }
    analysis = any_service.wait(any_service.analyze(**request, options=FEW)["id"])
    assert analysis["axis"] == request["axis"]
    report = any_service.report(analysis)
    SeriesReport.model_validate(report)
    assert [point["reused_report_id"] for point in report["points"]] == [None, own["id"], None]
    assert own["splits"]["all"]["by_class"] is not None
    # Reused or computed, a point has the same members.
    assert [point["splits"]["all"]["by_class"] for point in report["points"]] == [None] * 3
    assert report["points"][1]["splits"] == of_point(own)
    assert [point["x"] for point in report["points"]] == [0, 0.3, 1]
    assert [subject["n_features"] for subject in report["subjects"]] == [32, 32, 32]
    accuracies = [point["splits"]["test"]["accuracy"] for point in report["points"]]
    assert accuracies == sorted(accuracies, reverse=True)
    summary = report["summary"]["splits"]["test"]
    assert -1 <= summary["spearman_mir_accuracy"] <= 1
    assert len(summary["mir_distance"]) == 3
    assert report["summary"]["generalisation"] == {
        **dict.fromkeys(("train_at", "test_at", "delay")),
        "reasons": dict.fromkeys(("train_at", "test_at", "delay"), "not_reached"),
    }
    other = _report(any_service, **request, options={**FEW, "seed": 1})
    assert [point["reused_report_id"] for point in other["points"]] == [None] * 3


@on_one_database
def test_precision_is_named_and_takes_part_in_what_is_reused(
    any_service: Service, ends: tuple[str, str], probe_id: str
) -> None:
    """Points in bfloat16 equal evaluations in it, near those in float32; a series reuses only its own precision."""
    narrow = {**FEW, "precision": "bfloat16"}
    wide = _report(any_service, checkpoint_id=ends[0], probe_id=probe_id, options=FEW)
    assert (wide["provenance"]["precision"], wide["provenance"]["options"]["precision"]) == ("float32", "float32")
    own = _report(any_service, checkpoint_id=ends[1], probe_id=probe_id, options=narrow)
    path = {"kind": "path", "checkpoint_a_id": ends[0], "checkpoint_b_id": ends[1]}
    series = {"kind": "series", "axis": {"name": "noise", "values": [0, 0.3]}, "checkpoint_ids": ends}
    grid = {"grid": {"points": 2}, "alignment": "weight_matching"}
    reports = [
        _report(any_service, **path, probe_id=probe_id, options={**narrow, **grid}),
        _report(any_service, **series, probe_id=probe_id, options=narrow),
        _report(
            any_service, kind="pruning", checkpoint_id=ends[0], probe_id=probe_id, options={**narrow, "sparsities": [0]}
        ),
    ]
    for report in (own, *reports):
        provenance = report["provenance"]
        assert (provenance["precision"], provenance["options"]["precision"]) == ("bfloat16", "bfloat16")
        assert provenance["feature_dtype"] == "float32"
    firsts = [report["points"][0]["splits"] for report in reports]
    assert firsts[0] == firsts[1] == firsts[2]
    assert firsts[0]["all"]["loss"] != wide["splits"]["all"]["loss"]
    assert firsts[0]["all"]["loss"] == pytest.approx(wide["splits"]["all"]["loss"], rel=0.05)
    assert [point["reused_report_id"] for point in reports[1]["points"]] == [None, own["id"]]
    assert reports[0]["summary"]["alignment"]["change_of_logits"] < 1e-5


@on_one_database
def test_reports_from_before_an_option_are_reused(any_service: Service, ends: tuple[str, str], probe_id: str) -> None:
    """An evaluation whose report does not name the precision counts as float32; one of another form is passed over."""
    own = _report(any_service, checkpoint_id=ends[0], probe_id=probe_id, options=FEW)
    older = json.loads(json.dumps(own))
    del older["provenance"]["precision"], older["provenance"]["options"]["precision"]
    place = any_service.environment
    url = place.get("INTERPLAY_DATABASE_URL", "")
    engine = make_engine(Settings(data_dir=Path(place["INTERPLAY_DATA_DIR"]), database_url=url))

    def store(content: dict[str, Any]) -> None:
        with write(engine) as session:
            session.get_one(Report, own["id"]).content = json.dumps(content)

    store(older)
    request = {"kind": "series", "axis": {"name": "x", "values": [0, 1]}, "checkpoint_ids": ends, "probe_id": probe_id}
    for options, reused in ((FEW, own["id"]), ({**FEW, "precision": "bfloat16"}, None)):
        report = _report(any_service, **request, options=options)
        assert report["points"][0]["reused_report_id"] == reused
    store({**own, "definitions_version": "0", "splits": {"all": {"accuracy": 1.0}}})
    assert _report(any_service, **request, options=FEW)["points"][0]["reused_report_id"] != own["id"]
    engine.dispose()


@on_one_database
def test_analyses_of_several_checkpoints_are_found_by_each(
    any_service: Service, ends: tuple[str, str], probe_id: str
) -> None:
    """Analyses and reports are found by either end's id and metadata; meanwhile neither checkpoint can be deleted."""
    first, second = ends
    request = {"kind": "path", "checkpoint_a_id": first, "checkpoint_b_id": second, "probe_id": probe_id}
    queued = any_service.analyze(**request, options={**FEW, "grid": {"points": 201}})
    for id_ in ends:
        refused = any_service.client.delete(f"/v1/checkpoints/{id_}")
        assert problem(refused, 409, "in-use")["analysis_ids"] == [queued["id"]]
        found = any_service.client.get("/v1/analyses", params={"checkpoint_id": id_, "kind": "path"}).json()["items"]
        assert [item["id"] for item in found] == [queued["id"]]
    any_service.client.post(f"/v1/analyses/{queued['id']}/cancel")
    assert any_service.wait(queued["id"])["status"] == "cancelled"
    report = _report(any_service, **request, options={**FEW, "grid": {"points": 2}})
    for query in ({"checkpoint_id": first}, {"checkpoint_id": second}, {"metadata": "run=b"}, {"metadata": "epoch=30"}):
        items = any_service.client.get("/v1/reports", params={**query, "kind": "path"}).json()["items"]
        assert items[0]["id"] == report["id"]
        assert items[0]["checkpoint_ids"] == [first, second]


def test_checkpoints_of_two_architectures_are_refused(
    any_service: Service, ends: tuple[str, str], probe_id: str
) -> None:
    """The problem names the checkpoints and how they differ."""
    other = _checkpoint(any_service, _normed(0), name="other", architecture=NORMED)
    path = {"kind": "path", "checkpoint_a_id": ends[0], "checkpoint_b_id": other}
    answer = any_service.client.post("/v1/analyses", json={**path, "probe_id": probe_id})
    body = problem(answer, 422, "architectures-differ")
    assert body["differing"] == [
        {"checkpoint_id": other, "name": "other", "member": f"architecture.args.{name}", "expected": a, "found": b}
        for name, a, b in (("norm", "none", "batch"), ("sizes", [64, 32, 10], [64, 16, 10]))
    ]
    assert '"batch"' in body["detail"]


def test_a_series_compares_networks_of_any_kind(service: Service, ends_of_two_kinds: tuple[str, str]) -> None:
    """A series mixes no weights: widths and norms may differ, and each point equals its own evaluation."""
    made = service.post("/v1/probes", {"name": "data"}, _pixels())
    request = {"kind": "series", "axis": {"name": "x", "values": [1, 2]}, "checkpoint_ids": ends_of_two_kinds}
    report = _report(service, **request, probe_id=made.json()["id"], options=FEW)
    assert [subject["n_features"] for subject in report["subjects"]] == [32, 16]
    other = _report(service, checkpoint_id=ends_of_two_kinds[1], probe_id=made.json()["id"], options=FEW)
    assert report["points"][1]["splits"] == of_point(other)


def test_a_series_of_other_classes_is_refused(service: Service, ends_of_two_kinds: tuple[str, str]) -> None:
    """A series of other classes is refused at once if descriptions show it, otherwise at the point where it shows."""
    sizes = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 8, 12]}}
    tensors = {"layers.0.weight": (8, 64), "layers.0.bias": (8,), "head.weight": (12, 8), "head.bias": (12,)}
    more = _checkpoint(
        service, save_tensors({name: torch.ones(shape) for name, shape in tensors.items()}), architecture=sizes
    )
    made = service.post("/v1/probes", {"name": "data"}, _pixels())
    request = {"kind": "series", "axis": {"name": "x", "values": [1, 2]}, "probe_id": made.json()["id"]}
    answer = service.client.post("/v1/analyses", json={**request, "checkpoint_ids": [ends_of_two_kinds[0], more]})
    assert problem(answer, 422, "architectures-differ")["differing"][0]["member"] == "n_classes"


def _pixels() -> bytes:
    generator = torch.Generator().manual_seed(0)
    return save_tensors({"inputs": torch.rand(40, 64, generator=generator), "labels": torch.arange(40) % 10})


@pytest.fixture
def ends_of_two_kinds(service: Service, mlp_checkpoint_file: Path) -> tuple[str, str]:
    """Upload a plain network, and a narrower one with batch normalisation."""
    return _checkpoint(service, mlp_checkpoint_file), _checkpoint(service, _normed(0), architecture=NORMED)


def test_a_point_that_fails_is_named(
    any_service: Service, ends: tuple[str, str], probe_id: str, mlp_checkpoint_file: Path
) -> None:
    """A checkpoint that holds NaN fails the series, and the problem names its place."""
    tensors = load_file(mlp_checkpoint_file)
    tensors["head.bias"][3] = float("nan")
    broken = _checkpoint(any_service, save_tensors(tensors), architecture=MLP)
    request = {"axis": {"name": "x", "values": [1, 2, 3]}, "checkpoint_ids": [ends[0], broken, ends[1]]}
    queued = any_service.analyze(kind="series", **request, probe_id=probe_id, options=FEW)
    failed = any_service.wait(queued["id"])
    assert failed["status"] == "failed"
    assert failed["problem"]["type"].endswith(":non-finite-values")
    assert failed["problem"]["detail"].startswith(
        "Point 2, at x 2: The checkpoint holds NaN or infinity, as float32, in 'head.bias'."
    )
    assert (failed["problem"]["point"], failed["problem"]["at"]) == (2, 2)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"kind": "path", "checkpoint_a_id": "x", "probe_id": "x"}, ["body", "checkpoint_b_id"]),
        ({"kind": "path", "options": {"grid": {"points": 1}}}, ["body", "options", "grid", "points"]),
        ({"kind": "path", "options": {"grid": {"values": [1.5]}}}, ["body", "options"]),
        ({"kind": "path", "options": {"extrapolate": True}}, ["body", "options"]),
        ({"kind": "path", "options": {"grid": {"values": [9]}, "extrapolate": True}}, ["body", "options"]),
        ({"kind": "pruning", "options": {"sparsities": [1.0]}}, ["body", "options", "sparsities", "0"]),
        ({"kind": "pruning", "options": {"scope": "all"}}, ["body", "options", "scope"]),
        ({"kind": "series", "axis": {"name": "x", "values": [2, 1]}}, ["body", "axis"]),
        ({"kind": "series", "axis": {"name": "x", "values": [1, 2]}, "checkpoint_ids": ["a", "b", "c"]}, ["body"]),
        ({"kind": "evaluation", "options": {"sparsities": [0.1]}}, ["body", "options", "sparsities"]),
        ({"kind": "pruning", "options": {"precision": "float16"}}, ["body", "options", "precision"]),
        ({"kind": "nonsense"}, ["body"]),
    ],
)
def test_a_request_that_is_not_valid_says_where(service: Service, body: dict[str, Any], place: list[str]) -> None:
    """Errors of an invalid request name places of the sent body, whatever the kind."""
    given = {"checkpoint_a_id": "a", "checkpoint_b_id": "b"} if body["kind"] == "path" and "options" in body else {}
    answer = service.client.post("/v1/analyses", json={"probe_id": "x", **given, **body})
    assert place in [error["loc"] for error in problem(answer, 422, "invalid-request")["errors"]], answer.text

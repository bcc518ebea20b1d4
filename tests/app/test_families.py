"""Checkpoints of transformers, timm and torchvision over HTTP, analysed by a real worker."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from tests import services
from tests.analysis import models
from tests.analysis.models import IMAGE_MODELS, N_CLASSES, TEXT_MODELS, Saved
from tests.app.api.test_uploads import problem
from tests.services import Service

N = 24


def _probe(service: Service, tensors: dict[str, Tensor], **spec: Any) -> dict[str, Any]:
    labels = torch.arange(N) % N_CLASSES
    response = service.post("/v1/probes", {"name": "probe", **spec}, save({**tensors, "labels": labels}))
    assert response.status_code == 201, response.text
    return dict(response.json())


def _evaluated(service: Service, saved: Saved, batch: dict[str, Tensor], **spec: Any) -> dict[str, Any]:
    checkpoint = service.post(
        "/v1/checkpoints", {"name": "net", "architecture": saved.architecture, **spec}, saved.path
    )
    assert checkpoint.status_code == 201, checkpoint.text
    probe = _probe(service, batch)
    analysis = service.analyze(checkpoint_id=checkpoint.json()["id"], probe_id=probe["id"])
    return service.wait(analysis["id"])


def _check_report(report: dict[str, Any], saved: Saved, batch: dict[str, Tensor], head: str) -> None:
    """Check that the accuracy is the library's own, and that the report names the head."""
    labels = torch.arange(N) % N_CLASSES
    accuracy = float((saved.library(batch).argmax(dim=1) == labels).float().mean())
    family = saved.architecture["family"]
    assert report["subject"]["head"] == head
    assert report["provenance"]["library"] == f"{family} {importlib.metadata.version(family)}"
    assert report["subject"]["n_classes"] == N_CLASSES
    assert report["splits"]["all"]["accuracy"] == pytest.approx(accuracy)
    assert report["splits"]["all"]["interplay"]["sample"]["none"]["mir"] is not None


@pytest.mark.parametrize(("name", "head"), [("ViT", "classifier"), ("Swin", "classifier")])
def test_image_classifier_of_transformers(service: Service, tmp_path: Path, name: str, head: str) -> None:
    """The files of `save_pretrained` are accepted unchanged; the probe has `pixel_values`."""
    saved, batch = models.saved_transformers(name, IMAGE_MODELS[name], tmp_path), models.images(N)
    _check_report(service.report(_evaluated(service, saved, batch)), saved, batch, head)


@pytest.mark.parametrize(("name", "head"), [("Roberta", "classifier.out_proj"), ("GPT2", "score")])
def test_text_classifier_of_transformers(service: Service, tmp_path: Path, name: str, head: str) -> None:
    """The probe has `input_ids` and `attention_mask`, which stay integers."""
    saved, batch = models.saved_transformers(name, TEXT_MODELS[name], tmp_path), models.texts(N)
    _check_report(service.report(_evaluated(service, saved, batch)), saved, batch, head)


def test_networks_of_timm_and_torchvision(service: Service, tmp_path: Path) -> None:
    """Networks of timm and torchvision are analysed by name and arguments."""
    batch = models.images(N, 64)
    timm = models.saved_timm("resnet18", {}, tmp_path)
    _check_report(service.report(_evaluated(service, timm, batch)), timm, batch, "fc")
    torchvision = models.saved_torchvision("mobilenet_v3_small", {}, tmp_path)
    _check_report(service.report(_evaluated(service, torchvision, batch)), torchvision, batch, "classifier.3")


def test_path_between_two_text_classifiers(service: Service, tmp_path: Path) -> None:
    """A path works with several input tensors as with one; the version that saved a configuration is ignored."""
    ids = []
    for number in (0, 1):
        saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path / str(number))
        config = {**saved.architecture["config"], "transformers_version": f"5.{number}", "_name_or_path": str(number)}
        spec = {"name": str(number), "architecture": {"family": "transformers", "config": config}}
        ids.append(service.post("/v1/checkpoints", spec, saved.path).json()["id"])
    probe = _probe(service, models.texts(N))
    body = {"kind": "path", "checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "probe_id": probe["id"]}
    options = {"grid": {"points": 3}, "alignment": "weight_matching", "null_permutations": 0}
    answer = service.client.post("/v1/analyses", json={**body, "options": options})
    assert answer.status_code == 202, answer.text
    report = service.report(service.wait(answer.json()["id"]))
    assert len(report["points"]) == 3


def test_two_heads_fail_with_their_names(service: Service, tmp_path: Path) -> None:
    """A distilled network's logits come from two heads: the analysis fails with their names."""
    saved = models.saved_timm("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}, tmp_path)
    for spec in ({}, {"head": "head"}):
        failed = _evaluated(service, saved, models.images(N, 64), **spec)
        assert failed["status"] == "failed"
        assert failed["problem"]["type"] == "urn:interplay:problem:head-not-found"


def _worker(service: Service) -> dict[str, Any]:
    """Return the newest worker, once it has tried all installed libraries and one that was killed is forgotten."""

    def tried() -> dict[str, Any] | None:
        workers = service.client.get("/v1/version").json()["workers"]
        return None if len(workers) != 1 or workers[0]["untried"] else dict(workers[0])

    return services.until(tried, seconds=240)


def test_version_lists_the_families(service: Service) -> None:
    """GET /v1/version lists the families that each worker can build, as it has imported them."""
    worker = _worker(service)
    assert worker["families"] == ["builtin", "transformers", "timm", "torchvision", "exported"]
    assert worker["unavailable"] == {}


@pytest.mark.parametrize(
    ("family", "name", "nearest"),
    [
        ("timm", "resnet1l8", "resnet18"),
        ("timm", "ResNet18", "resnet18"),
        ("timm", "resnet18.a1_in1", "resnet18.a1_in1k"),
        ("timm", "resnet18.nonsense", "resnet18"),
        ("torchvision", "mobilenetv3_small", "mobilenet_v3_small"),
        ("torchvision", "fasterrcnn_resnet50_fpn", None),
        ("torchvision", "convnext_tinny", "convnext_tiny"),
    ],
)
def test_an_impossible_name_is_refused_at_the_push(
    service: Service, family: str, name: str, nearest: str | None
) -> None:
    """An impossible name is refused with the nearest one that the workers build; the API loads no library for it."""
    _worker(service)
    architecture = {"family": family, "name": name, "args": {"num_classes": 3}}
    answer = service.post("/v1/checkpoints", {"name": "a", "architecture": architecture}, save({"a": torch.zeros(2)}))
    body = problem(answer, 422, "invalid-request")
    assert nearest is None or nearest in body["nearest"]
    assert name.split(".")[0] in body["detail"]


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet18.a1_in1k", "vit_tiny_patch16_224_in21k", "vit_small_patch16_224.dino"]
)
def test_names_that_timm_takes_are_taken(service: Service, name: str) -> None:
    """Names with the tags of weights and deprecated names are accepted, as timm accepts them."""
    _worker(service)
    architecture = {"family": "timm", "name": name, "args": {"num_classes": 3}}
    answer = service.post("/v1/checkpoints", {"name": "a", "architecture": architecture}, save({"a": torch.zeros(2)}))
    assert answer.status_code == 201, answer.text


WITHOUT_TIMM = """
import sys
from importlib.machinery import PathFinder


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "timm" else PathFinder.find_spec(name, path, target)


sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def without_timm(tmp_path: Path) -> Iterator[Service]:
    """Run a service whose processes cannot import timm."""
    site = tmp_path / "site"
    site.mkdir()
    operators = (services.OPERATORS / "sitecustomize.py").read_text()
    (site / "sitecustomize.py").write_text(f"{operators}\n{WITHOUT_TIMM}")
    with services.running(tmp_path / "data", site=site) as service:
        yield service


def test_a_worker_without_the_family_says_what_to_install(without_timm: Service, tmp_path: Path) -> None:
    """The analysis fails with a problem that names the extra, and the worker does not announce the family."""
    worker = _worker(without_timm)
    assert worker["families"] == ["builtin", "transformers", "torchvision", "exported"]
    assert worker["unavailable"] == {}
    saved = models.saved_timm("resnet18", {}, tmp_path)
    failed = _evaluated(without_timm, saved, models.images(N))
    assert failed["status"] == "failed"
    assert failed["problem"]["type"] == "urn:interplay:problem:family-unavailable"
    assert failed["problem"]["extra"] == "timm"
    assert "pip install 'interplay-server[timm]'" in failed["problem"]["detail"]


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA, as PyPI's torchvision wants")
def test_what_is_installed_and_does_not_import_is_not_announced(tmp_path: Path) -> None:
    """PyPI's torchvision beside a CPU build of torch removes three families, with the library's own message."""
    own = "operator torchvision::nms does not exist"
    site = tmp_path / "site"
    site.mkdir()
    with services.running(tmp_path / "data", site=site) as service:
        worker = _worker(service)
        # For its networks transformers imports torchvision if that is installed.
        assert worker["families"] == ["builtin", "exported"]
        assert set(worker["unavailable"]) == {"transformers", "timm", "torchvision"}
        assert all(own in words for words in worker["unavailable"].values())
        saved = models.saved_timm("resnet18", {}, tmp_path)
        for _ in range(2):
            failed = _evaluated(service, saved, models.images(N))
            assert failed["problem"]["type"] == "urn:interplay:problem:family-unavailable"
            assert own in failed["problem"]["detail"]
            assert "pip install" not in failed["problem"]["detail"]
    # A cache of its own, beside the one that the tests share.
    kept = [json.loads(file.read_text()) for file in (tmp_path / "data" / "workers").glob("networks-*.json")]
    assert any(own in found["unavailable"].get("timm", "") for found in kept)


BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"family": "transformers", "config": {**BERT, "auto_map": {"AutoModel": "a.B"}}}, "auto_map"),
    "nested code": (
        {"family": "transformers", "config": {**BERT, "text_config": {"trust_remote_code": True}}},
        "trust_remote_code",
    ),
    "no class": ({"family": "transformers", "config": {"model_type": "bert"}}, "architectures"),
    "a name beside": ({"family": "transformers", "name": "bert", "config": BERT}, "name"),
    "layers": ({"family": "transformers", "config": {**BERT, "num_hidden_layers": 10**6}}, "num_hidden_layers"),
    "nested": ({"family": "transformers", "config": {**BERT, "a": json.loads("[" * 30 + "]" * 30)}}, "nested"),
    "large": ({"family": "timm", "name": "resnet18", "args": {"a": "x" * 2**20}}, "bytes"),
    "a hub": ({"family": "timm", "name": "hf-hub:timm/resnet18", "args": {}}, "name"),
    "weights": ({"family": "timm", "name": "resnet18", "args": {"pretrained": True}}, "pretrained"),
    "a file": ({"family": "timm", "name": "resnet18", "args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
    "weights of torchvision": ({"family": "torchvision", "name": "resnet18", "args": {"weights": "X"}}, "weights"),
    "NUL": ({"family": "torchvision", "name": "resnet18", "args": {"a": "\0"}}, "stored"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_descriptions_are_refused_when_they_come(service: Service, tmp_path: Path, case: str) -> None:
    """The API refuses invalid descriptions without torch, in the spec and in the file's metadata alike."""
    architecture, word = REFUSED[case]
    path = tmp_path / "checkpoint"
    save_file({"weight": torch.zeros(2)}, path, metadata={"architecture": json.dumps(architecture)})
    answers = [service.post("/v1/checkpoints", {"name": "a"}, path)]
    if case != "large":  # as a spec it is over the limit of specs
        answers.append(service.post("/v1/checkpoints", {"name": "a", "architecture": architecture}, path))
    for answer in answers:
        assert word in problem(answer, 422, "invalid-request")["detail"]


def test_probes_with_names_are_described(service: Service) -> None:
    """The shape of a probe with named inputs is that of the pixels or the ids."""
    assert _probe(service, models.texts(N))["input_shape"] == [10]
    assert _probe(service, models.images(N), preprocess={"mean": [0.5] * 3})["input_shape"] == [3, 32, 32]


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"attention_mask": torch.ones(N, 10, dtype=torch.int64)}, "'inputs'"),
        ({**models.texts(N), "inputs": torch.zeros(N, 3)}, "one or the other"),
        ({"input_ids": torch.zeros(N, 10)}, "F32"),
        ({**models.texts(N), "token_type_ids": torch.zeros(N - 1, 10, dtype=torch.int64)}, "token_type_ids"),
        ({**models.texts(N), "input_embeds": torch.zeros(N, 10, 2)}, "input_embeds"),
    ],
)
def test_probes_that_do_not_fit_are_refused(service: Service, tensors: dict[str, Tensor], word: str) -> None:
    """Masks alone, two types of inputs, non-integer ids, unequal numbers of samples and unknown names are refused."""
    content = save({**tensors, "labels": torch.arange(N) % N_CLASSES})
    assert word in problem(service.post("/v1/probes", {"name": "a"}, content), 422, "invalid-file")["detail"]


def test_preprocessing_of_ids_is_refused(service: Service) -> None:
    """Numbers to scale pixels are refused for texts."""
    content = save({**models.texts(N), "labels": torch.arange(N) % N_CLASSES})
    problem(service.post("/v1/probes", {"name": "a", "preprocess": {"scale": 0.5}}, content), 422, "invalid-request")

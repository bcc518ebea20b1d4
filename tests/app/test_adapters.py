"""Adapters over HTTP: pushed on a base, refused where they do not fit, and analysed by a real worker."""

import hashlib
import io
import json
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from tests.analysis import models
from tests.analysis.adapters import SavedAdapter, saved_adapter
from tests.analysis.models import N_CLASSES, TEXT_MODELS, Saved
from tests.app.api.test_uploads import problem
from tests.app.test_points import FEW
from tests.services import Service

N = 24
LABELS = torch.arange(N) % N_CLASSES


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A text classifier with random weights."""
    return models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def adapters(bert: Saved, tmp_path_factory: pytest.TempPathFactory) -> list[SavedAdapter]:
    """Two adapters of it, of two kinds."""
    folder = tmp_path_factory.mktemp("adapters")
    config: dict[str, Any] = {"target_modules": ["query", "value"], "r": 3}
    return [
        saved_adapter(bert, folder / "lora", spread=0.5, task="SEQ_CLS", **config),
        saved_adapter(bert, folder / "dora", spread=0.5, seed=1, use_dora=True, **config),
    ]


def tarred(folder: Path) -> bytes:
    """Return a tar of a folder, as the client makes one."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return content.getvalue()


def zipped(folder: Path) -> bytes:
    """Return a zip of a folder within another."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"run/{path.name}")
    return content.getvalue()


def pushed(service: Service, file: bytes | Path, **spec: Any) -> dict[str, Any]:
    """Push a checkpoint; return it."""
    response = service.post("/v1/checkpoints", {"name": "net", **spec}, file)
    assert response.status_code == 201, response.text
    return dict(response.json())


def based(service: Service, saved: Saved, **spec: Any) -> str:
    """Push a network; return its id."""
    return str(pushed(service, saved.path, architecture=saved.architecture, **spec)["id"])


@pytest.fixture
def probe(service: Service) -> str:
    """The id of a probe of texts."""
    response = service.post("/v1/probes", {"name": "texts"}, save({**models.texts(N), "labels": LABELS}))
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def test_an_adapter_is_described_by_its_base_and_its_configuration(
    any_service: Service, bert: Saved, adapters: list[SavedAdapter]
) -> None:
    """A tar, a zip, and bare tensors with the configuration in the spec are one adapter, with its base's network."""
    base = pushed(any_service, bert.path, architecture=bert.architecture, head="classifier", metadata={"run": "a"})
    adapter = adapters[1]
    spec = {"name": "tuned", "base_id": base["id"], "metadata": {"run": "b"}}
    answers = [
        pushed(any_service, tarred(adapter.folder), **spec),
        pushed(any_service, zipped(adapter.folder), **spec),
        pushed(any_service, adapter.path, adapter=adapter.config, **spec),
    ]
    again = any_service.post("/v1/checkpoints", {**spec, "adapter": adapter.config, "sha256": answers[0]["sha256"]})
    answers.append(again.json())
    for answer in answers:
        assert {**answer, "id": "", "created_at": ""} == {**answers[0], "id": "", "created_at": ""}
        assert any_service.client.get(f"/v1/checkpoints/{answer['id']}").json() == answer
    answer = answers[0]
    assert answer["sha256"] == hashlib.sha256(adapter.path.read_bytes()).hexdigest()
    assert answer["base_id"] == base["id"]
    assert answer["adapter"] == {
        "kind": "dora",
        "rank": 3,
        "r": 3,
        "lora_alpha": 8.0,
        "use_rslora": False,
        "use_dora": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["query", "value"],
        "partial": False,
        "modules_to_save": [],
        "bias": "none",
    }
    assert answer["metadata"] == {"run": "b"}
    for member in ("architecture", "head", "n_parameters"):
        assert answer[member] == base[member]
    assert (base["base_id"], base["adapter"]) == (None, None)


def test_a_base_cannot_be_deleted_before_its_adapters(
    any_service: Service, bert: Saved, adapters: list[SavedAdapter]
) -> None:
    """While an adapter needs it a base stays; once the adapter has gone, so may the base."""
    base = based(any_service, bert)
    adapter = pushed(any_service, tarred(adapters[0].folder), base_id=base)
    refused = problem(any_service.client.delete(f"/v1/checkpoints/{base}"), 409, "in-use")
    assert refused["checkpoint_ids"] == [adapter["id"]]
    for id_ in (adapter["id"], base):
        assert any_service.client.delete(f"/v1/checkpoints/{id_}").status_code == 204
    gone = any_service.post("/v1/checkpoints", {"name": "a", "base_id": base}, tarred(adapters[0].folder))
    problem(gone, 404, "not-found")


def test_what_is_no_adapter_of_the_base_is_refused(
    any_service: Service, bert: Saved, adapters: list[SavedAdapter], tmp_path: Path
) -> None:
    """A whole network, an adapter of an adapter, or one without its configuration is refused with what it is."""
    base, folder = based(any_service, bert), adapters[0].folder
    adapter = pushed(any_service, tarred(folder), base_id=base)

    def refused(file: bytes | Path, status: str, **spec: Any) -> dict[str, Any]:
        """Return the problem that an upload ends with."""
        return problem(any_service.post("/v1/checkpoints", {"name": "a", **spec}, file), 422, status)

    of_adapter = refused(tarred(folder), "invalid-request", base_id=adapter["id"])
    assert "is an adapter itself" in of_adapter["detail"]
    assert of_adapter["base_id"] == base
    whole = refused(bert.path, "invalid-file", base_id=base, adapter=adapters[0].config)
    assert "no low-rank adapter" in whole["detail"]
    (tmp_path / "whole").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "whole" / name).write_bytes((bert.path.parent / name).read_bytes())
    assert "no adapter_config.json" in refused(tarred(tmp_path / "whole"), "invalid-file", base_id=base)["detail"]
    bare = refused(adapters[0].path, "invalid-request", base_id=base)
    assert bare["missing_member"] == "adapter"
    without = refused(tarred(folder), "invalid-file")
    assert without["adapter"] == "LORA"
    assert "--base NAME" in without["detail"]
    assert "base_id" in refused(adapters[0].path, "invalid-file", architecture=bert.architecture)["detail"]
    given = refused(bert.path, "invalid-request", architecture=bert.architecture, adapter=adapters[0].config)
    assert "no base_id" in given["detail"]
    assert "prefix" in refused(tarred(folder), "invalid-request", base_id=base, prefix="model.")["detail"]
    other = {**adapters[0].config, "peft_type": "IA3"}
    assert refused(adapters[0].path, "invalid-file", base_id=base, adapter=other)["adapter"] == "IA3"
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps(adapters[0].config))
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert "interplay convert" in refused(tarred(tmp_path / "pickled"), "invalid-file", base_id=base)["detail"]


def test_an_evaluation_is_of_the_merged_network(
    service: Service, probe: str, bert: Saved, adapters: list[SavedAdapter]
) -> None:
    """Accuracy and loss are those of PEFT's merged network; the report has both files' hashes and the configuration."""
    base = pushed(service, bert.path, name="base", architecture=bert.architecture)
    adapter = pushed(service, tarred(adapters[0].folder), base_id=base["id"])
    report = service.report(service.wait(service.analyze(checkpoint_id=adapter["id"], probe_id=probe)["id"]))
    _check_numbers(report["splits"]["all"], adapters[0].merged(models.texts(N)))
    subject = report["subject"]
    assert subject["sha256"] == adapter["sha256"]
    assert subject["base"] == {"id": base["id"], "name": "base", "sha256": base["sha256"]}
    assert subject["adapter"] == adapter["adapter"]
    assert (subject["head"], subject["prefix"], subject["ignored"]) == ("classifier", "base_model.model.", {})
    assert subject["n_parameters"] == base["n_parameters"]
    checked = service.client.get(f"/v1/checkpoints/{adapter['id']}").json()
    assert {**checked, "names_checked": False} == {**adapter, "head": None}
    assert checked["names_checked"]


def test_features_are_of_both_files(
    service: Service, probe: str, bert: Saved, adapters: list[SavedAdapter], tmp_path: Path
) -> None:
    """The same adapter on another base, or with another configuration, does not find the first one's features."""
    other = load_file(bert.path)
    other["classifier.bias"] += 1
    save_file(other, tmp_path / "other.safetensors")
    bases = [
        based(service, bert),
        str(pushed(service, tmp_path / "other.safetensors", architecture=bert.architecture)["id"]),
    ]
    configs = [adapters[1].config, {**adapters[1].config, "lora_alpha": 4}]
    reports: list[dict[str, Any]] = []
    for base, config in ((bases[0], 0), (bases[1], 0), (bases[0], 1), (bases[0], 0)):
        adapter = pushed(service, adapters[1].path, base_id=base, adapter=configs[config])
        options = {"null_permutations": 3 + len(reports)}
        analysis = service.analyze(checkpoint_id=adapter["id"], probe_id=probe, options=options)
        reports.append(service.report(service.wait(analysis["id"])))
    assert [report["provenance"]["features_reused"] for report in reports] == [False, False, False, True]
    losses = [report["splits"]["all"]["loss"] for report in reports]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_every_kind_takes_adapters(service: Service, probe: str, bert: Saved, adapters: list[SavedAdapter]) -> None:
    """Comparison, path and pruning are of the merged networks, and a series is whatever its order."""
    base = based(service, bert)
    first, second = (pushed(service, tarred(one.folder), base_id=base)["id"] for one in adapters)
    batch = models.texts(N)

    def report(kind: str, **body: Any) -> dict[str, Any]:
        """Return the report of an analysis."""
        return service.report(service.wait(service.analyze(kind=kind, probe_id=probe, **body)["id"]))

    compared = report("comparison", checkpoint_a_id=base, checkpoint_b_id=first, options={**FEW, "resamples": 10})
    for side, logits in (("a", bert.library(batch)), ("b", adapters[0].merged(batch))):
        _check_numbers(compared["splits"]["all"][side], logits)
    assert [subject.get("base") is None for subject in compared["subjects"]] == [True, False]
    ends = {base: bert.library, first: adapters[0].merged, second: adapters[1].merged}
    for a, b in ((base, first), (first, second)):
        options = {**FEW, "grid": {"points": 3}}
        path = report("path", checkpoint_a_id=a, checkpoint_b_id=b, options=options)
        for point, end in ((path["points"][0], a), (path["points"][-1], b)):
            _check_numbers(point["splits"]["all"], ends[end](batch))
    pruned = report("pruning", checkpoint_id=second, options={**FEW, "sparsities": [0.0, 0.5]})
    _check_numbers(pruned["points"][0]["splits"]["all"], adapters[1].merged(batch))
    assert pruned["subject"]["base"]["id"] == base
    order = [first, base, second, first, second, base]
    body = {"axis": {"name": "place", "values": [*range(len(order))]}, "checkpoint_ids": order}
    series = report("series", options={**FEW, "batch_size": 5}, **body)
    seen: dict[str, Any] = {}
    for id_, point in zip(order, series["points"], strict=True):
        split = point["splits"]["all"]
        _check_numbers(split, ends[id_](batch))
        assert seen.setdefault(id_, split) == split, "digits are of the files alone"
    assert [subject["id"] for subject in series["subjects"]] == order


def test_a_language_model_is_the_base_of_a_classifier(service: Service, probe: str, tmp_path: Path) -> None:
    """An adapter that brings a head has a description of its own; of the base's file its network is the rest."""
    classifier = models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], tmp_path / "classifier")
    adapter = saved_adapter(classifier, tmp_path / "adapter", target_modules=["c_attn"], r=2, task="SEQ_CLS")
    body = {name: tensor for name, tensor in load_file(classifier.path).items() if name != "score.weight"}
    model = {
        "family": "transformers",
        "config": {**classifier.architecture["config"], "architectures": ["GPT2LMHeadModel"]},
    }
    base = pushed(service, save(body), architecture=model)
    spec = {"base_id": base["id"], "architecture": classifier.architecture}
    tuned = pushed(service, tarred(adapter.folder), **spec)
    assert tuned["architecture"]["config"]["architectures"] == ["GPT2ForSequenceClassification"]
    report = service.report(service.wait(service.analyze(checkpoint_id=tuned["id"], probe_id=probe)["id"]))
    _check_numbers(report["splits"]["all"], adapter.merged(models.texts(N)))
    assert report["subject"]["head"] == "score"
    n_parameters = sum(tensor.numel() for tensor in load_file(classifier.path).values())
    assert report["subject"]["n_parameters"] == n_parameters


def test_a_tokenizer_is_the_bases_unless_the_adapter_brings_one(
    any_service: Service, bert: Saved, adapters: list[SavedAdapter], tmp_path: Path
) -> None:
    """The base's preprocessing and tokenizer go for its adapter; one with a tokenizer.json in its folder has that."""
    first, second = ({"model": {"type": "WordLevel", "vocab": {"a": n}, "unk_token": "a"}} for n in (0, 1))
    base = pushed(any_service, bert.path, architecture=bert.architecture, tokenizer=first, preprocess={"resize": 8})
    plain = pushed(any_service, tarred(adapters[0].folder), base_id=base["id"])
    assert (plain["tokenizer_sha256"], plain["preprocess"]) == (base["tokenizer_sha256"], base["preprocess"])
    for path in adapters[0].folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(second))
    own = pushed(any_service, tarred(tmp_path), base_id=base["id"])
    assert own["tokenizer_sha256"] not in (None, base["tokenizer_sha256"])
    assert own["preprocess"] == base["preprocess"]


def test_a_base_that_is_deleted_meanwhile(any_service: Service, bert: Saved, adapters: list[SavedAdapter]) -> None:
    """Of a deletion of a base and a push of an adapter at one time, one is refused; no adapter is without a base."""
    content = tarred(adapters[0].folder)
    for _ in range(8):
        base = based(any_service, bert)
        with ThreadPoolExecutor(2) as pool:
            pushing = pool.submit(any_service.post, "/v1/checkpoints", {"name": "a", "base_id": base}, content)
            deleting = pool.submit(any_service.client.delete, f"/v1/checkpoints/{base}")
            outcome = pushing.result().status_code, deleting.result().status_code
        held = any_service.client.get(f"/v1/checkpoints/{base}").status_code
        assert (*outcome, held) in ((201, 409, 200), (404, 204, 404))


def test_the_page_of_a_report_names_both(
    service: Service, probe: str, bert: Saved, adapters: list[SavedAdapter]
) -> None:
    """The page of an adapter's report has the kind of the adapter, and a link to its base."""
    base = pushed(service, bert.path, name="base <&>", architecture=bert.architecture)
    adapter = pushed(service, tarred(adapters[1].folder), base_id=base["id"])
    report = service.report(service.wait(service.analyze(checkpoint_id=adapter["id"], probe_id=probe)["id"]))
    page = service.client.get(f"/reports/{report['id']}").text
    assert f'dora adapter of rank 3, merged into <a href="/checkpoints/{base["id"]}">' in page
    of_base = service.client.get(f"/checkpoints/{base['id']}").text
    assert "Adapters, the newest first" in of_base
    assert f'<a href="/checkpoints/{adapter["id"]}">' in of_base
    assert "base &lt;&amp;&gt;" in page
    assert f"sha256 <code>{base['sha256'][:12]}</code>" in page


def test_a_file_that_does_not_fit_fails_with_its_names(
    service: Service, probe: str, bert: Saved, adapters: list[SavedAdapter]
) -> None:
    """An adapter whose tensors are not those of its base ends in a checkpoint-mismatch that names them."""
    tensors = load_file(adapters[0].path)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    tensors[name] = torch.zeros(7, 3)
    adapter = pushed(service, save(tensors), base_id=based(service, bert), adapter=adapters[0].config)
    failed = service.wait(service.analyze(checkpoint_id=adapter["id"], probe_id=probe)["id"])
    assert failed["problem"]["type"] == "urn:interplay:problem:checkpoint-mismatch"
    assert failed["problem"]["misshaped"] == [{"name": name, "expected": [16, 3], "found": [7, 3]}]


def _check_numbers(split: dict[str, Any], logits: torch.Tensor) -> None:
    """Check that accuracy and loss are those of logits on the probe."""
    assert split["accuracy"] == pytest.approx(float((logits.argmax(dim=1) == LABELS).float().mean()))
    expected = float(torch.nn.functional.cross_entropy(logits.double(), LABELS))
    assert split["loss"] == pytest.approx(expected, abs=1e-5)

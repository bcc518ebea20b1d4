"""Realistic checkpoints over HTTP: folders, shards, wrapped names, tensors beside the weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file

from interplay import Client
from tests.analysis import models
from tests.analysis.models import IMAGE_MODELS, N_CLASSES, Saved
from tests.app.api.test_uploads import problem
from tests.app.files.test_archives import SECOND, gzipped, sharded, tarred, without
from tests.conftest import MLP
from tests.interplay.command.running import interplay
from tests.services import Service

N = 24
PREPROCESSOR = {
    "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Saved, Path]:
    """Return a classifier as its library saved it, and the same in a folder of several shards."""
    folder = tmp_path_factory.mktemp("vit")
    saved = models.saved_transformers("ViT", IMAGE_MODELS["ViT"], folder / "whole")
    model = transformers.ViTForImageClassification.from_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    (folder / "shards" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "shards" / "training_args.bin").write_bytes(b"a pickle")
    return saved, folder / "shards"


def evaluated(service: Service, checkpoint_id: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the report of a checkpoint of these tensors."""
    probe = service.post("/v1/probes", {"name": "probe"}, save(tensors)).json()
    return service.report(service.wait(service.analyze(checkpoint_id=checkpoint_id, probe_id=probe["id"])["id"]))


def test_a_folder_of_shards_is_one_call(service: Service, vit: tuple[Saved, Path]) -> None:
    """A pushed folder gives the library's own accuracy and preprocessing, and one blob, equal for an equal folder."""
    saved, folder = vit
    assert len(list(folder.glob("*.safetensors"))) >= 2
    with Client(service.url) as client:
        checkpoint = client.push_checkpoint(folder, name="vit")
        again = client.push_checkpoint(folder, name="again")
    assert checkpoint["architecture"]["family"] == "transformers"
    assert checkpoint["preprocess"] is not None
    assert checkpoint["preprocess"]["resize"] == [32, 32]
    assert (checkpoint["prefix"], checkpoint["ignored"]) == ("", {})
    assert checkpoint["sha256"] == again["sha256"]
    batch, labels = models.images(N), torch.arange(N) % N_CLASSES
    report = evaluated(service, checkpoint["id"], {**batch, "labels": labels})
    accuracy = float((saved.library(batch).argmax(dim=1) == labels).float().mean())
    assert report["splits"]["all"]["accuracy"] == pytest.approx(accuracy)


def test_a_folder_from_the_command_line(service: Service, vit: tuple[Saved, Path], tmp_path: Path) -> None:
    """A pushed folder is named after itself; without usable weights the error lists its content."""
    pushed = interplay("push", "checkpoint", vit[1], "--json", url=service.url)
    assert json.loads(pushed.stdout)["name"] == "shards"
    shutil.copy(vit[1] / "config.json", tmp_path)
    refused = interplay("push", "checkpoint", tmp_path, url=service.url)
    assert refused.returncode == 2
    assert "no safetensors file" in refused.stderr
    assert "config.json" in refused.stderr


def test_a_folder_that_timm_wrote(service: Service, tmp_path: Path) -> None:
    """A config.json of timm gives the network, its number of classes and the preprocessing of images."""
    saved = models.saved_timm("resnet10t", {}, tmp_path)
    numbers = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1,
        "interpolation": "bicubic",
    }
    config = {"architecture": "resnet10t", "num_classes": N_CLASSES, "pretrained_cfg": numbers}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": saved.path.read_bytes()}
    checkpoint = service.post("/v1/checkpoints", {"name": "timm"}, gzipped(files, tmp_path / "x.tar.gz"))
    assert checkpoint.status_code == 201, checkpoint.text
    assert checkpoint.json()["architecture"] == saved.architecture
    assert {name: checkpoint.json()["preprocess"][name] for name in ("resize", "crop", "mean", "std", "resample")} == {
        "resize": 32, "crop": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "resample": "bicubic",
    }  # fmt: skip


def test_names_as_training_leaves_them(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path: Path
) -> None:
    """Wrappers are removed and an optimizer's tensors ignored; response and report say so, and nothing else differs."""
    state = load_file(mlp_checkpoint_file)
    beside = {"optimizer.state.0.exp_avg": torch.ones(9), "ema_model.head.bias": torch.full((10,), torch.nan)}
    wrapped = {**{f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}, **beside}
    save_file(wrapped, path := tmp_path / "wrapped.safetensors")
    plain = service.post("/v1/checkpoints", {"name": "plain"}, mlp_checkpoint_file).json()
    found = service.post("/v1/checkpoints", {"name": "wrapped", "architecture": MLP}, path).json()
    assert found["prefix"] == "_orig_mod.module."
    assert found["ignored"] == {"ema_model.": 1, "optimizer.": 1}
    assert found["n_parameters"] == plain["n_parameters"]
    probe = service.post("/v1/probes", {"name": "digits", "preprocess": {"scale": 0.0625}}, digits_probe_file).json()
    reports = [
        service.report(service.wait(service.analyze(checkpoint_id=row["id"], probe_id=probe["id"])["id"]))
        for row in (plain, found)
    ]
    assert reports[0]["splits"] == reports[1]["splits"]
    assert reports[1]["subject"]["prefix"] == "_orig_mod.module."
    assert (reports[1]["subject"]["infixes"], reports[1]["subject"]["untied"]) == ({}, [])
    assert reports[1]["subject"]["ignored"] == found["ignored"]


def test_what_a_guess_gets_wrong_a_worker_finds(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path: Path
) -> None:
    """At the upload names alone decide; after an analysis the checkpoint shows what the network's names give."""
    state = load_file(mlp_checkpoint_file)
    plain = service.post("/v1/checkpoints", {"name": "plain"}, mlp_checkpoint_file).json()
    assert plain["names_checked"] is False
    probe = service.post("/v1/probes", {"name": "digits", "preprocess": {"scale": 0.0625}}, digits_probe_file).json()
    expected = service.report(service.wait(service.analyze(checkpoint_id=plain["id"], probe_id=probe["id"])["id"]))
    after = service.client.get(f"/v1/checkpoints/{plain['id']}").json()
    assert after == {**plain, "names_checked": True}
    unknown = {f"run.student.{name}": tensor for name, tensor in state.items()}
    beside = {"run.step": torch.tensor(3), "run.projector.weight": torch.ones(9, 9)}
    save_file({**unknown, **beside}, path := tmp_path / "unknown.safetensors")
    found = service.post("/v1/checkpoints", {"name": "unknown", "architecture": MLP}, path).json()
    report = service.report(service.wait(service.analyze(checkpoint_id=found["id"], probe_id=probe["id"])["id"]))
    assert report["splits"] == expected["splits"]
    after = service.client.get(f"/v1/checkpoints/{found['id']}").json()
    told = {"prefix": "run.student.", "ignored": {"run.projector.": 1, "run.step": 1}}
    told["n_parameters"] = plain["n_parameters"]
    assert told.items() <= report["subject"].items()
    assert after == {**found, **told, "names_checked": True}
    # The cached features of the first evaluation give the second the same names.
    report = service.report(service.wait(service.analyze(checkpoint_id=found["id"], probe_id=probe["id"])["id"]))
    assert report["provenance"]["features_reused"] is True
    assert told.items() <= report["subject"].items()


def test_a_file_of_two_copies_needs_a_prefix(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path: Path
) -> None:
    """A file of two copies fails and shows both; with a prefix the named copy is analysed, in a path as well."""
    state = load_file(mlp_checkpoint_file)
    doubled = {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    both = {f"{copy}.{name}": tensor for copy, one in (("student", state), ("teacher", doubled))
            for name, tensor in one.items()}  # fmt: skip
    save_file(both, path := tmp_path / "both.safetensors")
    probe = service.post("/v1/probes", {"name": "digits", "preprocess": {"scale": 0.0625}}, digits_probe_file).json()
    with Client(service.url) as client:
        unsaid = client.push_checkpoint(path, name="both", architecture=MLP)
        student = client.push_checkpoint(path, name="student", architecture=MLP, prefix="student")
    said = ("--prefix", "teacher", "--architecture", json.dumps(MLP), "--json")
    teacher = json.loads(interplay("push", "checkpoint", path, *said, url=service.url).stdout)
    analysis = service.wait(service.analyze(checkpoint_id=unsaid["id"], probe_id=probe["id"])["id"])
    assert analysis["problem"]["reason"] == "ambiguous"
    assert sorted(analysis["problem"]["candidates"]) == ["student.", "teacher."]
    assert (student["prefix"], student["ignored"]) == ("student.", {"teacher.": len(state)})
    assert student["n_parameters"] == sum(
        t.numel() for n, t in state.items() if t.is_floating_point() and "running" not in n
    )
    path_analysis = service.analyze(
        kind="path", checkpoint_a_id=student["id"], checkpoint_b_id=teacher["id"], probe_id=probe["id"],
        options={"grid": {"points": 2}, "null_permutations": 0},
    )  # fmt: skip
    report = service.report(service.wait(path_analysis["id"]))
    assert [subject["prefix"] for subject in report["subjects"]] == ["student.", "teacher."]
    assert report["points"][0]["splits"] != report["points"][1]["splits"]
    for checkpoint, point in zip((student, teacher), report["points"], strict=True):
        alone = service.report(
            service.wait(service.analyze(checkpoint_id=checkpoint["id"], probe_id=probe["id"])["id"])
        )
        assert alone["splits"]["all"]["loss"] == point["splits"]["all"]["loss"]


def test_one_end_of_a_path_is_untied(service: Service, tmp_path: Path) -> None:
    """With a head that differs from the embeddings, each path end equals its own checkpoint, and the report says so."""
    saved = models.saved_language_model("GPT2", tmp_path)
    state = load_file(saved.path)
    head = torch.randn(50, 16, generator=torch.Generator().manual_seed(7))
    save_file({**state, "lm_head.weight": head}, path := tmp_path / "untied.safetensors", metadata={"format": "pt"})
    tied, untied = (
        service.post("/v1/checkpoints", {"name": "x", "architecture": saved.architecture}, file).json()
        for file in (saved.path, path)
    )
    tokens = {"input_ids": models.texts(6)["input_ids"]}
    probe = service.post("/v1/probes", {"name": "p"}, save(tokens)).json()
    losses = {}
    for checkpoint, names in ((tied, []), (untied, ["lm_head.weight"])):
        report = service.report(
            service.wait(service.analyze(checkpoint_id=checkpoint["id"], probe_id=probe["id"])["id"])
        )
        assert report["subject"]["untied"] == names
        losses[checkpoint["id"]] = report["splits"]["all"]["loss"]
    assert losses[tied["id"]] != pytest.approx(losses[untied["id"]], rel=1e-3)
    for first, second in ((tied, untied), (untied, tied)):
        analysis = service.analyze(
            kind="path", checkpoint_a_id=first["id"], checkpoint_b_id=second["id"], probe_id=probe["id"],
            options={"grid": {"points": 3}, "null_permutations": 0},
        )  # fmt: skip
        points = service.report(service.wait(analysis["id"]))["points"]
        for checkpoint, point in ((first, points[0]), (second, points[-1])):
            assert point["splits"]["all"]["loss"] == pytest.approx(losses[checkpoint["id"]], rel=1e-6)


def test_a_config_whose_sizes_are_not_the_files_fails(
    service: Service, vit: tuple[Saved, Path], tmp_path: Path
) -> None:
    """A config whose sizes differ from the file's fails the analysis, which names the tensors and both shapes."""
    saved, _ = vit
    config = {**saved.architecture["config"], "intermediate_size": 99}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": saved.path.read_bytes()}
    checkpoint = service.post("/v1/checkpoints", {"name": "odd"}, tarred(files, tmp_path / "x.tar")).json()
    probe = service.post(
        "/v1/probes", {"name": "p"}, save({**models.images(N), "labels": torch.arange(N) % N_CLASSES})
    ).json()
    analysis = service.wait(service.analyze(checkpoint_id=checkpoint["id"], probe_id=probe["id"])["id"])
    assert analysis["problem"]["type"] == "urn:interplay:problem:checkpoint-mismatch"
    assert any(99 in entry["expected"] for entry in analysis["problem"]["misshaped"])


def test_an_archive_that_does_not_fit_together_is_refused(service: Service, tmp_path: Path) -> None:
    """An incomplete archive is refused with the missing shard; an unknown config.json needs an architecture."""
    response = service.post("/v1/checkpoints", {"name": "x"}, tarred(without(SECOND), tmp_path / "a.tar"))
    assert problem(response, 422, "invalid-file")["missing"] == [SECOND]
    zeros = {**sharded()[0], "net/zeros": bytes(2**25)}
    response = service.post("/v1/checkpoints", {"name": "x"}, gzipped(zeros, tmp_path / "c.tar.gz"))
    assert "would unpack to more than" in problem(response, 422, "invalid-file")["detail"]
    unknown = {**sharded()[0], "net/config.json": b"{}"}
    response = service.post("/v1/checkpoints", {"name": "x"}, tarred(unknown, tmp_path / "b.tar"))
    assert "architecture" in problem(response, 422, "invalid-request")["detail"]

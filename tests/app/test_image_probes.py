"""Probes of images over HTTP, decoded by a real worker: network inputs equal those of the network's own library."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import save
from timm.data import create_transform
from torch import Tensor

from analysis.networks.loading import build
from analysis.networks.timm import data_config
from tests.analysis import models
from tests.analysis.models import IMAGE_MODELS, N_CLASSES, Saved
from tests.app.api.test_uploads import problem
from tests.datafiles import encoded, image_column, parquet, picture, png_of_size, zipped
from tests.services import Service

N = 24
CONTENTS = [encoded(picture(seed, 40 + seed % 3, 36 + seed % 4), "JPEG", quality=95) for seed in range(N)]
LABELS = [seed % N_CLASSES for seed in range(N)]
PARQUET = parquet({"image": image_column(CONTENTS, [f"{i}.jpg" for i in range(N)]), "label": LABELS})
VIT = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}  # fmt: skip
OURS = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "colour": "rgb"}


def _posted(service: Service, collection: str, spec: dict[str, Any], file: bytes | Path) -> dict[str, Any]:
    response = service.post(f"/v1/{collection}", {"name": "images", **spec}, file)
    assert response.status_code == 201, response.text
    return dict(response.json())


def _checkpoint(service: Service, saved: Saved, **spec: Any) -> str:
    return str(_posted(service, "checkpoints", {"architecture": saved.architecture, **spec}, saved.path)["id"])


def _ended(service: Service, checkpoint_id: str, probe: dict[str, Any], **options: Any) -> dict[str, Any]:
    options = {"null_permutations": 0, **options}
    analysis = service.analyze(checkpoint_id=checkpoint_id, probe_id=probe["id"], options=options)
    return service.wait(analysis["id"])


def _loss(saved: Saved, inputs: Tensor, labels: list[int]) -> float:
    logits = saved.library({"pixel_values": inputs})
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)))


def _images() -> list[Image.Image]:
    return [Image.open(io.BytesIO(content)) for content in CONTENTS]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return models.saved_transformers("ViT", IMAGE_MODELS["ViT"], tmp_path_factory.mktemp("vit"))


def test_parquet_and_the_configuration_that_a_checkpoint_brings(service: Service, vit: Saved) -> None:
    """With a dataset of Hugging Face and a preprocessor_config.json the loss is that of the library's own pipeline."""
    probe = _posted(service, "probes", {}, PARQUET)
    assert (probe["format"], probe["content"], probe["input_shape"]) == ("parquet", "images", None)
    assert probe["columns"] == {"image": "image", "label": "label"}
    assert probe["class_counts"] == [6] * N_CLASSES
    report = service.report(_ended(service, _checkpoint(service, vit, preprocess=VIT), probe))
    processor = transformers.ViTImageProcessorPil(**{k: v for k, v in VIT.items() if k != "image_processor_type"})
    inputs = processor(_images(), return_tensors="pt")["pixel_values"]
    assert report["splits"]["all"]["loss"] == pytest.approx(_loss(vit, inputs, LABELS), abs=1e-6)
    assert report["probe"]["preprocess_source"] == "checkpoint"
    applied = report["probe"]["preprocess"]
    assert (applied["resize"], applied["resample"], applied["mean"]) == ([32, 32], "bicubic", [0.4, 0.5, 0.6])


def test_what_the_probe_says_comes_first(service: Service, vit: Saved) -> None:
    """A probe's own preprocess takes precedence, and the report says that it is the probe's."""
    probe = _posted(service, "probes", {"preprocess": OURS}, PARQUET)
    assert probe["preprocess"]["crop"] == [32, 32]
    assert probe["preprocess"]["scale"] == pytest.approx(1 / 255)
    report = service.report(_ended(service, _checkpoint(service, vit, preprocess=VIT), probe))
    assert (report["probe"]["preprocess_source"], report["probe"]["preprocess"]) == ("probe", probe["preprocess"])


def test_class_folders_and_what_timm_says_of_its_network(service: Service, tmp_path: Path) -> None:
    """Without a preprocess anywhere, a network of timm gets timm's; folders give classes and splits."""
    saved = models.saved_timm("resnet18", {}, tmp_path)
    names = [f"{'val' if i % 8 > 5 else 'train'}/{'abcd'[label]}/{i:02}.jpg" for i, label in enumerate(LABELS)]
    probe = _posted(service, "probes", {}, zipped(dict(zip(names, CONTENTS, strict=True))))
    assert (probe["format"], probe["class_names"]) == ("imagefolder", ["a", "b", "c", "d"])
    assert probe["splits"] == {"train": 18, "test": 6}
    report = service.report(_ended(service, _checkpoint(service, saved), probe))
    transform = create_transform(**data_config(build(saved.architecture), saved.architecture), is_training=False)
    inputs = torch.stack([transform(image.convert("RGB")) for image in _images()])
    assert report["splits"]["all"]["loss"] == pytest.approx(_loss(saved, inputs, LABELS), abs=1e-5)
    assert report["probe"]["preprocess_source"] == "timm"
    assert report["probe"]["label_map"] == {"matched": "order", "reordered": False}
    assert (report["splits"]["train"]["n_samples"], report["splits"]["test"]["n_samples"]) == (18, 6)


def _failure(service: Service, vit: Saved, file: bytes, **spec: Any) -> dict[str, Any]:
    ended = _ended(service, _checkpoint(service, vit), _posted(service, "probes", spec, file))
    assert ended["status"] == "failed", ended
    assert ended["problem"]["type"] == "urn:interplay:problem:invalid-probe"
    return dict(ended["problem"])


def _with(row: int, content: bytes) -> bytes:
    contents = [*CONTENTS[:row], content, *CONTENTS[row + 1 :]]
    return parquet({"image": image_column(contents, [f"{i}.jpg" for i in range(N)]), "label": LABELS})


def test_bad_images_fail_by_row_and_path(service: Service, vit: Saved) -> None:
    """A corrupt image and one of 10^9 pixels fail by row and path, several sizes without a preprocess fail too."""
    corrupt = CONTENTS[17][:200] + bytes(50)
    assert _failure(service, vit, _with(17, corrupt), preprocess=OURS)["detail"].startswith("Row 17 (17.jpg)")
    huge = _failure(service, vit, _with(3, png_of_size(40_000, 25_000)), preprocess=OURS)
    assert huge["detail"].startswith("Row 3 (3.jpg) has 40000 x 25000 pixels")
    assert "resize and crop" in _failure(service, vit, PARQUET)["detail"]


def test_a_file_that_ends_the_process_that_reads_it(service: Service) -> None:
    """A file that crashes pyarrow's process is refused: a column declared never null, with statistics of a null."""
    whole = parquet({"text": ["a", "b"] * 50, "label": ["x", "y"] * 50})
    nullable = b"\x25\x02\x18\x05label"
    assert whole.count(nullable) == 1
    broken = whole.replace(nullable, b"\x25\x00" + nullable[2:])
    api = service.process.pid
    refused = problem(service.post("/v1/probes", {"name": "a"}, broken), 422, "invalid-file")
    assert "was ended by what it holds" in refused["detail"]
    assert service.client.get("/healthz").status_code == 200
    assert (service.process.pid, service.process.poll()) == (api, None)


def test_a_dictionary_that_leads_out_of_itself(service: Service) -> None:
    """An index beyond a dictionary's values, as a flipped byte makes one, is a 422, not a fault of the service."""
    whole = parquet({"text": ["a"] * 4, "label": ["x", "y", "z", "y"]}, compression="none", write_statistics=False)
    # Four places of two bits, bit-packed: the last becomes the fourth value of three.
    places = bytes((0x02, 0x03, 0b01100100))
    assert whole.count(places) == 1
    refused = problem(
        service.post("/v1/probes", {"name": "a"}, whole.replace(places, bytes((0x02, 0x03, 0b11100100)))),
        422,
        "invalid-file",
    )
    assert "out of bounds" in refused["detail"]


def test_what_makes_no_sense_for_images_is_refused(service: Service, vit: Saved) -> None:
    """A tokenizer, columns of a zip, sizes of tensors and unsupported configurations are refused for images."""
    cases: list[tuple[dict[str, Any], bytes, str]] = [
        ({"tokenizer": {"model": {}}}, PARQUET, "invalid-request"),
        ({"columns": {"image": "photo"}}, PARQUET, "invalid-file"),
        ({"columns": {"image": "a"}}, zipped({"a/1.png": CONTENTS[0], "b/1.png": CONTENTS[1]}), "invalid-file"),
        ({"preprocess": {"resize": 5000}}, PARQUET, "invalid-request"),
        ({"class_names": ["a", "b"]}, PARQUET, "invalid-file"),
    ]
    for spec, file, kind in cases:
        problem(service.post("/v1/probes", {"name": "a", **spec}, file), 422, kind)
    unfit = {"name": "a", "architecture": vit.architecture, "preprocess": {**VIT, "do_pad": True}}
    assert "do_pad" in problem(service.post("/v1/checkpoints", unfit, vit.path), 422, "invalid-request")["detail"]


def test_tensors_are_not_resized(service: Service) -> None:
    """A resize of tensors is refused: sizes are only for images that are decoded here."""
    content = save({"inputs": np.zeros((4, 3, 8, 8), np.uint8), "labels": np.arange(4) % 2})
    answer = service.post("/v1/probes", {"name": "a", "preprocess": {"resize": 4}}, content)
    assert "resize" in problem(answer, 422, "invalid-request")["detail"]


def test_samples_are_drawn_from_each_class_and_split(service: Service, vit: Saved) -> None:
    """The report says how many of how many samples were drawn, and the same seed draws the same."""
    split = ["train" if i < 16 else "test" for i in range(N)]
    content = parquet({"image": CONTENTS, "label": LABELS, "split": split})
    probe = _posted(service, "probes", {"preprocess": OURS}, content)
    checkpoint = _checkpoint(service, vit)
    first, again, other = (
        service.report(_ended(service, checkpoint, probe, samples=12, seed=seed)) for seed in (1, 1, 2)
    )
    assert first["probe"]["samples"] == {"used": 12, "of": N, "seed": 1}
    assert first["splits"]["train"]["class_counts"] == [2] * N_CLASSES
    assert first["splits"]["test"]["class_counts"] == [1] * N_CLASSES
    assert first["splits"] == again["splits"]
    assert first["splits"]["all"]["loss"] != other["splits"]["all"]["loss"]


def test_points_are_evaluated_on_images(service: Service, vit: Saved) -> None:
    """Paths, pruning and series decode the probe as an evaluation does, and report it."""
    probe = _posted(service, "probes", {}, PARQUET)
    checkpoint = _checkpoint(service, vit, preprocess=VIT)
    evaluation = service.report(_ended(service, checkpoint, probe, samples=16))
    body = {"kind": "pruning", "checkpoint_id": checkpoint, "probe_id": probe["id"]}
    options = {"sparsities": [0.5], "null_permutations": 0, "samples": 16}
    answer = service.client.post("/v1/analyses", json={**body, "options": options})
    assert answer.status_code == 202, answer.text
    report = service.report(service.wait(answer.json()["id"]))
    assert report["probe"] == evaluation["probe"]
    assert report["points"][0]["splits"]["all"]["loss"] == pytest.approx(evaluation["splits"]["all"]["loss"], abs=1e-6)


def test_checkpoints_that_bring_different_preprocessings(service: Service, vit: Saved) -> None:
    """Compared checkpoints must see the same inputs: with different preprocessing, the probe has to define it."""
    ids = [_checkpoint(service, vit, preprocess=given) for given in (VIT, OURS)]
    probe = _posted(service, "probes", {}, PARQUET)
    body = {"kind": "path", "checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "probe_id": probe["id"]}
    answer = service.client.post("/v1/analyses", json={**body, "options": {"grid": {"points": 2}}})
    failed = service.wait(answer.json()["id"])
    assert "different preprocessings" in failed["problem"]["detail"]
    # Nor do existing evaluations, each with its own, make a series.
    for identifier in ids:
        assert _ended(service, identifier, probe)["status"] == "succeeded"
    axis = {"name": "epoch", "values": [1, 2]}
    body = {
        "kind": "series",
        "axis": axis,
        "checkpoint_ids": ids,
        "probe_id": probe["id"],
        "options": {"null_permutations": 0},
    }
    answer = service.client.post("/v1/analyses", json=body)
    failed = service.wait(answer.json()["id"])
    assert "different preprocessings" in failed["problem"]["detail"]


def test_class_names_are_matched_with_the_checkpoints(service: Service, vit: Saved) -> None:
    """Sorted folders meet a head in another order: the accuracy is that of the matching classes."""
    order = ["eel", "Cat", "dog", "ant"]
    config = {**vit.architecture["config"], "id2label": {str(i): name for i, name in enumerate(order)}}
    checkpoint = _checkpoint(service, vit, preprocess=VIT, architecture={"family": "transformers", "config": config})
    folders = ["eel", "cat", "dog", "ant"]
    names = [f"{folders[label]}/{i:02}.jpg" for i, label in enumerate(LABELS)]
    probe = _posted(service, "probes", {}, zipped(dict(zip(names, CONTENTS, strict=True))))
    assert probe["class_names"] == ["ant", "cat", "dog", "eel"]
    report = service.report(_ended(service, checkpoint, probe))
    plain = service.report(
        _ended(service, _checkpoint(service, vit, preprocess=VIT), _posted(service, "probes", {}, PARQUET))
    )
    assert report["probe"]["label_map"] == {"matched": "name_ignoring_case", "reordered": True}
    assert report["splits"]["all"]["loss"] == pytest.approx(plain["splits"]["all"]["loss"], abs=1e-6)
    other = parquet({"image": CONTENTS, "label": [["ant", "cat", "dog", "fox"][label] for label in LABELS]})
    body = {"kind": "evaluation", "checkpoint_id": checkpoint, "probe_id": _posted(service, "probes", {}, other)["id"]}
    refused = problem(service.client.post("/v1/analyses", json=body), 422, "labels-differ")
    assert (refused["unmatched"], refused["class_names"], refused["id2label"]) == (
        ["fox"],
        ["ant", "cat", "dog", "fox"],
        order,
    )
    assert "'fox'" in refused["detail"]
    assert json.dumps(order[1])[1:-1] in refused["detail"]

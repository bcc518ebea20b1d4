"""Preprocessing of other libraries: the results equal those of the libraries themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform

from analysis.networks.loading import build
from analysis.networks.timm import data_config
from analysis.probes.images import pixels
from analysis.probes.preprocess import Preprocess
from app.descriptions.preprocessing import from_preprocessor_config, from_timm, given_preprocess, preprocess_of_config
from app.errors import InvalidRequest
from tests.datafiles import encoded, picture

SIZES = [(300, 241), (241, 300), (256, 256), (500, 333), (97, 120)]


def _ours(image: Image.Image, preprocess: dict[str, Any]) -> torch.Tensor:
    ours = Preprocess(**preprocess)
    found = pixels(encoded(image), ours, where="Row 0", most_pixels=10**8)
    return ours(torch.from_numpy(found.astype(np.float32))[None])[0]


def _differences(ours: torch.Tensor, theirs: torch.Tensor, std: float | Sequence[float], scale: float) -> torch.Tensor:
    """Return the differences in grey levels."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs() / scale * torch.as_tensor(std).reshape(-1, 1, 1)


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {},
    "DeiTImageProcessor": {},
    "BeitImageProcessor": {},
    "SiglipImageProcessor": {},
    "CLIPImageProcessor": {},
    "BitImageProcessor": {"resample": 2},
    "MobileNetV1ImageProcessor": {},
    "MobileNetV2ImageProcessor": {},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
    "ConvNextImageProcessor at 384": {"size": {"shortest_edge": 384}},
    "ViTImageProcessor without numbers": {"do_rescale": False, "do_normalize": False},
    "ViTImageProcessor of other numbers": {"size": {"height": 100, "width": 130}, "rescale_factor": 1 / 127.5},
    "CLIPImageProcessor without resizing": {"do_resize": False, "crop_size": {"height": 131, "width": 240}},
    "BitImageProcessor of large crops": {"size": {"shortest_edge": 97}, "crop_size": {"height": 232, "width": 100}},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_processors_of_transformers(case: str) -> None:
    """Results equal those of `save_pretrained` processors: the class names the backend; Pillow's match to the level.

    The two pad an odd number of pixels differently. The default resizes with torch, which rounds differently: there one
    pixel in 2,000 may be more than one level off.
    """
    name = case.split()[0]
    for backend in ("Pil", "", "Fast"):
        processor = getattr(transformers, name + backend.removesuffix("Fast"))(**PROCESSORS[case])
        config = processor.to_dict() | {"image_processor_type": name + backend}
        preprocess = given_preprocess(config)
        assert preprocess["pad_offset"] == ("ceiled" if backend == "Pil" else "floored")
        std = config["image_std"] if config["do_normalize"] else 1.0
        scale = config["rescale_factor"] if config["do_rescale"] else 1.0
        for number, (width, height) in enumerate(SIZES):
            image = picture(number, width, height)
            theirs = processor(image, return_tensors="pt")["pixel_values"][0].float()
            differences = _differences(_ours(image, preprocess), theirs, std, scale)
            if backend == "Pil":
                assert differences.max() < 1e-3, (width, height)
            assert (differences > 1.001).float().mean() < 5e-4, (width, height)


def test_configurations_of_early_versions() -> None:
    """A single number is a square for ViT, and the shorter side for ConvNeXT and CLIP."""
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "do_resize": True}
    vit = from_preprocessor_config({**numbers, "size": 224, "feature_extractor_type": "ViTFeatureExtractor"})
    assert (vit["resize"], vit["crop"], vit["resample"], vit["colour"]) == ([224, 224], None, "bilinear", "rgb")
    clip = {**numbers, "size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert from_preprocessor_config(clip)["crop"] == [224, 224]
    assert from_preprocessor_config(clip)["resize"] == 224
    convnext = {**numbers, "size": 224, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor"}
    assert from_preprocessor_config(convnext)["resize"] == 256
    unnamed = {**numbers, "size": {"height": 32, "width": 32}, "resample": 3}
    assert from_preprocessor_config(unnamed)["resample"] == "bicubic"


_CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "do_normalize": False}
_VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_normalize": False}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({**_VIT, "image_processor_type": "MobileViTImageProcessor"}, "MobileViTImageProcessor"),
        ({**_VIT, "do_flip_channel_order": True}, "do_flip_channel_order"),
        ({**_VIT, "do_pad": True}, "do_pad"),
        ({**_VIT, "size": {"longest_edge": 8}}, "longest_edge"),
        ({**_VIT, "size": {"shortest_edge": 8, "longest_edge": 9}}, "longest_edge"),
        ({**_VIT, "resample": 9}, "resample"),
        ({**_VIT, "resample": [3]}, "resample"),
        ({**_CONVNEXT, "crop_pct": 1e-320}, "crop_pct"),
        ({**_CONVNEXT, "do_center_crop": True}, "do_center_crop"),
        ({**_VIT, "do_normalize": True}, "image_mean"),
        ({"do_resize": True, "size": 224}, "image_processor_type"),
        ({**_VIT, "size": {"height": 10**6, "width": 8}}, "4096"),
        ({**_VIT, "image_processor_type": "ConvNextImageProcessor"}, "shortest_edge"),
    ],
)
def test_what_cannot_be_expressed_is_refused(config: dict[str, Any], word: str) -> None:
    """A setting that cannot be expressed is refused, and the problem names it."""
    with pytest.raises(InvalidRequest) as raised:
        given_preprocess(config)
    assert word in raised.value.detail


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {}),
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}),
        ("mobilenetv3_small_050", {"in_chans": 3}),
        ("efficientnet_b0", {}),
    ],
)
def test_data_configurations_of_timm(name: str, args: dict[str, Any]) -> None:
    """The result equals timm's own evaluation transform, to the last grey level."""
    description = {"family": "timm", "name": name, "args": args}
    config = data_config(build(description), description)
    assert config["input_size"][1] == args.get("img_size", config["input_size"][1])
    transform = create_transform(**config, is_training=False)
    for number, (width, height) in enumerate(SIZES):
        image = picture(number, width, height)
        differences = _differences(_ours(image, from_timm(config)), transform(image), config["std"], 1 / 255)
        assert differences.max() < 1e-3, (width, height)


def test_squashed_images_of_timm() -> None:
    """Mode `squash` resizes both sides, which may differ."""
    config = {**timm.data.resolve_data_config({}, model=timm.create_model("resnet18")), "crop_mode": "squash"}
    config |= {"input_size": (3, 96, 120), "crop_pct": 0.9}
    transform = create_transform(**config, is_training=False)
    image = picture(1, 301, 200)
    assert _differences(_ours(image, from_timm(config)), transform(image), config["std"], 1 / 255).max() < 1e-3


def test_crops_of_timm_that_are_larger_than_the_image() -> None:
    """Above a crop_pct of 1 the image is smaller than its crop, and padded as torchvision does it."""
    for crop_pct in (1.05, 1.11, 1.5):
        config = {**timm.data.resolve_data_config({}, model=timm.create_model("resnet18")), "crop_pct": crop_pct}
        config |= {"input_size": (3, 97, 97)}
        transform = create_transform(**config, is_training=False)
        image = picture(2, 150, 120)
        ours, theirs = _ours(image, from_timm(config)), transform(image)
        assert _differences(ours, theirs, config["std"], 1 / 255).max() < 1e-3, crop_pct


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"crop_mode": "border"}, "border"),
        ({"input_size": (3, 96, 120)}, "center"),
        ({"interpolation": "random"}, "resample"),
        ({"input_size": (1, 96, 96)}, "1 channels"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"input_size": (5, 96, 96)}, "input_size"),
        ({"crop_pct": 0}, "crop_pct"),
    ],
)
def test_what_timm_says_and_we_cannot_is_refused(change: dict[str, Any], word: str) -> None:
    """Padded borders, oblong crops, random filters and channels without numbers are refused."""
    config = {"input_size": (3, 96, 96), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert from_timm({**config, "crop_pct": 0.95, "crop_mode": "center"})["resize"] == 101
    with pytest.raises(InvalidRequest) as raised:
        from_timm({**config, **change})
    assert word in raised.value.detail


def test_what_a_folder_of_timm_says_of_images() -> None:
    """A folder's own numbers override the registered ones; the network's arguments override both."""
    numbers: dict[str, Any] = {
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
    }
    numbers |= {"crop_pct": 0.7, "crop_mode": "center"}
    config = {"architecture": "resnet18", "num_classes": 4, "pretrained_cfg": {**numbers, "tag": "mine", "url": None}}
    found = preprocess_of_config(config)
    assert found == from_timm(numbers) == given_preprocess(numbers)
    assert (found["resize"], found["crop"], found["mean"]) == (320, [224, 224], [0.1] * 3)
    assert preprocess_of_config({"architecture": "resnet18", **numbers}) == found
    smaller = preprocess_of_config({**config, "model_args": {"img_size": 70}})
    assert smaller is not None
    assert (smaller["resize"], smaller["crop"]) == (100, [70, 70])
    nothing: list[dict[str, Any]] = [{"model_args": {"in_chans": 5}}, {"model_args": {"in_chans": 1}}]
    nothing += [{"pretrained_cfg": {**numbers, "mean": 3}}, {"pretrained_cfg": {**numbers, "input_size": 3}}]
    assert [preprocess_of_config({**config, **change}) for change in nothing] == [None] * 4
    assert preprocess_of_config({"model_type": "vit", **numbers}) is None
    with pytest.raises(InvalidRequest, match="border"):
        preprocess_of_config({**config, "pretrained_cfg": {**numbers, "crop_mode": "border"}})

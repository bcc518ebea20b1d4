"""Convert preprocessing of other libraries to ours: Hugging Face's preprocessor_config.json, timm's data
configuration. Settings that ours cannot express are refused, never left out.

Each library resizes and crops in its own way; `analysis/probes/images.py` implements them all, and tests compare them
with the libraries. For a processor of transformers, its class name selects the backend.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.errors import InvalidRequest, invalid_request
from app.schemas import Preprocess

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class _Processor:
    """Defaults of a class of transformers for members missing from its configuration."""

    resample: int
    crops: bool = False
    square: bool = True


# Processors that use the library's plain resizing and crop (and ConvNeXT's, see below).
_PROCESSORS = {
    "ViT": _Processor(2),
    "DeiT": _Processor(3, crops=True),
    "Beit": _Processor(3),
    "Siglip": _Processor(3),
    "CLIP": _Processor(3, crops=True, square=False),
    "Bit": _Processor(3, crops=True, square=False),
    "MobileNetV1": _Processor(2, crops=True, square=False),
    "MobileNetV2": _Processor(2, crops=True, square=False),
    "ConvNext": _Processor(3, square=False),
}
_TIMM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_SWITCHED_OFF = (
    "do_flip_channel_order",
    "do_pad",
    "do_thumbnail",
    "do_align_long_axis",
    "do_split_image",
    "rescale_offset",
)


def given_preprocess(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return our preprocessing from one given with a checkpoint: in our form, a preprocessor_config.json, or timm's.

    Raises:
        InvalidRequest: it is none of these, or ours cannot express it.
    """
    if "input_size" in given:
        return from_timm(given)
    if any(name.startswith("do_") or name in ("image_processor_type", "feature_extractor_type") for name in given):
        return from_preprocessor_config(given)
    return _checked(given)


def from_preprocessor_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our preprocessing from a preprocessor_config.json of an image processor of transformers.

    Args:
        config: with do_resize, size, resample, do_center_crop, crop_size, do_rescale, rescale_factor, do_normalize,
            image_mean, image_std; for ConvNeXT crop_pct.

    Returns:
        All members of `schemas.Preprocess` as JSON values.

    Raises:
        InvalidRequest: a processor that does something else to images, or sizes in another form.
    """
    name, processor = _processor(config)
    for switch in _SWITCHED_OFF:
        if config.get(switch):
            raise _refused(f"{switch} is {config[switch]!r}")
    found: dict[str, Any] = {"crop_offset": "floored", "scale": 1.0}
    if _class_name(config).endswith("Pil"):
        found["pad_offset"] = "ceiled"
    if config.get("do_resize", True):
        resample = config.get("resample", processor.resample)
        if not isinstance(resample, int) or isinstance(resample, bool) or resample not in _RESAMPLE:
            raise _refused(f"resample is {resample!r}; known are {_RESAMPLE}")
        found["resample"] = _RESAMPLE[resample]
        found |= _convnext_size(config) if name == "ConvNext" else {"resize": _size(config, "size", processor.square)}
    if config.get("do_center_crop", processor.crops):
        if "crop" in found:
            raise _refused("do_center_crop is true beside crop_pct")
        found["crop"] = _size(config, "crop_size", square=True)
    if config.get("do_rescale", True):
        found["scale"] = config.get("rescale_factor", 1 / 255)
    if config.get("do_normalize", True):
        for member, ours in (("image_mean", "mean"), ("image_std", "std")):
            if config.get(member) is None:
                raise _refused(f"do_normalize is true and {member} is missing")
            found[ours] = config[member]
    mean = found.get("mean")
    if config.get("do_convert_rgb") or not isinstance(mean, list) or len(mean) == 3:
        found["colour"] = "rgb"
    elif len(mean) == 1:
        found["colour"] = "grey"
    return _checked(found)


def from_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our preprocessing from timm's data configuration of a network, equal to timm's own evaluation.

    Args:
        config: with input_size (channels, height, width), interpolation, mean, std, crop_pct, crop_mode, as
            timm.data.resolve_data_config gives it.

    Returns:
        All members of `schemas.Preprocess` as JSON values.

    Raises:
        InvalidRequest: padded borders (crop_mode "border"), different sides unless the mode is "squash", a randomly
            chosen filter ("random"), other numbers of channels than one and three.
    """
    match config.get("input_size"):
        case [1 | 3 as channels, int(height), int(width)] | (1 | 3 as channels, int(height), int(width)):
            pass
        case other:
            raise _refused(f"input_size is {other!r}; expected [3, height, width], or one channel")
    mode, crop_pct = config.get("crop_mode", "center"), config.get("crop_pct", 0.875)
    if not isinstance(crop_pct, int | float) or not 0.1 <= crop_pct <= 2:
        raise _refused(f"crop_pct is {crop_pct!r}")
    sides = [math.floor(height / crop_pct), math.floor(width / crop_pct)]
    if mode == "squash":
        resize: Any = sides
    elif mode == "center" and height == width:
        resize = sides[0]
    else:
        raise _refused(f"crop_mode is {mode!r} for images of {height} x {width}")
    found = {
        "resize": resize,
        "resample": config.get("interpolation", "bicubic"),
        "crop": [height, width],
        "crop_offset": "rounded",
        "colour": "rgb" if channels == 3 else "grey",
        "scale": 1 / 255,
    }
    for member in ("mean", "std"):
        numbers = config.get(member, ())
        if not isinstance(numbers, Sequence) or len(numbers) != channels:
            raise _refused(f"{member} is {numbers!r} for {channels} channels")
        found[member] = list(numbers)
    return _checked(found)


def preprocess_of_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return our preprocessing from the config.json of a folder that timm wrote; None if it does not describe images.

    Raises:
        InvalidRequest: as `from_timm`.
    """
    # Early versions of timm had no separate member for it.
    data, args = config.get("pretrained_cfg") or config, config.get("model_args") or {}
    if "architecture" not in config or not isinstance(data, dict) or not isinstance(args, dict):
        return None
    found = {name: data[name] for name in _TIMM if data.get(name) is not None}
    size = found.get("input_size")
    if not isinstance(size, list) or len(size) != 3:
        return None
    # The network's input size, as in timm: its arguments take precedence over the registered values.
    side = args.get("img_size", size[1:])
    channels, sides = args.get("in_chans", size[0]), side if isinstance(side, list) else [side, side]
    mean = found.get("mean")
    if channels not in (1, 3) or not isinstance(mean, list) or len(mean) != channels:
        # This network does not take images.
        return None
    return from_timm({**found, "input_size": [channels, *sides]})


def _class_name(config: Mapping[str, Any]) -> str:
    """Return the processor's class name, or "". Names that end in Pil use Pillow and NumPy, others torchvision."""
    return str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")


def _processor(config: Mapping[str, Any]) -> tuple[str, _Processor]:
    given = _class_name(config)
    if not given:
        # Files of early versions name no class; with sizes by side, nothing depends on the class.
        if isinstance(config.get("size"), dict) and "resample" in config and "crop_pct" not in config:
            return "", _Processor(config["resample"], crops="crop_size" in config)
        raise _refused("it names no image_processor_type")
    name = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", given)
    if name not in _PROCESSORS:
        raise _refused(f"its image_processor_type is {given!r}; known are {', '.join(_PROCESSORS)}")
    return name, _PROCESSORS[name]


def _size(config: Mapping[str, Any], member: str, square: bool) -> Any:
    """Return one number, or height and width."""
    match config.get(member):
        case {"height": int(height), "width": int(width), **others} if not others:
            return [height, width]
        case {"shortest_edge": int(side), **others} if not any(others.values()) and member == "size":
            return side
        case int(side) if not isinstance(side, bool):
            return [side, side] if square else side
        case other:
            raise _refused(f"{member} is {other!r}; expected height and width, or shortest_edge")


def _convnext_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ConvNeXT's resize: below 384 shorter side size / crop_pct and a centre crop, else squashed."""
    side = _size(config, "size", square=False)
    if not isinstance(side, int):
        raise _refused(f"size is {config['size']!r}; expected shortest_edge")
    crop_pct = config.get("crop_pct", 224 / 256)
    if not isinstance(crop_pct, int | float) or not 0.1 <= crop_pct <= 2:
        raise _refused(f"crop_pct is {crop_pct!r}")
    if side < 384:
        return {"resize": int(side / crop_pct), "crop": [side, side]}
    return {"resize": [side, side]}


def _checked(found: Mapping[str, Any]) -> dict[str, Any]:
    try:
        # For images: scaled to 0 to 1 unless stated otherwise.
        return Preprocess.model_validate(found).for_images().model_dump(mode="json")
    except ValidationError as error:
        raise invalid_request("The preprocessing", error.errors(), prefix="preprocess") from None


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"This preprocessing cannot be expressed here: {reason}. Give preprocess in the service's own words (resize, "
        "resample, crop, colour, scale, mean, std)."
    )

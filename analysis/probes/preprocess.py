"""Preprocessing of inputs before a network takes them: pixels of images first, then numbers of batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from ..errors import AnalysisError

Number = float | int
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Colour = Literal["rgb", "grey"]
CropOffset = Literal["rounded", "floored"]
PadOffset = Literal["floored", "ceiled"]

#: Longest side of a resized or cropped image, in pixels.
MAX_SIDE = 4096


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop, then x * scale, then (x - mean) / std.

    The first two apply to images decoded here, in grey levels 0 to 255 (`images.pixels`); batches of numbers get only
    the rest.

    Attributes:
        scale: for example 1/255.
        mean, std: one number, or one for each index of dimension 1 of a batch (channels of images, features of
            rows). std is above 0.
        resize: pixels of the shorter side, the other in proportion; or height and width.
        resample: Pillow's filter for resizing, antialiased except "nearest".
        crop: height and width of the centre crop; missing pixels are padded with 0.
        crop_offset: where an odd number of pixels is cut off, half of it "rounded" to even, as in torchvision and
            timm, or "floored", as in transformers.
        pad_offset: where the image lacks an odd number of pixels, the zeros before it are half of that, "floored", as
            in torchvision, timm and transformers' torchvision backend, or "ceiled", as in its Pillow backend.
        colour: "rgb" or "grey" converts; None leaves grey images grey and all others RGB.

    Raises:
        AnalysisError: `invalid-probe` for a number that is not finite, a std that is not above 0, and a side outside
            1 to 4096.
    """

    scale: Number = 1.0
    mean: Number | Sequence[Number] = 0.0
    std: Number | Sequence[Number] = 1.0
    resize: int | Sequence[int] | None = None
    resample: Resample = "bilinear"
    crop: Sequence[int] | None = None
    crop_offset: CropOffset = "rounded"
    pad_offset: PadOffset = "floored"
    colour: Colour | None = None

    def __post_init__(self) -> None:
        numbers = (self.scale, *_numbers(self.mean), *_numbers(self.std))
        if not all(isfinite(number) for number in numbers) or not all(number > 0 for number in _numbers(self.std)):
            raise AnalysisError("invalid-probe", f"Preprocessing needs finite numbers and std above 0, not {self}.")
        pairs = [sides for sides in (self.resize, self.crop) if isinstance(sides, Sequence)]
        sides = [side for pair in pairs for side in pair] + ([self.resize] if isinstance(self.resize, int) else [])
        if any(len(pair) != 2 for pair in pairs) or not all(1 <= side <= MAX_SIDE for side in sides):
            raise AnalysisError(
                "invalid-probe", f"Images are resized and cropped to 1 to {MAX_SIDE} pixels, not {self}."
            )

    def __call__(self, inputs: Shaped[Tensor, "n ..."]) -> Float32[Tensor, "n ..."]:
        """Scale and standardise a batch of any numbers, without resizing.

        Raises:
            AnalysisError: `invalid-probe` where the numbers of mean or std do not match the size of dimension 1.
        """
        # One copy, changed in place: on a processor, allocating new memory costs more than the arithmetic.
        numbers = inputs.to(torch.float32, copy=True).mul_(self.scale)
        return numbers.sub_(_along_channels(self.mean, inputs)).div_(_along_channels(self.std, inputs))


def _numbers(value: Number | Sequence[Number]) -> Sequence[Number]:
    return value if isinstance(value, Sequence) else (value,)


def _along_channels(
    value: Number | Sequence[Number], inputs: Shaped[Tensor, "n ..."]
) -> Float32[Tensor, "..."] | Number:
    if not isinstance(value, Sequence):
        return value
    if inputs.ndim < 2 or len(value) != inputs.shape[1]:
        raise AnalysisError(
            "invalid-probe",
            f"Preprocessing gives {len(value)} numbers for dimension 1 of inputs of the shape {list(inputs.shape)}.",
        )
    return torch.tensor(value, dtype=torch.float32, device=inputs.device).view(1, -1, *[1] * (inputs.ndim - 2))

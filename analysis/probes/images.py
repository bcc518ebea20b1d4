"""Images in files, decoded while the network computes: in order, in threads, a bounded number ahead.

Pillow decodes and resizes outside of Python's lock. An image's header is checked before its pixels are decoded.
"""

import io
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import AnalysisError
from .preprocess import Preprocess

Read = Callable[[Sequence[int]], Iterator[tuple[str, bytes]]]
"""Gives name and content of the files in these rows, in their order."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")

# Our own limit applies, and it is smaller: Pillow's limit only warns, without naming the image.
Image.MAX_IMAGE_PIXELS = None

# Exceptions that Pillow raises for broken files; its own UnidentifiedImageError is an OSError.
_BROKEN_IMAGE = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError,
    NotImplementedError, MemoryError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
# Modes without a defined range: no number is known to be white.
_DEEP_MODES = ("I", "F")
_GREY_MODES = ("1", "L", "LA", "La")
# Tags of TIFF, and PNG's colour type of grey with alpha.
_BITS, _INTERPRETATION, _WHITE_IS_ZERO = 258, 262, 0
_PNG_START, _PNG_GREY_AND_ALPHA = b"\x89PNG\r\n\x1a\n", 4
# Small batches vary in decoding time; this many images ahead even them out.
_AHEAD = 64
# Without this limit, the files of a thousand photographs decoded to thumbnails would hold some GB.
_HELD_BYTES = 256 * 2**20
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Images:
    """Images of one size, decoded batch by batch.

    Attributes:
        read: reads the files.
        rows: of the files, one for each sample.
        preprocess: its resizing, crop and colour are applied here.
        most_pixels: limit for an image in its file, and for its resized form.
        shape: (n, channels, height, width).
        threads: number of decoding threads.
    """

    read: Read
    rows: Sequence[int]
    preprocess: Preprocess
    most_pixels: int
    shape: tuple[int, int, int, int]
    threads: int

    def batches(self, batch_size: int) -> Generator[UInt8[Tensor, "b c h w"], None, None]:
        """Yield the images in order, as grey levels.

        While the caller works with a batch, the next ones are decoded: one, or enough for 64 images. At most 256 MiB
        of their files are held.

        Raises:
            AnalysisError: `invalid-probe` for an image that is broken, too large, or of another size, by its row.
        """
        sizes = [min(batch_size, len(self.rows) - start) for start in range(0, len(self.rows), batch_size)]
        files = zip(self.rows, self.read(self.rows), strict=True)
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        n_ahead = max(1, -(-_AHEAD // batch_size))
        ahead: deque[tuple[npt.NDArray[np.uint8], list[Future[None]]]] = deque()
        held: deque[tuple[Future[None], int]] = deque()
        held_bytes = 0
        try:
            for size in sizes:
                batch, futures = np.empty((size, *self.shape[1:]), np.uint8), []
                for place, (row, (name, content)) in zip(batch, files, strict=False):
                    while held and (held[0][0].done() or held_bytes + len(content) > _HELD_BYTES):
                        decoded, n_bytes = held.popleft()
                        # Waits; a failure is raised later, in order.
                        decoded.exception()
                        held_bytes -= n_bytes
                    futures.append(pool.submit(self._decode_into, place, row, name, content))
                    held.append((futures[-1], len(content)))
                    held_bytes += len(content)
                ahead.append((batch, futures))
                if len(ahead) > n_ahead:
                    yield _done(*ahead.popleft())
            while ahead:
                yield _done(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def take(self, places: Sequence[int]) -> "Images":
        """Return only the samples at these places, in their order."""
        return replace(self, rows=[self.rows[place] for place in places], shape=(len(places), *self.shape[1:]))

    def _decode_into(self, place: npt.NDArray[np.uint8], row: int, name: str, content: bytes) -> None:
        image = pixels(content, self.preprocess, where=place_of(row, name), most_pixels=self.most_pixels)
        if image.shape != place.shape:
            raise _differing(place_of(row, name), image.shape, place.shape)
        place[:] = image


def open_images(
    read: Read, rows: Sequence[int], preprocess: Preprocess | None, *, most_pixels: int, threads: int
) -> Images:
    """Open images; all must have the size of the first one after preprocessing.

    Args:
        read: gives name and content of the files in rows.
        rows: the files, in order; at least one.
        preprocess: None leaves size and colour as they are.
        most_pixels: limit for an image in its file, and for its resized form.
        threads: number of decoding threads.

    Returns:
        The images; only the first one has been decoded.

    Raises:
        AnalysisError: `invalid-probe` for a first image that cannot be decoded.
    """
    preprocess = preprocess or Preprocess()
    [(name, content)] = read(rows[:1])
    first = pixels(content, preprocess, where=place_of(rows[0], name), most_pixels=most_pixels)
    channels, height, width = first.shape
    return Images(read, rows, preprocess, most_pixels, (len(rows), channels, height, width), threads)


def pixels(content: bytes, preprocess: Preprocess, *, where: str, most_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode an image, and apply the size and colour of a preprocessing.

    Like torchvision's Resize and CenterCrop on an image of Pillow: the longer side is rounded down. An image is first
    turned upright by its EXIF data; of several frames the first is taken. Of 16 bits a channel the higher 8 are taken,
    in grey and in colour, as Pillow and libpng do; transparent pixels keep their colour.

    Args:
        content: a file of one of FORMATS.
        preprocess: its scale, mean and std are ignored here.
        where: name of the image in messages.
        most_pixels: limit for the image in its file, and for its resized form.

    Returns:
        Grey levels (channels, height, width); one channel for grey images, also those with alpha, three for others.

    Raises:
        AnalysisError: `invalid-probe` where the format is another, the file is broken, or the image has more pixels,
            or pixels of 32 bits.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _bound(image.size, most_pixels, where)
            ImageOps.exif_transpose(image, in_place=True)
            coloured = _coloured(_of_8_bits(image, content, where), preprocess)
            sized = _cropped(_resized(coloured, preprocess, most_pixels, where), preprocess)
            array: npt.NDArray[np.uint8] = np.asarray(sized)
    except _BROKEN_IMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if "cannot identify image file" in reason:
            reason = f"it is none of {', '.join(FORMATS)}, or a kind of TIFF that Pillow does not know; save it as PNG"
        raise AnalysisError("invalid-probe", f"{where} cannot be decoded: {reason}.") from None
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def place_of(row: int, name: str) -> str:
    """Return the name of a sample in messages: its row, counted from 0, and its path if it has one."""
    return f"Row {row} ({name})" if name else f"Row {row}"


def _done(batch: npt.NDArray[np.uint8], futures: Sequence[Future[None]]) -> UInt8[Tensor, "b c h w"]:
    for future in futures:
        future.result()
    return torch.from_numpy(batch)


def _bound(size: tuple[int, int], most_pixels: int, where: str) -> None:
    width, height = size
    if width * height > most_pixels:
        raise AnalysisError(
            "invalid-probe",
            f"{where} has {width} x {height} pixels; at most {most_pixels} are allowed (INTERPLAY_MAX_IMAGE_PIXELS).",
            n_pixels=width * height,
            limit_pixels=most_pixels,
        )


def _of_8_bits(image: Image.Image, content: bytes, where: str) -> Image.Image:
    """Convert an image to 8 bits a channel; images stored as grey stay grey."""
    if image.mode in _DEEP_MODES:
        raise AnalysisError(
            "invalid-probe",
            f"{where} has pixels of 32 bits or with a sign (mode {image.mode}), without a defined value of "
            "white; save it with 8 or 16 bits a channel.",
        )
    if image.mode == "RGBA" and content.startswith(_PNG_START) and content[25] == _PNG_GREY_AND_ALPHA:
        # Pillow has no mode for grey and alpha with 16 bits.
        return image.getchannel("R")
    if not image.mode.startswith("I;16"):
        return image
    tags = getattr(image, "tag_v2", {})
    levels = np.asarray(image).astype(np.uint16) >> (tags.get(_BITS, (16,))[0] - 8)
    if tags.get(_INTERPRETATION) == _WHITE_IS_ZERO:
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8))


def _coloured(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    grey = image.mode in _GREY_MODES
    mode = {"rgb": "RGB", "grey": "L", None: "L" if grey else "RGB"}[preprocess.colour]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _resized(image: Image.Image, preprocess: Preprocess, most_pixels: int, where: str) -> Image.Image:
    width, height = image.size
    match preprocess.resize:
        case None:
            return image
        case int(side):
            longer = int(side * max(width, height) / min(width, height))
            size = (side, longer) if width <= height else (longer, side)
        case (new_height, new_width):
            size = (new_width, new_height)
    _bound(size, most_pixels, f"{where}, resized,")
    return image if size == image.size else image.resize(size, _FILTERS[preprocess.resample])


def _cropped(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    if preprocess.crop is None:
        return image
    crop_height, crop_width = preprocess.crop
    left, right = _cut(image.width, crop_width, preprocess)
    top, bottom = _cut(image.height, crop_height, preprocess)
    # Pillow fills the area outside of the image with 0.
    return image.crop((left, top, right, bottom))


def _cut(have: int, want: int, preprocess: Preprocess) -> tuple[int, int]:
    """Return start and end of a crop along one side; a negative start means padding."""
    if want > have:
        start = -((want - have + (preprocess.pad_offset == "ceiled")) // 2)
    else:
        # Python rounds halves to even, as torchvision does.
        start = (have - want) // 2 if preprocess.crop_offset == "floored" else round((have - want) / 2)
    return start, start + want


def _differing(where: str, shape: tuple[int, ...], first: tuple[int, ...]) -> AnalysisError:
    size, expected = (" x ".join(map(str, sides)) for sides in (shape, first))
    return AnalysisError(
        "invalid-probe",
        f"{where} is {size} (channels, height, width); the first image is {expected}. Give the probe or the checkpoint "
        "a preprocess with resize and crop, and a colour if it has both grey and coloured images.",
        expected=list(first),
        found=list(shape),
    )

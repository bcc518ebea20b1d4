"""Images: decoded, resized and cropped as torchvision does, in order, in threads, and refused by row."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from analysis.errors import AnalysisError
from analysis.probes.images import Images, open_images, pixels
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe
from tests.datafiles import encoded, picture, png_of_size

MOST = 64_000_000


def _pixels(content: bytes, preprocess: Preprocess | None = None, most_pixels: int = MOST) -> np.ndarray:
    return pixels(content, preprocess or Preprocess(), where="Row 17 (cat/3.png)", most_pixels=most_pixels)


def _opened(contents: Sequence[bytes], preprocess: Preprocess | None = None, threads: int = 3) -> Images:
    def read(rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        return ((f"{row}.png", contents[row]) for row in rows)

    return open_images(read, range(len(contents)), preprocess, most_pixels=MOST, threads=threads)


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_every_format_is_decoded(format: str) -> None:
    """The pixels are Pillow's; lossless formats give the saved pixels."""
    image = picture(1)
    content = encoded(image, format, **({"lossless": True} if format == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(_pixels(content), expected)
    if format not in ("GIF", "JPEG"):
        assert np.array_equal(expected, np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "colour", "channels"),
    [("L", None, 1), ("1", None, 1), ("RGB", None, 3), ("P", None, 3), ("RGBA", None, 3), ("LA", None, 1),
     ("L", "rgb", 3), ("RGB", "grey", 1), ("CMYK", "rgb", 3)],
)  # fmt: skip
def test_colour(mode: str, colour: str | None, channels: int) -> None:
    """By default grey stays one channel and all else is RGB; on request either is converted."""
    content = encoded(picture(2, mode=mode), "TIFF" if mode == "CMYK" else "PNG")
    found = _pixels(content, Preprocess(colour=colour))  # type: ignore[arg-type]
    assert found.shape == (channels, 32, 40)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB" if channels == 3 else "L"))
    assert np.array_equal(found.transpose(1, 2, 0).squeeze(), expected)


def _levels(channels: int, bits: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 2**bits, (5, 7, channels)).astype(f"u{-(-bits // 8)}")


def _png(levels: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """Return a PNG of 8 or 16 bits a channel, with a colour type in PNG's numbers."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(levels.dtype.newbyteorder(">")).tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, levels.itemsize * 8, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _tiff(levels: np.ndarray, interpretation: int, order: Literal["<", ">"] = "<", bits: int | None = None) -> bytes:
    """Return a TIFF of one strip; a second or fourth channel is alpha. With 12 bits, levels are packed bytes."""
    height, width, channels = levels.shape
    data = levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    width = width * 8 // bits if bits else width
    shorts = {256: width, 257: height, 259: 1, 262: interpretation, 277: channels, 278: height}
    shorts |= {338: 2} if channels in (2, 4) else {}
    start = 8 + 2 + 12 * (len(shorts) + 3) + 4
    depths = struct.pack(f"{order}{channels}H", *[bits or levels.itemsize * 8] * channels)
    entries = {tag: struct.pack(f"{order}HHLHH", tag, 3, 1, value, 0) for tag, value in shorts.items()}
    place = depths.ljust(4, b"\0") if channels < 3 else struct.pack(f"{order}L", start)
    entries[258] = struct.pack(f"{order}HHL", 258, 3, channels) + place
    entries[273] = struct.pack(f"{order}HHLL", 273, 4, 1, start + len(depths))
    entries[279] = struct.pack(f"{order}HHLL", 279, 4, 1, len(data))
    listed = b"".join(entry for _, entry in sorted(entries.items()))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}LH", 8, len(entries))
    return head + listed + bytes(4) + depths + data


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_png_of_any_depth(colour: int, channels: int, bits: int) -> None:
    """Of 16 bits the higher 8 count, in grey, grey with alpha, RGB and RGBA; grey with alpha is grey."""
    levels = _levels(channels, bits)
    kept = 1 if channels < 3 else 3
    found = _pixels(_png(levels, colour))
    assert np.array_equal(found, (levels >> (bits - 8)).transpose(2, 0, 1)[:kept])
    grey = _pixels(_png(levels, colour), Preprocess(colour="grey"))
    rgb = _pixels(_png(levels, colour), Preprocess(colour="rgb"))
    assert (grey.shape, rgb.shape) == ((1, 5, 7), (3, 5, 7))
    if kept == 1:
        assert np.array_equal(grey, found)
        assert np.array_equal(rgb, found.repeat(3, axis=0))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_of_any_depth(channels: int, bits: int, order: Literal["<", ">"]) -> None:
    """As PNG; also if zero is white."""
    levels = _levels(channels, bits)
    expected = (levels >> (bits - 8)).transpose(2, 0, 1)[: 1 if channels < 3 else 3]
    assert np.array_equal(_pixels(_tiff(levels, 1 if channels < 3 else 2, order)), expected)
    if channels == 1 and order == "<":
        assert np.array_equal(_pixels(_tiff(levels, 0)), 255 - expected)


def test_tiff_of_12_bits() -> None:
    """As microscopes write it: the higher 8 of 12 bits count."""
    levels = np.random.default_rng(0).integers(0, 2**12, (5, 8))
    first, second = levels[:, 0::2], levels[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2).astype(np.uint8)
    assert np.array_equal(_pixels(_tiff(packed.reshape(5, 12, 1), 1, bits=12))[0], levels >> 4)


def test_deep_images_are_turned_upright() -> None:
    """They are also resized and cropped like others."""
    levels = _levels(1, 16)[..., 0]
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.rot90(levels >> 8, -1)
    assert np.array_equal(_pixels(encoded(Image.fromarray(levels), exif=exif))[0], upright)
    shallow = encoded(Image.fromarray(upright.astype(np.uint8)))
    deep = encoded(Image.fromarray(levels), exif=exif)
    preprocess = Preprocess(resize=24, crop=[21, 25], resample="bicubic")
    assert np.array_equal(_pixels(deep, preprocess), _pixels(shallow, preprocess))


def test_what_is_transparent_keeps_its_colour() -> None:
    """Palettes with one transparent entry or an alpha for each, and grey with a key: alpha is not a colour."""
    palette = picture(2).quantize(5)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    for transparency in (b"\0\x80\xff", 2):
        assert np.array_equal(_pixels(encoded(palette, transparency=transparency)), expected)
    grey = picture(2, mode="L")
    assert np.array_equal(_pixels(encoded(grey, transparency=7))[0], np.asarray(grey))
    deep = _levels(1, 16)
    key = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 9) + struct.pack(">I", zlib.crc32(b"tRNS\0\x09"))
    assert np.array_equal(_pixels(_png(deep, 0, key))[0], deep[..., 0] >> 8)


_SIZES = [(40, 32), (32, 40), (33, 57), (57, 33), (24, 24), (10, 90), (7, 5)]


@pytest.mark.parametrize(("width", "height"), _SIZES)
@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_resize_and_crop_are_those_of_torchvision(width: int, height: int, resample: str) -> None:
    """Every grey level is torchvision's: shorter side or both, larger and smaller, crops of odd remainders, padding."""
    image = picture(width, width, height)
    content = encoded(image)
    for resize in (24, 61, [20, 31]):
        for crop in ([17, 24], [31, 9], [70, 20]):
            found = _pixels(content, Preprocess(resize=resize, crop=crop, resample=resample))  # type: ignore[arg-type]
            expected = transforms.Compose(
                [transforms.Resize(resize, InterpolationMode(resample)), transforms.CenterCrop(crop)]
            )(image)
            assert np.array_equal(found, np.asarray(expected).transpose(2, 0, 1)), (resize, crop)


def test_images_are_turned_upright() -> None:
    """EXIF orientation of cameras is applied."""
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = _pixels(encoded(image, exif=exif))
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def _error(content: bytes, preprocess: Preprocess | None = None) -> AnalysisError:
    with pytest.raises(AnalysisError) as raised:
        _pixels(content, preprocess)
    assert raised.value.kind == "invalid-probe"
    assert raised.value.detail.startswith("Row 17 (cat/3.png)")
    return raised.value


def test_broken_images_are_named() -> None:
    """Truncated files, other files, other formats, and pixels deeper than a byte are refused by row and path."""
    whole = encoded(picture(4), "JPEG")
    assert "cannot be decoded" in _error(whole[: len(whole) // 2]).detail
    assert "none of PNG" in _error(b"text").detail
    assert "none of PNG" in _error(encoded(picture(4), "PPM")).detail
    for wide in (np.float32, np.int32):
        deep = Image.fromarray(np.arange(64, dtype=wide).reshape(8, 8) * 1000)
        assert "32 bits" in _error(encoded(deep, "TIFF")).detail
    assert "a kind of TIFF" in _error(_tiff(_levels(2, 16), 1)).detail


def test_a_billion_pixels_are_refused_before_they_are_decoded() -> None:
    """The header suffices; nothing is allocated."""
    started = time.monotonic()
    error = _error(png_of_size(40_000, 25_000))
    assert error.members == {"n_pixels": 10**9, "limit_pixels": MOST}
    assert time.monotonic() - started < 1


def test_a_strip_that_would_be_resized_to_too_much_is_refused() -> None:
    """For an image one pixel wide, resizing its shorter side would make the longer one huge."""
    assert "resized" in _error(encoded(Image.new("L", (60_000, 1))), Preprocess(resize=224)).detail


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_batches_are_in_order(batch_size: int) -> None:
    """Sample i is image i for any timing of threads; a second pass gives the same."""
    contents = [encoded(picture(seed, 20 + seed % 5, 20)) for seed in range(23)]
    preprocess = Preprocess(resize=16, crop=[16, 16], scale=1 / 255, mean=[0.1, 0.2, 0.3], std=0.5)
    images = _opened(contents, preprocess)
    assert images.shape == (23, 3, 16, 16)
    probe = Probe(images, torch.arange(23) % 2, None, 2, preprocess)
    expected = torch.stack([torch.from_numpy(_pixels(content, preprocess).copy()) for content in contents])
    for _ in range(2):
        batches = list(probe.batches(batch_size, device="cpu"))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert torch.equal(torch.cat(batches), preprocess(expected.float()))


@pytest.mark.parametrize("most_bytes", [2**30, 23 * 3 * 16 * 16 * 2, 100])
def test_prepared_images_are_the_same(most_bytes: int) -> None:
    """Decoded once, as numbers or as grey levels, or again each time: the batches are equal."""
    contents = [encoded(picture(seed, 16, 16)) for seed in range(23)]
    preprocess = Preprocess(scale=1 / 255)
    probe = Probe(_opened(contents, preprocess), torch.arange(23) % 2, None, 2, preprocess)
    prepared = probe.prepared("cpu", most_bytes=most_bytes)
    expected_type = {2**30: torch.float32, 100: None}.get(most_bytes, torch.uint8)
    assert (prepared.inputs.dtype if isinstance(prepared.inputs, Tensor) else None) == expected_type
    assert torch.equal(torch.cat(list(prepared.batches(5, device="cpu"))), torch.cat([*probe.batches(5, device="cpu")]))


def test_what_is_decoded_ahead_is_bounded() -> None:
    """While one batch is in use, only one more is read, or small batches up to 64 images."""
    contents = [encoded(picture(seed % 9, 8, 8)) for seed in range(300)]
    read_rows: list[int] = []

    def read(rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            read_rows.append(row)
            yield "", contents[row]

    images = open_images(read, range(300), None, most_pixels=MOST, threads=2)
    read_rows.clear()
    large = images.batches(70)
    for number in range(1, 4):
        next(large)
        assert len(read_rows) == 70 * (number + 1)
    large.close()
    read_rows.clear()
    batches = images.batches(5)
    for number in range(1, 5):
        next(batches)
        assert len(read_rows) == 5 * (number + 13)
    threads = threading.active_count()
    batches.close()
    deadline = time.monotonic() + 5
    while threading.active_count() >= threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() < threads


def test_a_batch_is_prepared_while_the_one_before_is_used() -> None:
    """In one thread, which does not start without a caller and does not outlive it."""
    contents = [encoded(picture(seed % 9, 8, 8)) for seed in range(1000)]
    read_rows: list[int] = []

    def read(rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            read_rows.append(row)
            yield "", contents[row]

    images = open_images(read, range(1000), None, most_pixels=MOST, threads=2)
    batches = Probe(images, torch.arange(1000) % 2, None, 2, None).batches(100, device="cpu")
    read_rows.clear()
    threads = threading.active_count()
    next(batches)
    deadline = time.monotonic() + 5
    while len(read_rows) < 300 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(read_rows) == 300, "one that is used, one that is prepared, one that is decoded"
    batches.close()  # type: ignore[attr-defined]
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_files_that_are_held_are_bounded() -> None:
    """A batch of large files is read while it is decoded, not before."""
    photograph = encoded(Image.new("L", (3000, 3000)), "BMP")
    alive: list[int] = [0]
    most = 0

    class File(bytes):
        def __del__(self) -> None:
            alive[0] -= 1

    def read(rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        nonlocal most
        for _ in rows:
            alive[0] += 1
            most = max(most, alive[0])
            yield "", File(photograph)

    images = open_images(read, range(70), Preprocess(resize=[8, 8], resample="nearest"), most_pixels=MOST, threads=2)
    assert sum(len(batch) for batch in images.batches(64)) == 70
    assert 20 < most <= 2**28 // len(photograph) + 3


def test_images_of_another_size_are_named() -> None:
    """Without resize and crop all must have the size of the first; the error says what to give."""
    contents = [encoded(picture(seed, 20 if seed != 5 else 21, 20)) for seed in range(8)]
    with pytest.raises(AnalysisError) as raised:
        list(_opened(contents).batches(3))
    assert raised.value.detail.startswith("Row 5 (5.png) is 3 x 20 x 21")
    assert "resize and crop" in raised.value.detail
    mixed = [encoded(picture(0)), encoded(picture(1, mode="L"))]
    with pytest.raises(AnalysisError, match="colour"):
        list(_opened(mixed).batches(2))


@pytest.mark.parametrize(
    "wrong",
    [{"resize": 0}, {"resize": 5000}, {"resize": [4, 4, 4]}, {"crop": [4]}, {"crop": [4, 0]}],
)
def test_preprocessing_out_of_bounds_is_refused(wrong: dict[str, object]) -> None:
    """Impossible sides, and pairs of another length."""
    with pytest.raises(AnalysisError) as raised:
        Preprocess(**wrong)  # type: ignore[arg-type]
    assert raised.value.kind == "invalid-probe"

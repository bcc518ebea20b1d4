"""Encoded pictures without a decoder: the type and the size that their first bytes tell, and a writer of PNG."""

import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

# Segments of a JPEG that are looked at; before its size stand a few, or some dozens of a colour profile.
_MOST_SEGMENTS = 1000
_PNG = b"\x89PNG\r\n\x1a\n"


def media_type(content: bytes) -> str | None:
    """Return the media type of a picture that every browser shows and that holds no script; None for all else."""
    if content.startswith(_PNG):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    return "image/webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def size_of(content: bytes) -> tuple[int, int] | None:
    """Return the width and the height that a picture of such a type announces; None if it announces none."""
    kind = media_type(content)
    try:
        return None if kind is None else _SIZES[kind](content)
    except (struct.error, IndexError):
        return None


def _png_size(content: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", content, 16)
    return (width, height) if content[12:16] == b"IHDR" else None


def _gif_size(content: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from("<HH", content, 6)
    return width, height


def _webp_size(content: bytes) -> tuple[int, int] | None:
    match content[12:16]:
        case b"VP8X" if len(content) >= 30:
            return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
        case b"VP8L" if content[20] == 0x2F:
            (bits,) = struct.unpack_from("<I", content, 21)
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 " if content[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", content, 26)
            return width & 0x3FFF, height & 0x3FFF
    return None


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return the size in the first frame header, which follows tables, profiles and comments."""
    at = 2
    for _ in range(_MOST_SEGMENTS):
        if content[at] != 0xFF:
            return None
        marker = content[at + 1]
        if marker == 0xFF:  # filling before a marker
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        if marker in (0xD9, 0xDA):  # the end, or the picture's data, without a size before
            return None
        at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    return None


_SIZES: Mapping[str, Callable[[bytes], tuple[int, int] | None]] = {
    "image/png": _png_size,
    "image/jpeg": _jpeg_size,
    "image/gif": _gif_size,
    "image/webp": _webp_size,
}


def as_png(values: npt.NDArray[np.float64]) -> bytes:
    """Return numbers as a PNG: the smallest is black, the largest white; what is not finite is black.

    Args:
        values: (H, W) for grey, (H, W, 3) for colours.
    """
    finite = np.isfinite(values)
    known = np.where(finite, values, values[finite].min() if finite.any() else 0) / 2  # halves, whose span is finite
    span = known.max() - known.min()
    shares = (known - known.min()) / span if span > 0 else np.zeros_like(known)
    levels = np.where(finite, (shares * 255).round(), 0).astype(np.uint8)
    height, width = levels.shape[:2]
    lines = b"".join(b"\0" + line.tobytes() for line in levels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if levels.ndim == 3 else 0, 0, 0, 0)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

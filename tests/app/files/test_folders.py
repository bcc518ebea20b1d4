"""Untrusted zips of class folders: valid content and refusals."""

import io
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.files.datafile import detect
from tests.app.files.datasets import IMAGE, LIMITS, contents_of, labels_of, opened, refused
from tests.datafiles import nameless, saved, zipped


@pytest.mark.parametrize("prefix", ["", "pets/", "a/b/"])
def test_class_folders(tmp_path: Path, prefix: str) -> None:
    """Folders are the classes, in sorted order; a common parent and files of file managers are ignored."""
    names = ["dog/2.png", "cat/1.jpg", "dog/1.PNG", ".DS_Store", "__MACOSX/cat/._1.jpg", "cat/Thumbs.db"]
    content = zipped({**{prefix + name: IMAGE for name in names}, "README.txt": b"", prefix + "cat/": b""})
    dataset = opened(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == ("imagefolder", "images", ["cat", "dog"])
    assert dataset.split is None
    assert list(dataset.read([0, 2])) == [(f"{prefix}cat/1.jpg", IMAGE), (f"{prefix}dog/2.png", IMAGE)]
    assert labels_of(dataset) == [0, 1, 1]


@pytest.mark.parametrize("prefix", ["", "pets/"])
def test_split_folders(tmp_path: Path, prefix: str) -> None:
    """Two levels are splits and classes; validation counts as test."""
    names = ["train/dog/1.png", "train/cat/1.png", "val/cat/2.png", "test/dog/3.png"]
    dataset = opened(zipped({prefix + name: IMAGE for name in names}), tmp_path)
    assert dataset.split is not None
    found = [name for name, _ in dataset.read(range(4))]
    assert found == [prefix + name for name in (names[1], names[2], names[0], names[3])]
    assert (labels_of(dataset), dataset.split.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    only = opened(zipped({prefix + name: IMAGE for name in names[:2]}), tmp_path)
    assert only.split is not None
    assert (only.class_names, only.split.tolist()) == (["cat", "dog"], [0, 0])


def _with_mode(name: str, mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("cat/1.png", IMAGE)
        link = zipfile.ZipInfo(name)
        link.external_attr = mode << 16
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def _overwritten(content: bytes, at: int, new: bytes) -> bytes:
    start = content.rindex(b"PK\x05\x06") + at
    return content[:start] + new + content[start + len(new) :]


def _zip64(content: bytes, members: int, before: int | None = None) -> bytes:
    """Return a zip with ZIP64 numbers at the end; `before` stands where Python looks, if that is another record."""
    end = content.rindex(b"PK\x05\x06")
    size, offset = struct.unpack_from("<LL", content, end + 12)

    def record(count: int) -> bytes:
        return struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)

    records = record(members) + (b"" if before is None else record(before))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    ones = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    return content[:end] + records + locator + ones


GOOD_ZIP = {"cat/1.png": IMAGE, "dog/1.png": IMAGE}
BAD_ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "climbs out": (lambda: zipped({**GOOD_ZIP, "../../evil.png": IMAGE}), "leads out"),
    "climbs out in the middle": (lambda: zipped({**GOOD_ZIP, "cat/../../evil.png": IMAGE}), "leads out"),
    "another drive": (lambda: zipped({**GOOD_ZIP, "C:1.png": IMAGE}), "leads out"),
    "absolute": (lambda: zipped({**GOOD_ZIP, "/etc/cat/1.png": IMAGE}), "leads out"),
    "of Windows": (lambda: zipped({**GOOD_ZIP, "cat\\..\\1.png": IMAGE}), "leads out"),
    "a link": (lambda: _with_mode("dog/1.png", stat.S_IFLNK | 0o777), "a link"),
    "a device": (lambda: _with_mode("dog/1.png", stat.S_IFBLK | 0o777), "a device"),
    "an empty class": (lambda: zipped({**GOOD_ZIP, "eel/": b""}), "'eel'"),
    "no images": (lambda: zipped({"cat/1.txt": b"a"}), "no images"),
    "a text among images": (lambda: zipped({**GOOD_ZIP, "cat/notes.txt": b"a"}), "cat/notes.txt"),
    "no folders": (lambda: zipped({"1.png": IMAGE, "2.png": IMAGE}), "class folders"),
    "folders of two depths": (lambda: zipped({**GOOD_ZIP, "big/cat/1.png": IMAGE}), "class folders"),
    "unknown splits": (lambda: zipped({"a/cat/1.png": IMAGE, "b/dog/1.png": IMAGE}), "named after splits"),
    "a name of control characters": (lambda: zipped({**GOOD_ZIP, "c\x1bat/1.png": IMAGE}), "printable"),
    "a name of nothing": (lambda: nameless(zipped({**GOOD_ZIP, "x": IMAGE})), "1 to 1024 bytes"),
    "bzip2": (lambda: zipped(GOOD_ZIP, compression=zipfile.ZIP_BZIP2), "neither stored nor deflated"),
    "a bomb": (
        lambda: zipped({**GOOD_ZIP, "cat/2.png": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED),
        "times its size",
    ),
    "a million files announced": (lambda: _overwritten(zipped(GOOD_ZIP), 12, struct.pack("<L", 2**31)), "lists"),
    "a million files announced in large numbers": (lambda: _zip64(zipped(GOOD_ZIP), 2**31), "lists 2147483648"),
    "and elsewhere few": (lambda: _zip64(zipped(GOOD_ZIP), 2, before=2**31), "lists 2147483648"),
    "the end missing": (lambda: zipped(GOOD_ZIP)[:-30], "end of its list"),
    "the list broken": (lambda: _overwritten(zipped(GOOD_ZIP), 16, struct.pack("<L", 5)), "zip"),
    "an image broken": (lambda: zipped(GOOD_ZIP).replace(IMAGE, bytes(len(IMAGE)), 1), "Row 0 (cat/1.png)"),
    "splits without classes": (lambda: zipped({"train/1.png": IMAGE, "test/1.png": IMAGE}), "within each"),
    "a class of a long name": (lambda: zipped({**GOOD_ZIP, "e" * 201 + "/1.png": IMAGE}), "200 characters"),
}


@pytest.mark.parametrize("case", BAD_ZIPS)
def test_bad_zip_is_refused(tmp_path: Path, case: str) -> None:
    """Paths that leave the zip, links, bombs and classes without images are refused with their reason."""
    make, word = BAD_ZIPS[case]
    assert word in refused(make(), tmp_path).detail


def test_zips_over_the_limits_are_refused(tmp_path: Path) -> None:
    """Zips over the limits of files, bytes and rows are refused."""
    content = zipped(GOOD_ZIP)
    assert "at most 1 are allowed" in refused(content, tmp_path, replace(LIMITS, members=1)).detail
    assert "unpack" in refused(content, tmp_path, replace(LIMITS, unpacked_bytes=10)).detail
    assert "rows" in refused(content, tmp_path, replace(LIMITS, rows=1)).detail


def test_zips_of_large_numbers_are_read(tmp_path: Path) -> None:
    """Zips in the form that archivers use for more than 65,535 files are read."""
    assert contents_of(opened(_zip64(zipped(GOOD_ZIP), 2), tmp_path)) == [IMAGE, IMAGE]


def test_an_npz_is_no_dataset(tmp_path: Path) -> None:
    """A zip of .npy files alone holds tensors."""
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.zeros((2, 3)), labels=np.zeros(2))
    assert detect(saved(buffer.getvalue(), tmp_path, "images.zip"), LIMITS) is None

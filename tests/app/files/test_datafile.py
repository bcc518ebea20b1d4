"""Datasets from strangers: what is read of them, and what is refused, without a service."""

import csv
import io
import json
import stat
import struct
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import InvalidFile
from app.files.datafile import Dataset, Limits, detect, open_dataset
from app.settings import Settings
from tests.datafiles import encoded, image_column, nameless, parquet, picture, saved, zipped

LIMITS = Limits.of(Settings())
PICTURES = [encoded(picture(seed, 6, 5)) for seed in range(6)]
IMAGE = PICTURES[0]


def _open(
    content: bytes, folder: Path, limits: Limits = LIMITS, columns: Mapping[str, str | None] | None = None
) -> Dataset:
    path = saved(content, folder, "a.bin")
    format = detect(path, limits)
    assert format is not None
    return open_dataset(path, format, limits, columns)


def _refused(content: bytes, folder: Path, limits: Limits = LIMITS, **columns: str | None) -> InvalidFile:
    """Why a file is refused, when it is opened or when it is read."""

    def read() -> None:
        dataset = _open(content, folder, limits, columns or None)
        list(dataset.read(range(dataset.n_rows)))

    with pytest.raises(InvalidFile) as raised:
        read()
    return raised.value


def _labels(dataset: Dataset) -> list[int]:
    assert dataset.labels is not None
    return [int(label) for label in dataset.labels]


def _contents(dataset: Dataset, rows: Any = None) -> list[bytes]:
    return [content for _, content in dataset.read(range(dataset.n_rows) if rows is None else rows)]


# --- Parquet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_a_group", [1, 2, 100])
def test_parquet_of_hugging_face(tmp_path: Path, rows_a_group: int) -> None:
    """Images in a struct, classes named by the schema, a column of splits; any rows can be read, in rising order."""
    content = parquet(
        {
            "img": image_column(PICTURES, [f"{i}.png" for i in range(6)]),
            "fine_label": [0, 2, 1, 0, 2, 1],
            "split": ["train", "train", "validation", "test", "train", "train"],
        },
        names={"fine_label": ["cat", "dog", "eel"]},
        row_group_size=rows_a_group,
    )
    dataset = _open(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == ("parquet", "images", ["cat", "dog", "eel"])
    assert dataset.columns == {"image": "img", "label": "fine_label", "split": "split"}
    assert _labels(dataset) == [0, 2, 1, 0, 2, 1]
    assert dataset.split is not None
    assert dataset.split.tolist() == [0, 0, 1, 1, 0, 0]
    assert list(dataset.read(range(6))) == [(f"{i}.png", PICTURES[i]) for i in range(6)]
    assert _contents(dataset, [1, 4, 5]) == [PICTURES[1], PICTURES[4], PICTURES[5]]


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (pa.array(["dog", "cat", "dog"]), [1, 0, 1], ["cat", "dog"]),
        (pa.array(["dog", "cat", "dog"], pa.large_string()), [1, 0, 1], ["cat", "dog"]),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode(), [1, 0, 1], ["cat", "dog"]),
        (
            pa.DictionaryArray.from_arrays(pa.array([2, 1, 2]), pa.array(["unused", "cat", "dog"])),
            [1, 0, 1],
            ["cat", "dog"],
        ),
        (pa.array(["10", "9", "10"]), [10, 9, 10], None),
        (pa.array([3, 0, 3], pa.uint8()), [3, 0, 3], None),
    ],
)
def test_labels_of_parquet(tmp_path: Path, labels: pa.Array, expected: list[int], names: list[str] | None) -> None:
    """Names become their places in sorted order, names that are integers those integers."""
    dataset = _open(parquet({"text": ["a", "b", "c"], "label": labels}), tmp_path)
    assert _labels(dataset) == expected
    assert dataset.class_names == names
    assert _contents(dataset) == [b"a", b"b", b"c"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    """Plain bytes are images too; of images and texts in one file the spec chooses."""
    content = parquet({"photo": PICTURES, "caption": list("abcdef"), "species": [0, 1] * 3})
    dataset = _open(content, tmp_path, columns={"image": "photo", "label": "species"})
    assert (dataset.content, _contents(dataset)) == ("images", PICTURES)
    dataset = _open(content, tmp_path, columns={"text": "caption", "label": "species"})
    assert (dataset.content, _contents(dataset)) == ("texts", [b"a", b"b", b"c", b"d", b"e", b"f"])


TWO = {"image": image_column(PICTURES[:2]), "label": [0, 1]}


def _column_twice() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table([["a"], [0], [1]], names=["text", "label", "label"]), buffer)
    return buffer.getvalue()


BAD_PARQUET: dict[str, tuple[Callable[[], bytes], str]] = {
    "no images or texts": (lambda: parquet({"photo": PICTURES[:2], "label": [0, 1]}), "'photo', 'label'"),
    "no labels": (lambda: parquet({"image": PICTURES[:2], "species": [0, 1]}), "'image', 'species'"),
    "images and texts": (lambda: parquet({**TWO, "text": ["a", "b"]}), "name the one to take"),
    "a label is missing": (lambda: parquet({**TWO, "label": pa.array([0, None])}), "Row 1"),
    "a name is empty": (lambda: parquet({**TWO, "label": pa.array(["a", ""])}), "Row 1"),
    "a name is missing": (lambda: parquet({**TWO, "label": pa.array(["a", None])}), "Row 1"),
    "labels are fractions": (lambda: parquet({**TWO, "label": [1.0, 0.5]}), "'label' is 0.5 in row 1"),
    "labels are dates": (lambda: parquet({**TWO, "label": pa.array([1, 2], pa.date32())}), "date32"),
    "labels are lists": (lambda: parquet({**TWO, "label": [["a"], ["b"]]}), "list<"),
    "labels are no text": (lambda: parquet({**TWO, "label": [b"a", b"\xff"]}), "row 1 is bytes that are not UTF-8"),
    "a text is no text": (lambda: parquet({"text": [b"a", b"\xff"], "label": [0, 1]}), "row 1 is bytes"),
    "a label of -1": (lambda: parquet({**TWO, "label": [0, -1]}, names={"label": ["a", "b"]}), "row 1 is -1"),
    "a class twice": (lambda: parquet(TWO, names={"label": ["a", "a"]}), "each once"),
    "images are numbers": (lambda: parquet({**TWO, "image": [1, 2]}), "int64"),
    "an image is missing": (lambda: parquet({**TWO, "image": image_column([PICTURES[0], None])}), "Row 1"),
    "a path and no bytes": (
        lambda: parquet({**TWO, "image": image_column([PICTURES[0], None], [None, "a/b.png"])}),
        "'a/b.png'",
    ),
    "a text is missing": (lambda: parquet({"text": ["a", " "], "label": [0, 1]}), "Row 1"),
    "a text is too long": (lambda: parquet({"text": ["a", "b" * 131_073], "label": [0, 1]}), "131072"),
    "an unknown split": (lambda: parquet({**TWO, "split": ["train", "holdout"]}), "row 1 is 'holdout'"),
    "no rows": (lambda: parquet({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), "no rows"),
    "cut short": (lambda: parquet(TWO)[:-5], "footer"),
    "a footer too large": (lambda: parquet(TWO)[:-8] + struct.pack("<I", 2**30) + b"PAR1", "footer"),
    "broken inside": (lambda: parquet(TWO)[:4] + bytes(400) + parquet(TWO)[404:], "Parquet"),
    "only a start": (lambda: b"PAR1" + bytes(100), "footer"),
    "a split is missing": (lambda: parquet({**TWO, "split": pa.array(["train", None])}), "Row 1 has no value"),
    "names with fractions": (lambda: parquet({**TWO, "label": pa.array(["1.0", "10.5"])}), "row 1 is '10.5'"),
    "a column twice": (_column_twice, "'label' twice"),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet_is_refused(tmp_path: Path, case: str) -> None:
    """What is missing is named, by column or row; the columns that there are are listed."""
    make, word = BAD_PARQUET[case]
    assert word in _refused(make(), tmp_path).detail


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    """The problem lists the columns."""
    error = _refused(parquet({"photo": PICTURES[:2], "label": [0, 1]}), tmp_path, image="foto")
    assert error.members["columns"] == ["photo", "label"]
    assert "'foto'" in error.detail


def test_parquet_over_the_limits_is_refused(tmp_path: Path) -> None:
    """Rows, bytes and ratio are looked at in the footer; one text repeated a million times is one."""
    small = parquet(TWO)
    assert "2 rows" in _refused(small, tmp_path, replace(LIMITS, rows=1)).detail
    assert "unpack" in _refused(small, tmp_path, replace(LIMITS, unpacked_bytes=100)).detail
    bomb = parquet({"text": ["a" * 100_000] * 500, "label": [0, 1] * 250}, use_dictionary=False, compression="zstd")
    assert "times its size" in _refused(bomb, tmp_path).detail
    assert "texts may have" in _refused(bomb, tmp_path, replace(LIMITS, ratio=1e9, text_bytes=10**6)).detail


def test_rows_are_counted_where_they_are_read_by(tmp_path: Path) -> None:
    """A footer that says 3 in place of 50,000: what the row groups announce is what would be read."""
    content = parquet({"text": ["a"] * 50_000, "label": [0, 1] * 25_000})
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    # Twice the number in groups of 7 bits: the first such one in the footer is its own.
    at = content.index(bytes((0xA0, 0x8D, 0x06)), footer)
    few = content[:at] + bytes((0x86, 0x80, 0x00)) + content[at + 3 :]
    assert pq.ParquetFile(io.BytesIO(few)).metadata.num_rows == 3
    assert "50000 rows" in _refused(few, tmp_path, replace(LIMITS, rows=1000)).detail


def test_a_long_split_is_unpacked_once(tmp_path: Path) -> None:
    """Its name is in the file once, for all rows: 6.5 GB if each of them had a copy."""
    n = 65_536
    split = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x" * 100_000]))
    content = parquet({"text": ["a"] * n, "label": np.arange(n) % 2, "split": split}, store_schema=False)
    assert len(content) < 10_000
    started = time.monotonic()
    assert "The split of row 0" in _refused(content, tmp_path).detail
    assert time.monotonic() - started < 2


def test_names_with_dots(tmp_path: Path) -> None:
    """Are columns as others are, with bytes that count."""
    content = parquet({"label.raw": [5, 6], "label": [1, 0], "my.text": ["a" * 1000, "b" * 1000]}, compression="none")
    columns = {"text": "my.text"}
    assert _labels(_open(content, tmp_path, columns=columns)) == [1, 0]
    assert "texts may have" in _refused(content, tmp_path, replace(LIMITS, text_bytes=1000), **columns).detail
    names = parquet({"text": ["a", "b"], "label": ["a" * 150, "b" * 150]}, compression="none")
    assert "'label'" in _refused(names, tmp_path, replace(LIMITS, text_bytes=200)).detail


# --- Parquet in several files ---------------------------------------------------------------------------------------


def _shard(first: int, labels: Sequence[Any], names: list[str] | None = None, **options: Any) -> bytes:
    columns = {"image": image_column(PICTURES[first : first + len(labels)]), "label": labels}
    return parquet(columns, names=None if names is None else {"label": names}, **options)


@pytest.mark.parametrize("prefix", ["", "data/", "pets/plain/"])
def test_shards_are_one_dataset(tmp_path: Path, prefix: str) -> None:
    """As Hugging Face's `datasets` lays them out: in the order of their names, which also say what the splits are."""
    files = {
        "train-00001-of-00002.parquet": _shard(2, ["dog", "ant"], row_group_size=1),
        "validation-00000-of-00001.parquet": _shard(4, ["cat", "ant"]),
        "train-00000-of-00002.parquet": _shard(0, ["cat", "dog"]),
    }
    content = zipped({**{prefix + name: file for name, file in files.items()}, "README.md": b"a", ".DS_Store": b"b"})
    dataset = _open(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == ("parquet", "images", ["ant", "cat", "dog"])
    assert _labels(dataset) == [1, 2, 2, 0, 1, 0]
    assert dataset.split is not None
    assert dataset.split.tolist() == [0, 0, 0, 0, 1, 1]
    assert _contents(dataset) == PICTURES
    assert _contents(dataset, [1, 3, 4]) == [PICTURES[1], PICTURES[3], PICTURES[4]]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train/0.parquet", "test/0.parquet"), [1, 1, 0, 0]),
        (("0.parquet", "1.parquet"), None),
        (("test.parquet", "train.parquet"), [1, 1, 0, 0]),
        (("part-0.parquet", "part-1.parquet"), None),
    ],
)
def test_names_of_shards_say_the_split(tmp_path: Path, names: tuple[str, str], split: list[int] | None) -> None:
    """Or its folder does; where nothing does there is none, and a column goes before names."""
    dataset = _open(zipped({name: _shard(0, [0, 1], ["a", "b"]) for name in names}), tmp_path)
    assert (dataset.split if dataset.split is None else dataset.split.tolist()) == split
    column = parquet({"text": ["a", "b"], "label": [0, 1], "split": ["test", "train"]})
    dataset = _open(zipped(dict.fromkeys(names, column)), tmp_path)
    assert dataset.split is not None
    assert dataset.split.tolist() == [1, 0, 1, 0]


SHARDS = {"train-0.parquet": _shard(0, [0, 1], ["a", "b"]), "train-1.parquet": _shard(2, [1, 0], ["a", "b"])}
BAD_SHARDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "packed once more": (lambda: zipped(SHARDS, compression=zipfile.ZIP_DEFLATED), "zip -0"),
    "other classes": (
        lambda: zipped({**SHARDS, "train-2.parquet": _shard(0, [0, 1], ["b", "a"])}),
        "name other classes",
    ),
    "another type": (
        lambda: zipped({**SHARDS, "train-2.parquet": _shard(0, ["a", "b"])}),
        "string in 'train-2.parquet'",
    ),
    "no such column": (
        lambda: zipped({**SHARDS, "train-2.parquet": parquet({"image": image_column(PICTURES[:1])})}),
        "no such column in 'train-2.parquet'",
    ),
    "a missing label": (lambda: zipped({**SHARDS, "train-2.parquet": _shard(0, [0, -1], ["a", "b"])}), "row 5 is -1"),
    "a name that is no split": (
        lambda: zipped({**SHARDS, "unsupervised-0.parquet": SHARDS["train-0.parquet"]}),
        "some are",
    ),
    "two datasets": (
        lambda: zipped({f"{name}/{i}.parquet": f for i, f in enumerate(SHARDS.values()) for name in ("en", "fr")}),
        "2 folders",
    ),
    "images beside": (lambda: zipped({**SHARDS, "cat/1.png": IMAGE}), "'cat/1.png'"),
    "climbs out": (lambda: zipped({**SHARDS, "../train-2.parquet": b"a"}), "leads out"),
    "one cut short": (lambda: zipped({**SHARDS, "train-2.parquet": SHARDS["train-0.parquet"][:-9]}), "train-2.parquet"),
    "not where the list says": (lambda: _overwritten_list(zipped(SHARDS)), "where the list says"),
}


def _overwritten_list(content: bytes) -> bytes:
    at = content.rindex(b"PK\x01\x02") + 42
    return content[:at] + struct.pack("<L", 7) + content[at + 4 :]


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_refused(tmp_path: Path, case: str) -> None:
    """What differs is named by file; rows are counted through all of them."""
    make, word = BAD_SHARDS[case]
    assert word in _refused(make(), tmp_path).detail


def test_shards_over_the_limits_are_refused(tmp_path: Path) -> None:
    """All of them together."""
    content = zipped(SHARDS)
    assert "4 rows" in _refused(content, tmp_path, replace(LIMITS, rows=3)).detail
    assert "unpack" in _refused(content, tmp_path, replace(LIMITS, unpacked_bytes=1000)).detail
    assert "lists 2 files" in _refused(content, tmp_path, replace(LIMITS, members=1)).detail


# --- zips of class folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "pets/", "a/b/"])
def test_class_folders(tmp_path: Path, prefix: str) -> None:
    """Folders are the classes, in sorted order; what holds them all, and what file managers leave, is no class."""
    names = ["dog/2.png", "cat/1.jpg", "dog/1.PNG", ".DS_Store", "__MACOSX/cat/._1.jpg", "cat/Thumbs.db"]
    content = zipped({**{prefix + name: IMAGE for name in names}, "README.txt": b"", prefix + "cat/": b""})
    dataset = _open(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == ("imagefolder", "images", ["cat", "dog"])
    assert dataset.split is None
    assert list(dataset.read([0, 2])) == [(f"{prefix}cat/1.jpg", IMAGE), (f"{prefix}dog/2.png", IMAGE)]
    assert _labels(dataset) == [0, 1, 1]


@pytest.mark.parametrize("prefix", ["", "pets/"])
def test_split_folders(tmp_path: Path, prefix: str) -> None:
    """Two levels are splits and classes; validation counts as test."""
    names = ["train/dog/1.png", "train/cat/1.png", "val/cat/2.png", "test/dog/3.png"]
    dataset = _open(zipped({prefix + name: IMAGE for name in names}), tmp_path)
    assert dataset.split is not None
    found = [name for name, _ in dataset.read(range(4))]
    assert found == [prefix + name for name in (names[1], names[2], names[0], names[3])]
    assert (_labels(dataset), dataset.split.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    only = _open(zipped({prefix + name: IMAGE for name in names[:2]}), tmp_path)
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
    """With large numbers at the end; `before` is what stands where Python looks, where that is another record."""
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
    """Paths that climb out, links, bombs, classes without images: each says what it is."""
    make, word = BAD_ZIPS[case]
    assert word in _refused(make(), tmp_path).detail


def test_zips_over_the_limits_are_refused(tmp_path: Path) -> None:
    """Files, bytes and rows."""
    content = zipped(GOOD_ZIP)
    assert "at most 1 are allowed" in _refused(content, tmp_path, replace(LIMITS, members=1)).detail
    assert "unpack" in _refused(content, tmp_path, replace(LIMITS, unpacked_bytes=10)).detail
    assert "rows" in _refused(content, tmp_path, replace(LIMITS, rows=1)).detail


def test_zips_of_large_numbers_are_read(tmp_path: Path) -> None:
    """As archivers write them for more than 65,535 files."""
    assert _contents(_open(_zip64(zipped(GOOD_ZIP), 2), tmp_path)) == [IMAGE, IMAGE]


def test_an_npz_is_no_dataset(tmp_path: Path) -> None:
    """A zip of .npy files alone holds tensors."""
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.zeros((2, 3)), labels=np.zeros(2))
    assert detect(saved(buffer.getvalue(), tmp_path, "images.zip"), LIMITS) is None


# --- lines ----------------------------------------------------------------------------------------------------------


def _csv(rows: list[list[str]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    return buffer.getvalue().encode(encoding)


def _jsonl(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


ROWS = [["text", "label", "split"], ['a, "b"\nc', "pos", "train"], ["Größe ✓", "neg", "test"], ["d", "pos", "test"]]


@pytest.mark.parametrize(
    ("content", "format"),
    [
        (_csv(ROWS), "csv"),
        (_csv(ROWS, "\t"), "csv"),
        (_csv(ROWS, encoding="utf-8-sig"), "csv"),
        (_jsonl(*(dict(zip(ROWS[0], row, strict=True)) for row in ROWS[1:])), "jsonl"),
        (b"\n".join(_jsonl(dict(zip(ROWS[0], row, strict=True))) + b"\r\n" for row in ROWS[1:]), "jsonl"),
    ],
)
def test_lines_of_texts(tmp_path: Path, content: bytes, format: str) -> None:
    """CSV and JSON lines give the same texts, labels and splits."""
    dataset = _open(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == (format, "texts", ["neg", "pos"])
    assert dataset.split is not None
    assert (_labels(dataset), dataset.split.tolist()) == ([1, 0, 1], [0, 1, 1])
    assert [text.decode().replace("\r\n", "\n") for text in _contents(dataset)] == [row[0] for row in ROWS[1:]]
    assert _contents(dataset, [1]) == ["Größe ✓".encode()]


def _texts_of(content: bytes, folder: Path, columns: Mapping[str, str | None] | None = None) -> list[str]:
    """Texts as the API finds them, and as a worker does by the columns that the API found."""
    dataset = _open(content, folder, columns=columns)
    again = _open(content, folder, columns=dataset.columns)
    assert (again.columns, _contents(again)) == (dataset.columns, _contents(dataset))
    assert (dataset.labels is None) == (again.labels is None)
    return [text.decode() for text in _contents(dataset)]


@pytest.mark.parametrize(
    ("content", "columns", "texts"),
    [
        (b'"text, raw";label\nhello;0\nbye;1\n', {"text": "text, raw"}, ["hello", "bye"]),
        (b"text\tlabel\tnote, free\nhello\t0\tx\nbye\t1\ty\n", None, ["hello", "bye"]),
        (b'\xef\xbb\xbf"text";"label"\r\n"a, b";0\r\n"c; d";1\r\n', None, ["a, b", "c; d"]),
        (b'"my\ntext",label\n"a\nb",0\nc,1\n', {"text": "my\ntext"}, ["a\nb", "c"]),
        (b'label;"text,\n""raw"""\n0;a\n1;b,c\n', {"text": 'text,\n"raw"'}, ["a", "b,c"]),
        (b'text, label\nhello, 0\n"bye, you", 1\n', None, ["hello", "bye, you"]),
        (b'text, label\nhello, 0\n"bye, you", 1\n', {"label": " label"}, ["hello", "bye, you"]),
        (b"text|label|a,b|c;d\nhello, you; there|0|x|y\nbye|1|x|y\n", None, ["hello, you; there", "bye"]),
        (b"text;label;a,b\n1,5;0;x\n2,5;1;y\n", None, ["1,5", "2,5"]),
        (b"a,b;text,c;label\nx,y;u,v;0\nx,y;w,z;1\n", {"text": "text,c"}, ["u,v", "w,z"]),
        (b"\r\n\r\ntext,label\rhello,0\r\rbye,1\r", None, ["hello", "bye"]),
        (b",text,label\n0,hello,0\n1,bye,1\n", None, ["hello", "bye"]),
        (b"text\nhello\nbye\n", None, ["hello", "bye"]),
        (b'"text"\n"hello, you"\nbye; all\n', None, ["hello, you", "bye; all"]),
    ],
)
def test_fields_are_told_apart_as_csv_has_it(
    tmp_path: Path, content: bytes, columns: dict[str, str | None] | None, texts: list[str]
) -> None:
    """Delimiters and line breaks in quotes, in the header too, are none; white space after one may be nothing."""
    assert _texts_of(content, tmp_path, columns) == texts


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_a_long_file_of_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    """More than is looked at to find the delimiter, with all of them in names and texts."""
    texts = [f"{i}, a; b\t|c{'x' * 500}\n" for i in range(1000)]
    rows = [["a,b;c\td|e", "text", "label"], *([str(i), text, str(i % 2)] for i, text in enumerate(texts))]
    assert [text.replace("\r\n", "\n") for text in _texts_of(_csv(rows, delimiter), tmp_path)] == texts


def test_labels_that_are_integers(tmp_path: Path) -> None:
    """In JSON as numbers, in CSV as the texts of numbers."""
    assert _labels(_open(_jsonl({"text": "a", "label": 2}, {"text": "b", "label": 0}), tmp_path)) == [2, 0]
    dataset = _open(_csv([["sentence", "labels"], ["a", "2"], ["b", "0"]]), tmp_path)
    assert (_labels(dataset), dataset.class_names) == ([2, 0], None)


def test_white_space_is_no_part_of_a_label(tmp_path: Path) -> None:
    """Or 10 would come before 2, and a class would be there twice."""
    rows = "".join(f"t, {number}\n" for number in range(12))
    dataset = _open(f"text,label\n{rows}".encode(), tmp_path)
    assert (_labels(dataset), dataset.class_names) == (list(range(12)), None)
    assert _open(b"text,label\na,pos \nb,neg\nc, pos\n", tmp_path).class_names == ["neg", "pos"]
    assert _labels(_open(parquet({"text": ["a", "b", "c"], "label": [" 10", "9", "10 "]}), tmp_path)) == [
        10,
        9,
        10,
    ]


A, B = {"text": "a", "label": "x"}, {"text": "b", "label": "y"}
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no such column": (_csv([["words", "label"], ["a", "x"]]), "'words', 'label'"),
    "no labels": (_jsonl({"text": "a", "klass": 1}), "'text', 'klass'"),
    "a label is missing": (_csv([["text", "label"], ["a", "x"], ["b", ""]]), "Row 1 has no label"),
    "a label is missing in JSON": (_jsonl(A, {"text": "b"}), "Row 1 has no label"),
    "a label that is a list": (_jsonl(A, {"text": "b", "label": [1]}), "row 1"),
    "labels of both kinds": (_jsonl({"text": "a", "label": 1}, B), "row 1 is 'y'; those of other rows are numbers"),
    "labels of both kinds, names first": (_jsonl(A, {"text": "a", "label": 1}), "names"),
    "a text is missing": (_jsonl(A, {"label": "y"}), "Row 1 has no text"),
    "a text is a number": (_jsonl(A, {"text": 3, "label": "y"}), "Row 1 has no text, but a number"),
    "half of a pair in a label": (b'{"text": "a", "label": "\\ud800"}', "surrogate"),
    "half of a pair in a column": (b'{"\\ud800": "a", "label": "b"}', "'?'"),
    "half of a pair": (b'{"text": "\\ud800", "label": 1}', "row 0"),
    "an unknown split": (_jsonl({**A, "split": "x"}), "'x'"),
    "fields too few": (b"text,label\na,x\nb\n", "Row 1 (line 3) has 1 fields"),
    "texts without quotes": (b"text\nhello, you\nbye\n", "Row 0 (line 2) has 2 fields; the header has 1, with ','"),
    "a field too long": (_csv([["text", "label"], ["a" * 131_073, "x"]]), "131072"),
    "a line too long": (b"text,label\n" + b"a" * (2**20 + 1), "Line 2"),
    "a quote that is not closed": (b'text,label\n"a,x\n', "malformed"),
    "a name twice": (b"text,label,label\na,b,c", "each once"),
    "not UTF-8": (b"text,label\ncaf\xe9,x\n", "UTF-8"),
    "not JSON": (b'{"text": "a", "label": 1}\n{"text": ', "Row 1 (line 2)"),
    "not objects": (b'{"text": "a", "label": 1}\n[1]', "Row 1 (line 2)"),
    "no rows": (b"text,label\n", "no rows"),
    "a label of white space": (b"text,label\na,x\nb,  \n", "Row 1 has no label"),
    "labels with fractions": (b"text,label\na,0.0\nb,10.5\nc,2.0\n", "row 1 is '10.5'"),
    "a number that is missing": (b"text,label\na,0.0\nb,nan\nc,2.0\n", "row 1 is 'nan'"),
    "a number that ran over": (b"text,label\na,0\nb,1e999\n", "row 1 is '1e999'"),
    "a number of too many bits": (_jsonl({**A, "label": 1}, {**B, "label": 2**63}), "row 1 is '9223372036854775808'"),
    "a fraction in JSON": (_jsonl({**A, "label": 1.0}, {**B, "label": 1.5}), "row 1 is '1.5'"),
    "truth among numbers": (_jsonl({**A, "label": 1}, {**B, "label": True}), "those of other rows are numbers"),
    "NaN": (b'{"text": "a", "label": 1}\n{"text": "b", "label": NaN}', "Row 1 (line 2) is not JSON: NaN is none"),
    "Infinity": (b'{"text": "a", "label": 1, "x": [-Infinity]}', "-Infinity is none"),
    "an array of JSON": (json.dumps([A, B], indent=1).encode(), "is an array of JSON"),
    "arrays of JSON": (b'["text", "label"]\n["a", "x"]', "is an array of JSON"),
    "an array in a line": (b'{"text": "a", "label": 1}\n[1]', "but an array"),
    "an object over several lines": (json.dumps(A, indent=1).encode(), "Each line holds one whole object"),
    "columns in an object": (_jsonl({"text": {"0": "a"}, "label": {"0": 1}}), "row 0"),
    "a header without end": (b"text,label," + b'"\n",' * 2**19, "The header has more than 1048576"),
    "a row of endless fields": (b"text,label\na,b\n" + b'"\n",' * 2**19, "Row 1 has more than 1048576"),
    "splits that begin late": (_jsonl(A, {**B, "split": "test"}), "Row 1 has a 'split'"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_refused(tmp_path: Path, case: str) -> None:
    """By row, counted from 0, and by line where that is another number."""
    content, word = BAD_LINES[case]
    assert word in _refused(content, tmp_path).detail


def test_lines_over_the_limits_are_refused(tmp_path: Path) -> None:
    """Rows, and bytes of the file."""
    assert "rows" in _refused(_jsonl(A, B), tmp_path, replace(LIMITS, rows=1)).detail
    assert "bytes" in _refused(_jsonl(A, B), tmp_path, replace(LIMITS, text_bytes=10)).detail


def _csv_of(columns: Mapping[str, list[str]]) -> bytes:
    return _csv([list(columns), *map(list, zip(*columns.values(), strict=True))])


def _jsonl_of(columns: Mapping[str, list[str]]) -> bytes:
    return _jsonl(*(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)))


@pytest.mark.parametrize("write", [_csv_of, _jsonl_of, parquet])
def test_texts_without_labels(write: Callable[[dict[str, list[str]]], bytes], tmp_path: Path) -> None:
    """Where nothing beside texts and splits is there, or null says that nothing of it is a label; read again alike."""
    texts = ["a b", "c"]
    for content, named in (
        (write({"text": texts}), None),
        (write({"text": texts, "split": ["train", "test"]}), None),
        (write({"text": texts, "label": ["x", "y"], "url": ["u", "v"]}), {"label": None}),
        (write({"body": texts, "url": ["u", "v"]}), {"text": "body", "label": None}),
    ):
        dataset = _open(content, tmp_path, columns=named)
        again = _open(content, tmp_path, columns=dataset.columns)
        for found in (dataset, again):
            assert (found.labels, found.class_names, found.n_rows) == (None, None, 2)
            assert found.columns is not None
            assert found.columns["label"] is None
            assert _contents(found) == [b"a b", b"c"]
    told = _refused(write({"text": texts, "url": ["u", "v"]}), tmp_path)
    assert '"columns": {"label": null}' in told.detail
    assert told.members["columns"] == ["text", "url"]


def test_images_need_labels(tmp_path: Path) -> None:
    """Null names no column for them."""
    content = parquet({"image": image_column([IMAGE]), "label": [0]})
    assert "no column of labels" in _refused(content, tmp_path, label=None, image="image").detail

"""Untrusted Parquet, in one file and in several: valid content and refusals."""

import io
import struct
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.app.files.datasets import IMAGE, LIMITS, PICTURES, contents_of, labels_of, opened, refused
from tests.datafiles import image_column, parquet, zipped


@pytest.mark.parametrize("rows_a_group", [1, 2, 100])
def test_parquet_of_hugging_face(tmp_path: Path, rows_a_group: int) -> None:
    """Images in a struct, class names in the schema and a column of splits are read; any rows, in rising order."""
    content = parquet(
        {
            "img": image_column(PICTURES, [f"{i}.png" for i in range(6)]),
            "fine_label": [0, 2, 1, 0, 2, 1],
            "split": ["train", "train", "validation", "test", "train", "train"],
        },
        names={"fine_label": ["cat", "dog", "eel"]},
        row_group_size=rows_a_group,
    )
    dataset = opened(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == ("parquet", "images", ["cat", "dog", "eel"])
    assert dataset.columns == {"image": "img", "label": "fine_label", "split": "split"}
    assert labels_of(dataset) == [0, 2, 1, 0, 2, 1]
    assert dataset.split is not None
    assert dataset.split.tolist() == [0, 0, 1, 1, 0, 0]
    assert list(dataset.read(range(6))) == [(f"{i}.png", PICTURES[i]) for i in range(6)]
    assert contents_of(dataset, [1, 4, 5]) == [PICTURES[1], PICTURES[4], PICTURES[5]]


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
    """Names become their places in sorted order; names that are integers become those integers."""
    dataset = opened(parquet({"text": ["a", "b", "c"], "label": labels}), tmp_path)
    assert labels_of(dataset) == expected
    assert dataset.class_names == names
    assert contents_of(dataset) == [b"a", b"b", b"c"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    """Plain bytes are images too; with images and texts in one file the spec chooses."""
    content = parquet({"photo": PICTURES, "caption": list("abcdef"), "species": [0, 1] * 3})
    dataset = opened(content, tmp_path, columns={"image": "photo", "label": "species"})
    assert (dataset.content, contents_of(dataset)) == ("images", PICTURES)
    dataset = opened(content, tmp_path, columns={"text": "caption", "label": "species"})
    assert (dataset.content, contents_of(dataset)) == ("texts", [b"a", b"b", b"c", b"d", b"e", b"f"])


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
    """A missing value is named by column or row, and a missing column with the existing ones."""
    make, word = BAD_PARQUET[case]
    assert word in refused(make(), tmp_path).detail


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    """A missing column in the spec is a problem that lists the columns."""
    error = refused(parquet({"photo": PICTURES[:2], "label": [0, 1]}), tmp_path, image="foto")
    assert error.members["columns"] == ["photo", "label"]
    assert "'foto'" in error.detail


def test_parquet_over_the_limits_is_refused(tmp_path: Path) -> None:
    """Rows, bytes and ratio are checked from the footer; one text repeated a million times is stored once."""
    small = parquet(TWO)
    assert "2 rows" in refused(small, tmp_path, replace(LIMITS, rows=1)).detail
    assert "unpack" in refused(small, tmp_path, replace(LIMITS, unpacked_bytes=100)).detail
    bomb = parquet({"text": ["a" * 100_000] * 500, "label": [0, 1] * 250}, use_dictionary=False, compression="zstd")
    assert "times its size" in refused(bomb, tmp_path).detail
    assert "texts may have" in refused(bomb, tmp_path, replace(LIMITS, ratio=1e9, text_bytes=10**6)).detail


def test_rows_are_counted_where_they_are_read_by(tmp_path: Path) -> None:
    """Rows are counted by the row groups: a footer that says 3 instead of 50,000 does not bypass the limit."""
    content = parquet({"text": ["a"] * 50_000, "label": [0, 1] * 25_000})
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    # Twice the number in groups of 7 bits: the first such one in the footer is its own.
    at = content.index(bytes((0xA0, 0x8D, 0x06)), footer)
    few = content[:at] + bytes((0x86, 0x80, 0x00)) + content[at + 3 :]
    assert pq.ParquetFile(io.BytesIO(few)).metadata.num_rows == 3
    assert "50000 rows" in refused(few, tmp_path, replace(LIMITS, rows=1000)).detail


def test_a_long_split_is_unpacked_once(tmp_path: Path) -> None:
    """A split's name, stored once in the file, is decoded once for all rows: copies for each would be 6.5 GB."""
    n = 65_536
    split = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x" * 100_000]))
    content = parquet({"text": ["a"] * n, "label": np.arange(n) % 2, "split": split}, store_schema=False)
    assert len(content) < 10_000
    started = time.monotonic()
    assert "The split of row 0" in refused(content, tmp_path).detail
    assert time.monotonic() - started < 2


def test_names_with_dots(tmp_path: Path) -> None:
    """Names with dots are columns like others, and their bytes count."""
    content = parquet({"label.raw": [5, 6], "label": [1, 0], "my.text": ["a" * 1000, "b" * 1000]}, compression="none")
    columns = {"text": "my.text"}
    assert labels_of(opened(content, tmp_path, columns=columns)) == [1, 0]
    assert "texts may have" in refused(content, tmp_path, replace(LIMITS, text_bytes=1000), **columns).detail
    names = parquet({"text": ["a", "b"], "label": ["a" * 150, "b" * 150]}, compression="none")
    assert "'label'" in refused(names, tmp_path, replace(LIMITS, text_bytes=200)).detail


def _shard(first: int, labels: Sequence[Any], names: list[str] | None = None, **options: Any) -> bytes:
    columns = {"image": image_column(PICTURES[first : first + len(labels)]), "label": labels}
    return parquet(columns, names=None if names is None else {"label": names}, **options)


@pytest.mark.parametrize("prefix", ["", "data/", "pets/plain/"])
def test_shards_are_one_dataset(tmp_path: Path, prefix: str) -> None:
    """Shards as Hugging Face's `datasets` writes them are read in the order of their names, which give the splits."""
    files = {
        "train-00001-of-00002.parquet": _shard(2, ["dog", "ant"], row_group_size=1),
        "validation-00000-of-00001.parquet": _shard(4, ["cat", "ant"]),
        "train-00000-of-00002.parquet": _shard(0, ["cat", "dog"]),
    }
    content = zipped({**{prefix + name: file for name, file in files.items()}, "README.md": b"a", ".DS_Store": b"b"})
    dataset = opened(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == ("parquet", "images", ["ant", "cat", "dog"])
    assert labels_of(dataset) == [1, 2, 2, 0, 1, 0]
    assert dataset.split is not None
    assert dataset.split.tolist() == [0, 0, 0, 0, 1, 1]
    assert contents_of(dataset) == PICTURES
    assert contents_of(dataset, [1, 3, 4]) == [PICTURES[1], PICTURES[3], PICTURES[4]]


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
    """A shard's name or its folder gives the split; otherwise there is none, and a column precedes names."""
    dataset = opened(zipped({name: _shard(0, [0, 1], ["a", "b"]) for name in names}), tmp_path)
    assert (dataset.split if dataset.split is None else dataset.split.tolist()) == split
    column = parquet({"text": ["a", "b"], "label": [0, 1], "split": ["test", "train"]})
    dataset = opened(zipped(dict.fromkeys(names, column)), tmp_path)
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
    """Shards that differ are refused by file; rows are counted through all of them."""
    make, word = BAD_SHARDS[case]
    assert word in refused(make(), tmp_path).detail


def test_shards_over_the_limits_are_refused(tmp_path: Path) -> None:
    """The limits apply to the sum of all shards."""
    content = zipped(SHARDS)
    assert "4 rows" in refused(content, tmp_path, replace(LIMITS, rows=3)).detail
    assert "unpack" in refused(content, tmp_path, replace(LIMITS, unpacked_bytes=1000)).detail
    assert "lists 2 files" in refused(content, tmp_path, replace(LIMITS, members=1)).detail

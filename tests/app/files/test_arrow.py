"""Parquet columns in every form that Arrow has for one value."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from app.errors import InvalidFile
from app.files import probedata
from app.files.datafile import Dataset, Limits, arrow, open_dataset
from app.schemas import ProbeSpec
from app.settings import Settings
from tests.datafiles import encoded, parquet, picture, saved, zipped

NAMES = ["dog", "cat", "dog"]
IMAGES = [encoded(picture(0, 6, 5)), encoded(picture(1, 6, 5)), encoded(picture(0, 6, 5))]
SAME_LENGTH = max(map(len, IMAGES))


def _opened(content: bytes, folder: Path) -> Dataset:
    return open_dataset(saved(content, folder), "parquet", Limits.of(Settings()))


def _in_dictionary(values: pa.Array, index: pa.DataType | None = None) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], index or pa.int32()), values.take(pa.array([1, 0])))


def _as(type_: pa.DataType, words: list[str] | None = None) -> pa.Array:
    words = NAMES if words is None else words
    return pa.array([word.encode() for word in words] if arrow.holds(type_) == "bytes" else words, type_)


def _extension(storage: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.opaque(storage.type, "word", "somebody"), storage)


# The forms of three words, of which the first and the third are the same.
TEXTS: dict[str, Callable[[list[str]], pa.Array]] = {
    "string": partial(_as, pa.string()),
    "large string": partial(_as, pa.large_string()),
    "string view": partial(_as, pa.string_view()),
    "binary": partial(_as, pa.binary()),
    "large binary": partial(_as, pa.large_binary()),
    "binary view": partial(_as, pa.binary_view()),
    "binary of one length": partial(_as, pa.binary(3)),
    "bytes in lists": lambda words: pa.array([list(word.encode()) for word in words], pa.list_(pa.uint8())),
    "dictionary": lambda words: _in_dictionary(_as(pa.string(), words)),
    "dictionary of large strings": lambda words: _in_dictionary(_as(pa.large_string(), words), pa.uint8()),
    "dictionary of binary": lambda words: _in_dictionary(_as(pa.binary(), words)),
    "dictionary of large binary": lambda words: _in_dictionary(_as(pa.large_binary(), words), pa.int64()),
    "extension": lambda words: _extension(_as(pa.string(), words)),
    "extension of a view": lambda words: _extension(_as(pa.string_view(), words)),
    "json": lambda words: pa.ExtensionArray.from_storage(pa.json_(pa.string()), _as(pa.string(), words)),
}


@pytest.mark.parametrize("form", TEXTS)
def test_labels_splits_and_texts_in_every_form(form: str, tmp_path: Path) -> None:
    """A name is read alike from Polars, DataFusion, arrow-rs, Spark and pandas."""
    write = TEXTS[form]
    dataset = _opened(parquet({"text": write(NAMES), "label": write(NAMES)}), tmp_path)
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.class_names) == ([1, 0, 1], ["cat", "dog"])
    assert [content for _, content in dataset.read(range(3))] == [b"dog", b"cat", b"dog"]
    dataset = _opened(parquet({"text": NAMES, "label": NAMES, "split": write(["dev", "val", "dev"])}), tmp_path)
    assert dataset.split is not None
    assert dataset.split.tolist() == [1, 1, 1]


IMAGE_FORMS: dict[str, pa.DataType] = {
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
    "binary view": pa.binary_view(),
    "list": pa.list_(pa.uint8()),
    "large list": pa.large_list(pa.uint8()),
    "list view": pa.list_view(pa.uint8()),
    "large list view": pa.large_list_view(pa.uint8()),
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
@pytest.mark.parametrize("nested", [False, True])
def test_images_in_every_form(form: str, nested: bool, tmp_path: Path) -> None:
    """Bytes, alone or beside a path, are an image."""
    type_ = IMAGE_FORMS[form]
    values = [list(image) for image in IMAGES] if "list" in form else IMAGES
    column = pa.array(values, type_)
    if nested:
        column = pa.StructArray.from_arrays([column, _as(pa.string_view())], ["bytes", "path"])
    dataset = _opened(parquet({"image": column, "label": NAMES}), tmp_path)
    names = NAMES if nested else [""] * 3
    assert list(dataset.read(range(3))) == list(zip(names, IMAGES, strict=True))


def test_images_in_dictionaries_and_of_one_length(tmp_path: Path) -> None:
    """Images may be stored once each, alone or in a struct, as signed bytes, or padded to one length."""
    signed = pa.array([[byte - 256 if byte > 127 else byte for byte in image] for image in IMAGES], pa.list_(pa.int8()))
    padded = [image.ljust(SAME_LENGTH, b"\0") for image in IMAGES]
    for column, expected in (
        (_in_dictionary(pa.array(IMAGES)), IMAGES),
        (pa.StructArray.from_arrays([_in_dictionary(pa.array(IMAGES))], ["bytes"]), IMAGES),
        (signed, IMAGES),
        (pa.array(padded, pa.binary(SAME_LENGTH)), padded),
    ):
        dataset = _opened(parquet({"image": column, "label": NAMES}), tmp_path)
        assert [content for _, content in dataset.read(range(3))] == expected


def _claiming(table: pa.Table, claimed: pa.Schema) -> bytes:
    """Return a file whose Arrow schema another writer has left."""
    buffer = io.BytesIO()
    schema = base64.b64encode(claimed.serialize().to_pybytes())
    pq.write_table(table.replace_schema_metadata({"ARROW:schema": schema}), buffer, store_schema=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "claimed",
    [
        pa.dictionary(pa.uint32(), pa.string_view()),
        pa.dictionary(pa.int16(), pa.large_string()),
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.run_end_encoded(pa.int16(), pa.string_view()),
        pa.string_view(),
    ],
    ids=str,
)
def test_forms_that_pyarrow_reads_and_does_not_write(claimed: pa.DataType, tmp_path: Path) -> None:
    """A schema of arrow-rs or Polars that declares more than the columns gives the same values."""
    content = _claiming(pa.table({"text": NAMES, "label": NAMES}), pa.schema({"text": claimed, "label": claimed}))
    dataset = _opened(content, tmp_path)
    assert dataset.class_names == ["cat", "dog"]
    assert [content for _, content in dataset.read([1, 2])] == [b"cat", b"dog"]


@pytest.mark.parametrize("index", [pa.int16(), pa.int32(), pa.int64()])
def test_runs_are_taken_apart(index: pa.DataType) -> None:
    """Run-end encoded arrays of any type expand to their rows."""
    for values, expected in ((_as(pa.string()), NAMES), (_as(pa.binary()), [name.encode() for name in NAMES])):
        places, found = arrow.distinct(pc.run_end_encode(values, run_end_type=index))
        assert [found[place] for place in places] == expected
    assert arrow.numeric(pc.run_end_encode(pa.array([2, 2, 5]))).tolist() == [2, 2, 5]
    assert arrow.holds(pa.run_end_encoded(index, pa.dictionary(pa.int8(), pa.binary_view()))) == "bytes"


def test_files_of_one_dataset_may_have_other_forms(tmp_path: Path) -> None:
    """Files of one dataset may differ in form: strings, dictionaries, numbers of other widths hold equal values."""
    forms: list[tuple[pa.Array, pa.Array]] = [
        (_as(pa.string_view()), pa.array([0, 1, 0], pa.int8())),
        (_in_dictionary(_as(pa.string())), pa.array([0.0, 1.0, 0.0])),
        (_as(pa.large_binary()), pa.array([0, 1, 0], pa.uint64())),
    ]
    names = zipped({f"{i}.parquet": parquet({"text": names, "label": names}) for i, (names, _) in enumerate(forms)})
    dataset = _opened(names, tmp_path)
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.class_names) == ([1, 0, 1] * 3, ["cat", "dog"])
    numbers = zipped(
        {f"{i}.parquet": parquet({"text": names, "label": labels}) for i, (names, labels) in enumerate(forms)}
    )
    dataset = _opened(numbers, tmp_path)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 0] * 3


@pytest.mark.parametrize(
    ("column", "word"),
    [
        (pa.array([{"a": 1}] * 3), "struct<"),
        (pa.array([["x"]] * 3), "list<"),
        (pa.array([[1, 2]] * 3, pa.list_(pa.int64())), "list<"),
        (pa.array([1, 2, 3], pa.timestamp("us")), "timestamp"),
        (pa.nulls(3), "no value"),
    ],
)
@pytest.mark.parametrize("role", ["label", "split"])
def test_what_is_neither_is_refused(column: pa.Array, word: str, role: str, tmp_path: Path) -> None:
    """A column of another type is refused by its type, before a row is read."""
    columns: dict[str, Any] = {"text": NAMES, "label": NAMES, role: column}
    with pytest.raises(InvalidFile) as raised:
        _opened(parquet(columns), tmp_path)
    assert word in raised.value.detail


# --- what ends the process that reads it ----------------------------------------------------------------------------


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    """The process that inspects a file has its own memory limit, and reports a file that exceeds it."""
    columns = {"text": pa.array(["a"]).take(pa.array([0] * 10**6)), "label": pa.array(range(10**6))}
    path = saved(parquet(columns), tmp_path)
    task = {"path": str(path), "spec": {"name": "a"}, "limits": asdict(Limits.of(Settings()))}
    child = "from app.files import probedata; probedata._READING_BYTES = 5 * 2**20; probedata.main()"
    ran = subprocess.run(
        [sys.executable, "-c", child], input=json.dumps(task).encode(), capture_output=True, check=True, timeout=60
    )
    answer = json.loads(ran.stdout)
    assert (answer["error"], ran.stderr) == ("invalid-file", b"")
    assert "takes more memory to read than there is" in answer["detail"]


def test_an_error_that_nobody_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown error is a problem of the file, with its traceback in the log; here the file is a folder."""
    with pytest.raises(InvalidFile, match="an error that Parquet's reader does not know"):
        probedata._in_another_process(tmp_path, ProbeSpec(name="a"), Limits.of(Settings()))
    assert "IsADirectoryError" in caplog.text

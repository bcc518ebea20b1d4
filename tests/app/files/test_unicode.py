"""Decomposed names of a Mac and composed names of Linux are the same names in sorting, comparisons and counts."""

import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import pytest

from app.descriptions.labels import LabelMap, match_labels, name_classes, named_labels
from app.errors import InvalidFile, InvalidRequest
from app.files.datafile import Dataset, Limits, detect, open_dataset
from app.schemas import ProbeSpec
from app.settings import Settings
from interplay.folders import zipped_folder
from tests.datafiles import encoded, parquet, picture, saved, zipped

IMAGE = encoded(picture(0, 6, 5))
# Decomposed, the first would sort before the others.
NAMES = ["épée", "fox", "zebra"]
SORTED = ["fox", "zebra", "épée"]
Form = Literal["NFC", "NFD"]
FORMS: tuple[Form, Form] = ("NFC", "NFD")


def _opened(content: bytes, folder: Path, columns: dict[str, str | None] | None = None) -> Dataset:
    path, limits = saved(content, folder), Limits.of(Settings())
    format = detect(path, limits)
    assert format is not None
    return open_dataset(path, format, limits, columns)


def _counts(dataset: Dataset) -> list[int]:
    assert dataset.labels is not None
    return [int(count) for count in np.bincount(dataset.labels)]


@pytest.mark.parametrize("train", FORMS)
@pytest.mark.parametrize("test", FORMS)
@pytest.mark.parametrize("prefix", ["", "Größe/"])
def test_class_folders_of_two_splits(train: Form, test: Form, prefix: str, tmp_path: Path) -> None:
    """Three classes stay three, in one order, whichever form each split's folders have."""
    files = {normalize(train, f"{prefix}train/{name}/{i}.png"): IMAGE for name in NAMES for i in range(2)}
    files |= {normalize(test, f"{prefix}test/{name}/{i}.png"): IMAGE for name in NAMES for i in range(2)}
    files |= {normalize(test, f"{prefix}train/{name}/"): b"" for name in NAMES}
    dataset = _opened(zipped(files), tmp_path)
    assert (dataset.class_names, _counts(dataset)) == (SORTED, [4, 4, 4])
    assert dataset.split is not None
    assert dataset.split.tolist() == [0, 0, 1, 1] * 3
    assert [name for name, _ in dataset.read([8])] == [normalize("NFC", f"{prefix}train/épée/0.png")]


def test_two_folders_of_one_class(tmp_path: Path) -> None:
    """Within a split two forms of a folder are one class, unless two of their files have the same name."""
    files = {f"fox/{i}.png": IMAGE for i in range(2)}
    files |= {normalize(form, f"épée/{i}.png"): IMAGE for i, form in enumerate(FORMS)}
    dataset = _opened(zipped(files), tmp_path)
    assert (dataset.class_names, _counts(dataset)) == (["fox", "épée"], [2, 2])
    files |= {normalize(form, "épée/3.png"): IMAGE for form in FORMS}
    with pytest.raises(InvalidFile, match=r"two files of the same name, in two spellings of Unicode: 'épée/3.png'"):
        _opened(zipped(files), tmp_path)


@pytest.mark.parametrize("kind", ["flag", "no flag", "extra field"])
def test_names_of_zips_are_what_was_meant(kind: str, tmp_path: Path) -> None:
    """Names are decoded with the UTF-8 flag, without it, and with Info-ZIP's field beside another encoding."""
    names = {f"{name}/{i}.png": IMAGE for name in NAMES for i in range(2)}
    content = zipped(names)
    if kind != "flag":
        content = _unflagged(names, extra=kind == "extra field")
    dataset = _opened(content, tmp_path)
    assert (dataset.class_names, _counts(dataset)) == (SORTED, [2, 2, 2])
    assert [content for _, content in dataset.read(range(6))] == [IMAGE] * 6


def test_names_of_dos_stay_what_they_are(tmp_path: Path) -> None:
    """Names that are neither valid UTF-8 nor marked as UTF-8 are decoded as cp437."""
    files = {"fox/1.png": IMAGE, "épée/1.png": IMAGE}
    raw = {name: name.encode("cp437") for name in files}
    dataset = _opened(_with_raw_names(files, raw, {}), tmp_path)
    assert dataset.class_names == ["fox", "épée"]


def _unflagged(files: dict[str, bytes], *, extra: bool) -> bytes:
    raw = {name: name.encode("latin-1") if extra else normalize("NFD", name).encode() for name in files}
    fields = {}
    for name in files if extra else ():
        field = b"\x01" + struct.pack("<L", zlib.crc32(raw[name])) + name.encode()
        fields[name] = struct.pack("<HHB", 0x5455, 1, 0) + struct.pack("<HH", 0x7075, len(field)) + field
    return _with_raw_names(files, raw, fields)


def _with_raw_names(files: dict[str, bytes], raw: dict[str, bytes], extra: dict[str, bytes]) -> bytes:
    """Return a stored zip with these bytes as names and without the UTF-8 flag."""
    body, listed = b"", b""
    for name, content in files.items():
        field = extra.get(name, b"")
        common = struct.pack(
            "<HHHHHLLLHH", 20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), len(raw[name]), len(field)
        )
        listed += b"PK\x01\x02\x14\x03" + common + struct.pack("<HHHLL", 0, 0, 0, 0, len(body)) + raw[name] + field
        body += b"PK\x03\x04" + common + raw[name] + field + content
    end = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, len(files), len(files), len(listed), len(body), 0)
    return body + listed + end


def test_labels_in_tables_and_lines(tmp_path: Path) -> None:
    """A class in two forms in one column is one class; so are a column's name and a ClassLabel."""
    labels = [normalize(form, name) for name in NAMES for form in FORMS]
    column = normalize("NFD", "Größe")
    rows = [{"text": f"t{i}", (column if i % 2 else "Größe"): label} for i, label in enumerate(labels)]
    lines = f"text,{column}\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels))
    shards = {
        f"{i}.parquet": parquet({"text": ["a", "b"] * 3, normalize(form, "Größe"): labels})
        for i, form in enumerate(FORMS)
    }
    for content, times in (
        (lines.encode(), 1),
        ("\n".join(map(json.dumps, rows)).encode(), 1),
        ("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(), 1),
        (parquet({"text": ["a", "b"] * 3, column: labels}), 1),
        (zipped(shards), 2),
    ):
        for named in ("Größe", column):
            dataset = _opened(content, tmp_path, {"label": named})
            assert (dataset.class_names, _counts(dataset)) == (SORTED, [2 * times] * 3)
            assert dataset.columns is not None
            assert dataset.columns["label"] == "Größe"
            assert len(list(dataset.read(range(dataset.n_rows)))) == 6 * times
    named_by_schema = parquet({"text": ["a", "b"], column: [0, 1]}, names={column: [normalize("NFD", "é"), "b"]})
    assert _opened(named_by_schema, tmp_path, {"label": "Größe"}).class_names == ["é", "b"]


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    """Two columns, or two classes of a schema, that differ only in their bytes are refused."""
    twice: dict[str, list[Any]] = {"text": ["a", "b"], **{normalize(form, "é"): [0, 1] for form in FORMS}}
    row = json.dumps({name: values[0] for name, values in twice.items()})
    header = ",".join(twice)
    for content in (parquet(twice), row.encode(), f"{header}\na,0,1\n".encode()):
        with pytest.raises(InvalidFile, match=r"twice|each once"):
            _opened(content, tmp_path, {"label": "é"})
    classes = [normalize(form, "é") for form in FORMS]
    with pytest.raises(InvalidFile, match="each once"):
        _opened(parquet({"text": ["a", "b"], "label": [0, 1]}, names={"label": classes}), tmp_path)


def test_class_names_and_those_of_a_checkpoint() -> None:
    """Names of a spec, a file and an id2label match in either form and any case."""
    decomposed = [normalize("NFD", name) for name in NAMES]
    assert ProbeSpec(name="a", class_names=decomposed).class_names == NAMES

    def architecture(names: list[str]) -> dict[str, Any]:
        return {"family": "transformers", "config": {"id2label": {str(i): name for i, name in enumerate(names)}}}

    for mine, theirs in ((decomposed, NAMES), (NAMES, decomposed)):
        assert match_labels(mine, architecture(theirs)) == LabelMap("name", None)
        assert match_labels(mine, architecture(theirs[::-1])) == LabelMap("name", [2, 1, 0])
        upper = [name.upper() for name in theirs]
        assert match_labels(mine, architecture(upper)) == LabelMap("name_ignoring_case", None)
        assert name_classes(mine, theirs) is None
        assert name_classes(mine, theirs[::-1]) == [2, 1, 0]
    # A probe stored before names were composed keeps its order.
    kept = [normalize("NFD", name) for name in NAMES]
    labels, names = named_labels(np.array([0, 1, 2]), SORTED, kept)
    assert (labels.tolist(), names) == ([1, 2, 0], kept)
    with pytest.raises(InvalidRequest):
        name_classes(NAMES, [*decomposed[:2], "épées"])


def test_a_folder_is_sent_with_composed_names(tmp_path: Path) -> None:
    """A folder is sent with composed names in sorted order: the same list from a Mac and from Linux."""
    lists = []
    for form in FORMS:
        for name in (*NAMES, "empty é"):
            folder = tmp_path / form / normalize(form, name)
            folder.mkdir(parents=True)
            if name in NAMES:
                (folder / normalize(form, "ä.png")).write_bytes(IMAGE)
        with zipped_folder(tmp_path / form) as path, zipfile.ZipFile(path) as archive:
            lists.append(archive.namelist())
    assert lists[0] == lists[1]
    assert set(lists[0]) == {*(f"{name}/ä.png" for name in NAMES), "empty é/"}

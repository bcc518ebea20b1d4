"""Untrusted CSV and JSON lines: valid content and refusals."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.app.files.datasets import IMAGE, LIMITS, contents_of, labels_of, opened, refused
from tests.datafiles import image_column, parquet


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
    dataset = opened(content, tmp_path)
    assert (dataset.format, dataset.content, dataset.class_names) == (format, "texts", ["neg", "pos"])
    assert dataset.split is not None
    assert (labels_of(dataset), dataset.split.tolist()) == ([1, 0, 1], [0, 1, 1])
    assert [text.decode().replace("\r\n", "\n") for text in contents_of(dataset)] == [row[0] for row in ROWS[1:]]
    assert contents_of(dataset, [1]) == ["Größe ✓".encode()]


def _texts_of(content: bytes, folder: Path, columns: Mapping[str, str | None] | None = None) -> list[str]:
    """Return texts as the API finds them, and as a worker reads them with the columns that the API found."""
    dataset = opened(content, folder, columns=columns)
    again = opened(content, folder, columns=dataset.columns)
    assert (again.columns, contents_of(again)) == (dataset.columns, contents_of(dataset))
    assert (dataset.labels is None) == (again.labels is None)
    return [text.decode() for text in contents_of(dataset)]


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
    """Delimiters and line breaks in quotes are content, in the header too; white space after one may be nothing."""
    assert _texts_of(content, tmp_path, columns) == texts


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_a_long_file_of_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    """The delimiter is found in a file longer than the inspected part, with every delimiter in names and texts."""
    texts = [f"{i}, a; b\t|c{'x' * 500}\n" for i in range(1000)]
    rows = [["a,b;c\td|e", "text", "label"], *([str(i), text, str(i % 2)] for i, text in enumerate(texts))]
    assert [text.replace("\r\n", "\n") for text in _texts_of(_csv(rows, delimiter), tmp_path)] == texts


def test_labels_that_are_integers(tmp_path: Path) -> None:
    """Integer labels are numbers in JSON, and texts of numbers in CSV."""
    assert labels_of(opened(_jsonl({"text": "a", "label": 2}, {"text": "b", "label": 0}), tmp_path)) == [2, 0]
    dataset = opened(_csv([["sentence", "labels"], ["a", "2"], ["b", "0"]]), tmp_path)
    assert (labels_of(dataset), dataset.class_names) == ([2, 0], None)


def test_white_space_is_no_part_of_a_label(tmp_path: Path) -> None:
    """White space is not part of a label: otherwise 10 would come before 2, and a class would be there twice."""
    rows = "".join(f"t, {number}\n" for number in range(12))
    dataset = opened(f"text,label\n{rows}".encode(), tmp_path)
    assert (labels_of(dataset), dataset.class_names) == (list(range(12)), None)
    assert opened(b"text,label\na,pos \nb,neg\nc, pos\n", tmp_path).class_names == ["neg", "pos"]
    assert labels_of(opened(parquet({"text": ["a", "b", "c"], "label": [" 10", "9", "10 "]}), tmp_path)) == [
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
    """Invalid lines are refused by row, counted from 0, and by line if that is another number."""
    content, word = BAD_LINES[case]
    assert word in refused(content, tmp_path).detail


def test_lines_over_the_limits_are_refused(tmp_path: Path) -> None:
    """Files over the limits of rows and bytes are refused."""
    assert "rows" in refused(_jsonl(A, B), tmp_path, replace(LIMITS, rows=1)).detail
    assert "bytes" in refused(_jsonl(A, B), tmp_path, replace(LIMITS, text_bytes=10)).detail


def _csv_of(columns: Mapping[str, list[str]]) -> bytes:
    return _csv([list(columns), *map(list, zip(*columns.values(), strict=True))])


def _jsonl_of(columns: Mapping[str, list[str]]) -> bytes:
    return _jsonl(*(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)))


@pytest.mark.parametrize("write", [_csv_of, _jsonl_of, parquet])
def test_texts_without_labels(write: Callable[[dict[str, list[str]]], bytes], tmp_path: Path) -> None:
    """Texts have no labels if only texts and splits exist, or null says so; reading them again gives the same."""
    texts = ["a b", "c"]
    for content, named in (
        (write({"text": texts}), None),
        (write({"text": texts, "split": ["train", "test"]}), None),
        (write({"text": texts, "label": ["x", "y"], "url": ["u", "v"]}), {"label": None}),
        (write({"body": texts, "url": ["u", "v"]}), {"text": "body", "label": None}),
    ):
        dataset = opened(content, tmp_path, columns=named)
        again = opened(content, tmp_path, columns=dataset.columns)
        for found in (dataset, again):
            assert (found.labels, found.class_names, found.n_rows) == (None, None, 2)
            assert found.columns is not None
            assert found.columns["label"] is None
            assert contents_of(found) == [b"a b", b"c"]
    told = refused(write({"text": texts, "url": ["u", "v"]}), tmp_path)
    assert '"columns": {"label": null}' in told.detail
    assert told.members["columns"] == ["text", "url"]


def test_images_need_labels(tmp_path: Path) -> None:
    """Images need labels: null is refused as the name of their column."""
    content = parquet({"image": image_column([IMAGE]), "label": [0]})
    assert "no column of labels" in refused(content, tmp_path, label=None, image="image").detail

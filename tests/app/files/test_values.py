"""Valid labels and splits: the same in every container, at the upload and in the worker."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from analysis.errors import AnalysisError
from analysis.probes.reading import load_probe
from app import schemas
from app.errors import InvalidFile
from app.files import probedata
from app.files.datafile import Limits, detect, open_dataset
from app.files.tensordata import check_labels, split_counts
from app.settings import Settings
from tests.datafiles import parquet, saved
from tests.services import Service

Columns = Mapping[str, torch.Tensor]
N = 12
CLASSES = torch.arange(N) % 2
SPLIT = torch.arange(N) >= 8


def _safetensors(columns: Columns) -> bytes:
    return save({"inputs": torch.arange(3.0 * N).reshape(N, 3), **columns})


def _npz(columns: Columns) -> bytes:
    buffer = io.BytesIO()
    # NumPy has no bfloat16.
    arrays: dict[str, Any] = {
        name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in columns.items()
    }
    np.savez(buffer, inputs=np.arange(3.0 * N).reshape(N, 3), **arrays)
    return buffer.getvalue()


def _rows(columns: Columns) -> list[dict[str, Any]]:
    return [{"text": f"t{row}", **{name: values[row].item() for name, values in columns.items()}} for row in range(N)]


def _csv(columns: Columns) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["text", *columns])
    writer.writeheader()
    writer.writerows(_rows(columns))
    return buffer.getvalue().encode()


def _jsonl(columns: Columns) -> bytes:
    return "\n".join(map(json.dumps, _rows(columns))).encode()


def _parquet(columns: Columns) -> bytes:
    arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in columns.items()}
    return parquet({"text": [f"t{row}" for row in range(N)], **{name: pa.array(a) for name, a in arrays.items()}})


CONTAINERS: dict[str, Callable[[Columns], bytes]] = {
    "safetensors": _safetensors,
    "npz": _npz,
    "parquet": _parquet,
    "csv": _csv,
    "jsonl": _jsonl,
}
DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint64, torch.int8]


def _described(content: bytes, folder: Path) -> dict[str, Any]:
    """Describe a file as an upload does, without the process that inspects Parquet."""
    path, limits = saved(content, folder), Limits.of(Settings())
    format = detect(path, limits)
    if format is None:
        return probedata.describe(path, schemas.ProbeSpec(name="a"), Settings())
    dataset = open_dataset(path, format, limits)
    assert dataset.labels is not None
    check_labels(dataset.labels, None)
    return {
        "class_counts": np.bincount(dataset.labels).tolist(),
        "class_names": dataset.class_names,
        "splits": {} if dataset.split is None else split_counts(dataset.split),
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_labels_and_splits(container: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Booleans and whole floats are accepted as integers in any file, and the worker reads the same."""
    labels = CLASSES.to(dtype)
    if dtype.is_floating_point:
        labels[0] = -0.0
    content = CONTAINERS[container]({"labels": labels, "split": SPLIT.to(dtype)})
    found = _described(content, tmp_path)
    assert (found["class_counts"], found["class_names"]) == ([6, 6], None)
    assert found["splits"] == {"train": 8, "test": 4}
    if container in ("safetensors", "npz"):
        probe = load_probe(saved(content, tmp_path), format=container)  # type: ignore[arg-type]
        assert torch.equal(probe.labels, CLASSES)
        assert probe.split is not None
        assert torch.equal(probe.split, SPLIT.long())


WRONG: dict[str, tuple[torch.Tensor, Sequence[str]]] = {
    "a fraction": (CLASSES + 0.5, ["0.5"]),
    "NaN": (torch.where(torch.arange(N) == 3, torch.nan, CLASSES.double()), ["nan", "NaN"]),
    "infinity": (torch.where(torch.arange(N) == 3, torch.inf, CLASSES.double()), ["inf", "Infinity"]),
    "2^63": (torch.where(torch.arange(N) == 3, 2.0**63, CLASSES.double()), ["9.223372036854776e+18"]),
    "a third split": (torch.arange(N) % 3, ["2", "0..1"]),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["labels", "split"])
def test_what_is_no_whole_number_is_refused_at_the_upload(container: str, case: str, name: str, tmp_path: Path) -> None:
    """A value that is no integer is refused at the upload, with the number; the worker takes what an upload takes."""
    values, words = WRONG[case]
    columns = {"labels": CLASSES, "split": SPLIT, name: values}
    content = CONTAINERS[container](columns)
    if case == "a third split" and name == "labels":
        assert _described(content, tmp_path)["class_counts"] == [4, 4, 4]
        return
    with pytest.raises(InvalidFile) as raised:
        _described(content, tmp_path)
    assert any(word in raised.value.detail for word in words), raised.value.detail
    if container in ("safetensors", "npz"):
        with pytest.raises(AnalysisError):
            load_probe(saved(content, tmp_path), format=container)  # type: ignore[arg-type]


def test_unsigned_numbers_do_not_wrap_around(tmp_path: Path) -> None:
    """2^64 - 1 is not read as -1: the problem names the row and the number."""
    for content in (
        _safetensors({"labels": torch.from_numpy(np.array([0, 2**64 - 1] * 6, np.uint64))}),
        parquet({"text": ["a", "b"], "label": pa.array([0, 2**64 - 1], pa.uint64())}),
    ):
        with pytest.raises(InvalidFile) as raised:
            _described(content, tmp_path)
        assert "is 18446744073709551615 in row 1" in raised.value.detail
        assert raised.value.members == {"row": 1}


@pytest.mark.parametrize(
    ("given", "expected", "names"),
    [
        (["1.0", "0", "1"], [1, 0, 1], None),
        (["True", "false", "true"], [1, 0, 1], None),
        (["true", "false", "mixed"], [2, 0, 1], ["false", "mixed", "true"]),
        (["nan", "inf", "nan"], [1, 0, 1], ["inf", "nan"]),
        (["1", "0", "one"], [1, 0, 2], ["0", "1", "one"]),
        (["-0", "+1", "1e0"], [0, 1, 1], None),
        (["٣", "1", "1"], [1, 0, 0], ["1", "٣"]),
    ],
)
def test_texts_that_spell_numbers(
    given: list[str], expected: list[int], names: list[str] | None, tmp_path: Path
) -> None:
    """Texts are integers if all spell integers, in CSV, JSON lines and Parquet alike; otherwise sorted names."""
    rows = [{"text": f"t{row}", "label": label} for row, label in enumerate(given)]
    lines = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    counts = np.bincount(expected).tolist()
    for content in (
        lines.encode(),
        "\n".join(map(json.dumps, rows)).encode(),
        parquet({"text": ["a", "b", "c"], "label": given}),
    ):
        found = _described(content, tmp_path)
        assert (found["class_counts"], found["class_names"]) == (counts, names)


def test_decimals_are_numbers(tmp_path: Path) -> None:
    """Whole decimals, as databases write them, are numbers."""
    for scale in (0, 2):
        labels = pa.array([0, 1]).cast(pa.decimal128(30, scale))
        found = _described(parquet({"text": ["a", "b"], "label": labels, "split": labels}), tmp_path)
        assert (found["class_counts"], found["splits"]) == ([1, 1], {"train": 1, "test": 1})


def test_a_split_of_truth_can_be_analysed(service: Service) -> None:
    """An accepted probe and feature set with boolean splits and float labels can be analysed."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(3, 8), torch.randn(60, 8)
    labels, split = (torch.arange(60) % 3).float(), torch.arange(60) >= 40
    features = save({"features": inputs, "labels": labels, "head": weight, "split": split})
    response = service.post("/v1/feature-sets", {"name": "truth"}, features)
    assert response.status_code == 201, response.text
    assert response.json()["splits"] == {"train": 40, "test": 20}
    analysis = service.analyze(feature_set_id=response.json()["id"], options={"null_permutations": 0})
    report = service.report(service.wait(analysis["id"]))
    for name, rows in (("train", ~split), ("test", split)):
        loss = torch.nn.functional.cross_entropy((inputs[rows] @ weight.T).double(), labels[rows].long())
        assert report["splits"][name]["loss"] == pytest.approx(float(loss), rel=1e-5)

"""Describe a probe's file: tensors with labels, or a dataset of images or texts.

Sequences of tokens and texts need no labels: causal language models predict the tokens. The file's content decides
whether it holds tensors or a dataset. The spec is checked against the file here.
"""

import json
import logging
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app import schemas
from app.descriptions.labels import named_labels
from app.environment import plain_environment
from app.errors import InvalidFile, InvalidRequest, Unavailable
from app.files import datafile, identity, tensorfile
from app.files.apart import bound_this_process
from app.files.tensordata import (
    Values,
    check_labels,
    read_labels,
    read_splits,
    require_known,
    require_tensor,
    safetensors_values,
    split_counts,
)
from app.settings import Settings

# Beginning of the names of inputs that a network names by itself, as in analysis/probes/inputs.py (a test compares).
OWN_INPUT = "inputs."
# Names under which a probe may hold a network's own inputs in place of `inputs`. The first one that exists, of the
# first two, gives the shape. As in analysis/probes/inputs.py; a test compares them.
INPUT_NAMES = (
    "pixel_values", "input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_attention_mask",
    "spatial_shapes",
)  # fmt: skip
_MAIN_NAMES = ("inputs", "pixel_values", "input_ids")

# A page of Parquet may announce up to 2 GiB, so few files are read at once.
_reading = threading.BoundedSemaphore(2)
_READING_SECONDS = 300
# Enough for a page, its unpacked content, and the labels of all rows.
_READING_BYTES = 4 * 2**30
# The whole file is read: each _BYTES_A_TURN bytes add _READING_SECONDS to the timeout.
_BYTES_A_TURN = 10 * 2**30
_SAID_CHARACTERS = 4000
logger = logging.getLogger(__name__)
_ERRORS = {error.kind: error for error in (InvalidFile, InvalidRequest)}


def describe(path: Path, spec: schemas.ProbeSpec, settings: Settings) -> dict[str, Any]:
    """Return the columns of a probe's row that come from its file, by name.

    Raises:
        InvalidFile: the file is broken, over a limit, or its labels and samples do not fit each other.
        InvalidRequest: the spec has members that do not apply to this kind of file.
    """
    format = datafile.detect(path, datafile.Limits.of(settings))
    if format is None:
        _require_tensors(path)
        return _tensors(path, spec, settings)
    if format == "parquet":
        return _in_another_process(path, spec, datafile.Limits.of(settings))
    return _dataset(path, format, spec, datafile.Limits.of(settings))


def _in_another_process(path: Path, spec: schemas.ProbeSpec, limits: datafile.Limits) -> dict[str, Any]:
    """Describe a Parquet file in another process: pyarrow crashes, or takes gigabytes, for some broken files.

    Raises:
        InvalidFile: as `describe`, or the process timed out or ended abnormally.
        InvalidRequest: as `describe`.
        Unavailable: this machine cannot start one more process.
    """
    # A tokenizer may be large, and only its presence matters here.
    small = spec.model_copy(update={"tokenizer": None if spec.tokenizer is None else {}})
    task = {"path": str(path), "spec": small.model_dump(mode="json"), "limits": asdict(limits)}
    command = [sys.executable, "-m", __name__]
    seconds = _READING_SECONDS * (1 + path.stat().st_size / _BYTES_A_TURN)
    with _reading:
        try:
            ran = subprocess.run(
                command,
                input=json.dumps(task).encode(),
                capture_output=True,
                check=False,
                timeout=seconds,
                env=plain_environment(),
            )
        except subprocess.TimeoutExpired:
            raise InvalidFile(f"Looking into the Parquet file took more than {seconds:.0f} seconds.") from None
        except OSError as error:
            raise Unavailable(f"The Parquet file cannot be looked into now: {error.strerror}.") from None
    if ran.returncode == 0:
        answer: dict[str, Any] = json.loads(ran.stdout)
        if "row" not in answer:
            raise _ERRORS[answer["error"]](answer["detail"], **answer["members"])
        row: dict[str, Any] = answer["row"]
        return row
    said = ran.stderr.decode(errors="replace").strip()
    logger.warning("the process that read a Parquet file ended with %d: %s", ran.returncode, said[-_SAID_CHARACTERS:])
    raise InvalidFile(
        "The file is not valid Parquet, or takes more than there is to read it: the process that looked into it was "
        f"ended by what it holds ({_ended_by(ran.returncode)})."
    )


def _ended_by(code: int) -> str:
    if code > 0:
        return "an error that Parquet's reader does not know"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def main() -> None:
    """Run the other process: read a task from standard input, write a row's columns or an error to standard output."""
    bound_this_process(_READING_BYTES)
    task = json.load(sys.stdin)
    spec, limits = schemas.ProbeSpec(**task["spec"]), datafile.Limits(**task["limits"])
    try:
        answer: dict[str, Any] = {"row": _dataset(Path(task["path"]), "parquet", spec, limits)}
    except (InvalidFile, InvalidRequest) as error:
        answer = {"error": error.kind, "detail": error.detail, "members": error.members}
    json.dump(answer, sys.stdout)


def _require_tensors(path: Path) -> None:
    """Raise InvalidFile if a file does not begin like a tensor file."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start.startswith(b"PK") and start[8:] != b"{":
        raise InvalidFile(
            "The file is none of those that a probe can be: safetensors or npz with inputs and labels; Parquet, a zip "
            "of class folders with images, CSV with a header, or JSON lines."
        )


def _tensors(path: Path, spec: schemas.ProbeSpec, settings: Settings) -> dict[str, Any]:
    for member in ("columns", "tokenizer", "max_length"):
        if getattr(spec, member) is not None:
            raise InvalidRequest(f"{member} is for Parquet, CSV and JSON lines; the file holds tensors.")
    file, values = _open_probe(path, settings)
    require_known(file, {"inputs", *INPUT_NAMES, *_own_names(file), "labels", "split"})
    inputs = _inputs(file, spec.preprocess)
    labels = _labels(file, values, inputs, spec)
    _check_preprocess(spec.preprocess, inputs.shape[1])
    return {
        "format": file.format,
        "content": "tensors",
        "n_samples": inputs.shape[0],
        **_classes(labels, spec.class_names),
        "input_shape": list(inputs.shape[1:]),
        "splits": read_splits(file, values, inputs.shape[0]),
        "preprocess": spec.preprocess.for_tensors().model_dump(mode="json") if spec.preprocess else None,
        "data_sha256": identity.hash_tensors(path, file),
    }


def _dataset(path: Path, format: datafile.Format, spec: schemas.ProbeSpec, limits: datafile.Limits) -> dict[str, Any]:
    columns = spec.columns.named() if spec.columns else None
    dataset = datafile.open_dataset(path, format, limits, columns)
    if dataset.content == "texts" and spec.preprocess is not None:
        raise InvalidRequest("preprocess is for images; the file holds texts.")
    if dataset.content == "images" and not (spec.tokenizer is None and spec.max_length is None):
        raise InvalidRequest("tokenizer and max_length are for texts; the file holds images.")
    labels, names = dataset.labels, dataset.class_names
    if labels is not None:
        labels, names = named_labels(labels, names, spec.class_names)
        check_labels(labels, len(names) if names else None)
    elif spec.class_names is not None:
        raise InvalidRequest("class_names are of labels; the file has none.")
    return {
        "data_sha256": identity.hash_dataset(dataset, labels, names),
        "format": dataset.format,
        "content": dataset.content,
        "columns": dataset.columns,
        "n_samples": dataset.n_rows,
        **_classes(labels, names),
        "input_shape": None,
        "splits": {} if dataset.split is None else split_counts(dataset.split),
        "preprocess": spec.preprocess.for_images().model_dump(mode="json") if spec.preprocess else None,
        "max_length": spec.max_length,
    }


def _labels(
    file: tensorfile.TensorFile, values: Values, inputs: tensorfile.TensorInfo, spec: schemas.ProbeSpec
) -> npt.NDArray[np.int64] | None:
    """Return the labels of the samples; None if sequences of tokens have no labels, or one per token."""
    info = file.tensors.get("labels")
    if "input_ids" not in file.tensors or (info is not None and len(info.shape) == 1):
        n_named = len(spec.class_names) if spec.class_names else None
        return read_labels(file, values, inputs.shape[0], n_classes=n_named)
    if spec.class_names is not None:
        raise InvalidRequest("class_names are of labels of samples; the file has none.")
    if info is not None:
        require_tensor(file, "labels", tensorfile.INTEGER, shape=inputs.shape)
    if len(inputs.shape) != 2 or inputs.shape[1] < 2:
        raise InvalidFile(
            "Without labels of samples input_ids must be (N, T) with T at least 2, so that tokens have a next one, "
            f"not {list(inputs.shape)}."
        )
    return None


def _classes(labels: npt.NDArray[np.int64] | None, names: list[str] | None) -> dict[str, Any]:
    if labels is None:
        return {"n_classes": 0, "class_counts": [], "class_names": None}
    n_classes = len(names) if names else int(labels.max()) + 1
    counts = np.bincount(labels, minlength=n_classes).tolist()
    return {"n_classes": n_classes, "class_counts": counts, "class_names": names}


def _inputs(file: tensorfile.TensorFile, preprocess: schemas.Preprocess | None) -> tensorfile.TensorInfo:
    """Return the tensor that gives a probe's number and shape of samples; check the others too."""
    named, own = [name for name in INPUT_NAMES if name in file.tensors], _own_names(file)
    several = [*named, *own] if own else named
    if ("inputs" in file.tensors and several) or (named and own):
        listed = ", ".join(map(repr, ["inputs"] * ("inputs" in file.tensors) + several))
        raise InvalidFile(f"The file holds {listed}; it must be one or the other.")
    main = next((name for name in (*_MAIN_NAMES, *own) if name in file.tensors), "inputs")
    named = named or own
    inputs = require_tensor(file, main, tensorfile.INTEGER if main == "input_ids" else tensorfile.NUMERIC, min_rank=2)
    for name in named:
        other = require_tensor(file, name, tensorfile.NUMERIC, min_rank=2)
        if other.shape[0] != inputs.shape[0]:
            raise InvalidFile(f"{name!r} has {other.shape[0]} samples; {main!r} has {inputs.shape[0]}.")
    if preprocess is not None and main not in ("inputs", "pixel_values"):
        raise InvalidRequest("preprocess is for 'inputs' and 'pixel_values'; the file holds neither.")
    return inputs


def _own_names(file: tensorfile.TensorFile) -> list[str]:
    """Return the tensors that are inputs by names of the network's own, such as `inputs.words`, in their order."""
    return sorted(name for name in file.tensors if name.startswith(OWN_INPUT) and name != OWN_INPUT)


def _check_preprocess(preprocess: schemas.Preprocess | None, size: int) -> None:
    of_images = [name for name in ("resize", "crop", "colour") if getattr(preprocess, name, None) is not None]
    if of_images:
        raise InvalidRequest(
            f"preprocess.{of_images[0]} is for images in files (Parquet, a zip of class folders); the file holds "
            "tensors, which are taken as they are."
        )
    for name in ("mean", "std") if preprocess else ():
        values = getattr(preprocess, name)
        if isinstance(values, list) and len(values) != size:
            raise InvalidRequest(
                f"preprocess.{name} has {len(values)} entries; dimension 1 of the inputs has the size {size}."
            )


def _open_probe(path: Path, settings: Settings) -> tuple[tensorfile.TensorFile, Values]:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK") and not tensorfile.begins_as_safetensors(start):
        archive = tensorfile.inspect_npz(path, max_bytes=settings.max_npz_bytes, max_ratio=settings.max_npz_ratio)
        return archive, lambda name: tensorfile.read_npz_values(path, name)
    return tensorfile.inspect_safetensors(path), safetensors_values(path)


if __name__ == "__main__":
    main()

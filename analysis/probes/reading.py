"""Read and check probes and feature sets from files."""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite, prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AnalysisError, Kind
from .feature_set import FeatureSet
from .images import Images
from .inputs import INPUT_NAMES, OWN_INPUT, named
from .preprocess import Preprocess
from .probe import CHUNK_ELEMENTS, Probe, prepared_batch
from .sequences import labels_of_tokens

_MAIN_NAMES = ("pixel_values", "input_ids")

_INTEGER = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Exceptions of the two formats' readers for foreign bytes; MemoryError for an array announced to be huge.
_BROKEN_FILE = (
    SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError, NotImplementedError,
    RuntimeError, MemoryError,
)  # fmt: skip


def load_probe(
    path: Path,
    *,
    format: Literal["safetensors", "npz"],
    preprocess: Preprocess | None = None,
    n_classes: int | None = None,
    next_tokens: bool = False,
    check_inputs: bool = True,
) -> Probe:
    """Read a probe dataset: `inputs` (n, ...), `labels` (n,) and, if there are splits, `split` (n,).

    In place of `inputs` it may hold several by names that networks have for them, such as `input_ids` and
    `attention_mask`, or by those of one network alone: `inputs.words` is its `words`.

    Args:
        path: the file.
        format: how to read it. Pickled objects in an npz are refused.
        preprocess: applied to the inputs, batch by batch.
        n_classes: number of classes. Default: the largest label plus 1.
        next_tokens: for a causal language model whose vocabulary has n_classes tokens: labels are those of
            `sequences.next_token_labels`, and the file needs none of its own; labels (n,) are ignored.
        check_inputs: whether to read all inputs, so that none is NaN or infinite. Default: yes; else the caller gives
            what it reads to `require_finite_inputs`.

    Returns:
        The probe. Labels and split are int64, from integers, booleans or whole floats; inputs as stored.

    Raises:
        AnalysisError: `invalid-probe` for missing or mismatched tensors; `non-finite-values` where preprocessed
            inputs hold NaN or infinity as float32.

    Numerics: inputs are converted to float32 chunk by chunk, here only to check them.
    """
    kind: Kind = "invalid-probe"
    tensors = _read(path, format, ("inputs", *INPUT_NAMES, "labels", "split"), kind)
    known = {name: tensors[name] for name in INPUT_NAMES if name in tensors}
    own = {name.removeprefix(OWN_INPUT): tensors[name] for name in sorted(tensors) if name.startswith(OWN_INPUT)}
    if ("inputs" in tensors) + bool(known) + bool(own) > 1:
        held = ", ".join(name for name in tensors if name not in ("labels", "split"))
        raise AnalysisError(kind, f"The file holds {held}; it must be one or the other.")
    if known and not set(_MAIN_NAMES) & set(known):
        raise AnalysisError(kind, f"With {', '.join(known)} the file must also hold {' or '.join(_MAIN_NAMES)}.")
    by_name = known or own
    given = by_name or {"inputs": _required(tensors, "inputs", kind)}
    n = len(next(iter(given.values()))) if all(t.ndim for t in given.values()) else 0
    for name, tensor in given.items():
        _check_inputs(name, tensor, n)
    for name in ("attention_mask", "token_type_ids", "position_ids") if "input_ids" in by_name else ():
        if name in by_name and by_name[name].shape != (shape := by_name["input_ids"].shape):
            raise AnalysisError(kind, f"{name} must be {list(shape)} as input_ids, not {list(by_name[name].shape)}.")
    if next_tokens:
        assert n_classes is not None, "a language model's vocabulary is known"
        labels = labels_of_tokens(given, tensors.get("labels"), n_vocabulary=n_classes)
    else:
        labels, n_classes = _labels(tensors, n, n_classes, kind)
    split = _split(tensors, n, kind)
    probe = Probe(by_name or given["inputs"], labels, split, n_classes, preprocess)
    if check_inputs:
        require_finite_inputs(probe)
    return probe


def require_finite_inputs(probe: Probe, *, first_row: int = 0) -> None:
    """Check that no preprocessed input of a probe, or of a part of one, holds NaN or infinity as float32.

    Args:
        probe: of tensors; images in files, which are whole numbers, are not read.
        first_row: row of its first sample in the file, for the message.

    Raises:
        AnalysisError: `non-finite-values`.

    Numerics: inputs are converted to float32 chunk by chunk, here only to check them.
    """
    if isinstance(probe.inputs, Images):
        return
    for name, tensor in named(probe.inputs).items():
        scaled = probe.preprocess if name in ("", "pixel_values") else None
        if tensor.is_floating_point() or scaled is not None:
            _require_finite(name or "inputs", tensor, partial(prepared_batch, preprocess=scaled), first_row)


def load_feature_set(path: Path) -> FeatureSet:
    """Read a feature set from safetensors: `features`, `labels`, `head`; `head_bias`, `logits`, `split` if present.

    Args:
        path: the file.

    Returns:
        The feature set; labels and split are int64, from integers, booleans or whole floats.

    Raises:
        AnalysisError: `invalid-feature-set` for missing or mismatched tensors; `non-finite-values`.

    Numerics: floating-point tensors become float64 where the file holds any float64, so that no computed precision
    is lost, otherwise float32.
    """
    kind: Kind = "invalid-feature-set"
    names = ("features", "labels", "head", "head_bias", "logits", "split")
    tensors = _read(path, "safetensors", names, kind)
    features, head = _required(tensors, "features", kind), _required(tensors, "head", kind)
    if features.ndim != 2 or features.numel() == 0:
        raise AnalysisError(kind, f"features must be (N, d) and not empty, not {list(features.shape)}.")
    n, d = features.shape
    if head.ndim != 2 or head.shape[1] != d:
        raise AnalysisError(kind, f"head must be (C, {d}), as wide as the features, not {list(head.shape)}.")
    labels, c = _labels(tensors, n, head.shape[0], kind)
    shapes = {"features": (n, d), "head": (c, d), "head_bias": (c,), "logits": (n, c)}
    floating = {name: tensors[name] for name in shapes if name in tensors}
    for name, tensor in floating.items():
        if not tensor.is_floating_point():
            raise AnalysisError(kind, f"{name} must be floating-point numbers, not {tensor.dtype}.")
        if tuple(tensor.shape) != shapes[name]:
            raise AnalysisError(kind, f"{name} must be {list(shapes[name])}, not {list(tensor.shape)}.")
    wide = torch.float64 if any(t.dtype == torch.float64 for t in floating.values()) else torch.float32
    floating = {name: tensor.to(wide) for name, tensor in floating.items()}
    for name, tensor in floating.items():
        _require_finite(name, tensor, lambda chunk: chunk)
    return FeatureSet(
        features=floating["features"],
        labels=labels,
        head=floating["head"],
        head_bias=floating.get("head_bias"),
        logits=floating.get("logits"),
        split=_split(tensors, n, kind),
    )


def _check_inputs(name: str, tensor: Shaped[Tensor, "..."], n: int) -> None:
    if tensor.dtype not in (*_FLOATING, *_INTEGER, torch.bool):
        raise AnalysisError("invalid-probe", f"{name} must be numbers of 8 to 64 bits, not {tensor.dtype}.")
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise AnalysisError("invalid-probe", f"{name} must be (N, ...) and not empty, not {list(tensor.shape)}.")
    if len(tensor) != n:
        raise AnalysisError("invalid-probe", f"{name} has {len(tensor)} samples; the other inputs have {n}.")
    if name == "input_ids" and tensor.is_floating_point():
        raise AnalysisError("invalid-probe", f"input_ids must be integers, not {tensor.dtype}.")


def _read(path: Path, format: str, names: Sequence[str], kind: Kind) -> dict[str, Tensor]:
    """Return those of the named tensors that the file holds, and of a probe's file inputs by a network's own names."""
    try:
        if format == "safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                held = list(file.keys())
                return {name: file.get_tensor(name) for name in _wanted(names, held)}
        # If a file is not an archive, NumPy leaves it open unless the caller opened it.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return {name: _from_numpy(archive[name]) for name in _wanted(names, archive.files)}
    except FileNotFoundError:
        raise
    except _BROKEN_FILE as error:
        raise AnalysisError(kind, f"The file cannot be read as {format}: {error}.") from None


def _wanted(names: Sequence[str], held: Sequence[str]) -> list[str]:
    own = [name for name in held if name.startswith(OWN_INPUT) and name != OWN_INPUT] if "inputs" in names else []
    return [*(name for name in names if name in held), *own]


def _from_numpy(array: object) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise ValueError("a member of the archive is not an array")
    # torch takes numbers only in this machine's byte order.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _required(tensors: dict[str, Tensor], name: str, kind: Kind) -> Shaped[Tensor, "..."]:
    if name not in tensors:
        held = ", ".join(tensors) or "nothing that belongs here"
        raise AnalysisError(kind, f"The file has no tensor named {name!r}; it holds {held}.", missing=name)
    return tensors[name]


def _labels(tensors: dict[str, Tensor], n: int, n_classes: int | None, kind: Kind) -> tuple[Int64[Tensor, " n"], int]:
    labels = _integers("labels", _required(tensors, "labels", kind), n, kind)
    smallest, largest = int(labels.min()), int(labels.max())
    n_classes = largest + 1 if n_classes is None else n_classes
    if smallest < 0 or largest >= n_classes:
        raise AnalysisError(kind, f"labels must be 0 to {n_classes - 1}, not {smallest} to {largest}.")
    if smallest == largest:
        raise AnalysisError(kind, f"All {n} samples are of the class {smallest}; there must be at least two classes.")
    return labels, n_classes


def _split(tensors: dict[str, Tensor], n: int, kind: Kind) -> Int64[Tensor, " n"] | None:
    if "split" not in tensors:
        return None
    split = _integers("split", tensors["split"], n, kind)
    if bool(((split != 0) & (split != 1)).any()):
        raise AnalysisError(kind, "split must be 0 (train) or 1 (test) for every sample.")
    return split


def _integers(name: str, tensor: Shaped[Tensor, "..."], n: int, kind: Kind) -> Int64[Tensor, " n"]:
    if tensor.dtype not in (*_INTEGER, *_FLOATING, torch.bool):
        raise AnalysisError(kind, f"{name} must be whole numbers or booleans, not {tensor.dtype}.")
    if tuple(tensor.shape) != (n,):
        raise AnalysisError(kind, f"{name} must be one for each of the {n} samples, not {list(tensor.shape)}.")
    if tensor.is_floating_point():
        # Values must be below 2^63, which a float can hold and an int64 cannot.
        wide = tensor.double()
        wrong = ~((wide == wide.floor()) & (wide.abs() < 2.0**63))
        if bool(wrong.any()):
            row = int(torch.nonzero(wrong)[0])
            raise AnalysisError(kind, f"{name} is {float(tensor[row])} in row {row}; expected whole numbers.", row=row)
    return tensor.to(torch.int64)


def _require_finite(
    name: str, tensor: Shaped[Tensor, "n ..."], prepare: Callable[[Tensor], Float[Tensor, "m ..."]], first_row: int = 0
) -> None:
    rows = max(1, CHUNK_ELEMENTS // max(1, prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
        chunk = prepare(tensor[start : start + rows])
        # A sum is finite only if every term is, and needs no further memory; that of large numbers may overflow.
        if isfinite(chunk.sum().item()):
            continue
        finite = torch.isfinite(chunk)
        if not bool(finite.all()):
            row = first_row + start + int(torch.nonzero(~finite)[0, 0])
            raise AnalysisError(
                "non-finite-values", f"{name} holds NaN or infinity, first in row {row}.", tensor=name, row=row
            )

"""Named tensors of a probe or a feature set, checked against each other without torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import InvalidFile
from app.files import tensorfile
from app.files.datafile.values import whole_numbers
from app.schemas.base import MAX_CLASSES

# A sample costs eight bytes while its label is checked.
MAX_SAMPLES = 100_000_000

Values = Callable[[str], npt.NDArray[Any]]


def safetensors_values(path: Path) -> Values:
    """Return a function that reads tensors of a safetensors file by name."""
    return lambda name: tensorfile.read_values(path, name)


def require_known(file: tensorfile.TensorFile, names: set[str]) -> None:
    """Raise InvalidFile if a file holds tensors of other names."""
    if unknown := sorted(set(file.tensors) - names):
        raise InvalidFile(
            f"The file holds {', '.join(map(repr, unknown[:20]))}; only {', '.join(sorted(names))} are known.",
            unexpected=unknown[:20],
        )


def require_tensor(
    file: tensorfile.TensorFile,
    name: str,
    dtypes: tuple[str, ...],
    *,
    rank: int | None = None,
    min_rank: int = 0,
    shape: tuple[int | None, ...] | None = None,
) -> tensorfile.TensorInfo:
    """Return a tensor's info after checking its dtype and shape; None in `shape` allows any size.

    Raises:
        InvalidFile: it is missing, empty, too long, or of another dtype or shape.
    """
    info = file.tensors.get(name)
    if info is None:
        found = ", ".join(sorted(file.tensors)[:20]) or "nothing"
        raise InvalidFile(f"The file has no tensor {name!r}; it holds {found}.")
    if info.dtype not in dtypes:
        raise InvalidFile(f"The tensor {name!r} has the dtype {info.dtype}; expected one of {', '.join(dtypes)}.")
    rank = len(shape) if shape else rank
    if len(info.shape) < min_rank or rank not in (None, len(info.shape)):
        wanted = f"{rank}" if rank else f"at least {min_rank}"
        raise InvalidFile(f"The tensor {name!r} has the shape {list(info.shape)}; expected {wanted} dimensions.")
    if any(size not in (None, have) for size, have in zip(shape or (), info.shape, strict=False)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape or ())
        raise InvalidFile(f"The tensor {name!r} has the shape {list(info.shape)}; expected [{wanted}].")
    if 0 in info.shape:
        raise InvalidFile(f"The tensor {name!r} is empty: its shape is {list(info.shape)}.")
    if info.shape[0] > MAX_SAMPLES:
        raise InvalidFile(f"The tensor {name!r} has {info.shape[0]} rows; at most {MAX_SAMPLES} are allowed.")
    return info


def read_labels(
    file: tensorfile.TensorFile, values: Values, n_samples: int, *, n_classes: int | None
) -> npt.NDArray[np.int64]:
    """Return the tensor `labels`, of whole numbers or booleans, after `check_labels`."""
    require_tensor(file, "labels", tensorfile.NUMERIC, shape=(n_samples,))
    labels = whole_numbers("labels", values("labels"))
    check_labels(labels, n_classes)
    return labels


def check_labels(labels: npt.NDArray[np.int64], n_classes: int | None) -> None:
    """Raise InvalidFile for labels outside of 0..n_classes - 1, and for fewer than two classes present."""
    allowed = n_classes if n_classes is not None else MAX_CLASSES
    if labels.min() < 0 or labels.max() >= allowed:
        raise InvalidFile(
            f"Labels must lie in 0..{allowed - 1}; they lie in {labels.min()}..{labels.max()}.",
            n_outside=int(((labels < 0) | (labels >= allowed)).sum()),
        )
    if labels.min() == labels.max():
        raise InvalidFile(f"Every label is {labels[0]}; at least two classes must be present.")


def read_splits(file: tensorfile.TensorFile, values: Values, n_samples: int) -> dict[str, int]:
    """Return the samples per split from the tensor `split`, of whole numbers or booleans; empty without it."""
    if "split" not in file.tensors:
        return {}
    require_tensor(file, "split", tensorfile.NUMERIC, shape=(n_samples,))
    split = whole_numbers("split", values("split"))
    if split.min() < 0 or split.max() > 1:
        raise InvalidFile(f"'split' holds 0 for train and 1 for test; it has values in {split.min()}..{split.max()}.")
    return split_counts(split)


def split_counts(split: npt.NDArray[np.int64]) -> dict[str, int]:
    """Return the number of samples by split, without empty splits."""
    counts = {"train": int((split == 0).sum()), "test": int((split == 1).sum())}
    return {name: count for name, count in counts.items() if count}

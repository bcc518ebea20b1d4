"""Probe data and feature sets: read, checked, handed out in batches."""

import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Integer, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from analysis.entropy import check_finite
from analysis.errors import AnalysisError, Kind
from analysis.images import Images
from analysis.predictions import Predictions, joined, predictions_of, rows_at_a_time
from analysis.preprocess import Preprocess
from analysis.sequences import labels_of_tokens

# One tensor of inputs, or several by the names that a network's own `forward` has for them.
T = TypeVar("T")
Inputs = Shaped[Tensor, "..."] | Mapping[str, Shaped[Tensor, "..."]]

# Names under which a probe may hold a network's inputs in place of `inputs`, one of the first two among them; the same
# list is in app/resources.py, which a test compares.
INPUT_NAMES = (
    "pixel_values", "input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_attention_mask",
    "spatial_shapes",
)  # fmt: skip
_MAIN_NAMES = ("pixel_values", "input_ids")

_INTEGER = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What the two formats' readers raise for bytes that are not theirs; MemoryError for an array announced to be huge.
_BROKEN_FILE = (
    SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError, NotImplementedError,
    RuntimeError, MemoryError,
)  # fmt: skip

# Numbers that are looked at in one go: what is checked is never copied as a whole.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Probe:
    """Labelled inputs on which networks are looked at.

    Attributes:
        inputs: as stored, of any numeric type; a large set may still be on disk, mapped. Several tensors by name where
            the file has a network's own names for them. Images in files are decoded batch by batch.
        labels: 0 .. n_classes - 1. For a causal language model (n, t): at each position the token that follows, or
            IGNORED.
        split: 0 train, 1 test; None where the set has no splits.
        n_classes: at least 2; not every class need be there.
        preprocess: applied batch by batch, to the one tensor or to `pixel_values`.
    """

    inputs: Inputs | Images
    labels: Integer[Tensor, "n ..."]
    split: Integer[Tensor, " n"] | None
    n_classes: int
    preprocess: Preprocess | None

    def batches(self, batch_size: int, *, device: torch.device | str) -> Iterator[Any]:
        """The inputs in order, as a network takes them.

        Args:
            batch_size: samples at a time, at least 1; the last batch may be smaller.
            device: where the batches go. They travel as stored and are converted there; to a GPU from pinned memory,
                each while the one before it is computed with.

        Returns:
            Batches as `Inputs`, which a network's module takes: preprocessed float32 tensors (b, ...). Of tensors with
            names, those of integers are int64 and keep their values, except `pixel_values`.

        Raises:
            AnalysisError: `invalid-argument` for a batch_size below 1; of images, while they are decoded,
                `invalid-probe`.
        """
        if batch_size < 1:
            raise AnalysisError("invalid-argument", f"batch_size must be at least 1, not {batch_size}.")
        device = torch.device(device)
        parts: Iterable[Inputs]
        if isinstance(self.inputs, Images):
            parts, on_cpu = self.inputs.batches(batch_size), True
            if device.type == "cuda":
                parts = _one_ahead(parts)
        else:
            starts = range(0, len(self.labels), batch_size)
            parts = (_samples(self.inputs, start, start + batch_size) for start in starts)
            on_cpu = any(tensor.device.type == "cpu" for tensor in _named(self.inputs).values())
        away = device.type == "cuda" and on_cpu
        moved = _sent_ahead(parts, device) if away else (_each(part, lambda t: t.to(device)) for part in parts)
        prepared = (self._prepare(part) for part in moved)
        # What is decoded is waited for; what lies in memory would gain nothing by a thread.
        return _one_ahead(prepared) if isinstance(self.inputs, Images) and not away else prepared

    def prepared(self, device: torch.device | str, *, most_bytes: int = 2**30) -> "Probe":
        """The same probe with its inputs as a network takes them, on the device, for passes that come again.

        Args:
            device: where the batches will be asked for.
            most_bytes: of prepared inputs; a larger probe is given back as it is and prepared batch by batch. Images
                are kept decoded, as grey levels, up to twice as much.

        Returns:
            A probe whose batches are views.
        """
        if isinstance(self.inputs, Images):
            if prod(self.inputs.shape) > 2 * most_bytes:
                return self
            return replace(self, inputs=_decoded(self.inputs)).prepared(device, most_bytes=most_bytes)
        tensors = _named(self.inputs)
        if sum((8 if _stays_integer(name, t) else 4) * t.numel() for name, t in tensors.items()) > most_bytes:
            return self
        rows = max(_CHUNK_ELEMENTS // max(*(prod(t.shape[1:]) for t in tensors.values()), 1), 1)
        batches = [_named(batch) for batch in self.batches(rows, device=device)]
        inputs = {name: torch.cat([batch[name] for batch in batches]) for name in tensors}
        return Probe(inputs.get("", inputs), self.labels, self.split, self.n_classes, None)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of inputs by name; one alone has no name."""
        if isinstance(self.inputs, Images):
            return {"": self.inputs.shape}
        return {name: tuple(tensor.shape) for name, tensor in _named(self.inputs).items()}

    def example(self, *, device: torch.device | str) -> Any:
        """Two samples, as `batches` gives them, for looking at what a network makes of such. Of images in files they
        are black: none is decoded for it. A probe of one sample gives it twice."""
        if isinstance(self.inputs, Images):
            return self._prepare(torch.zeros(2, *self.inputs.shape[1:], dtype=torch.uint8, device=device))
        rows = torch.arange(2).clamp(max=n_samples(self.inputs) - 1)
        return self._prepare(_each(self.inputs, lambda tensor: tensor[rows].to(device)))

    def take(self, rows: Int64[Tensor, " m"]) -> "Probe":
        """The samples of these rows alone, in their order."""
        split = None if self.split is None else self.split[rows]
        if isinstance(self.inputs, Images):
            return replace(self, inputs=self.inputs.take(rows.tolist()), labels=self.labels[rows], split=split)
        taken = {name: tensor[rows] for name, tensor in _named(self.inputs).items()}
        return replace(self, inputs=taken.get("", taken), labels=self.labels[rows], split=split)

    def _prepare(self, inputs: Inputs) -> Inputs:
        if isinstance(inputs, Tensor):
            return _prepared(inputs, self.preprocess)
        return {name: _prepared_as(name, tensor, self.preprocess) for name, tensor in inputs.items()}


def _decoded(images: Images) -> UInt8[Tensor, "n c h w"]:
    pixels = torch.empty(images.shape, dtype=torch.uint8)
    rows = max(_CHUNK_ELEMENTS // prod(images.shape[1:]), 1)
    for start, batch in zip(range(0, len(pixels), rows), images.batches(rows), strict=True):
        pixels[start : start + len(batch)] = batch
    return pixels


def stratified_rows(
    labels: Integer[Tensor, " n"],
    split: Integer[Tensor, " n"] | None,
    n_samples: int,
    *,
    seed: int,
    least_classes: int = 2,
) -> Int64[Tensor, " m"]:
    """A part of a probe in which each class of each split has its share, by the largest remainders.

    Args:
        labels, split: of the probe.
        n_samples: how many, at most n.
        seed: of what is drawn within a class; the same seed gives the same rows.
        least_classes: that must be left; 1 for sequences, which have no labels as a whole.

    Returns:
        Rows in rising order, m = n_samples of them.

    Raises:
        AnalysisError: `invalid-argument` where fewer classes would be left.
    """
    strata = labels.long() * 2 + (0 if split is None else split.long())
    values, places, counts = torch.unique(strata, return_inverse=True, return_counts=True)
    shares = counts.double() * (n_samples / len(labels))
    taken = shares.floor().long()
    missing = n_samples - int(taken.sum())
    # Of equal remainders the larger class goes first, then the lower label.
    order = sorted(range(len(values)), key=lambda i: (-float(shares[i] - taken[i]), -int(counts[i]), i))
    taken[order[:missing]] += 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(labels), generator=generator)
    # Each sample's place among those of its stratum, in the order in which they were drawn.
    by_stratum = drawn[torch.argsort(places[drawn], stable=True)]
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank = torch.arange(len(labels)) - starts
    rows = by_stratum[rank < torch.repeat_interleave(taken, counts)].sort().values
    if len(torch.unique(labels[rows])) < least_classes:
        raise AnalysisError("invalid-argument", f"{n_samples} samples of this probe are of one class; ask for more.")
    return rows


def n_samples(inputs: Inputs) -> int:
    """How many samples a batch holds."""
    return len(next(iter(_named(inputs).values())))


def first_samples(inputs: Inputs, n: int) -> Inputs:
    """The first so many samples of a batch."""
    return _samples(inputs, 0, n)


def copied(inputs: Inputs) -> Inputs:
    """The same batch in memory of its own."""
    return _each(inputs, torch.clone)


def each_input(inputs: Inputs) -> Iterable[Shaped[Tensor, "..."]]:
    """The tensors of a batch."""
    return _named(inputs).values()


def _samples(inputs: Inputs, start: int, stop: int) -> Inputs:
    return _each(inputs, lambda tensor: tensor[start:stop])


def _each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, Tensor):
        return change(inputs)
    return {name: change(tensor) for name, tensor in inputs.items()}


def _named(inputs: Inputs) -> Mapping[str, Shaped[Tensor, "..."]]:
    """All tensors of a batch; one alone has no name."""
    return {"": inputs} if isinstance(inputs, Tensor) else inputs


def _stays_integer(name: str, tensor: Shaped[Tensor, "..."]) -> bool:
    return name not in ("", "pixel_values") and not tensor.is_floating_point()


def _prepared_as(name: str, tensor: Shaped[Tensor, "n ..."], preprocess: Preprocess | None) -> Shaped[Tensor, "n ..."]:
    if _stays_integer(name, tensor):
        return tensor.to(torch.int64)
    return _prepared(tensor, preprocess if name == "pixel_values" else None)


@dataclass(frozen=True)
class Vocabulary:
    """Which of a language model's tokens are classes: those that occur as labels.

    Attributes:
        tokens: of each class, its id; in rising order.
        size: tokens that the network knows, over all of which it predicts.
    """

    tokens: Int64[Tensor, " c"]
    size: int


@dataclass(frozen=True)
class FeatureSet:
    """Features, labels and classification head, extracted elsewhere or by a network's pass over a probe.

    Floating-point tensors share one type: float64 where the file holds any float64, float32 otherwise.

    Attributes:
        features: what the head receives.
        labels: 0 .. c - 1.
        head: rows of the classification head.
        head_bias: its bias.
        logits: the network's own, where they were uploaded; otherwise features @ head.T + head_bias in float64.
        split: 0 train, 1 test; None where the set has no splits.
        predictions: in place of logits, where those would be too many to keep.
        vocabulary: of a language model; its head is restricted to the classes, and -1 predicted for any other token.
    """

    features: Float[Tensor, "n d"]
    labels: Integer[Tensor, " n"]
    head: Float[Tensor, "c d"]
    head_bias: Float[Tensor, " c"] | None
    logits: Float[Tensor, "n c"] | None
    split: Integer[Tensor, " n"] | None
    predictions: Predictions | None = None
    vocabulary: Vocabulary | None = None

    def to(self, device: torch.device) -> "FeatureSet":
        """The same with what is computed with on a device; what says which they are stays."""
        on_device = {name: getattr(self, name) for name in ("features", "labels", "head", "head_bias", "logits")}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in on_device.items()
        }
        return replace(self, **moved, predictions=None if self.predictions is None else self.predictions.to(device))

    def network_logits(self) -> Float[Tensor, "n c"]:
        """The network's own, or what features, head and bias give, in float64 whatever their type."""
        return self._logits(slice(None))

    def network_predictions(self) -> Predictions:
        """What the network predicts: as it was kept, or from its logits, some rows at a time.

        Raises:
            AnalysisError: `non-finite-values` in the logits.
        """
        if self.predictions is not None:
            return self.predictions
        parts = []
        # Features are widened too, so that the wider of the two says how many rows fit.
        for rows in torch.split(torch.arange(len(self.labels)), rows_at_a_time(max(self.head.shape))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = self._logits(part)
            check_finite("logits", logits)
            parts.append(predictions_of(logits, self.labels[part]))
        return joined(parts)

    def _logits(self, rows: slice) -> Float[Tensor, "m c"]:
        if self.logits is not None:
            return self.logits[rows]
        logits = self.features[rows].double() @ self.head.double().T
        return logits if self.head_bias is None else logits + self.head_bias.double()

    def take(self, rows: Int64[Tensor, " m"]) -> "FeatureSet":
        """The samples of these rows alone, in their order."""
        return replace(
            self,
            features=self.features[rows],
            labels=self.labels[rows],
            logits=None if self.logits is None else self.logits[rows],
            split=None if self.split is None else self.split[rows],
            predictions=None if self.predictions is None else self.predictions.take(rows),
        )


def load_probe(
    path: Path,
    *,
    format: Literal["safetensors", "npz"],
    preprocess: Preprocess | None = None,
    n_classes: int | None = None,
    next_tokens: bool = False,
) -> Probe:
    """Read a probe dataset: `inputs` (n, ...), `labels` (n,) and, if there are splits, `split` (n,).

    In place of `inputs` it may hold a network's own inputs by their names, such as `input_ids` and `attention_mask`.

    Args:
        path: the file.
        format: how to read it. Pickled objects in an npz are refused.
        preprocess: what happens to the inputs, batch by batch.
        n_classes: number of classes. Default: the largest label plus 1.
        next_tokens: for a causal language model whose vocabulary has n_classes tokens: labels are those of
            `sequences.next_token_labels`, and the file needs none of its own; labels (n,) are passed over.

    Returns:
        The probe. Labels and split are int64, of integers, booleans or floats that are whole; inputs as stored.

    Raises:
        AnalysisError: `invalid-probe` for what is missing or does not fit; `non-finite-values` where preprocessed
            inputs hold NaN or infinity as float32.

    Numerics: inputs are converted to float32 chunk by chunk, here only to look at them.
    """
    kind: Kind = "invalid-probe"
    tensors = _read(path, format, ("inputs", *INPUT_NAMES, "labels", "split"), kind)
    named = {name: tensors[name] for name in INPUT_NAMES if name in tensors}
    if "inputs" in tensors and named:
        raise AnalysisError(kind, f"The file holds inputs and {', '.join(named)}; it must be one or the other.")
    if named and not set(_MAIN_NAMES) & set(named):
        raise AnalysisError(kind, f"Beside {', '.join(named)} the file needs {' or '.join(_MAIN_NAMES)}.")
    given = named or {"inputs": _required(tensors, "inputs", kind)}
    n = len(next(iter(given.values()))) if all(t.ndim for t in given.values()) else 0
    for name, tensor in given.items():
        _check_inputs(name, tensor, n)
    for name in set(named) & {"attention_mask", "token_type_ids", "position_ids"} if "input_ids" in named else ():
        if named[name].shape != (shape := named["input_ids"].shape):
            raise AnalysisError(kind, f"{name} must be {list(shape)} as input_ids, not {list(named[name].shape)}.")
    if next_tokens:
        assert n_classes is not None, "a language model's vocabulary is known"
        labels = labels_of_tokens(given, tensors.get("labels"), n_vocabulary=n_classes)
    else:
        labels, n_classes = _labels(tensors, n, n_classes, kind)
    split = _split(tensors, n, kind)
    probe = Probe(named or given["inputs"], labels, split, n_classes, preprocess)
    for name, tensor in given.items():
        scaled = preprocess if name in ("inputs", "pixel_values") else None
        if tensor.is_floating_point() or scaled is not None:
            _require_finite(name, tensor, partial(_prepared, preprocess=scaled))
    return probe


def _check_inputs(name: str, tensor: Shaped[Tensor, "..."], n: int) -> None:
    if tensor.dtype not in (*_FLOATING, *_INTEGER, torch.bool):
        raise AnalysisError("invalid-probe", f"{name} must be numbers of 8 to 64 bits, not {tensor.dtype}.")
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise AnalysisError("invalid-probe", f"{name} must be (N, ...) and not empty, not {list(tensor.shape)}.")
    if len(tensor) != n:
        raise AnalysisError("invalid-probe", f"{name} has {len(tensor)} samples; the other inputs have {n}.")
    if name == "input_ids" and tensor.is_floating_point():
        raise AnalysisError("invalid-probe", f"input_ids must be integers, not {tensor.dtype}.")


def load_feature_set(path: Path) -> FeatureSet:
    """Read a feature set from safetensors: `features`, `labels`, `head`; `head_bias`, `logits`, `split` if present.

    Args:
        path: the file.

    Returns:
        The feature set; labels and split are int64, of integers, booleans or floats that are whole.

    Raises:
        AnalysisError: `invalid-feature-set` for what is missing or does not fit; `non-finite-values`.

    Numerics: floating-point tensors become float64 where the file holds any float64, so that nothing that was
    computed is lost, otherwise float32.
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


def _read(path: Path, format: str, names: Sequence[str], kind: Kind) -> dict[str, Tensor]:
    """Those of the named tensors that the file holds."""
    try:
        if format == "safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118
        # NumPy leaves a file open that turns out to be no archive, unless the file is ours.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return {name: _from_numpy(archive[name]) for name in names if name in archive.files}
    except FileNotFoundError:
        raise
    except _BROKEN_FILE as error:
        raise AnalysisError(kind, f"The file cannot be read as {format}: {error}.") from None


def _from_numpy(array: object) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise ValueError("a member of the archive is not an array")
    # torch knows numbers in this machine's byte order alone.
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
        raise AnalysisError(kind, f"All {n} samples are of the class {smallest}; two classes are the least.")
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
        # The largest that fit are below 2^63, which a float can hold and an int64 cannot.
        wide = tensor.double()
        wrong = ~((wide == wide.floor()) & (wide.abs() < 2.0**63))
        if bool(wrong.any()):
            row = int(torch.nonzero(wrong)[0])
            raise AnalysisError(kind, f"{name} is {float(tensor[row])} in row {row}; expected whole numbers.", row=row)
    return tensor.to(torch.int64)


def _require_finite(
    name: str, tensor: Shaped[Tensor, "n ..."], prepare: Callable[[Tensor], Float[Tensor, "m ..."]]
) -> None:
    rows = max(1, _CHUNK_ELEMENTS // max(1, prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
        finite = torch.isfinite(prepare(tensor[start : start + rows]))
        if not bool(finite.all()):
            row = start + int(torch.nonzero(~finite)[0, 0])
            raise AnalysisError(
                "non-finite-values", f"{name} holds NaN or infinity, first in row {row}.", tensor=name, row=row
            )


def _sent_ahead(parts: Iterable[Inputs], device: torch.device) -> Iterator[Inputs]:
    """Parts on a GPU, each on its way while the caller computes with the one before.

    Memory: three parts on the GPU (computed with, arrived, on its way) and at most as many pinned, whose memory torch
    takes back once their copies are done.
    """
    copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    computed: deque[torch.cuda.Event] = deque()

    def send(part: Inputs) -> tuple[Inputs, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            return _each(part, lambda t: t.pin_memory().to(device, non_blocking=True)), copies.record_event()

    sending = map(send, parts)
    following = next(sending, None)
    while following is not None:
        sent, arrived = following
        if len(computed) == 2:
            # Launching runs ahead of computing: without a halt the whole probe would end up there.
            computed.popleft().synchronize()
        following = next(sending, None)
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        # Its memory belongs to the stream of copies, which must not reuse it before it has been computed with.
        for tensor in _named(sent).values():
            tensor.record_stream(computing)
        yield sent
        computed.append(torch.cuda.current_stream(device).record_event())


def _one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, each made in a thread while the caller works with the one before."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
    finally:
        # The thread may still be at an item, and cannot be interrupted.
        pool.shutdown()
        items.close()


def _prepared(batch: Shaped[Tensor, "n ..."], preprocess: Preprocess | None) -> Float32[Tensor, "n ..."]:
    return batch.to(torch.float32) if preprocess is None else preprocess(batch)

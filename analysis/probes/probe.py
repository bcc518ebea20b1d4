"""A probe: labelled inputs, passed to networks in batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float32, Int64, Integer, Shaped, UInt8
from torch import Tensor

from ..errors import AnalysisError
from .ahead import one_ahead, sent_ahead
from .images import Images
from .inputs import Inputs, each, n_samples, named, samples
from .preprocess import Preprocess

# Numbers that are checked at a time: a checked tensor is never copied as a whole.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Probe:
    """Labelled inputs on which networks are evaluated.

    Attributes:
        inputs: as stored, of any numeric type; a large set may still be memory-mapped. Several tensors by name where
            the file uses a network's own names. Images in files are decoded batch by batch.
        labels: 0 .. n_classes - 1. For a causal language model (n, t): at each position the token that follows, or
            IGNORED.
        split: 0 train, 1 test; None where the set has no splits.
        n_classes: at least 2; classes may be absent.
        preprocess: applied batch by batch, to the one tensor or to `pixel_values`.
    """

    inputs: Inputs | Images
    labels: Integer[Tensor, "n ..."]
    split: Integer[Tensor, " n"] | None
    n_classes: int
    preprocess: Preprocess | None

    def batches(self, batch_size: int, *, device: torch.device | str) -> Iterator[Any]:
        """Iterate over the inputs in order, as a network takes them.

        Args:
            batch_size: samples at a time, at least 1; the last batch may be smaller.
            device: target of the batches. They are copied as stored and converted there; to a GPU from pinned memory,
                each while the previous one is in use.

        Returns:
            Batches as `Inputs`, which a network's module takes: preprocessed float32 tensors (b, ...). Named integer
            tensors are int64 and keep their values, except `pixel_values`.

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
                parts = one_ahead(parts)
        else:
            starts = range(0, len(self.labels), batch_size)
            parts = (samples(self.inputs, start, start + batch_size) for start in starts)
            on_cpu = any(tensor.device.type == "cpu" for tensor in named(self.inputs).values())
        away = device.type == "cuda" and on_cpu
        moved = sent_ahead(parts, device) if away else (each(part, lambda t: t.to(device)) for part in parts)
        prepared = (self._prepare(part) for part in moved)
        # Decoding means waiting; inputs already in memory would gain nothing from a thread.
        return one_ahead(prepared) if isinstance(self.inputs, Images) and not away else prepared

    def prepared(self, device: torch.device | str, *, most_bytes: int = 2**30) -> "Probe":
        """Return the same probe with its inputs preprocessed and on the device, for repeated passes.

        Args:
            device: where later passes request their batches.
            most_bytes: of prepared inputs; a larger probe is returned as it is and prepared batch by batch. Images
                are kept decoded, as grey levels, up to twice as much.

        Returns:
            A probe whose batches are views.
        """
        if isinstance(self.inputs, Images):
            if prod(self.inputs.shape) > 2 * most_bytes:
                return self
            return replace(self, inputs=_decoded(self.inputs)).prepared(device, most_bytes=most_bytes)
        tensors = named(self.inputs)
        if sum((8 if _stays_integer(name, t) else 4) * t.numel() for name, t in tensors.items()) > most_bytes:
            return self
        rows = max(CHUNK_ELEMENTS // max(*(prod(t.shape[1:]) for t in tensors.values()), 1), 1)
        batches = [named(batch) for batch in self.batches(rows, device=device)]
        inputs = {name: torch.cat([batch[name] for batch in batches]) for name in tensors}
        return Probe(inputs.get("", inputs), self.labels, self.split, self.n_classes, None)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of inputs by name; a single tensor has the empty name."""
        if isinstance(self.inputs, Images):
            return {"": self.inputs.shape}
        return {name: tuple(tensor.shape) for name, tensor in named(self.inputs).items()}

    def example(self, *, device: torch.device | str) -> Any:
        """Return two samples, as `batches` gives them, to try a network on. For images in files they are black: none is
        decoded. A probe of one sample gives it twice."""
        if isinstance(self.inputs, Images):
            return self._prepare(torch.zeros(2, *self.inputs.shape[1:], dtype=torch.uint8, device=device))
        rows = torch.arange(2).clamp(max=n_samples(self.inputs) - 1)
        return self._prepare(each(self.inputs, lambda tensor: tensor[rows].to(device)))

    def part(self, start: int, stop: int) -> "Probe":
        """Return only the samples from start up to stop; tensors are views, so a mapped file is not read here."""
        split = None if self.split is None else self.split[start:stop]
        if isinstance(self.inputs, Images):
            inputs: Inputs | Images = self.inputs.take(range(start, min(stop, len(self.labels))))
        else:
            inputs = samples(self.inputs, start, stop)
        return replace(self, inputs=inputs, labels=self.labels[start:stop], split=split)

    def take(self, rows: Int64[Tensor, " m"]) -> "Probe":
        """Return only the samples of these rows, in their order."""
        split = None if self.split is None else self.split[rows]
        if isinstance(self.inputs, Images):
            return replace(self, inputs=self.inputs.take(rows.tolist()), labels=self.labels[rows], split=split)
        taken = {name: tensor[rows] for name, tensor in named(self.inputs).items()}
        return replace(self, inputs=taken.get("", taken), labels=self.labels[rows], split=split)

    def _prepare(self, inputs: Inputs) -> Inputs:
        if isinstance(inputs, Tensor):
            return prepared_batch(inputs, self.preprocess)
        return {name: _prepared_as(name, tensor, self.preprocess) for name, tensor in inputs.items()}


def stratified_rows(
    labels: Integer[Tensor, " n"],
    split: Integer[Tensor, " n"] | None,
    n_samples: int,
    *,
    seed: int,
    least_classes: int = 2,
) -> Int64[Tensor, " m"]:
    """Draw rows of a probe in which each class of each split has its share, by the largest remainders.

    Args:
        labels, split: of the probe.
        n_samples: number of rows, at most n.
        seed: of the draw within a class; the same seed gives the same rows.
        least_classes: fewest classes that must be left; 1 for sequences, which have no labels as a whole.

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
    # Among equal remainders the larger class goes first, then the lower label.
    order = sorted(range(len(values)), key=lambda i: (-float(shares[i] - taken[i]), -int(counts[i]), i))
    taken[order[:missing]] += 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(labels), generator=generator)
    # Each sample's rank within its stratum, in the order of the draw.
    by_stratum = drawn[torch.argsort(places[drawn], stable=True)]
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank = torch.arange(len(labels)) - starts
    rows = by_stratum[rank < torch.repeat_interleave(taken, counts)].sort().values
    if len(torch.unique(labels[rows])) < least_classes:
        raise AnalysisError(
            "invalid-argument", f"The {n_samples} samples drawn from this probe are of one class; request more samples."
        )
    return rows


def prepared_batch(batch: Shaped[Tensor, "n ..."], preprocess: Preprocess | None) -> Float32[Tensor, "n ..."]:
    """Return a batch in float32, preprocessed if requested."""
    return batch.to(torch.float32) if preprocess is None else preprocess(batch)


def _decoded(images: Images) -> UInt8[Tensor, "n c h w"]:
    pixels = torch.empty(images.shape, dtype=torch.uint8)
    rows = max(CHUNK_ELEMENTS // prod(images.shape[1:]), 1)
    for start, batch in zip(range(0, len(pixels), rows), images.batches(rows), strict=True):
        pixels[start : start + len(batch)] = batch
    return pixels


def _stays_integer(name: str, tensor: Shaped[Tensor, "..."]) -> bool:
    return name not in ("", "pixel_values") and not tensor.is_floating_point()


def _prepared_as(name: str, tensor: Shaped[Tensor, "n ..."], preprocess: Preprocess | None) -> Shaped[Tensor, "n ..."]:
    if _stays_integer(name, tensor):
        return tensor.to(torch.int64)
    return prepared_batch(tensor, preprocess if name == "pixel_values" else None)

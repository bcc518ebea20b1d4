"""Features by class: the means, and the directions of each class reduced to what its spectrum needs.

The first pass over the features computes the class means. The second subtracts a centre from every sample, divides it
by its length, and reduces each class to a Gram matrix: d x d if the class has more than d samples, else n_c x n_c.
Features in memory are read class by class; features that arrive in batches are reduced as they come.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from ..errors import AnalysisError
from .entropy import check_finite, unit_rows
from .labels import check_labels

# Number of samples converted at a time: their float64 copy stays in a processor's cache.
_CHUNK = 256
# Number of samples whose products are summed in float32 before they are added to a float64 sum.
_BATCH = 1024
# Sets of at most this many numbers are computed in float64: it costs milliseconds.
_SMALL_SET = 2**22
# Lengths between these have squares that neither overflow nor vanish in float32.
_SHORT, _LONG = 1e-15, 1e15
# Width of the strips in which the upper triangle of a product is computed: for d = 512 five eighths of the work remain.
_STRIP = 128
# Classes of at most so many samples are reduced together, in blocks of at most so many numbers.
_SMALL_CLASS, _BLOCK = 256, 2**22


@dataclass(frozen=True)
class ClassStatistics:
    """The classes that some samples hold, in order.

    Attributes:
        classes: their numbers.
        members: for each, the rows of its samples.
        means: for each, the mean of its samples.
        sizes: for each, the mean length of its samples, the scale of its rounding errors.
    """

    classes: Int[Tensor, " k"]
    members: Sequence[Int[Tensor, " _"]]
    means: Float64[Tensor, "k d"]
    sizes: Float64[Tensor, " k"]

    @property
    def centre(self) -> Float64[Tensor, " d"]:
        """The mean of the class means."""
        return self.means.mean(dim=0)


def computing_dtype(features: Float[Tensor, "n d"], n_samples: int | None = None) -> torch.dtype:
    """Return float64 for features of that type and for small sets, float32 otherwise.

    Args:
        features: the features.
        n_samples: how many of them are computed with. Default: all.
    """
    size = features.numel() if n_samples is None else n_samples * features.shape[1]
    return torch.float64 if features.dtype == torch.float64 or size <= _SMALL_SET else torch.float32


def class_statistics(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    n_classes: int,
    *,
    rows: Int64[Tensor, " m"] | None = None,
    at_once: bool = False,
) -> ClassStatistics:
    """Sort samples by class and compute the means.

    Args:
        features: one sample a row, at least one.
        labels: 0 to n_classes - 1.
        n_classes: C; classes without samples are left out.
        rows: the samples that count, in rising order; they are not copied. Default: all.
        at_once: whether each class is converted to float64 as a whole. Its sums then have another order, and the means
            may differ in the last digit.

    Returns:
        The statistics of the classes present.

    Raises:
        AnalysisError: `invalid-argument` for labels of another number or out of range, or no samples.

    Numerics: sums in float64, a few rows at a time unless `at_once`; one pass over the features.
    """
    _check_one_each(features, labels, n_classes)
    chosen = labels if rows is None else labels[rows]
    counts = torch.bincount(chosen, minlength=n_classes)
    classes = counts.nonzero()[:, 0]
    order = torch.argsort(chosen, stable=True)
    order = order if rows is None else rows[order]
    members = torch.tensor_split(order, counts[classes].cumsum(0)[:-1].cpu())
    if at_once:
        means, sizes = zip(*(_mean_at_once(features, rows) for rows in members), strict=True)
        return ClassStatistics(classes, list(members), torch.stack(means), torch.stack(sizes))
    sums, lengths = zip(*(_sums_in_chunks(features, rows) for rows in members), strict=True)
    held = counts[classes].double()
    return ClassStatistics(classes, list(members), torch.stack(sums) / held[:, None], torch.stack(lengths) / held)


def head_directions(
    head: Float64[Tensor, "c d"], classes: Int[Tensor, " k"], *, centred: bool
) -> tuple[Float64[Tensor, "k d"], Bool[Tensor, " k"]]:
    """Return the unit head rows of some classes, and which of them have a direction.

    Args:
        head: one row a class.
        classes: whose rows to return, such as the classes present.
        centred: whether the mean of all rows, also of absent classes, is subtracted.
    """
    centre = head.mean(dim=0) if centred else torch.zeros_like(head[0])
    rows = head[classes]
    return unit_rows(rows - centre, rows.norm(dim=1) + centre.norm())


@dataclass(frozen=True)
class ClassBlock:
    """The reduced directions of some classes: one large class, or small ones side by side, padded with zeros.

    Attributes:
        positions: indices of the classes.
        counts: for each, the number of samples that have a direction.
        gram: for each, Z^T Z of d x d, or Z Z^T of n x n if `rows` is given.
        rows: Z.
    """

    positions: Sequence[int]
    counts: Int[Tensor, " b"]
    gram: Float64[Tensor, "b r r"]
    rows: Float[Tensor, "b r d"] | None


@dataclass(frozen=True)
class LabelledFeatures:
    """Features by class and the directions of the head rows, as the sample level pairs them.

    Attributes:
        features: one sample a row, unchanged.
        members: for each class that takes part, the rows of its samples.
        centre: subtracted from every sample.
        head: for each of these classes, the direction of its head row.
    """

    features: Float[Tensor, "n d"]
    members: Sequence[Int[Tensor, " _"]]
    centre: Float64[Tensor, " d"]
    head: Float64[Tensor, "c d"]

    @property
    def n_samples(self) -> int:
        """Number of samples of the classes that take part, including those without a direction."""
        return sum(len(rows) for rows in self.members)

    @property
    def dtype(self) -> torch.dtype:
        """Float64 for features of that type and for small sets, float32 otherwise."""
        return computing_dtype(self.features, self.n_samples)

    def directions(self, rows: Int[Tensor, " m"]) -> Float64[Tensor, "k d"]:
        """Return unit vectors of these samples, without those that have no direction."""
        directions, usable = unit_directions(self.features.index_select(0, rows), self.centre, torch.float64)
        return directions if bool(usable.all()) else directions[usable]

    def blocks(self) -> Iterator[ClassBlock]:
        """Yield all classes, small ones in batches, each reduced to the smaller of its two Gram matrices."""
        return (block for (block,) in blocks_of_all([self]))


# Receives the class of a chunk of samples, their rows, and the samples unchanged.
Observer = Callable[[int, Int[Tensor, " b"], Float[Tensor, "b d"]], None]


def blocks_of_all(
    sets: Sequence[LabelledFeatures], observe: Observer | None = None
) -> Iterator[tuple[ClassBlock, ...]]:
    """Yield the blocks of several sets that differ only in centre and head, from one pass over their features.

    Args:
        sets: of the same features and classes.
        observe: called with every chunk of samples that is read, for computations that share the pass.

    Returns:
        For each class, or batch of small ones, the block of each set.
    """
    features, members = sets[0].features, sets[0].members
    d = features.shape[1]
    limit = min(_SMALL_CLASS, d)
    by_size = sorted((len(rows), position) for position, rows in enumerate(members))
    small: list[int] = []
    for size, position in by_size:
        if size > limit:
            yield _large(sets, position, observe)
            continue
        # Classes of similar size, so that there is little padding.
        if small and ((len(small) + 1) * size * d > _BLOCK or size > 2 * len(members[small[0]])):
            yield _small(sets, small, observe)
            small = []
        small.append(position)
    if small:
        yield _small(sets, small, observe)


class ClassStream:
    """Directions of features that arrive in batches; memory does not limit their number.

    Each class keeps its rows until there are more than d of them, and from then on d x d numbers.

    Args:
        head: the direction of each class's head row.
        centre: subtracted from every sample; None subtracts nothing.
    """

    def __init__(self, head: Float64[Tensor, "c d"], centre: Float64[Tensor, " d"] | None = None) -> None:
        self.head = head
        self.centre = head.new_zeros(head.shape[1]) if centre is None else centre.to(head)
        self.n_samples = 0
        self.dtype: torch.dtype = torch.float32
        self._classes: dict[int, _ClassAccumulator] = {}

    def update(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Add a batch.

        Args:
            features: of any floating type; float64 is computed in float64, others in float32.
            labels: 0 to C - 1.

        Raises:
            AnalysisError: `invalid-argument` for labels that do not fit, `non-finite-values` in the features.
        """
        _check_one_each(features, labels, len(self.head))
        check_finite("features", features)
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        directions, usable = unit_directions(features, self.centre, dtype)
        self.n_samples += len(labels)
        for position in torch.bincount(labels).nonzero()[:, 0].tolist():
            rows = (labels == position).nonzero()[:, 0]
            if position not in self._classes:
                self._classes[position] = _ClassAccumulator(self.head.shape[1], dtype, features.device)
            for chunk in torch.split(rows, _BATCH):
                self._classes[position].add(directions[chunk], usable[chunk])

    def blocks(self) -> Iterator[ClassBlock]:
        """Yield all classes received, each reduced to the smaller of its two Gram matrices."""
        for position in sorted(self._classes):
            yield self._classes[position].block(position)


def unit_directions(
    samples: Float[Tensor, "n d"], centre: Float64[Tensor, " d"], dtype: torch.dtype
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
    """Return unit vectors of samples minus a centre, and a mask of the samples that have a direction.

    Args:
        samples: one a row.
        centre: subtracted from each.
        dtype: float64 or float32, of the result.

    Returns:
        Directions, zeros for samples without one, and the mask. A sample has no direction if it is shorter than 1e-12
        of the numbers that it was computed from.

    Numerics: in float32 the centre is subtracted in two parts, so that cancellation loses nothing, and squares are
        summed in float64. If squares leave float32's range, the whole computation is in float64.
    """
    if dtype == torch.float32:
        rows = samples.float()
        high = centre.float()
        moved = bool(high.any())
        centred = (rows - high) - (centre - high.double()).float() if moved else rows
        # Summed in float64: samples of nearly one direction would all have their lengths rounded to one side.
        norms = torch.linalg.vector_norm(centred, dim=1, dtype=torch.float64)
        lengths = torch.linalg.vector_norm(rows, dim=1).double() if moved else norms
        extent = torch.cat([norms, lengths])
        if bool(((extent > _SHORT) & (extent < _LONG)).all()):
            usable = norms > 1e-12 * (lengths + centre.norm())
            return torch.where(usable[:, None], centred / norms.float()[:, None], 0.0), usable
    wide = samples.double()
    largest = wide.abs().amax() if wide.numel() else wide.new_zeros(())
    scale = torch.linalg.vector_norm(wide / largest.clamp(min=1e-300), dim=1) * largest + centre.norm()
    directions, usable = unit_rows(wide - centre, scale)
    return directions.to(dtype), usable


def _sums_in_chunks(
    features: Float[Tensor, "n d"], rows: Int[Tensor, " m"]
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, ""]]:
    """Return sum and total length of these samples, converting a few rows at a time."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    length = torch.zeros((), dtype=torch.float64, device=features.device)
    for chunk in torch.split(rows, _CHUNK):
        samples = features.index_select(0, chunk).double()
        total += samples.sum(dim=0)
        length += torch.linalg.vector_norm(samples, dim=1).sum()
    return total, length


def _mean_at_once(
    features: Float[Tensor, "n d"], rows: Int[Tensor, " m"]
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, ""]]:
    """Return mean and mean length of these samples, converting all of them at once."""
    samples = features[rows].double()
    return samples.mean(dim=0), samples.norm(dim=1).mean()


def _check_one_each(features: Float[Tensor, "n d"], labels: Int[Tensor, " m"], n_classes: int) -> None:
    """Check that there is one label a sample, and that labels are classes."""
    if len(labels) != len(features):
        detail = f"There are {len(labels)} labels for {len(features)} samples; expected one label a sample."
        raise AnalysisError("invalid-argument", detail, argument="labels")
    check_labels(labels, n_classes, "invalid-argument")


def _large(sets: Sequence[LabelledFeatures], position: int, observe: Observer | None) -> tuple[ClassBlock, ...]:
    """Return the blocks of one large class, a chunk of samples at a time."""
    features, dtype = sets[0].features, sets[0].dtype
    accumulators = [_ClassAccumulator(features.shape[1], dtype, features.device) for _ in sets]
    for chunk in torch.split(sets[0].members[position], _BATCH):
        samples = features.index_select(0, chunk)
        for entry, accumulator in zip(sets, accumulators, strict=True):
            accumulator.add(*unit_directions(samples, entry.centre, dtype))
        if observe is not None:
            observe(position, chunk, samples)
    return tuple(accumulator.block(position) for accumulator in accumulators)


def _small(sets: Sequence[LabelledFeatures], positions: list[int], observe: Observer | None) -> tuple[ClassBlock, ...]:
    """Return the blocks of several small classes side by side."""
    features, members = sets[0].features, [sets[0].members[position] for position in positions]
    sizes, device = [len(rows) for rows in members], features.device
    samples = features.index_select(0, torch.cat(members))
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
    places = torch.cat([torch.arange(size) for size in sizes]).to(device)
    blocks = []
    for entry in sets:
        directions, usable = unit_directions(samples, entry.centre, entry.dtype)
        rows = directions.new_zeros(len(sizes), max(sizes), directions.shape[1])
        rows[owners, places] = directions
        counts = torch.bincount(owners[usable], minlength=len(sizes))
        wide = rows.double()
        blocks.append(ClassBlock(positions, counts, wide @ wide.mT, rows))
    if observe is not None:
        for position, rows_of, part in zip(positions, members, torch.split(samples, sizes), strict=True):
            observe(position, rows_of, part)
    return tuple(blocks)


class _ClassAccumulator:
    """Directions of one class: up to d rows, then the sum of their products.

    Products are computed about a reference near the mean direction. The rounding error of float32 is then a share of
    the variation within the class, which is small in a collapsed class, instead of a share of 1.
    """

    def __init__(self, d: int, dtype: torch.dtype, device: torch.device) -> None:
        self.d, self.dtype, self.device, self.count = d, dtype, device, 0
        self.rows: list[Float[Tensor, "_n d"]] = []
        self.reference: Float[Tensor, " d"] | None = None
        self.products = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)

    def add(self, directions: Float[Tensor, "n d"], usable: Bool[Tensor, " n"]) -> None:
        """Add further directions of the class, without those that are not usable."""
        if not bool(usable.all()):
            directions = directions[usable]
        self.count += len(directions)
        self.rows.append(directions)
        if self.reference is None:
            if self.count <= self.d:
                return
            self.reference = torch.cat(self.rows).mean(dim=0)
            self.products = torch.zeros(self.d, self.d, dtype=torch.float64, device=self.device)
        for rows in self.rows:
            deviations = rows - self.reference
            self.sum += deviations.sum(dim=0)
            # Only the upper triangle; the entries below it must not be read.
            for start in range(0, self.d, _STRIP):
                strip = slice(start, start + _STRIP)
                self.products[strip, start:] += deviations[:, strip].T @ deviations[:, start:]
        self.rows = []

    def block(self, position: int) -> ClassBlock:
        """Return the class's Gram matrix as a block; `position` is its index among the classes."""
        counts = torch.tensor([self.count], device=self.device)
        if self.reference is None:
            rows = torch.cat(self.rows) if self.rows else torch.zeros(0, self.d, dtype=self.dtype, device=self.device)
            wide = rows.double()
            return ClassBlock([position], counts, (wide @ wide.T)[None], rows[None])
        reference = self.reference.double()
        # sum (z - a)(z - a)^T + a s^T + s a^T + n a a^T with s = sum (z - a).
        crossed = torch.outer(reference, self.sum + self.count / 2 * reference)
        gram = self.products.triu() + self.products.triu(1).T + crossed + crossed.T
        return ClassBlock([position], counts, gram[None], None)

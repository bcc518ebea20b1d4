"""Factor the class Gram matrices, from which the joint spectrum is computed."""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from .classes import ClassBlock, ClassStream, LabelledFeatures
from .couplings import FactorBlock
from .entropy import Spectral, gram_spectrum, spectral
from .products import coordinates

# Most numbers of the factors held for couplings, an eighth of a GiB, and how many times as many before some go.
MOST_NUMBERS, _SLACK = 2**25, 1.25
# All eigenvalues of this many times the kept rows cost about as much as factors and probes of the kept rows.
EXACT = 3


class Factors:
    """R_c of every class: rows from the largest class eigenvalue down; H(K1) is computed on the way.

    Rows that can be among the `largest` are held in float64, for the kept part. For couplings all rows are held in
    float32; of very many, all but the smallest. The eigenvalues of all rows are held.

    Args:
        labelled: the features whose blocks are added, and the head's directions.
        largest: most rows that may be kept.
        most_numbers: most numbers of the rows held for couplings.
    """

    def __init__(
        self, labelled: LabelledFeatures | ClassStream, largest: int, most_numbers: int = MOST_NUMBERS
    ) -> None:
        (n_classes, d), device = labelled.head.shape, labelled.head.device
        none = torch.zeros(0, d, dtype=torch.float64, device=device)
        self.eigenvalues: list[Float64[Tensor, " _r"]] = [none[:, 0]] * n_classes
        self.rows: list[Float64[Tensor, "_q d"]] = [none] * n_classes
        self.blocks: list[FactorBlock] = []
        self.counts: Float64[Tensor, " c"] = torch.zeros(n_classes, dtype=torch.float64, device=device)
        self.labelled, self.largest, self.most_rows = labelled, largest, most_numbers // d
        self.scatter = torch.zeros(d, d, dtype=torch.float64, device=device) if labelled.n_samples > d else None
        self.held = self.blocks_held = 0
        #: Bound of the product of the ranks of features and head; computed when first needed.
        self.products: int | None = None

    def add(self, block: ClassBlock) -> None:
        """Add the block of a class, or of several."""
        if block.gram.shape[-1] == 0:
            return
        self._factorise(block)
        if self.scatter is None:
            return
        _add_scatter(self.scatter, block)
        self.held += sum(len(self.rows[position]) for position in block.positions)
        if self.held > EXACT * self.largest and not self._all_are_needed():
            self.held = self._prune()
        self.blocks_held += self.blocks[-1].values.numel()
        if self.blocks_held > _SLACK * self.most_rows:
            self.blocks_held = self._prune_blocks()

    def finish(self) -> None:
        """Count the samples with a direction and compute H(K1), once all blocks were added."""
        if self.blocks_held > self.most_rows:
            self._prune_blocks()
        self.n = int(self.counts.sum())
        self.degenerate = self.labelled.n_samples - self.n
        if self.n == 0:
            self.spectral = Spectral(0.0, 0, 0.0)
        elif self.scatter is None:
            # Few samples: no factor was pruned, so the stacked factors have the non-zero spectrum of Z.
            self.spectral = spectral(gram_spectrum(torch.cat(self.rows) / math.sqrt(self.n)))
        else:
            self.spectral = spectral(torch.linalg.eigvalsh(self.scatter / self.n))

    def _factorise(self, block: ClassBlock) -> None:
        values, vectors = torch.linalg.eigh(block.gram)
        values, vectors = values.flip(-1), vectors.mT.flip(-2)
        # Smaller eigenvalues are rounding: one sample repeated a thousand times has one direction, not a thousand.
        above = (values > 16 * torch.finfo(torch.float64).eps * values[:, :1]).sum(dim=1)
        ranks = torch.minimum(above, block.counts)
        values = values * (torch.arange(values.shape[1], device=values.device) < ranks[:, None])
        if block.rows is not None:
            factors = vectors @ block.rows.double() * (values > 0)[..., None]
        else:
            factors = vectors * values.sqrt()[..., None]
        most = max(int(ranks.max()), 1)
        self.blocks.append(FactorBlock(block.positions, values[:, :most], factors[:, :most].float()))
        for index, (position, rank) in enumerate(zip(block.positions, ranks.tolist(), strict=True)):
            self.counts[position] = block.counts[index]
            self.eigenvalues[position] = values[index, :rank]
            self.rows[position] = factors[index, :rank].clone() if len(factors) > 1 else factors[0, :rank]

    def _all_are_needed(self) -> bool:
        """Return whether ranks of features and head may allow the exact spectrum, and memory its rows."""
        if self.products is None:
            self.products = self.labelled.head.shape[1] * coordinates(self.labelled.head).shape[1]
        return self.products <= EXACT * self.largest and 2 * self.held <= self.most_rows

    def _prune(self) -> int:
        """Drop float64 rows that cannot be among the largest; return the number of rows left."""
        threshold = self._threshold(self.largest)
        for position, rows in enumerate(self.rows):
            # Every class keeps its leading direction; clone() frees the rest of the storage.
            above = max(int((self.eigenvalues[position] >= threshold).sum()), 1)
            if len(rows) > above:
                self.rows[position] = rows[:above].clone()
        return sum(len(rows) for rows in self.rows)

    def _prune_blocks(self) -> int:
        """Drop float32 rows that cannot be among the largest; return the number of rows left."""
        threshold = self._threshold(self.most_rows)
        for index, block in enumerate(self.blocks):
            above = max(int((block.values >= threshold).sum(dim=1).max()), 1)
            if block.rows.shape[1] > above:
                rows = block.rows[:, :above].clone()
                self.blocks[index] = FactorBlock(block.positions, block.values[:, :above].clone(), rows)
        return sum(block.values.numel() for block in self.blocks)

    def _threshold(self, largest: int) -> float:
        """Return the eigenvalue of this rank among those added so far."""
        every = torch.cat(self.eigenvalues)
        return float(every.topk(min(largest, len(every))).values[-1])


def _add_scatter(scatter: Float64[Tensor, "d d"], block: ClassBlock) -> None:
    """Add the Z^T Z of all classes of a block to the scatter matrix."""
    if block.rows is None:
        scatter += block.gram.sum(dim=0)
        return
    rows = block.rows.flatten(0, 1).double()
    scatter += rows.T @ rows

"""A look along a path before it is measured: only the loss, at many points, on a part of the probe.

Full evaluations are too expensive for a dense grid, and would miss a rise between two points. A loss costs a pass over
some samples, and shows where to evaluate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import AnalysisError
from ..evaluation import EvaluationOptions, capture
from ..networks.loading import LoadedNetwork
from ..probes.probe import Probe, stratified_rows
from ..probes.sequences import IGNORED
from .grids import LOOKS, next_look
from .paths import Path, recalibrate

# Samples of a look: a batch of the evaluation up to the first number, which a network passes at once; at least this
# share of a large probe; and no fewer than the last number.
_IN_ONE_GO, _SHARE, _LEAST = 512, 1 / 16, 32


@dataclass(frozen=True)
class Look:
    """The losses of a look.

    Attributes:
        losses: by w, on the samples of the look.
        n_samples: number of these samples; for a language model, of sequences.
    """

    losses: dict[float, float]
    n_samples: int


def look(
    path: Path,
    probe: Probe,
    *,
    device: torch.device,
    options: EvaluationOptions,
    recalibrating: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Look:
    """Compute the loss at 257 points of a path, and more densely beside its peaks.

    Args:
        path: it is moved.
        probe: a part of it is passed, in proportion to classes and splits.
        device: the device of the passes.
        options: of the following evaluations, with their batch size; `seed` draws the part.
        recalibrating: whether normalisation statistics are recomputed between the ends, here from the same part.
        progress: called with the number of points done and the total.

    Returns:
        The look.

    Raises:
        AnalysisError: the error of a pass, with its w.

    Numerics: as an evaluation's loss. Cost: at most 290 passes over max(min(batch_size, 512), n / 16, 32) samples, for
        a large probe that of 18 passes over all of it.
    """
    assert options.batch_size is not None, "evaluations before a look have chosen one"
    part = probe.take(_rows(probe, options.batch_size, options.seed))
    seen: dict[float, float] = {}
    while (w := next_look(seen)) is not None:
        try:
            network = path.move_to(w)
            if recalibrating and w not in (0.0, 1.0):
                recalibrate(network, part, device=device, batch_size=options.batch_size, precision=options.precision)
            seen[w] = _loss(network, part, device, options)
        except AnalysisError as error:
            raise AnalysisError(error.kind, f"Loss at w = {w:.15g}: {error.detail}", **error.members) from error
        if progress:
            progress(len(seen), max(LOOKS, len(seen)))
    return Look(seen, len(part.labels))


def _rows(probe: Probe, batch_size: int, seed: int) -> Int64[Tensor, " m"]:
    labels, split = probe.labels.cpu(), probe.split
    fitting = torch.arange(len(labels))
    if labels.ndim > 1:
        # Keep sequences with a next token; sequences as a whole have no class.
        fitting = (labels != IGNORED).any(dim=1).nonzero()[:, 0]
        labels = torch.zeros(len(labels), dtype=torch.int64)
    n = max(min(batch_size, _IN_ONE_GO), round(len(fitting) * _SHARE), _LEAST)
    split = None if split is None else split.cpu()[fitting]
    drawn = stratified_rows(labels[fitting], split, min(n, len(fitting)), seed=seed, least_classes=1)
    return fitting[drawn]


def _loss(network: LoadedNetwork, part: Probe, device: torch.device, options: EvaluationOptions) -> float:
    feature_set, _ = capture(network, part, device=device, options=options)
    return float(feature_set.to(device).network_predictions().loss.mean())

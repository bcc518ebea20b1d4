"""A look along a path before it is measured: the loss alone, at many points, on a part of the probe.

Full evaluations are too dear to be taken densely, and a rise that lies between them all stays unseen. A loss costs a
pass over some samples: what it shows says where the evaluations belong.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, capture
from analysis.probes.probe import Probe, stratified_rows
from analysis.probes.sequences import IGNORED
from analysis.sweeps.paths import LOOKS, Path, next_look, recalibrate

# Samples of a look: a batch of the evaluation's up to so many, which a network passes in one go; of a large probe so
# small a share; and no fewer than so many.
_IN_ONE_GO, _SHARE, _LEAST = 512, 1 / 16, 32


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        losses: by w, on the samples that were looked at.
        n_samples: how many these were; of a language model, sequences.
    """

    losses: dict[float, float]
    n_samples: int


def look(
    path: Path,
    probe: Probe,
    *,
    device: torch.device,
    options: EvaluationOptions,
    batch_size: int,
    recalibrating: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Look:
    """Take the loss at 257 points of a path and more closely beside its peaks.

    Args:
        path: which is moved.
        probe: of which a part is passed, in proportion to classes and splits.
        device: where the passes run.
        options: of the evaluations to come; `seed` draws the part.
        batch_size: of these evaluations.
        recalibrating: whether statistics of normalisation are taken anew between the ends, here from the same part.
        progress: called with what is done and of how much.

    Returns:
        The look.

    Raises:
        AnalysisError: what a pass raises, with the w at which it did.

    Numerics: as an evaluation's loss. Cost: at most 290 passes over max(min(batch_size, 512), n / 16, 32) samples, so
        of a large probe that of 18 passes over all of it.
    """
    part = probe.take(_rows(probe, batch_size, options.seed))
    seen: dict[float, float] = {}
    while (w := next_look(seen)) is not None:
        try:
            seen[w] = _loss(path, part, w, device, options, batch_size, recalibrating)
        except AnalysisError as error:
            raise AnalysisError(error.kind, f"Looked at w {w:.15g}: {error.detail}", **error.members) from error
        if progress:
            progress(len(seen), max(LOOKS, len(seen)))
    return Look(seen, len(part.labels))


def _rows(probe: Probe, batch_size: int, seed: int) -> Int64[Tensor, " m"]:
    labels, split = probe.labels.cpu(), probe.split
    fitting = torch.arange(len(labels))
    if labels.ndim > 1:
        # Of sequences those that have a next token; they are of no class as a whole.
        fitting = (labels != IGNORED).any(dim=1).nonzero()[:, 0]
        labels = torch.zeros(len(labels), dtype=torch.int64)
    n = max(min(batch_size, _IN_ONE_GO), round(len(fitting) * _SHARE), _LEAST)
    split = None if split is None else split.cpu()[fitting]
    drawn = stratified_rows(labels[fitting], split, min(n, len(fitting)), seed=seed, least_classes=1)
    return fitting[drawn]


def _loss(
    path: Path,
    part: Probe,
    w: float,
    device: torch.device,
    options: EvaluationOptions,
    batch_size: int,
    recalibrating: bool,
) -> float:
    network = path.move_to(w)
    if recalibrating and w not in (0.0, 1.0):
        recalibrate(network, part, device=device, batch_size=batch_size, precision=options.precision)
    feature_set, _ = capture(network, part, device=device, options=options)
    return float(feature_set.to(device).network_predictions().loss.mean())

"""Influence functions against derivatives by weights, and the standard errors from them against a bootstrap."""

import doctest
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from analysis import influence as module
from analysis.errors import AnalysisError
from analysis.influence import influence, standard_errors

F64 = torch.float64


def _data(seed: int, counts: list[int], d: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features about one mean a class, labels out of order, a head that fits the means, and its logits."""
    generator = torch.Generator().manual_seed(seed)
    c = len(counts)
    means = torch.randn(c, d, dtype=F64, generator=generator)
    labels = torch.repeat_interleave(torch.arange(c), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    scales = torch.arange(1, d + 1, dtype=F64) ** -0.5
    features = means[labels] + 0.5 + spread * scales * torch.randn(len(labels), d, dtype=F64, generator=generator)
    head = means + 0.4 * torch.randn(c, d, dtype=F64, generator=generator)
    logits = features @ head.T + torch.randn(c, dtype=F64, generator=generator)
    return features, labels, head, logits


def _entropy(gram: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(gram)
    return torch.special.entr(values.clamp(min=0)).sum()


def _pairs(z: Tensor, v: Tensor, p: Tensor, path: str) -> dict[str, Tensor]:
    """The entropies and ratios of pairs with weights: whole matrices sqrt(p_i p_j) k_ij."""
    usable = (z.norm(dim=1) > 1e-9) & (v.norm(dim=1) > 1e-9)
    z, v, p = nn.functional.normalize(z[usable]), nn.functional.normalize(v[usable]), p[usable] / p[usable].sum()
    roots = torch.outer(p, p).sqrt()
    h1, h2 = _entropy(roots * (z @ z.T)), _entropy(roots * (v @ v.T))
    joint = _entropy(roots * (z @ z.T) * (v @ v.T))
    return {
        f"{path}.entropy_features": h1,
        f"{path}.entropy_head": h2,
        f"{path}.entropy_joint": joint,
        f"{path}.mutual_information": h1 + h2 - joint,
        f"{path}.mir": (h1 + h2 - joint) / torch.minimum(h1, h2),
        f"{path}.hdr": (h1 - h2).abs() / torch.maximum(h1, h2),
    }


def _metrics(p: Tensor, features: Tensor, labels: Tensor, head: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Every metric as METRICS defines it, for samples of any weights p."""
    classes = torch.unique(labels)
    k = len(classes)
    totals = torch.stack([p[labels == c].sum() for c in classes])
    means = torch.stack([p[labels == c] @ features[labels == c] / p[labels == c].sum() for c in classes])
    rows = head - head.mean(dim=0)
    centred = means - means.mean(dim=0)
    found: dict[str, Tensor] = {}
    for centring, f, m, w in (
        ("none", features, means, head),
        ("global", features - means.mean(dim=0), centred, rows),
    ):
        found |= _pairs(f, w[labels], p, f"interplay.sample.{centring}")
        found |= _pairs(m, w[classes], torch.ones(k, dtype=F64), f"interplay.class_mean.{centring}")
    found["effective_rank"] = found["interplay.sample.global.entropy_features"].exp()
    within = torch.zeros(features.shape[1], features.shape[1], dtype=F64)
    for c, mean, total in zip(classes, means, totals, strict=True):
        deviations = features[labels == c] - mean
        within += (p[labels == c] * deviations.T) @ deviations / total / k
    values, vectors = torch.linalg.eigh(centred.T @ centred / k)
    leading = slice(len(values) - min(k - 1, len(values)), None)
    inverse = vectors[:, leading] / values[leading] @ vectors[:, leading].T
    found["collapse.nc1"] = (within @ inverse).trace() / k
    found["collapse.nc1_condition"] = values[leading].max() / values[leading].min()
    for name, matrix in (("means", centred), ("head", rows)):
        norms = matrix.norm(dim=1)
        upper = torch.triu_indices(len(matrix), len(matrix), offset=1)
        cosines = (matrix @ matrix.T / torch.outer(norms, norms))[upper[0], upper[1]]
        found[f"collapse.nc2_equinorm_{name}"] = norms.std(correction=0) / norms.mean()
        found[f"collapse.nc2_equiangularity_{name}"] = cosines.std(correction=0)
        found[f"collapse.nc2_max_angle_{name}"] = (cosines + 1 / (len(matrix) - 1)).abs().mean()
    w = rows[classes]
    found["collapse.nc3"] = (w / w.norm() - centred / centred.norm()).square().sum()
    nearest = classes[torch.cdist(features, means).argmin(dim=1)]
    q = p / p.sum()
    predicted, confidence = logits.argmax(dim=1), logits.softmax(dim=1).amax(dim=1)
    found["collapse.nc4"] = q @ (nearest != predicted).double()
    found["accuracy"] = q @ (predicted == labels).double()
    found["loss"] = q @ nn.functional.cross_entropy(logits, labels, reduction="none")
    bins = (confidence * 15).ceil()
    gaps = q * ((predicted == labels).double() - confidence)
    found["calibration_error"] = torch.stack([gaps[bins == b].sum().abs() for b in torch.unique(bins)]).sum()
    return found


def _derivatives(arguments: tuple[Tensor, Tensor, Tensor, Tensor], step: float = 1e-5) -> dict[str, Tensor]:
    """Central differences by every weight, centred within classes."""
    labels = arguments[1]
    n = len(labels)
    columns: list[dict[str, Tensor]] = []
    for i in range(n):
        ends = []
        for sign in (1, -1):
            p = torch.full((n,), 1 / n, dtype=F64)
            p[i] += sign * step / n
            ends.append(_metrics(p, *arguments))
        columns.append({name: (ends[0][name] - ends[1][name]) * n / (2 * step) for name in ends[0]})
    found = {name: torch.stack([column[name] for column in columns]) for name in columns[0]}
    for values in found.values():
        for c in torch.unique(labels):
            values[labels == c] -= values[labels == c].mean()
    return found


def _check(arguments: tuple[Tensor, Tensor, Tensor, Tensor], absent: frozenset[str] = frozenset()) -> None:
    found, expected = influence(*arguments), _derivatives(arguments)
    assert set(expected) - set(found) == absent
    assert set(found) <= set(expected)
    for name, values in found.items():
        scale = 1e-7 + float(expected[name].abs().max())
        torch.testing.assert_close(values, expected[name], rtol=0, atol=2e-6 * scale + 1e-8, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("counts", "d"),
    [
        ([7, 6, 8, 5], 9),  # more samples than dimensions, fewer of each class
        ([12, 9, 4], 5),  # more of some classes than dimensions
        ([4, 3, 5], 20),  # fewer samples than dimensions
        ([6, 5, 6, 5, 6], 2),  # too few dimensions for a frame
        ([5, 1, 6, 7], 4),  # one class with one sample
    ],
)
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_influence_is_the_derivative_by_the_weights(counts: list[int], d: int, spread: float) -> None:
    """Of every metric of a report, at both levels and centrings."""
    _check(_data(sum(counts), counts, d, spread))

"""Metrics, intervals and the loss of given features: on the device what they are on the processor."""

import itertools
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis.comparison import ComparisonOptions, compare
from analysis.evaluation import evaluate_features
from analysis.measures.classes import ClassStream, LabelledFeatures, class_statistics
from analysis.measures.entropy import unit_rows
from analysis.measures.influence import influence
from analysis.measures.losses import InterplayLoss
from analysis.measures.spectrum import Entropies, sample_entropies
from analysis.probes.feature_set import FeatureSet
from tests.campaigns import campaign

CPU = torch.device("cpu")
COUNTS, D = [400, 300, 200, 100, 30], 150


def labelled_features(seed: int, counts: list[int], d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, d) about the head's rows, labels (n,) out of order, head (c, d), in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    head = torch.randn(len(counts), d, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), d, generator=generator, dtype=torch.float64) / torch.arange(1, d + 1).sqrt()
    return head[labels] + noise, labels, head


def feature_set(seed: int, dtype: torch.dtype = torch.float64) -> FeatureSet:
    """A feature set of two splits with a bias."""
    features, labels, head = labelled_features(seed, [60, 50, 40, 20, 12], 40)
    split = (torch.arange(len(labels)) % 4 == 0).long()
    return FeatureSet(
        features.to(dtype), labels, head.to(dtype), torch.linspace(-1, 1, len(head)).to(dtype), None, split
    )


def numbers(found: object, path: str = "") -> dict[str, float]:
    """Every finite number of a result by its path, without what was measured of time and of approximation."""
    if isinstance(found, dict):
        parts = {str(key): value for key, value in found.items() if key not in ("timings_seconds", "method")}
    elif isinstance(found, (list, tuple)):
        parts = {str(index): value for index, value in enumerate(found)}
    else:
        known = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
        return {path: float(found)} if known else {}  # type: ignore[arg-type]
    return {name: number for key, value in parts.items() for name, number in numbers(value, f"{path}.{key}").items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_entropies_resident_and_streamed(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """Exact and pinched spectra of features that lie on the device, and of those that come in batches."""
    features, labels, head = labelled_features(4, COUNTS, D)
    features, head = features.to(dtype), unit_rows(head)[0]

    def resident(where: torch.device) -> LabelledFeatures:
        statistics = class_statistics(features.to(where), labels.to(where), len(head))
        return LabelledFeatures(features.to(where), statistics.members, statistics.centre, head.to(where))

    there = resident(device)
    stream = ClassStream(head.to(device), there.centre)
    stream.update(features.to(device), labels.to(device))
    expected = _three(sample_entropies(resident(CPU), tolerance=tolerance))
    for found in (sample_entropies(there, tolerance=tolerance), sample_entropies(stream, tolerance=tolerance)):
        assert _three(found) == pytest.approx(expected, abs=1e-6 if tolerance == 0 else 1e-4)


def _three(entropies: Entropies | None) -> list[float]:
    assert entropies is not None
    return [entropies.features, entropies.head, entropies.joint]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_of_a_feature_set(dtype: torch.dtype, device: torch.device) -> None:
    """Every number of the report, null baseline and collapse included."""
    data = feature_set(0, dtype)
    here, there = (numbers(asdict(evaluate_features(data, device=where))) for where in (CPU, device))
    assert here.keys() == there.keys()
    assert len(here) > 200
    # The standard deviation of a null that hardly varies is the difference of near numbers, and z divides by it.
    for path, value in here.items():
        # So is what is estimated of permutations in float32.
        near = 1e-3 if path.endswith(("_z", "std")) else 1e-4 if ".null." in path else 1e-5
        assert there[path] == pytest.approx(value, rel=near, abs=near), path


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("interval", ["delta", "bootstrap"])
def test_comparison_of_two_feature_sets(interval: Any, device: torch.device) -> None:
    """The same differences, standard errors and intervals."""
    generator = torch.Generator().manual_seed(1)
    first = feature_set(0)
    # The same samples by another network.
    features = first.features + 0.2 * torch.randn(first.features.shape, generator=generator, dtype=torch.float64)
    second = FeatureSet(features, first.labels, first.head, first.head_bias, None, first.split)
    options = ComparisonOptions(interval=interval, resamples=10, null_permutations=0)
    here, there = (numbers(asdict(compare(first, second, device=where, options=options))) for where in (CPU, device))
    assert here.keys() == there.keys()
    assert len(here) > 500
    for path, value in here.items():
        assert there[path] == pytest.approx(value, rel=1e-5, abs=1e-8), path


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("interval", "which"),
    campaign(itertools.product(["delta", "bootstrap"], "AB"), often=[("delta", "A"), ("delta", "B")]),
)
def test_comparison_of_sets_that_lie_apart(interval: Any, which: str, device: torch.device) -> None:
    """One that was kept, on the processor, and one that a network on the device has just given: the same numbers."""
    sets = [feature_set(0), replace(feature_set(0), features=feature_set(0).features.flip(1))]
    options = ComparisonOptions(interval=interval, resamples=10, null_permutations=0)
    expected = numbers(asdict(compare(*sets, device=device, options=options)))
    there = sets["AB".index(which)].to(device)
    sets["AB".index(which)] = replace(there, labels=there.labels.to(device))
    found = numbers(asdict(compare(*sets, device=device, options=options)))
    # Networks as alike as rounding have a difference, and an interval of it, of rounding.
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_influence_functions(device: torch.device) -> None:
    """Every influence of every sample."""
    features, labels, head = labelled_features(6, [40, 30, 20], 16)
    arguments = (features, labels, head, features @ head.T)
    expected = influence(*arguments)
    for name, values in influence(*(tensor.to(device) for tensor in arguments)).items():
        torch.testing.assert_close(values.cpu(), expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_under_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """Loss and gradients of a float32 batch under autocast are those of the processor without it."""
    features, labels, head = labelled_features(4, [20, 20, 24], 12)
    leaves = [tensor.float().requires_grad_() for tensor in (features, head)]
    expected = InterplayLoss(1.0, 1.0)(*leaves, labels)
    on_device = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    with torch.autocast(device.type, dtype=dtype):
        found = InterplayLoss(1.0, 1.0)(*on_device, labels.to(device))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    pairs = zip(torch.autograd.grad(found, on_device), torch.autograd.grad(expected, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-7)


def test_loss_where_features_are_half_precision(device: torch.device) -> None:
    """What an autocast network gives: bfloat16 features beside a float32 head."""
    features, labels, head = labelled_features(4, [20, 20, 24], 12)
    narrow, head = features.bfloat16(), head.float()
    expected = InterplayLoss(1.0, 1.0)(narrow, head, labels)
    found = InterplayLoss(1.0, 1.0)(narrow.to(device), head.to(device), labels.to(device))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    """Evaluation and intervals repeated on one device are equal in every digit, in whatever order a GPU adds."""
    features, labels, head = labelled_features(3, [500] * 5 if device.type == "cuda" else [40] * 5, 30)
    data = FeatureSet(features.float(), labels, head.float(), None, None, None)
    options = ComparisonOptions(null_permutations=3)
    runs = [numbers(asdict(compare(data, data, device=device, options=options))) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]

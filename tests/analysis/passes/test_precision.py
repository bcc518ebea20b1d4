"""Feature sets in half precision: all results are those of the same stored numbers in float64."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from analysis.comparison import ComparisonOptions, compare
from analysis.evaluation import EvaluationOptions, evaluate_features
from analysis.measures.influence import influence
from analysis.measures.predictions import predictions_of
from analysis.probes.feature_set import FeatureSet

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
EXACT = EvaluationOptions(null_permutations=0, tolerance=0.0)


def _features(dtype: torch.dtype, n: int = 1500, d: int = 24, c: int = 8, seed: int = 0) -> FeatureSet:
    """Return overlapping classes, so that a logit's last digits decide some predictions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % c
    head = torch.randn(c, d, generator=generator)
    features = 3 + 0.35 * head[labels] + torch.randn(n, d, generator=generator)
    bias = torch.randn(c, generator=generator)
    split = (torch.arange(n) % 5 == 0).long()
    return FeatureSet(features.to(dtype), labels, head.to(dtype), bias.to(dtype), None, split)


def _widened(entry: FeatureSet) -> FeatureSet:
    assert entry.head_bias is not None
    return replace(
        entry, features=entry.features.double(), head=entry.head.double(), head_bias=entry.head_bias.double()
    )


def _numbers(value: Any, place: str = "") -> dict[str, float]:
    """Return every number of nested dictionaries by its path."""
    if isinstance(value, dict):
        return {key: n for name, part in value.items() for key, n in _numbers(part, f"{place}.{name}").items()}
    return {place: float(value)} if isinstance(value, (int, float)) else {}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_an_evaluation_is_that_of_the_widened_numbers(dtype: torch.dtype) -> None:
    """Loss, accuracy and calibration to the last bits, MIR, HDR and collapse as well, in every split."""
    entry = _features(dtype)
    narrow, wide = (evaluate_features(part, device=CPU, options=EXACT) for part in (entry, _widened(entry)))
    logits = entry.features.double() @ entry.head.double().T + entry.head_bias.double()  # type: ignore[union-attr]
    assert narrow.splits["all"].accuracy == float((logits.argmax(1) == entry.labels).double().mean())
    assert narrow.splits["all"].loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, entry.labels)), rel=1e-13
    )
    for name, split in narrow.splits.items():
        expected = _numbers(asdict(wide.splits[name]))
        found = _numbers(asdict(split))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), name


def test_a_large_set_is_near_the_widened_numbers() -> None:
    """Above 2^22 numbers directions are float32, never of the narrower stored type."""
    entry = _features(torch.bfloat16, n=2**17, d=33, c=3)
    options = EvaluationOptions(null_permutations=0)
    narrow, wide = (evaluate_features(part, device=CPU, options=options) for part in (entry, _widened(entry)))
    assert narrow.splits["all"].loss == pytest.approx(wide.splits["all"].loss, rel=1e-13)
    for level in ("sample", "class_mean"):
        found, expected = (part.splits["all"].interplay[level]["global"] for part in (narrow, wide))
        assert found.mir == pytest.approx(expected.mir, abs=1e-6)
        assert found.hdr == pytest.approx(expected.hdr, abs=1e-6)
    assert narrow.splits["all"].collapse.nc1 == pytest.approx(wide.splits["all"].collapse.nc1, rel=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_comparison_and_its_intervals_are_those_of_the_widened_numbers(dtype: torch.dtype) -> None:
    """Differences, standard errors and counts of correct predictions."""
    a = _features(dtype, n=400)
    b = replace(a, head=_features(dtype, seed=1).head)
    options = ComparisonOptions(null_permutations=0, tolerance=0.0)
    narrow, wide = (
        compare(*pair, device=CPU, options=options).splits["all"] for pair in ((a, b), (_widened(a), _widened(b)))
    )
    found, expected = (_numbers(json.loads(json.dumps(asdict(part)))) for part in (narrow, wide))
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)
    moved = [influence(part.features, part.labels, part.head, part.network_predictions()) for part in (a, _widened(a))]
    assert all(torch.allclose(moved[0][name], moved[1][name], rtol=1e-8, atol=1e-9) for name in moved[1])


def test_predictions_some_rows_at_a_time_are_those_of_all_at_once() -> None:
    """With many classes, so that a piece holds few rows."""
    entry = _features(torch.bfloat16, n=300, d=8, c=40_000)
    pieces, whole = entry.network_predictions(), predictions_of(entry.network_logits(), entry.labels)
    assert torch.equal(pieces.predicted, whole.predicted)
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-13, atol=1e-13)


_PROCESS = """
import json, torch
from dataclasses import asdict
from tests.analysis.passes.test_precision import CPU, EXACT, _features, _numbers
from analysis.evaluation import evaluate_features
torch.set_num_threads(1)
found = evaluate_features(_features(torch.bfloat16), device=CPU, options=EXACT)
print(json.dumps({name: _numbers(asdict(split)) for name, split in found.splits.items()}))
"""


@pytest.mark.slow
def test_two_processes_agree() -> None:
    """Another process with another number of threads sums in another order: only the last bits may differ."""
    printed = subprocess.run([sys.executable, "-c", _PROCESS], capture_output=True, text=True, check=True).stdout
    here = evaluate_features(_features(torch.bfloat16), device=CPU, options=EXACT)
    for name, there in json.loads(printed).items():
        assert here.splits[name].accuracy == there[".accuracy"]
        assert _numbers(asdict(here.splits[name])) == pytest.approx(there, rel=1e-9, abs=1e-9)

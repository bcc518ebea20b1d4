"""Influence functions against derivatives by weights, and their standard errors against a bootstrap."""

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

from analysis.errors import AnalysisError
from analysis.measures import influence as module
from analysis.measures.influence import influence, standard_errors
from tests.campaigns import campaign

F64 = torch.float64


def _data(seed: int, counts: list[int], d: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features around one mean a class, unsorted labels, a head that fits the means, and its logits."""
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
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0)
    return -torch.xlogy(values, values).sum()


def _pairs(z: Tensor, v: Tensor, p: Tensor, path: str) -> dict[str, Tensor]:
    """Return entropies and ratios of pairs with weights: whole matrices sqrt(p_i p_j) k_ij."""
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
    """Return every metric as docs/metrics.md defines it, for samples with any weights p."""
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
    """Return central differences by every weight, centred within classes."""
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
        if name == "collapse.nc4":
            # An average of steps has no such derivative: what moves the means is held against a bootstrap.
            continue
        largest = 1e-7 + float(expected[name].abs().max())
        assert float((values - expected[name]).abs().max()) < 2e-6 * largest + 1e-8, name


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
    """For every metric of a report, at both levels and centrings."""
    _check(_data(sum(counts), counts, d, spread))


def test_absent_classes_and_vectors_without_direction() -> None:
    """Samples of zeros and samples of a zero head row form no pair; absent classes still enter the head's centre."""
    features, labels, head, logits = _data(3, [6, 5, 0, 7], 6)
    features[labels.argmax()] = 0
    head[1] = 0
    _check((features, labels, head, logits))


def test_a_centre_on_a_sample_leaves_it_out() -> None:
    """With one class the centre is its mean: centred means have no direction, and only other metrics are reported."""
    features, labels, head, logits = _data(4, [8], 5)
    found = influence(features, labels, head, logits)
    assert "interplay.sample.none.entropy_features" in found
    assert not any(name.startswith("interplay.class_mean.global") or name.endswith(".mir") for name in found)
    assert "collapse.nc1" not in found
    assert "collapse.nc3" not in found
    assert "interplay.sample.none.hdr" in found


def test_complete_collapse_has_no_error() -> None:
    """Equal samples in every class: no resample differs, and equal entropies give no NaN."""
    frame = torch.eye(4, dtype=F64) - 0.25
    labels = torch.arange(4).repeat(5)
    errors = standard_errors(influence(frame[labels], labels, frame, 9 * frame[labels]))
    for name in ("interplay.sample.global.mir", "interplay.sample.global.hdr", "collapse.nc1", "collapse.nc3", "loss"):
        assert errors[name] == pytest.approx(0, abs=1e-7)
    # Its spread of cosines is at its minimum, where it has no derivative.
    assert "collapse.nc2_equiangularity_means" not in errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_lower_precision(dtype: torch.dtype) -> None:
    """The influence is that of the same features in float64."""
    arguments = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in _data(5, [30, 20, 25], 12)]
    found = influence(*arguments)
    expected = influence(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments))
    assert set(found) == set(expected)
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 10**6), c=st.integers(2, 5), d=st.integers(2, 12), n=st.integers(20, 60))
@settings(max_examples=25, deadline=None)
def test_facts_that_hold_for_every_probe(seed: int, c: int, d: int, n: int) -> None:
    """Order, rotation and class numbers do not matter; each class sums to 0; repeating the probe changes nothing."""
    counts = [2 + (n // c) * (i % 2 + 1) // 2 for i in range(c)]
    features, labels, head, logits = _data(seed, counts, d, 0.5)
    found = influence(features, labels, head, logits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator)).Q
    number = torch.randperm(c, generator=generator)
    back = torch.argsort(number)
    moved = influence(
        3 * features[order] @ rotation, number[labels[order]], head[back] @ rotation, logits[order][:, back]
    )
    twice = influence(features.repeat(2, 1), labels.repeat(2), head, logits.repeat(2, 1))
    assert set(moved) == set(twice) == set(found)
    for name, values in found.items():
        tolerance = 1e-6 * (1e-3 + float(values.abs().max()))
        torch.testing.assert_close(moved[name], values[order], rtol=0, atol=tolerance)
        # That of NC4 is smoothed over samples near a border, the more widely the fewer there are.
        if name != "collapse.nc4":
            torch.testing.assert_close(twice[name], values.repeat(2), rtol=0, atol=tolerance)
        for label in range(c):
            assert float(values[labels == label].sum()) == pytest.approx(0, abs=1e-9 * (1 + float(values.abs().sum())))
    once, doubled = standard_errors(found), standard_errors(twice)
    for name, error in once.items():
        if name == "collapse.nc4":
            continue
        assert doubled[name] == pytest.approx(error / math.sqrt(2), rel=1e-4, abs=1e-9)


def test_an_average_has_the_error_of_an_average() -> None:
    """Accuracy 1/2 of 8 and 3/4 of 4, by hand."""
    labels = torch.tensor([0] * 8 + [1] * 4)
    predicted = torch.tensor([0, 1] * 4 + [1, 1, 1, 0])
    found = influence(torch.randn(12, 3), labels, torch.randn(2, 3), 5 * nn.functional.one_hot(predicted).float())
    assert standard_errors(found)["accuracy"] == pytest.approx(math.sqrt(8 / 4 + 4 * 3 / 16) / 12, abs=1e-12)


def test_the_difference_of_two_checkpoints_is_paired() -> None:
    """It is 0 for a checkpoint and itself; for two, that of the difference, not of independent probes."""
    features, labels, head, logits = _data(8, [30, 30, 30], 8)
    first = influence(features, labels, head, logits)
    second = influence(features + 0.05 * features.flip(1), labels, head, logits + 0.01)
    assert set(standard_errors(first, first).values()) == {0.0}
    paired, alone = standard_errors(second, first), standard_errors(first)
    for name in ("interplay.sample.global.mir", "collapse.nc1"):
        assert 0 < paired[name] < alone[name]
        assert paired[name] == pytest.approx(float((second[name] - first[name]).norm()) / 90)
    assert "accuracy" not in standard_errors(first, {"loss": second["loss"]})


@pytest.mark.parametrize(("c", "spread"), [(10, 1.5), (10, 0.1), (40, 0.7), (100, 0.7)])
def test_few_couplings_are_enough_for_an_error(c: int, spread: float) -> None:
    """With 100 of 800 directions coupled, or 4 a class, the standard errors of MIR are within 5 % of the exact ones."""
    arguments = _data(c, [800 // c] * c, 64, spread)
    exact, pinched = (standard_errors(influence(*arguments, largest=kept)) for kept in (800, 100))
    for centring in ("none", "global"):
        name = f"interplay.sample.{centring}.mir"
        assert pinched[name] != exact[name]
        assert pinched[name] == pytest.approx(exact[name], rel=0.05)
    assert pinched["collapse.nc1"] == exact["collapse.nc1"]


def _disagreement(features: Tensor, labels: Tensor, predicted: Tensor) -> float:
    """Return NC4: the share of samples whose nearest class mean is not the predicted class."""
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(int(labels.max()) + 1)])
    nearest = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    return float((nearest != predicted).double().mean())


def _summary(features: Tensor, labels: Tensor, head: Tensor, logits: Tensor) -> Tensor:
    """Return MIR and HDR at both centrings, NC1, accuracy, loss: from all d x C coordinates of the joint vectors."""
    c = len(head)
    assignment = nn.functional.one_hot(labels, c).double()
    means = (assignment.T @ features) / assignment.sum(dim=0)[:, None]
    centred = means - means.mean(dim=0)
    values = []
    for f, w in ((features, head), (features - means.mean(dim=0), head - head.mean(dim=0))):
        z, v = nn.functional.normalize(f), nn.functional.normalize(w)
        coordinates = (v @ torch.linalg.qr(v.T).Q)[labels]
        joint = (z[:, :, None] * coordinates[:, None, :]).flatten(1)
        h1, h2, h12 = (_entropy(rows.T @ rows / len(labels)) for rows in (z, v[labels], joint))
        values += [(h1 + h2 - h12) / torch.minimum(h1, h2), (h1 - h2).abs() / torch.maximum(h1, h2)]
    within = (
        (features - means[labels])[:, None, :] * assignment[:, :, None] / assignment.sum(dim=0)[:, None].sqrt()
    ).flatten(0, 1)
    spectrum, directions = torch.linalg.eigh(centred.T @ centred / c)
    leading = slice(1 - c, None)
    nc1 = ((within @ directions[:, leading]).square().sum(dim=0) / c / spectrum[leading]).sum() / c
    accuracy = (logits.argmax(dim=1) == labels).double().mean()
    return torch.stack([*values, nc1, accuracy, nn.functional.cross_entropy(logits, labels)])


SUMMARY = [
    "interplay.sample.none.mir",
    "interplay.sample.none.hdr",
    "interplay.sample.global.mir",
    "interplay.sample.global.hdr",
    "collapse.nc1",
    "accuracy",
    "loss",
]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("spread", campaign([1.2, 0.5, 0.15], often=[0.5]))
def test_standard_errors_are_those_of_a_bootstrap(spread: float) -> None:
    """250 resamples within classes at N = 600, d = 32, C = 10: within 15 %."""
    features, labels, head, logits = _data(11, [60] * 10, 32, spread)
    # A tenth as steep, and with noise: a network that makes mistakes at every spread.
    logits = 0.1 * logits + torch.randn(600, 10, dtype=F64, generator=torch.Generator().manual_seed(2))
    found = standard_errors(influence(features, labels, head, logits))
    generator = torch.Generator().manual_seed(1)
    members = [(labels == c).nonzero()[:, 0] for c in range(10)]
    resampled, disagreements = [], []
    for _ in range(250):
        rows = torch.cat([one[torch.randint(60, (60,), generator=generator)] for one in members])
        resampled.append(_summary(features[rows], labels[rows], head, logits[rows]))
        disagreements.append(_disagreement(features[rows], labels[rows], logits[rows].argmax(dim=1)))
    assert found["collapse.nc4"] == pytest.approx(float(torch.tensor(disagreements).std()), rel=0.15)
    spreads = torch.stack(resampled).std(dim=0).tolist()
    for name, expected in zip(SUMMARY, spreads, strict=True):
        assert found[name] == pytest.approx(expected, rel=0.15), name


def test_memory_is_nowhere_near_a_gram_matrix() -> None:
    """20,000 samples, whose Gram matrix would take 3.2 GB, need under 400 MB more, measured in a process of its own."""
    script = """
import resource, torch
from analysis.measures.influence import influence
generator = torch.Generator().manual_seed(0)
labels = torch.arange(20_000) % 10
head = torch.randn(10, 64, generator=generator)
features = head[labels] + torch.randn(20_000, 64, generator=generator)
logits = features @ head.T
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = influence(features, labels, head, logits)
print(len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    metrics, mebibytes = output.stdout.split()
    assert int(metrics) > 30
    assert float(mebibytes) < 400


def test_wrong_arguments_are_named() -> None:
    """No samples, labels out of range, no directions to keep and NaN are refused by name."""
    features, labels, head, logits = _data(0, [4, 4], 3)
    empty = torch.zeros(0, dtype=torch.int64)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("features", lambda: influence(features[:0], empty, head, logits[:0])),
        ("labels", lambda: influence(features, labels + 1, head, logits)),
        ("labels", lambda: influence(features, labels - 1, head, logits)),
        ("largest", lambda: influence(features, labels, head, logits, largest=0)),
    ]
    for name, call in calls:
        with pytest.raises(AnalysisError) as caught:
            call()
        assert (caught.value.kind, caught.value.members["argument"]) == ("invalid-argument", name)
    for name in ("features", "head", "logits"):
        tensors = {"features": features, "head": head, "logits": logits}
        tensors[name] = tensors[name] * math.nan
        with pytest.raises(AnalysisError) as caught:
            influence(tensors["features"], labels, tensors["head"], tensors["logits"])
        assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", name)


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(module).failed == 0

"""The class-structured joint spectrum against the whole N x N Gram matrix, and the permutation baseline."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis.measures.classes import LabelledFeatures, class_statistics
from analysis.measures.collapse import CollapsePass, neural_collapse
from analysis.measures.couplings import Couplings, Worth
from analysis.measures.entropy import Spectral, gram_spectrum, spectral, unit_rows
from analysis.measures.factors import MOST_NUMBERS, Factors
from analysis.measures.joint import JointSpectrum, Method, joint_entropy
from analysis.measures.spectrum import (
    Entropies,
    hdr_of,
    mir_of,
    pair_entropies,
    sample_entropies,
    sample_entropies_of_all,
)
from tests.analysis import reference
from tests.campaigns import campaign


def _case(seed: int, counts: list[int], d: int, power: float = 0.5, separation: float = 1.0) -> tuple[Tensor, ...]:
    """Return features with a power-law spectrum around class means, shuffled labels, and a head near the means."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    scales = torch.arange(1, d + 1).double().pow(-power)
    noise = torch.randn(len(labels), d, generator=generator, dtype=torch.float64) * scales
    means = torch.randn(len(counts), d, generator=generator, dtype=torch.float64) * separation
    head = means + 0.3 * torch.randn(len(counts), d, generator=generator, dtype=torch.float64)
    return noise + means[labels], labels, head


def _labelled(features: Tensor, labels: Tensor, head: Tensor, centring: str) -> LabelledFeatures:
    statistics = class_statistics(features, labels, len(head))
    centre = statistics.centre if centring == "global" else torch.zeros_like(statistics.centre)
    rows = (head - head.mean(dim=0) if centring == "global" else head)[statistics.classes]
    return LabelledFeatures(features, statistics.members, centre, unit_rows(rows)[0])


def _entropies(labelled: LabelledFeatures, tolerance: float = 1e-4, largest: int = 4096) -> Entropies:
    found = sample_entropies(labelled, tolerance=tolerance, largest=largest)
    assert found is not None
    return found


def _factors(labelled: LabelledFeatures, largest: int, most_numbers: int = MOST_NUMBERS) -> Factors:
    factors = Factors(labelled, largest, most_numbers)
    for block in labelled.blocks():
        factors.add(block)
    factors.finish()
    return factors


def _by_rows(factors: Factors, tolerance: float, largest: int) -> tuple[float, Method]:
    """Return the joint entropy as if the ranks of features and head were too large for the spectrum by ranks."""
    head = spectral(gram_spectrum(factors.labelled.head * (factors.counts / factors.n).sqrt()[:, None]))
    spectrum = JointSpectrum(factors, replace(head, rank=10**6))
    return joint_entropy(spectrum, tolerance=tolerance, largest=largest, generator=torch.Generator().manual_seed(0))


def _mir(entropies: Entropies) -> float:
    value = mir_of(entropies.features, entropies.head, entropies.joint)
    assert value is not None
    return value


@pytest.mark.parametrize("centring", ["none", "global"])
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=12),
    d=st.integers(1, 25),
    separation=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_the_exact_spectrum_is_that_of_the_whole_gram_matrix(
    centring: str, seed: int, counts: list[int], d: int, separation: float
) -> None:
    """Unbalanced classes, smaller and larger than d, both centrings."""
    features, labels, head = _case(seed, counts, d, separation=separation)
    expected = reference.interplay(features.numpy(), labels.numpy(), head.numpy(), "sample", centring)
    found = _entropies(_labelled(features, labels, head, centring), tolerance=0.0)
    assert found.method.name == "exact"
    assert found.features == pytest.approx(expected.features, abs=1e-9)
    assert found.head == pytest.approx(expected.head, abs=1e-9)
    assert found.joint == pytest.approx(expected.joint, abs=1e-9)
    assert found.n_pairs == len(labels)


@pytest.mark.parametrize(
    ("power", "separation", "centring"),
    campaign(
        itertools.product([0.0, 0.5, 1.0, 2.0], [0.0, 0.3, 5.0], ["none", "global"]),
        often=[
            *[(0.0, 0.0, "none"), (0.0, 0.3, "global"), (0.0, 5.0, "none"), (0.5, 0.3, "none"), (0.5, 5.0, "global")],
            *[(1.0, 0.0, "global"), (1.0, 0.3, "none"), (2.0, 0.0, "none"), (2.0, 0.3, "global"), (2.0, 5.0, "none")],
        ],
    ),
)
def test_the_pinched_spectrum_bounds_mir_from_below(power: float, separation: float, centring: str) -> None:
    """From flat to steep spectra, from loose to tight classes, MIR is below the exact value by at most the estimate.

    With the default limit, exact for so few rows, and with less than a third of the rows kept.
    """
    features, labels, head = _case(1, [60, 200, 150, 40, 250, 90, 10, 30], 100, power, separation)
    labelled = _labelled(features, labels, head, centring)
    expected = reference.interplay(features.numpy(), labels.numpy(), head.numpy(), "sample", centring)
    assert expected.mir is not None
    found, pinched = _entropies(labelled), _entropies(labelled, largest=130)
    for entropies in (found, pinched):
        short = expected.mir - _mir(entropies)
        assert -1e-9 <= short <= max(entropies.method.error_estimate, 1e-9)
    assert found.method.error_estimate <= 3e-4
    assert found.method.kept <= found.method.total <= 630
    assert pinched.method.name == "pinched"
    assert pinched.method.kept <= 130 < pinched.method.total / 3
    assert pinched.method.error_estimate <= 0.01


def test_steep_spectra_keep_a_small_part() -> None:
    """The pinched tail makes large probes affordable: a fifth of the rows is enough here."""
    features, labels, head = _case(2, [300] * 10, 128, 1.5, 0.5)
    found = _entropies(_labelled(features, labels, head, "none"))
    assert found.method.name == "pinched"
    assert found.method.total == 1280
    assert found.method.kept <= 400
    assert 0 < found.method.tail_mass < 0.01


@pytest.mark.slow
def test_a_larger_kept_part_never_lowers_mir() -> None:
    """The error is monotone, also if the limit stops the growth, and the estimate covers it."""
    features, labels, head = _case(3, [100] * 8, 90, 0.3, 0.4)
    labelled = _labelled(features, labels, head, "global")
    exact = _mir(_entropies(labelled, 0.0))
    sizes = (30, 60, 100, 160, 239, 400, 700)
    found = [_entropies(labelled, 1e-9, largest) for largest in sizes]
    values = [_mir(entropies) for entropies in found]
    assert all(first <= second + 1e-12 for first, second in itertools.pairwise(values))
    for largest, entropies, value in zip(sizes, found, values, strict=True):
        # From a third of 90 x 7 on, the ranks of features and head, the spectrum is taken as it is.
        assert entropies.method.name == ("pinched" if largest < 210 else "exact")
        assert entropies.method.kept <= (largest if largest < 210 else 630)
        assert -1e-9 <= exact - value <= entropies.method.error_estimate


def test_few_samples_of_many_classes_are_exact() -> None:
    """With more rows than `largest`, but at most three times as many, the result is exact, as for tokens."""
    counts = [1, 2, 3, 4, 5, 6] * 40
    features, labels, head = _case(5, counts, 24, 0.5, 0.4)
    labelled = _labelled(features, labels, head, "none")
    for largest, name, total in ((24 * 24 // 3, "exact", 24 * 24), (24 * 24 // 3 - 1, "pinched", sum(counts))):
        found = _entropies(labelled, largest=largest)
        assert (found.method.name, found.method.total) == (name, total)
    assert _entropies(labelled, largest=24 * 24 // 3) == _entropies(labelled, tolerance=0.0)


def test_what_does_not_settle_is_exact_where_that_is_as_cheap() -> None:
    """For large classes with a flat spectrum more than a third of 90 x 7 rows would be kept: all are."""
    features, labels, head = _case(3, [100] * 8, 90, 0.3, 0.4)
    labelled = _labelled(features, labels, head, "global")
    assert _entropies(labelled, tolerance=1e-9, largest=209).method.name == "pinched"
    assert _entropies(labelled, tolerance=1e-9, largest=211).method.name == "exact"


@pytest.mark.parametrize("seed", campaign(range(24), often=range(0, 24, 3)))
def test_error_estimates_hold_on_random_cases(seed: int) -> None:
    """For random sizes, spectra, separations and classes MIR is below the exact value, within the estimate."""
    generator = torch.Generator().manual_seed(seed)
    d, n_classes = int(torch.randint(30, 120, (), generator=generator)), 3 + seed * 2
    counts = torch.randint(1, 1600 // n_classes, (n_classes,), generator=generator).tolist()
    power, separation = (2.0 * float(x) for x in torch.rand(2, generator=generator))
    features, labels, head = _case(seed, counts, d, power / 2, separation)
    centring = ("none", "global")[seed % 2]
    expected = reference.interplay(features.numpy(), labels.numpy(), head.numpy(), "sample", centring)
    assert expected.mir is not None
    largest = sum(min(count, d) for count in counts) // 5
    found = _entropies(_labelled(features, labels, head, centring), largest=largest)
    short = expected.mir - _mir(found)
    assert -1e-9 <= short <= max(found.method.error_estimate, 1e-9)


@pytest.mark.parametrize(
    ("spread", "n_classes", "each"),
    campaign(
        [(spread, *sizes) for spread in (1e-3, 1e-4, 1e-5, 1e-6) for sizes in ((150, 12), (300, 6), (500, 4))],
        often=[(1e-3, 150, 12), (1e-4, 300, 6), (1e-5, 150, 12), (1e-6, 300, 6), (1e-6, 500, 4)],
    ),
)
def test_rounding_is_not_taken_for_couplings(spread: float, n_classes: int, each: int) -> None:
    """More classes than d^2, nearly collapsed: the kept part vanishes in most directions, MIR is not above exact."""
    d, generator = 8, torch.Generator().manual_seed(0)
    means = torch.randn(n_classes, d, generator=generator, dtype=torch.float64)
    labels = torch.arange(n_classes * each) % n_classes
    noise = torch.randn(len(labels), d, generator=generator, dtype=torch.float64)
    labelled = _labelled(means[labels] + spread * noise, labels, means, "none")
    exact, largest = _entropies(labelled, tolerance=0.0), n_classes * min(each, d) // 4
    joint, method = _by_rows(_factors(labelled, largest), 1e-4, largest)
    assert method.name == "pinched"
    short = (joint - exact.joint) / min(exact.features, exact.head)
    assert -2e-11 <= short <= method.error_estimate + 2e-11


def test_couplings_are_not_worth_more_than_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the estimate, nothing is subtracted that exceeds the bound by the mass of the tail."""
    features, labels, head = _case(2, [60] * 10, 64, 1.5, 0.5)
    labelled = _labelled(features, labels, head, "none")
    exact, factors = _entropies(labelled, 0.0), _factors(labelled, 150)
    monkeypatch.setattr(Couplings, "worth", lambda *_args, **_options: Worth(0.5, 0.5, 0.5))
    joint, method = _by_rows(factors, 1e-2, 150)
    assert method.name == "pinched"
    assert 0 <= joint - exact.joint <= method.error_estimate * min(exact.features, exact.head)


@pytest.mark.parametrize(("mass", "near"), [(1e-4, 0.3), (1e-5, 0.05), (2e-7, 0.05)])
def test_the_smallest_rows_couplings_are_in_the_estimate(mass: float, near: float) -> None:
    """Each class has orthogonal directions of its own; directions that all classes share have little mass, equally.

    The joint spectrum is then that of the own directions and, for each shared one, that of the head: a closed form.
    """
    n_classes, each, generator = 10, 110, torch.Generator().manual_seed(0)
    n_own = n_classes * each
    pairs, sides = torch.arange(n_own).repeat_interleave(2), torch.tensor([1.0, -1.0]).repeat(n_own)
    features = torch.zeros(2 * n_own, n_own + each, dtype=torch.float64)
    features[torch.arange(2 * n_own), pairs] = math.sqrt(1 - mass)
    features[torch.arange(2 * n_own), n_own + pairs % each] = math.sqrt(mass) * sides.double()
    head = torch.zeros(n_classes, n_own + each, dtype=torch.float64)
    head[:, :8] = near * torch.randn(n_classes, 8, generator=generator, dtype=torch.float64)
    head[:, 0] += 1
    labelled = _labelled(features, torch.arange(n_classes).repeat_interleave(2 * each), head, "none")
    own, shared = -(1 - mass) * math.log((1 - mass) / n_own), -mass * math.log(mass / each)
    of_head = torch.linalg.eigvalsh(labelled.head @ labelled.head.T / n_classes).clamp(min=0)
    head_entropy = float(torch.special.entr(of_head).sum())
    expected = mir_of(own + shared, head_entropy, own + shared + mass * head_entropy)
    found = _entropies(labelled, largest=250)
    assert found.method.name == "pinched"
    assert expected is not None
    assert -1e-9 <= expected - _mir(found) <= found.method.error_estimate


@pytest.mark.parametrize("n_classes", [3, 4, 10, 100, 1000])
def test_at_collapse_mir_is_the_closed_form(n_classes: int) -> None:
    """Features on a simplex frame that is also the head: 1/(C-1) + (C-2) log(C-2) / ((C-1) log(C-1)), HDR 0."""
    frame = unit_rows(torch.eye(n_classes, dtype=torch.float64) - 1 / n_classes)[0]
    labels = torch.arange(n_classes).repeat(2)
    found = _entropies(_labelled(frame[labels], labels, frame, "none"), tolerance=0.0)
    k = n_classes - 1
    expected = 1 / k + (k - 1) * math.log(max(k - 1, 1)) / (k * math.log(k))
    assert found.features == pytest.approx(math.log(k), abs=1e-9)
    assert _mir(found) == pytest.approx(expected, abs=1e-9)
    assert hdr_of(found.features, found.head) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("largest", [40, 4096])
@pytest.mark.parametrize("counts", [[900, 700, 500], [300, 40, 7, 260, 1, 90, 33], [12] * 60])
def test_one_reading_gives_what_two_give(counts: list[int], largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both centrings and the collapse from one pass over large and small classes equal those alone, bit for bit."""
    features, labels, head = _case(11, counts, 64, 0.7, 1.0)
    statistics, predicted = class_statistics(features, labels, len(head)), (features @ head.T).argmax(dim=1)
    sets = [_labelled(features, labels, head, centring) for centring in ("none", "global")]
    one_pass = CollapsePass(statistics, head, predicted, torch.float64)
    generators = [torch.Generator().manual_seed(0) for _ in sets]
    together = sample_entropies_of_all(sets, largest=largest, generators=generators, observe=one_pass.take)
    assert together == [sample_entropies(entry, largest=largest) for entry in sets]
    # Of a large set one centring after the other, whose shares of the whole are told in order.
    monkeypatch.setattr("analysis.measures.spectrum._ONE_READING", 0)
    generators, told = [torch.Generator().manual_seed(0) for _ in sets], list[float]()
    assert together == sample_entropies_of_all(sets, largest=largest, generators=generators, tell=told.append)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(told))
    assert told[-1] == pytest.approx(1)
    found, alone = one_pass.finish(), neural_collapse(features, statistics, head, predicted)
    assert found.nc4 == alone.nc4
    assert found.nc1 == pytest.approx(alone.nc1, rel=1e-12)
    assert found.nc3 == alone.nc3


def test_rows_that_are_not_kept_are_not_held_and_change_nothing() -> None:
    """With many classes factors are pruned while they are added; the kept ones give the same as without pruning."""
    features, labels, head = _case(4, [30] * 40, 50, 1.0, 1.0)
    labelled = _labelled(features, labels, head, "none")
    pruned, whole = _factors(labelled, 100), _factors(labelled, 1200)
    assert sum(len(rows) for rows in pruned.rows) <= 240
    assert sum(len(rows) for rows in whole.rows) == 1200
    assert pruned.spectral == whole.spectral
    spectra = [
        torch.linalg.eigvalsh(JointSpectrum(factors, Spectral(0.0, 40, 0.0)).matrix(100)) for factors in (pruned, whole)
    ]
    torch.testing.assert_close(*spectra, rtol=0, atol=1e-14)


def test_couplings_of_the_smallest_rows_may_be_missing() -> None:
    """If there are too many numbers to hold, the bounds of the rest are wider on both sides, and still hold."""
    features, labels, head = _case(4, [30] * 40, 50, 0.7, 1.0)
    labelled = _labelled(features, labels, head, "none")
    exact = _entropies(labelled, 0.0)
    found = {}
    for numbers in (MOST_NUMBERS, 30_000):
        factors = _factors(labelled, 300, numbers)
        joint, method = _by_rows(factors, 1e-9, 300)
        held = sum(block.rows.numel() for block in factors.blocks)
        found[numbers] = held, joint, method.error_estimate * min(exact.features, exact.head)
    (all_numbers, whole, of_whole), (some_numbers, part, of_part) = found[MOST_NUMBERS], found[30_000]
    assert some_numbers < 0.7 * all_numbers
    assert part - of_part <= exact.joint <= whole < part
    assert whole - of_whole <= exact.joint
    assert of_whole < of_part


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    d=st.integers(2, 10),
    repeats=st.integers(2, 4),
)
def test_what_leaves_the_numbers_unchanged(seed: int, counts: list[int], d: int, repeats: int) -> None:
    """Positive scales of rows, rotations, permutations, relabelling and repeating the probe; and the bounds."""
    features, labels, head = _case(seed, counts, d)
    generator = torch.Generator().manual_seed(seed)
    base = _entropies(_labelled(features, labels, head, "none"))
    assert max(base.features, base.head) <= base.joint <= base.features + base.head

    def rotation() -> Tensor:
        turn: Tensor = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
        return turn

    def scales(n: int) -> Tensor:
        return torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.1

    order = torch.randperm(len(labels), generator=generator)
    names = torch.randperm(len(counts), generator=generator)
    changed = {
        "scaled": (features * scales(len(labels)), labels, head * scales(len(head))),
        "rotated": (features @ rotation(), labels, head @ rotation()),
        "permuted": (features[order], labels[order], head),
        "relabelled": (features, names[labels], head[names.argsort()]),
        "repeated": (features.repeat(repeats, 1), labels.repeat(repeats), head),
    }
    for name, case in changed.items():
        found = _entropies(_labelled(*case, "none"))
        for level in ("features", "head", "joint"):
            assert getattr(found, level) == pytest.approx(getattr(base, level), abs=1e-10), name


def test_equal_features_share_nothing_and_ratios_are_not_defined() -> None:
    """For equal z H(K1) = 0, also for many samples, where rounding accumulates."""
    features = torch.full((20_000, 64), 0.1)
    labels = torch.arange(20_000) % 4
    found = _entropies(_labelled(features, labels, torch.eye(4, 64), "none"))
    assert found.features == 0.0
    assert found.joint == pytest.approx(math.log(4), abs=1e-9)
    assert mir_of(found.features, found.head, found.joint) is None
    assert hdr_of(found.features, found.head) == 1.0


def test_orthogonal_features_have_log_n() -> None:
    """For orthogonal z, each its own class with an orthogonal head row: MIR 1, HDR 0."""
    found = _entropies(_labelled(torch.eye(12), torch.arange(12), torch.eye(12, dtype=torch.float64), "none"))
    assert found.features == pytest.approx(math.log(12), abs=1e-12)
    assert _mir(found) == pytest.approx(1, abs=1e-12)
    assert hdr_of(found.features, found.head) == pytest.approx(0, abs=1e-12)


def test_samples_without_direction_are_left_out_and_counted() -> None:
    """Rows of zeros take no part; a class may lose all of its samples."""
    features, labels, head = _case(5, [9, 4, 7], 6)
    zeroed = features.clone()
    zeroed[labels == 1] = 0
    found = _entropies(_labelled(zeroed, labels, head, "none"))
    kept = labels != 1
    expected = reference.interplay(features[kept].numpy(), labels[kept].numpy(), head.numpy(), "sample", "none")
    assert found.degenerate_samples == 4
    assert found.n_pairs == 16
    assert _mir(found) == pytest.approx(expected.mir, abs=1e-10)
    assert (
        sample_entropies(_labelled(torch.zeros(5, 3), torch.tensor([0, 0, 1, 1, 1]), torch.eye(2, 3), "none")) is None
    )


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_pairs_follow_the_definition(n: int) -> None:
    """At class-mean level there is one pair a class."""
    z, v = (unit_rows(torch.randn(n, 7, generator=torch.Generator().manual_seed(seed)))[0] for seed in (n, n + 1))
    found, expected = pair_entropies(z, v), reference.numbers(z.numpy(), v.numpy())
    for level in ("features", "head", "joint"):
        assert getattr(found, level) == pytest.approx(getattr(expected, level), abs=1e-10)


@pytest.mark.parametrize("centring", ["none", "global"])
@pytest.mark.parametrize(
    ("counts", "d", "features_rank", "head_rank"),
    [([30] * 60, 12, 12, 12), ([3, 1, 40, 7] * 25, 9, 9, 3), ([25] * 12, 20, 5, 4), ([60] * 4, 6, 6, 4)],
)
def test_ranks_give_the_exact_spectrum_where_they_are_least(
    centring: str, counts: list[int], d: int, features_rank: int, head_rank: int
) -> None:
    """More classes than d and fewer, heads and features of fewer directions than d agree with the whole Gram matrix."""
    features, labels, head = _case(9, counts, d)
    generator = torch.Generator().manual_seed(9)
    features = features @ torch.randn(d, features_rank, generator=generator, dtype=torch.float64)
    features = features @ torch.randn(features_rank, d, generator=generator, dtype=torch.float64)
    if head_rank < min(d, len(counts)):
        head = head[:, :head_rank] @ torch.randn(head_rank, d, generator=generator, dtype=torch.float64)
    expected = reference.interplay(features.numpy(), labels.numpy(), head.numpy(), "sample", centring)
    found = _entropies(_labelled(features, labels, head, centring))
    assert found.method.name == "exact"
    assert found.method.total <= features_rank * head_rank
    for level in ("features", "head", "joint"):
        assert getattr(found, level) == pytest.approx(getattr(expected, level), abs=2e-12), level
    assert abs(_mir(found) - (expected.mir or 0)) <= max(found.method.error_estimate, 1e-12)


def test_ranks_are_used_where_a_third_of_the_rows_would_be_kept() -> None:
    """More than 1,024 products and many more rows are exact, at a cost independent of the number of classes."""
    features, labels, head = _case(10, [60] * 60, 40, 0.2, 0.5)
    found = _entropies(_labelled(features, labels, head, "none"))
    assert (found.method.name, found.method.total) == ("exact", 1600)
    by_rows = _by_rows(_factors(_labelled(features, labels, head, "none"), 2400), 0.0, 2400)
    assert by_rows[1].total == 2400
    assert found.joint == pytest.approx(by_rows[0], abs=1e-11)


def test_pairs_of_few_directions_follow_the_definition() -> None:
    """At class-mean level, with more classes than the product of both ranks."""
    z, v = (unit_rows(torch.randn(150, 7, generator=torch.Generator().manual_seed(seed)))[0] for seed in (1, 2))
    found, expected = pair_entropies(z, v), reference.numbers(z.numpy(), v.numpy())
    assert found.method.total == 49
    for level in ("features", "head", "joint"):
        assert getattr(found, level) == pytest.approx(getattr(expected, level), abs=1e-12)


@pytest.mark.parametrize(("spread", "defined"), [(4e-7, True), (2.5e-7, True), (1.2e-7, False), (0.0, False)])
def test_tiny_entropies_are_defined_down_to_the_stated_threshold(spread: float, defined: bool) -> None:
    """For two directions so close that H(K1) is near 1e-12, in closed form, the error of MIR is within the estimate.

    Half of the samples of each class lie at one, half at the other: features and head share nothing, and MIR is 0.
    """
    features = torch.tensor([[1.0, spread], [1.0, -spread]], dtype=torch.float64).repeat(200, 1)
    labels = torch.arange(400) // 2 % 4
    found = _entropies(_labelled(features, labels, torch.eye(4, 2, dtype=torch.float64) + 0.5, "none"))
    share = spread**2 / (1 + spread**2)
    true = -share * math.log(share) + share if share else 0.0
    assert (true >= 1e-12) == defined
    mir = mir_of(found.features, found.head, found.joint)
    assert (mir is not None) == defined
    if mir is not None:
        assert abs(mir) <= found.method.error_estimate
        assert 1e-5 < found.method.error_estimate < 0.2
        assert found.features == pytest.approx(true, rel=found.method.error_estimate)

"""Comparisons: values against the evaluations, standard errors of the two methods against each other, tests by hand."""

import doctest
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from analysis import comparison as module
from analysis.comparison import ComparisonOptions, compare, mcnemar_p, smallest_difference
from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, SplitEvaluation, evaluate_features
from analysis.probes.feature_set import FeatureSet
from analysis.spreads import Sizes, Spread, delta_spreads
from tests.campaigns import campaign

CPU = torch.device("cpu")
F64 = torch.float64
QUICK = ComparisonOptions(null_permutations=0)


def pair(seed: int, counts: list[int], d: int, *, shared: float = 0.8, split: bool = False) -> list[FeatureSet]:
    """Return two networks' features of the same samples, with a common part of the noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=F64, generator=generator)

    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    common = normal(len(labels), d)
    which = (torch.arange(len(labels)) % 4 == 0).long() if split else None
    sets = []
    for spread in (1.0, 0.8):
        means = normal(len(counts), d)
        noise = shared * common @ normal(d, d) / d**0.5 + math.sqrt(1 - shared**2) * normal(len(labels), d)
        head = means + 0.4 * normal(len(counts), d)
        sets.append(FeatureSet(means[labels] + spread * noise, labels, head, normal(len(counts)), None, which))
    return sets


def test_doctests() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


def test_values_are_those_of_the_evaluations() -> None:
    """Both sides and every difference equal those of two evaluations, on each split."""
    a, b = pair(0, [40, 30, 50], 6, split=True)
    comparison = compare(a, b, device=CPU)
    for entry, found in ((a, comparison.a), (b, comparison.b)):
        alone = evaluate_features(entry, device=CPU, options=EvaluationOptions())
        assert found.splits == alone.splits
    assert list(comparison.splits) == ["all", "train", "test"]
    for name, split in comparison.splits.items():
        assert split.a == comparison.a.splits[name]
        of_b = comparison.b.splits[name]
        mir = split.differences["interplay.class_mean.global.mir"]
        assert mir.a == split.a.interplay["class_mean"]["global"].mir
        assert mir.b == of_b.interplay["class_mean"]["global"].mir
        for path, found_difference in split.differences.items():
            values = (found_difference.a, found_difference.b, found_difference.difference)
            assert None not in values, path
            assert found_difference.difference == found_difference.b - found_difference.a  # type: ignore[operator]
        assert split.differences["collapse.nc3"].b == of_b.collapse.nc3
    assert {"metrics", "intervals"} & comparison.timings_seconds.keys() == {"intervals"}


def test_every_metric_of_a_split_is_compared() -> None:
    """Every measure of a split has a difference; a new field cannot be forgotten."""
    a, b = pair(0, [20, 30, 25], 5)
    split = compare(a, b, device=CPU, options=QUICK).splits["all"]

    def numbers(value: object, path: str) -> set[str]:
        if isinstance(value, dict):
            return set().union(*(numbers(member, f"{path}.{key}") for key, member in value.items()))
        if hasattr(value, "__dataclass_fields__"):
            return numbers(vars(value), path)
        return {path.removeprefix(".")} if isinstance(value, float) else set()

    told = {".optimum.", ".method.", ".null."}  # what the measures are read beside
    expected = {path for path in numbers(split.a, "") if not any(part in path for part in told)}
    assert expected <= split.differences.keys()
    assert len(expected) > 40


def _for_given_sizes(a: FeatureSet, b: FeatureSet) -> dict[str, Spread]:
    """Return standard errors of the delta method for given class sizes, as in resamples within classes."""
    sides = [(evaluate_features(entry, device=CPU, options=QUICK).splits["all"], entry) for entry in (a, b)]
    first, second = ((split, module._metrics(split), module._influences(entry, CPU)) for split, entry in sides)
    sizes = replace(Sizes.of(a.labels, tokens=False), drawn=False, given=True)
    return delta_spreads(first, second, sizes, confidence=0.95, fewest=6)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("seed", "counts", "d"),
    campaign(
        [(1, [60, 60, 60], 5), (2, [80, 40, 50, 30], 8), (3, [100] * 5, 12)],
        often=[(1, [60, 60, 60], 5)],
    ),
)
def test_delta_and_bootstrap_agree(seed: int, counts: list[int], d: int) -> None:
    """Both methods give the same standard errors within 15 % for the measures used in gates."""
    a, b = pair(seed, counts, d)
    delta = compare(a, b, device=CPU, options=QUICK).splits["all"].differences
    given = _for_given_sizes(a, b)
    options = replace(QUICK, interval="bootstrap", resamples=200)
    drawn = compare(a, b, device=CPU, options=options).splits["all"].differences
    for path in ("accuracy", "loss", "interplay.sample.global.mir", "interplay.sample.none.mir", "collapse.nc3"):
        ratio = given[path].standard_error / drawn[path].standard_error  # type: ignore[operator]
        # 200 resamples know a standard error to 5 %.
        assert 0.85 < ratio < 1.15, (path, ratio)
        # Where sizes differ the error is that of drawn ones, which may be so much larger at the most.
        assert 1 - 1e-9 <= delta[path].standard_error / given[path].standard_error < 1.1501, path  # type: ignore[operator]
    assert drawn["interplay.sample.global.mir"].bias_b is not None
    assert delta["interplay.sample.global.mir"].bias is None
    # A resample holds samples twice, so MIR of it is higher.
    assert drawn["interplay.sample.global.mir"].bias_a > 0  # type: ignore[operator]


def test_what_both_share_drops_out() -> None:
    """A slightly changed network has smaller errors of the difference than one with noise of its own."""
    a, b = pair(5, [60, 60, 60], 6, shared=0.0)
    moved = replace(a, features=a.features + 0.05 * (b.features - a.features))
    errors = [
        compare(a, other, device=CPU, options=QUICK).splits["all"].differences["interplay.sample.global.mir"]
        for other in (moved, b)
    ]
    assert errors[0].standard_error < 0.1 * errors[1].standard_error  # type: ignore[operator]


def test_a_network_beside_itself() -> None:
    """All differences are 0 and not significant; the mismatch of NC4, which never differs, has no interval."""
    a, _ = pair(0, [30, 20, 40], 5)
    split = compare(a, a, device=CPU, options=QUICK).splits["all"]
    for path, found in split.differences.items():
        if path == "collapse.nc4":
            assert (found.difference, found.low, found.significant) == (0, None, None)
            assert found.reason == "too_few_disagreements"
        elif not path.endswith(".mir_z"):
            assert found.difference == 0
            assert found.low is not None, path
            assert found.low <= 0 <= found.high  # type: ignore[operator]
            assert found.significant is False
    assert split.predictions.agreement == 1
    assert split.predictions.mcnemar_p == 1
    assert split.predictions.smallest_difference is None
    assert split.predictions.reason == "too_few_disagreements"


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("dtype", "interval"), [(F64, "delta"), (torch.float32, "delta"), (torch.float32, "bootstrap")]
)
def test_rounding_is_not_significant(dtype: torch.dtype, interval: Literal["delta", "bootstrap"]) -> None:
    """A network against itself with rotated or reordered hidden units: only the order of sums differs."""
    a, _ = pair(0, [40] * 5, 12)
    a = replace(a, features=a.features.to(dtype), head=a.head.to(dtype), logits=a.network_logits())
    options = replace(QUICK, interval=interval, resamples=20)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=F64, generator=generator)).Q
    for change in (turn, torch.eye(12, dtype=F64)[torch.randperm(12, generator=generator)]):
        features, head = ((rows.double() @ change).to(dtype) for rows in (a.features, a.head))
        found = compare(a, replace(a, features=features, head=head), device=CPU, options=options).splits["all"]
        values = found.differences.items()
        assert any(entry.difference != 0 for _, entry in values)
        assert [path for path, entry in values if entry.significant] == []


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_what_a_pinched_spectrum_leaves_open_is_not_significant() -> None:
    """Reordered units change the probes' signs: MIR moves within the stated error, and beyond its interval."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 10
    means = torch.randn(10, 128, generator=generator, dtype=F64)
    scales = torch.arange(1, 129).double().pow(-1.5)
    features = means[labels] * 0.5 + torch.randn(3000, 128, generator=generator, dtype=F64) * scales
    a = FeatureSet(features, labels, means, None, features @ means.T, None)
    same = replace(a, features=1.0000001 * features.flip(1), head=means.flip(1))
    found = compare(a, same, device=CPU, options=QUICK).splits["all"]
    method = found.a.interplay["sample"]["global"].method
    assert method is not None
    assert method.name == "pinched"
    mirs = [found.differences[f"interplay.sample.global.{name}"] for name in ("mir", "mutual_information")]
    assert all(entry.significant is False for entry in mirs)
    # What is not within the errors is: the same with other features.
    other = compare(a, replace(a, features=features * 2 - means[labels] * 0.2), device=CPU, options=QUICK)
    assert other.splits["all"].differences["interplay.sample.global.mir"].significant is True


def test_the_errors_of_both_spectra_are_what_a_difference_is_held_against() -> None:
    """The threshold is the larger of both errors, in nats for entropies, plus rounding in the size of the value."""
    a, b = pair(0, [40] * 3, 6)
    found = compare(a, b, device=CPU, options=QUICK)
    loose = {"a": 0.5, "b": 0.2}

    def with_error(split: SplitEvaluation, error: float) -> SplitEvaluation:
        entry = split.interplay["sample"]["none"]
        assert entry.method is not None
        changed = replace(entry, method=replace(entry.method, error_estimate=error))
        return replace(split, interplay={**split.interplay, "sample": {**split.interplay["sample"], "none": changed}})

    split = found.splits["all"]
    sides = with_error(split.a, loose["a"]), with_error(split.b, loose["b"])
    numerical = module._numerical(module._Pair(a, b, *sides))
    assert numerical["interplay.sample.none.mir"] == pytest.approx(0.5, abs=1e-8)
    assert numerical["interplay.sample.none.distance_to_optimum.mir"] == pytest.approx(0.5, abs=1e-8)
    entropies = [
        (s.interplay["sample"]["none"].entropy_features, s.interplay["sample"]["none"].entropy_head) for s in sides
    ]
    in_nats = max(
        error * min(x for x in of if x is not None) for of, error in zip(entropies, loose.values(), strict=True)
    )
    assert numerical["interplay.sample.none.entropy_joint"] == pytest.approx(in_nats, abs=1e-8)
    # Of an exact spectrum the stated error is rounding alone.
    exact = [s.interplay["sample"]["global"].method for s in sides]
    stated = [method.error_estimate for method in exact if method is not None]
    assert len(stated) == 2
    assert max(stated) < 1e-13
    assert numerical["interplay.sample.global.mir"] == 1e-9 + max(stated)
    assert numerical["accuracy"] == 1e-9


def test_small_losses_and_collapse_are_told_apart() -> None:
    """Differences between NC1 of 1e-9 and 4e-9, and between losses near 1e-7, are not rounding."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    means = torch.randn(3, 6, generator=generator, dtype=F64)
    noise = torch.randn(300, 6, generator=generator, dtype=F64)
    sets = [
        FeatureSet(means[labels] + spread * noise, labels, means, None, scale * torch.eye(3, dtype=F64)[labels], None)
        for spread, scale in ((3e-5, 16.0), (6e-5, 17.0))
    ]
    found = compare(sets[0], sets[1], device=CPU, options=QUICK).splits["all"].differences
    for path, most in (("collapse.nc1", 1e-7), ("loss", 1e-6)):
        assert found[path].a < most  # type: ignore[operator]
        assert found[path].b < most  # type: ignore[operator]
        assert found[path].significant is True


def test_scales_beyond_squares_are_compared() -> None:
    """Features of size 1e200 have the same differences as those of size 1."""
    a, b = pair(1, [30, 30, 40], 5)
    a, b = (replace(entry, logits=entry.network_logits()) for entry in (a, b))
    found = compare(a, b, device=CPU, options=QUICK).splits["all"].differences
    large = replace(a, features=a.features * 2.0**700, head=a.head * 2.0**-700)
    scaled = compare(large, b, device=CPU, options=QUICK).splits["all"].differences
    for path in ("interplay.sample.global.mir", "collapse.nc1", "collapse.nc3"):
        assert scaled[path].difference == pytest.approx(found[path].difference, rel=1e-9)
        assert scaled[path].standard_error == pytest.approx(found[path].standard_error, rel=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_intervals_near_a_kink() -> None:
    """If the entropies of features and head are equal within their error, MIR and HDR may lie on either side."""
    a, b = pair(7, [50, 50, 50], 4)
    # Features that are their head rows but for noise: H(K1) and H(K2) nearly the same.
    near = replace(a, features=a.head[a.labels] + 0.05 * (a.features - a.features.mean(dim=0)))
    found = compare(near, b, device=CPU, options=QUICK).splits["all"].differences
    hdr = found["interplay.class_mean.none.hdr"]
    assert hdr.reason == "near_zero"
    assert hdr.standard_error is not None
    assert found["interplay.class_mean.none.mir"].reason == "equal_entropies"
    assert found["loss"].reason is None
    for name in ("mir", "hdr"):
        entry = found[f"interplay.class_mean.none.{name}"]
        assert entry.low <= entry.difference <= entry.high  # type: ignore[operator]
    drawn = compare(near, b, device=CPU, options=replace(QUICK, interval="bootstrap", resamples=100))
    of_draws = drawn.splits["all"].differences["interplay.class_mean.none.hdr"].standard_error
    assert hdr.standard_error > 0.85 * of_draws  # type: ignore[operator]


def test_counts_of_predictions() -> None:
    """The four counts and the agreement, on constructed samples."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    of_a = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0])
    of_b = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0])
    sets = [
        FeatureSet(
            torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)),
            labels,
            torch.eye(2, 3, dtype=F64),
            None,
            torch.nn.functional.one_hot(predicted, 2).double(),
            None,
        )
        for seed, predicted in enumerate((of_a, of_b))
    ]
    found = compare(sets[0], sets[1], device=CPU, options=QUICK).splits["all"].predictions
    assert (found.both_correct, found.only_a_correct, found.only_b_correct, found.neither_correct) == (3, 2, 2, 1)
    assert found.agreement == 0.5
    assert found.mcnemar_p == 1


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 5), (3, 12), (10, 10), (40, 60), (0, 1)])
def test_mcnemar_by_the_binomial(only_a: int, only_b: int) -> None:
    """The p value is twice the tail of a fair coin, at most 1."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar_p(only_a, only_b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@pytest.mark.parametrize(("discordant", "confidence"), [(6, 0.95), (25, 0.95), (200, 0.99)])
def test_smallest_difference_is_found_so_often(discordant: int, confidence: float) -> None:
    """A simulation of McNemar's exact test finds a difference of this size in 8 of 10 probes."""
    n = 2000
    d = smallest_difference(n, discordant, confidence=confidence)
    assert d is not None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(4000, discordant, dtype=F64, generator=generator)
    only_b = (drawn < (1 + d * n / discordant) / 2).sum(dim=1).tolist()
    p_values = {k: mcnemar_p(discordant - k, k) for k in set(only_b)}
    found = sum(p_values[k] <= 1 - confidence and 2 * k > discordant for k in only_b) / len(only_b)
    assert 0.78 < found < 0.82


def test_smallest_difference_never_contradicts_the_test() -> None:
    """Measured differences of at least that size are significant; if it is None, no difference is."""
    for discordant in range(80):
        p_values = [mcnemar_p(discordant - k, k) for k in range(discordant + 1)]
        for confidence in (0.5, 0.8, 0.95, 0.99):
            smallest = smallest_difference(500, discordant, confidence=confidence)
            significant = [p <= 1 - confidence for p in p_values]
            assert (smallest is None) == (not any(significant)), (discordant, confidence)
            for k in range(discordant + 1):
                if smallest is not None and abs(discordant - 2 * k) / 500 >= smallest:
                    assert significant[k], (discordant, k, confidence)


def _like(a: FeatureSet, only_a: int, only_b: int) -> list[FeatureSet]:
    """Return two networks with the same features, each of which alone is right on so many samples."""
    right = torch.nn.functional.one_hot(a.labels, len(a.head)).double() * 9
    wrong = right.roll(1, dims=1)
    rows = torch.arange(len(a.labels))[:, None]
    of_a = torch.where((rows >= only_a) & (rows < only_a + only_b), wrong, right)
    of_b = torch.where(rows < only_a, wrong, right)
    return [replace(a, logits=logits, head_bias=None) for logits in (of_a, of_b)]


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (0, 5), (2, 3)])
def test_accuracies_that_hardly_differ_have_an_interval(only_a: int, only_b: int) -> None:
    """It contains the difference and 0, as McNemar's exact test cannot reject; gates can use it."""
    a, _ = pair(0, [30, 20, 40], 5)
    split = compare(*_like(a, only_a, only_b), device=CPU, options=QUICK).splits["all"]
    found = split.differences["accuracy"]
    assert (split.predictions.only_a_correct, split.predictions.only_b_correct) == (only_a, only_b)
    assert found.difference == pytest.approx((only_b - only_a) / 90)
    assert found.difference is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= min(found.difference, 0) <= max(found.difference, 0) <= found.high
    assert found.high - found.low > 0.05
    assert (found.significant, found.reason) == (False, "too_few_disagreements")


def test_smallest_difference_by_hand() -> None:
    """Six of six discordant samples on one side have p = 1/32; the sixth root of 0.8 is the needed probability."""
    assert smallest_difference(100, 6) == pytest.approx(0.06 * (2 * 0.8 ** (1 / 6) - 1), rel=1e-12)
    assert smallest_difference(100, 5) is None
    assert smallest_difference(100, 0) is None
    small, large = smallest_difference(1_000, 100), smallest_difference(100_000, 10_000)
    assert small > 9 * large  # type: ignore[operator]
    assert smallest_difference(1_000, 100, confidence=0.99) > small  # type: ignore[operator]


def test_undefined_values_have_reasons() -> None:
    """Two classes have no optimum, and without permutations there is no z: both have reasons."""
    a, b = pair(0, [20, 20], 4)
    found = compare(a, b, device=CPU, options=QUICK).splits["all"].differences
    assert found["interplay.sample.global.mir_z"].reason == "undefined"
    assert found["interplay.class_mean.global.distance_to_optimum.mir"].reason == "undefined"
    assert found["interplay.class_mean.global.distance_to_optimum.mir"].difference is None
    asked = compare(a, b, device=CPU).splits["all"].differences
    assert asked["interplay.sample.none.mir_z"].reason == "no_standard_error"
    assert asked["interplay.sample.none.mir_z"].difference is not None


def test_intervals_follow_the_confidence() -> None:
    """The width is Student's quantile for the degrees of freedom of the error; smooth metrics are symmetric."""
    a, b = pair(4, [40, 40, 40], 5)
    for confidence, quantile in ((0.95, 1.959964), (0.5, 0.674490)):
        options = replace(QUICK, confidence=confidence)
        found = compare(a, b, device=CPU, options=options).splits["all"].differences["loss"]
        margin = found.high - found.difference  # type: ignore[operator]
        assert quantile < margin / found.standard_error < 1.2 * quantile  # type: ignore[operator]
        assert found.difference - found.low == pytest.approx(margin)  # type: ignore[operator]


def test_few_samples_that_decide_give_no_interval() -> None:
    """If one sample's loss outweighs all others, the spread of such samples is unknown: no standard error."""
    a, b = pair(4, [40, 40, 40], 5)
    logits = b.network_logits()
    logits[3, b.labels[3]] -= 1e5
    found = compare(a, replace(b, logits=logits), device=CPU, options=QUICK).splits["all"].differences["loss"]
    assert found.difference is not None
    assert (found.standard_error, found.low, found.significant) == (None, None, None)
    assert found.reason == "few_samples"


def test_class_sizes_that_may_be_drawn() -> None:
    """Equal sizes count as given; for unequal sizes the interval is widened, or missing if the error depends on it."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([60, 20, 40])
    labels = torch.repeat_interleave(torch.arange(3), counts)
    predicted = labels.clone()
    predicted[:60] = 1  # A is wrong wherever the class is 0: its accuracy is the share of that class
    sets = [
        FeatureSet(
            torch.randn(120, 4, dtype=F64, generator=generator),
            labels,
            torch.eye(3, 4, dtype=F64),
            None,
            9.0 * torch.nn.functional.one_hot(of, 3).double()
            + 0.1 * torch.randn(120, 3, dtype=F64, generator=generator),
            None,
        )
        for of in (predicted, labels)
    ]
    found = compare(*sets, device=CPU, options=QUICK).splits["all"].differences
    assert found["accuracy"].reason == "class_sizes"
    assert found["loss"].reason == "class_sizes"
    even = torch.cat([(labels == c).nonzero()[:20, 0] for c in range(3)])
    given = compare(*(entry.take(even) for entry in sets), device=CPU, options=QUICK).splits["all"].differences
    assert given["accuracy"].standard_error == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("without_shape_checks")
def test_bootstrap_is_the_same_again() -> None:
    """The same seed gives the same numbers, another seed other numbers."""
    a, b = pair(4, [20, 20, 20], 4)
    options = replace(QUICK, interval="bootstrap", resamples=20)
    first, again, other = (
        compare(a, b, device=CPU, options=replace(options, seed=seed)).splits["all"].differences for seed in (0, 0, 1)
    )
    assert first == again
    assert first["loss"].standard_error != other["loss"].standard_error


@pytest.mark.usefixtures("without_shape_checks")
def test_progress_counts_resamples() -> None:
    """The resamples of all splits are counted together, after the metrics of A and of B."""
    a, b = pair(4, [20, 20, 20], 4, split=True)
    seen: list[tuple[str, int, int]] = []
    options = replace(QUICK, interval="bootstrap", resamples=20)
    compare(a, b, device=CPU, options=options, progress=lambda *what: seen.append(what))
    assert seen[-1] == ("resamples", 60, 60)
    assert [phase for phase, done, total in seen if done == total] == ["metrics of A", "metrics of B", "resamples"]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: replace(b, labels=b.labels.flip(0)),
        lambda b: b.take(torch.arange(len(b.labels) - 1)),
    ],
)
def test_other_samples_are_refused(change: object) -> None:
    """Samples in another order, or fewer, cannot be compared in pairs."""
    a, b = pair(4, [20, 20, 21], 4)
    with pytest.raises(AnalysisError, match="same samples"):
        compare(a, change(b), device=CPU, options=QUICK)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [({"resamples": 9}, "resamples"), ({"confidence": 1.0}, "confidence"), ({"tolerance": -1.0}, "tolerance")],
)
def test_options_are_checked(wrong: dict[str, float], argument: str) -> None:
    """Options out of range are refused by name."""
    with pytest.raises(AnalysisError) as refusal:
        ComparisonOptions(**wrong)  # type: ignore[arg-type]
    assert refusal.value.members["argument"] == argument

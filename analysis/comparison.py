"""Compare two checkpoints on the same samples: differences of all metrics, their uncertainty, and the predictions.

Both see the same samples, so a sample's common effect drops out of the difference: its standard error is that of one
paired draw. Samples are drawn within classes. The delta method derives it from influence functions, at the cost of one
evaluation; the paired bootstrap redraws the samples hundreds of times, and finds the bias of finite probes as well.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Float64, Int, Int64
from scipy.special import betaincinv
from scipy.stats import binom, binomtest
from scipy.stats import t as student
from torch import Tensor

from .clock import Clock
from .errors import AnalysisError
from .evaluation import (
    Evaluation,
    EvaluationOptions,
    Interplay,
    Progress,
    SplitEvaluation,
    evaluate_features,
)
from .measures.collapse import Collapse
from .measures.entropy import squarable
from .measures.influence import influence
from .probes.feature_set import FeatureSet, rows_of_splits
from .spreads import Sizes, Spread, delta_spreads

_OF_SPLIT = ("accuracy", "loss", "calibration_error", "effective_rank")
_OF_INTERPLAY = (
    "mir", "hdr", "mutual_information", "entropy_features", "entropy_head", "entropy_joint", "mir_z",
)  # fmt: skip
# Largest difference by rounding between two networks that compute the same, as a share of the metric's size or of 1:
# for features of float64, and of any other type.
_ROUNDING = {True: 1e-9, False: 1e-7}
# Measures of squares, which may be small without being rounding: their roots are as precise as other measures.
_SMALL = ("loss", "collapse.nc1", "collapse.nc3")
# Measures that a pinched spectrum leaves uncertain: ratios (False), and amounts in nats (True).
_OF_JOINT = {"mir": False, "distance_to_optimum.mir": False, "mutual_information": True, "entropy_joint": True}
_OF_COLLAPSE = tuple(field.name for field in fields(Collapse) if field.name not in ("absent_classes", "reasons"))


@dataclass(frozen=True)
class ComparisonOptions(EvaluationOptions):
    """Options of a comparison of two checkpoints.

    Attributes:
        interval: the source of standard errors.
        resamples: of the bootstrap, at least 10.
        confidence: of the intervals, 0.5 to 0.9999.
    """

    interval: Literal["delta", "bootstrap"] = "delta"
    resamples: int = 200
    confidence: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resamples < 10:
            raise AnalysisError(
                "invalid-argument", f"resamples must be at least 10, not {self.resamples}.", argument="resamples"
            )
        if not 0.5 <= self.confidence <= 0.9999:
            raise AnalysisError(
                "invalid-argument", f"confidence must be 0.5 to 0.9999, not {self.confidence}.", argument="confidence"
            )


@dataclass(frozen=True)
class Difference:
    """A metric of A, of B, and B - A; an unknown value is None, and `reason` says why.

    Attributes:
        a, b, difference: as evaluated; None where undefined.
        standard_error: of the difference over draws of the samples within classes.
        low, high: the interval of the difference.
        significant: whether 0 lies outside of the interval, by more than rounding can cause and, where a spectrum was
            pinched, by more than either side's `method.error_estimate` leaves open.
        bias, bias_a, bias_b: of the difference, of A's and of B's value, as the bootstrap estimates it.
        reason: why standard error and interval are missing, and `significant` is None: `undefined` (one of the
            values), `no_derivative` (the delta method does not reach the metric where it is), `undefined_resamples` (of
            the bootstrap), `no_standard_error` (`mir_z`, itself a statistic), `few_samples`, `too_few_disagreements`,
            `class_sizes`. Or how the interval was computed: `near_zero` (HDR or a distance may be 0),
            `equal_entropies`, `too_few_disagreements` (of accuracy).
    """

    a: float | None
    b: float | None
    difference: float | None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    significant: bool | None = None
    bias: float | None = None
    bias_a: float | None = None
    bias_b: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Agreement:
    """Agreement of the two networks' predicted classes, and whether their accuracies differ by more than chance.

    Attributes:
        agreement: share of samples with the same predicted class. A language model may also predict tokens that no
            position has as its next; these count as different.
        both_correct, only_a_correct, only_b_correct, neither_correct: counts of samples.
        mcnemar_p: two-sided p value of McNemar's exact test; 1 where no sample is right in only one of them.
        smallest_difference: of accuracy, that McNemar's exact test shows with probability 0.8 at the requested
            confidence, on as many samples as are right in only one network; None where these are too few to show any.
        reason: `too_few_disagreements` where smallest_difference is None.
    """

    agreement: float
    both_correct: int
    only_a_correct: int
    only_b_correct: int
    neither_correct: int
    mcnemar_p: float
    smallest_difference: float | None
    reason: str | None = None


@dataclass(frozen=True)
class ComparedSplit:
    """One split of both networks, and the difference of each metric by its path in a split of a report."""

    a: SplitEvaluation
    b: SplitEvaluation
    differences: dict[str, Difference]
    predictions: Agreement


@dataclass(frozen=True)
class Comparison:
    """Two evaluations and their differences.

    Attributes:
        a, b: the evaluations, with all splits.
        splits: the splits that both have, by name.
        timings_seconds: of both evaluations together, and `intervals`.
    """

    a: Evaluation
    b: Evaluation
    splits: dict[str, ComparedSplit]
    timings_seconds: dict[str, float]


def compare(
    a: FeatureSet,
    b: FeatureSet,
    *,
    device: torch.device,
    options: ComparisonOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate two networks on the same samples, and return their differences B - A with intervals.

    Args:
        a, b: features, labels and head of each, of the same samples in the same order. Widths may differ.
        device: the device of all computations.
        options: default: those of ComparisonOptions.
        progress: called as the work goes on; phase `resamples` counts the resamples of the bootstrap.

    Returns:
        The comparison. Intervals of smooth metrics are difference +- q times the standard error, with Student's
        quantile for as many samples as the error rests on, or resamples; for the other metrics see `spreads`. They
        lie about the evaluated difference: a resample holds samples twice, so its MIR and HDR are biased, and the
        bootstrap's own quantiles would lie beside the value. The bias that it estimates is stated, not subtracted.

    Raises:
        AnalysisError: `invalid-probe` where samples or classes of the two differ; else as `evaluate_features`.

    Numerics: the error that `method.error_estimate` states for MIR of A and of B is not part of the interval, but
        enters `significant`. The note of `influence` on the calibration error holds here. float64.

    Source: docs/metrics.md, "Comparing two checkpoints"; Efron and Tibshirani 1993, chapter 13; McNemar 1947.
    """
    options = options or ComparisonOptions()
    # The sets may lie on different devices: one was kept on the processor, the other was just computed on a GPU.
    if not torch.equal(a.labels.cpu(), b.labels.cpu()) or not _same_tokens(a, b):
        detail = "A comparison needs the same samples and the same numbers of their classes for both networks."
        raise AnalysisError("invalid-probe", detail)
    clock = Clock()
    first, second = (
        evaluate_features(entry, device=device, options=options, progress=_of(name, progress))
        for name, entry in (("A", a), ("B", b))
    )
    splits: dict[str, ComparedSplit] = {}
    with clock.phase("intervals"):
        for name, rows in rows_of_splits(a.split, len(a.labels)).items():
            pair = _Pair(_part(a, rows), _part(b, rows), first.splits[name], second.splits[name])
            if options.interval == "delta":
                spreads = _by_delta(pair, options, device)
            else:
                done = len(splits) * options.resamples
                spreads = _by_bootstrap(pair, options, device, _counted(progress, done, len(first.splits), options))
            splits[name] = ComparedSplit(pair.of_a, pair.of_b, _differences(pair, spreads), _agreement(pair, options))
    timings = clock.seconds
    for evaluation in (first, second):
        for phase, seconds in evaluation.timings_seconds.items():
            timings[phase] = timings.get(phase, 0.0) + seconds
    return Comparison(first, second, splits, timings)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return the two-sided p value of McNemar's exact test that two networks have equal accuracy.

    Args:
        only_a, only_b: samples that only A, or only B, classified correctly.

    Returns:
        0 to 1; 1 where both counts are 0.

    Source: McNemar 1947; exact by the binomial distribution of the discordant pairs.

    >>> round(mcnemar_p(1, 9), 6)
    0.021484
    """
    discordant = only_a + only_b
    return float(binomtest(only_b, discordant).pvalue) if discordant else 1.0


def smallest_difference(n: int, discordant: int, *, confidence: float = 0.95, power: float = 0.8) -> float | None:
    """Return the smallest difference of accuracy that McNemar's exact test shows with this power.

    Given the number m of discordant samples, the number that one network has right is binomial with probability
    (1 + d n / m) / 2, where d is the difference of accuracy. The test rejects from some number k on: d is the
    difference at which k or more have the probability `power`. So it never contradicts the test: a measured difference
    of at least d is significant, and where d does not exist no outcome on m samples is.

    Args:
        n: samples.
        discordant: m, the samples on which only one network is right.
        confidence: of the two-sided test, which rejects where its p value is at most 1 - confidence.
        power: probability that the test finds the difference, at least 0.5.

    Returns:
        The difference; None where the test would not reject even if one network were right in all m samples.

    Source: McNemar 1947, conditional on the number of discordant samples as his test is.

    >>> round(smallest_difference(1000, 100), 4)
    0.029
    """
    if discordant == 0:
        return None
    rejected_from = int(binom.isf((1 - confidence) / 2, discordant, 0.5)) + 1
    if rejected_from > discordant:
        return None
    # The binomial tail as a function of its probability is an incomplete beta function.
    likely = float(betaincinv(rejected_from, discordant - rejected_from + 1, power))
    return (2 * likely - 1) * discordant / n


@dataclass(frozen=True)
class _Pair:
    """The feature sets of both networks on the samples of one split, and both evaluations."""

    a: FeatureSet
    b: FeatureSet
    of_a: SplitEvaluation
    of_b: SplitEvaluation


def _part(entry: FeatureSet, rows: Int64[Tensor, " m"]) -> FeatureSet:
    """Return these rows as a feature set without splits."""
    return replace(entry, split=None).take(rows.to(entry.labels.device))


def _same_tokens(a: FeatureSet, b: FeatureSet) -> bool:
    """Return whether two language models have the same tokens as classes; classes of other networks have no tokens."""
    if a.vocabulary is None or b.vocabulary is None:
        return a.vocabulary is b.vocabulary
    return torch.equal(a.vocabulary.tokens.cpu(), b.vocabulary.tokens.cpu())


def _metrics(split: SplitEvaluation) -> dict[str, float | None]:
    """Return every metric of a split by its path."""
    found: dict[str, float | None] = {name: getattr(split, name) for name in _OF_SPLIT}
    for path, entry in _levels(split):
        found |= {f"{path}.{name}": getattr(entry, name) for name in _OF_INTERPLAY}
        gaps = {"mir": entry.distance_to_optimum.mir, "hdr": entry.distance_to_optimum.hdr}
        found |= {f"{path}.distance_to_optimum.{name}": gap for name, gap in gaps.items()}
    return found | {f"collapse.{name}": getattr(split.collapse, name) for name in _OF_COLLAPSE}


def _levels(split: SplitEvaluation) -> Iterator[tuple[str, Interplay]]:
    for level, centrings in split.interplay.items():
        for centring, entry in centrings.items():
            yield f"interplay.{level}.{centring}", entry


def _by_delta(pair: _Pair, options: ComparisonOptions, device: torch.device) -> dict[str, Spread]:
    """Compute standard errors and intervals from the difference of both networks' influence functions."""
    a, b = (
        (split, _metrics(split), _influences(entry, device))
        for entry, split in ((pair.a, pair.of_a), (pair.b, pair.of_b))
    )
    sizes = Sizes.of(pair.a.labels.cpu(), tokens=pair.a.vocabulary is not None)
    fewest = _fewest_discordant(options.confidence)
    return delta_spreads(a, b, sizes, confidence=options.confidence, fewest=fewest)


def _influences(entry: FeatureSet, device: torch.device) -> dict[str, Float64[Tensor, " n"]]:
    there = entry.to(device)
    features, head = squarable(there.features), squarable(there.head)
    found = influence(features, there.labels, head, there.network_predictions(), within_classes=False)
    # Sums on the processor have a fixed order; a GPU adds in any order, and the last digit differs from run to run.
    return {name: values.cpu() for name, values in found.items()}


def _fewest_discordant(confidence: float) -> int:
    """Return the fewest discordant samples on which McNemar's exact test can reject: all right in one network."""
    return math.floor(1 - math.log2(1 - confidence) - 1e-9) + 1


def _by_bootstrap(
    pair: _Pair, options: ComparisonOptions, device: torch.device, step: Callable[[], None]
) -> dict[str, Spread]:
    """Compute standard errors and biases from evaluations of both networks on the same resamples."""
    generator = torch.Generator().manual_seed(options.seed)
    # The permutations of the null do not belong to a sample's effect.
    plain = EvaluationOptions(null_permutations=0, seed=options.seed, tolerance=options.tolerance)
    drawn: list[list[dict[str, float | None]]] = [[], []]
    for _ in range(options.resamples):
        rows = _resample(pair.a.labels.cpu(), generator)
        for values, entry in zip(drawn, (pair.a, pair.b), strict=True):
            again = evaluate_features(_part(entry, rows), device=device, options=plain)
            values.append(_metrics(again.splits["all"]))
        step()
    known_a, known_b = _metrics(pair.of_a), _metrics(pair.of_b)
    return {
        path: _spread(
            [entry[path] for entry in drawn[0]],
            [entry[path] for entry in drawn[1]],
            a,
            known_b[path],
            options.confidence,
        )
        for path, a in known_a.items()
        if not path.endswith(".mir_z")
    }


def _spread(
    drawn_a: Sequence[float | None],
    drawn_b: Sequence[float | None],
    a: float | None,
    b: float | None,
    confidence: float,
) -> Spread:
    if a is None or b is None:
        return Spread(None)
    if None in drawn_a or None in drawn_b:
        return Spread(None, reason="undefined_resamples")
    of_a, of_b = (torch.tensor(values, dtype=torch.float64) for values in (drawn_a, drawn_b))
    bias_a, bias_b = float(of_a.mean()) - a, float(of_b.mean()) - b
    # A standard error from few resamples is itself uncertain: Student's quantile widens the interval accordingly.
    error, margin = float((of_b - of_a).std()), float(student.ppf((1 + confidence) / 2, len(of_a) - 1))
    low, high = b - a - margin * error, b - a + margin * error
    return Spread(error, low, high, bias_b - bias_a, bias_a, bias_b)


def _resample(labels: Int[Tensor, " n"], generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Draw rows with replacement, keeping the size of each class."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    sizes = torch.repeat_interleave(counts, counts)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    places = (torch.rand(len(labels), dtype=torch.float64, generator=generator) * sizes).long()
    return order[starts + places.minimum(sizes - 1)]


def _of(name: str, progress: Progress | None) -> Progress | None:
    """Return a progress callback that adds the name of the network to the phase."""
    return (lambda phase, done, total: progress(f"{phase} of {name}", done, total)) if progress else None


def _counted(progress: Progress | None, done: int, n_splits: int, options: ComparisonOptions) -> Callable[[], None]:
    """Return a function that counts one resample and reports progress."""

    def step() -> None:
        """Count one resample."""
        nonlocal done
        done += 1
        if progress:
            progress("resamples", done, n_splits * options.resamples)

    return step


def _differences(pair: _Pair, spreads: Mapping[str, Spread]) -> dict[str, Difference]:
    values_a, values_b, numerical = _metrics(pair.of_a), _metrics(pair.of_b), _numerical(pair)
    found = {}
    for path, a in values_a.items():
        # mir_z, the height of MIR above its permutations, is a statistic of the samples without an own standard error.
        unknown = Spread(None, reason="no_standard_error" if path.endswith(".mir_z") else "no_derivative")
        found[path] = _difference(a, values_b[path], spreads.get(path, unknown), numerical[path])
    return found


def _numerical(pair: _Pair) -> dict[str, float]:
    """Bound each difference's numerical error, sampling aside: by rounding, and by pinched spectra."""
    share = _ROUNDING[pair.a.features.dtype == pair.b.features.dtype == torch.float64]
    values_a, values_b = _metrics(pair.of_a), _metrics(pair.of_b)
    found = {}
    for path, a in values_a.items():
        size = max(abs(a or 0.0), abs(values_b[path] or 0.0))
        small = max(size, math.sqrt(size), 1e-14 / share)
        found[path] = share * (small if path in _SMALL else max(size, 1.0))
    # Both lie on the same side of the exact values, so the error of their difference is at most the larger one.
    left_open: dict[str, float] = {}
    for split in (pair.of_a, pair.of_b):
        for level, entry in _levels(split):
            for name, in_nats in _OF_JOINT.items():
                path = f"{level}.{name}"
                left_open[path] = max(left_open.get(path, 0.0), _left_open(entry, in_nats))
    return found | {path: found[path] + error for path, error in left_open.items()}


def _left_open(entry: Interplay, in_nats: bool) -> float:
    """Return `method.error_estimate` for MIR, or converted to nats for entropies."""
    if entry.method is None or entry.entropy_features is None or entry.entropy_head is None:
        return 0.0
    smaller = min(entry.entropy_features, entry.entropy_head)
    return entry.method.error_estimate * (smaller if in_nats and entry.mir is not None else 1.0)


def _difference(a: float | None, b: float | None, spread: Spread, numerical: float) -> Difference:
    if a is None or b is None:
        return Difference(a, b, None, reason="undefined")
    error, low, high, difference = spread.standard_error, spread.low, spread.high, b - a
    if error is None or low is None or high is None:
        return Difference(a, b, difference, reason=spread.reason)
    significant = low > numerical or high < -numerical
    biases = (spread.bias, spread.bias_a, spread.bias_b)
    return Difference(a, b, difference, error, low, high, significant, *biases, reason=spread.reason)


def _agreement(pair: _Pair, options: ComparisonOptions) -> Agreement:
    labels = pair.a.labels.cpu()
    predicted_a, predicted_b = (entry.network_predictions().predicted.cpu() for entry in (pair.a, pair.b))
    right_a, right_b = predicted_a == labels, predicted_b == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    smallest = smallest_difference(len(labels), only_a + only_b, confidence=options.confidence)
    return Agreement(
        # For a language model, -1 stands for any token that is not a class.
        agreement=float(((predicted_a == predicted_b) & (predicted_a >= 0)).double().mean()),
        both_correct=int((right_a & right_b).sum()),
        only_a_correct=only_a,
        only_b_correct=only_b,
        neither_correct=int((~right_a & ~right_b).sum()),
        mcnemar_p=mcnemar_p(only_a, only_b),
        smallest_difference=smallest,
        reason=None if smallest is not None else "too_few_disagreements",
    )

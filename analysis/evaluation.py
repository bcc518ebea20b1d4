"""Measure predictions, MIR and HDR, and neural collapse from the features that a network's head receives."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64, Int, Int64
from torch import Tensor

from . import memory
from .clock import Clock, Steps
from .errors import AnalysisError, Kind
from .measures.by_class import ByClass, ReliabilityBin, by_class, reliability
from .measures.classes import LabelledFeatures, class_statistics, computing_dtype, head_directions
from .measures.collapse import Collapse, CollapsePass, neural_collapse, optimum
from .measures.entropy import check_finite, squarable, unit_rows
from .measures.interplay import Degenerate, Distance, Interplay, interplay
from .measures.labels import check_labels
from .measures.null import Null, pair_null, sample_null
from .measures.predictions import Predictions, calibration_error
from .measures.spectrum import (
    Entropies,
    pair_entropies,
    sample_entropies,
    sample_entropies_of_all,
)
from .networks.loading import LoadedNetwork
from .passes.extraction import Progress, extract_features, extract_predictions
from .passes.positions import extract_positions
from .passes.precision import Precision
from .probes.feature_set import FeatureSet, rows_of_splits
from .probes.probe import Probe

__all__ = [
    "Distance",
    "Evaluation",
    "EvaluationOptions",
    "Interplay",
    "Precision",
    "Progress",
    "SplitEvaluation",
    "capture",
    "evaluate_features",
    "evaluate_network",
    "extract_features",
]

# Progress counts the spectra of two centrings, their nulls, and the rest.
_PARTS_OF_A_SPLIT = 5
# Features of more numbers are worth the time that it takes to give memory back to the system at once.
_LARGE = 2**25


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        null_permutations: permutations of the null baseline; 0 for none.
        seed: of the permutations, of their subsample, and of the probes that bound a pinched spectrum.
        tolerance: change of MIR that counts as settled; 0 computes the exact spectrum at any cost.
        batch_size: inputs at a time; None chooses one automatically.
        precision: of the network's forward pass, see `extraction.extract_features`; computations from features and
            logits are float64 either way.
    """

    null_permutations: int = 10
    seed: int = 0
    tolerance: float = 1e-4
    batch_size: int | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.null_permutations < 0:
            raise AnalysisError(
                "invalid-argument",
                f"null_permutations must be at least 0, not {self.null_permutations}.",
                argument="null_permutations",
            )
        if not 0 <= self.tolerance < math.inf:
            raise AnalysisError(
                "invalid-argument",
                f"tolerance must be finite and at least 0, not {self.tolerance}.",
                argument="tolerance",
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise AnalysisError(
                "invalid-argument", f"batch_size must be at least 1, not {self.batch_size}.", argument="batch_size"
            )


@dataclass(frozen=True)
class SplitEvaluation:
    """All metrics of one split; `interplay` is indexed by level (sample, class_mean) and centring.

    For a language model, samples are positions, and `class_counts` counts the tokens that occur as labels in the probe,
    in the order of their ids.
    """

    n_samples: int
    class_counts: list[int]
    accuracy: float | None
    loss: float | None
    calibration_error: float | None
    effective_rank: float | None
    interplay: dict[str, dict[str, Interplay]]
    collapse: Collapse
    by_class: ByClass
    reliability: list[ReliabilityBin]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one network or feature set on one probe.

    Attributes:
        splits: `all`, and `train` and `test` where the probe has samples of them.
        timings_seconds: by phase; the phases add up to the whole evaluation: features (the pass over the probe alone),
            predictions, entropies (with the reading that the collapse shares), null, collapse, and statistics: choosing
            a split's samples, class counts and means, and time that no other phase claims.
        batch_size: final batch size of the pass over the probe; None for a feature set.
        n_features: d.
        n_classes: C; for a language model its whole vocabulary.
    """

    splits: dict[str, SplitEvaluation]
    timings_seconds: dict[str, float]
    batch_size: int | None
    n_features: int
    n_classes: int


def evaluate_network(
    network: LoadedNetwork,
    probe: Probe,
    *,
    device: torch.device,
    options: EvaluationOptions | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Pass a probe through a network and measure features, head and predictions.

    Args:
        network: moved to the device and left in evaluation mode.
        probe: inputs, labels and, where it has one, a split.
        device: the device of all computations.
        options: default: those of EvaluationOptions.
        progress: called as the work goes on.

    Returns:
        The evaluation.

    Raises:
        AnalysisError: `invalid-probe`, `inputs-refused`, `head-not-found`, `non-finite-values` or `out-of-memory`.

    Numerics: features in float32, everything computed from them in float64. Beside network and batch, memory for the
        features, the logits and the memory that `spectrum.sample_entropies` states.
    """
    options = options or EvaluationOptions()
    clock = Clock()
    with clock.phase("features"):
        feature_set, batch_size = capture(network, probe, device=device, options=options, progress=progress)
        feature_set = feature_set.to(device)
    return _evaluate(feature_set, "invalid-probe", batch_size, options, progress, clock)


def capture(
    network: LoadedNetwork,
    probe: Probe,
    *,
    device: torch.device,
    options: EvaluationOptions,
    progress: Progress | None = None,
) -> tuple[FeatureSet, int]:
    """Return the feature set of a network on a probe, and the batch size of the pass: see `evaluate_network`.

    For a causal language model, samples are positions, as in `positions.extract_positions`.
    """
    extract = extract_positions if network.predicts_tokens else extract_predictions
    return extract(
        network,
        probe,
        device=device,
        batch_size=options.batch_size,
        precision=options.precision,
        progress=progress,
    )


def evaluate_features(
    feature_set: FeatureSet,
    *,
    device: torch.device,
    options: EvaluationOptions | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure features, labels and a head given without their network.

    Args:
        feature_set: without logits, they are features @ head^T in float64, plus the bias if it has one.
        device: the device of all computations.
        options: default: those of EvaluationOptions; batch size and precision are ignored.
        progress: called as the work goes on.

    Returns:
        The evaluation.

    Raises:
        AnalysisError: `invalid-feature-set` or `non-finite-values`.

    Numerics: as `evaluate_network`.
    """
    clock = Clock()
    with clock.phase("features"):
        feature_set = feature_set.to(device)
        for name, tensor in (("features", feature_set.features), ("head", feature_set.head)):
            check_finite(name, tensor)
    return _evaluate(feature_set, "invalid-feature-set", None, options or EvaluationOptions(), progress, clock)


def _evaluate(
    data: FeatureSet,
    label_error: Kind,
    batch_size: int | None,
    options: EvaluationOptions,
    progress: Progress | None,
    clock: Clock,
) -> Evaluation:
    is_large = data.features.numel() > _LARGE
    # Time that no other phase claims counts as statistics.
    with clock.phase("statistics"), memory.returned_soon() if is_large else nullcontext():
        check_finite("head", data.head)
        with clock.phase("predictions"):
            check_labels(data.labels, len(data.head), label_error)
            predictions = data.network_predictions()
        chosen = _chosen(data)
        steps = Steps(progress, _PARTS_OF_A_SPLIT * len({id(rows) for rows in chosen.values()}))
        splits: dict[str, SplitEvaluation] = {}
        for name, rows in chosen.items():
            if name != "all" and rows is None:
                splits[name] = splits["all"]
            else:
                splits[name] = _Split(data, rows, predictions, options, clock, steps).evaluate()
    return Evaluation(splits, clock.seconds, batch_size, data.head.shape[1], _n_classes(data))


def _n_classes(data: FeatureSet) -> int:
    """Return C, the number of rows of the head, including those that a restricted head leaves out."""
    return len(data.head) if data.vocabulary is None else data.vocabulary.size


def _chosen(data: FeatureSet) -> dict[str, Int64[Tensor, " _"] | None]:
    """Return the rows of each split; None stands for all samples, which are computed only once."""
    n, device = len(data.labels), data.labels.device
    rows = rows_of_splits(data.split, n)
    return {name: None if len(some) == n else some.to(device) for name, some in rows.items()}


@dataclass(frozen=True)
class _Pairing:
    """Samples by class with the head's directions, and the samples of classes whose head row has no direction."""

    labelled: LabelledFeatures
    centred: bool
    alone: Sequence[Int[Tensor, " _"]]


class _Split:
    """The samples of one split and the intermediate results that their metrics share."""

    def __init__(
        self,
        data: FeatureSet,
        rows: Int64[Tensor, " _"] | None,
        predictions: Predictions,
        options: EvaluationOptions,
        clock: Clock,
        steps: Steps,
    ) -> None:
        labels = data.labels.long()
        # Of all samples: they may be more than memory holds twice.
        self.features, self.predicted = squarable(data.features), predictions.predicted
        self.predictions = predictions if rows is None else predictions.take(rows)
        self.labels = labels if rows is None else labels[rows]
        self.head = squarable(data.head.double())
        self.options, self.clock, self.steps = options, clock, steps
        self.statistics = class_statistics(self.features, labels, len(data.head), rows=rows)
        self.class_counts: list[int] = torch.bincount(self.labels, minlength=len(data.head)).tolist()
        self.n_absent = _n_classes(data) - len(self.statistics.classes)
        self.ideal = {
            "sample": optimum(self.class_counts, data.head.shape[1]),
            "class_mean": optimum([1] * len(self.statistics.classes), data.head.shape[1]),
        }

    def evaluate(self) -> SplitEvaluation:
        """Return all metrics of the split."""
        levels: dict[str, dict[str, Interplay]] = {"sample": {}, "class_mean": {}}
        with self.clock.phase("entropies"):
            pairings = [self._pairing(centred) for centred in (False, True)]
        entropies, collapse = self._read(pairings)
        self.steps.end("spectra", 2)
        for index, centring in enumerate(("none", "global")):
            levels["sample"][centring] = self._sample_level(pairings[index], entropies[index])
            levels["class_mean"][centring] = self._class_mean_level(centring == "global")
            self.steps.end("null")
        self.steps.end("metrics")
        with self.clock.phase("predictions"):
            predicted, confidence = self.predictions.predicted, self.predictions.confidence
            correct = predicted == self.labels
            accuracy, loss = float(correct.double().mean()), float(self.predictions.loss.mean())
            calibration = calibration_error(confidence, correct)
            classes = by_class(predicted, self.labels, len(self.head))
            diagram = reliability(confidence, correct)
        entropy = levels["sample"]["global"].entropy_features
        return SplitEvaluation(
            n_samples=len(self.labels),
            class_counts=self.class_counts,
            accuracy=accuracy,
            loss=loss,
            calibration_error=calibration,
            effective_rank=None if entropy is None else math.exp(entropy),
            interplay=levels,
            collapse=replace(collapse, absent_classes=self.n_absent),
            by_class=classes,
            reliability=diagram,
            reasons={"effective_rank": "no_directions"} if entropy is None else {},
        )

    def _head_directions(self, centred: bool) -> tuple[Float64[Tensor, "k d"], Bool[Tensor, " k"]]:
        """Return directions of the head rows of the classes present, and which rows have one."""
        return head_directions(self.head, self.statistics.classes, centred=centred)

    def _centre(self, centred: bool) -> Float64[Tensor, " d"]:
        return self.statistics.centre if centred else torch.zeros_like(self.statistics.means[0])

    def _generator(self) -> torch.Generator:
        """Return a fresh generator, so that no level or centring depends on which others were computed."""
        return torch.Generator().manual_seed(self.options.seed)

    def _pairing(self, centred: bool) -> _Pairing:
        head, usable = self._head_directions(centred)
        fitting = usable.tolist()
        paired = [rows for rows, fits in zip(self.statistics.members, fitting, strict=True) if fits]
        alone = [rows for rows, fits in zip(self.statistics.members, fitting, strict=True) if not fits]
        return _Pairing(LabelledFeatures(self.features, paired, self._centre(centred), head[usable]), centred, alone)

    def _read(self, pairings: Sequence[_Pairing]) -> tuple[list[Entropies | None], Collapse]:
        """Compute entropies of all pairings, and the collapse, from one reading of the features.

        Where a head row has no direction, the pairings have different classes, and each is read separately.
        """
        tolerance, sets = self.options.tolerance, [pairing.labelled for pairing in pairings]
        if not any(pairing.alone for pairing in pairings):
            dtype = computing_dtype(self.features, len(self.labels))
            collapse = CollapsePass(self.statistics, self.head, self.predicted, dtype)
            generators = [self._generator() for _ in sets]
            with self.clock.phase("entropies"):
                found = sample_entropies_of_all(
                    sets,
                    tolerance=tolerance,
                    generators=generators,
                    observe=collapse.take,
                    tell=lambda share: self.steps.inside("spectra", 2 * share),
                )
            with self.clock.phase("collapse"):
                return found, collapse.finish()
        with self.clock.phase("entropies"):
            found = [
                sample_entropies(entry, tolerance=tolerance, generator=self._generator()) if entry.members else None
                for entry in sets
            ]
        with self.clock.phase("collapse"):
            return found, neural_collapse(self.features, self.statistics, self.head, self.predicted)

    def _sample_level(self, pairing: _Pairing, entropies: Entropies | None) -> Interplay:
        labelled, alone = pairing.labelled, pairing.alone
        with self.clock.phase("entropies"):
            degenerate = sum(len(rows) - len(labelled.directions(rows)) for rows in alone)
        degenerate += entropies.degenerate_samples if entropies else labelled.n_samples
        null = None
        if entropies is not None and self.options.null_permutations:
            with self.clock.phase("null"):
                null = sample_null(
                    labelled,
                    permutations=self.options.null_permutations,
                    generator=self._generator(),
                    known=entropies,
                    tell=lambda share: self.steps.inside("null", share),
                )
        return self._interplay("sample", entropies, null, Degenerate(degenerate, len(alone)), pairing.centred)

    def _class_mean_level(self, centred: bool) -> Interplay:
        with self.clock.phase("entropies"):
            head, usable = self._head_directions(centred)
            centre = self._centre(centred)
            means, directed = unit_rows(self.statistics.means - centre, self.statistics.sizes + centre.norm())
            usable = usable & directed
            means, head = means[usable], head[usable]
            entropies = pair_entropies(means, head) if len(means) else None
        null = None
        if entropies is not None and self.options.null_permutations:
            with self.clock.phase("null"):
                null = pair_null(
                    means,
                    head,
                    permutations=self.options.null_permutations,
                    generator=self._generator(),
                    known=entropies,
                )
        return self._interplay("class_mean", entropies, null, Degenerate(0, len(usable) - len(means)), centred)

    def _interplay(
        self, level: str, entropies: Entropies | None, null: Null | None, degenerate: Degenerate, centred: bool
    ) -> Interplay:
        permuted, opposite_rows = self.options.null_permutations > 0, centred and len(self.head) == 2
        return interplay(entropies, null, self.ideal[level], degenerate, permuted=permuted, opposite_rows=opposite_rows)

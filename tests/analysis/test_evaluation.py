"""Evaluations of networks and feature sets: against the naive reference, and with undefined or invalid values."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.clock import Clock
from analysis.errors import AnalysisError
from analysis.evaluation import (
    Evaluation,
    EvaluationOptions,
    SplitEvaluation,
    evaluate_features,
    evaluate_network,
    extract_features,
)
from analysis.measures.predictions import predictions_of
from analysis.networks.loading import LoadedNetwork
from analysis.probes.feature_set import FeatureSet
from app.schemas import reports
from tests.analysis import reference
from tests.analysis.tiny import network_of, probe_of, small_network, small_probe

CPU = torch.device("cpu")


def _feature_set(features: Tensor, labels: list[int], head: Tensor, **others: Tensor | None) -> FeatureSet:
    parts: dict[str, Any] = {"head_bias": None, "logits": None, "split": None, **others}
    return FeatureSet(features, torch.tensor(labels), head, **parts)


def _check(split: SplitEvaluation) -> None:
    """Check that a split fits the report's schema, and that every null has its reason under its path."""
    content = dataclasses.asdict(split)
    reports.SplitEvaluation.model_validate(content)
    places = [content, content["collapse"], *(one for level in content["interplay"].values() for one in level.values())]
    for place in places:
        nulls = {name for name, value in place.items() if value is None}
        for nested in ("optimum", "distance_to_optimum"):
            nulls |= {f"{nested}.{name}" for name, value in place.get(nested, {}).items() if value is None}
        # Of two classes HDR has a reason beside its number.
        worthless = {name for name, reason in place["reasons"].items() if reason == "two_classes"}
        assert nulls | worthless == set(place["reasons"])


def _compare(split: SplitEvaluation, features: Tensor, labels: Tensor, network: LoadedNetwork) -> None:
    head = network.weight.double().numpy()
    assert network.bias is not None
    for level, centrings in split.interplay.items():
        for centring, found in centrings.items():
            expected = reference.interplay(features.double().numpy(), labels.numpy(), head, level, centring)
            assert found.mir == pytest.approx(expected.mir, abs=1e-8)
            assert found.hdr == pytest.approx(expected.hdr, abs=1e-8)
            assert found.entropy_joint == pytest.approx(expected.joint, abs=1e-8)
            assert found.null is not None
            assert found.optimum.mir is not None
            assert found.mir is not None
            assert found.distance_to_optimum.mir == pytest.approx(abs(found.mir - found.optimum.mir))
            assert found.mir_z == pytest.approx((found.null.observed - found.null.mean) / found.null.std)
    logits = features @ network.weight.T + network.bias
    measures = reference.collapse(features.double().numpy(), labels.numpy(), head, logits.argmax(dim=1).numpy())
    for name, value in measures.items():
        assert getattr(split.collapse, name) == pytest.approx(value, rel=1e-5)
    assert split.loss == pytest.approx(float(nn.functional.cross_entropy(logits.double(), labels)), rel=1e-6)
    assert split.accuracy == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()))
    sample = split.interplay["sample"]["global"].entropy_features
    assert sample is not None
    assert split.effective_rank == pytest.approx(math.exp(sample))


def test_a_network_on_a_probe_with_splits() -> None:
    """Every number of every split is that of the naive way and fits the report's schema; progress ends."""
    network, probe = small_network(), small_probe()
    seen: list[tuple[str, int, int]] = []
    options = EvaluationOptions(batch_size=32)
    found = evaluate_network(
        network,
        probe,
        device=CPU,
        options=options,
        progress=lambda phase, done, total: seen.append((phase, done, total)),
    )
    assert (found.batch_size, found.n_features, found.n_classes) == (32, 8, 5)
    assert list(found.splits) == ["all", "train", "test"]
    assert set(found.timings_seconds) == {"features", "predictions", "statistics", "entropies", "null", "collapse"}
    assert seen[:3] == [("features", n, 90) for n in (32, 64, 90)]
    numbers = [done for _, done, total in seen[3:] if total == 3 * 5 * 100]
    assert len(numbers) == len(seen) - 3
    assert numbers == sorted(numbers)
    assert numbers[-1] == 1500
    assert {phase for phase, _, _ in seen[3:]} == {"spectra", "null", "metrics"}
    features = nn.Sequential(*list(network.module.children())[:3])(probe.inputs)
    assert probe.split is not None
    for name, rows in (("all", probe.split >= 0), ("train", probe.split == 0), ("test", probe.split == 1)):
        split = found.splits[name]
        assert split.n_samples == int(rows.sum())
        assert split.class_counts == torch.bincount(probe.labels[rows], minlength=5).tolist()
        _check(split)
        _compare(split, features[rows], probe.labels[rows], network)


def test_features_alone_give_the_same_as_their_network() -> None:
    """Captured features, labels, head and bias, or logits, give the evaluation of the network."""
    network, probe = small_network(), small_probe()
    expected = evaluate_network(network, probe, device=CPU)
    features, logits, _ = extract_features(network, probe, device=CPU)
    labels: list[int] = probe.labels.tolist()
    with_bias = _feature_set(features, labels, network.weight, head_bias=network.bias, split=probe.split)
    with_logits = _feature_set(features, labels, network.weight, logits=logits, split=probe.split)
    for feature_set in (with_bias, with_logits):
        found = evaluate_features(feature_set, device=CPU)
        assert found.batch_size is None
        for name, split in found.splits.items():
            assert split.interplay == expected.splits[name].interplay
            assert split.collapse == expected.splits[name].collapse
            assert split.loss == pytest.approx(expected.splits[name].loss, rel=1e-5)
    plain = evaluate_features(_feature_set(features, labels, network.weight), device=CPU).splits["all"]
    scores = (features @ network.weight.T).double()
    assert plain.loss == pytest.approx(float(nn.functional.cross_entropy(scores, probe.labels)), rel=1e-6)


def test_the_phases_are_the_whole_evaluation() -> None:
    """Time outside of all phases is less than a hundredth, in the best of ten runs."""
    network, probe = small_network(), small_probe(n=2000)
    shares = []
    for _ in range(10):
        start = time.perf_counter()
        found = evaluate_network(network, probe, device=CPU)
        shares.append(sum(found.timings_seconds.values()) / (time.perf_counter() - start))
    assert 0.99 < max(shares) <= 1


def test_a_phase_within_another_is_counted_once() -> None:
    """The time of an inner phase is not part of the outer one, also for repeated phases and after an error."""
    clock = Clock()

    def work() -> None:
        with clock.phase("outer"):
            for seconds in (0.02, 0.02, -1.0):
                with clock.phase("inner"):
                    time.sleep(seconds)

    start = time.perf_counter()
    with pytest.raises(ValueError, match="non-negative"):
        work()
    whole = time.perf_counter() - start
    assert clock.seconds["inner"] >= 0.04
    assert clock.seconds["outer"] + clock.seconds["inner"] <= whole
    assert clock.seconds["outer"] < clock.seconds["inner"]


def test_an_evaluation_repeats_exactly_and_follows_its_seed() -> None:
    """Only timings may differ between two runs; another seed changes only the null."""
    network, probe = small_network(), small_probe()
    first, second = (evaluate_network(network, probe, device=CPU) for _ in range(2))
    assert first.splits == second.splits
    other = evaluate_network(network, probe, device=CPU, options=EvaluationOptions(seed=1)).splits["all"]
    same = first.splits["all"]
    assert other.interplay["sample"]["none"].null != same.interplay["sample"]["none"].null
    assert other.interplay["sample"]["none"].mir == same.interplay["sample"]["none"].mir


def test_calibration_error_by_hand() -> None:
    """Four samples in two bins: |0.9 - 0.5| and |0.6 - 1|, each for half of them."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    found = evaluate_features(_feature_set(torch.randn(4, 3), [0, 1, 0, 0], torch.eye(2, 3), logits=logits), device=CPU)
    assert found.splits["all"].calibration_error == pytest.approx(0.4, abs=1e-6)
    assert found.splits["all"].accuracy == 0.75


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_logit_is_predicted_however_close_the_next(dtype: torch.dtype) -> None:
    """Log-probabilities of logits closer than 1e-16 are equal; of equal logits the first counts."""
    logits = torch.tensor([[0.0, 1e-20, -1.0], [1e-20, 0.0, -1.0], [2.0, 2.0, 1.0], [-1.0, -1e-20, 0.0]], dtype=dtype)
    found = predictions_of(logits, torch.tensor([1, 0, 0, 2]))
    assert found.predicted.tolist() == [1, 0, 0, 2]
    torch.testing.assert_close(found.confidence, logits.double().softmax(dim=1).amax(dim=1), rtol=0, atol=1e-15)


def _evaluate(feature_set: FeatureSet, **options: Any) -> Evaluation:
    found = evaluate_features(feature_set, device=CPU, options=EvaluationOptions(**options))
    for split in found.splits.values():
        _check(split)
    return found


def test_without_permutations_there_is_no_null() -> None:
    """Null and z are null, with the reason that they were not requested."""
    split = _evaluate(_feature_set(torch.randn(6, 4), [0, 1, 2] * 2, torch.eye(3, 4)), null_permutations=0).splits[
        "all"
    ]
    for centrings in split.interplay.values():
        for found in centrings.values():
            assert found.reasons["null"] == found.reasons["mir_z"] == "not_requested"


def test_one_class_alone_gives_nulls() -> None:
    """The head has no entropy and the means no geometry; predictions are still counted."""
    split = _evaluate(_feature_set(torch.randn(6, 4), [1] * 6, torch.eye(3, 4))).splits["all"]
    assert split.interplay["sample"]["none"].reasons["mir"] == "zero_entropy"
    assert split.interplay["sample"]["none"].hdr == 1.0
    assert split.interplay["class_mean"]["global"].reasons["mir"] == "no_directions"
    assert split.collapse.absent_classes == 2
    assert split.accuracy is not None


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
def test_features_that_are_all_equal_give_nulls(value: float) -> None:
    """Centred they have no direction, whatever the rounding; zeros never have one."""
    split = _evaluate(_feature_set(torch.full((7, 4), value), [0, 1, 2, 0, 1, 2, 2], torch.eye(3, 4))).splits["all"]
    centred = split.interplay["sample"]["global"]
    assert centred.reasons["mir"] == "no_directions"
    assert centred.degenerate_samples == 7
    assert split.interplay["class_mean"]["global"].degenerate_classes == 3
    assert split.effective_rank is None
    raw = split.interplay["sample"]["none"]
    assert raw.reasons["mir"] == ("zero_entropy" if value else "no_directions")


def test_head_rows_of_zeros_are_left_out_with_their_samples() -> None:
    """The class is counted; its samples only if they have no direction themselves."""
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    features[1] = 0
    labels = [0, 1, 1, 1, 2, 2, 2, 0, 0]
    head = torch.eye(3, 4)
    head[1] = 0
    found = _evaluate(_feature_set(features, labels, head)).splits["all"].interplay["sample"]["none"]
    kept = np.array(labels) != 1
    expected = reference.interplay(
        features.double().numpy()[kept], np.array(labels)[kept], head.double().numpy(), "sample", "none"
    )
    assert found.mir == pytest.approx(expected.mir, abs=1e-10)
    assert (found.degenerate_classes, found.degenerate_samples) == (1, 1)


@pytest.mark.parametrize("far", [0.0, 1e3, 1e4])
def test_two_pairs_have_one_pairing(far: float) -> None:
    """Both pairings of two class means, near each other seen from the origin, are equal, whatever the rounding."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        means, noise, offset, head = (
            torch.randn(rows, 8, dtype=torch.float64, generator=generator) for rows in (2, 40, 1, 2)
        )
        features = means.repeat(20, 1) + 0.3 * noise + far * offset
        found = _evaluate(_feature_set(features, [0, 1] * 20, head)).splits["all"].interplay["class_mean"]["none"]
        assert found.mir is not None
        assert found.mir_z is None
        assert found.reasons["mir_z"] == "null_degenerate"


@pytest.mark.parametrize("exponent", [-1060, -700, -400, 400, 700, 1000])
def test_no_scale_of_features_or_head_is_too_large_or_small(exponent: int) -> None:
    """If squares overflow or vanish, the values are those at the usual scale, digit for digit, given logits."""
    generator = torch.Generator().manual_seed(0)
    labels, head = [0, 1, 2, 3] * 15, torch.randn(4, 7, dtype=torch.float64, generator=generator)
    features = head[torch.tensor(labels)] + 0.5 * torch.randn(60, 7, dtype=torch.float64, generator=generator)
    # Few digits, so that subnormal numbers hold them.
    features, head = ((rows * 256).round() / 256 for rows in (features, head))
    logits = features @ head.T
    plain = _evaluate(_feature_set(features, labels, head, logits=logits)).splits["all"]
    factors = [2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)]
    scaled = [rows * factors[0] * factors[1] for rows in (features, head)]
    for pair in ((scaled[0], head), (features, scaled[1])):
        found = _evaluate(_feature_set(pair[0], labels, pair[1], logits=logits)).splits["all"]
        for name, value in dataclasses.asdict(plain.collapse).items():
            assert getattr(found.collapse, name) == (pytest.approx(value, rel=1e-12) if value else value), name
        for level, centrings in plain.interplay.items():
            for centring, entry in centrings.items():
                assert found.interplay[level][centring].mir == pytest.approx(entry.mir, rel=1e-12)


def test_at_collapse_the_optimum_is_reached_and_the_pairing_tells_nothing() -> None:
    """On a frame of five MIR is at its optimum at both levels, with distance 0, and has no z at class-mean level."""
    frame = nn.functional.normalize(torch.eye(5, 6).double() - torch.tensor([0.2] * 5 + [0.0]), dim=1)
    labels = [0] * 9 + [1] * 7 + [2] * 5 + [3] * 3 + [4] * 2
    split = _evaluate(_feature_set(frame[torch.tensor(labels)], labels, frame)).splits["all"]
    for centrings in split.interplay.values():
        for found in centrings.values():
            assert found.distance_to_optimum.mir == pytest.approx(0, abs=1e-9)
            assert found.hdr == pytest.approx(0, abs=1e-9)
    assert split.interplay["class_mean"]["global"].reasons["mir_z"] == "null_degenerate"
    assert split.interplay["sample"]["none"].mir_z is not None


def test_values_that_are_not_finite_are_named() -> None:
    """Non-finite features, logits and head each raise an error with their own name."""
    network, probe = small_network(), small_probe()
    broken = dataclasses.replace(probe, inputs=torch.full((len(probe.labels), 12), math.inf))
    good, head, bad = torch.randn(3, 4), torch.eye(3, 4), torch.full((3, 4), math.nan)
    calls: dict[str, list[Callable[[], Evaluation]]] = {
        "features": [
            lambda: evaluate_network(network, broken, device=CPU),
            lambda: evaluate_features(_feature_set(bad, [0, 1, 2], head), device=CPU),
        ],
        "head": [lambda: evaluate_features(_feature_set(good, [0, 1, 2], bad), device=CPU)],
        "logits": [
            lambda: evaluate_features(_feature_set(good, [0, 1, 2], head, logits=bad[:, :3].contiguous()), device=CPU)
        ],
    }
    for name, attempts in calls.items():
        for attempt in attempts:
            with pytest.raises(AnalysisError) as caught:
                attempt()
            assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", name)


def test_an_evaluation_in_bfloat16_is_near_that_in_float32() -> None:
    """Only the pass is narrow: metrics are close, not equal, and the next evaluation is float32 again."""
    network, probe = network_of("mlp", 0), probe_of("mlp")
    first = evaluate_network(network, probe, device=CPU)
    narrow = evaluate_network(network, probe, device=CPU, options=EvaluationOptions(precision="bfloat16"))
    assert evaluate_network(network, probe, device=CPU).splits == first.splits
    found, expected = narrow.splits["all"], first.splits["all"]
    _check(found)
    assert found.loss is not None
    assert expected.loss is not None
    assert 0 < abs(found.loss - expected.loss) < 0.02 * expected.loss
    mir, wide_mir = found.interplay["sample"]["global"].mir, expected.interplay["sample"]["global"].mir
    assert mir is not None
    assert wide_mir is not None
    assert 0 < abs(mir - wide_mir) < 0.01


def test_labels_must_fit_the_head() -> None:
    """A label without a head row is an error of the probe or of the feature set."""
    with pytest.raises(AnalysisError) as caught:
        evaluate_network(small_network(n_classes=4), small_probe(n_classes=5), device=CPU)
    assert caught.value.kind == "invalid-probe"
    assert caught.value.members["highest_label"] == 4
    with pytest.raises(AnalysisError) as caught:
        evaluate_features(_feature_set(torch.randn(2, 3), [0, -1], torch.eye(2, 3)), device=CPU)
    assert caught.value.kind == "invalid-feature-set"


@pytest.mark.parametrize("wrong", [{"null_permutations": -1}, {"tolerance": math.nan}, {"batch_size": 0}])
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    """Options out of range are refused at once."""
    with pytest.raises(AnalysisError) as caught:
        EvaluationOptions(**wrong)
    assert caught.value.kind == "invalid-argument"
    assert caught.value.members["argument"] in wrong


def test_a_split_that_holds_all_samples_is_computed_once() -> None:
    """Without test samples `train` is the same object as `all`, and progress counts one split."""
    generator, seen = torch.Generator().manual_seed(0), list[tuple[str, int, int]]()
    features, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    data = FeatureSet(features, labels, torch.eye(3, 5), None, None, torch.zeros(60, dtype=torch.int64))
    found = evaluate_features(data, device=CPU, progress=lambda *progress: seen.append(progress))
    assert list(found.splits) == ["all", "train"]
    assert found.splits["train"] is found.splits["all"]
    assert seen[-1] == ("metrics", 500, 500)


def test_two_classes_say_that_centring_leaves_nothing() -> None:
    """Two centred head rows are opposite for any network: MIR is null, HDR 1, both with the reason."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(80, 6, generator=generator), torch.arange(80) % 2
    data = FeatureSet(features, labels, torch.randn(2, 6, generator=generator), None, None, None)
    levels = evaluate_features(data, device=CPU).splits["all"].interplay
    centred = levels["sample"]["global"]
    assert (centred.mir, centred.hdr) == (None, 1.0)
    assert centred.reasons["mir"] == centred.reasons["hdr"] == "two_classes"
    assert levels["class_mean"]["global"].reasons["hdr"] == "two_classes"
    assert not {"mir", "hdr"} & levels["sample"]["none"].reasons.keys()


def test_progress_moves_inside_a_spectrum_and_a_null() -> None:
    """Phases are named, and numbers rise many times within one of them."""
    generator, seen = torch.Generator().manual_seed(0), list[tuple[str, int, int]]()
    labels = torch.arange(2400) % 10
    features = torch.randn(2400, 220, generator=generator) / torch.arange(1, 221) + labels[:, None] / 10
    data = FeatureSet(features, labels, torch.randn(10, 220, generator=generator), None, None, None)
    found = evaluate_features(
        data,
        device=CPU,
        options=EvaluationOptions(tolerance=1e-3, null_permutations=20),
        progress=lambda *progress: seen.append(progress),
    )
    method = found.splits["all"].interplay["sample"]["none"].method
    assert method is not None
    assert method.name == "pinched"
    assert len({done for phase, done, _ in seen if phase == "spectra"}) > 20
    assert len({done for phase, done, _ in seen if phase == "null"}) >= 4
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)

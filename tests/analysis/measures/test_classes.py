"""Class means and class Gram matrices, for any type, batches and scale of the features."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis.errors import AnalysisError
from analysis.measures import classes
from analysis.measures.classes import ClassStream, LabelledFeatures, class_statistics, unit_directions
from analysis.measures.entropy import unit_rows
from analysis.measures.spectrum import Entropies, mir_of, sample_entropies, sample_joint_entropy_of_order_two


def _case(seed: int, counts: list[int], d: int, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    head = torch.randn(len(counts), d, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), d, generator=generator, dtype=torch.float64) / torch.arange(1, d + 1).sqrt()
    return head[labels] + noise + offset, labels, unit_rows(head)[0]


def _resident(features: Tensor, labels: Tensor, head: Tensor, centred: bool) -> LabelledFeatures:
    statistics = class_statistics(features, labels, len(head))
    centre = statistics.centre if centred else torch.zeros_like(statistics.centre)
    return LabelledFeatures(features, statistics.members, centre, head[statistics.classes])


def _numbers(entropies: Entropies | None) -> list[float]:
    assert entropies is not None
    return [entropies.features, entropies.head, entropies.joint]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    d=st.integers(2, 20),
    batch=st.integers(1, 60),
    centred=st.booleans(),
)
def test_batches_give_what_the_whole_gives(seed: int, counts: list[int], d: int, batch: int, centred: bool) -> None:
    """Features in batches of any size, fewer and more than d in a class, in float64, give the same as all at once."""
    features, labels, head = _case(seed, counts, d)
    whole = _resident(features, labels, head, centred)
    stream = ClassStream(head, whole.centre)
    for part, target in zip(torch.split(features, batch), torch.split(labels, batch), strict=True):
        stream.update(part, target)
    found, expected = (sample_entropies(labelled, tolerance=0.0) for labelled in (stream, whole))
    assert _numbers(found) == pytest.approx(_numbers(expected), abs=1e-10)
    assert found is not None
    assert found.n_pairs == len(labels)


def test_a_stream_holds_no_more_than_its_gram_matrices() -> None:
    """After ten times as many samples as dimensions a class holds d x d numbers and no rows."""
    features, labels, head = _case(0, [300, 200], 20)
    stream = ClassStream(head)
    for part, target in zip(torch.split(features.float(), 50), torch.split(labels, 50), strict=True):
        stream.update(part, target)
    for block in stream.blocks():
        assert block.rows is None
        assert block.gram.shape == (1, 20, 20)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.float16, 1e-7), (torch.bfloat16, 1e-7)])
def test_narrow_types_are_computed_as_accurately_as_wide_ones(
    dtype: torch.dtype, tolerance: float, centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored numbers of a narrow type are exact: float32 products, also far from the origin, agree with float64."""
    for offset in (0.0, 100.0):
        features, labels, head = _case(1, [700, 500, 20, 1], 60, offset)
        narrow = features.to(dtype)
        expected = sample_entropies(_resident(narrow.double(), labels, head, centred), tolerance=0.0)
        monkeypatch.setattr(classes, "_SMALL_SET", 0)
        labelled = _resident(narrow, labels, head, centred)
        assert labelled.dtype == torch.float32
        found = sample_entropies(labelled, tolerance=0.0)
        monkeypatch.undo()
        assert _numbers(found) == pytest.approx(_numbers(expected), abs=tolerance)


def test_collapsed_float32_features_keep_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every sample on one of three directions, rounding of float32 products adds no entropy."""
    monkeypatch.setattr(classes, "_SMALL_SET", 0)
    _, labels, head = _case(2, [3000, 2000, 1000], 100)
    found = sample_entropies(_resident(head.float()[labels], labels, head, False), tolerance=0.0)
    expected = sample_entropies(_resident(head.float().double()[labels], labels, head, False), tolerance=0.0)
    # Lengths are rounded to 6e-8 of themselves, and that is all that is lost.
    assert _numbers(found) == pytest.approx(_numbers(expected), abs=2e-8)


def test_equal_float32_features_have_no_direction_about_their_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancellation leaves no false direction, in float32 as in float64."""
    monkeypatch.setattr(classes, "_SMALL_SET", 0)
    head = torch.eye(3, 16, dtype=torch.float64)
    labelled = _resident(torch.full((4000, 16), 0.1), torch.arange(4000) % 3, head, True)
    assert labelled.dtype == torch.float32
    assert sample_entropies(labelled) is None


def test_a_narrow_cone_of_float32_features_keeps_its_lengths() -> None:
    """300 standard deviations from the origin H is 3e-4: lengths summed in float32 would move MIR by 4e-6."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(11_100) % 3
    means, noise, offset, head = (
        torch.randn(rows, 384, generator=generator, dtype=torch.float64) for rows in (3, 11_100, 1, 3)
    )
    features = (means[labels] + noise + 300 * offset).float()
    mirs = []
    for entry in (features, features.double()):
        labelled = _resident(entry, labels, unit_rows(head)[0], False)
        assert labelled.dtype == entry.dtype
        found = sample_entropies(labelled, tolerance=0.0)
        assert found is not None
        assert found.features < 1e-3
        mirs.append(mir_of(found.features, found.head, found.joint))
    assert mirs[0] == pytest.approx(mirs[1], abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_the_scale_of_float32_features_does_not_matter(scale: float) -> None:
    """Lengths may have squares outside of float32's range."""
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    directions, usable = unit_directions(features * scale, torch.zeros(7, dtype=torch.float64), torch.float32)
    assert bool(usable.all())
    torch.testing.assert_close(directions, torch.nn.functional.normalize(features, dim=1), rtol=1e-5, atol=1e-6)


def test_many_small_classes_are_reduced_together() -> None:
    """A thousand small classes of uneven size, in a few blocks, give the same as one by one."""
    counts = [1 + c % 9 for c in range(1000)]
    features, labels, head = _case(3, counts, 24)
    labelled = _resident(features, labels, head, False)
    blocks = list(labelled.blocks())
    assert len(blocks) <= 5
    seen = sorted(position for block in blocks for position in block.positions)
    assert seen == list(range(1000))
    for block in blocks:
        for index, position in enumerate(block.positions):
            directions = labelled.directions(labelled.members[position])
            assert int(block.counts[index]) == len(directions) == counts[position]
            values = torch.linalg.eigvalsh(directions @ directions.T)
            found = torch.linalg.eigvalsh(block.gram[index])[-len(values) :]
            torch.testing.assert_close(found, values, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), d=st.integers(2, 20))
def test_order_two_needs_no_eigenvalues(seed: int, counts: list[int], d: int) -> None:
    """The closed form equals the Frobenius norm of the whole joint Gram matrix, for classes above and below d."""
    features, labels, head = _case(seed, counts, d)
    z = unit_rows(features)[0]
    joint = z @ z.T * (head[labels] @ head[labels].T) / len(z)
    expected = -math.log(float(joint.square().sum()))
    found = sample_joint_entropy_of_order_two(_resident(features, labels, head, False))
    assert found == pytest.approx(expected, abs=1e-11)
    assert sample_joint_entropy_of_order_two(_resident(torch.zeros(len(z), d), labels, head, False)) is None


def test_what_does_not_fit_is_named() -> None:
    """Labels out of range, no samples and non-finite values are refused by name."""
    features, head = torch.randn(4, 3), torch.eye(2, 3, dtype=torch.float64)
    for labels in ([0, 1, 2, 0], [0, -1, 0, 0]):
        with pytest.raises(AnalysisError) as caught:
            ClassStream(head).update(features, torch.tensor(labels))
        assert (caught.value.kind, caught.value.members["argument"]) == ("invalid-argument", "labels")
    with pytest.raises(AnalysisError) as caught:
        class_statistics(features[:0], torch.zeros(0, dtype=torch.int64), 2)
    assert caught.value.kind == "invalid-argument"
    with pytest.raises(AnalysisError) as caught:
        ClassStream(head).update(torch.full((2, 3), math.inf), torch.tensor([0, 1]))
    assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", "features")

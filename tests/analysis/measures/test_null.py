"""The permutation baseline: its permutations, and its estimates against the spectra of the same permutations."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.measures import null
from analysis.measures.entropy import unit_rows
from analysis.measures.null import Null, pair_null, sample_null
from tests.analysis import reference
from tests.analysis.measures.test_spectrum import _case, _entropies, _labelled, _mir


def test_the_sample_null_permutes_labels_on_a_stratified_subsample() -> None:
    """It takes 512 of 1000 samples in proportion to the classes; independent labels share little, real ones more."""
    features, labels, head = _case(6, [500, 300, 200], 20, 0.5, 2.0)
    labelled = _labelled(features, labels, head, "none")
    null = sample_null(labelled, permutations=20, generator=torch.Generator().manual_seed(0))
    assert null is not None
    assert (null.n, null.n_samples) == (20, 512)
    assert null.observed == pytest.approx(_mir(_entropies(labelled)), abs=0.02)
    assert 0 <= null.mean < 0.2 < null.observed
    assert 0 < null.std < 0.02
    assert sample_null(labelled, permutations=20, generator=torch.Generator().manual_seed(0)) == null
    assert sample_null(labelled, permutations=20, generator=torch.Generator().manual_seed(1)) != null


def test_a_small_probe_is_its_own_subsample() -> None:
    """Up to 512 samples the observed value is the exact MIR, and the null is that of naive permutations."""
    features, labels, head = _case(7, [30, 20, 10], 8)
    labelled = _labelled(features, labels, head, "none")
    null = sample_null(labelled, permutations=200, generator=torch.Generator().manual_seed(0))
    assert null is not None
    assert null.n_samples == 60
    assert null.observed == pytest.approx(_mir(_entropies(labelled)), abs=1e-10)
    random = np.random.default_rng(0)
    values = [
        reference.interplay(features.numpy(), random.permutation(labels.numpy()), head.numpy(), "sample", "none").mir
        for _ in range(200)
    ]
    naive = np.array(values, dtype=np.float64)
    # Two sets of 200 draws: means within five standard errors, deviations within 40%.
    assert null.mean == pytest.approx(naive.mean(), abs=5 * naive.std() * math.sqrt(2 / 200))
    assert null.std == pytest.approx(naive.std(ddof=1), rel=0.4)


def test_at_collapse_every_pairing_is_the_same() -> None:
    """With class means and head on one simplex frame the null of the pairing has no spread."""
    frame = unit_rows(torch.eye(6, dtype=torch.float64) - 1 / 6)[0]
    null = pair_null(frame, frame, permutations=10, generator=torch.Generator().manual_seed(0))
    assert null is not None
    assert null.std < 1e-12
    assert null.mean == pytest.approx(null.observed, abs=1e-12)


def test_the_pair_null_is_undefined_without_entropy_and_limited_to_512_pairs() -> None:
    """One pair has no entropy; of many classes a drawn part is permuted; one permutation has no spread."""
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert pair_null(one, one, permutations=3, generator=generator) is None
    rows = unit_rows(torch.randn(600, 30, generator=generator))[0]
    null = pair_null(rows, rows.roll(1, 0), permutations=1, generator=generator)
    assert null is not None
    assert (null.n, null.n_samples, null.std) == (1, 512, 0.0)


def _both(features: Tensor, labels: Tensor, head: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Null, Null]:
    """Return the baseline as computed, and with the spectra of all permutations."""
    labelled, found = _labelled(features, labels, head, "global"), []
    for small in (null._SMALL, 10**6):
        monkeypatch.setattr(null, "_SMALL", small)
        found.append(sample_null(labelled, permutations=10, generator=torch.Generator().manual_seed(0)))
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


@pytest.mark.parametrize(("d", "power", "separation"), [(24, 1.0, 3.0), (40, 0.5, 2.0), (16, 0.0, 1.0)])
def test_estimates_stand_for_the_spectra_of_permutations(
    d: int, power: float, separation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For steep, middling and flat spectra of 600 samples z, mean and observed value agree, z within a tenth."""
    features, labels, head = _case(12, [60] * 10, d, power, separation)
    found, spectra = _both(features, labels, head, monkeypatch)
    distance = spectra.observed - spectra.mean
    assert found != spectra
    assert found.observed == pytest.approx(spectra.observed, abs=1e-3)
    assert found.mean == pytest.approx(spectra.mean, abs=0.02 * distance)
    assert (found.observed - found.mean) / found.std == pytest.approx(distance / spectra.std, rel=0.1)


@pytest.mark.parametrize(("n_classes", "d"), [(10, 64), (4, 200), (60, 30)])
def test_a_baseline_near_what_is_observed_rests_on_spectra(
    n_classes: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For features independent of their classes the error of the mean is at most a share of the spread."""
    features, labels, head = _case(13, [300 // n_classes] * n_classes, d, 0.2, 0.0)
    found, spectra = _both(features, labels, head, monkeypatch)
    assert found.observed == pytest.approx(spectra.observed, abs=1e-4)
    assert abs(found.mean - spectra.mean) <= 0.5 * spectra.std
    assert found.std == pytest.approx(spectra.std, rel=0.5)


def test_many_pairs_on_one_frame_have_no_spread() -> None:
    """If every pairing gives the same Gram matrices, estimates have no deviation."""
    frame = unit_rows(torch.eye(150, dtype=torch.float64) - 1 / 150)[0]
    null = pair_null(frame, frame, permutations=10, generator=torch.Generator().manual_seed(0))
    assert null is not None
    assert null.std < 1e-12

"""MIR and HDR as a loss: against plain definitions, with exact and finite gradients on any batch, and in training."""

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import Tensor, nn

from analysis.errors import AnalysisError
from analysis.measures import entropy, losses
from analysis.measures.entropy import matrix_entropy, unit_rows
from analysis.measures.losses import Centring, InterplayLoss, hdr_loss, mir_loss, spectral_entropy
from tests.campaigns import campaign

F64 = torch.float64


def _batch(seed: int, n: int, d: int, c: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, dtype=F64, generator=generator)
    head = torch.randn(c, d, dtype=F64, generator=generator)
    labels = torch.randint(c, (n,), generator=generator)
    return (
        (features + head[labels]).to(dtype).requires_grad_(),
        head.to(dtype).requires_grad_(),
        labels,
    )


def _plain(features: Tensor, head: Tensor, labels: Tensor, centring: str) -> tuple[float | None, float | None]:
    """Return MIR and HDR from whole Gram matrices."""
    features, head = features.detach().double(), head.detach().double()
    if centring == "global":
        features = features - torch.stack([features[labels == c].mean(dim=0) for c in torch.unique(labels)]).mean(dim=0)
        head = head - head.mean(dim=0)
    z, v = unit_rows(features)[0], unit_rows(head[labels])[0]
    return entropy.mir(z @ z.T, v @ v.T), entropy.hdr(z @ z.T, v @ v.T)


def _gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    return list(gradients)


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(losses).failed == 0


@pytest.mark.parametrize("centring", ["none", "global"])
@pytest.mark.parametrize(("n", "d", "c"), [(2, 5, 4), (12, 30, 4), (40, 6, 3), (60, 3, 2), (50, 4, 9), (30, 1, 3)])
def test_the_loss_is_that_of_the_plain_definitions(n: int, d: int, c: int, centring: Centring) -> None:
    """For n x n, d x d, or coordinates in the span of the head, whichever is smallest."""
    features, head, labels = _batch(n, n, d, c)
    labels[:2] = torch.tensor([0, 1])
    mir, hdr = _plain(features, head, labels, centring)
    found = mir_loss(features, head, labels, centring=centring), hdr_loss(features, head, labels, centring=centring)
    assert found[0].item() == pytest.approx(0 if mir is None else 1 - mir, abs=1e-9)
    assert found[1].item() == pytest.approx(0 if hdr is None else hdr, abs=1e-9)
    loss = InterplayLoss(0.3, 0.7, centring=centring)(features, head, labels)
    assert loss.item() == pytest.approx(0.3 * found[0].item() + 0.7 * found[1].item(), abs=1e-12)


@pytest.mark.parametrize("centring", ["none", "global"])
@pytest.mark.parametrize(("n", "d", "c"), campaign([(6, 9, 3), (12, 5, 4), (14, 3, 2)], often=[(14, 3, 2)]))
def test_gradients_are_exact(n: int, d: int, c: int, centring: Centring) -> None:
    """gradcheck agrees with finite differences; from the second case on there are more samples than dimensions."""
    features, head, labels = _batch(n + d, n, d, c)
    labels[:c] = torch.arange(c)
    weights = torch.linspace(0.2, 1, n, dtype=F64)

    def terms(f: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return mir_loss(f, h, labels, weights, centring=centring), hdr_loss(f, h, labels, weights, centring=centring)

    assert torch.autograd.gradcheck(terms, (features, head))


def test_the_derivative_of_a_spectrum_is_exact_where_eigenvalues_meet() -> None:
    """All eigenvalues of the identity are equal, and 1 / (l_i - l_j) would be infinite."""
    matrix = (torch.eye(5, dtype=F64) / 5).requires_grad_()
    (gradient,) = _gradients(spectral_entropy(matrix), matrix)
    torch.testing.assert_close(gradient, (math.log(5) - 1) * torch.eye(5, dtype=F64), rtol=1e-13, atol=1e-13)


def test_gradients_are_exact_on_repeated_samples() -> None:
    """With every sample three times, a step off the support changes H by at most its square times a logarithm."""
    features, head, labels = _batch(3, 6, 10, 3)
    labels = torch.arange(6).remainder(3).repeat(3)
    repeated = features.detach().repeat(3, 1).requires_grad_()
    (gradient,) = _gradients(InterplayLoss(1.0, 1.0)(repeated, head, labels), repeated)
    direction = torch.randn(18, 10, dtype=F64, generator=torch.Generator().manual_seed(0))
    step = 1e-7
    with torch.no_grad():
        ahead, behind = (
            float(InterplayLoss(1.0, 1.0)(repeated + sign * step * direction, head, labels)) for sign in (1, -1)
        )
    # Both steps leave the support, by eigenvalues of about step^2, so that the central difference has no first order
    # but that of the support.
    assert (ahead - behind) / (2 * step) == pytest.approx(float((gradient * direction).sum()), abs=1e-5)


def _degenerate(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    features, head, labels = (tensor.detach() for tensor in _batch(7, 24, 8, 4, dtype))
    means = torch.randn(4, 8, dtype=F64, generator=torch.Generator().manual_seed(9)).to(dtype)
    match name:
        case "more samples than dimensions":
            features, head = features[:, :2], head[:, :2]
        case "repeated samples":
            features, labels = features[:3].repeat(8, 1), labels[:3].repeat(8)
        case "collapsed to the class means":
            features = means[labels]
        case "collapsed to the head":
            features = head[labels]
        case "collapsed to one point":
            features = features[:1].repeat(24, 1)
        case "nearly collapsed to one point":
            features = features[:1] + 1e-6 * features
        case "collapsed but for rounding":
            features = features[:1] * torch.linspace(0.1, 7, 24).to(dtype)[:, None]
        case "one class":
            labels = torch.full_like(labels, 2)
        case "equal head rows":
            head = head[:1].repeat(4, 1)
        case "opposite head rows":
            head = torch.stack([head[0], -head[0], 2 * head[0], -head[0]])
        case "head of zeros":
            head = torch.zeros_like(head)
        case "some rows of zeros":
            features, head = features.clone(), head.clone()
            features[::3], head[1] = 0, 0
        case "features of zeros":
            features = torch.zeros_like(features)
        case "tiny and huge":
            features = features * torch.logspace(-30, 30, 24, dtype=F64).to(dtype)[:, None]
    return features.clone().requires_grad_(), head.clone().requires_grad_(), labels


DEGENERATE = [
    "more samples than dimensions",
    "repeated samples",
    "collapsed to the class means",
    "collapsed to the head",
    "collapsed to one point",
    "nearly collapsed to one point",
    "collapsed but for rounding",
    "one class",
    "equal head rows",
    "opposite head rows",
    "head of zeros",
    "some rows of zeros",
    "features of zeros",
    "tiny and huge",
]


@pytest.mark.parametrize("centring", ["none", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEGENERATE)
def test_gradients_are_finite_on_degenerate_batches(name: str, dtype: torch.dtype, centring: Centring) -> None:
    """Loss and gradients are finite for any batch, and the loss is between 0 and the sum of its weights."""
    features, head, labels = _degenerate(name, dtype)
    loss = InterplayLoss(1.0, 1.0, centring=centring)(features, head, labels)
    assert loss.dtype == dtype
    assert -1e-6 <= loss.item() <= 2 + 1e-6
    _gradients(loss, features, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["collapsed to one point", "one class", "equal head rows", "head of zeros"])
def test_a_term_that_is_not_defined_is_zero(name: str, dtype: torch.dtype) -> None:
    """Without entropy on one side the MIR term is exactly 0, and so is its gradient."""
    features, head, labels = _degenerate(name, dtype)
    loss = mir_loss(features, head, labels)
    assert loss.item() == 0
    assert all(not bool(gradient.any()) for gradient in _gradients(loss, features, head))
    assert InterplayLoss(1.0, 0.0)(features, head, labels).item() == 0


def test_one_class_alone_has_an_hdr_of_one_without_a_gradient() -> None:
    """HDR is defined and flat if one entropy is zero; if both are zero it is exactly 0."""
    features, head, labels = _degenerate("one class", F64)
    loss = hdr_loss(features, head, labels)
    assert loss.item() == pytest.approx(1, abs=1e-12)
    for gradient in _gradients(loss, features, head):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    point = features[:1].detach().repeat(24, 1).requires_grad_()
    assert hdr_loss(point, head, labels).item() == 0
    assert not bool(_gradients(hdr_loss(point, head, labels), point)[0].any())


def test_collapse_to_a_frame_is_at_the_optimum() -> None:
    """With features and head on one simplex frame: 1 - MIR* of ten classes, HDR 0, and zero gradient."""
    frame = torch.eye(10, dtype=F64) - 0.1
    features, head = frame.repeat(6, 1).requires_grad_(), frame.clone().requires_grad_()
    labels = torch.arange(10).repeat(6)
    assert mir_loss(features, head, labels).item() == pytest.approx(1 - 0.952350782540, abs=1e-11)
    assert hdr_loss(features, head, labels).item() == pytest.approx(0, abs=1e-12)
    for gradient in _gradients(mir_loss(features, head, labels), features, head):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("centring", ["none", "global"])
def test_masked_samples_take_no_part(centring: Centring) -> None:
    """A mask has the effect of leaving samples out, whatever they hold."""
    features, head, labels = _batch(1, 30, 6, 4)
    mask = torch.arange(30) % 3 != 0
    kept = features.detach()[mask].requires_grad_()
    expected = InterplayLoss(1.0, 1.0, centring=centring)(kept, head, labels[mask])
    broken = features.detach().clone()
    broken[~mask] = math.nan
    broken.requires_grad_()
    labels[~mask] = -100
    for weights in (mask, mask.double(), 0.5 * mask.float()):
        found = InterplayLoss(1.0, 1.0, centring=centring)(broken, head, labels, weights)
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
        gradient = _gradients(found, broken)[0]
        torch.testing.assert_close(gradient[mask], _gradients(expected, kept)[0], rtol=1e-9, atol=1e-11)
        assert not bool(gradient[~mask].any())


def test_rows_without_direction_are_left_out() -> None:
    """Samples of zeros and samples with a zero head row have no effect on the batch."""
    features, head, labels = _degenerate("some rows of zeros", F64)
    left = features.detach().any(dim=1) & (labels != 1)
    assert 2 < int(left.sum()) < 16
    for term in (mir_loss, hdr_loss):
        found, expected = term(features, head, labels), term(features, head, labels, left)
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
        for one, other in zip(_gradients(found, features, head), _gradients(expected, features, head), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("centring", ["none", "global"])
def test_a_weight_counts_as_that_many_samples(centring: Centring) -> None:
    """Weights of 1 and 1/2 equal a batch with the first samples twice; no gradient flows into the weights."""
    features, head, labels = _batch(2, 12, 5, 3)
    labels = torch.arange(12) % 3
    first = torch.arange(12) < 5
    twice = torch.cat([features, features[first]]), head, torch.cat([labels, labels[first]])
    weights = torch.where(first, 1.0, 0.5).requires_grad_()
    for term in (mir_loss, hdr_loss):
        weighted = term(features, head, labels, weights, centring=centring)
        assert weighted.item() == pytest.approx(term(*twice, centring=centring).item(), abs=1e-10)
        assert torch.autograd.grad(weighted, weights, allow_unused=True)[0] is None


@pytest.mark.parametrize("n_used", [0, 1])
def test_fewer_than_two_samples_give_nothing(n_used: int) -> None:
    """The loss is exactly 0, with zero gradient, also if left out samples hold NaN."""
    features, head, labels = _batch(0, 8, 4, 3, torch.float32)
    broken = features.detach().clone()
    broken[n_used:] = math.nan
    broken.requires_grad_()
    mask = torch.arange(8) < n_used
    for loss in (InterplayLoss(1.0, 1.0)(broken, head, labels, mask), mir_loss(broken, head, labels, mask)):
        assert loss.item() == 0
        assert all(not bool(gradient.any()) for gradient in _gradients(loss, broken, head))
    empty = broken[:0]
    assert hdr_loss(empty, head, labels[:0]).item() == 0


def test_a_weight_of_zero_leaves_its_term_out() -> None:
    """Each term alone is computed; both weights zero give zero."""
    features, head, labels = _batch(5, 20, 6, 3)
    assert InterplayLoss(1.0, 0.0)(features, head, labels).item() == mir_loss(features, head, labels).item()
    assert InterplayLoss(0.0, 1.0)(features, head, labels).item() == hdr_loss(features, head, labels).item()
    assert InterplayLoss(0.0, 0.0)(features, head, labels).item() == 0


def test_autocast_does_not_reach_the_spectrum() -> None:
    """Under autocast the loss of a float32 batch is unchanged; bfloat16 features get bfloat16 gradients."""
    features, head, labels = _batch(4, 32, 12, 4, torch.float32)
    inputs = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    outside = InterplayLoss(1.0, 1.0)(features, head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (inputs @ inputs.T).dtype == torch.bfloat16
        inside = InterplayLoss(1.0, 1.0)(features, head, labels)
        low = (inputs @ head.T @ head).requires_grad_()
        assert low.dtype == torch.bfloat16
        losses_of_low = [InterplayLoss(1.0, 1.0)(low, head, labels), mir_loss(low, head, labels)]
    assert inside.item() == outside.item()
    for found, expected in zip(_gradients(inside, features, head), _gradients(outside, features, head), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for loss in losses_of_low:
        assert loss.dtype == torch.float32
        assert [gradient.dtype for gradient in _gradients(loss, low, head)] == [torch.bfloat16, torch.float32]
    mir, _ = _plain(low, head, labels, "none")
    assert mir is not None
    assert losses_of_low[1].item() == pytest.approx(1 - mir, abs=1e-6)


def test_a_second_derivative_is_refused() -> None:
    """A second derivative raises an error, through the ratio and through the entropy alone."""
    features, head, labels = _batch(4, 8, 5, 3)
    for value in (mir_loss(features, head, labels), spectral_entropy(features @ features.T)):
        (gradient,) = torch.autograd.grad(value, features, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(gradient.sum(), features)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 24), d=st.integers(1, 8), c=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_facts_that_hold_for_every_batch(seed: int, n: int, d: int, c: int) -> None:
    """Bounds; invariance under permuted samples, scaled and rotated rows; gradients along a row are zero."""
    features, head, labels = _batch(seed, n, d, c)
    loss = InterplayLoss(1.0, 2.0)
    value = loss(features, head, labels)
    assert -1e-8 <= value.item() <= 3 + 1e-8
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    assert loss(features[order], head, labels[order]).item() == pytest.approx(value.item(), abs=1e-8)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator)).Q
    scales = torch.rand(n, 1, dtype=F64, generator=generator) + 0.1
    assert loss(scales * features @ rotation, 3 * head, labels).item() == pytest.approx(value.item(), abs=1e-8)
    for leaf, gradient in zip((features, head), _gradients(value, features, head), strict=True):
        along = (gradient * leaf).sum(dim=1)
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-6 * (1 + float(gradient.norm())))


@given(seed=st.integers(0, 10**6), m=st.integers(1, 12), rank=st.integers(1, 12))
@settings(deadline=None)
def test_the_differentiable_entropy_is_the_plain_one(seed: int, m: int, rank: int) -> None:
    """For Gram matrices of every rank."""
    rows = torch.randn(m, rank, dtype=F64, generator=torch.Generator().manual_seed(seed))
    directions = nn.functional.normalize(rows, dim=1)
    gram = directions @ directions.T
    assert spectral_entropy(gram / m).item() == pytest.approx(matrix_entropy(gram), abs=1e-11)


def test_wrong_arguments_are_named() -> None:
    """Shapes, dtypes, labels and masks that do not fit are refused, without the checks of annotations."""
    features, head, labels = (tensor.detach() for tensor in _batch(0, 6, 4, 3))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = InterplayLoss(1.0, 1.0)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("mir_weight", lambda: InterplayLoss(-0.1, 1.0)),
        ("hdr_weight", lambda: InterplayLoss(1.0, math.nan)),
        ("centring", lambda: InterplayLoss(1.0, 1.0, centring="class")),  # type: ignore[arg-type]  # what is refused
        ("centring", lambda: mir_loss(features, head, labels, centring="")),  # type: ignore[arg-type]  # likewise
        ("features", lambda: loss(features[0], head, labels)),
        ("features", lambda: loss(features.long(), head, labels)),
        ("features", lambda: loss(features[:, :0], head[:, :0], labels)),
        ("head", lambda: loss(features, head[:, :3], labels)),
        ("head", lambda: loss(features, head.long(), labels)),
        ("labels", lambda: loss(features, head, labels[:5])),
        ("labels", lambda: loss(features, head, labels.double())),
        ("labels", lambda: loss(features, head, labels > 0)),
        ("labels", lambda: loss(features, head, labels + 1)),
        ("labels", lambda: loss(features, head, labels - 1)),
        ("mask", lambda: loss(features, head, labels, labels)),
        ("mask", lambda: loss(features, head, labels, torch.ones(5))),
        ("mask", lambda: loss(features, head, labels, torch.full((6,), 1.5))),
        ("mask", lambda: loss(features, head, labels, torch.tensor([1, 1, 1, 1, 1, math.nan]))),
    ]
    config.update("jaxtyping_disable", True)
    try:
        for name, call in calls:
            with pytest.raises(AnalysisError) as caught:
                call()
            assert (caught.value.kind, caught.value.members["argument"]) == ("invalid-argument", name)
    finally:
        config.update("jaxtyping_disable", False)
    for name, arguments in (("features", (features / 0, head)), ("head", (features, head * math.inf))):
        with pytest.raises(AnalysisError) as caught:
            loss(*arguments, labels)
        assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", name)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("weight", campaign([0.01, 0.1, 1.0], often=[0.1]))
def test_a_network_trains_on_five_labels_a_class(weight: float) -> None:
    """300 steps on the digits: labelled samples, and confident pseudo-labels."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(targets)
    labelled = torch.cat([(labels == c).nonzero()[:5, 0] for c in range(10)])
    others = torch.ones(len(labels), dtype=torch.bool)
    others[labelled] = False
    pool = others.nonzero()[:, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body, head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    interplay = InterplayLoss(weight, weight)
    generator = torch.Generator().manual_seed(0)
    first = last = math.nan
    for step in range(300):
        unlabelled = inputs[pool[torch.randint(len(pool), (64,), generator=generator)]]
        features, unlabelled_features = body(inputs[labelled]), body(unlabelled)
        supervised = nn.functional.cross_entropy(head(features), labels[labelled])
        confidence, pseudo = head(unlabelled_features).detach().softmax(dim=1).max(dim=1)
        confident = confidence >= 0.95
        loss = supervised + interplay(features, head.weight, labels[labelled])
        loss = loss + interplay(unlabelled_features, head.weight, pseudo, confident)
        assert math.isfinite(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert all(bool(torch.isfinite(parameter).all()) for parameter in body.parameters())
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first
    with torch.no_grad():
        accuracy = float((head(body(inputs[pool])).argmax(dim=1) == labels[pool]).double().mean())
    assert accuracy > 0.6

"""Permute one network's hidden units to match another's, before the path between them.

The axes that must be permuted together follow from the network's computation, traced as ATen operations: `tracing.py`
finds them for any network; nothing here depends on an architecture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..errors import AnalysisError
from ..networks.loading import forget, parts_that_keep
from ..passes.precision import arithmetic
from ..probes.inputs import Inputs, first_samples
from .tracing import tied_axes

State = Mapping[str, Shaped[Tensor, "..."]]

# A sweep that gains less than this share of the objective has gained only rounding.
_NOTHING = 1e-12
# Parameters converted to float64 at a time.
_CHUNK = 2**20
# Logits of float32 networks that differ by less than this share of the largest differ by the order of their sums.
_SAME = 1e-4


@dataclass(frozen=True)
class PermutationGroup:
    """Axes that one permutation moves together.

    Attributes:
        size: number of units.
        axes: name and dimension of each tensor.
    """

    size: int
    axes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Alignment:
    """A permutation for each group, and statistics of the search.

    Attributes:
        permutations: unit i of the aligned network is unit p[i] of the one before.
        sweeps: passes over all groups.
        gain: increase of the inner product of the two networks' parameters.
    """

    permutations: tuple[Int64[Tensor, " _"], ...]
    sweeps: int
    gain: float


def permutation_groups(module: nn.Module, example: Inputs) -> list[PermutationGroup]:
    """Return groups of axes that can be permuted without changing the network's function.

    Args:
        module: in evaluation mode.
        example: an input, two samples are enough.

    Returns:
        The groups of more than one unit that hold an axis of a weight with two dimensions or more. An unknown operation
        fixes all axes that it touches: the network is then aligned less, never wrongly.

    Raises:
        AnalysisError: `alignment-failed` where the network cannot be traced.
    """
    weights = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.ndim > 1}
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    groups = [
        PermutationGroup(shapes[axes[0][0]][axes[0][1]], tuple(axes))
        for axes in tied_axes(module, example)
        if any(name in weights for name, _ in axes)
    ]
    return [group for group in groups if group.size > 1]


def weight_matching(
    groups: Sequence[PermutationGroup],
    reference: State,
    state: State,
    *,
    generator: torch.Generator,
    most_sweeps: int = 100,
) -> Alignment:
    """Find permutations that bring a network's parameters close to another's: argmax_p of the inner product of both.

    One group after the other, in random order, is solved exactly while the rest stays, until a sweep gains nothing.

    Args:
        groups: of both networks.
        reference: parameters of the network that stays. Tensors missing here, as running statistics should be, do not
            enter the objective and are permuted all the same. Names that are in no group are ignored.
        state: parameters of the network that is permuted, at least those of the reference.
        generator: on the CPU; draws the order of the groups in each sweep.
        most_sweeps: stop after so many.

    Returns:
        The permutations; the objective is never below that of the identity.

    Numerics: float64 on the CPU, a few parameters at a time. Memory for a copy of the permuted parameters and for some
        matrices of n x n; from a GPU both networks' parameters are copied to the CPU. O(n^3) for a group of n units,
        and O(n P) for P parameters that it touches, each sweep.

    Source: Ainsworth, Hayase, Srinivasa 2022, "Git Re-Basin", algorithm 1.
    """
    # In the order of the groups, not of a set, which is another in each process: sums round by their order.
    names = dict.fromkeys(name for group in groups for name, _ in group.axes if name in reference)
    fixed = {name: reference[name].detach().cpu() for name in names}
    moved = {name: state[name].detach().cpu() for name in names}
    permutations = [torch.arange(group.size) for group in groups]
    scale = sum(_length(tensor) * _length(moved[name]) for name, tensor in fixed.items())
    gain, sweeps = 0.0, 0
    while sweeps < most_sweeps:
        sweeps += 1
        gained = 0.0
        for index in torch.randperm(len(groups), generator=generator).tolist():
            axes = [(name, dim) for name, dim in groups[index].axes if name in names]
            found, by = _improve(axes, fixed, moved)
            permutations[index] = permutations[index][found]
            gained += by
        gain += gained
        if gained <= _NOTHING * scale:
            break
    return Alignment(tuple(permutations), sweeps, gain)


def permuted(
    state: State, groups: Sequence[PermutationGroup], permutations: Sequence[Int64[Tensor, " _"]]
) -> dict[str, Shaped[Tensor, "..."]]:
    """Return the tensors with every group's axes permuted; tensors in no group stay."""
    found = dict(state)
    for group, permutation in zip(groups, permutations, strict=True):
        for name, dim in group.axes:
            if name in found:
                found[name] = found[name].index_select(dim, permutation.to(found[name].device))
    return found


def aligned(
    first: nn.Module, second: nn.Module, inputs: Inputs, *, generator: torch.Generator
) -> tuple[dict[str, Shaped[Tensor, "..."]], Alignment, float]:
    """Return the second network's tensors, its hidden units permuted to match the first's.

    Args:
        first: not changed.
        second: of the same architecture; it holds the permuted tensors from here on.
        inputs: on these the permuted network must give the same logits as before.
        generator: as of `weight_matching`.

    Returns:
        The tensors, the alignment, and the largest change of a logit as a share of the largest logit.

    Raises:
        AnalysisError: `alignment-failed` where the network cannot be traced, or gives other logits once permuted.
    """
    groups = permutation_groups(second, first_samples(inputs, 2))
    # A tensor with several names counts once, as it does in the distance of the two ends.
    parameters = [dict(module.named_parameters()) for module in (first, second)]
    alignment = weight_matching(groups, *parameters, generator=generator)
    state = permuted(second.state_dict(), groups, alignment.permutations)
    # Without TF32, as in the evaluation: it would round small shifts from the order of sums to steps of 10 bits.
    # And always in float32: a tie of bfloat16 logits would hide a wrong permutation.
    with torch.no_grad(), arithmetic(next(second.parameters()).device):
        before = second(inputs)
        second.load_state_dict(state)
        forget(parts_that_keep(second))
        after = second(inputs)
    # The module's own tensors: keeping `state` as well would hold two copies of B.
    return second.state_dict(), alignment, check_same_function(before, after)


def check_same_function(before: Float[Tensor, "... c"], after: Float[Tensor, "... c"]) -> float:
    """Return the change of logits by permuting hidden units, as a share of the largest; it should be only rounding.

    Raises:
        AnalysisError: `alignment-failed` where it is more than 1e-4.
    """
    largest = float(before.abs().max())
    change = float((after - before).abs().max())
    share = change / largest if largest > 0 else change
    if not share <= _SAME:
        raise AnalysisError(
            "alignment-failed",
            f"Permuting hidden units changed the logits by {share:.2g} of the largest; at most {_SAME:g} is rounding. "
            "The network depends on the order of its units in a way that the alignment does not detect.",
            change=share,
        )
    return share


def _improve(
    axes: Sequence[tuple[str, int]], fixed: State, moved: dict[str, Tensor]
) -> tuple[Int64[Tensor, " n"], float]:
    """Return the best permutation of one group with all others fixed, applied to `moved`, and its gain."""
    products = sum((_products(fixed[name], moved[name], dim) for name, dim in axes), start=torch.zeros(()))
    _, columns = linear_sum_assignment(products.numpy(), maximize=True)
    found = torch.from_numpy(columns)
    if torch.equal(found, torch.arange(len(found))):
        return found, 0.0
    names = dict.fromkeys(name for name, _ in axes)
    before = {name: moved[name] for name in names}
    # A tensor with the group on two axes makes the objective quadratic: the assignment is then only a guess.
    after = permuted(before, [PermutationGroup(len(found), tuple(axes))], [found])
    gain = sum(_gain(fixed[name], before[name], after[name]) for name in names)
    if gain <= 0:
        return torch.arange(len(found)), 0.0
    moved.update(after)
    return found, gain


def _length(tensor: Float[Tensor, "..."]) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _products(fixed: Float[Tensor, "..."], moved: Float[Tensor, "..."], dim: int) -> Float64[Tensor, "n n"]:
    """Return inner products of each unit of one tensor with each of the other, a few parameters of a unit at a time."""
    fixed, moved = _rows(fixed, dim), _rows(moved, dim)
    size = len(fixed)
    found = torch.zeros(size, size, dtype=torch.float64)
    columns = max(_CHUNK // size, 1)
    for a, b in zip(torch.split(fixed, columns, dim=1), torch.split(moved, columns, dim=1), strict=True):
        found.addmm_(a.double(), b.double().T)
    return found


def _gain(fixed: Float[Tensor, "..."], before: Float[Tensor, "..."], after: Float[Tensor, "..."]) -> float:
    """Return the increase of a tensor's inner product with the other network's."""
    pieces = zip(*(torch.split(tensor.flatten(), _CHUNK) for tensor in (fixed, before, after)), strict=True)
    return sum(float(a.double() @ (c.double() - b.double())) for a, b, c in pieces)


def _rows(tensor: Float[Tensor, "..."], dim: int) -> Float[Tensor, "n m"]:
    return tensor.movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]

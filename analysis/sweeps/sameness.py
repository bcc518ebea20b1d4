"""Check that two networks are the same function of their weights, even if their descriptions differ.

Two configurations may differ in ways that no evaluation sees: dropout, ids of special tokens, how weights were
initialised, a default that only one of them spells out. So the built networks are compared: both get the same weights,
and must give the same outputs to the last bit. The weights are those of either checkpoint, which may not exercise all
of a network (a head of zeros gives zeros through any activation), and random ones, small and large.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import AnalysisError
from ..networks.loading import LoadedNetwork, build_like, forget, parts_that_keep
from ..passes.extraction import forward
from ..passes.precision import arithmetic
from ..probes.inputs import Inputs

State = Mapping[str, Shaped[Tensor, "..."]]
Place = tuple[str, ...]

# Spreads of random weights, in units of the spread that preserves the size of activations: the larger one reveals
# clipping, caps and saturation.
_GAINS = (1.0, 6.0)
# The most members that are tried one by one.
_MOST_TRIED = 40


def require_same_function(
    first: LoadedNetwork,
    second: LoadedNetwork,
    descriptions: tuple[Mapping[str, Any], Mapping[str, Any]],
    batch: Inputs,
) -> None:
    """Check that two networks are the same function of their weights.

    Args:
        first: A; its weights are used and not changed.
        second: B, likewise, on the same device.
        descriptions: of A and B.
        batch: inputs as both take them.

    Raises:
        AnalysisError: `architectures-differ`; `differing` lists `{member, expected, found}` of the descriptions'
            members that make the difference, and of `head`.

    Numerics: float32, bit by bit, except for differences of a network from itself in a second pass. Cost, where
        descriptions differ: five passes of the batch each, another copy of A's parameters, and for networks that
        differ, one network without weights for each member in which the descriptions differ.
    """
    differing = []
    if first.head_name != second.head_name:
        differing.append({"member": "head", "expected": first.head_name, "found": second.head_name})
    ours, theirs = (_flat(description) for description in descriptions)
    if ours != theirs:
        # Raises for bad inputs, which must not be blamed on the descriptions.
        with torch.no_grad(), arithmetic(next(first.module.parameters()).device):
            forward(first.module, batch)
        if not _are_same(first.module, second.module, batch):
            differing += _causes(first.module, descriptions, ours, theirs, batch)
    if differing:
        words = [f"{one['member']} is {one['found']!r} where A has {one['expected']!r}" for one in differing[:5]]
        raise AnalysisError(
            "architectures-differ",
            f"The two checkpoints are of different networks, so a path between them has no meaning: "
            f"{'; '.join(words)}. There are {len(differing)} differences in all.",
            differing=differing[:20],
        )


def _flat(value: Mapping[str, Any], place: Place = ()) -> dict[Place, Any]:
    """Return the members of nested objects by their place; the names of classes count as one member."""
    found: dict[Place, Any] = {}
    for key, member in value.items():
        if isinstance(member, Mapping) and key != "id2label":
            found |= _flat(member, (*place, key))
        else:
            found[(*place, key)] = member
    return found


def _causes(
    module: nn.Module,
    descriptions: tuple[Mapping[str, Any], Mapping[str, Any]],
    ours: Mapping[Place, Any],
    theirs: Mapping[Place, Any],
    batch: Inputs,
) -> list[dict[str, Any]]:
    """Return the members that by themselves change A's function or make it fail to build; else all that differ."""
    places = [place for place in sorted({**ours, **theirs}) if ours.get(place) != theirs.get(place)]
    causes = []
    for place in places[:_MOST_TRIED]:
        other = build_like(_with_member(descriptions[0], descriptions[1], place), module)
        if other is None or not _are_same(module, other, batch):
            causes.append(place)
    return [
        {"member": ".".join(("architecture", *place)), "expected": _told(ours, place), "found": _told(theirs, place)}
        for place in causes or places
    ]


def _told(members: Mapping[Place, Any], place: Place) -> Any:
    value = members.get(place)
    return f"{len(value)} classes" if isinstance(value, Mapping) else value


def _with_member(ours: Mapping[str, Any], theirs: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return a description with one member taken from the other, or removed where the other lacks it."""
    name, *rest = place
    changed = dict(ours)
    if rest:
        inner = [part if isinstance(part, Mapping) else {} for part in (ours.get(name), theirs.get(name))]
        changed[name] = _with_member(inner[0], inner[1], tuple(rest))
    elif name in theirs:
        changed[name] = theirs[name]
    else:
        changed.pop(name, None)
    return changed


def _are_same(first: nn.Module, second: nn.Module, batch: Inputs) -> bool:
    """Return whether both have the same tensors, and give the same outputs with the same weights."""
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in (first, second)]
    tied = [[name for name, _ in module.named_parameters()] for module in (first, second)]
    if shapes[0] != shapes[1] or tied[0] != tied[1]:
        return False
    parts = [*parts_that_keep(first), *parts_that_keep(second)]
    try:
        return all(
            _answer_alike(first, second, state, batch, lambda: forget(parts)) for state in _states(first, second)
        )
    finally:
        forget(parts)


def _answer_alike(first: nn.Module, second: nn.Module, state: State, batch: Inputs, renew: Callable[[], None]) -> bool:
    """Return whether two networks give the same outputs with the same weights."""

    def answer(module: nn.Module) -> Tensor | None:
        """Return a network's output with these weights; None where it fails or gives no tensor."""
        renew()
        try:
            given = functional_call(module, dict(state), (batch,))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError, AnalysisError):
            return None
        return given if isinstance(given, Tensor) else None

    with torch.no_grad(), arithmetic(next(iter(state.values())).device):
        ours, theirs = answer(first), answer(second)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return ours is theirs
        # A GPU may add in another order each time.
        if (distance := _distance(ours, theirs)) == 0:
            return True
        again = answer(first)
        return again is not None and distance <= _distance(ours, again)


def _distance(ours: Shaped[Tensor, "..."], theirs: Shaped[Tensor, "..."]) -> float:
    """Return the largest difference; equal infinities, and NaN in both, count as equal."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return float((ours - theirs).abs().masked_fill(same, 0).nan_to_num(torch.inf).max()) if ours.numel() else 0.0


def _states(first: nn.Module, second: nn.Module) -> Iterator[State]:
    """Yield weights for both: those of either network, then random ones with the first network's buffers."""
    for module in (first, second):
        yield _own(module)
    own = _own(first)
    parameters = {name for name, _ in first.named_parameters()}
    for gain in _GAINS:
        generator = torch.Generator().manual_seed(0)
        yield {name: _random(t, gain, generator) if name in parameters else t for name, t in own.items()}


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors, each under one of its names."""
    stored = module.state_dict()
    return {
        **dict(module.named_parameters()),
        **{name: buffer for name, buffer in module.named_buffers() if name in stored},
    }


def _random(tensor: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """Return random weights that scale activations by the gain; for vectors, which scale or shift, values around 1."""
    if not tensor.is_floating_point():
        return tensor
    drawn = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim < 2:
        return (1 + 0.5 * gain * drawn).to(tensor)
    return (drawn * (gain / math.sqrt(max(tensor[0].numel(), 1)))).to(tensor)

"""The straight line between two checkpoints of one architecture: its points, its barriers, and the next point."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import AnalysisError
from ..networks.exported.network import GraphNorm, batch_bounds
from ..networks.loading import LoadedNetwork
from ..passes.precision import Precision, arithmetic
from ..probes.images import Images
from ..probes.inputs import Inputs, n_samples
from ..probes.probe import Probe

Normalisation = Literal["interpolate", "recalibrate"]
State = Mapping[str, Shaped[Tensor, "..."]]

# A path is linearly connected if its error rises by no more than this (Frankle et al. 2020).
CONNECTED = 0.02
# Parameters converted to float64 at a time: a measured tensor is never copied as a whole.
_CHUNK = 2**18
# Adaptive grid: the number of first points, the number without a look before it, the most further points, and the
# change of the barrier below which it stops.
_FIRST_POINTS, _FIRST_UNSEEN, _FURTHER_POINTS, _SETTLED = 17, 65, 36, 1e-3
# A neighbour of at least this share of a peak is on the same rise.
_SAME_RISE = 0.8
# The look before the grid: its number of points, and how often it halves the distances beside the peaks it finds.
LOOKS, _HALVINGS = 257, 4
# Rises to refine: the most of them, their least share of the highest, and the dip, as a share of the rise's own height,
# between it and the higher ones. Without the dip they count as ripples of one rise.
_MOST_PEAKS, _PEAK_SHARE, _DIP = 4, 0.5, 0.9


class Path:
    """theta(w) = (1 - w) theta_A + w theta_B, mixed in place into one network.

    Args:
        network: A; from here on the path moves it.
        other: tensors of B by name, as `state_dict` gives them, on the network's device.

    Raises:
        AnalysisError: `invalid-argument` where B has other names or shapes.

    Numerics: memory for three copies of the parameters: A, B and the mix. The mix is by torch.lerp, in the network's
        float32: a path from a network to itself is flat to the last bit, and at w = 0 and w = 1 every tensor is A's or
        B's own. Between them integer buffers are A's.

    Source: Frankle et al. 2020, "Linear mode connectivity and the lottery ticket hypothesis".
    """

    def __init__(self, network: LoadedNetwork, other: State) -> None:
        self.network = network
        self.mix = network.module.state_dict()
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (self.mix, other)]
        if shapes[0] != shapes[1]:
            differing = sorted(
                name for name in set(shapes[0]) | set(shapes[1]) if shapes[0].get(name) != shapes[1].get(name)
            )
            detail = f"The two ends differ in {len(differing)} names or shapes of tensors, first in {differing[0]!r}."
            raise AnalysisError("invalid-argument", detail, argument="other", differing=differing[:20])
        # A tensor with several names, such as tied embeddings, is mixed once.
        names: dict[int, str] = {}
        for name, tensor in network.module.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), name)
        self.mix = {name: self.mix[name] for name in names.values()}
        self.first = {name: tensor.clone() for name, tensor in self.mix.items()}
        self.second = {name: other[name] for name in names.values()}

    def move_to(self, w: float) -> LoadedNetwork:
        """Move the path's network to w, in place, and return it."""
        for name, target in self.mix.items():
            first, second = self.first[name], self.second[name]
            if w in (0.0, 1.0):
                target.copy_(second if w else first)
            elif target.is_floating_point():
                torch.lerp(first, second, w, out=target)
            else:
                target.copy_(first)
        self.network.weights_changed()
        return self.network

    def distances(self) -> tuple[float, float | None]:
        """Return Euclidean distance and cosine of the ends' parameters as vectors; the cosine is None for length 0."""
        dot = first = second = apart = 0.0
        for name, _ in self.network.module.named_parameters():
            pieces = (torch.split(end[name].flatten(), _CHUNK) for end in (self.first, self.second))
            for a, b in ((a.double(), b.double()) for a, b in zip(*pieces, strict=True)):
                dot += float(a @ b)
                first, second = first + float(a @ a), second + float(b @ b)
                apart += float((a - b).square().sum())
        length = (first * second) ** 0.5
        return apart**0.5, dot / length if length > 0 else None


def require_variances(network: LoadedNetwork, w: float) -> None:
    """Check that no mixed variance is below 0, as may happen beyond the ends: normalisation takes its root.

    Raises:
        AnalysisError: `invalid-argument` with the number of such variances, `n_negative`.
    """
    if 0 <= w <= 1:
        return
    variances = [b for name, b in network.module.named_buffers() if name.endswith("running_var")]
    negative = sum(int((variance < 0).sum()) for variance in variances)
    if negative:
        raise AnalysisError(
            "invalid-argument",
            f"Extrapolation makes {negative} of the network's running variances negative, so outputs are undefined. "
            "Use normalisation recalibrate, which recomputes them at each point, or points closer to the ends.",
            argument="extrapolate",
            n_negative=negative,
        )


def recalibrate(
    network: LoadedNetwork, probe: Probe, *, device: torch.device, batch_size: int, precision: Precision = "float32"
) -> int:
    """Recompute the running statistics of batch normalisation, by one pass over the probe's inputs.

    Args:
        network: changed in place; all but its normalisation layers stays in evaluation mode.
        probe: its inputs are passed, in a fixed random order.
        device: the network's device.
        batch_size: inputs at a time; 1 is raised to 2, as a single sample has no variance.
        precision: of the following evaluation, so that the statistics match its activations.

    Returns:
        The number of layers with running statistics; if it is 0, nothing is passed.

    Raises:
        AnalysisError: `invalid-probe` where the probe has a single sample.

    Numerics: every sample weighs the same: a batch of b samples enters with b over those seen so far. Variances are
        the batches' own, so smaller batches say less; a last batch of a single sample has none and is left out, as is
        one that is too small for an exported network. Statistics are float32, also those of activations in bfloat16.

    Source: Jordan et al. 2022, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair".
    """
    layers = [module for module in network.module.modules() if isinstance(module, _BatchNorm | GraphNorm)]
    layers = [layer for layer in layers if isinstance(layer, GraphNorm) or layer.track_running_stats]
    if not layers:
        return 0
    if len(probe.labels) < 2:
        raise AnalysisError("invalid-probe", "Recalibration needs at least two samples; the probe has one.")
    # A single sample has no variance, and a graph may need more: one that is repeated would count as several.
    least, most = batch_bounds(network.module)
    least = max(least, 2)
    momenta = [layer.momentum for layer in layers]
    seen = dict.fromkeys(layers, 0)
    n = 0

    def weigh(layer: _BatchNorm | GraphNorm, _: object) -> None:
        """Set the share of this batch among all samples that the layer has seen."""
        # Counted by layer: a layer that runs twice on a batch has seen it twice.
        seen[layer] += n
        layer.momentum = n / seen[layer]

    handles = [layer.register_forward_pre_hook(weigh) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        with torch.no_grad(), arithmetic(device, precision):
            for batch in _mixed(probe, max(min(batch_size, most or batch_size), least), device):
                if n == 0 or n_samples(batch) >= least:
                    n = n_samples(batch)
                    network.module(batch)
    finally:
        for layer, momentum, handle in zip(layers, momenta, handles, strict=True):
            handle.remove()
            layer.momentum = momentum
            layer.eval()
    return len(layers)


@dataclass(frozen=True)
class Barrier:
    """The largest excess of a value on the path over its reference, and its w."""

    value: float
    at: float


def barrier(ws: Sequence[float], values: Sequence[float], *, falls: bool = False) -> Barrier:
    """Return max_w [ L(w) - ((1 - w) L(0) + w L(1)) ], at least 0.

    Args:
        ws: points of the values, including 0 and 1; points beyond the ends do not count.
        values: L, finite.
        falls: return the largest fall under the chord instead of the largest rise over it.

    Returns:
        The barrier; if the path never leaves the chord on that side, 0 at 0.

    Source: Entezari et al. 2021, equation 2.

    >>> barrier([0.0, 0.5, 1.0], [1.0, 4.0, 2.0])
    Barrier(value=2.5, at=0.5)
    """
    first, last = _ends(ws, values)
    sign = -1.0 if falls else 1.0
    rises = ((sign * (value - ((1 - w) * first + w * last)), w) for w, value in _inside(ws, values))
    # At the ends the chord equals the value up to rounding.
    return max((Barrier(rise, w) for rise, w in rises if 0 < w < 1 and rise > 0), key=_value, default=Barrier(0.0, 0.0))


def instability(ws: Sequence[float], values: Sequence[float]) -> Barrier:
    """Return max_w E(w) - (E(0) + E(1)) / 2; with E the error, a path is connected where it is at most 0.02.

    Args:
        ws: as of `barrier`.
        values: E, finite.

    Returns:
        The instability, which is at least half of the ends' difference.

    Source: Frankle et al. 2020, section 2.

    >>> instability([0.0, 0.5, 1.0], [1.0, 4.0, 2.0])
    Barrier(value=2.5, at=0.5)
    """
    first, last = _ends(ws, values)
    return max((Barrier(value - (first + last) / 2, w) for w, value in _inside(ws, values)), key=_value)


def midpoint_barrier(ws: Sequence[float], values: Sequence[float]) -> float | None:
    """Return L(1/2) - (L(0) + L(1)) / 2, as in the code of Entezari et al. 2021; None without a point in the middle.

    >>> midpoint_barrier([0.0, 0.5, 1.0], [1.0, 4.0, 2.0])
    2.5
    """
    first, last = _ends(ws, values)
    middle = [value for w, value in zip(ws, values, strict=True) if w == 0.5]
    return middle[0] - (first + last) / 2 if middle else None


def even_grid(points: int) -> list[float]:
    """Return evenly spaced points from 0 to 1, at least 2."""
    return [index / (points - 1) for index in range(points)]


def next_look(seen: Mapping[float, float]) -> float | None:
    """Return the next point of a look along a path: 257 even points, then beside the peaks of the loss over its chord.

    A look needs only losses, so it can be dense. Beside each of up to four peaks it halves the distances four times,
    which locates a peak to 1/4096.

    Args:
        seen: loss by w, of the points so far.

    Returns:
        The next w, or None when the look is over. It depends on the values alone.
    """
    return _next(_look(), seen)


def next_point(
    grid: Sequence[float] | Literal["adaptive"],
    known: Mapping[float, float],
    seen: Mapping[float, float] | None = None,
) -> float | None:
    """Return the next point of a grid.

    An adaptive grid begins with 17 points and those that a look found: up to four peaks of the loss over its chord,
    each with a neighbour on both sides. Without a look it begins with 65 points. Then it halves the intervals beside
    the peaks, until the highest one is resolved and two successive rounds move it by less than 1e-3, or 36 points were
    added: at most 65 after a look. Its points depend only on the values, so an interrupted path continues as it would
    have.

    Args:
        grid: the points in order, or `adaptive`.
        known: loss by w, of the points taken so far.
        seen: loss by w, of a look along the path (`next_look`); only the places of its peaks count, not their heights.

    Returns:
        The next w, or None when the grid is complete.
    """
    if grid != "adaptive":
        return next((w for w in grid if w not in known), None)
    return _next(_refine(seen), known)


def peaks(losses: Mapping[float, float]) -> list[float]:
    """Return the highest rises of a loss over its chord: separate rises, at most four, the highest first.

    Args:
        losses: by w, including 0 and 1.

    Returns:
        The w of local maxima that are at least half as high as the highest, with a dip to nine tenths of their own
        height between each and the higher ones; empty if the loss nowhere rises over the chord.

    >>> peaks({0.0: 0.0, 0.25: 3.0, 0.5: 0.0, 0.75: 2.0, 0.9: 1.0, 1.0: 0.0})
    [0.25, 0.75]
    """
    ws = sorted(losses)
    if len(ws) < 3:
        return []
    first, last = losses[0.0], losses[1.0]
    rises = [losses[w] - ((1 - w) * first + w * last) for w in ws]
    inner = [i for i in range(1, len(ws) - 1) if rises[i - 1] <= rises[i] >= rises[i + 1] and rises[i] > 0]
    chosen: list[int] = []
    for i in sorted(inner, key=lambda i: -rises[i]):
        if rises[i] < _PEAK_SHARE * rises[(chosen or [i])[0]] or len(chosen) == _MOST_PEAKS:
            break
        if all(min(rises[min(i, other) : max(i, other) + 1]) < _DIP * rises[i] for other in chosen):
            chosen.append(i)
    return [ws[i] for i in chosen]


def _mixed(probe: Probe, batch_size: int, device: torch.device) -> Iterator[Inputs]:
    """Yield the probe's batches in a fixed random order: files often hold samples class by class, and the variance
    within batches of one class lacks that between classes. Images that are too large to be kept decoded come in the
    order of their files, which are read from beginning to end."""
    if isinstance(probe.inputs, Images):
        yield from probe.batches(batch_size, device=device)
        return
    order = torch.randperm(len(probe.labels), generator=torch.Generator().manual_seed(0)).to(probe.labels.device)
    for rows in torch.split(order, batch_size):
        yield from probe.take(rows).batches(batch_size, device=device)


def _next(asked: Generator[float, float, None], known: Mapping[float, float]) -> float | None:
    """Return the first requested w that is not known; None when no more are requested."""
    try:
        w = next(asked)
        while w in known:
            w = asked.send(known[w])
    except StopIteration:
        return None
    return w


def _look() -> Generator[float, float, None]:
    losses: dict[float, float] = {}
    for w in even_grid(LOOKS):
        losses[w] = yield w
    for _ in range(_HALVINGS):
        for w in _beside(losses, peaks(losses)):
            losses[w] = yield w


def _refine(seen: Mapping[float, float] | None) -> Generator[float, float, None]:
    losses: dict[float, float] = {}
    step = 1 / (LOOKS - 1)
    found = [w for peak in peaks(seen or {}) for w in (peak, peak - step, peak + step) if 0 < w < 1]
    first = even_grid(_FIRST_UNSEEN if seen is None else _FIRST_POINTS)
    for w in dict.fromkeys([*first, *found]):
        losses[w] = yield w
    still, height, most = 0, _height(losses), len(losses) + _FURTHER_POINTS
    while (still < 2 or not _is_resolved(losses)) and len(losses) < most:
        for w in _beside(losses, peaks(losses) or [0.0])[: most - len(losses)]:
            losses[w] = yield w
        still = still + 1 if abs(_height(losses) - height) < _SETTLED else 0
        height = _height(losses)


def _is_resolved(losses: Mapping[float, float]) -> bool:
    """Return whether the highest point is resolved: its neighbours are on the same rise, and a parabola through all
    three exceeds it by little. Points beyond a narrow rise add nothing, which does not mean that it is settled."""
    ws = sorted(losses)
    place = ws.index(barrier(ws, [losses[w] for w in ws]).at)
    if place == 0:
        return True
    near = ws[place - 1 : place + 2]
    low, top, high = (losses[w] - ((1 - w) * losses[0.0] + w * losses[1.0]) for w in near)
    left, right = near[1] - near[0], near[2] - near[1]
    up, down = (top - low) / left, (top - high) / right
    slope, bend = (up * right - down * left) / (left + right), (up + down) / (left + right)
    return min(low, high) >= _SAME_RISE * top and slope**2 <= 4 * bend * _SETTLED


def _beside(losses: Mapping[float, float], places: Sequence[float]) -> list[float]:
    """Return the middles of the intervals on both sides of these places, in order."""
    return [(low + high) / 2 for low, high in pairwise(sorted(losses)) if low in places or high in places]


def _height(losses: Mapping[float, float]) -> float:
    return barrier(list(losses), list(losses.values())).value


def _value(found: Barrier) -> float:
    return found.value


def _inside(ws: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    return [(w, value) for w, value in zip(ws, values, strict=True) if 0 <= w <= 1]


def _ends(ws: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    by_w = dict(zip(ws, values, strict=True))
    if 0.0 not in by_w or 1.0 not in by_w:
        raise AnalysisError("invalid-argument", "A barrier needs the values at 0 and at 1.", argument="ws")
    return by_w[0.0], by_w[1.0]

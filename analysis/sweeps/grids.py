"""The numbers of a path: barriers of values along it, and the places at which it is evaluated.

Nothing here needs torch, so that a process which plans a path does not load it.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import AnalysisError

# A path is linearly connected if its error rises by no more than this (Frankle et al. 2020).
CONNECTED = 0.02
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
    return next(iter(_unknown(_look(), seen)), None)


def next_points(known: Mapping[float, float], seen: Mapping[float, float] | None = None) -> list[float]:
    """Return the next points of an adaptive grid, which need nothing of each other.

    It begins with 17 points and those that a look found: up to four peaks of the loss over its chord,
    each with a neighbour on both sides. Without a look it begins with 65 points. Then it goes in rounds, each of which
    halves the intervals beside the peaks, until the highest one is resolved and two successive rounds move it by less
    than 1e-3, or 36 points were added: at most 65 after a look. A round depends only on the values, in whatever order
    they came, so an interrupted path continues as it would have.

    Args:
        known: loss by w, of the points taken so far.
        seen: loss by w, of a look along the path (`next_look`); only the places of its peaks count, not their heights.

    Returns:
        The points of the round that are not known yet; none when the grid is complete.
    """
    return _unknown(_refine(seen), known)


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


_Rounds = Generator[list[float], Mapping[float, float], None]


def _unknown(rounds: _Rounds, known: Mapping[float, float]) -> list[float]:
    """Return the unknown points of the first round that has any; none if no more rounds are asked for."""
    try:
        ws = next(rounds)
        while all(w in known for w in ws):
            ws = rounds.send(known)
    except StopIteration:
        return []
    return [w for w in ws if w not in known]


def _look() -> _Rounds:
    losses: dict[float, float] = {}
    ws = even_grid(LOOKS)
    for _ in range(1 + _HALVINGS):
        known = yield ws
        losses |= {w: known[w] for w in ws}
        ws = _beside(losses, peaks(losses))


def _refine(seen: Mapping[float, float] | None) -> _Rounds:
    step = 1 / (LOOKS - 1)
    found = [w for peak in peaks(seen or {}) for w in (peak, peak - step, peak + step) if 0 < w < 1]
    first = list(dict.fromkeys([*even_grid(_FIRST_UNSEEN if seen is None else _FIRST_POINTS), *found]))
    known = yield first
    losses = {w: known[w] for w in first}
    still, height, most = 0, _height(losses), len(losses) + _FURTHER_POINTS
    while (still < 2 or not _is_resolved(losses)) and len(losses) < most:
        ws = _beside(losses, peaks(losses) or [0.0])[: most - len(losses)]
        known = yield ws
        losses |= {w: known[w] for w in ws}
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

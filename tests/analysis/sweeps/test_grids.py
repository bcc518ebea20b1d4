"""The numbers of a path: its barriers, and the places of an adaptive grid."""

import doctest
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.errors import AnalysisError
from analysis.sweeps import grids
from analysis.sweeps.grids import (
    Barrier,
    barrier,
    even_grid,
    instability,
    midpoint_barrier,
    next_look,
    next_points,
)


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(grids).failed == 0


@given(
    values=st.lists(st.floats(-10, 10), min_size=3, max_size=12),
    slope=st.floats(-5, 5),
)
def test_a_barrier_does_not_see_a_slope(values: list[float], slope: float) -> None:
    """Adding a line changes no barrier; from above and from below they mirror each other."""
    ws = even_grid(len(values))
    tilted = [value + slope * w for w, value in zip(ws, values, strict=True)]
    assert barrier(ws, tilted).value == pytest.approx(barrier(ws, values).value, abs=1e-9)
    mirrored = [-value for value in values]
    assert barrier(ws, mirrored, falls=True) == barrier(ws, values)
    assert barrier(ws, values).value >= 0
    assert instability(ws, values).value >= abs(values[0] - values[-1]) / 2 - 1e-12


def test_points_beyond_the_ends_do_not_count() -> None:
    """An extrapolated path has the barrier of its inner part."""
    ws, values = [-0.5, 0.0, 0.5, 1.0, 1.5], [9.0, 1.0, 2.0, 1.0, 9.0]
    assert barrier(ws, values) == Barrier(1.0, 0.5)
    assert instability(ws, values) == Barrier(1.0, 0.5)
    assert midpoint_barrier(ws, values) == 1.0
    assert midpoint_barrier([0.0, 0.4, 1.0], [1.0, 2.0, 1.0]) is None
    with pytest.raises(AnalysisError, match="at 0 and at 1"):
        barrier([0.0, 0.5], [1.0, 2.0])


Known = dict[float, float]


def _followed(loss: Callable[[float], float]) -> Known:
    known: Known = {}
    while ws := next_points(known):
        assert not set(ws) & set(known)
        assert len(set(ws)) == len(ws)
        # In another order than they were asked for, as several workers answer.
        known |= {w: loss(w) for w in reversed(ws)}
    return known


def _looked_and_followed(loss: Callable[[float], float], on_part: Callable[[float], float] | None = None) -> Known:
    """Return the points of an adaptive grid after a look, which may use a part of the samples."""
    seen: Known = {}
    while (w := next_look(seen)) is not None:
        assert w not in seen
        seen[w] = (on_part or loss)(w)
    assert len(seen) <= 290
    known: Known = {}
    while ws := next_points(known, seen):
        assert not set(ws) & set(known)
        known |= {w: loss(w) for w in ws}
    assert len(known) <= 65
    return known


def _bumps(*bumps: tuple[float, float, float], slope: float = 0.5) -> Callable[[float], float]:
    """Return a line with bumps of given height, place and width."""
    return lambda w: (
        1 + slope * w + sum(height * math.exp(-(((w - at) / width) ** 2) / 2) for height, at, width in bumps)
    )


def _dense(loss: Callable[[float], float]) -> float:
    ws = even_grid(20_001)
    return barrier(ws, [loss(w) for w in ws]).value


BUMPS: dict[str, Callable[[float], float]] = {
    "near the end": _bumps((0.9, 0.97, 0.02)),
    "near the start": _bumps((2.0, 0.013, 0.005)),
    "narrow": _bumps((1.0, 0.5473, 0.003)),
    "narrower than the look, and seen": _bumps((1.0, 0.2002, 0.001)),
    "two": _bumps((1.0, 0.25, 0.1), (1.2, 0.785, 0.01)),
    "two that touch": _bumps((1.0, 0.45, 0.05), (1.1, 0.55, 0.008)),
    "one of many": _bumps(*((0.6 + 0.1 * i, 0.1 + 0.2 * i, 0.01) for i in range(5))),
    "broad with ripples": lambda w: 4 * w * (1 - w) + 0.002 * math.sin(900 * w),
    "beside a fall": _bumps((-3.0, 0.5, 0.1), (0.4, 0.9, 0.01)),
}


@pytest.mark.parametrize("name", BUMPS)
def test_an_adaptive_grid_finds_what_a_look_shows(name: str) -> None:
    """The barrier is that of 20,001 points to 2e-3, anywhere on the path, with at most 65 points."""
    loss = BUMPS[name]
    found = _looked_and_followed(loss)
    assert barrier(list(found), list(found.values())).value == pytest.approx(_dense(loss), abs=2e-3)


@pytest.mark.parametrize("name", BUMPS)
def test_a_look_at_some_of_the_samples_says_where(name: str) -> None:
    """Heights and places on a part of the samples differ a little, as do level and slope."""

    def on_part(w: float) -> float:
        return 0.3 + 0.8 * BUMPS[name](w + 0.001 * (1 - w) * w) - 0.2 * w

    found = _looked_and_followed(BUMPS[name], on_part)
    assert barrier(list(found), list(found.values())).value == pytest.approx(_dense(BUMPS[name]), rel=0.02)


def test_without_a_look_an_adaptive_grid_begins_more_densely() -> None:
    """A bump of width 1/50 is found from 65 points, anywhere on the path; of two the higher one."""
    for at in (0.03, 0.5473, 0.97, 0.9922):
        found = _followed(loss := _bumps((0.9, at, 0.02)))
        assert barrier(list(found), list(found.values())).value == pytest.approx(_dense(loss), abs=2e-3)
        assert len(found) <= 101
    found = _followed(loss := _bumps((1.0, 0.25, 0.1), (1.2, 0.7827, 0.02)))
    assert barrier(list(found), list(found.values())).value == pytest.approx(_dense(loss), abs=2e-3)


def test_an_adaptive_grid_stops_where_there_is_nothing_to_find() -> None:
    """A straight line takes the first points and two rounds; an endless barrier takes 36 points more."""
    assert 17 < len(_looked_and_followed(lambda w: 2 - w)) <= 21
    assert 65 < len(_followed(lambda w: 2 - w)) <= 69
    assert len(_followed(lambda w: 0.0 if w in (0, 1) else 1e9 - abs(w - 1 / 3) * 1e9)) <= 101


def test_an_adaptive_grid_goes_on_as_it_would_have() -> None:
    """The next points depend only on the values, in any order: part of a round asks for the rest of it."""

    def loss(w: float) -> float:
        return -((w - 0.3) ** 2)

    known: Known = {}
    while ws := next_points(known):
        for count in {0, 1, len(ws) // 2, len(ws) - 1}:
            part = known | {w: loss(w) for w in reversed(ws[:count])}
            assert next_points(dict(reversed(part.items()))) == ws[count:]
        known |= {w: loss(w) for w in ws}
    assert len(known) > 66


def test_rounds_are_as_many_as_they_need_to_be() -> None:
    """An adaptive path of some 30 points takes at most nine rounds."""
    known: Known = {}
    rounds = 0
    while ws := next_points(known, {w: 1 + 4 * w * (1 - w) for w in even_grid(257)}):
        known, rounds = known | {w: BUMPS["two"](w) for w in ws}, rounds + 1
    assert rounds <= 9

"""Kill workers while they compute, and at each boundary of their work."""

import random
from collections.abc import Iterator

from tests.reliability.fleet import WORKERS, Fleet, Place, kill, scaled

_LIBRARY = "dbos._sys_db SystemDatabase."
# Where a worker is killed: function, moments.
_PLACES = {
    "a run is claimed": (f"{_LIBRARY}start_queued_workflows", ("before", "commit", "after")),
    "the record of a step": (f"{_LIBRARY}record_operation_result", ("before", "commit", "after")),
    "the record of a run's end": (f"{_LIBRARY}update_workflow_outcome", ("before", "commit", "after")),
    "an attempt begins": ("workers.attempts begin", ("commit", "after")),
    "an attempt's report": ("workers.attempts finish", ("before", "commit", "after")),
    "a turn begins": ("workers.turns begin", ("commit", "after")),
    "a point is claimed": ("workers.turns claim", ("commit", "after")),
    "a point is finished": ("workers.turns finish", ("before", "commit", "after")),
    "a turn ends": ("workers.turns end", ("before", "commit", "after")),
    "turns are queued": ("app.queue enqueue_turns", ("before", "after")),
    "a plan heals": ("workers.turns heal", ("before", "commit", "after")),
    "work is taken over": ("workers.liveness Presence._take_over", ("before", "commit", "after")),
}
_COMPUTING = Place("computing", "workers.child ComputeChild.run", "during")
_BOUNDARIES = [Place(name, function, moment) for name, (function, moments) in _PLACES.items() for moment in moments]
# One of so many kills takes all workers.
_ALL_AT_ONCE = 25
# A place that is not reached so soon is given up, and the worker killed where it is.
_REACHED_SECONDS = 10.0


def kill_workers(fleet: Fleet) -> None:
    """Kill -9 workers while they compute and at each boundary, now and then all three at once; check what must hold."""
    places = _places(fleet.random)
    fleet.places = lambda: next(places)
    for life in fleet.lives:
        kill(life)
    kills = 0
    while kills < scaled(500):
        assert fleet.go_on(lambda: len(fleet.ready) == WORKERS and fleet.is_busy)
        kills += _kill_all(fleet) if fleet.random.random() < 1 / _ALL_AT_ONCE else _kill_one(fleet)
    fleet.finish()
    # A kill repeats the one point that its worker was computing, or none.
    assert fleet.figures.repeated <= kills


def _places(drawn: random.Random) -> Iterator[Place | None]:
    """Draw where workers will be killed: of five two while they compute, two at boundaries, one at any moment."""
    while True:
        for place in drawn.sample(_BOUNDARIES, k=len(_BOUNDARIES)):
            yield from drawn.sample([place, _COMPUTING, drawn.choice([_COMPUTING, _COMPUTING, None])], k=3)


def _kill_one(fleet: Fleet) -> int:
    """Kill a worker where it is meant to be killed; return the number of kills."""
    life, other, *_ = fleet.random.sample(fleet.ready, k=WORKERS)
    what, kills = "at any moment", 1
    if life.place is None:
        fleet.pause(fleet.random.uniform(0, 1))
    else:
        life.armed.touch()
        if life.place.name == "work is taken over":
            kill(other)
            fleet.figures.disturbances[what] += 1
            kills += 1
        if fleet.has_ended(life, seconds=_REACHED_SECONDS):
            what = f"{life.place.name}, {life.place.moment}"
    kill(life)
    fleet.figures.disturbances[what] += 1
    return kills


def _kill_all(fleet: Fleet) -> int:
    lives = list(fleet.lives)
    for life in lives:
        kill(life)
    fleet.figures.disturbances["all at once"] += len(lives)
    return len(lives)

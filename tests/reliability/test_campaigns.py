"""Workers that are killed, stopped and cut off while they work: nothing is lost, and nothing is done twice.

A seeded tenth of each campaign runs here; `make campaign` runs the whole (docs/reliability.md has what was seen).
"""

import json
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.database import read
from app.models import Worker
from tests import services
from tests.databases import fresh_database, postgres_server
from tests.reliability.doors import Door, door_to, record_writes, written_by
from tests.reliability.fleet import BOUNDARIES, WORKERS, Fleet, Life, Place, fleet_of, stopped

# 1 for the whole campaign.
_SCALE = float(os.environ.get("CAMPAIGN_SCALE", "0.1"))
_SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
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
# Longer than a worker may hang before others have its work; and how it ends when it notices.
_HUNG_SECONDS = 66.0
_TAKEN_OVER = 3


def _count(whole: int) -> int:
    return max(round(whole * _SCALE), 1)


@contextmanager
def _fleet(data_dir: Path, url: str, **settings: str) -> Iterator[Fleet]:
    """Run a service with three workers on a database."""
    with (
        services.running(
            data_dir,
            command="api",
            site=BOUNDARIES,
            database_url=url,
            queue_polling_seconds="0.1",
            max_attempts="1000",
        ) as service,
        fleet_of(service, _SEED, **settings) as fleet,
    ):
        yield fleet


def _told(fleet: Fleet, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Print what a campaign has seen, and add it to the file that CAMPAIGN_OUTPUT names."""
    line = json.dumps({"campaign": name, "scale": _SCALE, "seed": _SEED, **fleet.figures.summary()})
    with capsys.disabled():
        print(f"\n{line}")
    if output := os.environ.get("CAMPAIGN_OUTPUT"):
        with Path(output).open("a") as file:
            file.write(line + "\n")


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_killed_workers(
    database: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers are killed -9 while they compute and at each boundary, now and then all three at once."""
    with ExitStack() as stack:
        url = ""
        if database == "postgresql":
            url = stack.enter_context(fresh_database(request.getfixturevalue("postgres")))
        fleet = stack.enter_context(_fleet(tmp_path / "data", url))
        places = _places(fleet.random)
        fleet.places = lambda: next(places)
        for life in fleet.lives:
            _kill(life)
        kills = 0
        while kills < _count(500):
            assert fleet.go_on(lambda: len(fleet.ready) == WORKERS)
            kills += _kill_all(fleet) if fleet.random.random() < 1 / _ALL_AT_ONCE else _kill_one(fleet)
        fleet.finish()
        _told(fleet, f"kills, {database}", capsys)
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
            _kill(other)
            fleet.figures.disturbances[what] += 1
            kills += 1
        if fleet.has_ended(life, seconds=_REACHED_SECONDS):
            what = f"{life.place.name}, {life.place.moment}"
    _kill(life)
    fleet.figures.disturbances[what] += 1
    return kills


def _kill_all(fleet: Fleet) -> int:
    lives = list(fleet.lives)
    for life in lives:
        _kill(life)
    fleet.figures.disturbances["all at once"] += len(lives)
    return len(lives)


def _kill(life: Life) -> None:
    life.process.kill()
    life.process.wait()


@pytest.mark.timeout(3600)
def test_restarted_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PostgreSQL is ended at once, as by a crash, and started again: no worker dies, and no point is repeated."""
    with (
        postgres_server() as server,
        fresh_database(server.url) as url,
        _fleet(tmp_path / "data", url) as fleet,
    ):
        assert fleet.go_on(lambda: len(fleet.ready) == WORKERS)
        for _ in range(_count(200)):
            fleet.pause(fleet.random.uniform(0, 2))
            server.restart()
            fleet.figures.disturbances["immediate restart"] += 1
        fleet.finish()
        _told(fleet, "restarts of PostgreSQL", capsys)
        assert fleet.n_born == WORKERS
        assert fleet.figures.repeated == 0


@pytest.mark.timeout(3600)
def test_stopped_workers(postgres: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Workers are stopped (SIGSTOP) for some seconds, in which they keep their work, and for more than a minute.

    After a minute others have their work; they notice when they go on, and end.
    """
    with fresh_database(postgres) as url, _fleet(tmp_path / "data", url) as fleet:
        count = _count(50)
        long_ones = max(count // 10, 1)
        for number in range(count):
            assert fleet.go_on(lambda: len(fleet.ready) == WORKERS)
            fleet.pause(fleet.random.uniform(0, 1))
            life = fleet.random.choice(fleet.ready)
            is_long = number < long_ones
            seconds = _HUNG_SECONDS if is_long else fleet.random.uniform(0.2, 8.0)
            with stopped(life):
                fleet.pause(seconds)
            if is_long:
                assert fleet.has_ended(life, seconds=60), "it must end by itself"
                assert life.process.returncode == _TAKEN_OVER
            fleet.figures.disturbances[f"stopped for {'over a minute' if is_long else 'up to 8 s'}"] += 1
        fleet.finish()
        _told(fleet, "SIGSTOP, PostgreSQL", capsys)
        assert fleet.n_born == WORKERS + long_ones
        assert fleet.figures.repeated <= long_ones


@pytest.mark.timeout(900)
def test_workers_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two workers lose the database for over a minute, one by silence and one by refusals: neither writes afterwards.

    The database records who writes. What such a worker computed goes nowhere, and it ends once it knows.
    """
    with ExitStack() as stack:
        server = stack.enter_context(postgres_server())
        url = stack.enter_context(fresh_database(server.url))
        fleet = stack.enter_context(_fleet(tmp_path / "data", url))
        record_writes(url)
        doors = {name: stack.enter_context(door_to(url, name)) for name in ("silent", "refused")}
        lives = {name: _behind(fleet, door) for name, door in doors.items()}
        assert fleet.go_on(lambda: len(fleet.ready) == WORKERS)
        fleet.pause(2)
        for name, door in doors.items():
            door.shut(refusing=name == "refused")
            fleet.figures.disturbances[f"cut off for {_HUNG_SECONDS:.0f} s, {name}"] += 1
        fleet.pause(_HUNG_SECONDS)
        for door in doors.values():
            door.open()
        for name, life in lives.items():
            assert fleet.has_ended(life, seconds=60), f"{name} must end"
            assert life.process.returncode == _TAKEN_OVER
        fleet.finish()
        _told(fleet, "cut off, PostgreSQL", capsys)
        for name, life in lives.items():
            with read(fleet.engine) as session:
                ended_at = session.scalar(sa.select(Worker.ended_at).where(Worker.id == life.worker_id))
            assert ended_at is not None
            assert written_by(url, name, datetime.min.replace(tzinfo=UTC)), "its writes must be recorded at all"
            assert not written_by(url, name, ended_at)
        assert fleet.figures.repeated <= len(doors)


def _behind(fleet: Fleet, door: Door) -> Life:
    """Start a worker in the place of another, which reaches the database through a door."""
    fleet.special.append({"INTERPLAY_DATABASE_URL": door.url})
    _kill(next(life for life in fleet.lives if not life.is_special))
    fleet.keep_alive()
    assert fleet.lives[-1].is_special
    return fleet.lives[-1]

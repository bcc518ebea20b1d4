"""Workers that are killed, stand still or are cut off, and a database that restarts: nothing is lost or done twice.

A seeded part of each campaign runs here; `make campaign` runs the whole (docs/reliability.md has what was seen). All
are in one file, so that two of them never run at a time.
"""

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.database import read
from app.models import Worker
from tests.databases import fresh_database, postgres_server
from tests.reliability.doors import Door, door_to, record_writes, written_by
from tests.reliability.fleet import WORKERS, Fleet, Life, campaign, kill, scaled, stopped
from tests.reliability.kills import kill_workers

# Longer than a worker may hang before others have its work; and how it ends when it notices.
_HUNG_SECONDS = 66.0
_TAKEN_OVER = 3


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_killed_workers(
    database: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers are killed -9: every analysis ends with its one report, as without a kill."""
    with ExitStack() as stack:
        url = ""
        if database == "postgresql":
            url = stack.enter_context(fresh_database(request.getfixturevalue("postgres")))
        kill_workers(stack.enter_context(campaign(tmp_path / "data", url, f"kills, {database}", capsys)))


@pytest.mark.timeout(3600)
def test_restarted_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PostgreSQL is ended at once, as by a crash, and started again: no worker dies, and no point is repeated."""
    with (
        postgres_server() as server,
        fresh_database(server.url) as url,
        campaign(tmp_path / "data", url, "restarts of PostgreSQL", capsys) as fleet,
    ):
        assert fleet.go_on(lambda: len(fleet.ready) == WORKERS)
        for _ in range(scaled(200)):
            fleet.pause(fleet.random.uniform(0, 2))
            server.restart()
            fleet.figures.disturbances["immediate restart"] += 1
        fleet.finish()
        assert fleet.n_born == WORKERS
        assert fleet.figures.repeated == 0


@pytest.mark.timeout(3600)
def test_stopped_workers(postgres: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Workers are stopped (SIGSTOP) for some seconds, in which they keep their work, and for more than a minute.

    After a minute others have their work; they notice when they go on, and end.
    """
    with fresh_database(postgres) as url, campaign(tmp_path / "data", url, "SIGSTOP, PostgreSQL", capsys) as fleet:
        count = scaled(50)
        long_ones = max(count // 10, 1)
        for number in range(count):
            assert fleet.go_on(lambda: len(fleet.ready) == WORKERS)
            fleet.pause(fleet.random.uniform(0, 1))
            life = fleet.random.choice(fleet.ready)
            is_long = number < long_ones
            seconds = _HUNG_SECONDS if is_long else fleet.random.uniform(0.2, 8.0)
            with stopped(life):
                fleet.rest(seconds) if is_long else fleet.pause(seconds)
            if is_long:
                assert fleet.has_ended(life, seconds=60), "it must end by itself"
                fleet.keep_alive()
                assert life.process.returncode == _TAKEN_OVER
            fleet.figures.disturbances[f"stopped for {'over a minute' if is_long else 'up to 8 s'}"] += 1
        fleet.finish()
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
        fleet = stack.enter_context(campaign(tmp_path / "data", url, "cut off, PostgreSQL", capsys))
        record_writes(url)
        doors = {name: stack.enter_context(door_to(url, name)) for name in ("silent", "refused")}
        lives = {name: _behind(fleet, door) for name, door in doors.items()}
        assert fleet.go_on(lambda: len(fleet.ready) == WORKERS)
        fleet.pause(2)
        for name, door in doors.items():
            door.shut(refusing=name == "refused")
            fleet.figures.disturbances[f"cut off for {_HUNG_SECONDS:.0f} s, {name}"] += 1
        fleet.rest(_HUNG_SECONDS)
        for door in doors.values():
            door.open()
        for name, life in lives.items():
            assert fleet.has_ended(life, seconds=60), f"{name} must end"
            assert life.process.returncode == _TAKEN_OVER
        fleet.finish()
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
    kill(next(life for life in fleet.lives if not life.is_special))
    fleet.keep_alive()
    assert fleet.lives[-1].is_special
    return fleet.lives[-1]

"""Workers on PostgreSQL that are killed while they work: nothing is lost, and nothing is done twice.

A seeded part of the campaign runs here; `make campaign` runs the whole (docs/reliability.md has what was seen).
"""

from pathlib import Path

import pytest

from tests.databases import fresh_database
from tests.reliability.fleet import campaign
from tests.reliability.kills import kill_workers


@pytest.mark.timeout(4 * 3600)
def test_killed_workers(postgres: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every analysis ends with its one report, as without a kill."""
    with fresh_database(postgres) as url, campaign(tmp_path / "data", url, "kills, PostgreSQL", capsys) as fleet:
        kill_workers(fleet)

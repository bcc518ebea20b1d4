"""Workers on SQLite that are killed while they work: nothing is lost, and nothing is done twice.

A seeded part of the campaign runs here; `make campaign` runs the whole (docs/reliability.md has what was seen).
"""

from pathlib import Path

import pytest

from tests.reliability.fleet import campaign
from tests.reliability.kills import kill_workers


@pytest.mark.timeout(4 * 3600)
def test_killed_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every analysis ends with its one report, as without a kill."""
    with campaign(tmp_path / "data", "", "kills, SQLite", capsys) as fleet:
        kill_workers(fleet)

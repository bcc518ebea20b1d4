"""Damaged graphs: a small part of the campaign of `tests.fuzz.graphs`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import graphs

ROOT = Path(__file__).parents[4]


def test_damaged_graphs_are_refused_or_run(tmp_path: Path) -> None:
    """In a process of its own, which ends if a graph starts a program, connects or writes a file."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.graphs", "--count", "200", "--seed", "5"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("200 damaged graphs")
    for outcome in ("'refused'", "'run'", "'refused by the API'", "'read by the API'"):
        assert outcome in ran.stdout


def test_the_campaign_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports an error that is no refusal, with the seed that reproduces it."""

    def fail(_: object) -> str:
        raise KeyError("a fault")

    kinds = graphs.originals()
    whole = json.loads(kinds["indexing"].graph)
    monkeypatch.setattr(graphs, "enter_worker", lambda graph, *_: "run" if graph == whole else fail(graph))
    found = graphs.campaign({"indexing": kinds["indexing"]}, range(20), float("inf"))
    [fault] = found.faults.values()
    assert "KeyError: 'a fault'" in fault
    assert found.outcomes["fault"] > 0

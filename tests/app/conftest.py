"""Fixtures of the tests of the service."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import migrations
from app.database import make_engine
from app.settings import Settings
from tests.app.test_points import FEW
from tests.services import Service


@pytest.fixture(scope="module")
def reports(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> dict[str, dict[str, Any]]:
    """A report of every kind."""
    ids = [
        service.post("/v1/checkpoints", {"name": name}, mlp_checkpoint_file).json()["id"]
        for name in ("before <&>", "after")
    ]
    probe = service.post("/v1/probes", {"name": "data", "preprocess": {"scale": 0.0625}}, digits_probe_file).json()[
        "id"
    ]
    requests: dict[str, dict[str, Any]] = {
        "evaluation": {"checkpoint_id": ids[0], "options": {"null_permutations": 2}},
        "comparison": {"checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "options": FEW},
        "path": {"checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "options": {**FEW, "grid": {"points": 3}}},
        "pruning": {"checkpoint_id": ids[0], "options": {**FEW, "sparsities": [0.5, 0.9, 0.99]}},
        "series": {"axis": {"name": "epoch", "values": [0, 5]}, "checkpoint_ids": ids, "options": FEW},
    }
    return {
        kind: service.report(service.wait(service.analyze(kind=kind, probe_id=probe, **request)["id"]))
        for kind, request in requests.items()
    }


@pytest.fixture
def engine(empty_database: Settings) -> Iterator[sa.Engine]:
    """Connect to a database with the service's tables."""
    engine = make_engine(empty_database)
    migrations.upgrade(engine)
    yield engine
    engine.dispose()

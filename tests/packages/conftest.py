"""Wheels shared by the tests here, also between pytest's processes."""

import os
from pathlib import Path

import pytest

from tests.packages import wheels


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the wheels of interplay and of interplay-server."""
    base = tmp_path_factory.getbasetemp()
    return wheels.build((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built-wheels")

"""A failed start gives the reason in one sentence, with status 2 and without a traceback."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

import migrations
from app.database import make_engine
from app.refusals import CannotStart, _require_recent_sqlite
from app.settings import Settings
from tests import services

Variables = dict[str, str]


def _unreachable(folder: Path) -> Variables:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"INTERPLAY_DATABASE_URL": f"postgresql://u:a-password@127.0.0.1:{port}/d"}


def _not_a_folder(folder: Path) -> Variables:
    (folder / "file").write_text("x")
    return {"INTERPLAY_DATA_DIR": str(folder / "file")}


def _not_writable(folder: Path) -> Variables:
    # On a kernel's own file system, as root may write anywhere else.
    return {"INTERPLAY_DATA_DIR": "/proc/interplay"}


def _no_database(folder: Path) -> Variables:
    (folder / "interplay.db").write_bytes(b"this is no database" * 1000)
    return {}


def _newer(folder: Path) -> Variables:
    engine = make_engine(Settings(data_dir=folder))
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    return {}


CASES: dict[str, tuple[Callable[[Path], Variables], str]] = {
    "a database that nobody listens at": (_unreachable, "127.0.0.1"),
    "a data folder that is a file": (_not_a_folder, "file"),
    "a data folder that cannot be made": (_not_writable, "/proc/interplay"),
    "a file that is no database": (_no_database, "not a database"),
    "tables of a newer version": (_newer, "newer version"),
}


COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "serve": (
        ["app", "serve", "--port", "0"],
        {"a database that nobody listens at", "a data folder that cannot be made"},
    ),
    "migrate": (["app", "migrate"], {"a file that is no database", "tables of a newer version"}),
    "worker": (["workers"], {"a database that nobody listens at", "tables of a newer version"}),
    "verify": (["app", "verify"], {"a data folder that is a file", "a file that is no database"}),
}
"""The arguments of every process, and the cases in which `make test` starts it; `make test-all` does so in all."""


@pytest.mark.parametrize(
    ("case", "command"),
    [
        pytest.param(case, command, marks=() if case in often else pytest.mark.slow, id=f"{name}: {case}")
        for name, (command, often) in COMMANDS.items()
        for case in CASES
    ],
)
def test_one_sentence_and_status_2(case: str, command: list[str], tmp_path: Path) -> None:
    """Every process fails with one sentence and status 2; the sentence names the place and never a password."""
    prepare, expected = CASES[case]
    environment = {**os.environ, "INTERPLAY_DATA_DIR": str(tmp_path), **prepare(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    said = [line for line in ran.stderr.splitlines() if " ERROR " not in line and " WARNING " not in line]
    assert ran.returncode == 2, ran.stderr
    assert len(said) == 1, ran.stderr
    assert expected in said[0]
    assert said[0].endswith(".")
    assert "a-password" not in ran.stderr
    if case == "tables of a newer version":
        assert "run `interplay migrate`" not in said[0]


@pytest.mark.parametrize(
    ("python", "sqlite", "fits"),
    [((3, 11), (3, 40, 1), True), ((3, 12), (3, 42, 0), True), ((3, 12), (3, 41, 2), False), ((3, 13), (3, 9), False)],
)
def test_an_sqlite_that_the_queue_cannot_use(python: tuple[int, ...], sqlite: tuple[int, ...], fits: bool) -> None:
    """An old SQLite is refused: the queue's tables would accept no row; its version depends on the build of Python."""
    with contextlib.nullcontext() if fits else pytest.raises(CannotStart, match=r"needs SQLite 3\.42 .* has 3\.\d"):
        _require_recent_sqlite(python, sqlite)


@pytest.mark.slow
def test_a_worker_without_its_device_says_so_and_does_not_count(tmp_path: Path) -> None:
    """A worker whose device is missing exits with its own status, not by an abort, and the service is not ready."""
    if torch.cuda.device_count() > 99:
        pytest.fail("this test needs a device that does not exist")
    with services.running(tmp_path / "data", command="api") as service:
        command = [sys.executable, "-m", "workers", "--stop-at-end-of-input"]
        environment = {**service.environment, "INTERPLAY_DEVICE": "cuda:99"}
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            said = process.stderr.read()
            assert process.wait(60) == 1, said
        assert "cuda:99" in said
        assert "Fatal Python error" not in said
        answer = service.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["worker"] != "ok"

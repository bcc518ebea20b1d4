"""Evaluations whose pass is cut into shards: the report of one piece, by as many workers as there are."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from analysis.networks.loading import build
from tests import services
from tests.analysis import models
from tests.campaigns import DATABASES, campaign
from tests.conftest import MLP
from tests.databases import fresh_database
from tests.datafiles import encoded, parquet, picture
from tests.services import Service, comparable, until
from tests.workers.test_fanout import has_workers, points_of

CNN = {"family": "builtin", "name": "cnn", "args": {"n_classes": 3, "channels": [4], "norm": "none"}}
# Of the perceptron's weights: shards of 256 digits.
WORK = 256 * 2410
N_SEQUENCES, N_IMAGES = 200, 150


@dataclass(frozen=True)
class Fleet:
    """A service that cuts, with one worker, and another door to it that does not."""

    cutting: Service
    whole: Service

    def evaluate(self, ids: dict[str, str], *, whole: bool = False, **options: Any) -> dict[str, Any]:
        """Evaluate with 16 samples at a time, cut or in one piece."""
        body = {**ids, "options": {"null_permutations": 2, "batch_size": 16, **options}}
        return self.cutting.wait((self.whole if whole else self.cutting).analyze(**body)["id"])

    def kept(self) -> list[Path]:
        """Return the files of features in the storage."""
        return list((self.cutting.data_dir / "blobs" / "features").glob("*"))


@pytest.fixture(scope="module", params=campaign(DATABASES, often=["postgresql"]))
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Run a service that keeps no features, always on PostgreSQL and in campaigns on SQLite too; tests add workers."""
    data_dir = tmp_path_factory.mktemp("fleet") / "data"
    with ExitStack() as stack:
        settings: dict[str, Any] = {"max_features_bytes": "0", "queue_polling_seconds": "0.1"}
        settings["worker_restart_max_seconds"] = "0.2"
        if request.param == "postgresql":
            settings["database_url"] = stack.enter_context(fresh_database(request.getfixturevalue("postgres")))
        cutting = stack.enter_context(services.running(data_dir, shard_work=str(WORK), **settings))
        api = services.running(data_dir, command="api", tables=False, shard_work="0", **settings)
        yield Fleet(cutting, stack.enter_context(api))


def _posted(fleet: Fleet, collection: str, spec: dict[str, Any], file: bytes | Path) -> str:
    response = fleet.cutting.post(f"/v1/{collection}", {"name": "a", **spec}, file)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


@pytest.fixture(scope="module")
def digits(fleet: Fleet, mlp_checkpoint_file: Path, digits_probe_file: Path) -> dict[str, str]:
    """Upload a perceptron, and a probe of tensors with a split."""
    checkpoint = _posted(fleet, "checkpoints", {"architecture": MLP}, mlp_checkpoint_file)
    return {"checkpoint_id": checkpoint, "probe_id": _posted(fleet, "probes", {}, digits_probe_file)}


@pytest.fixture(scope="module")
def many(fleet: Fleet, digits: dict[str, str], digits_probe_file: Path) -> dict[str, str]:
    """Upload a probe of 29 shards, which take a worker some seconds if each of its samples is a batch."""
    tensors = {name: torch.cat([tensor] * 4) for name, tensor in load_file(digits_probe_file).items()}
    return {**digits, "probe_id": _posted(fleet, "probes", {}, save_tensors(tensors))}


@pytest.fixture(scope="module")
def images(fleet: Fleet) -> dict[str, str]:
    """Upload a convolutional network, and a probe of images in files."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = save_tensors(build(CNN, device="cpu").state_dict())
    files = [encoded(picture(seed, 16, 16)) for seed in range(N_IMAGES)]
    # In the order of their classes, as folders are: most shards have a single one.
    probe = parquet({"image": files, "label": [number * 3 // N_IMAGES for number in range(N_IMAGES)]})
    checkpoint = _posted(fleet, "checkpoints", {"architecture": CNN}, weights)
    return {"checkpoint_id": checkpoint, "probe_id": _posted(fleet, "probes", {}, probe)}


@pytest.fixture(scope="module")
def sequences(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Upload a language model, and a probe of tokens."""
    saved = models.saved_language_model("GPT2", tmp_path_factory.mktemp("language"))
    batch = {**models.texts(N_SEQUENCES), "split": torch.arange(N_SEQUENCES) % 2}
    checkpoint = _posted(fleet, "checkpoints", {"architecture": saved.architecture}, saved.path)
    return {"checkpoint_id": checkpoint, "probe_id": _posted(fleet, "probes", {}, save_tensors(batch))}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_reports_do_not_depend_on_shards_or_workers(
    count: int, fleet: Fleet, digits: dict[str, str], images: dict[str, str], sequences: dict[str, str]
) -> None:
    """In one piece, in shards by one worker, and by several: the same report, and nothing is left of the features."""
    cases = [(digits, 8), (images, 3), (sequences, 4)]
    expected = []
    for ids, n_shards in cases:
        one_piece, one_worker = (fleet.evaluate(ids, whole=whole) for whole in (True, False))
        expected.append(comparable(fleet.cutting.report(one_piece)))
        assert comparable(fleet.cutting.report(one_worker)) == expected[-1]
        assert [len(points_of(fleet.cutting, one["id"])) for one in (one_piece, one_worker)] == [0, n_shards + 1]
    with ExitStack() as stack:
        for _ in range(count - 1):
            stack.enter_context(services.worker(fleet.cutting))
        until(partial(has_workers, fleet.cutting, count))
        until(lambda: not fleet.kept(), seconds=15)
        for (ids, _), report in zip(cases, expected, strict=True):
            done = fleet.evaluate(ids)
            assert comparable(fleet.cutting.report(done)) == report
            assert done["attempts"] == 1
    until(lambda: not fleet.kept(), seconds=15)


def test_a_killed_worker_costs_a_shard(fleet: Fleet, many: dict[str, str]) -> None:
    """A worker is killed in the middle of a shard, and shards are lost that it has kept: the digits stay."""
    expected = comparable(fleet.cutting.report(fleet.evaluate(many, whole=True, batch_size=1)))
    with services.worker(fleet.cutting) as second:
        until(partial(has_workers, fleet.cutting, 2))
        until(lambda: not fleet.kept(), seconds=15)
        options = {"null_permutations": 2, "batch_size": 1}
        analysis = fleet.cutting.analyze(**many, options=options)
        until(lambda: sum(point.finished_at is not None for point in points_of(fleet.cutting, analysis["id"])) >= 4)
        killed = psutil.Process(second.pid)
        killed.kill()
        killed.wait(15)
        progress = fleet.cutting.client.get(f"/v1/analyses/{analysis['id']}").json()["progress"]
        assert progress["total"] == 29
        assert 4 <= progress["done"] < 29
        for path in sorted(fleet.kept())[:3]:
            path.unlink()
        done = fleet.cutting.wait(analysis["id"])
    assert comparable(fleet.cutting.report(done)) == expected
    attempts = [point.attempts for point in points_of(fleet.cutting, analysis["id"])]
    assert len(attempts) == 30
    assert sum(attempts) <= 31


def test_cancelling_leaves_nothing(fleet: Fleet, many: dict[str, str]) -> None:
    """A cancelled evaluation ends within five seconds, and its features go."""
    until(lambda: not fleet.kept(), seconds=15)
    analysis = fleet.cutting.analyze(**many, options={"null_permutations": 0, "batch_size": 1})
    until(lambda: len(fleet.kept()) >= 2)
    assert fleet.cutting.client.post(f"/v1/analyses/{analysis['id']}/cancel").status_code == 200
    assert fleet.cutting.wait(analysis["id"], seconds=5)["status"] == "cancelled"
    until(lambda: not fleet.kept(), seconds=15)


def test_a_failure_is_that_of_one_piece(fleet: Fleet, digits: dict[str, str], digits_probe_file: Path) -> None:
    """A NaN in the fifth shard fails the evaluation as in one piece."""
    tensors = load_file(digits_probe_file)
    tensors["inputs"][1100, 0] = torch.nan
    ids = {**digits, "probe_id": _posted(fleet, "probes", {}, save_tensors(tensors))}
    one_piece, cut = (fleet.evaluate(ids, whole=whole) for whole in (True, False))
    assert one_piece["status"] == cut["status"] == "failed"
    assert cut["problem"] == one_piece["problem"]
    assert re.search("row 1100", json.dumps(cut["problem"]))

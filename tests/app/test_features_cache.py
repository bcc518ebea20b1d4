"""Cached features: the same numbers without the network, bounded, intact or ignored, deleted with their origin."""

import os
import resource
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from analysis.networks.loading import build
from analysis.probes.feature_set import FeatureSet
from app.schemas.reports import Samples
from app.settings import Settings
from app.storage import Storage
from tests import services
from tests.conftest import MLP
from tests.datafiles import encoded, parquet, picture
from tests.services import Service
from workers.compute.features import FeatureCache, Kept
from workers.compute.probes import ProbeFacts
from workers.tasks import Network

CNN = {"family": "builtin", "name": "cnn", "args": {"n_classes": 3, "channels": [4], "norm": "none"}}
PARQUET = parquet({"image": [encoded(picture(seed, 16, 16)) for seed in range(12)], "label": [0, 1, 2] * 4})


def _kept(service: Service) -> set[str]:
    return {path.name for path in (service.data_dir / "blobs" / "features").glob("*")}


def _posted(service: Service, collection: str, spec: dict[str, Any], file: bytes | Path) -> dict[str, Any]:
    response = service.post(f"/v1/{collection}", {"name": "a", **spec}, file)
    assert response.status_code == 201, response.text
    return dict(response.json())


def _report(service: Service, checkpoint: dict[str, Any], probe: dict[str, Any], **options: Any) -> dict[str, Any]:
    body = {"checkpoint_id": checkpoint["id"], "probe_id": probe["id"], "options": options}
    return service.report(service.wait(service.analyze(**body)["id"]))


def test_a_second_evaluation_does_not_run_the_network(service: Service, tmp_path: Path) -> None:
    """Other permutations reuse the features, to the last digit; other inputs do not; deletion removes the features."""
    before = _kept(service)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(build(CNN, device="cpu").state_dict(), tmp_path / "cnn")
    checkpoint = _posted(service, "checkpoints", {"architecture": CNN}, tmp_path / "cnn")
    probe = _posted(service, "probes", {}, PARQUET)
    first = _report(service, checkpoint, probe, null_permutations=0)
    assert first["provenance"]["features_reused"] is False
    second = _report(service, checkpoint, probe, null_permutations=3)
    assert second["provenance"]["features_reused"] is True
    assert second["provenance"]["batch_size"] == first["provenance"]["batch_size"]
    assert second["subject"] == first["subject"]
    assert second["probe"] == first["probe"]
    for split in (first, second):
        for centring in split["splits"]["all"]["interplay"]["sample"].values():
            del centring["null"], centring["mir_z"], centring["reasons"]
        del split["splits"]["all"]["interplay"]["class_mean"]
    assert second["splits"] == first["splits"]
    same_file = _posted(service, "probes", {}, PARQUET)
    again = _report(service, checkpoint, same_file, null_permutations=0)
    assert (again["provenance"]["features_reused"], again["probe"]["id"]) == (True, same_file["id"])
    darker = _posted(service, "probes", {"preprocess": {"scale": 0.001}}, PARQUET)
    others: list[tuple[dict[str, Any], dict[str, int]]] = [
        (darker, {}),
        (probe, {"samples": 6}),
        (probe, {"samples": 6, "seed": 1}),
        (probe, {"batch_size": 5}),
    ]
    for other, options in others:
        assert (
            _report(service, checkpoint, other, null_permutations=0, **options)["provenance"]["features_reused"]
            is False
        )
    assert len(_kept(service) - before) == 5
    service.client.delete(f"/v1/probes/{darker['id']}")
    assert len(_kept(service) - before) == 5, "the file is still of another probe"
    service.client.delete(f"/v1/checkpoints/{checkpoint['id']}")
    assert _kept(service) <= before


def test_points_and_uploaded_features_reuse_nothing(service: Service, tmp_path: Path) -> None:
    """Points, whose network differs each time when pruned, and uploaded features reuse no cached features."""
    before = _kept(service)
    save_file(build(MLP, device="cpu").state_dict(), tmp_path / "mlp")
    checkpoint = _posted(service, "checkpoints", {"architecture": MLP}, tmp_path / "mlp")
    save_file({"inputs": torch.randn(20, 64), "labels": torch.arange(20) % 10}, tmp_path / "probe")
    probe = _posted(service, "probes", {}, tmp_path / "probe")
    body = {"kind": "pruning", "checkpoint_id": checkpoint["id"], "probe_id": probe["id"]}
    options = {"sparsities": [0.5], "null_permutations": 0}
    for _ in range(2):
        answer = service.client.post("/v1/analyses", json={**body, "options": options})
        report = service.report(service.wait(answer.json()["id"]))
        assert report["provenance"]["features_reused"] is False
    assert _kept(service) <= before


def _cache(folder: Path, max_bytes: int) -> tuple[Storage, FeatureCache]:
    storage = Storage(Settings(data_dir=folder))
    return storage, FeatureCache(storage, max_bytes)


def _entry(seed: int, n: int = 100) -> Kept:
    features = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    head = torch.eye(2, 8, dtype=torch.bfloat16)
    feature_set = FeatureSet(features, torch.arange(n) % 2, head, None, features[:, :2], None)
    return Kept(feature_set, Network(head="fc"), 7, ProbeFacts(samples=Samples(used=n, of=2 * n, seed=3)))


def _name(number: int) -> str:
    return f"{number:064}-{number:064}-{number:032}"


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    """A cached entry gives back tensors, the head's name, the batch size and the findings about the probe."""
    _, cache = _cache(tmp_path, 10**6)
    entry = _entry(1)
    assert cache.find(_name(1)) is None
    cache.keep(_name(1), entry)
    found = cache.find(_name(1))
    assert found is not None
    assert torch.equal(found.feature_set.features, entry.feature_set.features)
    assert torch.equal(found.feature_set.head, entry.feature_set.head)
    assert torch.equal(found.feature_set.labels, entry.feature_set.labels)
    assert found.feature_set.logits is not None
    assert torch.equal(found.feature_set.logits, entry.feature_set.features[:, :2])
    assert found.feature_set.split is None
    assert (found.network, found.batch_size, found.probe) == (Network(head="fc"), 7, entry.probe)


def test_what_is_much_stays_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large features are not read into memory; they are the same once their entry was evicted."""
    storage, cache = _cache(tmp_path, 10**6)
    monkeypatch.setattr("workers.compute.features._MAPPED", 1000)
    entry = _entry(1)
    cache.keep(_name(1), entry)
    found = cache.find(_name(1))
    assert found is not None
    assert _name(1) in Path("/proc/self/maps").read_text()
    storage.delete_features(_name(1))
    assert torch.equal(found.feature_set.features, entry.feature_set.features)


def test_the_oldest_goes_first(tmp_path: Path) -> None:
    """The cache never exceeds its bound: the oldest goes first, more than half of it is not cached, 0 disables it."""
    storage, cache = _cache(tmp_path, 20_000)
    for number in range(6):
        cache.keep(_name(number), _entry(number))
        path = tmp_path / "blobs" / "features" / _name(number)
        os.utime(path, (1000 + number, 1000 + number))
        assert sum(entry.size_bytes for entry in storage.list_features()) <= 20_000
    assert [cache.find(_name(number)) is not None for number in range(6)] == [False, False, False, True, True, True]
    cache.keep(_name(9), _entry(9, 1000))
    assert cache.find(_name(9)) is None
    assert FeatureCache(storage, 0).find(_name(5)) is None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _without_logits(path: Path) -> None:
    save_file({"features": torch.zeros(2, 2)}, path, metadata={"about": "{}"})


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _turned(path: Path) -> None:
    """Flip one bit of a tensor, as a disk may: the file is still valid safetensors."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("break_", [_cut, _without_logits, _emptied, _turned])
def test_broken_entries_are_computed_anew(tmp_path: Path, break_: Callable[[Path], None]) -> None:
    """Truncated, empty, incomplete or damaged entries count as missing, and the next entry is found again."""
    storage, cache = _cache(tmp_path, 10**6)
    cache.keep(_name(1), _entry(1))
    break_(tmp_path / "blobs" / "features" / _name(1))
    assert cache.find(_name(1)) is None
    assert storage.list_features() == []
    cache.keep(_name(1), _entry(2))
    found = cache.find(_name(1))
    assert found is not None
    assert torch.equal(found.feature_set.features, _entry(2).feature_set.features)


def test_a_kill_leaves_no_entry(tmp_path: Path) -> None:
    """A half-written entry has no name yet; a full disk caches nothing and fails nothing."""
    storage, cache = _cache(tmp_path, 10**9)
    with storage.stage() as staged:
        staged.write(b"half")
        assert cache.find(_name(2)) is None
        assert storage.list_features() == []
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, previous[1]))
    try:
        cache.keep(_name(1), _entry(1, 10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert storage.list_features() == []
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []


def test_features_are_written_without_a_copy_in_memory(tmp_path: Path) -> None:
    """Features are written without a copy in memory, as they may be several GB."""
    _, cache = _cache(tmp_path, 10**9)
    entry = _entry(1, 10)
    large = replace(entry.feature_set, features=torch.zeros(10, 10**6), head=torch.zeros(2, 10**6))
    tracemalloc.start()
    cache.keep(_name(1), replace(entry, feature_set=large))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cache.find(_name(1)) is not None
    assert peak_bytes < 10**7


def test_the_sweep_removes_what_is_of_nothing(tmp_path: Path) -> None:
    """A start of the service removes features whose checkpoint or probe is gone."""
    _, cache = _cache(tmp_path / "data", 10**6)
    cache.keep(_name(1), _entry(1))
    with services.running(tmp_path / "data", command="api") as service:
        deadline = time.monotonic() + 30
        while _kept(service) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _kept(service) == set()

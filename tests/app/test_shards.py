"""Which passes are cut into shards, and which kept features go."""

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from app import shards
from app.database import write
from app.models import Analysis, AnalysisCheckpoint, Blob, Checkpoint, Probe, now
from app.settings import Settings
from app.shards import samples_of_a_shard
from app.storage import Storage

WORK = 2**35


def _checkpoint(n_parameters: int, family: str = "timm", sha256: str = "a" * 64) -> Checkpoint:
    return Checkpoint(
        name="c", sha256=sha256, size_bytes=1, n_parameters=n_parameters, metadata_={}, prefix="", ignored={},
        architecture={"family": family, "name": "x", "args": {}},
    )  # fmt: skip


def _probe(n_samples: int, content: str = "tensors", sha256: str = "a" * 64) -> Probe:
    return Probe(
        name="p", sha256=sha256, data_sha256="d" * 64, size_bytes=1, format="npz", content=content,
        n_samples=n_samples, n_classes=2, class_counts=[2, 2], splits={}, metadata_={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n_parameters", "n_samples", "content", "expected"),
    [
        # ResNet-18 on ImageNet's validation images; the number of shards is whole.
        (11_689_512, 50_000, "images", 2048),
        # What is computed in some seconds stays one step, whatever it is.
        (11_689_512, 4_000, "tensors", None),
        (175_000, 100_000, "tensors", None),
        (175_000, 10_000, "images", None),
        # Decoding counts, however small the network.
        (1000, 100_000, "images", 32_768),
        (124_439_808, 600, "texts", 256),
        (1, 131_072, "tensors", 65_536),
        (1, 131_071, "tensors", None),
        (70_000_000_000, 128, "texts", 64),
        (70_000_000_000, 127, "texts", None),
    ],
)
def test_large_passes_are_cut(n_parameters: int, n_samples: int, content: str, expected: int | None) -> None:
    """Shards have as many samples as take a while, and a pass is cut if it has two."""
    rows = [_checkpoint(n_parameters)], _probe(n_samples, content)
    assert samples_of_a_shard("evaluation", *rows, {}, work=WORK) == expected
    assert samples_of_a_shard("comparison", *rows, {"samples": None}, work=WORK) == expected
    assert samples_of_a_shard("evaluation", *rows, {}, work=0) is None
    assert samples_of_a_shard("series", *rows, {}, work=WORK) is None
    assert samples_of_a_shard("evaluation", [_checkpoint(n_parameters, "custom")], rows[1], {}, work=WORK) is None


def test_requested_samples_count() -> None:
    """Of a large probe of which few samples are drawn, only these are passed."""
    rows = [_checkpoint(11_689_512)], _probe(50_000)
    assert samples_of_a_shard("evaluation", *rows, {"samples": 4000}, work=WORK) is None
    assert samples_of_a_shard("evaluation", *rows, {"samples": 4096}, work=WORK) == 2048
    assert samples_of_a_shard("evaluation", *rows, {"samples": 60_000}, work=WORK) == 2048


def test_what_is_counted_more_exactly_changes_nothing() -> None:
    """A row's parameters are corrected at the first evaluation; the next one must find what that kept."""
    first, corrected = (_checkpoint(n) for n in (11_689_512, 11_699_132))
    cuts = {samples_of_a_shard("evaluation", [one], _probe(50_000), {}, work=WORK) for one in (first, corrected)}
    assert cuts == {2048}


def _store(storage: Storage, name: str, size_bytes: int, at: int, folder: Path) -> None:
    with storage.stage() as staged:
        staged.write(b"0" * size_bytes)
        storage.put_features(name, staged)
    os.utime(folder / name, (at, at))


def _analysis(engine: sa.Engine, sha256: str, **members: Any) -> str:
    """Store an analysis with its checkpoint and probe; return its id."""
    with write(engine) as session:
        session.add(Blob(sha256=sha256, size_bytes=1))
        session.flush()
        checkpoint, probe = _checkpoint(1, sha256=sha256), _probe(1000, sha256=sha256)
        session.add_all([checkpoint, probe])
        session.flush()
        row = Analysis(
            kind="evaluation", name="c", options={}, request_sha256="0" * 64, probe_id=probe.id,
            checkpoints=[AnalysisCheckpoint(position=0, checkpoint_id=checkpoint.id)], **members,
        )  # fmt: skip
        session.add(row)
        session.flush()
        return row.id


# By the limit, what stays of "old" (100 bytes), "large" (600), and "needed" (500), whose analysis is in progress.
_KEPT = {
    10**6: ["old", "old.64", "needed", "needed.64", "needed.128", "large", "large.64"],
    # All that there is room for, but for what is more than half of the limit.
    1000: ["old", "old.64", "needed", "needed.64", "needed.128"],
    # The oldest goes whole; what is needed stays, however much it is.
    550: ["needed", "needed.64", "needed.128"],
    0: ["needed", "needed.64", "needed.128"],
}


def test_what_goes(engine_with_tables: sa.Engine, tmp_path: Path) -> None:
    """Shards of analyses in progress stay, of the others as much as is kept, the newest."""
    engine = engine_with_tables
    hashes = {name: uuid4().hex * 2 for name in ("old", "needed", "large")}
    names = {name: f"{sha256}-{'d' * 64}-{'e' * 32}" for name, sha256 in hashes.items()}
    files = {"old": 90, "old.64": 10, "needed": 200, "needed.64": 200, "needed.128": 100, "large": 300, "large.64": 300}
    stored = {file: names[file.partition(".")[0]] + "".join(file.partition(".")[1:]) for file in files}
    shown = {name: file for file, name in stored.items()}
    id_ = _analysis(engine, hashes["needed"], shard_samples=64)
    _analysis(engine, hashes["old"], shard_samples=None)
    _analysis(engine, hashes["large"], shard_samples=64, outcome="succeeded", finished_at=now())

    def left(limit: int) -> list[str]:
        data_dir = tmp_path / str(limit)
        storage = Storage(Settings(data_dir=data_dir, max_features_bytes=limit))
        for at, (file, size_bytes) in enumerate(files.items()):
            _store(storage, stored[file], size_bytes, 1000 + at, data_dir / "blobs" / "features")
        shards.tidy(engine, storage)
        return sorted(shown[entry.name] for entry in storage.list_features())

    assert {limit: left(limit) for limit in _KEPT} == {limit: sorted(kept) for limit, kept in _KEPT.items()}
    with write(engine) as session:
        session.get_one(Analysis, id_).outcome = "failed"
    # Once nobody needs it: it is more than half of 550.
    assert {limit: "needed" in left(limit) for limit in _KEPT} == {10**6: True, 1000: True, 550: False, 0: False}

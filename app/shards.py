"""Shards: which passes over a probe are cut into parts that several workers compute, and which kept features go.

A part of a pass is a file of features in the storage, and all parts of one pass are an entry there. What analyses in
progress need stays; of the rest, as much as the operator wants to keep.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.database import read
from app.models import Analysis, AnalysisCheckpoint, Checkpoint, Probe
from app.schemas.base import Kind
from app.storage import Storage, StoredFeatures

#: Share of all kept features that one entry may have, so that one evaluation does not evict all others.
LARGEST_SHARE = 0.5
# An image's decoding takes as long as passing it through so many weights.
_DECODING = 2**20
# A kill of a worker costs a shard, so it never has more samples. Each costs a transaction and a file, so never fewer.
_MOST_SAMPLES, _LEAST_SAMPLES = 2**16, 64
_KINDS: Collection[Kind] = ("evaluation", "comparison")


def samples_of_a_shard(
    kind: Kind, checkpoints: Sequence[Checkpoint], probe: Probe, options: Mapping[str, Any], *, work: int
) -> int | None:
    """Return the samples of a shard of a pass over a probe; None if the pass is not cut.

    It depends on the rows alone, never on the workers that live now. The more weights a network has, the smaller are
    its shards: each is to take about as long.

    Args:
        kind: of the analysis.
        checkpoints: of the analysis.
        probe: of the analysis.
        options: of the analysis.
        work: weights times samples of a shard (`INTERPLAY_SHARD_WORK`); 0 cuts nothing.
    """
    # A name of features cannot cover the operator's own code, so workers cannot pass them to each other.
    if kind not in _KINDS or not work or any(one.architecture["family"] == "custom" for one in checkpoints):
        return None
    weights = max(*(one.n_parameters for one in checkpoints), _DECODING if probe.content == "images" else 1, 1)
    # A power of two, as batches are: parameters that were counted more exactly at the first evaluation change nothing.
    fitting = 1 << max((work // weights).bit_length() - 1, 0)
    samples = min(max(fitting, _LEAST_SAMPLES), _MOST_SAMPLES)
    requested = options.get("samples")
    n = probe.n_samples if requested is None else min(requested, probe.n_samples)
    return samples if n >= 2 * samples else None


@dataclass(frozen=True)
class Entry:
    """The kept features of one pass, in one file or several; it is as old as the newest of them."""

    files: tuple[StoredFeatures, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def stored_at(self) -> datetime:
        return max(file.stored_at for file in self.files)

    def delete(self, storage: Storage) -> None:
        """Delete its files, the first one last: without that the others are found by nobody."""
        for file in sorted(self.files, key=lambda file: file.name, reverse=True):
            storage.delete_features(file.name)


def entries(files: Iterable[StoredFeatures]) -> dict[str, Entry]:
    """Return the entries of kept features by name, the oldest first."""
    found: dict[str, list[StoredFeatures]] = {}
    for file in files:
        found.setdefault(file.entry, []).append(file)
    by_name = {name: Entry(tuple(some)) for name, some in found.items()}
    return dict(sorted(by_name.items(), key=lambda item: item[1].stored_at))


def make_room(storage: Storage, size_bytes: int, *, limit_bytes: int, but: str) -> None:
    """Delete the oldest entries, but one, until so many further bytes are within the limit of all kept features."""
    found = entries(storage.list_features())
    excess = sum(entry.size_bytes for entry in found.values()) + size_bytes - limit_bytes
    for name, entry in found.items():
        if excess > 0 and name != but:
            entry.delete(storage)
            excess -= entry.size_bytes


def tidy(engine: sa.Engine, storage: Storage) -> None:
    """Delete kept features beyond the limit, and entries of more than half of it: never what analyses need now."""
    # Before the rows: whoever adds to these has a row by then.
    files, limit_bytes = storage.list_features(), storage.max_features_bytes
    if not files:
        return
    with read(engine) as session:
        needed = _needed(session)
    found, excess = [*entries(files).values()], sum(file.size_bytes for file in files) - limit_bytes
    # What is too large goes first: others may have room then.
    for entry in sorted(found, key=lambda entry: entry.size_bytes <= LARGEST_SHARE * limit_bytes):
        too_much = excess > 0 or entry.size_bytes > LARGEST_SHARE * limit_bytes
        if too_much and frozenset(entry.files[0].origins) not in needed:
            entry.delete(storage)
            excess -= entry.size_bytes


def _needed(session: Session) -> set[frozenset[str]]:
    """Return the origins of the features that analyses in progress pass from worker to worker."""
    going_on = (
        sa.select(Checkpoint.sha256, Probe.data_sha256, Probe.sha256)
        .select_from(Analysis)
        .join(AnalysisCheckpoint, AnalysisCheckpoint.analysis_id == Analysis.id)
        .join(Checkpoint, Checkpoint.id == AnalysisCheckpoint.checkpoint_id)
        .join(Probe, Probe.id == Analysis.probe_id)
        .where(Analysis.outcome.is_(None), Analysis.shard_samples.is_not(None))
    )
    return {frozenset((checkpoint, data or file)) for checkpoint, data, file in session.execute(going_on)}

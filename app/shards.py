"""Shards: which passes over a probe are cut into parts that several workers compute, and which kept features go.

A part of a pass is a file of features in the storage, and all parts of one pass are an entry there. What analyses in
progress need stays; of the rest, as much as the operator wants to keep.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.database import read
from app.kept import LARGEST_SHARE, entries
from app.models import Analysis, AnalysisCheckpoint, Checkpoint, Probe
from app.schemas.base import Kind
from app.storage import Storage

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

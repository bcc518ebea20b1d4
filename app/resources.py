"""Checkpoints, probes and feature sets: from an upload to a row, and away again.

A blob's row is locked by whoever takes it into use or removes it, so a file is removed only while nothing refers to it.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app import models, schemas, tensorfile
from app.architectures import check_architecture
from app.database import read, write
from app.errors import InUse, InvalidFile, InvalidRequest, NotFound, invalid_request
from app.settings import Settings
from app.storage import StagedFile, Storage
from app.uploads import Upload

# A class costs a number in every row and report, a sample eight bytes while its label is checked.
MAX_CLASSES = 100_000
MAX_SAMPLES = 100_000_000
_ORPHAN_SECONDS = 3600.0

# Names under which a probe may hold a network's own inputs in place of `inputs`; the first that is there, of the first
# two, says the shape. As in analysis/probes.py, which a test compares.
INPUT_NAMES = (
    "pixel_values", "input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_attention_mask",
    "spatial_shapes",
)  # fmt: skip
_MAIN_NAMES = ("inputs", "pixel_values", "input_ids")

Owner = models.Checkpoint | models.Probe | models.FeatureSet
OwnerType = TypeVar("OwnerType", models.Checkpoint, models.Probe, models.FeatureSet)
Spec = TypeVar("Spec", schemas.CheckpointSpec, schemas.ProbeSpec, schemas.FeatureSetSpec)
_HOLD_BLOB = sa.text(
    "INSERT INTO blobs (sha256, size_bytes) VALUES (:sha256, :size_bytes) "
    "ON CONFLICT (sha256) DO UPDATE SET size_bytes = excluded.size_bytes"
)
_OWNERS: tuple[type[Owner], ...] = (models.Checkpoint, models.Probe, models.FeatureSet)


def create_checkpoint(engine: sa.Engine, storage: Storage, upload: Upload) -> models.Checkpoint:
    """Keep a checkpoint; its header is checked, its weights are not read (the worker does that)."""
    spec = _parse_spec(schemas.CheckpointSpec, upload.spec)
    with _blob_path(engine, storage, upload, spec) as path:
        file = tensorfile.inspect_safetensors(path)
        description = spec.architecture
        if description is None:
            description = _embedded_architecture(file)
        checkpoint = models.Checkpoint(
            name=spec.name,
            sha256=_sha256(upload, spec),
            size_bytes=path.stat().st_size,
            n_parameters=file.n_parameters,
            architecture=check_architecture(description),
            head=spec.head,
            metadata_=spec.metadata,
        )
    return _keep(engine, storage, upload.file, checkpoint)


def create_probe(engine: sa.Engine, storage: Storage, settings: Settings, upload: Upload) -> models.Probe:
    """Keep a probe dataset; labels and splits are read and checked."""
    spec = _parse_spec(schemas.ProbeSpec, upload.spec)
    with _blob_path(engine, storage, upload, spec) as path:
        file, integers = _open_probe(path, settings)
        _known_tensors(file, {"inputs", *INPUT_NAMES, "labels", "split"})
        inputs = _inputs(file, spec.preprocess)
        n_named = len(spec.class_names) if spec.class_names else None
        labels = _labels(file, integers, inputs.shape[0], n_classes=n_named)
        n_classes = n_named or int(labels.max()) + 1
        _check_preprocess(spec.preprocess, inputs.shape[1])
        probe = models.Probe(
            name=spec.name,
            sha256=_sha256(upload, spec),
            size_bytes=path.stat().st_size,
            format=file.format,
            n_samples=inputs.shape[0],
            n_classes=n_classes,
            class_counts=np.bincount(labels, minlength=n_classes).tolist(),
            class_names=spec.class_names,
            input_shape=list(inputs.shape[1:]),
            splits=_splits(file, integers, inputs.shape[0]),
            preprocess=spec.preprocess.model_dump() if spec.preprocess else None,
            metadata_=spec.metadata,
        )
    return _keep(engine, storage, upload.file, probe)


def create_feature_set(engine: sa.Engine, storage: Storage, upload: Upload) -> models.FeatureSet:
    """Keep features, labels and head that somebody extracted elsewhere."""
    spec = _parse_spec(schemas.FeatureSetSpec, upload.spec)
    with _blob_path(engine, storage, upload, spec) as path:
        file = tensorfile.inspect_safetensors(path)
        _known_tensors(file, {"features", "labels", "head", "head_bias", "logits", "split"})
        n_samples, n_features = _tensor(file, "features", tensorfile.FLOATING, rank=2).shape
        n_classes, _ = _tensor(file, "head", tensorfile.FLOATING, shape=(None, n_features)).shape
        if n_classes > MAX_CLASSES:
            raise InvalidFile(f"The head has {n_classes} rows; at most {MAX_CLASSES} classes are allowed.")
        if "head_bias" in file.tensors:
            _tensor(file, "head_bias", tensorfile.FLOATING, shape=(n_classes,))
        if "logits" in file.tensors:
            _tensor(file, "logits", tensorfile.FLOATING, shape=(n_samples, n_classes))
        labels = _labels(file, _safetensors_integers(path), n_samples, n_classes=n_classes)
        feature_set = models.FeatureSet(
            name=spec.name,
            sha256=_sha256(upload, spec),
            size_bytes=path.stat().st_size,
            n_samples=n_samples,
            n_classes=n_classes,
            n_features=n_features,
            class_counts=np.bincount(labels, minlength=n_classes).tolist(),
            splits=_splits(file, _safetensors_integers(path), n_samples),
            metadata_=spec.metadata,
        )
    return _keep(engine, storage, upload.file, feature_set)


def get(
    session: Session, model: type[OwnerType], id_: str, *, lock: Literal["share", "exclusive"] | None = None
) -> OwnerType:
    """One resource; locked, it cannot be deleted before the transaction ends."""
    query = sa.select(model).where(model.id == id_)
    if lock is not None:
        query = query.with_for_update(read=lock == "share")
    row = session.scalars(query).one_or_none()
    if row is None:
        raise NotFound(f"There is no {_noun(model)} {id_!r}.")
    return row


def delete(engine: sa.Engine, storage: Storage, model: type[OwnerType], id_: str) -> None:
    """Delete a resource, and its blob where nothing else refers to it.

    Raises:
        NotFound: there is none.
        InUse: an analysis that has not ended needs it.
    """
    analyses = models.Analysis
    places = models.AnalysisCheckpoint
    needs = {
        models.Checkpoint: analyses.id.in_(sa.select(places.analysis_id).where(places.checkpoint_id == id_)),
        models.Probe: analyses.probe_id == id_,
        models.FeatureSet: analyses.feature_set_id == id_,
    }[model]
    with write(engine) as session:
        row = get(session, model, id_, lock="exclusive")
        needed_by = session.scalars(sa.select(analyses.id).where(needs, analyses.outcome.is_(None)).limit(20))
        if ids := needed_by.all():
            raise InUse(
                f"The {_noun(model)} is needed by {len(ids)} analyses that have not ended; cancel them or wait.",
                analysis_ids=list(ids),
            )
        session.execute(sa.delete(models.MetadataEntry).where(models.MetadataEntry.resource_id == id_))
        session.delete(row)
    _release(engine, storage, row.sha256)


def sweep(engine: sa.Engine, storage: Storage) -> None:
    """Remove what crashes left behind: abandoned uploads, blobs without a use, files without a row."""
    storage.remove_abandoned()
    unused = sa.select(models.Blob.sha256).where(*(_no_use(models.Blob.sha256, owner) for owner in _OWNERS))
    with read(engine) as session:
        hashes = list(session.scalars(unused))
        known = set(session.scalars(sa.select(models.Blob.sha256)))
    for sha256 in hashes:
        _release(engine, storage, sha256)
    # An upload puts its file in place moments before its row: only what is old has been forgotten.
    for sha256 in storage.blobs_older_than(_ORPHAN_SECONDS):
        if sha256 not in known:
            # With a row of its own, whoever uploads the same file now waits for its lock, or has it in use.
            with write(engine) as session:
                session.execute(_HOLD_BLOB, {"sha256": sha256, "size_bytes": 0})
            _release(engine, storage, sha256)


def _keep(engine: sa.Engine, storage: Storage, file: StagedFile | None, row: OwnerType) -> OwnerType:
    """Put the blob in place and insert the row, in this order: a crash in between leaves a file, never a bare row."""
    if file is not None:
        storage.put(file)
    with write(engine) as session:
        if file is not None:
            # Locks the row against `_release`, also where it exists already.
            session.execute(_HOLD_BLOB, {"sha256": row.sha256, "size_bytes": row.size_bytes})
        elif session.get(models.Blob, row.sha256, with_for_update=True) is None:
            raise NotFound(f"The service no longer holds a blob with the sha256 {row.sha256}.")
        if file is not None and not storage.has(row.sha256):
            storage.put(file)
        session.add(row)
        session.flush()
        session.add_all(models.MetadataEntry.entries(row.id, row.metadata_))
    return row


def _release(engine: sa.Engine, storage: Storage, sha256: str) -> None:
    with write(engine) as session:
        blob = session.get(models.Blob, sha256, with_for_update=True)
        if blob is None or not session.scalar(sa.select(sa.and_(*(_no_use(sha256, owner) for owner in _OWNERS)))):
            return
        session.delete(blob)
        session.flush()
        storage.delete(sha256)


def _no_use(sha256: Any, owner: type[Owner]) -> sa.ColumnElement[bool]:
    return ~sa.exists().where(owner.sha256 == sha256)


@contextmanager
def _blob_path(engine: sa.Engine, storage: Storage, upload: Upload, spec: Spec) -> Iterator[Path]:
    """The file to look into: the one that came, or the blob that `spec.sha256` names."""
    if upload.file is not None:
        upload.file.flush()
        if spec.sha256 not in (None, upload.file.sha256):
            raise InvalidFile(f"The file has the sha256 {upload.file.sha256}, the spec says {spec.sha256}.")
        yield upload.file.path
        return
    if spec.sha256 is None:
        raise InvalidRequest("The form has no part named 'file', and the spec names no sha256 of a blob to re-use.")
    missing = NotFound(f"The service holds no blob with the sha256 {spec.sha256}; send the file.")
    with read(engine) as session:
        if session.get(models.Blob, spec.sha256) is None:
            raise missing
    try:
        with storage.local_copy(spec.sha256) as path:
            yield path
    except FileNotFoundError:
        raise missing from None


def _sha256(upload: Upload, spec: Spec) -> str:
    sha256 = upload.file.sha256 if upload.file else spec.sha256
    assert sha256 is not None, "_blob_path has seen to it"
    return sha256


def _parse_spec(model: type[Spec], text: bytes) -> Spec:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise invalid_request("The spec", error.errors(), prefix="spec") from None


def _embedded_architecture(file: tensorfile.TensorFile) -> Any:
    text = file.metadata.get("architecture")
    if text is None:
        raise InvalidRequest(
            "The spec has no 'architecture' and the file's own metadata names none. Give one of them, such as "
            '{"family": "builtin", "name": "mlp", "args": {"sizes": [64, 32, 10]}}.'
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidFile("The architecture in the file's own metadata is not JSON.") from None


Integers = Callable[[str], npt.NDArray[np.int64]]


def _safetensors_integers(path: Path) -> Integers:
    return lambda name: tensorfile.read_integers(path, name)


def _open_probe(path: Path, settings: Settings) -> tuple[tensorfile.TensorFile, Integers]:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        archive = tensorfile.inspect_npz(path, max_bytes=settings.max_npz_bytes, max_ratio=settings.max_npz_ratio)
        return archive, lambda name: tensorfile.read_npz_integers(path, name)
    return tensorfile.inspect_safetensors(path), _safetensors_integers(path)


def _known_tensors(file: tensorfile.TensorFile, names: set[str]) -> None:
    if unknown := sorted(set(file.tensors) - names):
        raise InvalidFile(
            f"The file holds {', '.join(map(repr, unknown[:20]))}; only {', '.join(sorted(names))} are known.",
            unexpected=unknown[:20],
        )


def _tensor(
    file: tensorfile.TensorFile,
    name: str,
    dtypes: tuple[str, ...],
    *,
    rank: int | None = None,
    min_rank: int = 0,
    shape: tuple[int | None, ...] | None = None,
) -> tensorfile.TensorInfo:
    info = file.tensors.get(name)
    if info is None:
        found = ", ".join(sorted(file.tensors)[:20]) or "nothing"
        raise InvalidFile(f"The file has no tensor {name!r}; it holds {found}.")
    if info.dtype not in dtypes:
        raise InvalidFile(f"The tensor {name!r} has the dtype {info.dtype}; expected one of {', '.join(dtypes)}.")
    rank = len(shape) if shape else rank
    if len(info.shape) < min_rank or rank not in (None, len(info.shape)):
        wanted = f"{rank}" if rank else f"at least {min_rank}"
        raise InvalidFile(f"The tensor {name!r} has the shape {list(info.shape)}; expected {wanted} dimensions.")
    if any(size not in (None, have) for size, have in zip(shape or (), info.shape, strict=False)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape or ())
        raise InvalidFile(f"The tensor {name!r} has the shape {list(info.shape)}; expected [{wanted}].")
    if 0 in info.shape:
        raise InvalidFile(f"The tensor {name!r} is empty: its shape is {list(info.shape)}.")
    if info.shape[0] > MAX_SAMPLES:
        raise InvalidFile(f"The tensor {name!r} has {info.shape[0]} rows; at most {MAX_SAMPLES} are allowed.")
    return info


def _inputs(file: tensorfile.TensorFile, preprocess: schemas.Preprocess | None) -> tensorfile.TensorInfo:
    """The tensor of a probe that says how many samples there are and of what shape; the others are checked too."""
    named = [name for name in INPUT_NAMES if name in file.tensors]
    if "inputs" in file.tensors and named:
        raise InvalidFile(f"The file holds 'inputs' and {', '.join(map(repr, named))}; it must be one or the other.")
    main = next((name for name in _MAIN_NAMES if name in file.tensors), "inputs")
    inputs = _tensor(file, main, tensorfile.INTEGER if main == "input_ids" else tensorfile.NUMERIC, min_rank=2)
    for name in named:
        other = _tensor(file, name, tensorfile.NUMERIC, min_rank=2)
        if other.shape[0] != inputs.shape[0]:
            raise InvalidFile(f"{name!r} has {other.shape[0]} samples; {main!r} has {inputs.shape[0]}.")
    if preprocess is not None and main == "input_ids":
        raise InvalidRequest("preprocess is for 'inputs' and 'pixel_values'; the file holds neither.")
    return inputs


def _labels(
    file: tensorfile.TensorFile, integers: Integers, n_samples: int, *, n_classes: int | None
) -> npt.NDArray[np.int64]:
    _tensor(file, "labels", tensorfile.INTEGER, shape=(n_samples,))
    labels = integers("labels")
    allowed = n_classes if n_classes is not None else MAX_CLASSES
    if labels.min() < 0 or labels.max() >= allowed:
        raise InvalidFile(
            f"Labels must lie in 0..{allowed - 1}; they lie in {labels.min()}..{labels.max()}.",
            n_outside=int(((labels < 0) | (labels >= allowed)).sum()),
        )
    if labels.min() == labels.max():
        raise InvalidFile(f"Every label is {labels[0]}; at least two classes must be present.")
    return labels


def _splits(file: tensorfile.TensorFile, integers: Integers, n_samples: int) -> dict[str, int]:
    if "split" not in file.tensors:
        return {}
    _tensor(file, "split", (*tensorfile.INTEGER, "BOOL"), shape=(n_samples,))
    split = integers("split")
    if split.min() < 0 or split.max() > 1:
        raise InvalidFile(f"'split' holds 0 for train and 1 for test; it has values in {split.min()}..{split.max()}.")
    counts = {"train": int((split == 0).sum()), "test": int((split == 1).sum())}
    return {name: count for name, count in counts.items() if count}


def _check_preprocess(preprocess: schemas.Preprocess | None, size: int) -> None:
    for name in ("mean", "std") if preprocess else ():
        values = getattr(preprocess, name)
        if isinstance(values, list) and len(values) != size:
            raise InvalidRequest(
                f"preprocess.{name} has {len(values)} entries; dimension 1 of the inputs has the size {size}."
            )


def _noun(model: type[Owner]) -> str:
    return {"Checkpoint": "checkpoint", "Probe": "probe", "FeatureSet": "feature set"}[model.__name__]

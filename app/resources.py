"""Checkpoints, probes and feature sets: created from an upload, read, deleted.

Code that starts to use a blob or removes it locks its row, so a file is removed only while nothing refers to it.
Modules that read files load with the first file, or once the service is up (`app.main`): it takes half a second.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app import checkpoints, deletion, models, schemas, shards, uploads
from app.database import read, write
from app.descriptions.preprocessing import given_preprocess
from app.errors import InUse, InvalidFile, InvalidRequest, NotFound, TooLarge, invalid_request
from app.files.foreign import refuse_foreign_file
from app.schemas.base import MAX_CLASSES
from app.settings import Settings
from app.storage import BlobDamaged, StagedFile, Storage, Upload

if TYPE_CHECKING:
    pass

_ORPHAN_SECONDS = 3600.0

Owner = models.Checkpoint | models.Probe | models.FeatureSet
OwnerType = TypeVar("OwnerType", models.Checkpoint, models.Probe, models.FeatureSet)
Spec = TypeVar("Spec", schemas.CheckpointSpec, schemas.ProbeSpec, schemas.FeatureSetSpec)
_HOLD_BLOB = sa.text(
    "INSERT INTO blobs (sha256, size_bytes) VALUES (:sha256, :size_bytes) "
    "ON CONFLICT (sha256) DO UPDATE SET size_bytes = excluded.size_bytes"
)
#: Every column that refers to a blob.
USES = (
    models.Checkpoint.sha256,
    models.Probe.sha256,
    models.FeatureSet.sha256,
    models.Checkpoint.tokenizer_sha256,
    models.Probe.tokenizer_sha256,
)


def create_checkpoint(engine: sa.Engine, storage: Storage, settings: Settings, upload: Upload) -> models.Checkpoint:
    """Store a checkpoint; its header is checked, its weights are not read (the worker does that)."""
    from app.files import archives, exported, tensorfile

    spec = parse_spec(schemas.CheckpointSpec, upload.spec, settings)
    if (made := _made_before(engine, models.Checkpoint, upload, spec)) is not None:
        return made
    _require_no_source(upload, spec)
    base = checkpoints.base_of(engine, spec)
    with (
        _received(engine, storage, upload, spec) as upload,
        _blob_path(engine, storage, upload, spec) as path,
        ExitStack() as stack,
    ):
        weights, sha256 = upload.file, _sha256(upload, spec)
        refuse_foreign_file(path)
        spec = checkpoints.completed(spec, upload.brought)
        if exported.is_exported_program(path):
            weights = _out_of_program(storage, path, stack)
            path, sha256 = weights.path, weights.sha256
        elif archives.is_archive(path):
            weights, spec = _out_of_archive(storage, settings, path, spec, stack)
            path, sha256 = weights.path, weights.sha256
        tokenizer = _staged_tokenizer(storage, settings, spec.tokenizer, stack)
        with tensorfile.in_turn(path):
            file = tensorfile.inspect_safetensors(path)
            described = (
                checkpoints.network_columns(engine, spec, file)
                if base is None
                else checkpoints.adapter_columns(engine, spec, file, base)
            )
            if spec.preprocess is not None:
                described["preprocess"] = given_preprocess(spec.preprocess)
            if tokenizer is not None:
                described["tokenizer_sha256"] = tokenizer.sha256
            checkpoint = models.Checkpoint(
                name=spec.name,
                sha256=sha256,
                size_bytes=path.stat().st_size,
                origin=upload.origin,
                metadata_=spec.metadata,
                **described,
            )
            # Free the parsed header before the next one is read.
            del file
        return _keep(engine, storage, [weights, tokenizer], checkpoint, upload)


def _require_no_source(upload: Upload, spec: schemas.CheckpointSpec | schemas.ProbeSpec) -> None:
    if spec.source is not None and upload.origin is None:
        raise InvalidRequest("The spec names a source, and there is a file beside it; give one of them.")


def create_probe(engine: sa.Engine, storage: Storage, settings: Settings, upload: Upload) -> models.Probe:
    """Store a probe dataset; labels and splits are read and checked, images and texts are not decoded."""
    from app.files import probedata

    spec = parse_spec(schemas.ProbeSpec, upload.spec, settings)
    if (made := _made_before(engine, models.Probe, upload, spec)) is not None:
        return made
    _require_no_source(upload, spec)
    with (
        _received(engine, storage, upload, spec) as upload,
        _blob_path(engine, storage, upload, spec) as path,
        ExitStack() as stack,
    ):
        tokenizer = _staged_tokenizer(storage, settings, spec.tokenizer, stack)
        probe = models.Probe(
            name=spec.name,
            sha256=_sha256(upload, spec),
            size_bytes=path.stat().st_size,
            **probedata.describe(path, spec, settings),
            tokenizer_sha256=None if tokenizer is None else tokenizer.sha256,
            origin=upload.origin,
            metadata_=spec.metadata,
        )
        return _keep(engine, storage, [upload.file, tokenizer], probe, upload)


def create_feature_set(engine: sa.Engine, storage: Storage, settings: Settings, upload: Upload) -> models.FeatureSet:
    """Store features, labels and head that were extracted elsewhere."""
    import numpy as np

    from app.files import identity, tensordata, tensorfile

    spec = parse_spec(schemas.FeatureSetSpec, upload.spec, settings)
    if (made := _made_before(engine, models.FeatureSet, upload, spec)) is not None:
        return made
    with _received(engine, storage, upload, spec) as upload, _blob_path(engine, storage, upload, spec) as path:
        file = tensorfile.inspect_safetensors(path)
        tensordata.require_known(file, {"features", "labels", "head", "head_bias", "logits", "split"})
        n_samples, n_features = tensordata.require_tensor(file, "features", tensorfile.FLOATING, rank=2).shape
        n_classes, _ = tensordata.require_tensor(file, "head", tensorfile.FLOATING, shape=(None, n_features)).shape
        if n_classes > MAX_CLASSES:
            raise InvalidFile(f"The head has {n_classes} rows; at most {MAX_CLASSES} classes are allowed.")
        if "head_bias" in file.tensors:
            tensordata.require_tensor(file, "head_bias", tensorfile.FLOATING, shape=(n_classes,))
        if "logits" in file.tensors:
            tensordata.require_tensor(file, "logits", tensorfile.FLOATING, shape=(n_samples, n_classes))
        values = tensordata.safetensors_values(path)
        labels = tensordata.read_labels(file, values, n_samples, n_classes=n_classes)
        feature_set = models.FeatureSet(
            name=spec.name,
            sha256=_sha256(upload, spec),
            size_bytes=path.stat().st_size,
            n_samples=n_samples,
            n_classes=n_classes,
            n_features=n_features,
            class_counts=np.bincount(labels, minlength=n_classes).tolist(),
            splits=tensordata.read_splits(file, values, n_samples),
            data_sha256=identity.hash_tensors(path, file),
            metadata_=spec.metadata,
        )
        return _keep(engine, storage, [upload.file], feature_set, upload)


def get(
    session: Session, model: type[OwnerType], id_: str, *, lock: Literal["share", "exclusive"] | None = None
) -> OwnerType:
    """Return one resource; if locked, it cannot be deleted before the transaction ends."""
    query = sa.select(model).where(model.id == id_)
    if lock is not None:
        query = query.with_for_update(read=lock == "share")
    row = session.scalars(query).one_or_none()
    if row is None:
        raise NotFound(f"There is no {noun_of(model)} {id_!r}.")
    return row


def delete(engine: sa.Engine, storage: Storage, model: type[OwnerType], id_: str) -> None:
    """Delete a resource, and its blob if nothing else refers to it.

    Raises:
        NotFound: the resource does not exist.
        InUse: an analysis that has not ended needs it, a baseline, or an adapter whose base it is.
    """
    analyses = models.Analysis
    places = models.AnalysisCheckpoint
    needs = {
        models.Checkpoint: analyses.id.in_(sa.select(places.analysis_id).where(places.checkpoint_id == id_)),
        models.Probe: analyses.probe_id == id_,
        models.FeatureSet: analyses.feature_set_id == id_,
    }[model]
    # Checked before anything is locked: an unavailable storage must not block writers to the database.
    storage.has("0" * 64)
    with write(engine) as session:
        row = get(session, model, id_, lock="exclusive")
        needed_by = session.scalars(sa.select(analyses.id).where(needs, analyses.outcome.is_(None)).limit(20))
        if ids := needed_by.all():
            raise InUse(
                f"The {noun_of(model)} is needed by {len(ids)} analyses that have not ended; cancel them or wait.",
                analysis_ids=list(ids),
            )
        adapters = sa.select(models.Checkpoint.id).where(models.Checkpoint.base_id == id_).limit(20)
        if model is models.Checkpoint and (ids := session.scalars(adapters).all()):
            raise InUse(
                f"The checkpoint is the base of {len(ids)} adapters; delete them first.", checkpoint_ids=list(ids)
            )
        deletion.require_no_baseline_on(session, noun_of(model), id_)
        remove(session, row)
    for sha256 in hashes_of(row):
        if release(engine, storage, sha256):
            _forget_features(storage, sha256)
    if isinstance(row, models.Probe) and row.data_sha256 is not None:
        with read(engine) as session:
            held = session.scalar(sa.select(sa.exists().where(models.Probe.data_sha256 == row.data_sha256)))
        if not held:
            _forget_features(storage, row.data_sha256)


def remove(session: Session, row: Owner) -> None:
    """Delete the row of a resource that the caller has locked; its blobs are then the caller's to `release`."""
    session.execute(sa.delete(models.MetadataEntry).where(models.MetadataEntry.resource_id == row.id))
    session.delete(row)
    session.flush()


def sweep(engine: sa.Engine, storage: Storage) -> None:
    """Remove what crashes left behind: abandoned and expired uploads, unused blobs, files without a row."""
    storage.remove_abandoned()
    uploads.sweep(engine, storage)
    unused = sa.select(models.Blob.sha256).where(*_no_use(models.Blob.sha256))
    with read(engine) as session:
        hashes = list(session.scalars(unused))
        known = set(session.scalars(sa.select(models.Blob.sha256)))
    for sha256 in hashes:
        release(engine, storage, sha256)
    # An upload stores its file moments before its row, so only old files are orphans.
    for sha256 in storage.blobs_older_than(_ORPHAN_SECONDS):
        if sha256 not in known:
            # With this row, a concurrent upload of the same file waits for its lock, or already uses it.
            with write(engine) as session:
                session.execute(_HOLD_BLOB, {"sha256": sha256, "size_bytes": 0})
            release(engine, storage, sha256)
    sweep_features(engine, storage)
    shards.tidy(engine, storage)


def sweep_features(engine: sa.Engine, storage: Storage) -> None:
    """Remove kept features of checkpoints and probes that are gone."""
    # Before the rows: whoever keeps features has had a row for its files.
    entries = storage.list_features()
    with read(engine) as session:
        known = set(session.scalars(sa.select(models.Blob.sha256)))
        known |= set(session.scalars(sa.select(models.Probe.data_sha256).where(models.Probe.data_sha256.is_not(None))))
    for entry in entries:
        if not entry.origins <= known:
            storage.delete_features(entry.name)


def _keep(
    engine: sa.Engine, storage: Storage, staged: Sequence[StagedFile | None], row: OwnerType, upload: Upload
) -> OwnerType:
    """Store the blobs, then insert the row: a crash in between leaves a file, never a row without its file."""
    files: dict[str, StagedFile] = {file.sha256: file for file in staged if file is not None}
    for file in files.values():
        storage.put(file)
    with write(engine) as session:
        if isinstance(row, models.Checkpoint) and row.base_id is not None:
            # Until this transaction ends nobody deletes it, nor the tokenizer that the adapter has from it.
            get(session, models.Checkpoint, row.base_id, lock="share")
        # Sorted, so that two uploads of the same files never wait for each other.
        for sha256 in sorted({row.sha256, *files}):
            if sha256 in files:
                # Locks the row against `release`, also if it exists already.
                session.execute(_HOLD_BLOB, {"sha256": sha256, "size_bytes": files[sha256].size_bytes})
            elif session.get(models.Blob, sha256, with_for_update=True) is None:
                raise NotFound(f"The service no longer holds a blob with the sha256 {sha256}.")
            if sha256 in files and not storage.has(sha256):
                storage.put(files[sha256])
        session.add(row)
        session.flush()
        session.add_all(models.MetadataEntry.entries(row.id, row.metadata_))
        if upload.use is not None:
            upload.use(session, row.id)
    return row


def release(engine: sa.Engine, storage: Storage, sha256: str) -> bool:
    """Delete a blob unless a row refers to it; return whether it has gone.

    Raises:
        StorageUnavailable: the file stays, and so does the blob's row, for the next sweep.
    """
    with write(engine) as session:
        blob = session.get(models.Blob, sha256, with_for_update=True)
        if blob is None or not session.scalar(sa.select(sa.and_(*_no_use(sha256)))):
            return False
        session.delete(blob)
        session.flush()
        storage.delete(sha256)
    return True


def _forget_features(storage: Storage, sha256: str) -> None:
    """Remove kept features of a checkpoint or of a probe's data."""
    for entry in storage.list_features():
        if sha256 in entry.origins:
            storage.delete_features(entry.name)


def _no_use(sha256: Any) -> list[sa.ColumnElement[bool]]:
    """Return conditions that are all true for a blob that no row refers to."""
    return [~sa.exists().where(column == sha256) for column in USES]


def hashes_of(row: Owner) -> list[str]:
    """Return the sha256 of the blobs that a resource has."""
    return [sha256 for sha256 in (row.sha256, getattr(row, "tokenizer_sha256", None)) if sha256 is not None]


def _staged_tokenizer(
    storage: Storage, settings: Settings, tokenizer: dict[str, Any] | None, stack: ExitStack
) -> StagedFile | None:
    """Stage a spec's tokenizer as a blob of its own, which checkpoints and probes share."""
    if tokenizer is None:
        return None
    if not isinstance(tokenizer.get("model"), dict):
        raise InvalidRequest("tokenizer must be the content of a tokenizer.json, which has a 'model'.")
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    if len(text) > settings.max_tokenizer_bytes:
        limit = settings.max_tokenizer_bytes
        raise TooLarge(f"The tokenizer has {len(text)} bytes; at most {limit} are allowed.", limit_bytes=limit)
    staged = stack.enter_context(storage.stage())
    staged.write(text)
    return staged


def _made_before(engine: sa.Engine, model: type[OwnerType], upload: Upload, spec: Spec) -> OwnerType | None:
    """Return what a resumable upload has become by the same call before, whose answer may have been lost."""
    if spec.upload_id is None:
        return None
    if upload.file is not None:
        raise InvalidRequest("The form has a part named 'file', and the spec names an upload; send one of them.")
    with read(engine) as session:
        id_ = uploads.used_for(session, spec.upload_id, upload.spec)
        return None if id_ is None else get(session, model, id_)


@contextmanager
def _received(engine: sa.Engine, storage: Storage, upload: Upload, spec: Spec) -> Iterator[Upload]:
    """Yield the upload, with the file of the resumable one that its spec names."""
    if spec.upload_id is None:
        yield upload
        return
    with uploads.whole_file(engine, storage, spec.upload_id) as file:
        yield Upload(upload.spec, file, partial(uploads.use, id_=spec.upload_id, spec=upload.spec))


@contextmanager
def _blob_path(engine: sa.Engine, storage: Storage, upload: Upload, spec: Spec) -> Iterator[Path]:
    """Yield the path of the uploaded file, or of the blob that `spec.sha256` names."""
    if upload.file is not None:
        upload.file.flush()
        if spec.sha256 not in (None, upload.file.sha256):
            found = upload.file.sha256
            raise InvalidFile(
                f"The file has the sha256 {found}, the spec says {spec.sha256}.", found=found, expected=spec.sha256
            )
        yield upload.file.path
        return
    if spec.sha256 is None:
        raise InvalidRequest(
            "The form has no part named 'file', and the spec names neither an upload_id nor the sha256 of a blob."
        )
    missing = NotFound(f"The service holds no blob with the sha256 {spec.sha256}; send the file.")
    with read(engine) as session:
        if session.get(models.Blob, spec.sha256) is None:
            raise missing
    try:
        with storage.local_copy(spec.sha256) as path:
            yield path
    except (FileNotFoundError, BlobDamaged):
        raise missing from None


def _out_of_archive(
    storage: Storage, settings: Settings, path: Path, spec: schemas.CheckpointSpec, stack: ExitStack
) -> tuple[StagedFile, schemas.CheckpointSpec]:
    """Return the weights of a Hugging Face folder as one staged file, and the spec, completed from the folder."""
    from app.files import archives

    unpacked_bytes = int(min(settings.max_upload_bytes, settings.max_unpacked_ratio * path.stat().st_size))
    with archives.open_folder(path, max_bytes=unpacked_bytes, of_adapter=spec.base_id is not None) as folder:
        weights = stack.enter_context(storage.stage())
        archives.write_weights(folder, weights)
    weights.flush()
    return weights, checkpoints.completed(
        spec, checkpoints.members_of(folder.config, folder.preprocessor, folder.tokenizer, folder.adapter)
    )


def _sha256(upload: Upload, spec: Spec) -> str:
    sha256 = upload.file.sha256 if upload.file else spec.sha256
    assert sha256 is not None, "_blob_path has seen to it"
    return sha256


def parse_spec(model: type[Spec], text: bytes, settings: Settings) -> Spec:
    """Return a spec.

    Raises:
        InvalidRequest: it has not its form.
        TooLarge: it is longer than allowed.
    """
    limit = settings.max_spec_bytes
    too_large = TooLarge(f"The spec has more than the {limit} bytes that are allowed.", limit_bytes=limit)
    # Only a tokenizer may make the text longer than the limit.
    if len(text) > limit and b'"tokenizer"' not in text:
        raise too_large
    try:
        spec = model.model_validate_json(text)
    except ValidationError as error:
        raise invalid_request("The spec", error.errors(), prefix="spec") from None
    if len(text) > limit and getattr(spec, "tokenizer", None) is None:
        raise too_large
    return spec


def _out_of_program(storage: Storage, path: Path, stack: ExitStack) -> StagedFile:
    """Return the weights and the graph of an exported program as one staged file."""
    from app.files import exported, tensorfile

    with tensorfile.in_turn(path):
        program = exported.read_program(path)
        weights = stack.enter_context(storage.stage())
        exported.write_program(path, program, weights)
    weights.flush()
    return weights


def noun_of(model: type[Owner]) -> str:
    return {"Checkpoint": "checkpoint", "Probe": "probe", "FeatureSet": "feature set"}[model.__name__]

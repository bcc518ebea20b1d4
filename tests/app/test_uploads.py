"""Resumable uploads beside real databases and files: what the offset is after a crash, and what is swept."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from app import models, uploads
from app.database import write
from app.errors import ChecksumMismatch, NotFound, OffsetDiffers, TooLarge, UploadBusy
from app.settings import Settings
from app.staging import boot_id
from app.storage import Storage, StorageFull, StorageUnavailable
from app.uploads import Append, Checksum

CONTENT = os.urandom(1_000_000)


@pytest.fixture
def settings(empty_database: Settings) -> Settings:
    return empty_database


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings)


@pytest.fixture
def upload(engine: sa.Engine, storage: Storage, settings: Settings) -> models.Upload:
    """Begin an upload of CONTENT."""
    return uploads.create(engine, storage, settings, len(CONTENT), None)


@pytest.fixture
def appending(engine: sa.Engine, storage: Storage, settings: Settings, upload: models.Upload) -> Callable[..., Append]:
    """Return a function that begins an addition to the upload."""
    return lambda offset, checksum=None: Append(engine, storage, settings, upload.id, offset, checksum)


def _set(engine: sa.Engine, id_: str, **values: object) -> None:
    with write(engine) as session:
        session.execute(sa.update(models.Upload).where(models.Upload.id == id_).values(values))


def _file(settings: Settings, upload: models.Upload) -> Path:
    return settings.data_dir / "blobs" / "staging" / f"{upload.id}.upload"


def test_after_a_crash_of_the_machine_only_synced_bytes_count(
    engine: sa.Engine, storage: Storage, settings: Settings, upload: models.Upload, appending: Callable[..., Append]
) -> None:
    """What lies beyond the synced offset is taken while the machine runs on, and not once it has started anew."""
    with appending(0) as addition:
        addition.write(CONTENT[:1000])
        addition.finish()
    for boot, expected in (("another", 1000), (None, 1000), (boot_id(), 1500)):
        with _file(settings, upload).open("ab") as file:
            file.write(CONTENT[1000:1500])
        _set(engine, upload.id, boot=boot)
        assert uploads.get(engine, storage, upload.id).offset_bytes == expected
        assert _file(settings, upload).stat().st_size == expected
    with appending(1500) as addition:
        addition.write(CONTENT[1500:])
        addition.finish()
    with uploads.whole_file(engine, storage, upload.id) as whole:
        assert whole.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_more_than_is_lacking_is_refused_whichever_batch_brings_it(
    storage: Storage, upload: models.Upload, appending: Callable[..., Append]
) -> None:
    """A batch that alone would fit is too much after others: nothing of the request is kept, nor put in its place."""
    with appending(0) as addition:
        addition.write(CONTENT[:10])
        addition.finish()
    with appending(10) as addition:
        addition.write(CONTENT[10:-5])
        with pytest.raises(TooLarge) as caught:
            addition.write(CONTENT[:20])
    assert caught.value.members["limit_bytes"] == len(CONTENT) - 10
    with storage.partial(upload.id) as file:
        assert file.path.read_bytes() == CONTENT[:10]


def test_lost_bytes_are_asked_for_again(
    engine: sa.Engine, storage: Storage, settings: Settings, upload: models.Upload, appending: Callable[..., Append]
) -> None:
    """If the disk has less than the offset says, the offset goes back; the hash too."""
    with appending(0) as addition:
        addition.write(CONTENT)
        addition.finish()
    os.truncate(_file(settings, upload), 400_000)
    assert uploads.get(engine, storage, upload.id).offset_bytes == 400_000
    with pytest.raises(OffsetDiffers), appending(len(CONTENT)):
        pass
    with appending(400_000) as addition:
        addition.write(CONTENT[400_000:])
        assert addition.finish().offset_bytes == len(CONTENT)
    with uploads.whole_file(engine, storage, upload.id) as whole:
        assert whole.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_failed_sync_takes_nothing_for_kept(
    engine: sa.Engine,
    storage: Storage,
    settings: Settings,
    upload: models.Upload,
    appending: Callable[..., Append],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an error of fsync the bytes since the last one are dropped: nobody knows what the disk has of them."""
    with appending(0) as addition:
        addition.write(CONTENT[:1000])
        addition.finish()

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with appending(1000) as addition:
        addition.write(CONTENT[1000:2000])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(StorageUnavailable):
                addition.finish()
    assert uploads.get(engine, storage, upload.id).offset_bytes == 1000
    with appending(1000) as addition:
        addition.write(CONTENT[1000:])
        addition.finish()
    with uploads.whole_file(engine, storage, upload.id) as whole:
        assert whole.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_offset_moves_while_one_request_brings_much(
    engine: sa.Engine,
    storage: Storage,
    upload: models.Upload,
    appending: Callable[..., Append],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long request is synced on the way, and HEAD tells so while it writes; one with a checksum is not."""
    monkeypatch.setattr(uploads, "_SYNC_BYTES", 300_000)
    with appending(0) as addition:
        for start in range(0, 800_000, 100_000):
            addition.write(CONTENT[start : start + 100_000])
        assert uploads.get(engine, storage, upload.id).offset_bytes == 600_000
        with pytest.raises(UploadBusy), appending(600_000):
            pass
    rest = CONTENT[800_000:]
    with appending(800_000, Checksum("sha256", hashlib.sha256(rest).digest())) as addition:
        addition.write(rest)
        assert uploads.get(engine, storage, upload.id).offset_bytes == 800_000
        assert addition.finish().offset_bytes == len(CONTENT)


def test_bytes_with_a_checksum_are_not_hashed_twice(
    engine: sa.Engine, storage: Storage, upload: models.Upload, appending: Callable[..., Append]
) -> None:
    """Bytes that were refused leave no trace in the hash of the file; nor does an end without all of them."""
    wrong = Checksum("sha1", bytes(20))
    for complete in (True, False):
        with appending(0, wrong) as addition:
            addition.write(CONTENT[5000:])
            if complete:
                with pytest.raises(ChecksumMismatch):
                    addition.finish()
            else:
                assert addition.finish(complete=False).offset_bytes == 0
    with appending(0) as addition:
        addition.write(CONTENT)
        addition.finish()
    assert storage._hashed[upload.id].size_bytes == len(CONTENT)
    with uploads.whole_file(engine, storage, upload.id) as whole:
        assert whole.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_hash_goes_on_from_what_this_process_has(
    engine: sa.Engine, settings: Settings, storage: Storage, upload: models.Upload, appending: Callable[..., Append]
) -> None:
    """A process hashes what came through it; of an upload of several processes the one that uses it reads the rest."""
    with appending(0) as addition:
        addition.write(CONTENT[:600_000])
        addition.finish()
    other = Storage(settings)
    with Append(engine, other, settings, upload.id, 600_000) as addition:
        addition.write(CONTENT[600_000:])
        addition.finish()
    assert storage._hashed[upload.id].size_bytes == 600_000
    assert other._hashed[upload.id].size_bytes == 0
    for process in (storage, other):
        with process.partial(upload.id) as file:
            file.hash_rest()
            assert file.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_lock_ends_with_its_process(settings: Settings, upload: models.Upload, storage: Storage) -> None:
    """A process that is killed while it writes locks nobody out."""
    storage.partial(upload.id, create=True).close()
    script = (
        "import sys, time; from pathlib import Path\n"
        "from app.storage import Storage; from app.settings import Settings\n"
        "held = Storage(Settings(data_dir=Path(sys.argv[1]))).partial(sys.argv[2]); print(1, flush=True)\n"
        "time.sleep(60)"
    )
    arguments = [sys.executable, "-c", script, str(settings.data_dir), upload.id]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(BlockingIOError):
            storage.partial(upload.id)
        process.kill()
        process.wait()
    storage.partial(upload.id).close()


def test_only_what_nobody_needs_is_swept(
    engine: sa.Engine, storage: Storage, settings: Settings, upload: models.Upload, appending: Callable[..., Append]
) -> None:
    """Expired uploads go, and files of none; those that are open or being written stay."""
    with appending(0) as addition:
        addition.write(CONTENT[:1000])
        addition.finish()
    orphan = _file(settings, upload).with_name("00000000-0000-0000-0000-000000000000.upload")
    orphan.write_bytes(b"x")
    uploads.sweep(engine, storage)
    assert storage.partials() == [upload.id]
    past = upload.expires_at - timedelta(days=2)
    with appending(1000) as addition:
        _set(engine, upload.id, expires_at=past)
        uploads.sweep(engine, storage)
        assert storage.partials() == [upload.id]
        addition.write(CONTENT[1000:2000])
        addition.finish()
    assert uploads.get(engine, storage, upload.id).offset_bytes == 2000
    _set(engine, upload.id, expires_at=past)
    uploads.sweep(engine, storage)
    assert storage.partials() == []
    with pytest.raises(NotFound):
        uploads.get(engine, storage, upload.id)


def test_file_of_a_resource_is_swept(
    engine: sa.Engine, storage: Storage, upload: models.Upload, appending: Callable[..., Append]
) -> None:
    """What is left of an upload whose process died between its resource's row and the removal of its file goes."""
    with appending(0) as addition:
        addition.write(CONTENT)
        addition.finish()
    with write(engine) as session:
        uploads.use(session, "made", id_=upload.id, spec=b"{}")
    uploads.sweep(engine, storage)
    assert storage.partials() == []
    assert uploads.get(engine, storage, upload.id).resource_id == "made"
    with pytest.raises(NotFound), write(engine) as session:
        uploads.use(session, "again", id_=upload.id, spec=b"{}")


def test_full_disk_keeps_what_was_kept(
    engine: sa.Engine,
    storage: Storage,
    upload: models.Upload,
    appending: Callable[..., Append],
) -> None:
    """A write that finds no room is an error, and the upload goes on from what fitted."""
    with appending(0) as addition:
        addition.write(CONTENT[:1000])
        addition.finish()

    class Full:
        """A file on a full disk that takes half of what it is given."""

        def __init__(self, file: object) -> None:
            self._of = file
            self._taken = False

        def write(self, data: memoryview) -> int:
            if self._taken:
                raise OSError(28, "No space left on device")
            self._taken = True
            return int(self._of.write(data[: len(data) // 2]))  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self._of, name)

    with appending(1000) as addition:
        addition._file._file = Full(addition._file._file)  # type: ignore[assignment]
        with pytest.raises(StorageFull):
            addition.write(CONTENT[1000:3000])
    offset = uploads.get(engine, storage, upload.id).offset_bytes
    assert 1000 <= offset <= 2000
    with appending(offset) as addition:
        addition.write(CONTENT[offset:])
        addition.finish()
    with uploads.whole_file(engine, storage, upload.id) as whole:
        assert whole.sha256 == hashlib.sha256(CONTENT).hexdigest()

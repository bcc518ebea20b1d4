"""A folder of class folders as the one file that the service takes."""

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def zipped_folder(folder: Path) -> Iterator[Path]:
    """A zip of a folder, uncompressed, as images are already; it is gone at the end of the block.

    Links are followed, once: what is sent are files. Empty folders go along, so that a class without images is noticed.

    Raises:
        OSError: a file cannot be read, or there is no room for the zip.
    """
    with tempfile.TemporaryDirectory(prefix="interplay-") as place:
        archive_path = Path(place) / "folder.zip"
        with zipfile.ZipFile(archive_path, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
            seen = {folder.resolve()}
            for root, folders, files in os.walk(folder, followlinks=True):
                # A link to a folder above would never end.
                folders[:] = sorted(name for name in folders if _is_new(Path(root, name), seen))
                inside = Path(root).relative_to(folder)
                if not files and not folders and inside.parts:
                    archive.writestr(f"{inside.as_posix()}/", b"")
                for name in sorted(files):
                    archive.write(Path(root, name), (inside / name).as_posix())
        yield archive_path


def _is_new(folder: Path, seen: set[Path]) -> bool:
    real = folder.resolve()
    new = real not in seen
    seen.add(real)
    return new

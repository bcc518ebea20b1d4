"""A folder of images or of a checkpoint as the one file that the service takes."""

import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a folder says of its network, its images and its texts.
_DESCRIPTIONS = ("config.json", "preprocessor_config.json", "tokenizer.json", "adapter_config.json")


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


@contextmanager
def packed_checkpoint(folder: Path) -> Iterator[Path]:
    """A tar of what a Hugging Face folder says of its network, and of its weights; it is gone at the end of the block.

    The same files give the same tar. Other formats of the weights, histories and caches stay behind.

    Raises:
        FileNotFoundError: the folder holds no safetensors file.
        OSError: a file cannot be read, or there is no room for the tar.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    if not weights:
        if "adapter_config.json" in names:
            raise FileNotFoundError(
                f"{folder} is an adapter (PEFT) and no network by itself: merge it into its base, and push what "
                "merge_and_unload().save_pretrained(OUT) writes"
            )
        found = ", ".join(names[:10]) or "nothing"
        raise FileNotFoundError(f"{folder} holds no safetensors file (it holds {found})")
    described = [name for name in names if name in _DESCRIPTIONS]
    with tempfile.TemporaryDirectory(prefix="interplay-") as place:
        archive_path = Path(place) / "checkpoint.tar"
        with tarfile.open(archive_path, "w") as archive:
            for name in (*described, *weights):
                # Links are followed, as caches of downloads are full of them.
                file = (folder / name).resolve()
                info = tarfile.TarInfo(name)
                info.size = file.stat().st_size
                with file.open("rb") as opened:
                    archive.addfile(info, opened)
        yield archive_path


def _is_new(folder: Path, seen: set[Path]) -> bool:
    real = folder.resolve()
    new = real not in seen
    seen.add(real)
    return new

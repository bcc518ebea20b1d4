"""Pack a folder of images or of a checkpoint into the single file that the service accepts."""

import json
import os
import shlex
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unicodedata import normalize

# Files that describe a folder's network, its images and its texts.
ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DESCRIPTIONS = ("config.json", "preprocessor_config.json", "tokenizer.json", ADAPTER_CONFIG)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = ("optim", "sched", "scaler", "rng_state", "training_args")
# Files that file managers leave behind; as in app/files/datafile/folders.py.
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")
# The earliest time that a zip can store, and the system whose file permissions it stores.
_NO_TIME, _UNIX = (1980, 1, 1, 0, 0, 0), 3
_COPY_BYTES = 2**20


@contextmanager
def zipped_folder(folder: Path) -> Iterator[Path]:
    """Yield a zip of a folder, uncompressed, since images are compressed already; it is deleted after the block.

    The same names and contents give the same zip, wherever and whenever: it has no times, permissions or owners of
    files and omits files that file managers add. Links are followed, once, since files are sent. Empty folders are
    included, so that a class without images is noticed. Names have Unicode's composed form (NFC) and are sorted by it,
    since a Mac's are decomposed.

    Raises:
        OSError: a file cannot be read, or there is no room for the zip.
    """
    with tempfile.TemporaryDirectory(prefix="interplay-") as place:
        archive_path = Path(place) / "folder.zip"
        with zipfile.ZipFile(archive_path, "w", zipfile.ZIP_STORED) as archive:
            seen = {folder.resolve()}
            for root, folders, files in os.walk(folder, followlinks=True):
                # A link to a parent folder would never end. Of two links to one folder the first by name is followed.
                folders[:] = [name for name in _kept(folders) if _is_new(Path(root, name), seen)]
                files = _kept(files)
                inside = Path(root).relative_to(folder)
                if not files and not folders and inside.parts:
                    archive.writestr(_entry(_composed(f"{inside.as_posix()}/"), 0o40755), b"")
                for name in files:
                    _add(archive, Path(root, name), _composed((inside / name).as_posix()))
        yield archive_path


@contextmanager
def packed_checkpoint(folder: Path, *, adapter: bool = False) -> Iterator[Path]:
    """Yield a tar of a Hugging Face folder's descriptions and weights; it is deleted after the block.

    The same files give the same tar. Other formats of the weights, histories and caches are omitted.

    Args:
        folder: the folder.
        adapter: whether an adapter's files are wanted, and not a network's.

    Raises:
        FileNotFoundError: the folder holds no safetensors file, or the other of an adapter and a network.
        OSError: a file cannot be read, or there is no room for the tar.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    if adapter:
        weights = _adapter_weights(folder, names)
    elif ADAPTER_CONFIG in names and all(name.startswith("adapter_") for name in weights):
        merge = (
            "from peft import AutoPeftModel; "
            f"AutoPeftModel.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('OUT')"
        )
        raise FileNotFoundError(
            f"{folder} is an adapter (PEFT), not a whole network: give the network that it adapts, pushed before, as "
            f"its base: interplay push checkpoint {shlex.quote(str(folder))} --base NAME. Or merge both and push that: "
            f'python -c "{merge}" && interplay push checkpoint OUT'
        )
    if not weights:
        found = ", ".join(names[:10]) or "nothing"
        raise FileNotFoundError(f"{folder} contains no safetensors file (it contains {found}){_advice(folder, names)}")
    described = [name for name in names if name in _DESCRIPTIONS]
    with tempfile.TemporaryDirectory(prefix="interplay-") as place:
        archive_path = Path(place) / "checkpoint.tar"
        with tarfile.open(archive_path, "w") as archive:
            for name in (*described, *weights):
                # Links are followed, since download caches are full of them.
                file = (folder / name).resolve()
                info = tarfile.TarInfo(name)
                info.size = file.stat().st_size
                with file.open("rb") as opened:
                    archive.addfile(info, opened)
        yield archive_path


def adapter_beside(path: Path) -> dict[str, Any] | None:
    """Return the adapter_config.json beside a file of an adapter's tensors; None if there is none.

    Raises:
        OSError: it cannot be read, or is no JSON object.
    """
    config = path.parent / ADAPTER_CONFIG
    if not config.is_file():
        return None
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise OSError(f"{config} is no JSON object")
    return value


def _adapter_weights(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the name of the file with an adapter's tensors, for a folder that holds an adapter."""
    if ADAPTER_CONFIG not in names:
        raise FileNotFoundError(f"{folder} contains no {ADAPTER_CONFIG}: it is no adapter (PEFT), and has no base")
    if _ADAPTER_WEIGHTS in names:
        return [_ADAPTER_WEIGHTS]
    advice = ""
    if "adapter_model.bin" in names:
        source, target = folder / "adapter_model.bin", folder / _ADAPTER_WEIGHTS
        command = f"interplay convert {shlex.quote(str(source))} -o {shlex.quote(str(target))}"
        advice = f"; convert the pickle, which the service does not open, then push the folder again: {command}"
    raise FileNotFoundError(f"{folder} contains no {_ADAPTER_WEIGHTS}{advice}")


def _composed(name: str) -> str:
    return normalize("NFC", name)


def _advice(folder: Path, names: Sequence[str]) -> str:
    """Return advice to convert a folder's weights to safetensors, with the command; "" if they cannot be."""
    places = (folder, *sorted(path for path in folder.iterdir() if path.is_dir()))
    if distributed := [place for place in places if (place / ".metadata").is_file() and any(place.glob("*.distcp"))]:
        form, source, target = "of torch.distributed.checkpoint", distributed[0], Path("OUT.safetensors")
    elif any(name in names for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        form, source, target = "PyTorch pickles", folder, folder / "model.safetensors"
    elif pickled := [name for name in names if name.endswith(_PICKLES) and not name.startswith(_NO_WEIGHTS)]:
        form, source, target = "PyTorch pickles", folder / pickled[0], Path("OUT.safetensors")
    else:
        return ""
    command = f"interplay convert {shlex.quote(str(source))} -o {shlex.quote(str(target))}"
    again = "push the folder again" if target.parent == folder else f"push {target}"
    words = f". Its weights are {form}, which the service does not open; convert them to safetensors"
    return f"{words}, then {again}: {command}"


def _kept(names: Iterable[str]) -> list[str]:
    """Return names sorted, without hidden files and those of file managers; the service ignores these too."""
    known = (name for name in names if not name.startswith(".") and name not in _LITTER)
    return sorted(known, key=lambda name: (_composed(name), name))


def _add(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    entry = _entry(name, 0o100644)
    entry.file_size = path.stat().st_size  # the zip reserves space for the length of a large file before writing it
    with path.open("rb") as file, archive.open(entry, "w") as written:
        shutil.copyfileobj(file, written, _COPY_BYTES)


def _entry(name: str, mode: int) -> zipfile.ZipInfo:
    """Return a zip entry that holds nothing of the file's own time, permissions or system."""
    entry = zipfile.ZipInfo(name, date_time=_NO_TIME)
    entry.create_system, entry.external_attr = _UNIX, mode << 16
    return entry


def _is_new(folder: Path, seen: set[Path]) -> bool:
    real = folder.resolve()
    new = real not in seen
    seen.add(real)
    return new

"""Files with damaged headers for the functions that read uploads: each file must be accepted or refused."""

import io
import json
import random
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from app import schemas
from app.descriptions.adapters import check_adapter
from app.errors import ServiceError
from app.files import archives, datafile, exported, probedata, tensorfile
from app.files.foreign import rank_of_adapter
from app.files.weights import weight_names
from app.settings import Settings
from tests.datafiles import encoded, picture, zipped

SETTINGS = Settings(max_npz_bytes=2**26, max_unpacked_bytes=2**26, max_upload_bytes=2**26)
# Inserted by the damage: ends of ranges, signatures of other formats, texts that trip parsers.
_PIECES = (
    *(
        value.to_bytes(size, "little")
        for size in (2, 4, 8)
        for value in (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    ),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x93NUMPY", b"\x80\x02", b"{", b"}", b"[" * 300, b'"', b"\\u0000"),
    *(b"-1", b"1e999", b"NaN", b"null", b"true", b"9" * 400, b"\xed\xa0\x80", b"\xff\xfe", b"../../", b"\x00"),
)


PROGRAM = Path(__file__).parents[1] / "app" / "files" / "programs" / "torch-2.13.0.pt2"


@dataclass(frozen=True)
class Fault:
    """An error that an upload would have answered with 500."""

    seed: int
    kind: str
    door: str
    traceback: str


def originals() -> dict[str, bytes]:
    """Return small valid files, by kind."""
    arrays: dict[str, Any] = {
        "inputs": np.zeros((4, 3), np.float32),
        "labels": np.array([0, 1, 0, 1]),
        "split": np.zeros(4, np.uint8),
    }
    npz, packed, tar = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, **arrays)
    np.savez_compressed(packed, **arrays)
    weights = save({"layer.weight": np.ones((2, 3), np.float32)}, metadata={"format": "pt"})
    folder = {"config.json": json.dumps({"model_type": "vit"}).encode(), "model.safetensors": weights}
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        for name, content in folder.items():
            info = tarfile.TarInfo(f"net/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    parts = {"lora_A": np.ones((2, 3), np.float32), "lora_B": np.ones((2, 2), np.float32)}
    tensors = save({f"base_model.model.layer.{part}.weight": array for part, array in parts.items()})
    described = {"peft_type": "LORA", "r": 2, "rank_pattern": {"layer": 2}, "target_modules": ["layer"], "bias": "none"}
    adapter = {"adapter_config.json": json.dumps(described).encode(), "adapter_model.safetensors": tensors}
    pictures = {f"{name}/{i}.png": encoded(picture(i, 4, 3)) for name in ("cat", "dog") for i in range(2)}
    return {
        "safetensors": save(arrays),
        "npz": npz.getvalue(),
        "npz, compressed": packed.getvalue(),
        "zip of a folder": zipped(folder, compression=zipfile.ZIP_DEFLATED),
        "tar of a folder": tar.getvalue(),
        "zip of an adapter": zipped(adapter),
        "zip of images": zipped(pictures),
        "exported program": PROGRAM.read_bytes(),
        "csv": b'text,label\n"a, b",x\nc,y\n',
        "json lines": b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n',
    }


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return the content with parts changed, removed, inserted or repeated."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        # Most of a file's metadata stands at one of its ends.
        near = chance.choice((16, 64, 512, len(changed) + 1))
        at = min(chance.randrange(near), max(len(changed) - 1, 0))
        at = at if chance.random() < 0.6 else max(len(changed) - 1 - at, 0)
        match chance.randrange(5):
            case 0:
                changed[at : at + 1] = bytes((chance.randrange(256),))
            case 1:
                piece = chance.choice(_PIECES)
                changed[at : at + len(piece)] = piece
            case 2:
                changed[at:at] = chance.choice(_PIECES)
            case 3:
                del changed[at : at + chance.choice((1, 2, 8, 100))]
            case _:
                changed[at:at] = changed[at : at + chance.choice((1, 8, 46))]
    return bytes(changed)


def _as_checkpoint(path: Path) -> None:
    if exported.is_exported_program(path):
        exported.write_program(path, exported.read_program(path), io.BytesIO())
        return
    if not archives.is_archive(path):
        weight_names(tensorfile.inspect_safetensors(path).tensors)
        return
    with archives.open_folder(path, max_bytes=2**26) as folder:
        archives.write_weights(folder, io.BytesIO())


def _as_adapter(path: Path) -> None:
    if not archives.is_archive(path):
        rank_of_adapter(tensorfile.inspect_safetensors(path).tensors)
        return
    with archives.open_folder(path, max_bytes=2**26, of_adapter=True) as folder:
        with path.with_suffix(".weights").open("wb") as weights:
            archives.write_weights(folder, weights)
        assert folder.adapter is not None, "every adapter's folder has one"
        rank_of_adapter(tensorfile.inspect_safetensors(path.with_suffix(".weights")).tensors)
        schemas.Adapter.model_validate({**check_adapter(folder.adapter), "rank": 1})


def _as_probe(path: Path) -> None:
    # Another process reads Parquet, as a file may crash it.
    if datafile.detect(path, datafile.Limits.of(SETTINGS)) != "parquet":
        probedata.describe(path, schemas.ProbeSpec(name="a"), SETTINGS)


DOORS: dict[str, Callable[[Path], None]] = {
    "checkpoint": _as_checkpoint, "adapter": _as_adapter, "probe": _as_probe,
}  # fmt: skip


def campaign(folder: Path, seed: int, *, count: int, seconds: float = float("inf")) -> tuple[int, list[Fault]]:
    """Pass damaged files to every reader; return their number and the faults, each kind of fault once."""
    kinds = originals()
    path = folder / "file"
    deadline = time.monotonic() + seconds
    faults: dict[str, Fault] = {}
    done = 0
    while done < count and time.monotonic() < deadline:
        chance = random.Random(seed + done)
        kind = chance.choice(list(kinds))
        path.write_bytes(damaged(kinds[kind], chance))
        for door, enter in DOORS.items():
            try:
                enter(path)
            except ServiceError:
                pass
            except Exception as error:  # noqa: BLE001  whatever it is, it is a fault
                where = traceback.extract_tb(error.__traceback__)[-1]
                fault = Fault(seed + done, kind, door, traceback.format_exc())
                faults.setdefault(f"{type(error).__name__} {where.filename} {where.lineno}", fault)
        done += 1
    return done, list(faults.values())

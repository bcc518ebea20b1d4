"""Realistic files of probe data: Parquet, zips of class folders, images of every format."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file


def picture(seed: int, width: int = 40, height: int = 32, mode: str = "RGB") -> Image.Image:
    """Return an image that is smooth in places and noisy in others, so that filters differ on it."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = 127 + 80 * np.sin(x[..., None] / (2 + seed % 5) + np.arange(3)) * np.cos(y[..., None] / 7)
    noise = generator.normal(scale=25, size=(height, width, 3)) * (x > width // 2)[..., None]
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return the image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG that announces the given number of pixels and holds hardly any bytes."""
    content = bytearray(encoded(Image.new("L", (1, 1))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def zipped(files: Mapping[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of these files; a name that ends with / is a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def nameless(content: bytes) -> bytes:
    """Return a zip whose last entry, named by one letter, is nameless in the list: the letter is an extra field."""
    at = content.rindex(b"PK\x01\x02") + 28
    assert content[at : at + 4] == bytes((1, 0, 0, 0))
    return content[:at] + bytes((0, 0, 1, 0)) + content[at + 4 :]


def parquet(
    columns: Mapping[str, Sequence[Any] | pa.Array], *, names: Mapping[str, Sequence[str]] | None = None, **options: Any
) -> bytes:
    """Return a Parquet file; `names` are ClassLabels by column, as Hugging Face's `datasets` writes them."""
    table = pa.table(dict(columns))
    if names is not None:
        features = {column: {"names": list(given), "_type": "ClassLabel"} for column, given in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def image_column(contents: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> pa.Array:
    """Return images as `datasets` stores them: a struct of bytes and path."""
    rows = [
        {"bytes": content, "path": path}
        for content, path in zip(contents, paths or [None] * len(contents), strict=True)
    ]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def saved(content: bytes, folder: Path, name: str = "file") -> Path:
    """Save the content as a file whose name shows no format; return its path."""
    path = folder / name
    path.write_bytes(content)
    return path


def mlp_adapter(folder: Path, *, seed: int = 0, rank: int = 2, **config: Any) -> Path:
    """Write the files of an adapter of the MLP that tests share, as PEFT saves them; return their folder."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"layers.0.lora_A": (rank, 64), "layers.0.lora_B": (32, rank)}
    tensors = {
        f"base_model.model.{name}.weight": generator.normal(scale=0.2, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["layers.0"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder

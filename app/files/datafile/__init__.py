"""Untrusted datasets of images or texts: Parquet, a zip of Parquet or of class folders, CSV, JSON lines.

No torch, no decoding.

A file's format is detected from its first bytes, never from its name. Structure, labels and splits are read and checked
here; images and texts are returned as bytes, and the caller decodes them. Rows are counted from 0.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from app.errors import InvalidFile
from app.files import zips
from app.files.datafile import folders, lines, table
from app.files.datafile.dataset import Dataset, Format, Limits

__all__ = ["Dataset", "Format", "Limits", "detect", "open_dataset"]

_LOOKED_AT_BYTES = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# No CSV header begins like this.
_JSON_ARRAY = re.compile(rb"\[\s*([\[\]{\"]|-?[0-9])")
_OPEN: dict[Format, Callable[[Path, Limits, Mapping[str, str | None]], Dataset]] = {
    "parquet": table.open_parquet,
    "imagefolder": folders.open_folders,
    "csv": lines.open_csv,
    "jsonl": lines.open_jsonl,
}


def detect(path: Path, limits: Limits) -> Format | None:
    """Return which of these formats a file has, by its first bytes; None for any other, for example tensors.

    A zip is a dataset unless it is an npz, which holds only .npy files. It is a Parquet dataset if it holds Parquet
    files, else one of images.

    Raises:
        InvalidFile: a zip whose list of files cannot be read, is over the limits, or leads elsewhere; a JSON array.
    """
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT_BYTES)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        names = [member.name for member in zips.members(path, limits.members) if not member.is_folder]
        if all(name.endswith(".npy") for name in names):
            return None
        return "parquet" if any(map(table.is_shard, names)) else "imagefolder"
    # The length of a safetensors header has zero bytes; text has none.
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if b"\0" in start or not text:
        return None
    if text.startswith(b"{"):
        return "jsonl"
    if _JSON_ARRAY.match(text):
        raise InvalidFile(
            "The file is an array of JSON. Send JSON lines, an object in each line, as jq -c '.[]' and pandas' "
            "to_json(orient='records', lines=True) write them."
        )
    return "csv" if lines.begins_as_csv(text.decode(errors="replace")) else None


def open_dataset(
    path: Path, format: Format, limits: Limits, columns: Mapping[str, str | None] | None = None
) -> Dataset:
    """Check a file's structure, labels and splits.

    Args:
        path: the file, which must exist as long as the dataset is read.
        format: as returned by `detect`.
        limits: checked before anything is unpacked.
        columns: names by role (image, text, label, split), where they are not the usual ones; null for missing labels.

    Raises:
        InvalidFile: the file is broken, incomplete or over a limit; names the row if the error is in one row.
    """
    if columns and format == "imagefolder":
        raise InvalidFile("A zip of class folders has no columns: folders are the classes. Leave 'columns' out.")
    return _OPEN[format](path, limits, columns or {})

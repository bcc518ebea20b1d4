"""Datasets of images or texts from strangers: Parquet, a zip of Parquet or of class folders, CSV, JSON lines.

No torch, no decoding.

What is in a file is found by its first bytes, never by its name. Structure, labels and splits are read and checked
here; images and texts are handed out as bytes to whoever decodes them. Rows are counted from 0.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from app import zips
from app.datafile import folders, lines, table
from app.datafile.dataset import USUAL_COLUMNS, Dataset, Format, Limits
from app.errors import InvalidFile

__all__ = ["Dataset", "Format", "Limits", "detect", "open_dataset"]

_LOOKED_AT_BYTES = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OPEN: dict[Format, Callable[[Path, Limits, Mapping[str, str | None]], Dataset]] = {
    "parquet": table.open_parquet,
    "imagefolder": folders.open_folders,
    "csv": lines.open_csv,
    "jsonl": lines.open_jsonl,
}


def detect(path: Path, limits: Limits) -> Format | None:
    """Which of these formats a file has, as far as its first bytes say; None for any other, such as tensors.

    A zip is a dataset unless it is an npz, which holds .npy files alone: of Parquet files where it holds such, else of
    images.

    Raises:
        InvalidFile: a zip whose list of files cannot be read, is over the limits, or leads elsewhere.
    """
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT_BYTES)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        names = [member.filename for member in zips.members(path, limits.members) if not member.is_dir()]
        if all(name.endswith(".npy") for name in names):
            return None
        return "parquet" if any(map(table.is_shard, names)) else "imagefolder"
    # The length of a safetensors header has zero bytes; text has none.
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if b"\0" in start or not text:
        return None
    if text.startswith(b"{"):
        return "jsonl"
    first_line = text.splitlines()[0]
    # A column of texts alone has no delimiter, and is told by its name.
    alone = first_line.strip().strip(b'"').decode(errors="replace") in USUAL_COLUMNS["text"]
    return "csv" if alone or any(delimiter in first_line for delimiter in lines.DELIMITERS) else None


def open_dataset(
    path: Path, format: Format, limits: Limits, columns: Mapping[str, str | None] | None = None
) -> Dataset:
    """Check a file's structure, labels and splits.

    Args:
        path: the file, which must be there as long as the dataset is read.
        format: as `detect` gave it.
        limits: what is refused before it is unpacked.
        columns: names by role (image, text, label, split), where they are not the usual ones; of labels null where
            there are none.

    Raises:
        InvalidFile: what is missing, broken or over a limit, by row where it is one row's.
    """
    if columns and format == "imagefolder":
        raise InvalidFile("A zip of class folders has no columns: folders are the classes. Leave 'columns' out.")
    return _OPEN[format](path, limits, columns or {})

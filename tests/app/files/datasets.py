"""Shared helpers of tests of datasets: opening, refusal and reading of files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidFile
from app.files.datafile import Dataset, Limits, detect, open_dataset
from app.settings import Settings
from tests.datafiles import encoded, picture, saved

LIMITS = Limits.of(Settings())
PICTURES = [encoded(picture(seed, 6, 5)) for seed in range(6)]
IMAGE = PICTURES[0]


def opened(
    content: bytes, folder: Path, limits: Limits = LIMITS, columns: Mapping[str, str | None] | None = None
) -> Dataset:
    path = saved(content, folder, "a.bin")
    format = detect(path, limits)
    assert format is not None
    return open_dataset(path, format, limits, columns)


def refused(content: bytes, folder: Path, limits: Limits = LIMITS, **columns: str | None) -> InvalidFile:
    """Return why a file is refused when it is opened or read."""

    def read() -> None:
        dataset = opened(content, folder, limits, columns or None)
        list(dataset.read(range(dataset.n_rows)))

    with pytest.raises(InvalidFile) as raised:
        read()
    return raised.value


def labels_of(dataset: Dataset) -> list[int]:
    assert dataset.labels is not None
    return [int(label) for label in dataset.labels]


def contents_of(dataset: Dataset, rows: Any = None) -> list[bytes]:
    return [content for _, content in dataset.read(range(dataset.n_rows) if rows is None else rows)]

"""The common form of all dataset formats: labels, splits, and files or texts by row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from app.errors import InvalidFile
from app.settings import Settings

Format = Literal["parquet", "imagefolder", "csv", "jsonl"]
Content = Literal["images", "texts"]

MAX_IMAGE_BYTES = 256 * 2**20
# Longer than any tokenizer keeps; also the longest field that Python's csv accepts.
MAX_TEXT_CHARACTERS = 131_072

#: By role, the names by which a column is found if the caller gives none.
USUAL_COLUMNS = {
    "image": ("image", "img"),
    "text": ("text", "sentence", "content"),
    "label": ("label", "labels", "fine_label"),
    "split": ("split",),
}


@dataclass(frozen=True)
class Limits:
    """Limits on a file, checked before it is unpacked."""

    rows: int
    members: int
    unpacked_bytes: int
    ratio: float
    text_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """Return the limits that the operator has set."""
        return cls(
            rows=settings.max_rows,
            members=settings.max_members,
            unpacked_bytes=settings.max_unpacked_bytes,
            ratio=settings.max_unpacked_ratio,
            text_bytes=settings.max_text_bytes,
        )

    def check_unpacked(self, what: str, unpacked_bytes: int, packed_bytes: int) -> None:
        """Raise InvalidFile if a file announces an unpacked size over the limits."""
        if unpacked_bytes > self.unpacked_bytes:
            raise InvalidFile(
                f"The {what} would unpack to {unpacked_bytes} bytes; at most {self.unpacked_bytes} are allowed."
            )
        if unpacked_bytes > self.ratio * packed_bytes:
            raise InvalidFile(
                f"The {what} would unpack to {unpacked_bytes / max(packed_bytes, 1):.0f} times its size; at most "
                f"{self.ratio:g} times is allowed."
            )

    def check_rows(self, n_rows: int) -> None:
        """Raise InvalidFile if there are no rows, or too many."""
        if n_rows == 0:
            raise InvalidFile("The file has no rows.")
        if n_rows > self.rows:
            raise InvalidFile(f"The file has {n_rows} rows or more; at most {self.rows} are allowed.")


@dataclass(frozen=True)
class Dataset:
    """A dataset whose structure has been checked; its images have not been decoded.

    Attributes:
        format: of the file.
        content: of each row: images or texts.
        n_rows: number of rows.
        labels: 0 .. C - 1, one a row; as stored if they are integers; None for texts without labels.
        split: 0 train, 1 test; None without splits.
        class_names: in the order of the labels, if the file has them.
        columns: names by role, null for missing labels; None for a zip of class folders.
        read: yields name (may be empty) and content of the requested rows, in rising order; texts as UTF-8.
    """

    format: Format
    content: Content
    n_rows: int
    labels: npt.NDArray[np.int64] | None
    split: npt.NDArray[np.int64] | None
    class_names: list[str] | None
    columns: dict[str, str | None] | None
    read: Callable[[Sequence[int]], Iterator[tuple[str, bytes]]]


def choose_columns(available: Sequence[str], named: Mapping[str, str | None], roles: Sequence[str]) -> dict[str, str]:
    """Return the names of columns by role: one of images or texts, one of labels, perhaps one of splits.

    Texts may have no labels, as language models need none: `named` then has null for them, or no column is left that
    could hold labels.

    Args:
        available: columns of the file.
        named: by role, names that the user gave.
        roles: roles that the format supports.

    Returns:
        The names, without the role of labels if there are no labels.

    Names are compared and returned in Unicode's composed form (NFC).

    Raises:
        InvalidFile: a named or required column is missing; `columns` lists the existing ones.
    """
    available = [normalize("NFC", name.encode(errors="replace").decode()) for name in available]
    named = {role: name if name is None else normalize("NFC", name) for role, name in named.items()}
    for role, name in named.items():
        if role not in roles:
            raise InvalidFile(
                f"Files of this format have no column of the role {role!r}; they have {', '.join(roles)}."
            )
        if name is not None and name not in available:
            raise InvalidFile(
                f"There is no column {name!r}; the file has {_listed(available)}.", columns=available[:50]
            )
    without = "label" in named and named["label"] is None
    chosen = {role: name for role, name in named.items() if name is not None}
    data_roles = [role for role in ("image", "text") if role in roles]
    missing = ["label", "split"] if chosen.keys() & data_roles else [*data_roles, "label", "split"]
    for role in missing:
        if found := next((name for name in USUAL_COLUMNS[role] if name in available), None):
            chosen.setdefault(role, found)
    given = [role for role in data_roles if role in chosen]
    if not given:
        raise _no_column(available, data_roles)
    if len(given) == 2:
        raise InvalidFile(
            f"The file has images ({chosen['image']!r}) and texts ({chosen['text']!r}); name the one to take in the "
            'spec, such as "columns": {"image": ...}.',
            columns=available[:50],
        )
    texts = given == ["text"]
    if texts and without:
        chosen.pop("label", None)
    elif without or ("label" not in chosen and not (texts and set(available) == set(chosen.values()))):
        raise _no_column(available, ["label"], texts=texts)
    twice = [name for name in chosen.values() if available.count(name) > 1]
    if twice:
        raise InvalidFile(
            f"The file has the column {twice[0]!r} twice; it has {_listed(available)}.", columns=available[:50]
        )
    return {role: chosen[role] for role in (*given, "label", "split") if role in chosen}


def _no_column(available: Sequence[str], needed: Sequence[str], *, texts: bool = False) -> InvalidFile:
    usual = ", ".join(name for role in needed for name in USUAL_COLUMNS[role])
    without = ', or "columns": {"label": null} where there are none, for language models' if texts else ""
    return InvalidFile(
        f"There is no column of {' or '.join(needed)}s under a usual name ({usual}); the file has "
        f'{_listed(available)}. Name it in the spec: "columns": {{"{needed[-1]}": ...}}{without}.',
        columns=list(available[:50]),
        missing_role=needed[-1],
        labels_optional=texts,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:200]) for name in names[:50])


def in_order(contents: Iterable[tuple[str, bytes]], rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Yield the requested rows, in rising order, from the contents of all rows."""
    wanted = iter(rows)
    row = next(wanted, None)
    for number, content in enumerate(contents):
        if row is None:
            return
        if number == row:
            yield content
            row = next(wanted, None)

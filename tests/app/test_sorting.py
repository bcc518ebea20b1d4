"""Lists of resources in an order of their own, and those that a part of an id or of a name finds, on both databases."""

import random
from typing import Any

import pytest
import sqlalchemy as sa

import migrations
from app.database import read, write
from app.errors import InvalidRequest
from app.listing import Listing
from app.models import Blob, Checkpoint, MetadataEntry, Probe, sort_key
from app.sorting import Sorting, list_page

NAMES = ["net", "Net", "NET 2", "élan", "z_1", "z%1", "zeta", "\N{GRINNING FACE}", "a b", "10", "9"]
# In their order: numbers by size, then words by letters, whatever their case.
VALUES: list[Any] = [
    -1e300,
    -10,
    -9.5,
    -1e-9,
    0,
    1e-9,
    0.1,
    9,
    10,
    1e300,
    "1e301",
    "1_000",
    "inf",
    "nan",
    "relu",
    "ReLU2",
]


def fill(engine: sa.Engine) -> list[Checkpoint]:
    """Add checkpoints with names, sizes, architectures and metadata that repeat, differ or are missing."""
    drawn = random.Random(0)
    rows = []
    with write(engine) as session:
        session.add(Blob(sha256="0" * 64, size_bytes=1))
        for index in range(60):
            metadata: dict[str, Any] = {"value": drawn.choice(VALUES)} if index % 4 else {}
            if index % 7 == 0:
                metadata["value"] = [drawn.choice(VALUES), drawn.choice(VALUES)]
            family: dict[str, Any] = {"family": "timm", "name": drawn.choice(["resnet18", "vit"])}
            config = {
                "family": "transformers",
                "config": {"architectures": [drawn.choice(["GPT2LMHeadModel", "Bert"])]},
            }
            rows.append(
                Checkpoint(
                    name=drawn.choice(NAMES),
                    sha256="0" * 64,
                    size_bytes=drawn.choice([1, 2, 2**40, 2**40 + 1]),
                    n_parameters=drawn.randrange(5),
                    architecture=family if index % 2 else config,
                    metadata_=metadata,
                )
            )
            session.add(rows[-1])
            session.flush()
            session.add_all(MetadataEntry.entries(rows[-1].id, metadata))
        session.flush()
        session.expunge_all()
    return rows


def listed(engine: sa.Engine, sort: str | None, order: Any = "asc", **filters: Any) -> list[Checkpoint]:
    """Return the checkpoints of all pages."""
    found: list[Checkpoint] = []
    cursor = None
    while True:
        with read(engine) as session:
            rows, cursor = list_page(
                session, Checkpoint, Listing(limit=7, cursor=cursor, **filters), Sorting(sort, order)
            )
        found += rows
        if cursor is None:
            return found


def _architecture(row: Checkpoint) -> str:
    described = row.architecture
    return str(described.get("name") or described["config"]["architectures"][0]).lower()


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_hold_every_resource_once_in_order(engine: sa.Engine, order: str) -> None:
    """Names, sizes, times and architectures: the pages are the list that Python sorts."""
    rows, falls = fill(engine), order == "desc"
    keys: dict[str, Any] = {
        "name": lambda row: row.name.lower().encode() if row.name.isascii() else row.name.encode(),
        "size_bytes": lambda row: row.size_bytes,
        "n_parameters": lambda row: row.n_parameters,
        "created_at": lambda row: row.created_at,
        "architecture": _architecture,
    }
    for sort, key in keys.items():
        expected = sorted(rows, key=lambda row: (key(row), row.id), reverse=falls)
        assert [row.id for row in listed(engine, sort, order)] == [row.id for row in expected], sort


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_metadata_sort_as_what_they_are(engine: sa.Engine, order: str) -> None:
    """Numbers by size, words by letters, of a list the first; what has none comes last in both orders."""
    rows = fill(engine)

    def place(row: Checkpoint) -> int:
        values = row.metadata_["value"]
        return min(VALUES.index(value) for value in (values if isinstance(values, list) else [values]))

    have = [row for row in rows if "value" in row.metadata_]
    expected = sorted(have, key=lambda row: (place(row), row.id), reverse=order == "desc")
    without = sorted((row.id for row in rows if "value" not in row.metadata_), reverse=order == "desc")
    found = listed(engine, "metadata.value", order)
    assert [row.id for row in found] == [*(row.id for row in expected), *without]


def test_keys_of_numbers_have_their_order() -> None:
    """Text that looks like a number sorts as one, whatever its form."""
    drawn = random.Random(1)
    numbers = [drawn.uniform(-1, 1) * 10 ** drawn.randint(-300, 300) for _ in range(2000)] + [0.0, 1.0, -1.0]
    assert sorted(numbers) == sorted(numbers, key=lambda value: sort_key(str(value)))
    assert sort_key("-0") == sort_key("0") == sort_key("0.0")
    assert sort_key("1e3") == sort_key("1000") == sort_key("+1000.0")
    assert all(sort_key(text) > sort_key("1e308") for text in ("inf", "NaN", "1_000", "", "0x10", "٣"))


def test_existing_metadata_get_their_keys(engine: sa.Engine) -> None:
    """Entries from before the column sort as those that were made after it."""
    fill(engine)

    def keys() -> list[tuple[str, str]]:
        with read(engine) as session:
            return sorted((entry.value, entry.sort_key) for entry in session.scalars(sa.select(MetadataEntry)))

    before = keys()
    assert len({key for _, key in before}) > 10
    migrations.downgrade(engine, "0008")
    migrations.upgrade(engine)
    assert keys() == before


def test_a_part_finds(engine: sa.Engine) -> None:
    """The first characters of an id, and any part of a name, in which % and _ are letters."""
    rows = fill(engine)
    one = rows[17]
    assert [row.id for row in listed(engine, None, id=one.id)] == [one.id]
    assert one.id in [row.id for row in listed(engine, None, id=one.id[:4])]
    assert all(row.id.startswith(one.id[:4]) for row in listed(engine, None, id=one.id[:4]))
    for part, names in (
        ("net", {"net", "Net", "NET 2"}),
        ("%", {"z%1"}),
        ("_", {"z_1"}),
        ("é", {"élan"}),
        ("absent", set()),
    ):
        expected = {row.id for row in rows if row.name in names}
        assert {row.id for row in listed(engine, None, search=part)} == expected, part


def test_orders_that_there_are_not(engine: sa.Engine) -> None:
    """An unknown column, one of another collection, and a cursor of another order are refused, and named."""
    fill(engine)
    with read(engine) as session:
        with pytest.raises(InvalidRequest, match="by architecture, created_at, n_parameters, name, size_bytes"):
            list_page(session, Checkpoint, Listing(), Sorting("n_samples"))
        with pytest.raises(InvalidRequest, match="Lists of probes are not sorted by 'sha256'"):
            list_page(session, Probe, Listing(), Sorting("sha256"))
        _, cursor = list_page(session, Checkpoint, Listing(limit=3), Sorting("name"))
        for sort in (None, "size_bytes", "created_at"):
            with pytest.raises(InvalidRequest, match="for this order"):
                list_page(session, Checkpoint, Listing(cursor=cursor), Sorting(sort))
        # JSON that holds a zero or half a character, which no database takes; too deep; no pair.
        for text in ("WyJcdTAwMDAiLCAiYSJd", "WyJcdWQ4MDAiLCAiYSJd", "W1tbW1tb", "WzEsIDJd", "bnVsbA=="):
            with pytest.raises(InvalidRequest, match="for this order"):
                list_page(session, Checkpoint, Listing(cursor=text), Sorting("name"))

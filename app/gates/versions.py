"""Versions of gates: each change creates a version, which is kept as long as the gate."""

import hashlib
import json
from contextlib import suppress
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import models
from app.database import read, write
from app.errors import NotFound
from app.gates.form import Gate, GateSpec, GateSummary, require_sound
from app.listing import Listing, page
from app.schemas import Page

# Most retries when other clients create versions of the same gate at the same time.
_FURTHER_ATTEMPTS = 20
Row = TypeVar("Row", models.Gate, models.Report)


def create(engine: sa.Engine, spec: GateSpec) -> tuple[Gate, bool]:
    """Store a gate as the next version of its name. If it equals the current version, return that one, as not new.

    Raises:
        InvalidRequest: a check names no number of a report.
    """
    require_sound(spec)
    # Without defaults: members that a later version of the service adds do not make an old file a new gate.
    content = json.dumps(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    for _ in range(_FURTHER_ATTEMPTS):
        # Another client may create this version at the same time; the next attempt finds it.
        with suppress(sa.exc.IntegrityError):
            return _store(engine, spec, content, sha256)
    return _store(engine, spec, content, sha256)


def _store(engine: sa.Engine, spec: GateSpec, content: str, sha256: str) -> tuple[Gate, bool]:
    with write(engine) as session:
        current = _current(session, spec.name)
        if current is not None and current.sha256 == sha256:
            return gate_of(current), False
        row = models.Gate(
            name=spec.name,
            version=1 if current is None else current.version + 1,
            kind=spec.kind,
            description=spec.description,
            n_checks=len(spec.checks),
            sha256=sha256,
            content=content,
        )
        session.add(row)
        session.flush()
        return gate_of(row), True


def get(engine: sa.Engine, id_: str) -> Gate:
    """Return one version of a gate by its id."""
    with read(engine) as session:
        return gate_of(find(session, models.Gate, id_, "gate"))


def list_page(engine: sa.Engine, listing: Listing) -> Page[GateSummary]:
    """List gates; every version is a separate item."""
    query = sa.select(models.Gate).options(sa.orm.defer(models.Gate.content))
    with read(engine) as session:
        rows, cursor = page(session, query, models.Gate, listing, models.Gate.id.in_)
        members = [*GateSummary.model_fields]
        items = [GateSummary(**{name: getattr(row, name) for name in members}) for (row,) in rows]
    return Page(items=items, next_cursor=cursor)


def delete(engine: sa.Engine, id_: str) -> None:
    """Delete all versions of the gate of which an id is given.

    One version alone is not deleted: its number would stand for another content later.

    Raises:
        NotFound: there is no such version.
    """
    with write(engine) as session:
        name = find(session, models.Gate, id_, "gate").name
        session.execute(sa.delete(models.Gate).where(models.Gate.name == name))


def gate_of(row: models.Gate) -> Gate:
    """Return a stored gate as the service answers with it."""
    return Gate(**json.loads(row.content), id=row.id, version=row.version, sha256=row.sha256, created_at=row.created_at)


def find(session: Session, model: type[Row], id_: str, noun: str) -> Row:
    """Return a row by its id; raise NotFound, which calls it `noun`, if it is missing."""
    row = session.get(model, id_)
    if row is None:
        raise NotFound(f"There is no {noun} {id_!r}.")
    return row


def _current(session: Session, name: str) -> models.Gate | None:
    query = sa.select(models.Gate).where(models.Gate.name == name).order_by(models.Gate.version.desc()).limit(1)
    return session.scalars(query).one_or_none()

"""Alembic's entry point: on the connection of `migrations.upgrade`, or as a command on the database of Settings."""

from typing import Any, Literal

import sqlalchemy as sa
from alembic import context

from app.database import make_engine
from app.models import Base, UTCDateTime
from app.settings import Settings
from migrations import is_ours


def _render(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Render our own column types as SQLAlchemy's, so that an old migration is independent of later app.models."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UTCDateTime) else False


def _run(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_name=is_ours,
        render_item=_render,
        # SQLite cannot alter a constraint in place; batches copy the table there and are plain ALTERs elsewhere.
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    raise SystemExit("SQL scripts are not written (--sql): a migration may need to read what is there.")

given: sa.Connection | None = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with make_engine(Settings(), patient=True).begin() as own:
        _run(own)

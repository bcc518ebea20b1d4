"""The reason why a process of the service does not start, in one sentence that an operator can act on."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from app.settings import Settings


class CannotStart(Exception):
    """The reason why a process does not start, in one sentence."""


@contextmanager
def starting(settings: Settings) -> Iterator[None]:
    """Map failures of a database, a disk or a storage while a process starts to CannotStart.

    Args:
        settings: the process's settings; a password in an address is not shown.

    Raises:
        CannotStart: in place of the original error. Other exceptions, from bugs, pass through.
    """
    # Imported late: the command line is read before anything large is loaded.
    import sqlalchemy as sa
    from obstore.exceptions import BaseError

    from app.storage import StorageUnavailable
    from migrations import OtherTables

    url = sa.make_url(settings.effective_database_url)
    if url.get_backend_name() == "sqlite":
        _require_recent_sqlite(sys.version_info[:2], sqlite3.sqlite_version_info)
    try:
        yield
    except OtherTables as error:
        raise CannotStart(f"The database cannot be used: {error}.") from error
    except sa.exc.DBAPIError as error:
        shown = url.render_as_string(hide_password=True)
        raise CannotStart(f"The database {shown} cannot be used: {_first_line(error.orig)}.") from error
    except StorageUnavailable as error:
        raise CannotStart(f"The storage {_address(settings)} cannot be used: {_first_line(error)}.") from error
    except BaseError as error:
        raise CannotStart(f"The storage {_address(settings)} cannot be used: {_first_line(error)}.") from error
    except OSError as error:
        place = error.filename or settings.data_dir
        raise CannotStart(f"{place} cannot be used: {error.strerror or error}.") from error


def _require_recent_sqlite(python: tuple[int, ...], sqlite: tuple[int, ...]) -> None:
    """Refuse an SQLite with which the queue's tables could be made and then take no row.

    From Python 3.12 on dbos writes their default times as `unixepoch('subsec')`, which is NULL before SQLite 3.42.
    """
    if python >= (3, 12) and sqlite < (3, 42):
        found, running = ".".join(map(str, sqlite)), ".".join(map(str, python))
        raise CannotStart(
            f"The database cannot be used: with Python {running} the queue needs SQLite 3.42 or newer, and this Python "
            f"has {found}; use PostgreSQL, another build of Python, or Python 3.11."
        )


def _address(settings: Settings) -> str:
    """Return the storage's URL without the parts that may be a password."""
    from urllib.parse import urlsplit

    url = urlsplit(settings.effective_storage_url)
    return url._replace(netloc=url.netloc.rpartition("@")[2], query="").geturl()


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")

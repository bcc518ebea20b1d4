"""The reason why a process of the service does not start, in one sentence that an operator can act on."""

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

    try:
        yield
    except OtherTables as error:
        raise CannotStart(f"The database cannot be used: {error}.") from error
    except sa.exc.DBAPIError as error:
        url = sa.make_url(settings.effective_database_url).render_as_string(hide_password=True)
        raise CannotStart(f"The database {url} cannot be used: {_first_line(error.orig)}.") from error
    except StorageUnavailable as error:
        raise CannotStart(f"The storage {_address(settings)} cannot be used: {_first_line(error)}.") from error
    except BaseError as error:
        raise CannotStart(f"The storage {_address(settings)} cannot be used: {_first_line(error)}.") from error
    except OSError as error:
        place = error.filename or settings.data_dir
        raise CannotStart(f"{place} cannot be used: {error.strerror or error}.") from error


def _address(settings: Settings) -> str:
    """Return the storage's URL without the parts that may be a password."""
    from urllib.parse import urlsplit

    url = urlsplit(settings.effective_storage_url)
    return url._replace(netloc=url.netloc.rpartition("@")[2], query="").geturl()


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")

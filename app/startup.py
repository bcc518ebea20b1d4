"""What happens beside the first requests: the tables are made, what takes long to load is loaded, waste is swept.

The process answers /healthz before that. A call that needs the tables waits for them.
"""

import asyncio
import logging
import threading
from concurrent.futures import Future

import sqlalchemy as sa
from starlette.types import ASGIApp, Receive, Scope, Send

from app import resources
from app.api.routes import Service
from app.errors import first_line
from app.settings import freeze_loaded_objects
from app.storage import StorageUnavailable

logger = logging.getLogger(__name__)

# After that a call goes on and says that the database lacks its tables.
_PATIENCE_SECONDS = 30.0
_SWEEP_SECONDS = 600.0


class WaitForTables:
    """Hold calls of /v1 until the tables are there; `tables` is done then."""

    def __init__(self, app: ASGIApp, *, tables: "Future[None]") -> None:
        self._app = app
        self._tables = tables

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._tables.done() and scope["type"] == "http" and scope["path"].startswith("/v1/"):
            await asyncio.wait({asyncio.wrap_future(self._tables)}, timeout=_PATIENCE_SECONDS)
        await self._app(scope, receive, send)


def settle(service: Service, tables: "Future[None]", ending: threading.Event) -> None:
    """Load what requests will need once the tables are there; sweep up what crashes left, now and every ten minutes.

    Args:
        service: what is served.
        tables: done once the tables are there.
        ending: set when the process ends; this runs in a thread of its own until then.
    """
    if tables.exception() is not None:
        return
    # Together they take a second, which the first upload and the first analysis would take longer.
    from app.files import archives, probedata  # noqa: F401

    service.queue.get()
    freeze_loaded_objects()
    while True:
        try:
            resources.sweep(service.engine, service.storage)
        except (sa.exc.SQLAlchemyError, StorageUnavailable, OSError) as error:
            # Waste is no reason not to serve; the next round sweeps again.
            logger.warning("what earlier crashes left behind was not swept: %s", first_line(error))
        if ending.wait(_SWEEP_SECONDS):
            return

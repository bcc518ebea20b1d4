"""Startup work in the background of the first requests: create tables, load slow modules, sweep what goes.

The process answers /healthz before that. A call that needs the tables waits for them.
"""

import asyncio
import logging
import threading
from concurrent.futures import Future

import sqlalchemy as sa
from starlette.types import ASGIApp, Receive, Scope, Send

from app import queue, resources, retention
from app.api.routes import Service
from app.errors import first_line
from app.settings import freeze_loaded_objects
from app.storage import StorageUnavailable

logger = logging.getLogger(__name__)

# How long a call waits for the tables; then it goes on and answers that they are missing.
_PATIENCE_SECONDS = 30.0
_SWEEP_SECONDS = 600.0
# Beginnings of paths that are answered before the tables exist.
_WITHOUT_TABLES = ("/healthz", "/readyz", "/metrics", "/docs", "/redoc", "/openapi.json", "/static/")


class WaitForTables:
    """Holds calls of the API and pages until the tables exist; `tables` is done then."""

    def __init__(self, app: ASGIApp, *, tables: "Future[None]") -> None:
        self._app = app
        self._tables = tables

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._tables.done() and scope["type"] == "http" and not scope["path"].startswith(_WITHOUT_TABLES):
            await asyncio.wait({asyncio.wrap_future(self._tables)}, timeout=_PATIENCE_SECONDS)
        await self._app(scope, receive, send)


def settle(service: Service, tables: "Future[None]", ending: threading.Event) -> None:
    """Load what requests need once the tables exist; remove what is old, and leftovers, now and every ten minutes.

    Args:
        service: the running service.
        tables: done once the tables exist.
        ending: set when the process ends; this runs in a thread of its own until then.
    """
    if tables.exception() is not None:
        return
    # Together they take a second to load, which would delay the first upload and the first analysis.
    from app.files import archives, probedata  # noqa: F401

    service.queue.get()
    freeze_loaded_objects()
    while True:
        try:
            resources.sweep(service.engine, service.storage)
        except (sa.exc.SQLAlchemyError, StorageUnavailable, OSError) as error:
            # The service works with leftovers; the next round retries.
            logger.warning("what earlier crashes left behind was not swept: %s", first_line(error))
        try:
            _retain(service)
        except (sa.exc.SQLAlchemyError, StorageUnavailable, OSError) as error:
            logger.warning("what is older than INTERPLAY_KEEP_... say was not removed: %s", first_line(error))
        if ending.wait(_SWEEP_SECONDS):
            return


def _retain(service: Service) -> None:
    """Delete what goes by its age, unless another process does, and what the queue has of analyses that are gone."""
    queue.forget_strays(service.queue, service.engine)
    if not retention.is_set(service.settings):
        return
    with retention.alone(service.engine, service.settings) as free:
        if free:
            for item in retention.remove(service.engine, service.queue, service.storage, service.settings):
                service.measures.count_removed(item.what, item.size_bytes)
            service.measures.note_retention()

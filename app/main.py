"""The HTTP application."""

import importlib.metadata
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa
from fastapi import FastAPI

from app import problems, queue, resources
from app.admission import Admission
from app.database import make_engine
from app.events import Events
from app.openapi import Application
from app.readiness import Readiness
from app.routes import Service, analyses, gates, health
from app.routes import resources as resource_routes
from app.settings import Settings
from app.storage import Storage, StorageUnavailable

logger = logging.getLogger(__name__)

_DESCRIPTION = """What is in a checkpoint: matrix mutual information ratio (MIR), matrix entropy difference ratio (HDR)
and neural collapse. POST a checkpoint and a probe dataset, queue an analysis, read its report. Every error is
`application/problem+json`."""


def create_app(settings: Settings) -> FastAPI:
    """The application; it connects to nothing before it serves."""
    engine = make_engine(settings)
    events = Events(engine, settings.max_event_streams)
    storage = Storage(settings)
    service = Service(settings, engine, storage, queue.make_client(engine), events, Readiness(engine, storage))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Beside serving: with many blobs it takes a while.
        threading.Thread(target=_sweep, args=(service,), daemon=True).start()
        yield
        service.queue.destroy()
        engine.dispose()

    app = Application(
        title="Interplay",
        version=importlib.metadata.version("interplay"),
        description=_DESCRIPTION,
        lifespan=lifespan,
    )
    app.settings = settings
    app.state.service = service
    app.add_middleware(Admission, settings=settings)
    problems.install(app)
    app.include_router(health.health)
    for router in (resource_routes.router, analyses.router, gates.router, health.router):
        app.include_router(router, prefix="/v1")
    return app


def _sweep(service: Service) -> None:
    try:
        resources.sweep(service.engine, service.storage)
    except (sa.exc.SQLAlchemyError, StorageUnavailable, OSError) as error:
        # Waste is no reason not to serve; the next start sweeps again.
        logger.warning("what earlier crashes left behind was not swept: %s", error)

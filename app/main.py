"""The HTTP application."""

import importlib.metadata
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import queue
from app.api import documents, problems
from app.api.admission import Admission
from app.api.drawing import Drawings
from app.api.events import Events
from app.api.measures import Measured, Measures, Named
from app.api.openapi import Application
from app.api.readiness import Readiness
from app.api.routes import Service, analyses, fetches, gates, health, reports
from app.api.routes import resources as resource_routes
from app.api.routes import uploads as upload_routes
from app.api.sessions import Sessions
from app.api.tus import Tus
from app.database import make_engine
from app.pages.application import Pages
from app.settings import Settings
from app.startup import WaitForTables, settle
from app.storage import Storage

_DESCRIPTION = """What is in a checkpoint: matrix mutual information ratio (MIR), matrix entropy difference ratio (HDR)
and neural collapse. POST a checkpoint and a probe dataset, queue an analysis, read its report. Every error is
`application/problem+json`."""


def create_app(settings: Settings, tables: "Future[None] | None" = None) -> FastAPI:
    """Return the application; it connects to nothing before it serves.

    Args:
        settings: the service's settings.
        tables: done once the database has its tables, if this process creates them while it serves.
    """
    if tables is None:
        tables = Future()
        tables.set_result(None)
    engine = make_engine(settings)
    events = Events(engine, settings.max_event_streams)
    storage = Storage(settings)
    readiness, drawings = Readiness(engine, storage), Drawings(settings)
    sessions = Sessions(settings)
    measures = Measures(engine, storage, events)
    service = Service(settings, engine, storage, queue.LateClient(engine), events, readiness, drawings, measures)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # In the background: with many blobs it takes a while.
        ending = threading.Event()
        threading.Thread(target=settle, args=(service, tables, ending), daemon=True).start()
        yield
        ending.set()
        service.drawings.close()
        service.queue.destroy()
        engine.dispose()

    app = Application(
        title="Interplay",
        version=importlib.metadata.version("interplay"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.settings = settings
    app.state.service = service
    # The first stands directly before the routes, the last sees a request first.
    app.add_middleware(Named)
    app.add_middleware(Pages, service=service, sessions=sessions)
    app.add_middleware(WaitForTables, tables=tables)
    app.add_middleware(Admission, settings=settings, sessions=sessions)
    app.add_middleware(Tus)
    app.add_middleware(Measured, measures=measures)
    problems.install(app)
    # FastAPI tries one route after the other, ten microseconds each: the most requested come first.
    routes = (reports, analyses, resource_routes, gates, health, upload_routes, fetches)
    for router in (module.router for module in routes):
        app.include_router(router, prefix="/v1")
    app.include_router(health.health)
    documents.install(app)
    return app

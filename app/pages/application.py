"""The application of the pages, beside that of the API, in one process and on one port."""

import re
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.measures import Named
from app.api.problems import DEPENDENCY_ERRORS, as_service_error
from app.api.routes import Service
from app.api.sessions import Sessions
from app.errors import ServiceError, invalid_request
from app.pages import (
    analyses,
    asking,
    assets,
    comparing,
    courses,
    fetches,
    gates,
    home,
    leaderboard,
    pushing,
    reports,
    resources,
    samples,
)
from app.pages.rendering import STATIC, address, page
from app.pages.visitors import LoginNeeded, visitor_of

_ROUTERS = (
    home.router,
    reports.router,
    leaderboard.router,
    comparing.router,
    # Before the page of one analysis, whose path would match too.
    asking.router,
    analyses.router,
    fetches.router,
    resources.router,
    samples.router,
    courses.router,
    gates.router,
    pushing.router,
    assets.router,
)
_DAY = re.compile(rb"(?<![^&])created_(?:after|before)=\d{4}-\d{2}-\d{2}(?![^&])")


class Pages:
    """Sends requests for pages to their own application, whose errors are pages; all others go on to the API."""

    def __init__(self, app: ASGIApp, *, service: Service, sessions: Sessions) -> None:
        self._api = app
        self._pages = _create(service, sessions)
        # The first segment of a path says whose it is.
        routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, Route)]
        self._ours = {"static", *(route.path.split("/")[1] for route in routes)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = scope["type"] == "http" and scope["path"].lstrip("/").partition("/")[0] in self._ours
        if ours:
            # Of a form, fields that were left empty ask for nothing, and a day begins at midnight in UTC.
            given = [part for part in scope["query_string"].split(b"&") if part.partition(b"=")[2]]
            scope = {**scope, "query_string": _DAY.sub(rb"\g<0>T00:00:00Z", b"&".join(given))}
        await (self._pages if ours else self._api)(scope, receive, send)


def _create(service: Service, sessions: Sessions) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service, app.state.sessions = service, sessions
    app.state.samples = samples.SamplesKept(service.storage)
    handlers: dict[Any, Any] = {
        LoginNeeded: _ask_for_the_key,
        ServiceError: _service_error,
        RequestValidationError: _validation_error,
        HTTPException: _http_error,
        **dict.fromkeys(DEPENDENCY_ERRORS, _dependency_error),
        Exception: _bug,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)
    app.add_middleware(Named)
    for router in _ROUTERS:
        app.include_router(router)
    app.mount("/static", _Static(directory=STATIC), name="static")
    return app


class _Static(StaticFiles):
    """Our own files, whose addresses change with their content."""

    def file_response(self, *given: Any, **options: Any) -> Response:
        response = super().file_response(*given, **options)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


async def _ask_for_the_key(request: Request, _: LoginNeeded) -> Response:
    root = request.scope.get("root_path", "")
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(address(f"{root}/login", next=wanted if request.method == "GET" else None), status_code=303)


async def _service_error(request: Request, error: ServiceError) -> Response:
    return page(
        request,
        visitor_of(request),
        "error.html",
        status=error.status,
        title=error.title,
        detail=error.detail,
        analysis_ids=error.members.get("analysis_ids", []),
        baselines=error.members.get("baselines", []),
    )


async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    return await _service_error(request, invalid_request("The address or the form", error.errors()))


async def _http_error(request: Request, error: HTTPException) -> Response:
    title = "There is no such page" if error.status_code == 404 else str(error.detail)
    return page(request, visitor_of(request), "error.html", status=error.status_code, title=title, detail="")


async def _dependency_error(request: Request, error: Exception) -> Response:
    return await _service_error(request, as_service_error(error))


async def _bug(request: Request, _: Exception) -> Response:
    detail = "The service's log says what went wrong."
    return page(request, visitor_of(request), "error.html", status=500, title="Internal error", detail=detail)

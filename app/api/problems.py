"""Every error of the HTTP service as application/problem+json (RFC 9457)."""

import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from app.errors import (
    InsufficientStorage,
    InvalidRequest,
    NotFound,
    RequestTimeout,
    ServiceError,
    TooLarge,
    Unauthorized,
    Unavailable,
    first_line,
    invalid_request,
    problem,
)
from app.storage import StorageFull, StorageUnavailable

logger = logging.getLogger(__name__)

_FULL = "The service's disk or storage is full; its operator has to make room, trying again does not help."
_HTTP_KINDS = {401: Unauthorized.kind, 404: NotFound.kind, 405: "method-not-allowed", 408: RequestTimeout.kind}

# FastAPI does not answer HEAD, which app/api/admission.py turns into GET.
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_UNREADABLE = "There was an error parsing the body"


#: Errors of the database and of the storage; `as_service_error` says what they mean.
DEPENDENCY_ERRORS: tuple[type[Exception], ...] = (
    StorageUnavailable,
    sa.exc.OperationalError,
    sa.exc.ProgrammingError,
    sa.exc.InterfaceError,
    sa.exc.TimeoutError,
)


class ProblemResponse(JSONResponse):
    media_type = "application/problem+json"

    def render(self, content: Any) -> bytes:
        try:
            return super().render(content)
        except UnicodeEncodeError:
            # The message quotes the invalid input, which may be half of a surrogate pair.
            return json.dumps(content).encode()


def install(app: FastAPI) -> None:
    """Answer every failure of this application with a problem, including unknown routes and bugs."""
    handlers: dict[type[Exception], Callable[..., Awaitable[Response]]] = {
        ServiceError: _service_error,
        RequestValidationError: _validation_error,
        HTTPException: _http_error,
        **dict.fromkeys(DEPENDENCY_ERRORS, _dependency_error),
        Exception: _bug,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)


def problem_response(error: ServiceError) -> Response:
    """Return an error as the answer to a request."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.status == 503:
        headers["Retry-After"] = "5"
    body = problem(error.kind, error.title, error.detail, status=error.status, **error.members)
    return ProblemResponse(body, status_code=error.status, headers=headers)


async def _service_error(_: Request, error: ServiceError) -> Response:
    return problem_response(error)


async def _validation_error(_: Request, error: RequestValidationError) -> Response:
    return problem_response(invalid_request("The request", error.errors()))


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 413:
        limit = request.app.state.service.settings.max_spec_bytes
        return problem_response(TooLarge(f"A body may have at most {limit} bytes here.", limit_bytes=limit))
    if error.status_code == 400 and error.detail == _UNREADABLE:  # the framework's own, for text that json cannot take
        return problem_response(InvalidRequest("The body is not JSON in UTF-8, or is nested too deeply."))
    phrase = HTTPStatus(error.status_code).phrase
    kind = _HTTP_KINDS.get(error.status_code, InvalidRequest.kind)
    detail = error.detail
    if detail == phrase:  # the framework's own, for a route or a method that does not exist
        detail = f"{request.method} {request.url.path} is not something this service does; /docs lists what is."
    headers = _allowed(request) if error.status_code == 405 else error.headers
    return ProblemResponse(
        problem(kind, phrase, detail, status=error.status_code), status_code=error.status_code, headers=headers
    )


def _allowed(request: Request) -> dict[str, str]:
    """Return an Allow header with all methods of a path; the framework names only those of its first route.

    A path that the document has as it is, as /v1/gates/schema, has no methods of one with a parameter in its place.
    """
    own = request.app.openapi()["paths"].get(request.scope["path"])
    methods = [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] == Match.FULL for route in request.app.routes)
        and (own is None or method.lower() in own)
    ]
    return {"Allow": ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])}


async def _dependency_error(_: Request, error: Exception) -> Response:
    return problem_response(as_service_error(error))


def as_service_error(error: Exception) -> ServiceError:
    """Return what one of DEPENDENCY_ERRORS means for a caller; raise it again if it is a bug."""
    if isinstance(error, StorageUnavailable):
        return _of_storage(error)
    # SQLite reports this in the message only; PostgreSQL has a code for it.
    original = getattr(error, "orig", None)
    code = getattr(original, "sqlstate", None)
    if isinstance(error, sa.exc.ProgrammingError) and code != "42P01":  # a table does not exist
        raise error
    if "disk is full" in str(original) or code == "53100":
        logger.error("the database's disk is full: %s", first_line(error))
        return InsufficientStorage(_FULL)
    logger.warning("the database does not answer: %s", first_line(error))
    return Unavailable("The database does not answer, or has not the tables of this version; /readyz says which.")


def _of_storage(error: StorageUnavailable) -> ServiceError:
    words = first_line(error)
    if isinstance(error, StorageFull):
        logger.error("the storage is full: %s", words)
        return InsufficientStorage(f"{_FULL} Nothing of the upload was kept.")
    logger.warning("the storage does not answer: %s", words)
    return Unavailable("The storage does not answer; try again in a few seconds.")


async def _bug(_: Request, error: Exception) -> Response:
    # Starlette logs the traceback itself, after this answer.
    body = problem("internal-error", "Internal error", "This is a fault of the service; its log says more.", status=500)
    # The server closes the connection after a bug; the header tells the client.
    return ProblemResponse(body, status_code=500, headers={"Connection": "close"})

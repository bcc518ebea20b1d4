"""The overview, and how people come in and leave."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse

from app import analyses, fetches
from app.api.admission import is_key
from app.api.readiness import Part, living_workers
from app.api.routes import Service, ServiceDep
from app.api.sessions import LOGIN_COOKIE, SESSION_COOKIE, TOKEN_FIELD, Sessions
from app.database import read
from app.errors import Forbidden
from app.listing import Listing
from app.models import Worker
from app.pages import listed
from app.pages.rendering import page, see_other, set_cookie
from app.pages.visitors import AuthorDep, VisitorDep
from app.reports import Ranking, Subject, page_of_reports
from app.schemas import Analysis, Fetch

router = APIRouter()
_NEWEST = 10
_RUNNING = 20


@dataclass(frozen=True)
class _State:
    name: str
    told: str
    good: bool


@router.get("/")
async def overview(request: Request, service: ServiceDep, visitor: VisitorDep) -> Response:
    """What runs, the newest reports, workers; on an empty service the first three steps."""
    parts = await service.readiness.look()
    running, fetching, n_queued, reports, workers = await run_in_threadpool(_contents, service)
    return page(
        request,
        visitor,
        "home.html",
        parts=[_State(name, part.told, part == Part()) for name, part in parts.items()],
        running=running,
        fetching=fetching,
        n_queued=n_queued,
        reports=reports,
        workers=workers,
    )


def _contents(service: Service) -> tuple[list[Analysis], list[Fetch], int, list[listed.ReportRow], list[Worker]]:
    running = analyses.list_page(service.engine, Listing(limit=_RUNNING), status="running", checkpoint_id=None).items
    fetching = fetches.list_page(service.engine, Listing(limit=_RUNNING), status="running").items
    n_queued = analyses.count_queued(service.engine)
    with read(service.engine) as session:
        ranking, everything = Ranking(show=list(listed.SHOWN)), Subject(None, None, None, None)
        newest = page_of_reports(session, Listing(limit=_NEWEST), everything, ranking).items
        return running, fetching, n_queued, listed.rows(session, newest), list(living_workers(service.engine))


@router.get("/login")
async def show_login(request: Request, next: Annotated[str, Query(max_length=2000)] = "/") -> Response:
    """The form that asks for the key."""
    return _login_form(request, next, wrong=False)


@router.post("/login")
async def log_in(
    request: Request,
    key: Annotated[str, Form(max_length=1000)],
    service: ServiceDep,
    token: Annotated[str, Form(alias=TOKEN_FIELD)] = "",
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """Start a session for who gives the key."""
    sessions: Sessions = request.app.state.sessions
    if not sessions.logins.is_token(request.cookies.get(LOGIN_COOKIE, ""), token):
        raise Forbidden("This form has become too old: load the page again.")
    if not is_key(service.settings, key.encode()):
        return _login_form(request, next, wrong=True)
    response = RedirectResponse(_own_path(request, next), status_code=303)
    set_cookie(response, request, SESSION_COOKIE, sessions.people.make())
    response.delete_cookie(LOGIN_COOKIE)
    return response


@router.post("/logout")
async def log_out(request: Request, visitor: AuthorDep) -> Response:
    """End the session in this browser."""
    response = see_other(request, "/login")
    response.delete_cookie(SESSION_COOKIE)
    return response


def _login_form(request: Request, next: str, *, wrong: bool) -> Response:
    sessions: Sessions = request.app.state.sessions
    cookie = sessions.logins.make()
    token = sessions.logins.token(cookie)
    status = 403 if wrong else 200
    response = page(request, None, "login.html", status=status, token=token, next=next, wrong=wrong)
    set_cookie(response, request, LOGIN_COOKIE, cookie)
    return response


def _own_path(request: Request, path: str) -> str:
    """Return a path of this service; what names another host leads to the overview."""
    root = request.scope.get("root_path", "")
    is_own = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return f"{root}{path if is_own else '/'}"

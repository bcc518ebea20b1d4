"""Who reads a page: a session, which a service with a key gives only to people who know the key."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Form, Request

from app.api.sessions import SESSION_COOKIE, TOKEN_FIELD, Sessions
from app.errors import Forbidden


@dataclass(frozen=True)
class Visitor:
    """A person's session.

    Attributes:
        cookie: of the session.
        token: that forms carry.
        is_new: whether the browser does not have the cookie yet.
        can_leave: whether there is a key, so that the person has logged in and may log out.
    """

    cookie: str
    token: str
    is_new: bool
    can_leave: bool


class LoginNeeded(Exception):
    """The page is for people who have logged in."""


def visitor_of(request: Request) -> Visitor | None:
    """Return the session of a request; None if it has none and the service has a key."""
    sessions: Sessions = request.app.state.sessions
    has_key = request.app.state.service.settings.api_key is not None
    cookie = request.cookies.get(SESSION_COOKIE)
    if cookie is not None and sessions.people.is_valid(cookie):
        return Visitor(cookie, sessions.people.token(cookie), is_new=False, can_leave=has_key)
    if has_key:
        return None
    cookie = sessions.people.make()
    return Visitor(cookie, sessions.people.token(cookie), is_new=True, can_leave=False)


async def _visitor(request: Request) -> Visitor:
    found = visitor_of(request)
    if found is None:
        raise LoginNeeded
    return found


VisitorDep = Annotated[Visitor, Depends(_visitor)]


def require_token(request: Request, visitor: Visitor, token: str) -> None:
    """Refuse a form whose token is not that of its session."""
    sessions: Sessions = request.app.state.sessions
    if visitor.is_new or not sessions.people.is_token(visitor.cookie, token):
        raise Forbidden("This form does not belong to your session, or it has become too old: load the page again.")


async def _author(
    request: Request, visitor: VisitorDep, token: Annotated[str, Form(alias=TOKEN_FIELD)] = ""
) -> Visitor:
    require_token(request, visitor, token)
    return visitor


#: For every form that changes something: its token is that of the session.
AuthorDep = Annotated[Visitor, Depends(_author)]

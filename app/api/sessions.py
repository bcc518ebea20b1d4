"""Sessions of people in a browser: a signed cookie instead of the API key, and a token in every form.

A cookie is valid for a working day, and as long as the key stays the same. It says nothing but that its holder knew the
key. Browsers send it with requests that start on this service's own pages only (SameSite=Strict); a request that
changes something must also carry the cookie's token, which no page of another site can read.
"""

import hmac
import secrets
from collections.abc import Mapping
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie

from itsdangerous import BadSignature, TimestampSigner

from app.settings import Settings

#: Names of the cookies of a session, and of a form that asks for the key.
SESSION_COOKIE, LOGIN_COOKIE = "interplay_session", "interplay_login"
#: Names of the header and of the form field that carry a cookie's token.
TOKEN_HEADER, TOKEN_FIELD = b"x-csrf-token", "csrf_token"
_LAST_SECONDS = 12 * 3600


class SignedCookies:
    """Cookies for one purpose, which those for another cannot replace, and their tokens."""

    def __init__(self, secret: bytes, purpose: str) -> None:
        self._secret = hmac.digest(secret, f"interplay {purpose}".encode(), "sha256")
        self._signer = TimestampSigner(self._secret, digest_method=sha256)

    def make(self) -> str:
        """Return a new cookie."""
        return self._signer.sign(secrets.token_urlsafe(16)).decode()

    def is_valid(self, cookie: str) -> bool:
        """Return whether a cookie was made here and is not too old."""
        try:
            self._signer.unsign(cookie, max_age=_LAST_SECONDS)
        except BadSignature:
            return False
        return True

    def token(self, cookie: str) -> str:
        """Return the token that forms beside this cookie carry."""
        return hmac.new(self._secret, b"token " + cookie.encode(), sha256).hexdigest()

    def is_token(self, cookie: str, token: str) -> bool:
        """Return whether a token is that of a valid cookie."""
        return self.is_valid(cookie) and hmac.compare_digest(self.token(cookie).encode(), token.encode())


class Sessions:
    """The cookies of this service: the same in every API process that has the same key.

    Without a key everybody on this machine may use the service, so everybody gets a session, for the sake of its token;
    it ends with the process.
    """

    def __init__(self, settings: Settings) -> None:
        key = settings.api_key
        secret = secrets.token_bytes(32) if key is None else key.get_secret_value().encode()
        self.people = SignedCookies(secret, "session")
        self.logins = SignedCookies(secret, "login")

    def admit(self, method: str, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether a call of the API comes from a page of this service.

        To read, its cookie is enough; to write, it needs the cookie's token.
        """
        cookie = _session_cookie(headers.get(b"cookie", b"").decode("latin-1"))
        if cookie is None:
            return False
        if method in ("GET", "HEAD"):
            return self.people.is_valid(cookie)
        return self.people.is_token(cookie, headers.get(TOKEN_HEADER, b"").decode("latin-1"))


def _session_cookie(header: str) -> str | None:
    try:
        found = SimpleCookie(header).get(SESSION_COOKIE)
    except CookieError:
        return None
    return None if found is None else found.value

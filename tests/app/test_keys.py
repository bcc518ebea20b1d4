"""A service with an API key: what is refused without it, how people log in, and which processes know the key."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest

from tests import services
from tests.app.api.test_events import heard
from tests.app.api.test_uploads import problem
from tests.app.pages.test_pages import read, token_of
from tests.app.test_analyses import SLOW, pair
from tests.services import Service, until

KEY = "a key that nobody guesses"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service with an API key and room for two event streams, bound to all addresses."""
    data_dir = tmp_path_factory.mktemp("guarded") / "data"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("A_PASSWORD", "hidden")
        with services.running(data_dir, api_key=KEY, host="0.0.0.0", max_event_streams="2") as service:
            url = service.url.replace("0.0.0.0", "127.0.0.1")
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                service.url, service.client = url, client
                yield service


def test_key_is_needed_on_every_v1_call(guarded: Service) -> None:
    """With a key set, /v1 answers 401 without it, with another, and with another scheme; health does not."""
    paths = [path for path in guarded.client.get("/openapi.json").json()["paths"] if path.startswith("/v1")]
    assert len(paths) >= 12
    for path in paths:
        answer = guarded.client.get(path.replace("{id}", "x"))
        if answer.status_code != 405:
            problem(answer, 401, "unauthorized")
    for header in (f"Bearer {KEY}x", f"Basic {KEY}", "Bearer", f"Bearer {KEY[:-1]}", "Bearer schlüssel"):
        answer = guarded.client.get("/v1/probes", headers={b"Authorization": header.encode()})
        problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.client.get("/v1/probes", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert guarded.client.get("/healthz").status_code == 200


def test_upload_without_the_key_is_refused_and_not_kept(guarded: Service) -> None:
    """A larger upload without the key receives the problem rather than a closed connection."""
    problem(guarded.post("/v1/checkpoints", {"name": "a"}, bytes(5_000_000)), 401, "unauthorized")


def test_key_is_asked_for_before_a_body_is_read(guarded: Service) -> None:
    """Without the key a body is neither parsed nor stored, whatever its declared type."""
    for content_type in ("application/json", "multipart/x"):
        answer = guarded.client.post("/v1/analyses", content=b"{bad", headers={"Content-Type": content_type})
        problem(answer, 401, "unauthorized")


def test_the_compute_process_has_no_secret(guarded: Service) -> None:
    """In a service with a key, the worker has the key unchanged and the compute process does not have it."""
    environment = psutil.Process(guarded.compute_child().pid).environ()
    assert "A_PASSWORD" not in environment
    assert "INTERPLAY_API_KEY" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["INTERPLAY_DATA_DIR"] == str(guarded.data_dir)


def test_streams_are_limited(guarded: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Without the key there is no stream; beyond the limit there is a problem, until a stream is closed."""
    problem(guarded.client.get("/v1/analyses/x/events"), 401, "unauthorized")
    guarded.client.headers["Authorization"] = f"Bearer {KEY}"
    try:
        for _ in range(5):
            problem(guarded.client.get("/v1/analyses/x/events"), 404, "not-found")
        ids = pair(guarded, mlp_checkpoint_file, digits_probe_file)
        first, second = (guarded.analyze(**ids, options=SLOW)["id"] for _ in range(2))
        with (
            guarded.client.stream("GET", f"/v1/analyses/{first}/events"),
            guarded.client.stream("GET", f"/v1/analyses/{second}/events"),
        ):
            refused = guarded.client.get(f"/v1/analyses/{first}/events")
            assert problem(refused, 503, "too-many-streams")["limit"] == 2
            assert "retry-after" in refused.headers
        guarded.client.post(f"/v1/analyses/{second}/cancel")
        until(lambda: guarded.client.get(f"/v1/analyses/{second}/events").status_code == 200)
        assert heard(guarded, second)[-1]["data"]["status"] == "cancelled"
    finally:
        del guarded.client.headers["Authorization"]


def logged_in(client: httpx.Client, key: str = KEY, **fields: str) -> httpx.Response:
    """Log in through the form."""
    form = read(client, "/login")
    return client.post("/login", data={"csrf_token": token_of(form), "key": key, **fields})


def test_pages_need_the_key(guarded: Service) -> None:
    """Without a session every page leads to the login, and from there back; static files are for everybody."""
    with httpx.Client(base_url=guarded.url, trust_env=False) as client:
        for path in (
            "/",
            "/reports?kind=path",
            "/checkpoints",
            "/analyses/x",
            "/fetches/x",
            "/definitions",
            "/reports/x.csv",
        ):
            answer = client.get(path)
            assert answer.status_code == 303
            assert answer.headers["location"] == f"/login?next={quote(path, safe='')}"
        assert client.get("/static/style.css").status_code == 200
        wrong = logged_in(client, f"{KEY}x")
        assert wrong.status_code == 403
        assert "set-cookie" in wrong.headers
        assert "interplay_session" not in wrong.headers["set-cookie"]
        assert client.get("/").status_code == 303
        right = logged_in(client, next="/reports?kind=path")
        assert (right.status_code, right.headers["location"]) == (303, "/reports?kind=path")
        cookie = next(value for value in right.headers.get_list("set-cookie") if "interplay_session" in value)
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        read(client, "/reports?kind=path")


def test_a_session_reads_and_writes_by_its_token(guarded: Service) -> None:
    """The cookie reads the API; to write, the token of a page must come with it; after the logout neither works."""
    with httpx.Client(base_url=guarded.url, trust_env=False) as client:
        assert client.get("/v1/probes").status_code == 401
        logged_in(client)
        page = read(client, "/")
        assert "The first report, in three steps" in page
        assert client.get("/v1/probes").status_code == 200
        assert client.head("/v1/probes").status_code == 200
        cancel = "/v1/analyses/none/cancel"
        assert client.post(cancel).status_code == 401
        assert client.post(cancel, headers={"X-CSRF-Token": "0" * 64}).status_code == 401
        assert client.post(cancel, headers={"X-CSRF-Token": token_of(page)}).status_code == 404
        assert client.post("/logout", data={"csrf_token": token_of(page)}).headers["location"] == "/login"
        assert client.get("/v1/probes").status_code == 401


def test_no_other_cookie_is_a_session(guarded: Service) -> None:
    """The login's cookie, a changed one and one of another service admit nobody; nor does a login without its token."""
    with httpx.Client(base_url=guarded.url, trust_env=False) as client:
        read(client, "/login")
        of_login = client.cookies["interplay_login"]
        for cookie in (of_login, f"{of_login}x", "a.b.c", ""):
            headers = {"Cookie": f"interplay_session={cookie}"}
            assert httpx.get(f"{guarded.url}/v1/probes", headers=headers, trust_env=False).status_code == 401
            assert httpx.get(f"{guarded.url}/reports", headers=headers, trust_env=False).status_code == 303
        assert client.post("/login", data={"key": KEY}).status_code == 403
        logged_in(client)
        session = client.cookies["interplay_session"]
        changed = ("A" if session[0] != "A" else "B") + session[1:]
        headers = {"Cookie": f"interplay_session={changed}"}
        assert httpx.get(f"{guarded.url}/v1/probes", headers=headers, trust_env=False).status_code == 401


@pytest.mark.parametrize("elsewhere", ["https://evil.example/", "//evil.example", "/\\evil.example", "/a\nb", "evil"])
def test_a_login_leads_nowhere_else(guarded: Service, elsewhere: str) -> None:
    """The address to go on to is one of this service."""
    with httpx.Client(base_url=guarded.url, trust_env=False) as client:
        answer = logged_in(client, next=elsewhere)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")

"""A service with an API key: what is refused without it, and which processes know it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests import services
from tests.app.api.test_events import heard
from tests.app.api.test_uploads import problem
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

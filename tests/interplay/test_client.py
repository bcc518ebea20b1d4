"""The client against faulty servers and against the real service."""

import hashlib
import json
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from interplay import Analysis, AnalysisFailed, Client, InterplayError, NotOne, ProblemError, ServiceUnreachable
from tests.interplay.scripted import answer, scripted
from tests.services import Service

SUCCEEDED = {"id": "a", "status": "succeeded", "progress": {"done": 1, "total": 1, "phase": ""}, "report_id": "r"}
RUNNING = {**SUCCEEDED, "status": "running", "report_id": None}


def closed_port() -> int:
    """Return a port of the loopback interface on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


# --- without a service ----------------------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    """A refused connection names the URL."""
    url = f"http://127.0.0.1:{closed_port()}"
    with Client(url) as client, pytest.raises(ServiceUnreachable, match=url):
        client.get_report("x")


def test_something_else_answers() -> None:
    """A page instead of JSON is not a service; a proxy's error page is a problem with its status."""
    with (
        scripted((200, b"<html>hello"), (502, b"<html>bad gateway"), answer([1])) as server,
        Client(server.url, retry_seconds=0) as client,
    ):
        with pytest.raises(ServiceUnreachable, match="not an Interplay service"):
            client.get_report("x")
        with pytest.raises(ProblemError, match="502: <html>bad gateway") as caught:
            client.get_report("x")
        assert caught.value.status == 502
        with pytest.raises(ServiceUnreachable, match="not JSON"):
            client.get_report("x")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:8321", "http://", "http://[::1", "nonsense"])
def test_urls_that_are_none(url: str) -> None:
    """A value that is not an http URL is refused before any request."""
    with pytest.raises(ValueError, match="not a"):
        Client(url)


def test_key_and_url_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments take precedence over INTERPLAY_URL and INTERPLAY_API_KEY; without a key no header is sent."""
    with scripted(answer({})) as server:
        monkeypatch.setenv("INTERPLAY_URL", f"{server.url}/")
        monkeypatch.setenv("INTERPLAY_API_KEY", "from-environment")
        for client in (Client(), Client(api_key="from-argument")):
            with client:
                client.get_report("x")
        monkeypatch.delenv("INTERPLAY_API_KEY")
        with Client() as client:
            client.get_report("x")
    sent = [seen.headers.get("Authorization") for seen in server.seen]
    assert sent == ["Bearer from-environment", "Bearer from-argument", None]
    assert [seen.target for seen in server.seen] == ["/v1/reports/x"] * 3


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_keys_that_no_header_can_carry(key: str) -> None:
    """A key with a line end or a non-ASCII character is refused, and the message does not repeat it."""
    with pytest.raises(ValueError, match="API key") as caught:
        Client(api_key=key)
    assert key not in str(caught.value)


def test_loopback_goes_round_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy from the environment is not used for loopback addresses."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    with scripted(answer({"id": "r"})) as server, Client(server.url) as client:
        assert client.get_report("r")["id"] == "r"


def test_ids_stay_one_segment() -> None:
    """An id with slashes, dots or a query never reaches another route."""
    with scripted(answer({})) as server, Client(server.url) as client:
        for identifier in ("../checkpoints", "a?b=c", "a#b", ""):
            client.get_report(identifier)
    assert [seen.target for seen in server.seen] == [
        "/v1/reports/..%2Fcheckpoints",
        "/v1/reports/a%3Fb%3Dc",
        "/v1/reports/a%23b",
        "/v1/reports/%20",
    ]


def test_numbers_that_json_cannot_say() -> None:
    """NaN and infinity are refused before any request, with their place."""
    nan, inf = float("nan"), float("inf")
    with scripted(answer({})) as server, Client(server.url) as client:
        with pytest.raises(ValueError, match=r"^options\.grid\.values\.1 is nan, which is not a finite number"):
            client.create_path("a", "b", probe_id="p", options={"grid": {"values": (0.5, nan)}})
        with pytest.raises(ValueError, match=r"^axis\.values\.1 is inf"):
            client.create_series("step", {1: "a", inf: "b"}, probe_id="p")
        with pytest.raises(ValueError, match=r"^checks\.0\.min is -inf"):
            client.create_gate({"name": "g", "checks": [{"metric": "m", "min": -inf}]})
    assert not server.seen


def test_each_creation_has_a_key_of_its_own() -> None:
    """Without a key two calls are two analyses; a given key is sent unchanged."""
    with scripted(answer({})) as server, Client(server.url) as client:
        client.create_analysis(feature_set_id="f")
        client.create_analysis(feature_set_id="f")
        client.create_analysis(checkpoint_id="c", probe_id="p", options={"seed": 1}, idempotency_key="mine")
    keys = [seen.headers["Idempotency-Key"] for seen in server.seen]
    assert len({*keys}) == 3
    assert keys[2] == "mine"
    expected = {"kind": "evaluation", "checkpoint_id": "c", "probe_id": "p", "options": {"seed": 1}}
    assert json.loads(server.seen[2].body_end) == expected


def test_upload_streams_with_the_spec_first(tmp_path: Path) -> None:
    """A form of 256 MiB, where there is no other way, takes less than 48 MiB of memory, and the spec goes first."""
    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:
        file.truncate(256 * 2**20)
    program = """if True:
        import resource, sys
        from interplay import Client
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        network = {"family": "builtin"}
        Client(sys.argv[1]).push_checkpoint(sys.argv[2], name="n", architecture=network, metadata={"epoch": 1})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    with scripted(answer({"title": "no such route"}, 404), answer({"id": "c"}, 201)) as server:
        command = [sys.executable, "-c", program, server.url, str(large)]
        grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    _, seen = server.seen
    assert grown_kib < 48 * 2**10
    assert 256 * 2**20 < seen.body_bytes < 256 * 2**20 + 2**12
    spec, file_part = seen.body_start.find(b'name="spec"'), seen.body_start.find(b'name="file"')
    assert 0 < spec < file_part
    content = seen.body_start[spec:].split(b"\r\n\r\n")[1].split(b"\r\n--")[0]
    assert json.loads(content) == {"name": "n", "architecture": {"family": "builtin"}, "metadata": {"epoch": 1}}


@pytest.mark.parametrize(
    ("problem", "message"),
    [({"title": "Memory ran out", "detail": "One sample is too much."}, "Memory ran out: One"), (None, "cancelled")],
)
def test_wait_raises_what_went_wrong(problem: dict[str, Any] | None, message: str) -> None:
    """A failed analysis raises its problem, a cancelled one its status; both carry the analysis."""
    ended = {**RUNNING, "status": "failed" if problem else "cancelled", "problem": problem}
    with scripted(answer(ended)) as server, Client(server.url) as client:
        with pytest.raises(AnalysisFailed, match=message) as caught:
            client.wait("a")
        assert caught.value.analysis == ended
        assert caught.value.problem == problem


def test_problem_keeps_its_members() -> None:
    """Further members of a problem can be read; every error of the client is an InterplayError."""
    body = {"type": "urn:x", "title": "T", "detail": "D", "status": 422, "missing": ["w"]}
    with scripted(answer(body, 422)) as server, Client(server.url) as client:
        with pytest.raises(InterplayError, match="T: D") as caught:
            client.cancel("a")
        assert isinstance(caught.value, ProblemError)
        assert (caught.value.status, caught.value.type, caught.value.members) == (422, "urn:x", {"missing": ["w"]})


def test_list_follows_cursors_up_to_its_limit() -> None:
    """Pages are fetched as needed, each with the filters and metadata."""
    pages = [
        answer({"items": [{"id": "0"}, {"id": "1"}], "next_cursor": "after=1"}),
        answer({"items": [{"id": "2"}, {"id": "3"}], "next_cursor": "after=3"}),
        answer({"items": [{"id": "4"}], "next_cursor": "after=4"}),
    ]
    with scripted(*pages) as server, Client(server.url) as client:
        listed = client.list("checkpoints", limit=5, page_size=2, name="n", metadata={"final": True, "epoch": 1})
        assert next(listed)["id"] == "0"
        assert len(server.seen) == 1
        assert [item["id"] for item in listed] == ["1", "2", "3", "4"]
    query = "name=n&metadata=final%3Dtrue&metadata=epoch%3D1&limit="
    assert [seen.target.removeprefix("/v1/checkpoints?") for seen in server.seen] == [
        f"{query}2",
        f"{query}2&cursor=after%3D1",
        f"{query}1&cursor=after%3D3",
    ]


def test_readiness_is_none_where_nothing_says_it() -> None:
    """An answer of 503 says it too; a proxy's page, and no answer, do not."""
    for given, expected in (
        (answer({"worker": "none"}, 503), {"worker": "none"}),
        (answer([]), None),
        ((200, b"<"), None),
    ):
        with scripted(given) as server, Client(server.url) as client:
            assert client.readiness() == expected
    with Client(f"http://127.0.0.1:{closed_port()}") as client:
        assert client.readiness() is None


def test_a_download_that_is_damaged_leaves_nothing(tmp_path: Path) -> None:
    """Other bytes than the resource's hash says are an error, and so is a problem; no file appears."""
    resource = answer({"id": "c", "name": "n", "sha256": hashlib.sha256(b"weights").hexdigest()})
    target = tmp_path / "net.safetensors"
    for given, error in (
        ((200, b"weighty"), "has the sha256"),
        (answer({"title": "Not found"}, 404), "Not found"),
    ):
        with (
            scripted(resource, given) as server,
            Client(server.url) as client,
            pytest.raises(InterplayError, match=error),
        ):
            client.download("checkpoints", "c", target)
    assert list(tmp_path.iterdir()) == []
    with scripted(resource, (200, b"weights")) as server, Client(server.url) as client:
        assert client.download("checkpoints", "c", target)["name"] == "n"
    assert target.read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [target]


# --- with the service -----------------------------------------------------------------------------------------------


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    """Yield a client of the session's service."""
    with Client(service.url) as opened:
        yield opened


def test_checkpoint_to_report(client: Client, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Pushed files give a report that names them, and the collections list them."""
    run = uuid.uuid4().hex
    checkpoint = client.push_checkpoint(mlp_checkpoint_file, name="net", metadata={"run": run, "epoch": 3})
    names = [str(digit) for digit in range(10)]
    probe = client.push_probe(digits_probe_file, name="digits", class_names=names, preprocess={"scale": 1 / 16})
    assert checkpoint["architecture"]["args"]["sizes"] == [64, 32, 10]
    assert (probe["n_samples"], probe["input_shape"], probe["class_names"]) == (1797, [64], names)

    looks: list[Analysis] = []
    analysis = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe["id"])
    ended = client.wait(analysis["id"], timeout_seconds=120, on_progress=looks.append)
    assert dict(ended) == client.get_analysis(analysis["id"]) == looks[-1]
    report = client.get_report(ended["report_id"], "evaluation")
    assert report["subject"]["sha256"] == checkpoint["sha256"]
    assert report["probe"]["sha256"] == probe["sha256"]
    mir = report["splits"]["all"]["interplay"]["sample"]["global"]["mir"]
    assert mir is not None
    assert 0 <= mir <= 1

    (listed,) = client.list("checkpoints", metadata={"run": run, "epoch": 3})
    assert listed["id"] == checkpoint["id"]
    assert not [*client.list("checkpoints", metadata={"run": run, "epoch": 4})]
    (found,) = client.list("analyses", checkpoint_id=checkpoint["id"], probe_id=probe["id"], status="succeeded")
    assert found["id"] == analysis["id"]
    (summary,) = client.list("reports", checkpoint_id=checkpoint["id"], kind="evaluation")
    assert summary["id"] == report["id"]

    client.delete("checkpoints", checkpoint["id"])
    assert not [*client.list("checkpoints", metadata={"run": run})]
    assert client.get_report(report["id"]) == report


def test_resources_are_found_by_what_people_know(client: Client, mlp_checkpoint_file: Path, tmp_path: Path) -> None:
    """An id, its first characters, a name: of several with the name the newest; none or too many are errors."""
    name = uuid.uuid4().hex
    older, newer = (client.push_checkpoint(mlp_checkpoint_file, name=name)["id"] for _ in range(2))
    assert client.find("checkpoints", name)["id"] == newer
    assert [found["id"] for found in client.find_all("checkpoints", name)] == [newer, older]
    assert client.find("checkpoints", older)["id"] == client.find("checkpoints", older[:13])["id"] == older
    # A name that looks like the beginning of an id counts as the name.
    named = client.push_checkpoint(mlp_checkpoint_file, name=older[:13])["id"]
    assert client.find("checkpoints", older[:13])["id"] == named
    for text in (uuid.uuid4().hex, str(uuid.uuid4()), "?x"):
        with pytest.raises(NotOne, match="There is no checkpoint with the name or id"):
            client.find("checkpoints", text)
    with pytest.raises(NotOne, match="There is no feature set"):
        client.find("feature-sets", name)
    client.download("checkpoints", older, tmp_path / "net")
    assert (tmp_path / "net").read_bytes() == mlp_checkpoint_file.read_bytes()
    assert client.page_of("checkpoints", older) == f"{client.url}/checkpoints/{older}"
    assert (client.readiness() or {})["ready"] is True


def test_idempotency(client: Client, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """The same key and request give the same analysis; another request with that key is a 409."""
    subject: dict[str, Any] = {
        "checkpoint_id": client.push_checkpoint(mlp_checkpoint_file, name="net")["id"],
        "probe_id": client.push_probe(digits_probe_file, name="digits")["id"],
    }
    key = uuid.uuid4().hex
    first = client.create_analysis(**subject, idempotency_key=key)
    assert client.create_analysis(**subject, idempotency_key=key)["id"] == first["id"]
    with pytest.raises(ProblemError) as caught:
        client.create_analysis(**subject, options={"seed": 7}, idempotency_key=key)
    assert caught.value.status == 409
    client.wait(first["id"], timeout_seconds=120)


def test_problems_of_the_service(client: Client, tmp_path: Path) -> None:
    """An unknown id and a file that is not safetensors give problems with type and detail."""
    with pytest.raises(ProblemError) as caught:
        client.get_report("no-such-report")
    assert (caught.value.status, caught.value.type) == (404, "urn:interplay:problem:not-found")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the sort")
    with pytest.raises(ProblemError, match="not safetensors") as caught:
        client.push_feature_set(broken, name="broken")
    assert (caught.value.status, caught.value.type) == (422, "urn:interplay:problem:invalid-file")


def test_paging_and_times_against_the_service(client: Client, mlp_checkpoint_file: Path) -> None:
    """Every resource is listed once, newest first, with any page size; times without a zone are local."""
    run, started = uuid.uuid4().hex, datetime.now()  # noqa: DTZ005 - the naive time is what is tested
    pushed = [client.push_checkpoint(mlp_checkpoint_file, name=run, metadata={"n": n})["id"] for n in range(7)]
    for page_size in (1, 3, 7, 100):
        assert [item["id"] for item in client.list("checkpoints", name=run, page_size=page_size)] == pushed[::-1]
    assert [item["id"] for item in client.list("checkpoints", name=run, limit=2)] == pushed[:-3:-1]
    hour = timedelta(hours=1)
    assert len([*client.list("checkpoints", name=run, created_after=started - hour)]) == 7
    assert not [*client.list("checkpoints", name=run, created_after=started + hour)]
    assert not [*client.list("checkpoints", name=run, created_before=started - hour)]


def test_cancel(client: Client, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A cancelled analysis ends as cancelled, and waiting for it raises."""
    checkpoint = client.push_checkpoint(mlp_checkpoint_file, name="net")
    probe = client.push_probe(digits_probe_file, name="digits")
    ids = [
        client.create_analysis(
            checkpoint_id=checkpoint["id"], probe_id=probe["id"], options={"null_permutations": 1000}
        )
        for _ in range(2)
    ]
    for analysis in ids:
        client.cancel(analysis["id"])
    for analysis in ids:
        with pytest.raises(AnalysisFailed, match="cancelled"):
            client.wait(analysis["id"], timeout_seconds=60)

"""Waiting for an analysis: by events, and by polling if events do not arrive."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from interplay import Client, ProblemError, WaitTimeout, waiting
from tests import services
from tests.interplay.scripted import BREAK, HOLD, answer, event, scripted
from tests.interplay.test_client import RUNNING, SUCCEEDED
from tests.services import Service, until

QUEUED = {**RUNNING, "status": "queued"}
HEARTBEAT = b": it goes on\n\n"


def test_wait_is_told() -> None:
    """One request delivers every event, in any chunks and with line separators inside JSON."""
    odd = {**RUNNING, "name": "a\u2028b\x85c"}
    sent = b"retry: 1000\r\n\r\n" + event(QUEUED) + HEARTBEAT + event(odd, "progress") + event(SUCCEEDED, "final")
    looks: list[Any] = []
    chunks = [sent[start : start + 7] for start in range(0, len(sent), 7)]
    with scripted(answer({}), streams=[chunks]) as server, Client(server.url) as client:
        assert dict(client.wait("a", on_progress=looks.append)) == SUCCEEDED
    assert looks == [QUEUED, odd, SUCCEEDED]
    assert [seen.target for seen in server.seen] == ["/v1/analyses/a/events"]


def test_older_service_is_asked() -> None:
    """Without the route the analysis is polled; the route is tried once."""
    looks: list[str] = []
    with scripted(answer(RUNNING), answer(RUNNING), answer(SUCCEEDED)) as server, Client(server.url) as client:
        client.wait("a", poll_seconds=0.01, on_progress=lambda analysis: looks.append(analysis["status"]))
    assert looks == ["running", "running", "succeeded"]
    assert len(server.seen) == 4


def test_wait_sits_out_a_restart() -> None:
    """The wait survives a stream that ends early, broken connections and 503, and opens the next stream."""
    looks: list[str] = []
    answers = (BREAK, BREAK, answer({"title": "Unavailable"}, 503), answer(RUNNING))
    streams = [[event(QUEUED), event(RUNNING)], [event(RUNNING), event(SUCCEEDED, "final")]]
    with scripted(*answers, streams=streams) as server, Client(server.url) as client:
        ended = client.wait("a", poll_seconds=0.01, on_progress=lambda analysis: looks.append(analysis["status"]))
    assert dict(ended) == SUCCEEDED
    assert looks == ["queued", "running", "running", "running", "succeeded"]


def test_proxy_that_holds_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is silent from its beginning is not opened a second time."""
    monkeypatch.setattr(waiting, "_SILENCE_SECONDS", 0.3)
    with (
        scripted(answer(RUNNING), answer(RUNNING), answer(SUCCEEDED), streams=[[HOLD], [HOLD]]) as server,
        Client(server.url) as client,
    ):
        started = time.monotonic()
        client.wait("a", poll_seconds=0.01)
        assert time.monotonic() - started < 5
    assert [seen.target for seen in server.seen].count("/v1/analyses/a/events") == 1


def test_stream_that_falls_silent_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a stream falls silent after an event, the client polls and opens a new one."""
    monkeypatch.setattr(waiting, "_SILENCE_SECONDS", 0.3)
    streams = [[event(RUNNING), HOLD], [event(RUNNING), event(SUCCEEDED, "final")]]
    with scripted(answer(RUNNING), streams=streams) as server, Client(server.url) as client:
        assert dict(client.wait("a", poll_seconds=0.01)) == SUCCEEDED
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    "useless", [[], [b"data: [1]\n\n"], [b"data: {nonsense\n\n"]], ids=["empty", "list", "no JSON"]
)
def test_streams_that_tell_nothing_are_not_tried_for_ever(useless: list[bytes]) -> None:
    """After a few streams without a state the client only polls."""
    answers = [answer(RUNNING)] * 6
    with scripted(*answers, answer(SUCCEEDED), streams=[useless] * 20) as server, Client(server.url) as client:
        assert dict(client.wait("a", poll_seconds=0.01)) == SUCCEEDED
    assert [seen.target for seen in server.seen].count("/v1/analyses/a/events") <= 3


def test_wait_does_not_sit_out_what_never_answered() -> None:
    """An unknown id fails at once, whatever the stream responded."""
    with scripted(answer({"title": "No such resource"}, 404)) as server, Client(server.url) as client:
        with pytest.raises(ProblemError):
            client.wait("a")
        assert len(server.asked()) == 1


def test_wait_gives_up_in_time() -> None:
    """At the timeout the wait ends, also within a stream, and the message says that the analysis continues."""
    with scripted(answer(RUNNING)) as server, Client(server.url) as client:
        started = time.monotonic()
        with pytest.raises(WaitTimeout, match="it continues"):
            client.wait("a", poll_seconds=0.01, timeout_seconds=0.1)
        assert time.monotonic() - started < 5


def test_limit_in_the_middle_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last seconds before the timeout are polled, so that a silent stream cannot extend it."""
    monkeypatch.setattr(waiting, "_TOO_SHORT_SECONDS", 0.5)
    monkeypatch.setattr(waiting, "_SILENCE_SECONDS", 0.3)
    streams = [[event(RUNNING), HOLD]] * 20
    with scripted(answer(RUNNING), streams=streams) as server, Client(server.url) as client:
        started = time.monotonic()
        with pytest.raises(WaitTimeout):
            client.wait("a", poll_seconds=0.01, timeout_seconds=1.5)
        assert 1.4 < time.monotonic() - started < 4


# --- with the service -----------------------------------------------------------------------------------------------


def slow_analysis(client: Client, checkpoint: Path, probe: Path, permutations: int) -> str:
    """Return the id of an analysis that takes longer the more permutations it has."""
    ids = {
        "checkpoint_id": client.push_checkpoint(checkpoint, name="net")["id"],
        "probe_id": client.push_probe(probe, name="digits", preprocess={"scale": 1 / 16})["id"],
    }
    return client.create_analysis(**ids, options={"null_permutations": permutations})["id"]


def test_wait_is_one_request(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A real service streams every change, without a poll in between."""
    with Client(service.url) as client:
        analysis = slow_analysis(client, mlp_checkpoint_file, digits_probe_file, 15)
        phases: list[str] = []
        # So long a pause that asking could not have seen anything of it.
        ended = client.wait(
            analysis, poll_seconds=600, on_progress=lambda state: phases.append(state["progress"]["phase"])
        )
        assert ended["status"] == "succeeded"
        assert len(phases) > 2
        assert client.get_report(ended["report_id"], "evaluation")["splits"]["all"]["n_samples"] == 1797


@pytest.mark.slow
def test_service_that_starts_again_under_a_wait(
    tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """The wait survives a restart of the service on the same port and receives the end of the analysis."""
    with services.running(tmp_path / "data") as service, Client(service.url) as client:
        analysis = slow_analysis(client, mlp_checkpoint_file, digits_probe_file, 50)
        heard: list[str] = []
        ended: list[Any] = []

        def wait() -> None:
            ended.append(client.wait(analysis, on_progress=lambda state: heard.append(state["status"])))

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: "running" in heard)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(15) == 0
        assert not ended
        port = service.url.rpartition(":")[2]
        again = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", port],
            env=service.environment,
            stdout=subprocess.DEVNULL,
        )
        try:
            thread.join(90)
            assert not thread.is_alive()
            assert ended[0]["status"] == "succeeded"
        finally:
            again.terminate()
            assert again.wait(15) == 0

"""Which failures the client retries, against servers that fail as scripted."""

import hashlib
import json
import os
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from interplay import Client, ProblemError, ServiceUnreachable
from tests.interplay.scripted import BREAK, answer, scripted

BUSY = answer({"title": "Unavailable"}, 503)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_passes_by_itself_is_tried_again(status: int) -> None:
    """A read, a creation with its key and a cancellation succeed after retries; each attempt is the same request."""
    failing = (answer({"title": "later"}, status), BREAK)
    with (
        scripted(*failing, answer({"id": "r"}), *failing, answer({"id": "a"}), *failing, answer({"id": "c"})) as server,
        Client(server.url) as client,
    ):
        assert client.get_report("r")["id"] == "r"
        assert client.create_analysis(feature_set_id="f")["id"] == "a"
        assert client.cancel("a")["id"] == "c"
    creations = server.seen[3:6]
    assert len({seen.headers["Idempotency-Key"] for seen in creations}) == 1
    assert len({seen.body_end for seen in creations}) == 1
    assert len(server.seen) == 9


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500])
def test_what_stays_wrong_is_not_tried_again(status: int) -> None:
    """A problem of the request and a fault of the service are raised at once."""
    with scripted(answer({"title": "no"}, status)) as server, Client(server.url) as client:
        with pytest.raises(ProblemError):
            client.get_report("r")
        assert len(server.seen) == 1


def test_pauses_grow_and_end() -> None:
    """Pauses between attempts grow, and no attempt begins after the given time."""
    with scripted(BUSY) as server, Client(server.url, retry_seconds=1.5) as client:
        started = time.monotonic()
        with pytest.raises(ProblemError):
            client.get_report("r")
        assert time.monotonic() - started < 5
        assert 3 <= len(server.seen) <= 6


@pytest.mark.parametrize("seconds", ["0", "none"])
def test_no_retries(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    """With 0 seconds, given or in the environment, each call is made once."""
    monkeypatch.setenv("INTERPLAY_RETRY_SECONDS", "0" if seconds == "0" else "7")
    with scripted(BREAK) as server, Client(server.url, retry_seconds=None if seconds == "0" else 0) as client:
        with pytest.raises(ServiceUnreachable, match="broke"):
            client.get_report("r")
        assert len(server.seen) == 1


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_retry_seconds_that_are_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A value that is not a number of seconds is refused, with the name of the variable."""
    monkeypatch.setenv("INTERPLAY_RETRY_SECONDS", text)
    with pytest.raises(ValueError, match="INTERPLAY_RETRY_SECONDS"):
        Client()


def test_retry_after_is_kept_to() -> None:
    """No attempt comes before the time of Retry-After, in seconds or as an instant."""
    for text in ("1", ""):
        # An instant has whole seconds: this one is more than 1 s away.
        text = text or format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        with (
            scripted(answer({"title": "busy"}, 429, retry_after=text), answer({"id": "r"})) as server,
            Client(server.url) as client,
        ):
            started = time.monotonic()
            assert client.get_report("r")["id"] == "r"
            assert time.monotonic() - started > 0.9


def test_retry_after_beyond_all_patience_is_an_answer() -> None:
    """If Retry-After exceeds the remaining time, the client raises at once."""
    with scripted(answer({"title": "busy"}, 503, retry_after="3600")) as server, Client(server.url) as client:
        started = time.monotonic()
        with pytest.raises(ProblemError) as caught:
            client.get_report("r")
        assert time.monotonic() - started < 2
        assert caught.value.retry_after == 3600
        assert len(server.seen) == 1


def test_deletion_whose_answer_was_lost() -> None:
    """A 404 on a retry of a deletion counts as success; on the first attempt it is a problem."""
    gone = answer({"title": "There is no such resource"}, 404)
    with scripted(BREAK, gone) as server, Client(server.url) as client:
        client.delete("checkpoints", "c")
        assert [seen.method for seen in server.seen] == ["DELETE", "DELETE"]
    with scripted(gone) as server, Client(server.url) as client, pytest.raises(ProblemError):
        client.delete("checkpoints", "c")


def test_upload_that_was_refused_is_sent_again(tmp_path: Path) -> None:
    """A busy service has stored nothing, so the whole file is sent again."""
    file = tmp_path / "features.safetensors"
    file.write_bytes(os.urandom(100_000))
    with scripted(BUSY, answer({"id": "f"}, 201)) as server, Client(server.url) as client:
        assert client.push_feature_set(file, name="f")["id"] == "f"
    assert [seen.method for seen in server.seen] == ["POST", "POST"]
    assert len({seen.body_bytes for seen in server.seen}) == 1
    assert server.seen[0].body_bytes > 100_000


def test_move_of_a_baseline_whose_answer_was_lost() -> None:
    """A conflict on a retry is a success if the baseline is at the requested report, and a problem otherwise."""
    moved, elsewhere = (answer({"title": "moved", "report_id": name}, 409) for name in ("new", "other"))
    with scripted(BREAK, moved, answer({"name": "main", "report_id": "new"})) as server, Client(server.url) as client:
        assert client.set_baseline("main", "new", expected_report_id="old")["report_id"] == "new"
        assert [seen.method for seen in server.seen] == ["PUT", "PUT", "GET"]
    for answers in ((BREAK, elsewhere), (moved,)):
        with scripted(*answers) as server, Client(server.url) as client, pytest.raises(ProblemError, match="moved"):
            client.set_baseline("main", "new", expected_report_id="old")


@pytest.mark.parametrize("kept", [True, False])
def test_upload_whose_answer_was_lost_is_asked_for(tmp_path: Path, kept: bool) -> None:
    """If it is unknown whether a file was stored, the client asks, and sends it again only if it was not."""
    file = tmp_path / "features.safetensors"
    file.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    listed = [{"id": "other", "sha256": "0" * 64}, *([{"id": "first", "sha256": sha256}] if kept else [])]
    answers = (BREAK, answer({"items": [], "next_cursor": None}), answer({"items": listed, "next_cursor": None}))
    with scripted(*answers, answer({"id": "second"}, 201)) as server, Client(server.url) as client:
        assert client.push_feature_set(file, name="f")["id"] == ("first" if kept else "second")
    assert [seen.method for seen in server.seen] == ["POST", "GET", "GET", *([] if kept else ["POST"])]
    assert "name=f" in server.seen[2].target
    assert "created_after=" in server.seen[2].target


def test_archive_whose_answer_was_lost_is_not_sent_again(tmp_path: Path) -> None:
    """The service hashes the weights in an archive, so the client cannot find it by its own hash."""
    file = tmp_path / "checkpoint.tar"
    file.write_bytes(b"no safetensors")
    with scripted(BREAK, answer({"id": "c"}, 201)) as server, Client(server.url) as client:
        with pytest.raises(ServiceUnreachable, match="broke"):
            client.push_checkpoint(file, name="c")
        assert len(server.seen) == 1
        server.answers[:] = [BUSY, answer({"id": "c"}, 201)]
        assert client.push_checkpoint(file, name="c")["id"] == "c"


def test_service_that_never_answered_is_not_waited_for() -> None:
    """A refused connection is transient only for a service that responded before."""
    with scripted(answer({"id": "r"})) as server:
        url = server.url
    started = time.monotonic()
    with Client(url) as client, pytest.raises(ServiceUnreachable, match="cannot be reached"):
        client.get_report("r")
    assert time.monotonic() - started < 5


def test_problem_of_a_creation_is_not_hidden_by_its_retries() -> None:
    """A conflict of the second attempt is raised, with the key that caused it."""
    with (
        scripted(BUSY, answer({"title": "Conflict", "analysis_id": "x"}, 409)) as server,
        Client(server.url) as client,
    ):
        with pytest.raises(ProblemError, match="Conflict") as caught:
            client.create_analysis(feature_set_id="f", idempotency_key="mine")
        assert caught.value.members == {"analysis_id": "x"}
        assert {seen.headers["Idempotency-Key"] for seen in server.seen} == {"mine"}
        assert json.loads(server.seen[0].body_end)["feature_set_id"] == "f"

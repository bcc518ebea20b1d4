"""`GET /metrics`: what Prometheus reads, on a real service."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from app.api.measures import _wanted_workers
from app.database import write
from app.models import Analysis, Fetch, Point
from app.schemas import Kind
from tests.services import Service, running, until

ROOT = Path(__file__).parents[3]


def figures(service: Service, **options: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return all samples by name and labels."""
    answer = service.client.get("/metrics", **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def requests(service: Service, **labels: str) -> float:
    """Return the number of requests with these labels."""
    found = figures(service)
    return sum(
        value
        for (name, given), value in found.items()
        if name == "interplay_http_request_seconds_count" and labels.items() <= dict(given).items()
    )


def test_requests_are_counted_by_route(service: Service) -> None:
    """By the route and not the address, so that there are as many figures as routes."""
    calls = [
        ("/v1/checkpoints/none", "/v1/checkpoints/{id}", "404"),
        ("/v1/checkpoints/another", "/v1/checkpoints/{id}", "404"),
        ("/v1/checkpoints?limit=0", "/v1/checkpoints", "422"),
        ("/v1/nothing/here", "none", "404"),
        ("/reports/none", "/reports/{id}", "404"),
        ("/healthz", "/healthz", "200"),
    ]
    before = {call: requests(service, route=call[1], status=call[2]) for call in calls}
    for path, _, status in calls:
        assert service.client.get(path).status_code == int(status)
    for call, count in before.items():
        more = sum(1 for other in calls if other[1:] == call[1:])
        assert requests(service, route=call[1], status=call[2]) >= count + more
    assert service.client.head("/v1/checkpoints").status_code == 200
    assert requests(service, method="HEAD", route="/v1/checkpoints") >= 1


def test_what_waits_and_runs_is_counted(tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Without a worker analyses wait; the oldest says since when. Blobs and reports are counted."""
    with running(tmp_path / "data", command="api") as service:
        ids = {
            f"{noun}_id": service.post(f"/v1/{noun}s", {"name": noun}, file).json()["id"]
            for noun, file in (("checkpoint", mlp_checkpoint_file), ("probe", digits_probe_file))
        }
        for _ in range(3):
            service.analyze(**ids)
        service.analyze(kind="pruning", **ids)
        queued = ("interplay_runs", frozenset({("kind", "evaluation"), ("status", "queued")}))
        found = until(lambda: found if (found := figures(service)).get(queued) == 3 else None)
        waited = [value for (name, _), value in found.items() if name == "interplay_oldest_wait_seconds"]
        assert len(waited) == 2
        assert 0 <= min(waited) <= max(waited) < 60
        # Its points are planned by the first worker that takes its turn.
        assert found[("interplay_turns", frozenset({("status", "waiting")}))] == 1
        sizes = mlp_checkpoint_file.stat().st_size + digits_probe_file.stat().st_size
        plain = {name: value for (name, labels), value in found.items() if not labels}
        assert (plain["interplay_blobs"], plain["interplay_blob_bytes"], plain["interplay_reports"]) == (2, sizes, 0)
        assert plain["interplay_database_up"] == 1
        # Three evaluations, and a pruning whose points nobody has planned yet.
        assert plain["interplay_wanted_workers"] == 4
        assert plain["interplay_staging_free_bytes"] > 0
        assert (plain["interplay_features"], plain["interplay_feature_bytes"], plain["interplay_cache_bytes"]) == (
            0,
        ) * 3
        of_files = frozenset({("route", "/v1/checkpoints")})
        size = mlp_checkpoint_file.stat().st_size
        # The form around the file takes less than a kilobyte.
        assert size < found[("interplay_http_received_bytes_total", of_files)] < size + 2**10
        assert 0 < found[("interplay_http_sent_bytes_total", of_files)] < 2**14
        assert not any(name == "interplay_workers" for name, _ in found)
        # The lasting figures are read every few seconds, however often somebody asks.
        service.analyze(**ids)
        assert figures(service)[queued] == 3
        until(lambda: figures(service).get(queued) == 4)


def test_wanted_workers_are_those_with_something_to_do(engine_with_tables: sa.Engine) -> None:
    """Open points count each, analyses of one step once, two fetches as one; what has ended does not."""
    moment = datetime.now(UTC)

    def analysis(id_: str, kind: Kind, outcome: str | None = None) -> Analysis:
        return Analysis(
            id=id_, created_at=moment, kind=kind, name="", options={}, request_sha256="0" * 64, outcome=outcome
        )

    with write(engine_with_tables) as session:
        assert _wanted_workers(session) == 0
        session.add_all(
            Fetch(
                id=f"fetch-{number}",
                created_at=moment,
                makes="checkpoint",
                name="",
                source="",
                spec="",
                request_sha256=f"{number:064}",
            )
            for number in range(3)
        )
        session.flush()
        assert _wanted_workers(session) == 2
        session.add_all([analysis("a", "path"), analysis("b", "evaluation"), analysis("c", "evaluation", "succeeded")])
        session.flush()
        assert _wanted_workers(session) == 2
        session.add_all(
            Point(analysis_id="a", number=number, finished_at=moment if number < 2 else None) for number in range(7)
        )
        session.flush()
        assert _wanted_workers(session) == 6


def test_workers_and_streams_are_counted(service: Service) -> None:
    with_device = ("interplay_workers", frozenset({("device", "cpu")}))
    found = until(lambda: found if with_device in (found := figures(service)) else None)
    silences = [value for (name, _), value in found.items() if name == "interplay_worker_silence_seconds"]
    assert silences
    assert all(0 <= value < 15 for value in silences)
    assert ("interplay_event_streams", frozenset()) in found
    assert ("process_resident_memory_bytes", frozenset()) in found


def test_streams_do_not_count_as_slow_requests(service: Service) -> None:
    """A stream lasts as long as somebody listens: its time says nothing."""
    stream = "/v1/analyses/{id}/events"
    before = requests(service, route=stream, status="200")
    assert service.client.get("/v1/analyses/none/events").status_code == 404
    assert requests(service, route=stream, status="200") == before


def test_the_key_is_needed(tmp_path: Path) -> None:
    """What a service does is told to whoever holds its key; refusals are counted too."""
    with running(tmp_path / "data", command="api", api_key="secret") as service:
        assert service.client.get("/metrics").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        found = figures(service, headers=headers)
        refused = frozenset({("method", "GET"), ("route", "none"), ("status", "401")})
        assert found[("interplay_http_request_seconds_count", refused)] == 1


@pytest.mark.parametrize("file", ["docs/operations.md"])
def test_figures_are_documented(service: Service, file: str) -> None:
    """Each is in the document, and none is there that is not."""
    text = (ROOT / file).read_text()
    families = text_string_to_metric_families(httpx.get(f"{service.url}/metrics").text)
    # The parser takes the suffix of counters away.
    named = {family.name + "_total" * (family.type == "counter") for family in families}
    ours = {name for name in named if name.startswith("interplay_")}
    # Those of runs are there while there are any.
    ours |= {"interplay_oldest_wait_seconds", "interplay_most_attempts"}
    assert set(re.findall(r"`(interplay_[a-z_]+)`", text)) == ours

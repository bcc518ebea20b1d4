"""Server-sent events of analyses: many listeners, ends, and a service that stops during them."""

import asyncio
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import services
from tests.app.api.test_uploads import problem
from tests.app.test_analyses import SLOW, pair
from tests.services import Service

Event = dict[str, Any]


def events(lines: Iterator[str]) -> Iterator[Event]:
    """Yield the events of a stream: name, id and data."""
    event: Event = {}
    for line in lines:
        field, _, value = line.partition(": ")
        if not line and "data" in event:
            yield {**event, "data": json.loads(event["data"])}
            event = {}
        elif field in ("event", "id", "data"):
            event[field] = value


def heard(service: Service, analysis_id: str, **headers: str) -> list[Event]:
    """Return every event of an analysis, to its end."""
    with service.client.stream("GET", f"/v1/analyses/{analysis_id}/events", headers=headers) as stream:
        assert stream.status_code == 200, stream.read()
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        return [*events(stream.iter_lines())]


@pytest.fixture(scope="session")
def ids(mlp_checkpoint_file: Path, digits_probe_file: Path) -> Callable[[Service], dict[str, str]]:
    """Upload a checkpoint and a probe; return their ids."""
    return lambda service: pair(service, mlp_checkpoint_file, digits_probe_file)


def test_events_of_an_analysis(any_service: Service, ids: Callable[[Service], dict[str, str]]) -> None:
    """Each event, from queued to the report, holds the whole analysis; the last one is `final` and ends the stream."""
    queued = any_service.analyze(**ids(any_service))
    found = heard(any_service, queued["id"])
    assert found[0]["event"] in ("status", "final")
    assert [event["event"] for event in found[:-1]].count("final") == 0
    assert found[-1]["event"] == "final"
    assert found[-1]["data"] == any_service.client.get(f"/v1/analyses/{queued['id']}").json()
    assert found[-1]["data"]["status"] == "succeeded"
    for before, after in pairwise(found):
        assert after["data"] != before["data"]
        if after["event"] == "progress":
            assert after["data"]["status"] == before["data"]["status"]


def test_analysis_that_has_ended(any_service: Service, ids: Callable[[Service], dict[str, str]]) -> None:
    """An ended analysis sends one event at once and ends, also for a listener that already has that event."""
    ended = any_service.wait(any_service.analyze(**ids(any_service))["id"])
    started = time.monotonic()
    (event,) = heard(any_service, ended["id"])
    assert (event["event"], event["data"]) == ("final", ended)
    assert [event] == heard(any_service, ended["id"], **{"Last-Event-ID": event["id"]})
    assert time.monotonic() - started < 5


def test_state_that_the_listener_has_is_not_sent_again(
    service: Service, ids: Callable[[Service], dict[str, str]]
) -> None:
    """With the id of the last event the stream begins with the next state."""
    first, second = (service.analyze(**ids(service), options=SLOW) for _ in range(2))
    path = f"/v1/analyses/{second['id']}/events"
    with service.client.stream("GET", path) as stream:
        event = next(events(stream.iter_lines()))
    assert event["data"]["status"] == "queued"
    with service.client.stream("GET", path, headers={"Last-Event-ID": event["id"]}) as stream:
        for analysis in (second, first):
            service.client.post(f"/v1/analyses/{analysis['id']}/cancel")
        found = [*events(stream.iter_lines())]
    assert [(event["event"], event["data"]["status"]) for event in found] == [("final", "cancelled")]


def test_unknown_analysis(any_service: Service) -> None:
    """An unknown analysis is a problem, not an empty stream."""
    problem(any_service.client.get("/v1/analyses/no-such/events"), 404, "not-found")


def test_many_listeners_leave_room_for_others(any_service: Service, ids: Callable[[Service], dict[str, str]]) -> None:
    """With a hundred listeners, other requests are quick, and each listener receives the end."""
    # A thousand evaluations: on a busy machine a hundred listeners take seconds to connect.
    sparsities = [number / 1000 for number in range(1000)]
    queued = any_service.analyze(kind="pruning", **ids(any_service), options={"sparsities": sparsities})
    path = f"/v1/analyses/{queued['id']}"

    async def listen(client: httpx.AsyncClient, started: asyncio.Semaphore) -> str:
        async with client.stream("GET", f"{path}/events") as stream:
            lines = [line async for line in _counted(stream.aiter_lines(), started)]
        return str([*events(iter(lines))][-1]["data"]["status"])

    async def _counted(lines: Any, started: asyncio.Semaphore) -> Any:
        first = True
        async for line in lines:
            if first:
                started.release()
            first = False
            yield line

    async def answered(client: httpx.AsyncClient) -> float:
        before = time.monotonic()
        assert (await client.get(path)).status_code == 200
        return time.monotonic() - before

    async def scenario() -> tuple[list[float], list[float], list[str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=any_service.url, timeout=60, trust_env=False, limits=limits) as client:
            alone = [await answered(client) for _ in range(40)]
            started = asyncio.Semaphore(0)
            listeners = [asyncio.create_task(listen(client, started)) for _ in range(100)]
            for _ in listeners:
                await asyncio.wait_for(started.acquire(), 60)
            waits = [await answered(client) for _ in range(40)]
            assert not any(task.done() for task in listeners)
            assert (await client.post(f"{path}/cancel")).status_code == 200
            return alone, waits, await asyncio.wait_for(asyncio.gather(*listeners), 60)

    alone, waits, ends = asyncio.run(scenario())
    assert ends == ["cancelled"] * 100
    # A slow machine answers slowly without listeners too.
    assert statistics.median(waits) < max(0.25, 10 * statistics.median(alone)), (alone, waits)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_within_seconds(
    tmp_path: Path, ids: Callable[[Service], dict[str, str]], number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM stop API, worker and compute process within seconds, with status 0 and no output.

    A listener does not hold them up: its stream ends in order.
    """
    with services.running(tmp_path / "data") as service:
        family = [service.worker(), service.compute_child()]
        queued = service.analyze(**ids(service), options=SLOW)
        with service.client.stream("GET", f"/v1/analyses/{queued['id']}/events") as stream:
            found = events(stream.iter_lines())
            assert next(found)["data"]["id"] == queued["id"]
            started = time.monotonic()
            service.process.send_signal(number)
            assert all(event["event"] != "final" for event in found)
            assert time.monotonic() - started < 2.5
        assert service.process.wait(10) == 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    log = (tmp_path / "data" / "stderr.txt").read_text()
    assert "Traceback" not in log
    assert "Cancel" not in log

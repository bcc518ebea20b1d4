"""Hundreds of workers, or thousands of queued analyses, on one PostgreSQL: how long starts take, and the load.

The queue, the database, the API and the workers are real. Only the compute process is a stub: it waits for as long as
the analysis's seed says, in milliseconds, and returns the report of a real worker. So hundreds of workers fit on one
machine, forked from one process that has loaded everything.

Not a row of `python -m benchmarks`, as it takes a server and minutes of its own: `python -m benchmarks.fleet`.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import psycopg
from safetensors.numpy import save_file

from app.settings import Settings, load_settings
from interplay import Client
from tests.databases import fresh_database, postgres_server
from workers.tasks import Hello, Json, Progress, Result, Work

# Each worker holds a few, and a server has 100 by default.
_MOST_CONNECTIONS = 3000
_OF_ENVELOPE = ("schema_version", "definitions_version", "kind", "id", "analysis_id", "created_at")
_TICK_SECONDS = 0.25
_STARTED_TOGETHER = 5
# Analyses of a backlog whose starts are timed.
_OF_BACKLOG = 40
_STILL_SECONDS = 20.0


class StubChild:
    """Stands for the compute process: waits, tells progress, and returns a body."""

    def __init__(self, description: Hello, body: Json) -> None:
        self.description, self._body = description, body

    def start(self) -> None:
        """Do nothing."""

    def is_running(self) -> bool:
        """Return True."""
        return True

    def kill(self) -> None:
        """Do nothing."""

    def run(self, work: Work, on_tick: Callable[[Progress | None], bool]) -> Result:
        """Wait for as many milliseconds as the step's seed says; progress is told as a compute process does."""
        until = time.monotonic() + work.step.options.seed / 1000
        done = 0
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _TICK_SECONDS))
            done += 1
            if on_tick(Progress(phase="computing", done=done, total=10**6)):
                return Result(outcome="cancelled")
        return Result(outcome="succeeded", body=self._body)


class Fleet:
    """Worker processes, forked from this one, whose compute process is a stub."""

    def __init__(self, settings: Settings, body: Json) -> None:
        self._settings, self._body = settings, body
        self.processes: list[psutil.Process] = []

    def grow(self, count: int) -> None:
        """Start so many workers; this process must not have other threads."""
        assert threading.active_count() == 1
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                self._work()
            self.processes.append(psutil.Process(pid))

    def stop(self) -> None:
        """Kill all workers."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            os.waitpid(process.pid, 0)
        self.processes.clear()

    def _work(self) -> None:
        from workers import __main__ as worker

        try:
            # Ends with the process that forked it: nothing is written into this pipe.
            never, _ = os.pipe()
            hello = Hello(device="stub", memory_bytes=2**34, torch_version="none", families=["builtin"], untried=[])
            worker._work(self._settings, StubChild(hello, self._body), never)  # type: ignore[arg-type]
        finally:
            os._exit(1)


@contextmanager
def _database() -> Iterator[str]:
    with postgres_server() as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET max_connections = {_MOST_CONNECTIONS}")
        server.restart()
        with fresh_database(server.url) as url:
            yield url


@contextmanager
def _running(*command: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    program = [sys.executable, "-m", "app", *command]
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _real_body(environment: dict[str, str], feature_set: Path) -> Json:
    """Return the body of a report that a real worker computes."""
    with _running("serve", "--port", "0", environment=environment) as service:
        assert service.stdout is not None
        with Client(service.stdout.readline().split()[-1]) as client:
            id_ = client.push_feature_set(feature_set, name="features")["id"]
            analysis = client.wait(client.create_analysis(feature_set_id=id_)["id"])
            assert analysis["report_id"] is not None
            report = client.get_report(analysis["report_id"], "evaluation")
    return {key: value for key, value in json.loads(json.dumps(report)).items() if key not in _OF_ENVELOPE}


def _server_seconds(postmaster: psutil.Process) -> float:
    """Return the processor time of a PostgreSQL server and of all its processes, those that have ended included."""
    total = 0.0
    for process in [postmaster, *postmaster.children()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total + sum(postmaster.cpu_times()[2:4])


def _seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@contextmanager
def _measured(fleet: Fleet, postmaster: psutil.Process, into: dict[str, float], name: str) -> Iterator[None]:
    """Add the shares of a core that workers and database take during a block, under names that begin with this."""
    began, workers, server = time.monotonic(), _seconds(fleet.processes), _server_seconds(postmaster)
    yield
    took = time.monotonic() - began
    print(f"{name}: {took:.0f} s", file=sys.stderr)
    into[f"{name}_cores_of_database"] = (_server_seconds(postmaster) - server) / took
    into[f"{name}_cores_of_workers"] = (_seconds(fleet.processes) - workers) / took


def _starts(client: Client, feature_set: str, options: argparse.Namespace) -> list[float]:
    """Send short analyses at random moments; return the seconds from each one's request to its start, sorted."""
    sent = []
    for _ in range(options.starts):
        time.sleep(random.expovariate(1 / options.pause))
        sent.append(client.create_analysis(feature_set_id=feature_set, options={"seed": options.milliseconds})["id"])
    waits = []
    for id_ in sent:
        done = client.wait(id_)
        assert done["started_at"] is not None
        waits.append(datetime.fromisoformat(done["started_at"]) - datetime.fromisoformat(done["created_at"]))
    return sorted(wait.total_seconds() for wait in waits)


def _of_waits(waits: Sequence[float]) -> dict[str, float]:
    return {
        "starts": len(waits),
        "start_median": statistics.median(waits),
        "start_p99": waits[min(int(0.99 * len(waits)), len(waits) - 1)],
        "start_most": waits[-1],
    }


def _wait_for_workers(url: str, count: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        while True:
            row = connection.execute("SELECT count(*) FROM workers WHERE ended_at IS NULL").fetchone()
            assert row is not None
            if row[0] >= count:
                return
            time.sleep(0.2)


def _connections(url: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        ).fetchone()
        assert row is not None
        return int(row[0])


def main() -> None:
    """Measure a fleet; print one JSON value."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--idle", type=int, default=200, help="workers that wait")
    parser.add_argument("--busy", type=int, default=200, help="workers that compute all the time")
    parser.add_argument("--starts", type=int, default=300, help="analyses whose start is timed")
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds between two of them")
    parser.add_argument("--milliseconds", type=int, default=500, help="that each of them takes")
    parser.add_argument("--queued", type=int, help="in place of all that: this many analyses wait for one worker")
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as name, _database() as url:
        fleet, postmaster = _prepared(Path(name), url)
        try:
            found = _fleet(options, fleet, postmaster, url) if options.queued is None else _backlog(options, fleet, url)
        finally:
            fleet.stop()
    print(json.dumps(found, indent=2))


def _prepared(folder: Path, url: str) -> tuple[Fleet, psutil.Process]:
    """Make the tables and a feature set; return a fleet without workers, and the server's process."""
    given = {"INTERPLAY_DATA_DIR": str(folder / "data"), "INTERPLAY_DATABASE_URL": url, "INTERPLAY_LOG_LEVEL": "error"}
    os.environ |= given
    settings = load_settings()
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = (rng.normal(size=(200, 16)) + labels[:, None]).astype(np.float32)
    save_file({"features": features, "labels": labels, "head": rng.normal(size=(4, 16)).astype(np.float32)},
              folder / "features.safetensors")  # fmt: skip
    body = _real_body(dict(os.environ), folder / "features.safetensors")
    with psycopg.connect(url) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None
        postmaster = psutil.Process(int((Path(row[0]) / "postmaster.pid").read_text().split()[0]))
    # Loaded before they are forked.
    import dbos  # noqa: F401

    import migrations  # noqa: F401
    from workers import liveness, offers, steps, workflows  # noqa: F401

    # Else the first collection in each worker would copy all that they share.
    gc.freeze()
    return Fleet(settings, body), postmaster


def _fleet(options: argparse.Namespace, fleet: Fleet, postmaster: psutil.Process, url: str) -> dict[str, float]:
    found: dict[str, float] = {"idle": options.idle, "busy": options.busy}
    count = options.idle + options.busy
    began = time.monotonic()
    # In groups, as each takes processor time to start, of which those that wait beside it have little.
    while len(fleet.processes) < count:
        fleet.grow(min(_STARTED_TOGETHER, count - len(fleet.processes)))
        _wait_for_workers(url, len(fleet.processes))
    found["seconds_to_start_all"] = time.monotonic() - began
    with _api() as client:
        feature_set = client.find("feature-sets", "features")["id"]
        # The queue's library looks more often in its first minute.
        time.sleep(60)
        with _measured(fleet, postmaster, found, "waiting"):
            time.sleep(_STILL_SECONDS)
        for _ in range(options.busy):
            client.create_analysis(feature_set_id=feature_set, options={"seed": 3_600_000})
        time.sleep(20)
        found["connections"] = _connections(url)
        used = [process.memory_full_info().uss for process in fleet.processes[:20]]
        found["mib_of_a_worker"] = statistics.mean(used) / 2**20
        with _measured(fleet, postmaster, found, "computing"):
            time.sleep(_STILL_SECONDS)
        with _measured(fleet, postmaster, found, "starting"):
            waits = _starts(client, feature_set, options)
    return found | _of_waits(waits)


def _backlog(options: argparse.Namespace, fleet: Fleet, url: str) -> dict[str, float]:
    """Compare the API and one worker that computes nothing beside few queued analyses and beside many."""
    found: dict[str, float] = {"queued": options.queued}
    with _api() as client:
        feature_set = client.find("feature-sets", "features")["id"]
        for name, count in (("few", _OF_BACKLOG), ("many", options.queued)):
            began = time.monotonic()
            sent = [client.create_analysis(feature_set_id=feature_set)["id"] for _ in range(count)]
            found[f"{name}_seconds_to_send_one"] = (time.monotonic() - began) / count
            for what, call in (
                ("list", lambda: _first(client.list("analyses", page_size=_OF_BACKLOG))),
                ("list_queued", lambda: _first(client.list("analyses", status="queued", page_size=_OF_BACKLOG))),
                ("status", lambda sent=sent: client.get_analysis(random.choice(sent))),
            ):
                found[f"{name}_{what}_median_seconds"] = _median_seconds(call)
            fleet.grow(1)
            for id_ in sent[:_OF_BACKLOG]:
                client.wait(id_)
            fleet.stop()
            found[f"{name}_seconds_between_starts"] = _between_starts(url, sent[:_OF_BACKLOG])
    return found


def _first(found: Iterator[object]) -> None:
    # Of one page.
    next(found)


def _median_seconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(150):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[50:])


def _between_starts(url: str, ids: Sequence[str]) -> float:
    """Return the median seconds between the starts of analyses that one worker runs one after the other."""
    with psycopg.connect(url, autocommit=True) as connection:
        rows = connection.execute("SELECT started_at FROM analyses WHERE id = ANY(%s)", [list(ids)]).fetchall()
    starts = sorted(float(row[0].timestamp()) for row in rows)
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(starts))


@contextmanager
def _api() -> Iterator[Client]:
    with _running("api", "--port", "0", environment=dict(os.environ)) as service:
        assert service.stdout is not None
        with Client(service.stdout.readline().split()[-1]) as client:
            yield client


if __name__ == "__main__":
    main()

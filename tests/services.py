"""Real services for tests: processes on loopback that are tested over HTTP and leave nothing running."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

import migrations
from app import queue
from app.database import make_engine
from app.settings import Settings

T = TypeVar("T")
# Makes torchvision importable beside a CPU build of torch, in every process of a service.
OPERATORS = Path(__file__).parent / "operators"
# pytest's own folder for what runs leave to later ones.
_OF_RUNS_BEFORE = Path(__file__).parents[1] / ".pytest_cache" / "found"
# No step here is slow, but a shared machine may be.
PATIENCE_SECONDS = 90.0


@dataclass
class Service:
    """A running service: `interplay serve`, or its parts as separate processes."""

    url: str
    data_dir: Path
    process: subprocess.Popen[str]
    environment: dict[str, str]
    client: httpx.Client = field(repr=False)

    def worker(self) -> psutil.Process:
        """Return the worker process that `serve` supervises now."""
        return until(lambda: _child_running(psutil.Process(self.process.pid), "workers"))

    def compute_child(self) -> psutil.Process:
        """Return the worker's compute process."""
        return until(lambda: _child_running(self.worker(), "workers.compute.main"))

    def post(self, path: str, spec: dict[str, Any], file: bytes | Path | None = None) -> httpx.Response:
        """POST a form with a spec and optionally a file."""
        parts: dict[str, Any] = {"spec": (None, json.dumps(spec), "application/json")}
        if file is not None:
            content = file.read_bytes() if isinstance(file, Path) else file
            parts["file"] = ("file", content, "application/octet-stream")
        return self.client.post(path, files=parts)

    def analyze(self, **body: Any) -> dict[str, Any]:
        """Queue an evaluation; return the queued analysis."""
        response = self.client.post("/v1/analyses", json={"kind": "evaluation", **body})
        assert response.status_code == 202, response.text
        return dict(response.json())

    def wait(self, analysis_id: str, *, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Wait for an analysis to end; return it."""

        def ended() -> dict[str, Any] | None:
            analysis = self.client.get(f"/v1/analyses/{analysis_id}").json()
            return analysis if analysis["status"] in ("succeeded", "failed", "cancelled") else None

        return until(ended, seconds=seconds)

    def report(self, analysis: Mapping[str, Any]) -> dict[str, Any]:
        assert analysis["status"] == "succeeded", analysis
        return dict(self.client.get(f"/v1/reports/{analysis['report_id']}").json())


def comparable(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without what names the run, or depends on what was computed before."""
    own = ("id", "analysis_id", "created_at", "timings_seconds")
    kept = {name: value for name, value in report.items() if name not in own}
    kept["provenance"] = {name: value for name, value in report["provenance"].items() if name != "features_reused"}
    return kept


def until(probe: Callable[[], T | None], *, seconds: float = PATIENCE_SECONDS) -> T:
    """Return the first true value of `probe`; a connection error counts as not yet."""
    began = time.monotonic()
    while True:
        try:
            result = probe()
        except (httpx.TransportError, psutil.NoSuchProcess):
            result = None
        if result:
            return result
        waited = time.monotonic() - began
        assert waited < seconds, "this took too long"
        # Asking takes time from what is waited for.
        time.sleep(min(0.05 + waited / 20, 0.2))


@contextmanager
def running(
    data_dir: Path,
    *,
    command: str = "serve",
    tables: bool = True,
    site: Path = OPERATORS,
    tree: Path | None = None,
    port: int = 0,
    arguments: Sequence[str] = (),
    **settings: str,
) -> Iterator[Service]:
    """Run a service in its own folder; at the end it must stop by itself, with every process that it started.

    `serve` has a worker, and the block begins once an analysis would run. `api` has none and starts in a third of the
    time; it creates no tables, which are made here if `tables` says so. `site` has the sitecustomize of its processes,
    `tree` the service's packages if they are not these. `port` is that of a service before, for whoever knows its URL;
    `arguments` follow on the command line.
    """
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("INTERPLAY_")},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
        "INTERPLAY_DATA_DIR": str(data_dir),
        "INTERPLAY_THREADS": "1",
        # Several services run at the same time; an idle worker takes a third as much of a core as with the default.
        "INTERPLAY_QUEUE_POLLING_SECONDS": "0.5",
        **{f"INTERPLAY_{key.upper()}": value for key, value in settings.items()},
    }
    data_dir.mkdir(parents=True, exist_ok=True)
    if command == "serve":
        share_what_was_found(data_dir / "workers")
    if command == "api" and tables:
        _make_tables(Settings(data_dir=data_dir, database_url=settings.get("database_url", "")))
    with (data_dir / "stderr.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", command, "--port", str(port), *arguments],
            env=environment,
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    started: list[psutil.Process] = []
    try:
        line = process.stdout.readline()
        assert line.startswith("Interplay is listening on http://"), (data_dir / "stderr.txt").read_text()
        url = line.split()[-1]
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            service = Service(url, data_dir, process, environment, client)
            if command == "serve":
                until(lambda: client.get("/readyz").status_code == 200)
            yield service
            if process.poll() is None:
                started = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                assert process.wait(15) == 0, (data_dir / "stderr.txt").read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        _, alive = psutil.wait_procs(started, timeout=15)
        for left in alive:
            left.kill()
        _keep_what_was_found(data_dir / "workers")
        assert not alive, f"left running: {alive}"


def _make_tables(settings: Settings) -> None:
    engine = make_engine(settings)
    migrations.upgrade(engine)
    queue.migrate(engine)
    engine.dispose()


def _keep_what_was_found(folder: Path) -> None:
    _OF_RUNS_BEFORE.mkdir(parents=True, exist_ok=True)
    for found in folder.glob("networks-*.json"):
        if not (_OF_RUNS_BEFORE / found.name).exists():
            # In one step: another process may read it.
            partly = Path(shutil.copy(found, _OF_RUNS_BEFORE / f"{os.getpid()}.part"))
            partly.rename(_OF_RUNS_BEFORE / found.name)


def share_what_was_found(folder: Path) -> None:
    """Share the worker's cache of importable libraries, named by the installed packages: one import is enough for all.

    It is also shared with pytest's other processes, whose folders lie beside each other, and with later runs.
    """
    folder.mkdir(exist_ok=True)
    run = next((above for above in folder.parents if above.name.startswith("pytest-")), folder)

    def found() -> list[Path]:
        here = [*run.glob("*/data/workers/networks-*.json"), *run.glob("*/*/data/workers/networks-*.json")]
        return here or [*_OF_RUNS_BEFORE.glob("networks-*.json")]

    try:
        (run / "first-service").mkdir()
    except FileExistsError:
        # The first service of a run imports the libraries; others that begin meanwhile would do the same.
        with suppress(AssertionError):
            until(found, seconds=30)
    for known in found():
        if known.parent != folder and not (folder / known.name).exists():
            with suppress(FileNotFoundError):  # removed meanwhile
                shutil.copy(known, folder)


@contextmanager
def worker(service: Service, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run an additional worker process of a service; stop it at the end."""
    environment = {**service.environment, **{f"INTERPLAY_{key.upper()}": value for key, value in settings.items()}}
    with (service.data_dir / "stderr.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "--stop-at-end-of-input"],
            env=environment,
            stdin=subprocess.PIPE,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(15)
        finally:
            process.kill()
            process.wait()


def _child_running(parent: psutil.Process, module: str) -> psutil.Process | None:
    for child in parent.children():
        with suppress(psutil.NoSuchProcess):  # another child may end meanwhile
            if module in child.cmdline():
                return child
    return None

"""A service with three workers that work all the time, and what must hold however they are disturbed."""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sqlalchemy as sa
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from app.database import make_engine, read
from app.models import Analysis, Point, Report, Turn, Worker
from app.settings import Settings
from tests import services
from tests.services import Service, comparable, until

# 1 for the whole campaign.
_SCALE = float(os.environ.get("CAMPAIGN_SCALE", "0.01"))
_SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
WORKERS = 3
_SIZES, _SAMPLES = [64, 32, 10], 300
_IN_FLIGHT = 3
_LOOK_SECONDS = 0.02
# A run that a dead worker held is looked at so often until another has it.
_FOLLOW_SECONDS = 0.05
_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Place:
    """Where a worker kills itself, once it is told to (boundaries.py)."""

    name: str
    function: str
    moment: str


@dataclass
class Life:
    """A worker process from its start to its end.

    Attributes:
        process: of the worker.
        place: where it kills itself once `armed` exists; None if it does not.
        armed: a file.
        is_special: whether its environment differs from that of others.
        worker_id: known once it takes work.
    """

    process: subprocess.Popen[bytes]
    place: Place | None
    armed: Path
    is_special: bool
    worker_id: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it lives and takes work."""
        return self.worker_id is not None and self.process.poll() is None


@dataclass
class Orphan:
    """A run that a worker held when it died: seconds until it was queued again, and until it went on or had ended.

    It is alone if there was a time meanwhile at which no worker lived that takes work.
    """

    worker_id: str
    died_at: float
    released: float | None = None
    is_alone: bool = False


@dataclass
class Figures:
    """What a campaign has seen."""

    disturbances: Counter[str] = field(default_factory=Counter)
    analyses: Counter[str] = field(default_factory=Counter)
    points: int = 0
    repeated: int = 0
    released_seconds: list[float] = field(default_factory=list)
    resumed_seconds: list[float] = field(default_factory=list)
    # Of runs that waited while no worker lived: the start of one is in these.
    resumed_by_new_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {
            "disturbances": dict(sorted(self.disturbances.items())),
            "analyses": dict(sorted(self.analyses.items())),
            "points": self.points,
            "repeated": self.repeated,
            "queued_again_seconds": _quantiles(self.released_seconds),
            "resumed_seconds": _quantiles(self.resumed_seconds),
            "resumed_by_new_seconds": _quantiles(self.resumed_by_new_seconds),
        }


class Fleet:
    """Three workers of a service, a few analyses of all kinds that are always under way, and what is seen of both.

    Args:
        service: an API process without workers.
        seed: of what is drawn.
        folder: for the fleet's own files.
    """

    def __init__(self, service: Service, seed: int, folder: Path) -> None:
        self.service, self.figures, self.random, self._folder = service, Figures(), random.Random(seed), folder
        url = service.environment.get("INTERPLAY_DATABASE_URL", "")
        self.engine = make_engine(Settings(data_dir=service.data_dir, database_url=url))
        self.lives: list[Life] = []
        self.places: Callable[[], Place | None] = lambda: None
        self._requests: dict[str, dict[str, Any]] = {}
        self._expected: dict[str, dict[str, Any]] = {}
        self._asked: dict[str, str] = {}
        self._in_flight: set[str] = set()
        self._orphans: dict[str, Orphan] = {}
        self._followed_at = self._counted_at = 0.0
        # Workers that were started, and what the next ones get as their environment beside that of all.
        self.n_born = 0
        self.special: list[dict[str, str]] = []
        self._asks = False

    def prepare(self) -> None:
        """Send what is analyzed, and compute each report once without a disturbance."""
        found = self.service.data_dir / "workers"
        services.share_what_was_found(found)
        self._requests = _requests(self.service)
        # Of what can be imported one worker makes a list; those that begin meanwhile would all do so.
        self.lives.append(self._born_life())
        until(lambda: list(found.glob("networks-*.json")), seconds=_PATIENCE_SECONDS)
        self.keep_alive()
        for name, request in self._requests.items():
            done = self.service.wait(self.service.analyze(**request)["id"])
            self._expected[name] = comparable(self.service.report(done))
        self._asks = True

    def keep_alive(self) -> None:
        """Start a worker for each that has ended."""
        ended = [life for life in self.lives if life.process.poll() is not None]
        for life in ended:
            self.lives.remove(life)
            self._bury(life)
        while len(self.lives) < WORKERS:
            self.lives.append(self._born_life())
        if unknown := {life.process.pid: life for life in self.lives if life.worker_id is None}:
            with suppress(sa.exc.OperationalError), read(self.engine) as session:  # if it is away: asked again
                living = sa.select(Worker.pid, Worker.id).where(Worker.pid.in_(unknown), Worker.ended_at.is_(None))
                for pid, worker_id in session.execute(living):
                    unknown[pid].worker_id = worker_id

    def look(self) -> None:
        """Look once: start workers, ask for analyses, follow what dead workers held."""
        self.keep_alive()
        now = time.monotonic()
        if now - self._followed_at > _FOLLOW_SECONDS and self._orphans:
            self._followed_at = now
            self._follow()
        if now - self._counted_at > 10 * _FOLLOW_SECONDS:
            self._counted_at = now
            self._ask()
        time.sleep(_LOOK_SECONDS)

    def go_on(self, condition: Callable[[], bool], *, seconds: float = _PATIENCE_SECONDS) -> bool:
        """Look until a condition holds; return False if it does not in that time."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                return False
            self.look()
        return True

    def has_ended(self, life: Life, *, seconds: float) -> bool:
        """Look until a worker has ended; return False if it has not in that time."""
        return self.go_on(lambda: life.process.poll() is not None, seconds=seconds)

    def pause(self, seconds: float) -> None:
        """Look for so long."""
        self.go_on(lambda: False, seconds=seconds)

    def rest(self, seconds: float) -> None:
        """Look for so long, and ask for nothing new."""
        self._asks = False
        self.pause(seconds)
        self._asks = True

    @property
    def ready(self) -> list[Life]:
        """The workers that live and take work."""
        return [life for life in self.lives if life.is_ready]

    @property
    def is_busy(self) -> bool:
        """Whether analyses are under way."""
        return bool(self._in_flight)

    def finish(self) -> None:
        """Ask for nothing more, wait for what is under way, and check that nothing was lost or done twice."""
        self.places, self._asks = lambda: None, False
        assert self.go_on(lambda: not self._in_flight), f"still under way: {sorted(self._in_flight)}"
        self.go_on(lambda: not self._orphans, seconds=20)
        assert not self._orphans, f"nobody has taken these runs: {sorted(self._orphans)}"
        with read(self.engine) as session:
            outcomes = dict(iter(session.execute(sa.select(Analysis.id, Analysis.outcome))))
            wrong = {id_: outcomes.get(id_) for id_ in self._asked if outcomes.get(id_) != "succeeded"}
            assert not wrong, wrong
            reports = session.scalars(sa.select(Report.analysis_id).where(Report.analysis_id.in_(self._asked)))
            times = Counter(reports)
            assert {*times.values()} == {1}, times.most_common(3)
            assert len(times) == len(self._asked)
        for id_, name in self._asked.items():
            report = self.service.report(self.service.client.get(f"/v1/analyses/{id_}").json())
            assert comparable(report) == self._expected[name], f"another report of {name}: {id_}"
        until(lambda: not self._open_runs(), seconds=30)
        with read(self.engine) as session:
            points = sa.select(sa.func.count(), sa.func.sum(Point.attempts)).where(Point.analysis_id.in_(self._asked))
            n_points, attempts = session.execute(points).one()
            whole = sa.select(sa.func.count(), sa.func.sum(Analysis.attempts)).where(
                Analysis.id.in_(self._asked), Analysis.id.not_in(sa.select(Point.analysis_id))
            )
            n_whole, whole_attempts = session.execute(whole).one()
        self.figures.points = n_points + n_whole
        self.figures.repeated = int(attempts or 0) + int(whole_attempts or 0) - self.figures.points

    def close(self) -> None:
        """End the workers."""
        for life in self.lives:
            life.process.terminate()
        for life in self.lives:
            try:
                life.process.wait(15)
            finally:
                life.process.kill()
                life.process.wait()
                assert life.process.stdin is not None
                life.process.stdin.close()
        self.engine.dispose()

    def _held_by(self, worker_id: str) -> list[str]:
        """Return the runs that the queue assigns to a worker."""
        with self.engine.connect() as connection:
            query = f"SELECT workflow_uuid FROM {self._runs} WHERE status = 'PENDING' AND executor_id = :id"
            return list(connection.scalars(sa.text(query), {"id": worker_id}))

    @property
    def _runs(self) -> str:
        return "workflow_status" if self.engine.dialect.name == "sqlite" else "dbos.workflow_status"

    def _born_life(self) -> Life:
        self.n_born += 1
        armed = self._folder / f"armed-{self.n_born}"
        special = self.special.pop() if self.special else {}
        environment = {**self.service.environment, **special}
        if (place := self.places()) is not None:
            environment["KILLED_AT"] = f"{place.function} {place.moment} {armed}"
        with (self.service.data_dir / "stderr.txt").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "workers", "--stop-at-end-of-input"],
                env=environment,
                stdin=subprocess.PIPE,
                stderr=log,
            )
        return Life(process, place, armed, is_special=bool(special))

    def _bury(self, life: Life) -> None:
        life.armed.unlink(missing_ok=True)
        assert life.process.stdin is not None
        life.process.stdin.close()
        if not self.ready:
            for orphan in self._orphans.values():
                orphan.is_alone = True
        if life.worker_id is None or not self.ready:
            return  # without another worker nothing can go on; it must still end
        died_at = time.monotonic()
        with suppress(sa.exc.OperationalError):  # without the database it is not measured; it must still end
            self._orphans |= {run_id: Orphan(life.worker_id, died_at) for run_id in self._held_by(life.worker_id)}

    def _follow(self) -> None:
        now = time.monotonic()
        query = sa.text(f"SELECT workflow_uuid, status, executor_id FROM {self._runs} WHERE workflow_uuid IN :ids")
        query = query.bindparams(sa.bindparam("ids", expanding=True))
        try:
            with self.engine.connect() as connection:
                rows = connection.execute(query, {"ids": list(self._orphans)}).all()
        except sa.exc.OperationalError:
            return
        for run_id, status, executor in rows:
            orphan = self._orphans[run_id]
            if status == "PENDING" and executor == orphan.worker_id:
                continue
            if orphan.released is None:
                orphan.released = now - orphan.died_at
                if not orphan.is_alone:
                    self.figures.released_seconds.append(orphan.released)
            if status != "ENQUEUED":
                figures = self.figures.resumed_by_new_seconds if orphan.is_alone else self.figures.resumed_seconds
                figures.append(now - orphan.died_at)
                del self._orphans[run_id]

    def _ask(self) -> None:
        """Note which analyses have ended, and ask for others in their place once all workers are there.

        What a worker needs to start is not taken by others that compute: what is under way is little.
        """
        if self._in_flight:
            with suppress(sa.exc.OperationalError), read(self.engine) as session:  # if it is away: at the next look
                ended = sa.select(Analysis.id).where(Analysis.id.in_(self._in_flight), Analysis.outcome.is_not(None))
                self._in_flight.difference_update(session.scalars(ended))
        while self._asks and len(self.ready) == WORKERS and len(self._in_flight) < _IN_FLIGHT:
            name = self.random.choice(list(self._requests))
            answer = self.service.client.post("/v1/analyses", json=self._requests[name])
            if answer.status_code == 503:
                break  # the database is away
            assert answer.status_code == 202, answer.text
            id_ = answer.json()["id"]
            self._asked[id_] = name
            self._in_flight.add(id_)
            self.figures.analyses[name] += 1

    def _open_runs(self) -> list[str]:
        """Return what the queue and our tables still have open."""
        with self.engine.connect() as connection:
            runs = connection.scalars(
                sa.text(f"SELECT workflow_uuid FROM {self._runs} WHERE status IN ('PENDING', 'ENQUEUED')")
            ).all()
        with read(self.engine) as session:
            return [*runs, *session.scalars(sa.select(Turn.id).where(Turn.ended_at.is_(None)))]


def _requests(service: Service) -> dict[str, dict[str, Any]]:
    """Send files; return a request of each kind, of which no result is kept from another."""
    generator = torch.Generator().manual_seed(0)
    args = {"sizes": _SIZES, "activation": "relu", "norm": "none"}
    architecture = {"family": "builtin", "name": "mlp", "args": args}
    tensors: dict[str, torch.Tensor] = {}
    for name, (n_in, n_out) in {"layers.0": _SIZES[:2], "head": _SIZES[1:]}.items():
        tensors[f"{name}.weight"] = torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in)
        tensors[f"{name}.bias"] = torch.zeros(n_out)
    noisy = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    pair = []
    for weights in (tensors, noisy):
        content = save_tensors(weights, metadata={"architecture": json.dumps(architecture)})
        pair.append(_made(service, "/v1/checkpoints", content))
    inputs = torch.randn(_SAMPLES, _SIZES[0], generator=generator)
    labels = torch.arange(_SAMPLES) % _SIZES[-1]
    inputs += 2 * torch.randn(_SIZES[-1], _SIZES[0], generator=generator)[labels]
    probe = _made(service, "/v1/probes", save_tensors({"inputs": inputs, "labels": labels}))
    features = {"features": inputs[:, :32].numpy().copy(), "labels": labels.numpy(), "head": np.eye(10, 32, dtype="f4")}
    feature_set = _made(service, "/v1/feature-sets", save_arrays(features))
    on_probe = {"probe_id": probe}
    both = {"checkpoint_a_id": pair[0], "checkpoint_b_id": pair[1], **on_probe}
    options = {"null_permutations": 3, "seed": 3}
    axis = {"name": "epoch", "values": [1, 2, 3, 4]}
    grids = {"even": {"points": 7}, "adaptive": "adaptive"}
    return {
        "evaluation": {
            "kind": "evaluation", "checkpoint_id": pair[0], **on_probe,
            "options": {"null_permutations": 60, "seed": 1},
        },
        "feature set": {"kind": "evaluation", "feature_set_id": feature_set, "options": {"null_permutations": 60}},
        "comparison": {"kind": "comparison", **both, "options": {**options, "resamples": 100}},
        "path": {"kind": "path", **both, "options": {**options, "grid": grids["even"]}},
        "adaptive path": {
            "kind": "path", **both,
            "options": {"null_permutations": 2, "grid": grids["adaptive"], "alignment": "weight_matching"},
        },
        "pruning": {
            "kind": "pruning", "checkpoint_id": pair[0], **on_probe,
            "options": {**options, "sparsities": [0.0, 0.5, 0.9, 0.95]},
        },
        "series": {
            "kind": "series", "checkpoint_ids": [*pair, *pair], **on_probe, "axis": axis, "options": options,
        },
    }  # fmt: skip


def _made(service: Service, path: str, content: bytes) -> str:
    answer = service.post(path, {"name": "sent"}, content)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = {
        name: ordered[min(int(share * len(ordered)), len(ordered) - 1)] for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {"n": len(ordered), **{name: round(value, 2) for name, value in at.items()}, "max": round(ordered[-1], 2)}


@contextmanager
def campaign(data_dir: Path, url: str, name: str, capsys: pytest.CaptureFixture[str]) -> Iterator[Fleet]:
    """Run a service with three workers on a database; afterwards tell what was seen.

    It is printed, and added to the file that CAMPAIGN_OUTPUT names.
    """
    with (
        services.running(
            data_dir,
            command="api",
            database_url=url,
            queue_polling_seconds="0.1",
            max_attempts="1000",
        ) as service,
        tempfile.TemporaryDirectory(prefix="interplay-fleet-") as folder,
    ):
        fleet = Fleet(service, _SEED, Path(folder))
        try:
            fleet.prepare()
            yield fleet
        finally:
            fleet.close()
    line = json.dumps({"campaign": name, "scale": _SCALE, "seed": _SEED, **fleet.figures.summary()})
    with capsys.disabled():
        print(f"\n{line}")
    if output := os.environ.get("CAMPAIGN_OUTPUT"):
        with Path(output).open("a") as file:
            file.write(line + "\n")


def scaled(whole: int) -> int:
    """Return how many of the whole campaign's disturbances are to be made."""
    return max(round(whole * _SCALE), 1)


def kill(life: Life) -> None:
    """Kill -9 a worker, and wait until it is gone."""
    life.process.kill()
    life.process.wait()


@contextmanager
def stopped(life: Life) -> Iterator[None]:
    """Stop a worker and the processes that it started for a block, with SIGSTOP."""
    processes = [psutil.Process(life.process.pid)]
    processes[0].suspend()  # first: it starts no other
    processes += processes[0].children(recursive=True)
    for process in processes[1:]:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                process.resume()

"""Workers and fetching processes that are killed while a file comes: it arrives as it is, once, from where it was."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file, save

from tests.campaigns import DATABASES, campaign
from tests.conftest import MLP
from tests.databases import fresh_database
from tests.interplay.test_upload_kills import write_features
from tests.services import Service, running, until
from tests.sources import COMMIT, SourceServer, source_server

_MEBIBYTE = 2**20


@dataclass
class Campaign:
    """A service that fetches from one server, and what was killed in it."""

    service: Service
    server: SourceServer
    kills: Counter[str] = field(default_factory=Counter)

    def fetching_process(self) -> psutil.Process | None:
        """Return the process that fetches now, if there is one."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.service.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "workers.fetching.main" in process.cmdline():
                        return process
        return None

    def kill(self, what: str) -> None:
        """Kill -9 the worker, or the process that fetches for it, while bytes come."""
        before = self.sent_bytes
        until(lambda: self.sent_bytes > before + random.randrange(_MEBIBYTE // 2))
        if what == "worker":
            self.service.worker().kill()
        else:
            until(self.fetching_process).kill()
        self.kills[what] += 1

    @property
    def sent_bytes(self) -> int:
        return sum(self.server.sent_bytes.values())

    def fetch(self, **spec: Any) -> dict[str, Any]:
        answer = self.service.client.post("/v1/checkpoints", json={"architecture": MLP, **spec})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def state(self, fetch: dict[str, Any]) -> dict[str, Any]:
        return dict(self.service.client.get(f"/v1/fetches/{fetch['id']}").json())


@pytest.fixture(scope="module", params=campaign(DATABASES, often=["postgresql"]))
def service_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with ExitStack() as stack:
        server = stack.enter_context(source_server())
        settings: dict[str, Any] = {}
        if request.param == "postgresql":
            settings["database_url"] = stack.enter_context(fresh_database(request.getfixturevalue("postgres")))
        service = stack.enter_context(
            running(
                tmp_path_factory.mktemp("killing") / "data",
                sources=f"{server.url}/ inside, hf://org",
                hub_url=server.url,
                worker_restart_max_seconds="0.2",
                **settings,
            )
        )
        yield Campaign(service, server)


@pytest.fixture
def killing(service_of: Campaign) -> Campaign:
    """The service, before anything was killed in it."""
    service_of.kills.clear()
    service_of.server.sent_bytes.clear()
    return service_of


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kills", "size_mebibytes"), campaign([(2, 8), (60, 256)], often=[(2, 8)]))
def test_kills_while_a_repository_comes(killing: Campaign, tmp_path: Path, kills: int, size_mebibytes: int) -> None:
    """Two shards become one checkpoint with the right hash, whoever dies whenever; little is sent twice."""
    write_features(tmp_path / "weights", size_mebibytes * _MEBIBYTE)
    tensors = load_file(tmp_path / "weights")
    shards = {name: save({name: tensor}) for name, tensor in tensors.items()}
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    files = {f"{name}.safetensors": content for name, content in shards.items()}
    killing.server.add_repository("org/net", {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    seconds = max(1.5 * kills, 6)
    killing.server.faults.bytes_per_second = int(size_mebibytes * _MEBIBYTE / seconds)
    spec = {"name": f"{kills} kills", "source": "hf://org/net"}
    fetch = killing.fetch(**spec)
    for kill in range(kills):
        killing.kill("worker" if kill % 2 == 0 else "process")
    killing.server.faults.bytes_per_second = None
    ended = until(lambda: _ended(killing.state(fetch)), seconds=240)
    assert ended["status"] == "succeeded", ended
    assert ended["attempts"] == killing.kills["worker"] + 1
    made = killing.service.client.get(f"/v1/checkpoints/{ended['resource_id']}").json()
    assert made["origin"]["revision"] == COMMIT
    recorded = {file["name"]: file["sha256"] for file in made["origin"]["files"]}
    for name, content in files.items():
        assert recorded[name] == hashlib.sha256(content).hexdigest()
    content = killing.service.client.get(f"/v1/checkpoints/{made['id']}/file").content
    assert hashlib.sha256(content).hexdigest() == made["sha256"]
    named = killing.service.client.get("/v1/checkpoints", params={"name": spec["name"]}).json()["items"]
    assert len(named) == 1
    total = sum(map(len, files.values()))
    twice = killing.sent_bytes / total - 1
    print(f"{killing.kills} kills, {size_mebibytes} MiB, {100 * twice:.2f} % sent twice, {len(content)} bytes")
    # Of each attempt: what lay in the kernel's buffers, and the headers, of which buffers read more than they need.
    assert killing.sent_bytes <= total + (kills + 1) * 2 * _MEBIBYTE


def _ended(state: dict[str, Any]) -> dict[str, Any] | None:
    return state if state["status"] in ("succeeded", "failed", "cancelled") else None


@pytest.mark.slow
def test_a_worker_that_stops_leaves_its_fetch_to_the_next(killing: Campaign, tmp_path: Path) -> None:
    """SIGTERM ends the process that fetches with its worker, and the next one goes on."""
    write_features(tmp_path / "weights", 4 * _MEBIBYTE)
    content = (tmp_path / "weights").read_bytes()
    killing.server.files["/weights"] = content
    killing.server.faults.bytes_per_second = _MEBIBYTE
    fetch = killing.fetch(name="stopped", source=f"{killing.server.url}/weights")
    until(lambda: killing.sent_bytes > _MEBIBYTE)
    process = until(killing.fetching_process)
    killing.service.worker().terminate()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    killing.server.faults.bytes_per_second = None
    ended = until(lambda: _ended(killing.state(fetch)))
    assert ended["status"] == "succeeded", ended
    made = killing.service.client.get(f"/v1/checkpoints/{ended['resource_id']}").json()
    assert made["sha256"] == hashlib.sha256(content).hexdigest()
    assert killing.sent_bytes < len(content) + _MEBIBYTE


def test_files_of_what_has_ended_elsewhere_are_removed(killing: Campaign) -> None:
    """A file without a fetch that goes on is swept away when a worker starts; others are left alone."""
    staging = killing.service.data_dir / "blobs" / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    for name in ("gone.fetch", "gone.plan"):
        (staging / name).write_bytes(b"left")
    killing.service.worker().kill()
    until(lambda: not (staging / "gone.fetch").exists(), seconds=60)
    assert not (staging / "gone.plan").exists()

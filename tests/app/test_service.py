"""The service as a process: its commands, settings, keys, health and problems."""

import asyncio
import base64
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from analysis.errors import KINDS
from app import errors
from app.schemas.reports import EvaluationReport
from app.settings import Settings
from app.supervision import devices_of
from tests import services
from tests.app.api.test_uploads import problem
from tests.services import Service, until

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{f"INTERPLAY_{key.upper()}": value for key, value in settings.items()}}
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command", ["serve", "api"])
def test_open_address_without_a_key_is_refused(tmp_path: Path, command: str) -> None:
    """Any address except loopback is refused without a key, and the message says what to do."""
    done = run(command, "--host", "0.0.0.0", data_dir=str(tmp_path))
    assert done.returncode == 2
    assert "INTERPLAY_API_KEY" in done.stderr
    assert done.stdout == ""


def test_port_in_use_is_said(tmp_path: Path) -> None:
    """A port that is taken is a clear message, not a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("api", "--port", str(taken.getsockname()[1]), data_dir=str(tmp_path))
    assert done.returncode == 2
    assert "Cannot bind" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "ninety"),
        ("device", "tpu"),
        ("max_upload_bytes", "0"),
        ("log_level", "loud"),
        ("database_url", "nope"),
        ("database_url", "postgresql+foo://a/b"),
        ("storage_url", "s4://bucket"),
        ("api_key", "schlüssel"),
    ],
)
def test_bad_setting_is_said(tmp_path: Path, name: str, value: str) -> None:
    """An invalid setting ends the command with its name, status 2 and no traceback."""
    done = run("migrate", **{"data_dir": str(tmp_path), name: value})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"INTERPLAY_{name.upper()}" in done.stderr
    assert "is not valid" in done.stderr


def test_migrate_twice(tmp_path: Path) -> None:
    """`migrate` creates the tables, and a second time changes nothing."""
    for _ in range(2):
        done = run("migrate", data_dir=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "up to date" in done.stdout
    assert done.stderr == ""


def test_worker_is_started_again(service: Service) -> None:
    """A dead worker is replaced, and readiness reports its absence only if that takes long."""
    first = service.worker()
    first.kill()
    until(lambda: service.worker().pid != first.pid)
    until(lambda: service.client.get("/readyz").status_code == 200)
    assert until(lambda: service.client.get("/v1/version").json()["workers"][0]["torch_version"])


def test_readiness_names_what_is_missing(tmp_path: Path) -> None:
    """Without tables readiness names the database, without a worker the worker; the process itself stays healthy."""
    with services.running(tmp_path / "data", command="api", tables=False) as service:
        answer = service.client.get("/readyz")
        assert answer.status_code == 503
        assert "interplay migrate" in answer.json()["database"]
        # What the readiness probe of deploy/kubernetes asks: no calls come before the tables are there.
        assert service.client.get("/readyz?exclude=worker").status_code == 503
        problem(service.client.get("/v1/probes"), 503, "unavailable")
        assert service.client.get("/healthz").status_code == 200
        early = subprocess.run(
            [sys.executable, "-m", "workers"], env=service.environment, capture_output=True, text=True, timeout=60
        )
        assert early.returncode == 2
        assert early.stderr.strip().endswith("run `interplay migrate`.")
        assert "Traceback" not in early.stderr
        migrated = subprocess.run([sys.executable, "-m", "app", "migrate"], env=service.environment, timeout=60)
        assert migrated.returncode == 0
        answer = service.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {
            "ready": False,
            "database": "ok",
            "storage": "ok",
            "worker": "no worker has been heard of in the last 10 seconds",
        }
        excluded = service.client.get("/readyz?exclude=worker")
        assert excluded.status_code == 200
        assert excluded.json() == {**answer.json(), "ready": True}
        problem(service.client.get("/readyz?exclude=moon"), 422, "invalid-request")
        with services.worker(service):
            until(lambda: service.client.get("/readyz").status_code == 200)


def test_storage_that_is_gone_is_named(tmp_path: Path) -> None:
    """Readiness names a storage folder that cannot be used."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with services.running(tmp_path / "data", command="api") as service:
        blobs = service.data_dir / "blobs"
        moved = service.data_dir / "moved"
        blobs.rename(moved)
        blobs.write_text("not a folder")
        answer = service.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["storage"].startswith("does not answer")
        blobs.unlink()
        moved.rename(blobs)


def test_other_sites_have_no_way_in_through_a_browser(service: Service) -> None:
    """Without a key only the machine's own host names are answered, and no page of another origin."""
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        problem(service.client.get("/v1/probes", headers=headers), 403, "forbidden")
    port = service.url.rpartition(":")[2]
    for headers in ({"Host": f"localhost:{port}"}, {"Host": f"[::1]:{port}"}, {"Origin": f"http://localhost:{port}"}):
        assert service.client.get("/v1/probes", headers=headers).status_code == 200


def test_answers_on_a_kept_connection_do_not_wait(service: Service) -> None:
    """No answer waits for the other end's delayed acknowledgement, which takes at least 40 ms."""
    service.client.get("/openapi.json")
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        service.client.get("/healthz")
        taken.append(time.perf_counter() - start)
    # The minimum of many: a busy machine delays some, the fault delayed all but the first of a connection.
    assert sorted(taken)[3] < 0.035


def test_unknown_routes_and_methods_are_problems(service: Service) -> None:
    """Unknown routes and methods are problems, with the status that HTTP gives them."""
    problem(service.client.get("/v2/nothing"), 404, "not-found")
    problem(service.client.put("/v1/probes"), 405, "method-not-allowed")


def test_documents_of_the_api(service: Service) -> None:
    """/docs is a page, and /openapi.json names every call of version 1 with the report's full schema."""
    document = service.client.get("/openapi.json").json()
    calls = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    for collection in ("checkpoints", "probes", "feature-sets"):
        assert {("POST", f"/v1/{collection}"), ("GET", f"/v1/{collection}")} <= calls
        assert {("GET", f"/v1/{collection}/{{id}}"), ("DELETE", f"/v1/{collection}/{{id}}")} <= calls
    assert ("POST", "/v1/analyses/{id}/cancel") in calls
    assert {"sample", "class_mean"} <= set(document["components"]["schemas"]["Levels"]["properties"])


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_pages_of_the_api_load_nothing_from_elsewhere(service: Service, page: str) -> None:
    """The pages refer only to existing files of this service, and their policy lets a browser load nothing else."""
    answer = service.client.get(page)
    assert answer.headers["content-type"].startswith("text/html")
    named = re.findall(r"""(?:src|href|spec-url)=["']([^"']*)["']""", answer.text)
    named += re.findall(r"url: '([^']*)'", answer.text)
    assert len(named) >= 3
    for path in named:
        assert re.match(r"/(?!/)", path), path
        assert service.client.get(path).status_code == 200
    assert not re.search(r"(?:https?:)?//[a-z]", answer.text)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for name, sources in policy.items():
        for source in sources.split():
            assert source in ("'none'", "'self'", "data:", "blob:", "'unsafe-inline'") or source.startswith("'sha256-")
        assert name == "style-src" or "'unsafe-inline'" not in sources
    for script in re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy["script-src"]


def test_report_schema_has_nothing_undescribed() -> None:
    """Every field of the report appears in docs/report.md."""
    text = (ROOT / "docs" / "report.md").read_text()
    properties: set[str] = set()

    def collect(schema: Any) -> None:
        if isinstance(schema, dict):
            properties.update(schema.get("properties", {}))
            for value in schema.values():
                collect(value)

    collect(EvaluationReport.model_json_schema())
    assert len(properties) > 60
    assert {name for name in properties if f"`{name}`" not in text} == set()


def test_settings_are_documented() -> None:
    """docs/settings.md lists every setting under its name, and none that does not exist."""
    text = (ROOT / "docs" / "settings.md").read_text()
    names = {f"INTERPLAY_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"`(INTERPLAY_[A-Z_]+)`", text)) == names


def test_problems_are_documented() -> None:
    """docs/problems.md lists every kind of problem that the code can give, and none that it cannot."""
    text = (ROOT / "docs" / "problems.md").read_text()
    kinds = {error.kind for error in errors.ServiceError.__subclasses__()} | set(KINDS) | {errors.ServiceError.kind}
    sources = [*(ROOT / "app").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]
    for source in sources:
        kinds |= set(re.findall(r'problem\(\s*"([a-z-]+)"', source.read_text()))
    kinds |= {"method-not-allowed"}
    assert set(re.findall(r"^- `([a-z-]+)`", text, flags=re.MULTILINE)) == kinds


def test_api_never_loads_torch(tmp_path: Path) -> None:
    """The API process starts without torch and stays small."""
    script = "import sys, app.main, app.__main__; print('torch' in sys.modules, 'analysis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_other_requests_are_quick_during_an_upload(service: Service) -> None:
    """While large files arrive, the service answers other requests: an upload never blocks the event loop."""

    async def upload(client: httpx.AsyncClient) -> int:
        async def body() -> AsyncIterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            for _ in range(192):
                yield bytes(2**20)
            yield b'\r\n--b\r\nContent-Disposition: form-data; name="spec"\r\n\r\n{"name": "big"}\r\n--b--\r\n'

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        return (await client.post("/v1/checkpoints", content=body(), headers=headers)).status_code

    async def scenario() -> int:
        async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as client:
            uploads = [asyncio.create_task(upload(client)) for _ in range(3)]
            answers = 0
            while not all(task.done() for task in uploads):
                assert (await client.get("/healthz")).status_code == 200
                answers += 1
            assert [await task for task in uploads] == [422, 422, 422]
            return answers

    assert asyncio.run(scenario()) > 10


@pytest.mark.slow
def test_a_worker_for_each_device(tmp_path: Path) -> None:
    """`--devices` of `serve` and of `worker` runs one process each; dead ones are started again."""
    with services.running(
        tmp_path / "data", arguments=("--devices", "cpu,cpu"), threads="0", worker_restart_max_seconds="0.2"
    ) as service:

        def workers() -> int:
            return len(service.client.get("/v1/version").json()["workers"])

        until(lambda: workers() == 2)
        processes = [child for child in psutil.Process(service.process.pid).children() if "workers" in child.cmdline()]
        cores = max((os.cpu_count() or 1) // 2, 1)
        assert [child.environ()["INTERPLAY_THREADS"] for child in processes] == [str(cores)] * 2
        processes[0].kill()
        processes[0].wait(15)
        until(lambda: workers() == 2 and len(psutil.Process(service.process.pid).children()) >= 2)
        command = [sys.executable, "-m", "workers", "--devices", "cpu,cpu"]
        with subprocess.Popen(command, env=service.environment) as further:
            until(lambda: workers() == 4)
            started = psutil.Process(further.pid).children(recursive=True)
            assert len(started) == 4
            further.terminate()
            assert further.wait(15) == 0
        _, alive = psutil.wait_procs(started, timeout=15)
        assert not alive
        until(lambda: workers() == 2)


@pytest.mark.parametrize("module", ["app", "workers"])
def test_an_unknown_device_is_refused(tmp_path: Path, module: str) -> None:
    """A name that is no device's ends the command with status 2, and the message has it."""
    arguments = [*(["serve"] if module == "app" else []), "--devices", "cuda:0,tpu"]
    environment = {**os.environ, "INTERPLAY_DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == "--devices takes `all`, or names such as cuda:0,cuda:1 or cpu, not 'tpu'.\n"


def test_the_devices_of_workers(tmp_path: Path) -> None:
    """`all` is each GPU, as torch counts them in a process of its own, or else the processor; names are as given."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert devices_of("all", Settings(data_dir=tmp_path)) == (gpus or ["cpu"])
    assert devices_of(None, Settings(data_dir=tmp_path, device="cuda:3")) == ["cuda:3"]
    assert devices_of("cpu, cuda:1", Settings(data_dir=tmp_path)) == ["cpu", "cuda:1"]

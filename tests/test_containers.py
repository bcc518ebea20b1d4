"""The container files, as far as they can be checked without an engine."""

import json
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from ruamel.yaml import YAML

from app.settings import Settings
from tests.services import Service

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"
OURS = ("migrate", "api", "worker", "worker-gpu")


@cache
def services() -> dict[str, Any]:
    """The services of the compose file, anchors and merge keys resolved."""
    loaded: dict[str, Any] = YAML(typ="safe").load(COMPOSE)["services"]
    return loaded


@cache
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name.upper(), rest) for name, rest in pairs]


def arguments_of(name: str) -> list[str]:
    """The arguments of each instruction of that name, in order."""
    return [rest for instruction, rest in instructions() if instruction == name]


def test_compose_fits_its_published_schema() -> None:
    """docker-compose.yml validates against the compose specification."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_schema_check_can_fail(tmp_path: Path) -> None:
    """The same check refuses a compose file with a key that the specification does not know."""
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("restart: unless-stopped", "restarts: unless-stopped"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 1
    assert "restarts" in checked.stdout


@pytest.mark.parametrize("path", [COMPOSE, DOCKERFILE], ids=lambda path: path.name)
def test_variables_are_settings(path: Path) -> None:
    """Every INTERPLAY_ variable that a container file names is a setting of the service."""
    named = set(re.findall(r"INTERPLAY_([A-Z0-9_]+)", path.read_text()))
    assert named
    assert named <= {field.upper() for field in Settings.model_fields}


def image_variables() -> list[str]:
    """The variables that the image sets, as NAME=value."""
    return [shlex.split(entry)[0] for entry in shlex.split(arguments_of("ENV")[-1])]


def test_settings_of_the_containers_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compose passes to each of our containers is a valid configuration, the same for what they share."""
    monkeypatch.setenv("INTERPLAY_API_KEY", "secret")
    image = dict(entry.split("=", 1) for entry in image_variables())
    shared = set()
    for name in OURS:
        environment = {**image, **services()[name]["environment"]}
        for key, value in environment.items():
            if key.startswith("INTERPLAY_") and "${INTERPLAY_API_KEY" not in value:
                monkeypatch.setenv(key, re.sub(r"\$\{\w+:-(\w*)\}", r"\1", value))
        settings = Settings()
        shared.add((settings.effective_database_url, settings.effective_storage_url, settings.data_dir))
        monkeypatch.delenv("INTERPLAY_DEVICE", raising=False)
    assert len(shared) == 1


@pytest.mark.parametrize("name", OURS)
def test_commands_are_subcommands(name: str) -> None:
    """Each service of ours runs a command that `interplay` has; the one on GPUs with a worker for each."""
    command, *options = services()[name]["command"]
    assert options == (["--devices", "all"] if name == "worker-gpu" else [])
    shown = subprocess.run([sys.executable, "-m", "interplay.command", "--help"], capture_output=True, text=True)
    assert re.search(rf"^\W*{command}\s", shown.stdout, flags=re.MULTILINE), shown.stdout


def test_default_command_is_a_subcommand() -> None:
    """The image runs `interplay api` where nothing else is said."""
    assert arguments_of("ENTRYPOINT") == ['["interplay"]']
    assert arguments_of("CMD") == ['["api"]']


def test_services_start_in_order() -> None:
    """PostgreSQL is healthy before the schema is migrated, and that is done before anything else of ours starts."""
    assert services()["postgres"]["healthcheck"]["test"]
    assert services()["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services()["migrate"]["restart"] == "no"
    for name in ("api", "worker", "worker-gpu"):
        assert services()[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


def test_gpu_is_asked_for_by_profile_alone() -> None:
    """Only worker-gpu reserves a device, and it runs only where its profile is named; the others only say how many."""
    assert services()["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = services()["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert not any("profiles" in services()[name] for name in OURS[:3])
    assert [services()[name].get("deploy") for name in OURS[:3]] == [
        None,
        {"replicas": "${API_REPLICAS:-1}"},
        {"replicas": "${WORKER_REPLICAS:-1}"},
    ]


def test_proxy_is_asked_for_and_finds_the_api() -> None:
    """It runs where its profile is named, with the file of this repository, and is given what that file asks for."""
    proxy = services()["proxy"]
    assert proxy["profiles"] == ["proxy"]
    assert f"INTERPLAY_PORT={proxy['environment']['UPSTREAM'].removeprefix('api:')}" in image_variables()
    (file,) = [volume.split(":")[0] for volume in proxy["volumes"] if volume.endswith(":ro")]
    assert set(re.findall(r"{\$([A-Z]+):", (ROOT / file).read_text())) == proxy["environment"].keys()


def test_api_key_is_required_and_the_database_is_not_published() -> None:
    """Compose refuses to start without a key; only the API has a port, on the loopback interface, and the proxy."""
    for name in OURS:
        assert services()[name]["environment"]["INTERPLAY_API_KEY"].startswith("${INTERPLAY_API_KEY:?")
    assert {name for name, service in services().items() if "ports" in service} == {"api", "proxy"}
    assert all(port.startswith("127.0.0.1:") for port in services()["api"]["ports"])


def test_image_is_built_in_stages_and_runs_without_root() -> None:
    """The build stage stays behind; the last USER is not root and owns the data volume."""
    stages = arguments_of("FROM")
    assert len(stages) == 2
    assert all(stage.startswith("python:3.11-slim AS ") for stage in stages)
    (user,) = arguments_of("USER")
    assert user not in ("root", "0")
    order = [name for name, _ in instructions()]
    assert order.index("USER") > [n for n, name in enumerate(order) if name == "FROM"][1]
    assert any(f"--owner={user}" in run and "/data" in run for run in arguments_of("RUN"))
    assert arguments_of("VOLUME") == ["/data"]


def test_health_check_tells_a_service_from_none(service: Service, tmp_path: Path) -> None:
    """The image's own check, run here: 0 where the service listens, past any proxy, and not 0 on a dead port."""
    (check,) = arguments_of("HEALTHCHECK")
    python, *rest = json.loads(check.partition(" CMD ")[2])
    assert python == "python"
    port = urlsplit(service.url).port
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        dead = taken.getsockname()[1]
        for candidate, healthy in ((port, True), (dead, False)):
            environment = {"INTERPLAY_PORT": str(candidate), "http_proxy": f"http://127.0.0.1:{dead}"}
            ran = subprocess.run([sys.executable, *rest], env=environment, cwd=tmp_path, capture_output=True)
            assert (ran.returncode == 0) == healthy, ran.stderr


def test_image_installs_the_lock_and_cpu_torch_by_default() -> None:
    """Every package comes at its locked version; torch is the CPU build unless a build argument says otherwise."""
    assert arguments_of("ARG") == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu", "EXTRAS=worker"]
    installs = [run for run in arguments_of("RUN") if "pip install" in run]
    assert installs
    assert all("requirements.lock" in run for run in installs)
    assert services()["worker-gpu"]["build"]["args"].keys() == {"TORCH_INDEX"}


def test_everything_that_the_image_copies_is_in_its_context() -> None:
    """.dockerignore lets through every package of both wheels and what the build reads."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    wanted = {"server", "pyproject.toml", "requirements.lock", "README.md", "LICENSE"}
    for file in (ROOT / "pyproject.toml", ROOT / "server" / "pyproject.toml"):
        wanted.update(tomllib.loads(file.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert kept == wanted
    assert all((ROOT / name).exists() for name in kept)

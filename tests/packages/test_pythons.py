"""The client on every supported Python of this machine, and installed as in the examples for pipelines."""

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.campaigns import campaign
from tests.packages import wheels
from tests.packages.interpreters import SUPPORTED, interpreter
from tests.services import Service

CI = wheels.ROOT / "examples" / "ci"
VERSION = tomllib.loads((wheels.ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("version", campaign(SUPPORTED, often=SUPPORTED[2:]))
def test_client(
    version: str,
    service: Service,
    mlp_checkpoint_file: Path,
    digits_probe_file: Path,
    built: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """The wheel installs with its requirements, compiles without a warning, and passes the client's whole test.

    A Python other than this one needs other builds; there everything but the client comes from pip's index, as the lock
    pins it.
    """
    found = interpreter(version)
    if found is None:
        pytest.skip(f"Python {version} is not on this machine")
    here = found == Path(sys.executable)
    python = wheels.environment(tmp_path / "environment", found, has=wheels.needed(built[0]) if here else ())
    pins: list[str | Path] = [] if here else ["--constraint", wheels.ROOT / "requirements.lock"]
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python]
    installed = wheels.run([*pip, "install", "--no-compile", *pins, built[0]], isolated=here)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    checked = wheels.run([*pip, "check"])
    assert checked.returncode == 0, checked.stdout
    (package,) = (tmp_path / "environment").glob("lib/python*/site-packages/interplay")
    compiled = wheels.run([python, "-W", "error", "-m", "compileall", "-q", "-f", package])
    assert compiled.returncode == 0, compiled.stdout

    script = Path(__file__).with_name("client.py")
    ran = wheels.run(
        [python, script, mlp_checkpoint_file, digits_probe_file, tmp_path],
        {"INTERPLAY_URL": service.url, "PYTHONWARNINGS": "error"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"on Python {version}." in ran.stdout


def install_step(example: str, **given: str) -> tuple[str, dict[str, str]]:
    """Return the install step of an example, and its variables as a user sets them."""
    loaded: Any = YAML(typ="safe", pure=True).load((CI / example).read_text())
    if example.startswith("github"):
        (step,) = [step for step in loaded["runs"]["steps"] if step["name"] == "Install"]
        defaults = {
            name.upper().replace("-", "_"): about.get("default", "") for name, about in loaded["inputs"].items()
        }
        return step["run"], {name: given.get(name, defaults[name]) for name in step["env"]}
    (line,) = [line for line in loaded["gate"]["script"] if "pip install" in line]
    return line, {**{key: str(value) for key, value in loaded["gate"]["variables"].items()}, "WHEEL": "", **given}


@pytest.mark.parametrize("example", ["github/action.yml", "gitlab/.gitlab-ci.yml"])
def test_examples_install_from_a_path_or_a_given_index(example: str, built: tuple[Path, Path], tmp_path: Path) -> None:
    """Examples never install by bare name from a runner's own index, where another `interplay` may exist."""
    other = tmp_path / "interplay-9.0.0-py3-none-any.whl"
    shutil.copy(built[0], other)
    public, own = wheels.index(tmp_path / "public", other), wheels.index(tmp_path / "own", built[0])
    python = wheels.environment(tmp_path / "environment", has=wheels.needed(built[0]))
    program = python.with_name("interplay")

    def ran(**given: str) -> int:
        script, variables = install_step(example, **given)
        runner = {"PATH": f"{python.parent}:/usr/bin:/bin", "PIP_INDEX_URL": public, "PIP_NO_INDEX": "0"}
        return wheels.run(["bash", "-eo", "pipefail", "-c", script], {**runner, **variables}).returncode

    assert ran() == (2 if example.startswith("github") else 0)
    assert not program.exists()
    assert ran(INDEX_URL=public) == 1
    assert not program.exists()
    for given in ({"WHEEL": str(built[0])}, {"INDEX_URL": own}):
        assert ran(**given) == 0
        assert wheels.run([program, "--version"]).stdout == f"interplay {VERSION}\n"
        assert wheels.run([python, "-m", "pip", "uninstall", "--yes", "interplay"]).returncode == 0

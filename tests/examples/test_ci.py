"""The examples for pipelines: their own steps, run by a shell as the runner would, against a real service."""

import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import junitparser
import pytest
from ruamel.yaml import YAML

from app.gates.form import GateSpec, require_sound
from interplay import Client
from interplay.command.gatefile import read_gate
from tests.services import Service

EXAMPLES = Path(__file__).parents[2] / "examples" / "ci"


def yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text())


@dataclass
class Repository:
    """Somebody's checkout: the gate, the checkpoint, and a service that holds the probe."""

    url: str
    folder: Path
    probe: str
    baseline: str

    def shell(self, script: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a step as a runner does: by bash, in the checkout, with `interplay` on the path."""
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("INTERPLAY_", "GITHUB_", "CI_"))
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
        return subprocess.run(
            ["bash", *options, "-c", script],
            cwd=self.folder,
            env={**clean, "PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def repository(service: Service, tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> Repository:
    (tmp_path / "gate.yaml").write_bytes((EXAMPLES / "gate.yaml").read_bytes())
    (tmp_path / "net.safetensors").write_bytes(mlp_checkpoint_file.read_bytes())
    probe, baseline = f"digits-{uuid.uuid4().hex[:8]}", f"main-{uuid.uuid4().hex[:8]}"
    with Client(service.url) as client:
        client.push_probe(digits_probe_file, name=probe, preprocess={"scale": 0.0625})
    return Repository(service.url, tmp_path, probe, baseline)


def test_github_action(repository: Repository) -> None:
    """Its steps, with inputs as a workflow gives them: a first run that warns and promotes, then one that fails."""
    action = yaml(EXAMPLES / "github" / "action.yml")
    given = {
        "url": repository.url,
        "gate": "gate.yaml",
        "checkpoint": "net.safetensors",
        "probe": repository.probe,
        "baseline": repository.baseline,
        "promote": "true",
    }
    assert {name for name, about in action["inputs"].items() if about.get("required")} <= set(given)

    def steps(**changes: str) -> tuple[int, dict[str, Path]]:
        inputs = {name: about.get("default", "") for name, about in action["inputs"].items()} | given | changes
        files = {name: repository.folder / f"{name.lower()}.txt" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        code = 0
        for step in action["runs"]["steps"]:
            values = {key: filled(value, inputs) for key, value in step["env"].items()}
            runner = {"GITHUB_SHA": "1234567", "GITHUB_RUN_ID": "42", **{key: str(path) for key, path in files.items()}}
            # What GitHub runs for `shell: bash`.
            ran = repository.shell(step["run"], "--noprofile", "--norc", "-eo", "pipefail", **runner, **values)
            if code := ran.returncode:
                break
        return code, files

    code, files = steps()
    assert code == 0
    assert files["GITHUB_OUTPUT"].read_text() == "exit-code=0\n"
    assert "passed with warnings" in files["GITHUB_STEP_SUMMARY"].read_text()
    output = repository.folder / "interplay-gate"
    assert len([*junitparser.JUnitXml.fromfile(str(output / "junit.xml"))]) == 1
    verdict = json.loads((output / "verdict.json").read_text())
    with Client(repository.url) as client:
        assert client.get_baseline(repository.baseline)["report_id"] == verdict["verdict"]["report_id"]
        subject = client.get_report(verdict["verdict"]["report_id"], "evaluation")["subject"]
    assert subject["metadata"] == {"commit": "1234567", "run": "42"}
    code, files = steps()
    assert code == 0
    assert json.loads((output / "verdict.json").read_text())["verdict"]["report_kind"] == "comparison"
    strict = repository.folder / "gate.yaml"
    strict.write_text(strict.read_text().replace("min: 0.95", "min: 0.9999"))
    code, files = steps()
    assert code == 1
    assert files["GITHUB_OUTPUT"].read_text().endswith("exit-code=1\n")


def filled(value: str, inputs: dict[str, str]) -> str:
    """An expression as GitHub fills it in."""
    return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda match: inputs[match[1]], value)


def test_github_workflow_gives_inputs_that_the_action_has() -> None:
    """Every one that is required, none that does not exist."""
    inputs = yaml(EXAMPLES / "github" / "action.yml")["inputs"]
    steps = yaml(EXAMPLES / "github" / "workflow.yml")["jobs"]["gate"]["steps"]
    (given,) = [step["with"] for step in steps if "interplay-gate" in step.get("uses", "") and "./" in step["uses"]]
    assert {name for name, about in inputs.items() if about.get("required")} <= set(given) <= set(inputs)


@pytest.mark.parametrize("branch", ["main", "topic"])
def test_gitlab_job(repository: Repository, branch: str) -> None:
    """Its script, line after line in one shell: the default branch moves the baseline, another does not."""
    job = yaml(EXAMPLES / "gitlab" / ".gitlab-ci.yml")["gate"]
    variables = {**job["variables"], "PROBE": repository.probe, "BASELINE": repository.baseline, "WHEEL": ""}
    predefined = {"CI_COMMIT_BRANCH": branch, "CI_DEFAULT_BRANCH": "main", "CI_COMMIT_SHA": "1234567"}
    script = "\n".join(job["script"])
    ran = repository.shell(script, "-eo", "pipefail", INTERPLAY_URL=repository.url, **predefined, **variables)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (f"The baseline {repository.baseline} now points" in ran.stdout) == (branch == "main")
    for path in (*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]):
        assert (repository.folder / path).stat().st_size > 100


def test_the_examples_and_the_readmes_gate_satisfy_the_schema(tmp_path: Path) -> None:
    """As an editor would say, and as the service does."""
    root = EXAMPLES.parents[1]
    (block,) = re.findall(r"```yaml\n(# yaml-language-server.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme.yaml").write_text(block)
    files = [EXAMPLES / "gate.yaml", tmp_path / "readme.yaml"]
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--schemafile",
        root / "docs" / "gate.schema.json",
        *files,
    ]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
    for file in files:
        require_sound(GateSpec.model_validate(read_gate(file)))
    (tmp_path / "wrong.yaml").write_text(block.replace("splits.test.accuracy", "splits.test.acuracy"))
    command[-2:] = [tmp_path / "wrong.yaml"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 1

"""Files of gates: aliases, files that are refused, the schema for editors, and the documentation of the form."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from app.gates.form import Check, GateSpec, file_schema
from app.gates.verdicts import Status
from interplay.command.gate import EXIT_ANALYSIS_FAILED, EXIT_GATE_FAILED, EXIT_UNDEFINED
from interplay.command.gatefile import read_gate
from interplay.command.options import EXIT_TIMEOUT, EXIT_UNREACHABLE, EXIT_USAGE
from tests.interplay.command.running import interplay, message
from tests.interplay.test_client import closed_port

ROOT = Path(__file__).parents[3]


def _bomb(form: str, lines: int = 9) -> str:
    """Return lines with nine aliases each of the line before: they would expand to a hundred million values."""
    first = ["a0: &a0 {x: 1}"]
    rest = [f"a{i}: &a{i} {form.format(','.join([f'*a{i - 1}'] * 9))}" for i in range(1, lines)]
    return "\n".join([*first, *rest]) + "\n"


def test_aliases_are_what_they_stand_for(tmp_path: Path) -> None:
    """Aliases and merged mappings are expanded."""
    path = tmp_path / "gate.yaml"
    path.write_text(
        "name: x\nchecks:\n- &c {metric: splits.test.accuracy, min: &m 0.9}\n- {<<: *c, name: b, max: *m}\n"
    )
    first = {"metric": "splits.test.accuracy", "min": 0.9}
    assert read_gate(path) == {"name": "x", "checks": [first, {**first, "name": "b", "max": 0.9}]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "is not a gate"),
        ("", "is not a gate"),
        ("name: [\n", "is not YAML"),
        ("name: a\nname: b\n", "duplicate key"),
        ("name: a\nchecks: [{min: .nan}]\n", "not finite"),
        ("name: 2026-01-31\n", "not text, a number"),
        ("name: &a [*a]\n", "line 1: the value of this anchor contains itself"),
        ("name: &a {<<: *a}\n", "line 1: the value of this anchor contains itself"),
        (_bomb("[{}]"), "1.51e+08 values or more"),
        (_bomb("{{<<: [{}]}}"), "1.63e+08 values or more"),
        (_bomb("[{}]", 200), "1e+15"),
        (f"name: &a {'x' * 2**20}\nchecks: [{','.join(['*a'] * 99)}]\n", "characters"),
    ],
    ids=lambda text: text[:40],
)
def test_files_that_are_no_gate_are_2(tmp_path: Path, text: str, said: str) -> None:
    """Invalid files are refused before any request."""
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    ran = interplay("gate", "--gate", path, "--report", "x", url=f"http://127.0.0.1:{closed_port()}")
    assert (ran.returncode, ran.stdout) == (2, "")
    # A line of the frame may break a number at its sign.
    assert "".join(said.split()) in "".join(message(ran).split())


def test_the_schema_in_the_repository_is_the_one_of_the_service() -> None:
    """docs/gate.schema.json is the schema that `make types` writes."""
    assert json.loads((ROOT / "docs" / "gate.schema.json").read_text()) == file_schema()


def test_gates_are_documented() -> None:
    """docs/gates.md has every field of a gate and of a check, every status, and every exit code."""
    text = (ROOT / "docs" / "gates.md").read_text()
    for field in (*GateSpec.model_fields, *Check.model_fields, *get_args(Status)):
        assert f"`{field}`" in text, field
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", text, flags=re.MULTILINE)}
    assert codes == {
        0,
        EXIT_GATE_FAILED,
        EXIT_USAGE,
        EXIT_UNREACHABLE,
        EXIT_ANALYSIS_FAILED,
        EXIT_UNDEFINED,
        EXIT_TIMEOUT,
    }

"""A kind of analysis is added in the files that docs/architecture.md lists, and nowhere else."""

import re
import shutil
from pathlib import Path

import pytest

from tests import services
from tests.workers import toy

ROOT = Path(__file__).parent.parent.parent


def test_a_toy_kind_is_requested_computed_drawn_and_judged(
    tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A new kind can be requested, computed, drawn and judged: a scaled head keeps accuracy and MIR, not the loss."""
    tree = tmp_path / "tree"
    for package in ("analysis", "app", "migrations", "workers"):
        shutil.copytree(ROOT / package, tree / package)
    toy.add_to(tree)
    with services.running(tmp_path / "data", tree=tree) as service:
        checkpoint = service.post("/v1/checkpoints", {"name": "net"}, mlp_checkpoint_file).json()["id"]
        probe = service.post("/v1/probes", {"name": "digits"}, digits_probe_file).json()["id"]
        options = {"factors": [1, 2], "null_permutations": 0}
        queued = service.analyze(kind="scaling", checkpoint_id=checkpoint, probe_id=probe, options=options)
        report = service.report(service.wait(queued["id"]))
        first, second = (point["splits"]["test"] for point in report["points"])
        assert [point["factor"] for point in report["points"]] == [1, 2]
        assert second["accuracy"] == first["accuracy"]
        assert second["loss"] != first["loss"]
        mir, doubled = (split["interplay"]["sample"]["global"]["mir"] for split in (first, second))
        assert doubled == pytest.approx(mir, abs=1e-9)
        drawn = service.client.get(f"/v1/reports/{report['id']}/charts/overview.json").json()
        page = service.client.get(f"/reports/{report['id']}")
        assert page.status_code == 200, page.text
        assert "factor" in str(drawn)
        checks = [{"metric": "points.-1.splits.test.accuracy", "min": 0.5}]
        gate = service.client.post("/v1/gates", json={"name": "toy", "kind": "scaling", "checks": checks})
        assert gate.status_code == 201, gate.text
        verdict = service.client.post(f"/v1/reports/{report['id']}/gate", json={"gate_id": gate.json()["id"]})
        assert verdict.json()["status"] == "pass", verdict.text


def test_the_documentation_lists_these_files() -> None:
    """The section on adding a kind lists these files."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("\n### A kind of analysis\n")[1].split("\n### ")[0]
    listed = set(re.findall(r"`((?:app|workers)/[\w/]+\.py)`", section))
    added = {name.replace("scaling", "NAME") for name in toy.ADDED}
    assert listed == {*toy.INSERTED, *added}

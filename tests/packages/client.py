"""The client's tests on another machine: plain Python that needs only the installed package and a service.

    INTERPLAY_URL=... python client.py CHECKPOINT PROBE FOLDER

A failed assertion fails the run; at the end it prints the versions that it ran with.
"""

import csv
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import uuid
from pathlib import Path

import interplay
from interplay import Client, ProblemError, ServiceUnreachable
from interplay.export import write_csv

CHECKPOINT, PROBE, FOLDER = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
NAME = f"packages-{uuid.uuid4().hex[:8]}"
GATE = """\
name: {name}
checks:
  - metric: splits.test.accuracy
    min: {minimum}   # YAML, with a comment
"""


def command(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the `interplay` command that pip installed, and check its exit code."""
    program = Path(sysconfig.get_path("scripts")) / "interplay"
    ran = subprocess.run(
        [str(program), *map(str, arguments)],
        env={**os.environ, "COLUMNS": "150", **environment},
        cwd=FOLDER,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert ran.returncode == code, (arguments, ran.returncode, ran.stdout, ran.stderr)
    return ran


def by_command() -> None:
    """Push, analyse, wait, show, list, export and judge on the command line."""
    version = importlib.metadata.version("interplay")
    assert command("--version").stdout == f"interplay {version}\n"
    described = ("--name", NAME, "--metadata", "epoch=10", "--json")
    pushed = json.loads(command("push", "checkpoint", CHECKPOINT, *described).stdout)
    probe = json.loads(command("push", "probe", PROBE, *described, "--preprocess", '{"scale": 0.0625}').stdout)
    asked = ("--checkpoint", pushed["id"], "--probe", probe["id"], "--permutations", 2, "--wait", "--json")
    analysis = json.loads(command("analyze", *asked).stdout)
    report = analysis["report_id"]
    assert analysis["status"] == "succeeded"
    assert "MIR" in command("show", report).stdout
    shown = json.loads(command("show", report, "--json").stdout)
    assert 0 < shown["splits"]["test"]["interplay"]["sample"]["global"]["mir"] < 1
    listed = json.loads(command("list", "reports", "--checkpoint", pushed["id"], "--json").stdout)
    assert [item["id"] for item in listed] == [report]
    assert NAME in command("list", "checkpoints", "--name", NAME).stdout

    command("export", report, "--csv", "report.csv")
    with (FOLDER / "report.csv").open(encoding="utf-8", newline="") as file:
        values = {row["path"]: row["value"] for row in csv.DictReader(file) if row["split"] == "test"}
    assert float(values["accuracy"]) == shown["splits"]["test"]["accuracy"]

    (FOLDER / "gate.yaml").write_text(GATE.format(name=NAME, minimum=0.5), encoding="utf-8")
    files = ("--junit", "out.xml", "--markdown", "out.md", "--json", "out.json")
    command("gate", "--gate", "gate.yaml", "--checkpoint", CHECKPOINT, "--probe", NAME, "--permutations", 2, *files)
    assert json.loads((FOLDER / "out.json").read_text(encoding="utf-8"))["verdict"]["status"] == "pass"
    assert (FOLDER / "out.xml").read_text(encoding="utf-8").startswith("<?xml")
    (FOLDER / "gate.yaml").write_text(GATE.format(name=NAME, minimum=1.1), encoding="utf-8")
    command("gate", "--gate", "gate.yaml", "--report", report, code=1)


def by_client() -> None:
    """Do the same from Python, and check the errors that callers catch."""
    with Client() as client:
        checkpoint = client.push_checkpoint(CHECKPOINT, name=NAME, metadata={"epoch": 11})
        probe = client.push_probe(PROBE, name=NAME, preprocess={"scale": 0.0625})
        analysis = client.create_analysis(
            checkpoint_id=checkpoint["id"], probe_id=probe["id"], options={"null_permutations": 2}
        )
        ended = client.wait(analysis["id"], timeout_seconds=120)
        report = client.get_report(ended["report_id"], "evaluation")
        assert (report["splits"]["test"]["accuracy"] or 0) > 0.5
        assert [item["id"] for item in client.list("reports", checkpoint_id=checkpoint["id"])] == [ended["report_id"]]
        assert write_csv(report, FOLDER / "client.csv") > 50
        gate = client.create_gate({"name": NAME, "checks": [{"metric": "splits.test.accuracy", "min": 0.5}]})
        assert client.judge(ended["report_id"], gate_id=gate["id"])["status"] == "pass"
        status = 0
        try:
            client.get_analysis(str(uuid.uuid4()))
        except ProblemError as error:
            status = error.status
        assert status == 404
    reached = True
    with Client("http://127.0.0.1:9", retry_seconds=0) as client:
        try:
            client.get_analysis("x")
        except ServiceUnreachable:
            reached = False
    assert not reached


def without_the_rest() -> None:
    """Check that errors name the parts that the client alone lacks and the package that provides them."""
    assert "pip install 'interplay-server[worker]'" in command("serve", code=2).stderr
    assert "pip install 'interplay-server'" in command("api", code=2).stderr
    command("list", "probes", code=3, INTERPLAY_URL="http://127.0.0.1:9", INTERPLAY_RETRY_SECONDS="0")
    said = ""
    try:
        _ = interplay.InterplayLoss
    except ModuleNotFoundError as error:
        said = str(error)
    assert "pip install 'interplay[train]'" in said


by_command()
by_client()
without_the_rest()
print(f"interplay {importlib.metadata.version('interplay')} on Python {sys.version.split()[0]}")

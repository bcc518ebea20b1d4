"""The types of results: they equal the service's models and help users who type-check their scripts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import result_types

RIGHT = """
from interplay import Analysis, Client, EvaluationReport, Probe, save_checkpoint


def accuracy(report: EvaluationReport) -> float | None:
    return report["splits"]["test"]["accuracy"]


def show(analysis: Analysis) -> None:
    print(analysis["status"], analysis["progress"]["done"] + 1)


with Client("http://127.0.0.1:8321", retry_seconds=5) as client:
    checkpoint = client.push_checkpoint("net.safetensors", name="net", metadata={"epoch": 10})
    probe: Probe = client.push_probe("digits.safetensors", name="digits")
    queued = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe["id"])
    ended = client.wait(queued["id"], on_progress=show)
    print(accuracy(client.get_report(ended["report_id"], "evaluation")))
    report = client.get_report(ended["report_id"])
    if report["kind"] == "path":
        print(report["points"][0]["w"], report["summary"]["cosine"])
    mir: list[float | None] = [
        point["splits"]["all"]["interplay"]["sample"]["global"]["mir"]
        for point in client.get_report("r", "series")["points"]
    ]
    for found in client.list("checkpoints", name="net", limit=3):
        print(found["n_parameters"] * 2)
"""

# Each line is one mistake.
WRONG = """
from interplay import Client, nothing
client = Client()
client.get_analysis("a")["state"]
client.get_report("r", "evaluation")["points"]
client.get_report("r", "path")["points"][0]["x"]
client.get_report("r", "speed")
client.get_report("r")["splits"]
client.push_probe("f", name="n")["n_parameters"]
client.get_analysis("a")["attempts"] + "1"
next(client.list("probes"))["architecture"]
client.get_report(client.get_analysis("a")["report_id"])
client.wait("a", on_progress=len)
"""


def test_results_are_the_services() -> None:
    """interplay/results.py is the output of `make types`."""
    assert result_types.FILE.read_text() == result_types.results_module()


@pytest.mark.slow
def test_types_help_people_who_check_their_scripts(tmp_path: Path) -> None:
    """mypy --strict accepts a correct script and finds every mistake of a wrong one."""
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    # Reading torch takes half a minute, and no result has a type of it.
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "right.py", "wrong.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = [line for line in ran.stdout.splitlines() if ": error: " in line]
    assert not [line for line in said if not line.startswith("wrong.py")], ran.stdout + ran.stderr
    mistakes = [number for number, line in enumerate(WRONG.splitlines(), start=1) if line and "Client()" not in line]
    assert {int(line.split(":")[1]) for line in said} == {*mistakes}, ran.stdout

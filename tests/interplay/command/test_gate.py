"""`interplay gate` and `interplay baseline` against a real service: every exit code, every file."""

import json
import os
import pty
import re
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import junitparser
import pytest
import torch
from safetensors.torch import load_file, save_file

from interplay import Client
from interplay.command.verdict import marker
from tests.conftest import MLP
from tests.interplay.command.running import interplay, message
from tests.interplay.command.test_command import ID
from tests.interplay.command.test_verdict import junit_schema
from tests.interplay.scripted import answer, scripted
from tests.interplay.test_client import closed_port
from tests.services import Service

ROOT = Path(__file__).parents[3]


@dataclass
class Place:
    """A service with a probe, a good checkpoint and a worse one, and a working folder."""

    url: str
    folder: Path
    probe: str
    good: Path
    worse: Path
    report: str

    def gate(self, *checks: dict[str, Any], **members: Any) -> Path:
        """Write a gate's file with a new name."""
        path = self.folder / f"{uuid.uuid4().hex[:8]}.yaml"
        listed = [{"metric": "splits.test.accuracy", **check} for check in checks]
        path.write_text(json.dumps({"name": f"gate-{path.stem}", "checks": listed, **members}))
        return path

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return interplay("gate", *arguments, url=self.url, **environment)

    def judge(
        self, *checks: dict[str, Any], arguments: tuple[str | Path, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Judge the existing report by a gate of these checks."""
        return self.run("--gate", self.gate(*checks), "--report", self.report, *arguments)


@pytest.fixture(scope="module")
def place(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    folder = tmp_path_factory.mktemp("gate")
    tensors = load_file(mlp_checkpoint_file)
    generator = torch.Generator().manual_seed(1)
    noisy = {name: tensor + 0.15 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(noisy, folder / "worse.safetensors", metadata={"architecture": json.dumps(MLP)})
    probe = f"digits-{uuid.uuid4().hex[:8]}"
    with Client(service.url) as client:
        checkpoint = client.push_checkpoint(mlp_checkpoint_file, name="good")
        probe_id = client.push_probe(digits_probe_file, name=probe, preprocess={"scale": 0.0625})["id"]
        analysis = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe_id)
        report = client.wait(analysis["id"], timeout_seconds=120)["report_id"]
    return Place(service.url, folder, probe, mlp_checkpoint_file, folder / "worse.safetensors", report)


def fresh_name() -> str:
    return f"main-{uuid.uuid4().hex[:8]}"


# --- the whole way --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_pushed_analysed_judged_and_promoted(place: Place) -> None:
    """One command goes from a file to a verdict, a baseline and all output files; a second run uploads nothing."""
    name, gate = fresh_name(), place.gate({"min": 0.5}, {"min_change": -0.02, "when_undefined": "pass"})
    junit, summary, body = (place.folder / f"{name}.{ending}" for ending in ("xml", "md", "json"))
    arguments = ("--gate", gate, "--checkpoint", place.good, "--probe", place.probe, "--baseline", name, "--promote")
    first = place.run(*arguments, "--junit", junit, "--markdown", summary, "--json", body, "--metadata", "epoch=3")
    assert first.returncode == 0, first.stderr
    lines = first.stderr.splitlines()
    assert lines[0] == "pushing mlp.safetensors"
    assert lines[1] == f"not sent: the service already has its {place.good.stat().st_size:,} bytes"
    assert lines[-1] == "succeeded"
    assert len(lines) == len(set(lines)), "one line a change"
    assert "Gate gate-" in first.stdout
    assert f"The baseline {name} now points at this report." in first.stdout

    junit_schema().validate(junit.read_text())
    (suite,) = junitparser.JUnitXml.fromfile(str(junit))
    assert [type(case.result[0]).__name__ if case.result else "" for case in suite] == ["", "Skipped"]
    assert suite.time > 0
    ran = json.loads(body.read_text())
    assert (ran["exit_code"], ran["promoted"], ran["problem"]) == (0, name, None)
    assert set(ran["seconds"]) == {"upload", "analysis", "verdict"}
    assert summary.read_text().startswith(marker(ran["gate"]))
    with Client(place.url) as client:
        assert client.get_baseline(name)["report_id"] == ran["verdict"]["report_id"]
        report = client.get_report(ran["verdict"]["report_id"], "evaluation")
        assert report["subject"]["metadata"] == {"epoch": 3}
        assert client.get_chart(report["id"], "overview", format="png").startswith(b"\x89PNG")

    second = place.run(*arguments)
    assert second.returncode == 0, second.stderr
    assert "change of 0" in second.stdout
    history = json.loads(interplay("baseline", "history", name, "--json", url=place.url).stdout)
    assert [move["note"] for move in history] == [f"passed the gate {ran['gate']}, version 1"] * 2


def test_a_file_that_the_service_has_not_is_sent(place: Place) -> None:
    """A new file is uploaded and judged; a worse network fails the gate and does not move the baseline."""
    name = fresh_name()
    with Client(place.url) as client:
        client.set_baseline(name, place.report)
    gate = place.gate({"min_change": -0.02})
    arguments = ("--checkpoint", place.worse, "--probe", place.probe, "--baseline", name, "--promote")
    ran = place.run("--gate", gate, *arguments, "--name", "noisy")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stderr.splitlines()[1] == f"pushed {place.worse.stat().st_size:,} bytes"
    assert "is below min_change -0.02" in re.sub(r"\s+", " ", ran.stdout)
    with Client(place.url) as client:
        assert client.get_baseline(name)["report_id"] == place.report


def test_significance_has_both_checkpoints_compared(place: Place) -> None:
    """The interval of a comparison with the baseline's checkpoint decides; a promotion changes that checkpoint."""
    name = fresh_name()
    with Client(place.url) as client:
        client.set_baseline(name, place.report)
    lenient = place.gate({"min_change": -0.9, "significance": 0.9}, {"min": 0.01})
    body = place.folder / f"{name}.json"
    arguments = ("--checkpoint", place.worse, "--probe", place.probe, "--baseline", name, "--json", body)
    ran = place.run("--gate", lenient, *arguments, "--promote")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    verdict = json.loads(body.read_text())["verdict"]
    assert (verdict["report_kind"], verdict["baseline"]["subject"]) == ("comparison", "good")
    check = verdict["checks"][0]
    assert (check["interval"]["confidence"], check["interval"]["method"], check["decided_by"]) == (0.9, "delta", "low")
    with Client(place.url) as client:
        found = client.get_report(verdict["report_id"], "comparison")["splits"]["test"]["differences"]["accuracy"]
        assert client.get_baseline(name)["report_kind"] == "comparison"
    assert (check["interval"]["low"], check["interval"]["high"]) == (found["low"], found["high"])
    assert check["change"] == pytest.approx(found["difference"])

    # The baseline is now the worse network: the good one is better, for certain, and the same one is the same.
    better = place.gate({"min_change": 0.001, "significance": 0.95})
    again: tuple[str | Path, ...] = ("--probe", place.probe, "--baseline", name, "--json", body)
    assert place.run("--gate", better, "--checkpoint", place.good, *again).returncode == 0
    assert json.loads(body.read_text())["verdict"]["baseline"]["subject"] == "worse"
    assert place.run("--gate", better, "--checkpoint", place.worse, *again).returncode == 1
    # A point against a baseline that is a comparison: its B.
    point = place.gate({"min_change": 0.001})
    assert place.run("--gate", point, "--checkpoint", place.good, *again).returncode == 0
    assert json.loads(body.read_text())["verdict"]["report_kind"] == "evaluation"


def test_significance_without_a_baseline_yet_is_undefined(place: Place) -> None:
    """Without a baseline only an evaluation is possible; its report can start the baseline."""
    gate = place.gate({"min_change": 0, "significance": 0.95})
    ran = place.run(
        "--gate", gate, "--checkpoint", place.good, "--probe", place.probe, "--baseline", (name := fresh_name())
    )
    assert ran.returncode == 5
    report = re.search(rf"interplay baseline set {name} (\S+)", re.sub(r"\s+", " ", ran.stdout))
    assert report is not None
    assert interplay("baseline", "set", name, report[1], url=place.url).returncode == 0


def test_a_baseline_whose_checkpoint_was_deleted_cannot_be_compared_with(place: Place) -> None:
    """Its report still serves for point values; intervals need the network, and the message says what to do.

    A baseline keeps its checkpoint: only one that was deleted before a baseline pointed at its report is gone.
    """
    name = fresh_name()
    with Client(place.url) as client:
        checkpoint = client.push_checkpoint(place.good, name="gone")
        probe_id = client.find("probes", place.probe)["id"]
        analysis = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe_id)
        report_id = client.wait(analysis["id"], timeout_seconds=120)["report_id"]
        client.delete("checkpoints", checkpoint["id"])
        client.set_baseline(name, report_id)
    files = ("--checkpoint", place.good, "--probe", place.probe, "--baseline", name)
    ran = place.run("--gate", place.gate({"min_change": -0.1, "significance": 0.95}), *files)
    assert ran.returncode == 2
    assert "has been deleted; point the baseline at another report" in message(ran)
    assert place.run("--gate", place.gate({"min_change": -0.1}), *files).returncode == 0


# --- exit codes -----------------------------------------------------------------------------------------------------


def test_passed_is_0_and_warnings_too_unless_strict(place: Place) -> None:
    """An existing report is judged; --strict turns a warning into a failure or into an undefined check."""
    assert place.judge({"min": 0.5}).returncode == 0
    warns = {"max": 0.5, "severity": "warn"}
    assert place.judge(warns).returncode == 0
    assert place.judge(warns, arguments=("--strict",)).returncode == 1
    unclear = {"min_change": 0, "severity": "warn"}
    assert place.judge(unclear).returncode == 0
    assert place.judge(unclear, arguments=("--strict",)).returncode == 5


def test_failed_is_1_also_beside_an_undefined_check(place: Place) -> None:
    """A failed check takes precedence over an undefined one."""
    ran = place.judge({"max": 0.5}, {"min_change": 0})
    assert ran.returncode == 1
    assert ran.stdout.index("failed") < ran.stdout.index("undefined")


def test_undefined_is_5(place: Place) -> None:
    """A change without a baseline and a number missing from the report are undefined."""
    assert place.judge({"min_change": 0}).returncode == 5
    assert place.judge({"metric": "splits.test.class_counts.99", "min": 0}).returncode == 5
    assert place.judge({"min_change": 0, "when_undefined": "pass"}).returncode == 0


@pytest.mark.slow
def test_unreachable_is_3(place: Place) -> None:
    """No service, or a proxy that responds in its place, gives 3; JUnit reports it too."""
    junit = place.folder / "unreachable.xml"
    url = f"http://127.0.0.1:{closed_port()}"
    ran = place.run("--gate", place.gate({"min": 0}), "--report", "x", "--junit", junit, "--url", url)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "cannot be reached" in ran.stderr
    junit_schema().validate(junit.read_text())
    with scripted((503, b"<html>")) as server:
        ran = place.run("--gate", place.gate({"min": 0}), "--report", "x", "--url", server.url)
    assert ran.returncode == 3
    assert "responded with 503" in ran.stderr


def test_failed_analysis_is_4(place: Place) -> None:
    """If the network does not fit its file, the problem is on stderr, in JUnit, Markdown and JSON."""
    wrong = json.dumps({**MLP, "args": {"sizes": [64, 16, 10]}})
    files = [place.folder / f"failed.{ending}" for ending in ("xml", "md", "json")]
    ran = place.run(
        *("--gate", place.gate({"min": 0}), "--checkpoint", place.good, "--probe", place.probe),
        *("--architecture", wrong, "--junit", files[0], "--markdown", files[1], "--json", files[2]),
    )
    assert (ran.returncode, ran.stdout) == (4, "")
    assert "misshaped" in ran.stderr
    junit_schema().validate(files[0].read_text())
    (suite,) = junitparser.JUnitXml.fromfile(str(files[0]))
    assert (suite.tests, suite.errors) == (1, 1)
    assert "no verdict" in files[1].read_text()
    body = json.loads(files[2].read_text())
    assert body["problem"]["type"] == "urn:interplay:problem:checkpoint-mismatch"
    assert (body["exit_code"], body["verdict"]) == (4, None)


def test_analysis_that_takes_too_long_is_6(place: Place) -> None:
    """After a timeout there is no report to judge."""
    ran = place.run(
        *("--gate", place.gate({"min": 0}), "--checkpoint", place.good, "--probe", place.probe),
        *("--timeout", "0", "--permutations", "1000"),
    )
    assert ran.returncode == 6
    analysis = re.search(r"Analysis (\S+) has not ended within 0 s; it continues", message(ran))
    assert analysis is not None
    # The tests that follow share its worker.
    assert interplay("cancel", analysis[1], url=place.url).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing option '--gate'"),
        (("--gate", "g"), "Give either --checkpoint and --probe, or --report alone."),
        (("--gate", "g", "--checkpoint", "x"), "Give either"),
        (("--gate", "g", "--checkpoint", "x", "--probe", "p", "--report", "r"), "Give either"),
        (("--gate", "g", "--report", "r", "--probe", "p"), "Give either"),
        (("--gate", "g", "--report", "r", "--promote"), "requires --baseline"),
        (("--gate", "no.yaml", "--report", "r"), "does not exist"),
        (("--gate", "no/gate", "--report", "r"), "does not exist"),
        (("--gate", "g", "--report", "r", "--junit", "no-folder/x.xml"), "cannot be written"),
        (("--gate", "g", "--report", "r", "--json", "."), "cannot be written"),
        (("--gate", "g", "--checkpoint", "x", "--probe", "p", "--architecture", "{"), "not valid JSON"),
        (("--gate", __file__, "--report", "r"), "is not YAML"),
    ],
    ids=lambda value: " ".join(value).replace(__file__, "FILE") if isinstance(value, tuple) else "",
)
def test_usage_is_2(arguments: tuple[str, ...], said: str) -> None:
    """Invalid arguments are refused before any request."""
    ran = interplay("gate", *arguments, url=f"http://127.0.0.1:{closed_port()}")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in message(ran)
    assert "Traceback" not in ran.stderr


def test_names_that_the_service_does_not_know_are_2(place: Place) -> None:
    """An unknown gate, report, probe or checkpoint is named in the message."""
    gate = place.gate({"min": 0})
    for arguments, said in (
        (("--gate", "no-such-gate", "--report", place.report), "no gate 'no-such-gate'"),
        (("--gate", gate, "--report", "no-such-report"), "no report with the name or id 'no-such-report'"),
        (("--gate", gate, "--checkpoint", place.good, "--probe", "no-such"), "no probe with the name or id 'no-such'"),
        (
            ("--gate", gate, "--checkpoint", "no-such", "--probe", place.probe),
            "'no-such' is no local file, and there is no checkpoint with the name or id",
        ),
        (("--gate", gate, "--report", place.report, "--baseline", "a b"), "does not have the right form"),
    ):
        ran = place.run(*arguments)
        assert ran.returncode == 2, ran.stderr
        assert said in message(ran)


def test_a_gate_that_is_not_sound_is_2_with_its_lines(place: Place) -> None:
    """Each error gives the file, the line and the nearest valid path."""
    path = place.folder / "unsound.yaml"
    path.write_text(
        "name: unsound\nchecks:\n  - metric: splits.test.accuracy\n    min: 0.9\n\n"
        "  # mistyped\n  - metric: splits.test.acuracy\n    min: 1e-3\n"
    )
    ran = place.run("--gate", path, "--report", place.report)
    assert ran.returncode == 2
    assert f"{path}:7: checks.1.metric: 'splits.test.acuracy' is no path" in ran.stderr
    assert "nearest is 'splits.test.accuracy'" in ran.stderr
    path.write_text("name: unsound\nchecks:\n  - metric: splits.test.accuracy\n    min: '0.9'\n    sevrity: warn\n")
    ran = place.run("--gate", path, "--report", place.report)
    assert ran.returncode == 2
    assert f"{path}:4: checks.0.min: " in ran.stderr
    assert f"{path}:5: checks.0.sevrity: " in ran.stderr


def test_a_gate_of_another_kind_judges_reports_alone(place: Place) -> None:
    """A gate of kind path needs an existing report of that kind."""
    path = place.gate({"metric": "summary.splits.test.loss_barrier.value", "max": 0.1}, kind="path")
    ran = place.run("--gate", path, "--checkpoint", place.good, "--probe", place.probe)
    assert ran.returncode == 2
    assert "give --report" in message(ran)
    ran = place.run("--gate", path, "--report", place.report)
    assert ran.returncode == 2
    assert "judges reports of kind path" in ran.stderr


def test_a_baseline_of_another_probe_is_2(place: Place, digits_probe_file: Path) -> None:
    """It is refused with a reason."""
    name = fresh_name()
    with Client(place.url) as client:
        other = client.push_probe(digits_probe_file, name="other", preprocess={"scale": 0.05})
        summary = client.get_report(place.report, "evaluation")
        analysis = client.create_analysis(checkpoint_id=summary["subject"]["id"], probe_id=other["id"])
        client.set_baseline(name, client.wait(analysis["id"], timeout_seconds=120)["report_id"])
    ran = place.judge({"min_change": 0}, arguments=("--baseline", name))
    assert ran.returncode == 2
    assert "cannot be compared with the baseline: probe.preprocess" in ran.stderr


# --- the rest -------------------------------------------------------------------------------------------------------


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(place: Place) -> None:
    """Both are judged against the same state; the loser has a verdict, exits with 2 and is in the history."""
    name = fresh_name()
    # Long enough that both begin before one has ended.
    gate, slow = place.gate({"min": 0.5}), ("--permutations", "50")
    files = ("--gate", gate, "--checkpoint", place.good, "--probe", place.probe)
    arguments = (*files, *slow, "--baseline", name, "--promote")
    with ThreadPoolExecutor(2) as pool:
        ran = [*pool.map(lambda _: place.run(*arguments), range(2))]
    assert sorted(one.returncode for one in ran) == [0, 2]
    (lost,) = [one for one in ran if one.returncode == 2]
    assert "The baseline has moved" in lost.stderr
    assert "Gate gate-" in lost.stdout
    shown = interplay("baseline", "history", name, "--json", url=place.url)
    assert [move["done"] for move in json.loads(shown.stdout)] == [False, True]


def test_a_gate_of_the_service_by_its_name_its_version_and_its_id(place: Place) -> None:
    """A name alone is the current version."""
    path = place.gate({"min": 0.5})
    name = json.loads(path.read_text())["name"]
    assert place.run("--gate", path, "--report", place.report).returncode == 0
    path.write_text(json.dumps({"name": name, "checks": [{"metric": "splits.test.accuracy", "max": 0.5}]}))
    assert place.run("--gate", path, "--report", place.report).returncode == 1
    listed = json.loads(interplay("list", "gates", "--name", name, "--json", url=place.url).stdout)
    assert [gate["version"] for gate in listed] == [2, 1]
    for reference, code in ((name, 1), (f"{name}@1", 0), (f"{name}@2", 1), (listed[1]["id"], 0), (f"{name}@9", 2)):
        assert place.run("--gate", reference, "--report", place.report).returncode == code, reference


def test_json_on_stdout_is_all_there_is(place: Place) -> None:
    """`--json -` prints only JSON, for a pipe."""
    ran = place.judge({"max": 0.5}, arguments=("--json", "-"))
    assert ran.returncode == 1
    assert json.loads(ran.stdout)["verdict"]["status"] == "fail"


def test_progress_is_a_bar_on_a_terminal(place: Place) -> None:
    """The bar is removed at the end; the table is on stdout."""
    control, terminal = pty.openpty()
    command = ["gate", "--gate", place.gate({"min": 0.5}), "--checkpoint", place.good, "--probe", place.probe]
    process = subprocess.Popen(
        [sys.executable, "-m", "interplay.command", *map(str, command)],
        env={**os.environ, "INTERPLAY_URL": place.url, "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    stdout, _ = process.communicate(timeout=120)
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(control, 2**16):
            shown += chunk
    except OSError:
        pass
    os.close(control)
    assert process.returncode == 0
    assert "━" in shown.decode()
    assert "passed" in stdout.decode()


def test_baselines_by_hand(place: Place) -> None:
    """A baseline is set, shown and listed; an unknown one gives 2."""
    name = fresh_name()
    ran = interplay("baseline", "set", name, place.report, "--note", "by hand", url=place.url)
    assert (ran.returncode, ran.stdout) == (0, f"baseline {name} is at report {place.report}\n")
    assert place.report in interplay("baseline", "show", name, url=place.url).stdout
    assert name in interplay("baseline", "list", url=place.url).stdout
    assert "by hand" in interplay("baseline", "history", name, url=place.url).stdout
    ran = interplay("baseline", "show", "no-such", url=place.url)
    assert (ran.returncode, ran.stderr) == (2, "There is no such resource: There is no baseline 'no-such'.\n")


def test_a_baseline_that_moves_during_the_analysis_is_not_what_is_judged_against() -> None:
    """The request and the promotion use the report that the baseline pointed at in the beginning."""
    gate = {"id": "g", "name": "release", "version": 1, "kind": "evaluation", "checks": []}
    verdict = {
        "status": "pass", "report_id": "r", "subject": "s", "probe": "p", "gate": gate, "checks": [],
        "baseline": {"name": "main", "report_id": "old", "subject": "b"},
    }  # fmt: skip
    page = {"items": [gate], "next_cursor": None}
    held = {"name": "main", "report_id": "old", "checkpoint_id": "c"}
    with scripted(answer(page), answer(gate), answer(held), answer(verdict), answer(held)) as server:
        ran = interplay(
            *("gate", "--gate", "release", "--report", ID, "--baseline", "main", "--promote"), url=server.url
        )
    assert ran.returncode == 0, ran.stderr
    judged, put = server.seen[-2:]
    assert json.loads(judged.body_start)["baseline_report_id"] == "old"
    assert (put.method, json.loads(put.body_start)["expected_report_id"]) == ("PUT", "old")

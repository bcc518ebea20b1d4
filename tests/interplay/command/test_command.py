"""The command in real processes: exit codes and output."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.interplay.command.running import interplay, message
from tests.interplay.scripted import BREAK, answer, scripted
from tests.interplay.test_client import RUNNING, SUCCEEDED, closed_port
from tests.services import Service

# A whole id, which is not looked up.
ID = "00000000-0000-4000-8000-00000000000f"
FAILED = {**RUNNING, "status": "failed", "problem": {"type": "urn:x", "title": "Out", "detail": "of", "names": ["w"]}}


# --- without a service ----------------------------------------------------------------------------------------------


def test_installed_entry_point_is_this_command() -> None:
    """`interplay`, as pip installs it, runs the same code."""
    script = Path(sys.executable).with_name("interplay")
    ran = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, interplay("--version").stdout)
    assert re.fullmatch(r"interplay \d+\.\d+\.\d+\n", ran.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "probes"),
        ("show", "x"),
        ("export", "x", "--csv", "x.csv"),
        ("cancel", "x"),
        ("delete", "probes", "x"),
        ("analyze", "--features", "x"),
        ("path", "a", "b", "--probe", "x"),
        ("prune", "a", "--probe", "x"),
        ("series", "1=a", "2=b", "--probe", "x"),
        ("baseline", "list"),
        ("baseline", "show", "x"),
        ("baseline", "set", "x", "y"),
        ("baseline", "history", "x"),
        ("push", "probe", __file__),
        ("push", "features", __file__),
        ("push", "checkpoint", __file__, "--architecture", "{}"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_unreachable_service_is_3(arguments: tuple[str, ...], as_json: bool) -> None:
    """Without a service every call exits with 3, with one line on stderr and nothing on stdout."""
    url = f"http://127.0.0.1:{closed_port()}"
    ran = interplay(*arguments, *(["--json"] if as_json else []), "--url", url)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith(f"{url} cannot be reached")
    assert "`interplay serve` starts one here; --url or INTERPLAY_URL names another." in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bogus",), "Unknown command"),
        (("show",), "Missing argument"),
        (("list", "everything"), "Choose from"),
        (("list", "probes", "--limit", "0"), "--limit"),
        (("list", "probes", "--limit", "1.5"), "'1.5' is not an integer"),
        (("list", "probes", "--limit"), "Option '--limit' requires a value"),
        (("show", "x", "y"), "Unexpected argument 'y'"),
        (("baseline", "bogus"), "Unknown command"),
        (("list", "probes", "--metadata", "epoch"), "KEY=VALUE"),
        (("list", "probes", "--metadata", "=1"), "KEY=VALUE"),
        (("list", "probes", "--after", "yesterday"), "is not a time"),
        (("list", "probes", "--status", "running"), "does not apply to"),
        (("list", "reports", "--status", "running"), "does not apply to"),
        (("delete", "fetches", "x"), "Choose from"),
        (("analyze",), "Give a FILE and --probe"),
        (("analyze", "--checkpoint", "x"), "Give a FILE and --probe"),
        (("analyze", "--checkpoint", "x", "--probe", "x", "--features", "x"), "Give a FILE and --probe"),
        (("analyze", "--probe", "x", "--features", "x"), "Give a FILE and --probe"),
        (("analyze", __file__), "Give a FILE and --probe"),
        (("analyze", __file__, "--probe", "x", "--checkpoint", "x"), "Give a FILE and --probe"),
        (("analyze", "--features", "", "--wait"), "--features: an empty text is no name and no id"),
        (("analyze", "--checkpoint", " ", "--probe", "x"), "--checkpoint: an empty text is no name and no id"),
        (("show", ""), "an empty text is no name and no id"),
        (("delete", "probe", ""), "an empty text is no name and no id"),
        (("series", "--probe", "x"), "Give either checkpoints"),
        (("series", "0=a", "--metadata", "run=a", "--probe", "x"), "Give either checkpoints"),
        (("list", "gates", "--sort", "name"), "does not apply to"),
        (("list", "probes", "--metric", "mir>=0"), "does not apply to"),
        (("list", "reports", "--order", "asc"), "needs --sort"),
        (("download", "reports", "x"), "Choose from checkpoints, probes, feature-sets"),
        (("path", "a", "--probe", "x"), "Missing argument"),
        (("path", "a", "b"), "Missing option"),
        (("path", "a", "b", "--probe", "x", "--points", "5", "--adaptive"), "Give one of"),
        (("prune", "a", "--probe", "x", "--sparsity", "2"), "--sparsity"),
        (("series", "one=a", "--probe", "x"), "is not a number"),
        (("series", "1=a", "1.0=b", "--probe", "x"), "is given twice"),
        (("series", "a", "--probe", "x"), "KEY=VALUE"),
        (("series", "nan=a", "2=b", "--probe", "x"), "'nan' is not a finite number"),
        (("series", "1=a", "inf=b", "--probe", "x"), "'inf' is not a finite number"),
        (("path", "a", "b", "--probe", "x", "--at", "nan"), "--at. nan is not a finite number"),
        (("path", "a", "b", "--probe", "x", "--at", "0.5", "--at=-inf"), "--at. -inf is not a finite number"),
        (("analyze", "--features", "x", "--tolerance", "inf"), "--tolerance. inf is not a finite number"),
        (("push", "checkpoint", "no-such-file"), "does not exist"),
        (("push", "checkpoint", __file__, "--architecture", "no-such-file"), "neither JSON nor a readable file"),
        (("push", "checkpoint", __file__, "--architecture", "{broken"), "not valid JSON"),
        (("push", "checkpoint", __file__, "--architecture", "[]"), "must be a JSON object"),
        (("push", "checkpoint", __file__, "--architecture", '{"a": NaN}'), "not valid JSON"),
        (("push", "checkpoint", __file__, "--metadata", "epoch"), "KEY=VALUE"),
        (("push", "probe", __file__, "--class-names", '{"a": 1}'), "JSON list of texts"),
        (("push", "probe", __file__, "--class-names", "[1, 2]"), "JSON list of texts"),
        (("export", "x"), "Give one or more of"),
        (("show", "x", "--chart", "x.gif"), ".svg, .png or .json"),
        (("show", "x", "--url", "ftp://x"), "not an http or https URL"),
        (("show", "x", "--api-key", "a\nb"), "header cannot carry"),
    ],
    ids=lambda value: " ".join(value).replace(__file__, "FILE") if isinstance(value, tuple) else "",
)
def test_usage_is_2(arguments: tuple[str, ...], said: str) -> None:
    """Invalid arguments are refused before any request: exit code 2, a message on stderr, nothing on stdout."""
    ran = interplay(*arguments, url=f"http://127.0.0.1:{closed_port()}")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in message(ran)
    assert "Traceback" not in ran.stderr


def test_help_is_shown_without_a_command() -> None:
    """A command that needs another one shows its help and exits with 2; --help shows the same and exits with 0."""
    for command in ((), ("push",), ("baseline",)):
        alone, asked = interplay(*command), interplay(*command, "--help")
        assert (alone.returncode, alone.stderr, asked.returncode) == (2, "", 0)
        assert alone.stdout == asked.stdout
        assert alone.stdout.startswith(" ".join(("Usage: interplay", *command)))


def test_help_shows_options_in_groups() -> None:
    """Commands that share a group of options show it under the same title, with the variables of the environment."""
    for command in ("analyze", "compare", "path", "prune", "series", "gate"):
        shown = interplay(command, "--help").stdout
        titles = re.findall(r"^╭─ ([^─]+) ─", shown, flags=re.MULTILINE)
        assert titles[-3:] == ["Evaluation", "Waiting", "Service and output"], titles
        assert "INTERPLAY_URL" in shown


def test_last_of_repeated_options_counts() -> None:
    """An option that is given twice has its last value, and an empty variable of the environment is ignored."""
    with scripted(answer({"items": [], "next_cursor": None})) as server:
        ran = interplay(
            "list", "probes", "--url", "http://x.invalid", "--url", server.url, "--name", "a", "--name", "b"
        )
        assert ran.returncode == 0, ran.stderr
        assert interplay("list", "probes", "--url", server.url, url="").returncode == 0
    assert "name=b" in server.seen[0].target


def test_reader_of_stdout_that_stops_is_no_error() -> None:
    """`interplay list | head -1` ends without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with scripted(answer({"items": [], "next_cursor": None})) as server:
        for form in ((), ("--json",)):
            command = [sys.executable, "-m", "interplay.command", "list", "probes", *form, "--url", server.url]
            ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
            assert (ran.returncode, ran.stderr) == (1, "")
    os.close(writing)


def test_problems_of_the_service_are_2() -> None:
    """A problem of the service is printed in full on stderr."""
    problem = {
        "type": "urn:x",
        "title": "Does not fit",
        "detail": "2 names.",
        "status": 422,
        "missing": ["a", "b\x1b["],
    }
    with scripted(answer(problem, 422)) as server:
        ran = interplay("push", "features", __file__, url=server.url)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "Does not fit: 2 names.\n  missing:\n    a\n    b\N{REPLACEMENT CHARACTER}[\n"


def test_failed_analysis_is_1() -> None:
    """A failed analysis gives 1 and its problem on stderr; with --json stdout holds the analysis."""
    with scripted(answer(RUNNING), answer(RUNNING), answer(FAILED)) as server:
        ran = interplay("analyze", "--features", ID, "--wait", url=server.url)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "running 1/1\nfailed\nOut: of\n  names:\n    w\n"
    with scripted(answer(RUNNING), answer(FAILED)) as server:
        ran = interplay("analyze", "--features", ID, "--wait", "--json", url=server.url)
    assert (ran.returncode, json.loads(ran.stdout)) == (1, FAILED)


def test_cancelled_analysis_is_1_and_a_wait_that_is_too_long_is_6() -> None:
    """Neither gives a report; a script can tell an analysis that goes on from one that ended."""
    with scripted(answer(RUNNING), answer({**RUNNING, "status": "cancelled", "problem": None})) as server:
        ran = interplay("analyze", "--features", ID, "--wait", url=server.url)
    assert (ran.returncode, ran.stderr) == (1, "cancelled\nThe analysis was cancelled\n")
    with scripted(answer(RUNNING)) as server:
        ran = interplay("analyze", "--features", ID, "--wait", "--timeout", "0.1", url=server.url)
    assert ran.returncode == 6
    assert ran.stderr.endswith("Analysis a has not ended within 0.1 s; it continues.\n")


def test_service_that_vanishes_during_an_upload_is_3() -> None:
    """A connection that breaks during an upload counts as an unreachable service, not as a usage error."""
    with scripted(BREAK) as server:
        ran = interplay("push", "features", __file__, url=server.url, INTERPLAY_RETRY_SECONDS="1")
    assert ran.returncode == 3
    assert "broke" in ran.stderr


def test_interrupted_wait_says_how_to_stop_the_analysis() -> None:
    """Ctrl-C ends the wait; the analysis continues, and the message says how to cancel it."""
    with scripted(answer(RUNNING)) as server:
        command = [
            sys.executable,
            "-m",
            "interplay.command",
            "analyze",
            "--features",
            ID,
            "--wait",
            "--url",
            server.url,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.seen) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert "interplay cancel a" in stderr
    assert "Traceback" not in stderr
    assert process.returncode == 130


def test_progress_bar_on_a_terminal() -> None:
    """On a terminal a progress bar is shown and removed at the end; stdout has only JSON."""
    answers = (answer(RUNNING), answer({**RUNNING, "progress": {"done": 1, "total": 4, "phase": "joint spectrum"}}))
    with scripted(*answers, answer(SUCCEEDED)) as server:
        control, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "interplay.command", "analyze", "--features", ID, "--wait", "--json"],
            env={**os.environ, "INTERPLAY_URL": server.url, "TERM": "xterm", "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=terminal,
        )
        stdout, _ = process.communicate(timeout=20)
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(control, 2**16):
                shown += chunk
        except OSError:  # Linux says so where the other end of a terminal is closed
            pass
        os.close(control)
    assert process.returncode == 0
    assert json.loads(stdout) == SUCCEEDED
    assert "running 1/4 joint spectrum" in shown.decode()
    assert "━" in shown.decode()


def test_json_is_ascii_whatever_the_names() -> None:
    """Escape sequences and non-ASCII letters in names reach a terminal only as JSON escapes."""
    items = [{"id": "1", "name": "\x9b31m\u202e∞"}]
    with scripted(answer({"items": items, "next_cursor": None})) as server:
        ran = interplay("list", "checkpoints", "--json", url=server.url)
    assert ran.stdout.isascii()
    assert json.loads(ran.stdout) == items


def test_names_that_the_terminal_cannot_show() -> None:
    """A table is printed even in an ASCII locale."""
    items = [{"id": "1", "name": "∞ net"}]
    with scripted(answer({"items": items, "next_cursor": None})) as server:
        ran = interplay("list", "checkpoints", url=server.url, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0
    assert "? net" in ran.stdout


def test_metadata_keeps_its_types(tmp_path: Path) -> None:
    """A value that is JSON keeps its type, others are text; the name defaults to the file's stem."""
    file, network = tmp_path / "net-3.safetensors", tmp_path / "net.json"
    file.write_bytes(b"0")
    network.write_text('{"family": "builtin"}')
    metadata = ["epoch=3", "lr=0.1", "final=true", "run=a=b", "note=", "nan=NaN", 'tags=["x", "y"]']
    options = [part for entry in metadata for part in ("--metadata", entry)]
    with scripted(answer({"id": "c", "name": "n"}, 201)) as server:
        ran = interplay("push", "checkpoint", file, "--architecture", network, "--head", "fc", *options, url=server.url)
    assert (ran.returncode, ran.stdout) == (0, "checkpoint c, n\n")
    spec = json.loads(server.seen[0].body_start.split(b"\r\n\r\n")[1].split(b"\r\n--")[0])
    assert spec == {
        "name": "net-3",
        "architecture": {"family": "builtin"},
        "head": "fc",
        "metadata": {
            "epoch": 3,
            "lr": 0.1,
            "final": True,
            "run": "a=b",
            "note": "",
            "nan": "NaN",
            "tags": ["x", "y"],
        },
    }


@pytest.mark.parametrize(
    ("command", "module", "package"),
    [
        ("serve", "torch", "interplay-server[worker]"),
        ("serve", "uvicorn", "interplay-server[worker]"),
        ("api", "uvicorn", "interplay-server"),
        ("worker", "torch", "interplay-server[worker]"),
        ("migrate", "uvicorn", "interplay-server"),
    ],
)
def test_server_commands_name_the_missing_package(command: str, module: str, package: str) -> None:
    """If the server or its extra is not installed, the command says how to install it and exits with 2."""
    program = f"import sys; sys.modules[{module!r}] = None; from interplay.command.main import main; main()"
    ran = subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"Not installed: `interplay {command}` needs more than the client: pip install '{package}'\n"


@pytest.mark.parametrize("command", ["serve", "api", "worker", "migrate"])
def test_server_commands_hand_over_from_any_folder(command: str, tmp_path: Path) -> None:
    """Arguments, including --help, reach the server's program, even from a folder with another `app` or `workers`."""
    for name in ("app", "workers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").write_text("raise SystemExit('the wrong program')")
    script = Path(sys.executable).with_name("interplay")
    ran = subprocess.run([script, command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("usage:")


# --- with the service -----------------------------------------------------------------------------------------------


def as_json(ran: subprocess.CompletedProcess[str]) -> Any:
    """Return the JSON output of a command that succeeded."""
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_from_files_to_a_report(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """push, analyze --wait, show, list and delete work together, and their outputs agree."""
    run = uuid.uuid4().hex
    checkpoint = as_json(
        interplay(
            *("push", "checkpoint", mlp_checkpoint_file, "--name", run, "--metadata", f"run={run}"),
            *("--metadata", "epoch=3", "--json"),
            url=service.url,
        )
    )
    preprocess = json.dumps({"scale": 1 / 16})
    probe = as_json(
        interplay("push", "probe", digits_probe_file, "--preprocess", preprocess, "--json", url=service.url)
    )
    shown = interplay("analyze", "--checkpoint", checkpoint["id"], "--probe", probe["id"], "--wait", url=service.url)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.splitlines()[-1] == "succeeded"
    (analysis,) = as_json(
        interplay("list", "analyses", "--metadata", f"run={run}", "--status", "succeeded", "--json", url=service.url)
    )
    report = as_json(interplay("show", analysis["report_id"], "--json", url=service.url))
    mir = report["splits"]["all"]["interplay"]["sample"]["global"]["mir"]
    assert f"{mir:.4f}" in shown.stdout
    assert interplay("show", report["id"], url=service.url).stdout == shown.stdout
    assert shown.stdout.splitlines()[-1] == f"{service.url}/reports/{report['id']}"
    table = interplay("list", "checkpoints", "--name", run, url=service.url).stdout
    assert checkpoint["id"][:8] in table
    assert "epoch=3" in table
    assert as_json(interplay("delete", "checkpoints", checkpoint["id"], "--json", url=service.url)) == {
        "id": checkpoint["id"],
        "deleted": True,
    }
    assert as_json(interplay("list", "checkpoints", "--name", run, "--json", url=service.url)) == []


def test_checkpoint_that_does_not_fit(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """An analysis of a checkpoint with wrong shapes gives 1, the shapes on stderr and its problem in the JSON."""
    network = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 33, 10]}}
    pushed = interplay(
        "push", "checkpoint", mlp_checkpoint_file, "--architecture", json.dumps(network), "--json", url=service.url
    )
    probe = as_json(interplay("push", "probe", digits_probe_file, "--json", url=service.url))
    ran = interplay(
        "analyze", "--checkpoint", as_json(pushed)["id"], "--probe", probe["id"], "--wait", "--json", url=service.url
    )
    assert ran.returncode == 1
    assert json.loads(ran.stdout)["problem"]["type"] == "urn:interplay:problem:checkpoint-mismatch"
    assert "33" in ran.stderr


def test_cancel_and_unknown_ids(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A queued analysis can be cancelled; an unknown id is a problem and gives 2."""
    checkpoint = as_json(interplay("push", "checkpoint", mlp_checkpoint_file, "--json", url=service.url))
    probe = as_json(interplay("push", "probe", digits_probe_file, "--json", url=service.url))
    queued = as_json(
        interplay(
            *("analyze", "--checkpoint", checkpoint["id"], "--probe", probe["id"], "--permutations", "1000", "--json"),
            *("--precision", "bfloat16"),
            url=service.url,
        )
    )
    assert queued["options"]["null_permutations"] == 1000
    assert queued["options"]["precision"] == "bfloat16"
    cancelled = interplay("cancel", queued["id"], url=service.url)
    assert cancelled.returncode == 0, cancelled.stderr
    assert queued["id"] in cancelled.stdout
    for arguments in (("show", "no-such"), ("cancel", "no-such"), ("delete", "probes", "no-such")):
        ran = interplay(*arguments, url=service.url)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert "'no-such'" in ran.stderr


def test_features_from_elsewhere(service: Service, tmp_path: Path) -> None:
    """A pushed feature set is analysed without a network; perfect collapse has the MIR of its optimum."""
    frame = (np.eye(4) - 0.25).astype(np.float32)
    labels = np.repeat(np.arange(4), 25)
    file = tmp_path / "frame.safetensors"
    save_file({"features": frame[labels], "labels": labels, "head": frame}, file)
    pushed = as_json(interplay("push", "features", file, "--json", url=service.url))
    analysis = as_json(interplay("analyze", "--features", pushed["id"], "--wait", "--json", url=service.url))
    report = as_json(interplay("show", analysis["report_id"], "--json", url=service.url))
    values = report["splits"]["all"]["interplay"]["sample"]["global"]
    assert values["mir"] == pytest.approx(0.753953169047, abs=1e-6)
    assert values["hdr"] == pytest.approx(0.0, abs=1e-6)


def test_paths_pruning_and_series(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path: Path
) -> None:
    """Each kind is queued, waited for and shown: a row per point, then the summary."""
    ids = [
        as_json(interplay("push", "checkpoint", mlp_checkpoint_file, "--name", name, "--json", url=service.url))["id"]
        for name in ("one", "two")
    ]
    pushed = interplay(
        "push", "probe", digits_probe_file, "--preprocess", '{"scale": 0.0625}', "--json", url=service.url
    )
    common = ("--probe", as_json(pushed)["id"], "--permutations", "0", "--wait")
    ran = interplay("path", *ids, *common, "--points", "3", url=service.url, COLUMNS="200")
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines() if line.strip()[:3] in ("0  ", "0.5", "1  ")] == [
        "0", "0.5", "1",
    ]  # fmt: skip
    assert re.search(r"test +0.0000 at 0 +0.0000 at 0 .* yes", ran.stdout)
    assert "Weights are 0.0000 apart, their cosine is 1.0000." in ran.stdout
    ran = interplay("prune", ids[0], *common, "--sparsity", "0.5", "--layerwise", url=service.url, COLUMNS="200")
    assert ran.returncode == 0, ran.stderr
    assert "knee" in ran.stdout
    series = ("series", f"10={ids[1]}", f"0={ids[0]}", "--axis", "epoch", *common)
    ran = interplay(*series, url=service.url, COLUMNS="200")
    assert ran.returncode == 0, ran.stderr
    assert "epoch" in ran.stdout
    shown = re.search(r"report +([0-9a-f-]{36})", ran.stdout)
    assert shown is not None
    for name in ("picture.svg", "picture.PNG", "picture.json"):
        ran = interplay("show", shown[1], "--chart", tmp_path / name, url=service.url)
        assert ran.returncode == 0, ran.stderr
        assert (tmp_path / name).stat().st_size > 1000
    other = interplay("show", shown[1], "--chart", tmp_path / "x.svg", "--chart-name", "nonsense", url=service.url)
    assert (other.returncode, "overview" in other.stderr) == (2, True)
    wrong = interplay("show", shown[1], "--chart", tmp_path / "none" / "x.svg", url=service.url)
    assert (wrong.returncode, "cannot be written" in wrong.stderr) == (2, True)
    report = as_json(interplay(*series, "--json", url=service.url))
    assert report["axis"] == {"name": "epoch", "values": [0, 10]}
    refused = interplay("series", f"0={ids[0]}", *common, url=service.url)
    assert refused.returncode == 2
    assert "axis" in refused.stderr

"""`interplay push` of an address, and the other commands on fetches: with a real service and a real source."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.elsewhere import Elsewhere
from tests.interplay.command.running import interplay, message
from tests.interplay.command.test_command import as_json
from tests.interplay.scripted import answer, scripted
from tests.interplay.test_client import closed_port
from tests.services import running, until

FETCH = {
    "id": "00000000-0000-4000-8000-00000000000f",
    "makes": "checkpoint",
    "name": "net",
    "source": "hf://org/net",
    "status": "running",
    "progress": {"done": 3 * 2**20, "total": 9 * 2**20, "phase": "fetching"},
    "resource_id": None,
    "created_at": "2026-01-31T12:00:00Z",
    "problem": None,
}
QUEUED = {**FETCH, "status": "queued", "progress": {"done": 0, "total": 0, "phase": ""}}
SUCCEEDED = {**FETCH, "status": "succeeded", "resource_id": "00000000-0000-4000-8000-00000000000c"}
CHECKPOINT = {"id": SUCCEEDED["resource_id"], "name": "net"}


def test_addresses_are_pushed(elsewhere: Elsewhere, digits_probe_file: Path) -> None:
    """A checkpoint and a probe are fetched, named by their addresses, shown, and listed."""
    url = elsewhere.service.url
    ran = interplay("push", "checkpoint", f"{elsewhere.address('mlp.safetensors')}?signature=secret", url=url)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("checkpoint ")
    assert ran.stdout.endswith(", mlp, 2,410 parameters\n")
    assert ran.stderr.splitlines()[-1] == "mlp: succeeded"
    assert "secret" not in ran.stderr
    elsewhere.server.add_repository("datasets/org/digits", {"data/all.safetensors": digits_probe_file.read_bytes()})
    address = "hf://datasets/org/digits@main/data/all.safetensors"
    probe = as_json(interplay("push", "probe", address, "--preprocess", '{"scale": 0.0625}', "--json", url=url))
    assert (probe["name"], probe["preprocess"]["scale"], probe["origin"]["source"]) == ("digits", 0.0625, address)
    (fetch,) = as_json(interplay("list", "fetches", "--name", "digits", "--limit", "1", "--json", url=url))
    assert fetch["resource_id"] == probe["id"]
    shown = interplay("show", fetch["id"][:13], url=url)
    assert shown.returncode == 0, shown.stderr
    for said in (address, probe["id"], "succeeded", f"{url}/fetches/{fetch['id']}"):
        assert said in shown.stdout
    assert as_json(interplay("show", fetch["id"], "--json", url=url)) == fetch
    assert as_json(interplay("wait", fetch["id"], "--json", url=url)) == fetch
    table = interplay("list", "fetch", "--status", "succeeded", url=url, COLUMNS="80").stdout
    assert probe["id"][:8] in table
    assert max(map(len, table.splitlines())) <= 80


def test_a_fetch_that_nobody_waits_for(elsewhere: Elsewhere) -> None:
    """It is begun, looked at, waited for, and cancelled, by its id and by its name."""
    url, name = elsewhere.service.url, f"slow {uuid.uuid4().hex}"
    elsewhere.server.faults.bytes_per_second = 1000
    arguments = ("push", "checkpoint", elsewhere.address("mlp.safetensors"), "--name", name, "--no-wait")
    begun = interplay(*arguments, url=url)
    assert (begun.returncode, begun.stderr) == (0, "")
    fetch = as_json(interplay(*arguments, "--json", url=url))
    assert begun.stdout.startswith(f"fetch {fetch['id']}, ")
    until(lambda: elsewhere.service.client.get(f"/v1/fetches/{fetch['id']}").json()["progress"]["done"])
    assert re.search(r"fetching, \d\.\d of 9\.\d KiB", interplay("show", name, url=url).stdout)
    assert "running " in interplay("list", "fetches", "--name", name, url=url).stdout
    late = interplay("wait", name, "--timeout", "0", url=url)
    assert late.returncode == 6
    assert late.stderr.endswith(f"Fetch {fetch['id']} has not ended within 0 s; it continues.\n")
    cancelled = interplay("cancel", name, url=url)
    assert (cancelled.returncode, cancelled.stdout.split(", ")[0]) == (0, f"fetch {fetch['id']}"), cancelled.stderr
    ended = interplay("wait", fetch["id"], url=url)
    assert (ended.returncode, ended.stdout, ended.stderr.splitlines()[-1]) == (1, "", "The fetch was cancelled")


def test_what_cannot_be_fetched(elsewhere: Elsewhere) -> None:
    """A fetch that fails gives 1 and its problem, with --json also itself; what is not allowed says what to set."""
    url = elsewhere.service.url
    ran = interplay("push", "checkpoint", elsewhere.address("none.safetensors"), "--json", url=url)
    assert ran.returncode == 1
    assert json.loads(ran.stdout)["problem"]["type"] == "urn:interplay:problem:source-missing"
    assert "404 Entry not found" in ran.stderr
    for address, beginning in (
        ("s3://team/nets/a.npz", "s3://team"),
        ("hf://other/net", "hf://other"),
        ("hf://datasets/other/pets/data", "hf://datasets/other"),
        ("https://example.com/a.npz?signature=secret", "https://example.com"),
    ):
        ran = interplay("push", "probe", address, url=url)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert f"INTERPLAY_SOURCES={beginning} beside" in ran.stderr
        assert "secret" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("push", "checkpoint", __file__, "--no-wait"), "is for addresses"),
        (("push", "probe", __file__, "--no-wait"), "is for addresses"),
        (("push", "features", "s3://a/b.safetensors"), "is no file here; `interplay push checkpoint` or"),
        (("analyze", "hf://a/b", "--probe", "x"), "is no file here; `interplay push checkpoint` or"),
        (("list", "fetches", "--kind", "path"), "does not apply to"),
        (("list", "fetches", "--sort", "name"), "does not apply to"),
    ],
)
def test_usage_is_2(arguments: tuple[str, ...], said: str) -> None:
    """What does not apply is refused before any request."""
    ran = interplay(*arguments, url=f"http://127.0.0.1:{closed_port()}")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in message(ran)


def test_of_an_analysis_and_a_fetch_with_one_name_the_newest_is_meant() -> None:
    """A note says which; an id finds either without a look at names."""
    analysis: dict[str, Any] = {**FETCH, "id": "0" * 36, "created_at": "2026-01-31T11:00:00Z"}
    answers = [answer({"items": [one], "next_cursor": None}) for one in (analysis, FETCH)]
    with scripted(*answers, answer({**FETCH, "status": "cancelled"})) as server:
        ran = interplay("cancel", "net", url=server.url)
    assert (ran.returncode, ran.stdout) == (0, f"fetch {FETCH['id']}, cancelled\n")
    assert ran.stderr.startswith(f"Several have the name net; the newest is the fetch {FETCH['id']}")
    assert server.seen[-1].target == f"/v1/fetches/{FETCH['id']}/cancel"
    with scripted(answer({}, 404), answer({}, 404)) as server:
        ran = interplay("cancel", str(FETCH["id"]), url=server.url)
    assert (ran.returncode, len(server.seen)) == (2, 2)
    assert "no analysis and no fetch" in message(ran)


def test_interrupted_wait_says_how_to_stop_the_fetch() -> None:
    """Ctrl-C ends the wait; the fetch goes on, and the message says how to cancel it."""
    with scripted(answer(FETCH)) as server:
        command = [sys.executable, "-m", "interplay.command", "push", "checkpoint", "hf://org/net"]
        environment = {**os.environ, "INTERPLAY_URL": server.url}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        until(lambda: len(server.seen) >= 3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert stderr == (
        f"net: fetching, 3.0 of 9.0 MiB\nThe fetch continues. To cancel it: interplay cancel {FETCH['id']}\n"
    )
    assert process.returncode == 130
    assert [seen.method for seen in server.seen].count("POST") == 1


def test_progress_bar_on_a_terminal() -> None:
    """A bar counts bytes and is removed at the end; stdout has only JSON."""
    answers = [answer(state) for state in (QUEUED, QUEUED, FETCH, SUCCEEDED, CHECKPOINT)]
    with scripted(*answers) as server:
        control, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "interplay.command", "push", "checkpoint", "hf://org/net", "--json"],
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
    assert json.loads(stdout) == CHECKPOINT
    for said in ("net, queued", "net, fetching", "3.0/9.0 MiB", "━"):
        assert said in shown.decode()


@pytest.mark.slow
def test_a_missing_worker_is_said(tmp_path: Path) -> None:
    """A fetch that is queued for some seconds says that no worker is there."""
    with running(tmp_path / "data", command="api", sources="hf://org") as service:
        ran = interplay("push", "checkpoint", "hf://org/net", "--no-wait", "--json", url=service.url)
        fetch = as_json(ran)
        waited = interplay("wait", fetch["id"], "--timeout", "7", url=service.url)
        assert waited.returncode == 6
        assert "net: queued" in waited.stderr
        assert re.search("The fetch waits: .*`interplay worker` starts one", waited.stderr)
        assert interplay("cancel", fetch["id"], url=service.url).stdout == f"fetch {fetch['id']}, cancelled\n"

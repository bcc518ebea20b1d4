"""The command takes names and beginnings of ids, and speaks of its own options: with real services and processes."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from tests.interplay.command.running import interplay, message
from tests.interplay.command.test_command import as_json
from tests.services import Service, running, until


@pytest.fixture(scope="module")
def pushed(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> dict[str, Any]:
    """Push checkpoints of one run and a probe, and evaluate them by their names alone."""
    run = uuid.uuid4().hex
    names = [f"net {run} epoch {epoch}" for epoch in (9, 10, 1)]
    for name, epoch in zip(names, (9, 10, 1), strict=True):
        options = ("--name", name, "--metadata", f"run={run}", "--metadata", f"epoch={epoch}")
        assert interplay("push", "checkpoint", mlp_checkpoint_file, *options, url=service.url).returncode == 0
    scaled = ("--preprocess", '{"scale": 0.0625}', "--name", f"digits {run}")
    assert interplay("push", "probe", digits_probe_file, *scaled, url=service.url).returncode == 0
    analyses = [
        as_json(
            interplay(
                *("analyze", "--checkpoint", name, "--probe", f"digits {run}", "--permutations", "2"),
                *("--wait", "--json"),
                url=service.url,
            )
        )
        for name in names
    ]
    return {"run": run, "names": names, "probe": f"digits {run}", "analyses": analyses}


def test_names_and_beginnings_of_ids_are_ids(service: Service, pushed: dict[str, Any]) -> None:
    """A report is shown by its id, its first characters, its name, and by its analysis; the page's link ends it."""
    analysis, name = pushed["analyses"][1], pushed["names"][1]
    report = analysis["report_id"]
    whole = interplay("show", report, url=service.url)
    assert whole.returncode == 0
    assert whole.stdout.splitlines()[-1] == f"{service.url}/reports/{report}"
    assert service.client.get(whole.stdout.splitlines()[-1]).status_code == 200
    for given in (report[:13], name, analysis["id"], analysis["id"][:13]):
        shown = interplay("show", given, url=service.url)
        assert (shown.stdout, shown.stderr) == (whole.stdout, ""), given
    assert as_json(interplay("show", analysis["id"], "--json", url=service.url))["status"] == "succeeded"
    waited = interplay("wait", analysis["id"][:13], url=service.url)
    assert (waited.returncode, waited.stdout) == (0, whole.stdout)
    for command in (("show",), ("wait",), ("cancel",), ("delete", "probe"), ("download", "checkpoint"), ("open",)):
        ran = interplay(*command, "no such", url=service.url)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert "with the name or id 'no such'" in message(ran)


def test_of_several_with_one_name_it_is_the_newest(service: Service, mlp_checkpoint_file: Path, tmp_path: Path) -> None:
    """A note says so; deleting asks for an id, which may be short."""
    name = f"twice {uuid.uuid4().hex}"
    ids = [
        as_json(interplay("push", "checkpoint", mlp_checkpoint_file, "--name", name, "--json", url=service.url))["id"]
        for _ in range(2)
    ]
    ran = interplay("download", "checkpoint", name, "-o", tmp_path / "net.safetensors", url=service.url)
    assert ran.returncode == 0, ran.stderr
    assert f"Several checkpoints have the name {name}; the newest is {ids[1]}" in ran.stderr
    refused = interplay("delete", "checkpoint", name, url=service.url)
    assert refused.returncode == 2
    assert all(id_ in message(refused) for id_ in ids)
    assert interplay("delete", "checkpoints", ids[0][:13], url=service.url).returncode == 0
    assert interplay("delete", "checkpoint", name, url=service.url).stdout == f"deleted {ids[1]}\n"
    assert interplay("list", "checkpoint", "--name", name, "--json", url=service.url).stdout == "[]\n"


def test_files_come_back(service: Service, pushed: dict[str, Any], mlp_checkpoint_file: Path, tmp_path: Path) -> None:
    """A download has the bytes that were pushed, by default under the resource's name, and replaces nothing."""
    name = pushed["names"][0]
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        ran = interplay("download", "checkpoint", name, url=service.url)
        assert ran.returncode == 0, ran.stderr
        again = interplay("download", "checkpoint", name, url=service.url)
    finally:
        os.chdir(here)
    (file,) = tmp_path.iterdir()
    assert (file.name, file.read_bytes()) == (f"{name}.safetensors", mlp_checkpoint_file.read_bytes())
    assert again.returncode == 2
    assert "already exists; --overwrite replaces it" in message(again)
    assert interplay("download", "probe", pushed["probe"], "-o", file, "--overwrite", url=service.url).returncode == 0
    assert file.read_bytes() != mlp_checkpoint_file.read_bytes()


def test_a_series_is_found_by_metadata(service: Service, pushed: dict[str, Any], mlp_checkpoint_file: Path) -> None:
    """Checkpoints of a run stand in the order of their epochs; what has none, or one twice, is said."""
    common = ("--axis", "epoch", "--probe", pushed["probe"], "--permutations", "0", "--json")
    analysis = as_json(interplay("series", "--metadata", f"run={pushed['run']}", *common, url=service.url))
    assert analysis["axis"] == {"name": "epoch", "values": [1, 9, 10]}
    run = uuid.uuid4().hex
    for given in ("epoch=1", "epoch=2", "epoch=2", "epoch=last"):
        options = ("--name", f"of {given}", "--metadata", f"run={run}", "--metadata", given)
        assert interplay("push", "checkpoint", mlp_checkpoint_file, *options, url=service.url).returncode == 0
    ran = interplay("series", "--metadata", f"run={run}", *common, url=service.url)
    assert as_json(ran)["axis"]["values"] == [1, 2]
    assert "Several checkpoints have epoch 2; the newest of them is taken." in ran.stderr
    assert "Left out, as their metadata have no number epoch: of epoch=last." in ran.stderr
    none = interplay("series", "--metadata", "run=nobody", *common, url=service.url)
    assert none.returncode == 2
    assert "0 checkpoints with run=nobody have a number 'epoch'" in message(none)


def test_the_best_by_a_metric(service: Service, pushed: dict[str, Any]) -> None:
    """Reports are sorted by a short name of a metric, bounded by it, and shown with any path."""
    listed = ("list", "reports", "--probe", pushed["probe"], "--json")
    items = as_json(interplay(*listed, "--sort", "mir", url=service.url))
    values = [item["metrics"]["splits.test.interplay.sample.global.mir"] for item in items]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)
    lowest = min(values)
    # Nothing beyond a bound of the test split, also where all samples together lie beyond it.
    assert as_json(interplay(*listed, "--metric", f"mir>{max(values)}", url=service.url)) == []
    overall = [item["metrics"]["splits.all.interplay.sample.global.mir"] for item in items]
    assert overall != values
    assert len(as_json(interplay(*listed, "--metric", f"mir >= {lowest}", url=service.url))) == 3
    shown = interplay(
        *("list", "reports", "--probe", pushed["probe"], "--sort", "mir", "--order", "asc"),
        *("--columns", "name, mir,splits.train.loss"),
        url=service.url,
    )
    first = next(line for line in shown.stdout.splitlines() if pushed["run"] in line)
    loss = service.client.get(f"/v1/reports/{items[-1]['id']}").json()["splits"]["train"]["loss"]
    assert f"{lowest:.4f}" in first
    assert f"{loss:.4f}" in first
    assert shown.stdout.splitlines()[-1].startswith(
        f"{service.url}/leaderboard?sort=splits.test.interplay.sample.global.mir"
    )
    assert service.client.get(shown.stdout.splitlines()[-1]).status_code == 200
    mistyped = interplay(*listed[:-1], "--columns", "name,mirr", url=service.url)
    assert (mistyped.returncode, "there is no column 'mirr'" in message(mistyped)) == (2, True)
    epochs = ("list", "checkpoints", "--search", pushed["run"].upper(), "--sort", "metadata.epoch", "--order", "asc")
    assert [item["metadata"]["epoch"] for item in as_json(interplay(*epochs, "--json", url=service.url))] == [1, 9, 10]


def test_pages_open(service: Service, pushed: dict[str, Any], tmp_path: Path) -> None:
    """The browser gets the address of what a name means, a report before a checkpoint; without a name the overview."""
    told = tmp_path / "told"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {told}\n')
    browser.chmod(0o755)
    expected = {
        pushed["names"][0]: f"{service.url}/reports/{pushed['analyses'][0]['report_id']}",
        pushed["analyses"][0]["id"][:13]: f"{service.url}/analyses/{pushed['analyses'][0]['id']}",
        None: f"{service.url}/",
    }
    for name, page in expected.items():
        ran = interplay("open", *([name] if name else []), url=service.url, BROWSER=str(browser))
        assert (ran.returncode, ran.stdout) == (0, f"{page}\n")
        assert told.read_text() == page
        assert service.client.get(page).status_code == 200


def test_a_failed_analysis_is_shown_with_its_problem(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """show prints the problem, list the reason, wait exits with 1."""
    name = f"wide {uuid.uuid4().hex}"
    network = json.dumps({"family": "builtin", "name": "mlp", "args": {"sizes": [64, 33, 10]}})
    wrong = ("--architecture", network, "--name", name)
    assert interplay("push", "checkpoint", mlp_checkpoint_file, *wrong, url=service.url).returncode == 0
    interplay("push", "probe", digits_probe_file, "--name", name, url=service.url)
    queued = as_json(interplay("analyze", "--checkpoint", name, "--probe", name, "--json", url=service.url))
    ended = interplay("wait", queued["id"], url=service.url)
    assert ended.returncode == 1
    shown = interplay("show", name, url=service.url)
    assert shown.returncode == 0
    assert "failed" in shown.stdout
    assert "does not fit" in shown.stdout
    assert shown.stdout.splitlines()[-1] == f"{service.url}/analyses/{queued['id']}"
    assert interplay("show", name, "--chart", "x.svg", url=service.url).returncode == 2
    table = interplay("list", "analyses", "--checkpoint", name, url=service.url).stdout
    assert "does not fit" in table


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run an API with a key and without a worker."""
    with running(tmp_path_factory.mktemp("locked"), command="api", API_KEY="secret") as service:
        yield service


@pytest.mark.slow
def test_a_missing_key_names_the_option(locked: Service) -> None:
    """Without a key, and with a wrong one, the message says how to give it."""
    without = interplay("list", "probes", url=locked.url)
    assert (without.returncode, without.stdout) == (2, "")
    said = "A valid API key is needed: Give it with --api-key KEY, or in the variable INTERPLAY_API_KEY.\n"
    assert without.stderr == said
    wrong = interplay("list", "probes", url=locked.url, INTERPLAY_API_KEY="other")
    assert wrong.stderr == said


@pytest.mark.slow
def test_a_missing_worker_is_said(locked: Service, tmp_path: Path) -> None:
    """After five seconds in the queue the command says that no worker is there, and how to start one."""
    frame = (np.eye(3) - 1 / 3).astype(np.float32)
    labels = np.repeat(np.arange(3), 5)
    save_file({"features": frame[labels], "labels": labels, "head": frame}, tmp_path / "frame.safetensors")
    key = {"INTERPLAY_API_KEY": "secret"}
    pushed = as_json(interplay("push", "features", tmp_path / "frame.safetensors", "--json", url=locked.url, **key))
    waiting = ("analyze", "--features", pushed["id"], "--wait", "--timeout", "12")
    ran = interplay(*waiting, url=locked.url, **key)
    assert ran.returncode == 6
    said = "The analysis waits: no worker has been heard of in the last 10 seconds. `interplay worker` starts one."
    assert said in ran.stderr.splitlines()


def test_a_missing_column_names_the_option(service: Service, tmp_path: Path) -> None:
    """The message has the option in place of the request's member, and the columns that there are."""
    file = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "sentiment": [0, 1]}), file)
    ran = interplay("push", "probe", file, url=service.url)
    assert ran.returncode == 2
    assert "No column has a usual name for labels; the file has 'text', 'sentiment'." in message(ran)
    assert "--column label=NAME" in message(ran)
    assert "spec" not in message(ran)
    other = interplay("push", "probe", file, "--column", "label=mood", url=service.url)
    assert "There is no column 'mood'" in message(other)
    assert "Name one with --column ROLE=NAME." in message(other)
    assert interplay("push", "probe", file, "--column", "label=sentiment", url=service.url).returncode == 0


def test_files_that_need_another_command_first(service: Service, tmp_path: Path) -> None:
    """A mistyped name, pickled weights, an adapter and a file without its network: the next command stands there."""
    (tmp_path / "net.safetensors").write_bytes(b"x")
    typed = interplay("push", "checkpoint", tmp_path / "net.safetensor", url=service.url)
    assert typed.returncode == 2
    wanted = f"did you mean: interplay push checkpoint {tmp_path / 'net.safetensors'}"
    assert re.sub(r"\s", "", wanted) in re.sub(r"[\s│]", "", typed.stderr)
    # Another number is another file.
    numbered = interplay("push", "checkpoint", tmp_path / "net2.safetensors", url=service.url)
    assert numbered.returncode == 2
    assert "did you mean" not in message(numbered)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    pickled = interplay("push", "checkpoint", folder, url=service.url)
    assert f"interplay convert {folder} -o {folder / 'model.safetensors'}" in pickled.stderr
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    save_file(
        {"base_model.model.fc.lora_A.weight": np.zeros((1, 1), np.float32)}, adapter / "adapter_model.safetensors"
    )
    merged = interplay("push", "checkpoint", adapter, url=service.url)
    assert merged.returncode == 2
    assert "merge_and_unload().save_pretrained('OUT')" in merged.stderr
    assert "interplay push checkpoint OUT" in merged.stderr
    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "bare.safetensors")
    bare = interplay("push", "checkpoint", tmp_path / "bare.safetensors", url=service.url)
    assert "Give --architecture" in bare.stderr


def test_files_are_analysed_without_a_service(
    mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path: Path
) -> None:
    """One command starts a service, prints the report and ends it; only the file that was asked for is left."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    out = tmp_path / "report.json"
    ran = interplay(
        *("analyze", mlp_checkpoint_file, "--probe", digits_probe_file, "--permutations", "2", "-o", out),
        TMPDIR=str(temporary),
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(out.read_text())
    assert f"{report['splits']['test']['interplay']['sample']['global']['mir']:.4f}" in ran.stdout
    assert "http://" not in ran.stdout
    assert list(temporary.iterdir()) == []
    # Not one of its processes is left; the last may be ending still.
    until(lambda: not any(_is_of(process, temporary) for process in psutil.process_iter(["environ"])))
    nowhere = interplay("analyze", mlp_checkpoint_file, "--probe", "digits")
    assert nowhere.returncode == 2
    assert "'digits' is no file; for a probe of a service give its --url too" in message(nowhere)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    environment: dict[str, str] = process.info["environ"] or {}
    return str(folder) in environment.get("INTERPLAY_DATA_DIR", "")


def test_files_are_pushed_to_the_service_that_is_named(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """With a URL the same command pushes both; a probe of the service serves too."""
    queued = as_json(interplay("analyze", mlp_checkpoint_file, "--probe", digits_probe_file, "--json", url=service.url))
    assert service.wait(queued["id"])["status"] == "succeeded"
    again = as_json(interplay("analyze", mlp_checkpoint_file, "--probe", queued["probe_id"], "--json", url=service.url))
    assert again["probe_id"] == queued["probe_id"]


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_completion_is_installed(shell: str, file: str, tmp_path: Path) -> None:
    """`interplay --install-completion` writes the shell's script, which knows the commands."""
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": f"/bin/{shell}"}
    ran = subprocess.run(
        [sys.executable, "-m", "interplay.command", "--install-completion", "--shell", shell],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "baseline" in written
    assert (tmp_path / file).exists()


def test_reports_analyses_gates_and_baselines_are_deleted(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """By name or id, the noun in singular or plural; what a baseline needs is refused, with its name."""
    name = f"short-lived {uuid.uuid4().hex}"
    slug = name.replace(" ", "-")
    checkpoint = service.post("/v1/checkpoints", {"name": name}, mlp_checkpoint_file).json()
    probe = service.post("/v1/probes", {"name": name}, digits_probe_file).json()
    asked = {"checkpoint_id": checkpoint["id"], "probe_id": probe["id"], "options": {"null_permutations": 0}}
    first, second = (service.wait(service.analyze(**asked)["id"]) for _ in range(2))
    for bound in (0.1, 0.2):
        gate = {"name": slug, "checks": [{"metric": "splits.test.accuracy", "min": bound}]}
        assert service.client.post("/v1/gates", json=gate).status_code == 201
    run = interplay("baseline", "set", slug, first["report_id"], url=service.url)
    assert run.returncode == 0, run.stderr
    refused = interplay("delete", "report", first["report_id"][:13], url=service.url)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"The report is that of the baseline '{slug}'" in message(refused)
    several = interplay("delete", "reports", name, url=service.url)
    assert several.returncode == 2
    assert first["report_id"] in message(several)
    assert as_json(interplay("delete", "gate", slug, "--json", url=service.url))["deleted"] is True
    assert service.client.get("/v1/gates", params={"name": slug}).json()["items"] == []
    assert as_json(interplay("delete", "baseline", slug, "--json", url=service.url)) == {"name": slug, "deleted": True}
    assert interplay("delete", "baseline", slug, url=service.url).returncode == 2
    assert interplay("delete", "report", first["report_id"], url=service.url).returncode == 0
    assert interplay("delete", "report", name, url=service.url).stdout == f"deleted {second['report_id']}\n"
    for id_ in (first["id"], second["id"][:13]):
        assert interplay("delete", "analysis", id_, url=service.url).returncode == 0
    assert service.client.get("/v1/analyses", params={"checkpoint_id": checkpoint["id"]}).json()["items"] == []

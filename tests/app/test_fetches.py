"""Fetches over HTTP: a service that brings files from a web server, and what its callers see of it."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

import migrations
from app import fetches, queue
from app.database import make_engine, write
from app.settings import Settings
from app.storage import Upload
from tests.app.api.test_uploads import problem
from tests.conftest import MLP
from tests.databases import fresh_database
from tests.services import Service, running, until
from tests.sources import COMMIT, SourceServer, source_server
from tests.workers.fetching.test_transfer import sha256

BUILTIN = json.dumps(MLP)


@dataclass(frozen=True)
class Fetching:
    """A service, and the server that it may fetch from."""

    service: Service
    server: SourceServer

    def post(self, collection: str, status: int = 202, **spec: Any) -> dict[str, Any]:
        """Ask for a fetch; return the answer."""
        answer = self.service.client.post(f"/v1/{collection}", json=spec)
        assert answer.status_code == status, answer.text
        return dict(answer.json())

    def ended(self, fetch: dict[str, Any]) -> dict[str, Any]:
        def read() -> dict[str, Any] | None:
            found = self.service.client.get(f"/v1/fetches/{fetch['id']}").json()
            return found if found["status"] in ("succeeded", "failed", "cancelled") else None

        return until(read)

    def made(self, collection: str, **spec: Any) -> dict[str, Any]:
        """Fetch, and return the resource."""
        fetch = self.ended(self.post(collection, **spec))
        assert fetch["status"] == "succeeded", fetch["problem"]
        return dict(self.service.client.get(f"/v1/{collection}/{fetch['resource_id']}").json())

    def problem(self, collection: str, **spec: Any) -> dict[str, Any]:
        """Fetch in vain, and return why."""
        fetch = self.ended(self.post(collection, **spec))
        assert fetch["status"] == "failed", fetch
        assert fetch["resource_id"] is None
        return dict(fetch["problem"])

    def staged(self) -> list[Path]:
        """Return what fetches have left in the staging folder."""
        return [*(self.service.data_dir / "blobs" / "staging").glob("*.fetch*")]


@pytest.fixture(scope="module")
def fetching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetching]:
    with source_server() as server:
        sources = f"{server.url}/nets inside, hf://org, hf://datasets/org"
        settings: dict[str, Any] = {"sources": sources, "hub_url": server.url, "fetch_patience_seconds": "20"}
        data_dir = tmp_path_factory.mktemp("fetching") / "data"
        with running(data_dir, worker_restart_max_seconds="0.2", **settings) as service:
            yield Fetching(service, server)


def test_a_checkpoint_and_a_probe_are_fetched_and_analysed(
    fetching: Fetching, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """The report on what was fetched is that on what is pushed: the hashes are the files' own."""
    content = {"net": mlp_checkpoint_file.read_bytes(), "probe": digits_probe_file.read_bytes()}
    for name, file in content.items():
        fetching.server.files[f"/nets/{name}.safetensors"] = file
    url = f"{fetching.server.url}/nets"
    checkpoint = fetching.made("checkpoints", name="net", source=f"{url}/net.safetensors", metadata={"run": "a"})
    probe = fetching.made("probes", name="probe", source=f"{url}/probe.safetensors")
    assert checkpoint["sha256"] == sha256(content["net"])
    assert checkpoint["metadata"] == {"run": "a"}
    assert probe["sha256"] == sha256(content["probe"])
    origin = probe["origin"]
    assert (origin["source"], origin["revision"], origin["n_files"]) == (f"{url}/probe.safetensors", None, 1)
    assert origin["files"][0]["sha256"] == sha256(content["probe"])
    service = fetching.service
    report = service.report(service.wait(service.analyze(checkpoint_id=checkpoint["id"], probe_id=probe["id"])["id"]))
    pushed = service.post("/v1/checkpoints", {"name": "sent"}, mlp_checkpoint_file).json()
    assert pushed["sha256"] == checkpoint["sha256"] == report["subject"]["sha256"]
    assert pushed["origin"] is None
    assert not fetching.staged()


@pytest.mark.slow
def test_a_repository_is_fetched_with_its_description(fetching: Fetching, tiny_bert: dict[str, bytes]) -> None:
    """config.json and tokenizer.json of the Hub describe the network, and the commit is recorded."""
    fetching.server.add_repository("org/bert", tiny_bert)
    made = fetching.made("checkpoints", name="bert", source="hf://org/bert@v1.0")
    assert made["architecture"]["family"] == "transformers"
    assert made["tokenizer_sha256"] is not None
    assert made["origin"]["revision"] == COMMIT
    assert {file["name"] for file in made["origin"]["files"]} == set(tiny_bert)
    # Members of the spec come before those of the folder.
    given = fetching.made("checkpoints", name="bert", source="hf://org/bert", tokenizer={"model": {"other": 1}})
    assert given["tokenizer_sha256"] != made["tokenizer_sha256"]


@pytest.fixture(scope="module")
def tiny_bert() -> dict[str, bytes]:
    """Return the files of a repository with a small BERT."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    config.architectures = ["BertForSequenceClassification"]
    weights = {name: value.numpy() for name, value in BertForSequenceClassification(config).state_dict().items()}
    return {
        "config.json": config.to_json_string().encode(),
        "tokenizer.json": json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}).encode(),
        "model.safetensors": save(weights),
    }


@pytest.mark.slow
def test_while_it_runs_the_same_call_gives_the_same_fetch(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    """A client whose answer was lost asks again; what has ended is fetched anew."""
    fetching.server.files["/nets/slow"] = mlp_checkpoint_file.read_bytes()
    fetching.server.faults.bytes_per_second = 8_000
    spec: dict[str, Any] = {"name": "slow", "source": f"{fetching.server.url}/nets/slow"}
    try:
        first = fetching.post("checkpoints", **spec)
        assert fetching.post("checkpoints", **spec)["id"] == first["id"]
        assert fetching.post("checkpoints", **{**spec, "name": "other"})["id"] != first["id"]
    finally:
        fetching.server.faults.bytes_per_second = None
    made = fetching.ended(first)["resource_id"]
    again = fetching.post("checkpoints", **spec)
    assert again["id"] != first["id"]
    assert fetching.ended(again)["resource_id"] not in (None, made)


def test_progress_counts_bytes_and_a_fetch_can_be_cancelled(fetching: Fetching) -> None:
    """A cancelled one ends within seconds, makes nothing, and leaves no file."""
    content = bytes(200_000)
    fetching.server.files["/nets/large"] = content
    fetching.server.faults.bytes_per_second = 20_000
    client = fetching.service.client
    try:
        fetch = fetching.post("checkpoints", name="large", source=f"{fetching.server.url}/nets/large")
        path = f"/v1/fetches/{fetch['id']}"

        def on_its_way() -> dict[str, Any] | None:
            found = client.get(path).json()
            return found if found["progress"]["done"] else None

        found = until(on_its_way)
        assert found["status"] == "running"
        assert 0 < found["progress"]["done"] < found["progress"]["total"] == len(content)
        listed = client.get("/v1/fetches", params={"status": "running"}).json()["items"]
        assert [entry["id"] for entry in listed] == [fetch["id"]]
        assert client.post(f"{path}/cancel").status_code == 200
        ended = fetching.ended(fetch)
    finally:
        fetching.server.faults.bytes_per_second = None
    assert (ended["status"], ended["resource_id"]) == ("cancelled", None)
    until(lambda: not fetching.staged())
    assert client.post(f"{path}/cancel").json()["status"] == "cancelled"


@pytest.mark.slow
def test_what_has_succeeded_cannot_be_cancelled(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    fetching.server.files["/nets/done"] = mlp_checkpoint_file.read_bytes()
    fetch = fetching.ended(fetching.post("checkpoints", name="a", source=f"{fetching.server.url}/nets/done"))
    answer = fetching.service.client.post(f"/v1/fetches/{fetch['id']}/cancel")
    assert problem(answer, 409, "not-cancellable")


@pytest.mark.parametrize(
    "source",
    [
        "https://example.com/a",
        "s3://bucket/a",
        "hf://other/net",
        "{url}/other/a",
        "{url}/nets2/a",
        "{url}/netsa",
        "http://169.254.169.254/nets/a",
    ],
)
def test_what_is_not_listed_is_refused_at_once(fetching: Fetching, source: str) -> None:
    asked = len(fetching.server.requests)
    for collection in ("checkpoints", "probes"):
        answer = fetching.service.client.post(
            f"/v1/{collection}", json={"name": "a", "source": source.format(url=fetching.server.url)}
        )
        assert "INTERPLAY_SOURCES" in problem(answer, 403, "source-not-allowed")["detail"]
    assert len(fetching.server.requests) == asked


@pytest.mark.parametrize(
    "source",
    ["a", "/etc/passwd", "file:///etc/passwd", "ftp://h/a", "{url}/nets/../a", "{url}/nets/%2e%2e/a", "{url}//nets/a",
     "http://user:secret@h/a", "hf://org", "hf://org/net@../x", "s3://", "https://", "s3://b/a//b", "s3://b/\x7f"],
)  # fmt: skip
def test_what_is_no_address_is_refused(fetching: Fetching, source: str) -> None:
    answer = fetching.service.client.post(
        "/v1/checkpoints", json={"name": "a", "source": source.format(url=fetching.server.url)}
    )
    assert problem(answer, 422, "invalid-request")


def test_a_source_is_in_place_of_a_file(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    spec = {"name": "a", "source": f"{fetching.server.url}/nets/a"}
    answer = fetching.service.post("/v1/checkpoints", spec, mlp_checkpoint_file)
    assert problem(answer, 422, "invalid-request")
    answer = fetching.service.client.post("/v1/checkpoints", json={**spec, "upload_id": "a"})
    assert problem(answer, 422, "invalid-request")
    answer = fetching.service.client.post("/v1/feature-sets", json=spec)
    assert problem(answer, 422, "invalid-request")


def test_a_form_may_name_a_source(fetching: Fetching) -> None:
    answer = fetching.service.post("/v1/checkpoints", {"name": "a", "source": f"{fetching.server.url}/nets/none"})
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/fetches/{answer.json()['id']}"


@pytest.mark.slow
def test_what_is_fetched_is_checked_as_what_is_sent(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    """A file that would be refused is refused, with the same problem, and nothing of it stays."""
    files = {"text": b"words", "bare": save({}), "net": mlp_checkpoint_file.read_bytes()}
    for name, content in files.items():
        fetching.server.files[f"/nets/{name}"] = content
    url = f"{fetching.server.url}/nets"
    kind = "urn:interplay:problem:"
    assert fetching.problem("checkpoints", name="a", source=f"{url}/text")["type"] == f"{kind}invalid-file"
    assert fetching.problem("checkpoints", name="a", source=f"{url}/bare")["type"] == f"{kind}invalid-request"
    assert fetching.problem("probes", name="a", source=f"{url}/net")["type"] == f"{kind}invalid-file"
    assert fetching.problem("checkpoints", name="a", source=f"{url}/none")["type"] == f"{kind}source-missing"
    wrong = fetching.problem("checkpoints", name="a", source=f"{url}/net", sha256="0" * 64)
    assert (wrong["type"], wrong["found"]) == (f"{kind}invalid-file", sha256(files["net"]))
    until(lambda: not fetching.staged())


def test_a_redirect_out_is_the_problem_of_the_fetch(fetching: Fetching) -> None:
    fetching.server.redirects["/nets/away"] = "http://169.254.169.254/latest/meta-data"
    away = fetching.problem("checkpoints", name="a", source=f"{fetching.server.url}/nets/away")
    assert away["type"] == "urn:interplay:problem:source-not-allowed"
    assert away["address"] == "http://169.254.169.254/latest/meta-data"


def test_a_signature_is_shown_nowhere(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    """The query of an address goes to its server, and into no answer and no log."""
    fetching.server.files["/nets/signed"] = mlp_checkpoint_file.read_bytes()
    url = f"{fetching.server.url}/nets/signed?X-Amz-Signature=hidden"
    made = fetching.made("checkpoints", name="a", source=url)
    broken = fetching.problem("probes", name="a", source=url)
    listed = fetching.service.client.get("/v1/fetches").text
    assert "hidden" not in json.dumps([made, broken]) + listed
    assert "hidden" not in (fetching.service.data_dir / "stderr.txt").read_text()


@pytest.mark.slow
def test_fetches_are_listed_and_filtered(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    fetching.server.files["/nets/listed"] = mlp_checkpoint_file.read_bytes()
    spec: dict[str, Any] = {"source": f"{fetching.server.url}/nets/listed", "metadata": {"run": "listed"}}
    fetches = [fetching.ended(fetching.post("checkpoints", name=f"listed {n}", **spec)) for n in range(3)]
    client = fetching.service.client

    def ids(**filters: Any) -> list[str]:
        return [entry["id"] for entry in client.get("/v1/fetches", params=filters).json()["items"]]

    assert ids(search="LISTED") == [fetch["id"] for fetch in reversed(fetches)]
    assert ids(metadata="run=listed") == ids(search="LISTED")
    assert ids(name="listed 1") == [fetches[1]["id"]]
    assert ids(status="failed", search="listed") == []
    assert problem(client.get("/v1/fetches", params={"kind": "x"}), 422, "invalid-request")
    assert problem(client.get("/v1/fetches/none"), 404, "not-found")
    assert problem(client.post("/v1/fetches/none/cancel"), 404, "not-found")


@pytest.mark.parametrize(
    ("spec", "status", "kind"),
    [
        ({"base_id": "none"}, 404, "not-found"),
        ({"adapter": {"r": 1}}, 422, "invalid-request"),
        ({"architecture": {"family": "none"}}, 422, "invalid-request"),
        ({"preprocess": {"crop": "a"}}, 422, "invalid-request"),
        ({"unknown": 1}, 422, "invalid-request"),
    ],
)
def test_what_is_wrong_without_the_file_is_told_at_once(
    fetching: Fetching, spec: dict[str, Any], status: int, kind: str
) -> None:
    """Nobody waits for a download to hear of it."""
    asked = len(fetching.server.requests)
    answer = fetching.service.client.post(
        "/v1/checkpoints", json={"name": "a", "source": f"{fetching.server.url}/nets/a", **spec}
    )
    assert problem(answer, status, kind)
    assert len(fetching.server.requests) == asked


def test_however_the_member_is_written(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    """An escaped name is the same name: with a file beside it, it is refused."""
    spec = f'{{"name": "a", "sour\\u0063e": "{fetching.server.url}/nets/none", "name": "b"}}'
    files: dict[str, Any] = {"spec": (None, spec), "file": ("f", mlp_checkpoint_file.read_bytes())}
    assert problem(fetching.service.client.post("/v1/checkpoints", files=files), 422, "invalid-request")
    headers = {"Content-Type": "application/json"}
    answer = fetching.service.client.post("/v1/checkpoints", content=spec, headers=headers)
    assert answer.status_code == 202, answer.text


@pytest.mark.slow
def test_the_spec_is_gone_at_the_end(fetching: Fetching, mlp_checkpoint_file: Path) -> None:
    """It may hold a signature, and megabytes of a tokenizer."""
    fetching.server.files["/nets/kept"] = mlp_checkpoint_file.read_bytes()
    source = f"{fetching.server.url}/nets/kept?signature=hidden"
    for collection in ("checkpoints", "probes"):
        fetching.ended(fetching.post(collection, name="a", source=source))
    with closing(sqlite3.connect(fetching.service.data_dir / "interplay.db")) as database:
        rows = database.execute("SELECT spec FROM fetches WHERE outcome IS NOT NULL").fetchall()
    assert rows
    assert {spec for (spec,) in rows} == {""}


def test_sources_that_are_none_stop_the_start(tmp_path: Path) -> None:
    """The message gives the entry's number; a token that someone wrote there is not in it."""
    for value, words in (
        ("s3://a, ftp://SECRET", "in entry 2 an address begins"),
        ("s3://b A B-SECRET", "entry 1 is not ADDRESS"),
        ("https://h/?a=SECRET", "query"),
        ("https://user:SECRET@h/", "neither a user"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "app", "serve"],
            env={**os.environ, "INTERPLAY_SOURCES": value, "INTERPLAY_DATA_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert "INTERPLAY_SOURCES" in done.stderr
        assert words in done.stderr
        assert "SECRET" not in done.stderr


def test_a_killed_worker_goes_on(fetching: Fetching) -> None:
    """What has come is not asked for again, the attempt is counted, and there is one checkpoint."""
    content = save({"layers.0.weight": np.random.default_rng(3).random((1000, 64))})
    fetching.server.files["/nets/killed"] = content
    fetching.server.sent_bytes.pop("/nets/killed", None)
    fetching.server.faults.bytes_per_second = 150_000
    try:
        fetch = fetching.post(
            "checkpoints", name="killed", source=f"{fetching.server.url}/nets/killed", architecture=MLP
        )
        until(lambda: fetching.server.sent_bytes.get("/nets/killed", 0) > 150_000)
        fetching.service.worker().kill()
        sent = fetching.server.sent_bytes["/nets/killed"]
        ended = fetching.ended(fetch)
    finally:
        fetching.server.faults.bytes_per_second = None
    assert (ended["status"], ended["attempts"]) == ("succeeded", 2), ended
    made = fetching.service.client.get(f"/v1/checkpoints/{ended['resource_id']}").json()
    assert made["sha256"] == sha256(content)
    assert sent < len(content)
    # What lay in buffers of the kernel when the process was killed comes again.
    assert fetching.server.sent_bytes["/nets/killed"] <= len(content) + 2**18
    named = fetching.service.client.get("/v1/checkpoints", params={"name": "killed"}).json()["items"]
    assert len(named) == 1


def test_the_answer_is_in_the_document(fetching: Fetching) -> None:
    """OpenAPI tells both answers, and that the spec may be the whole body."""
    document = httpx.get(f"{fetching.service.url}/openapi.json").json()
    for collection in ("checkpoints", "probes"):
        call = document["paths"][f"/v1/{collection}"]["post"]
        assert {"201", "202", "403"} <= call["responses"].keys()
        assert {"application/json", "multipart/form-data"} == call["requestBody"]["content"].keys()


def test_posts_at_the_same_time_are_one_fetch(postgres: str, tmp_path: Path) -> None:
    """On PostgreSQL, where two transactions see nothing of each other: an index decides."""
    with fresh_database(postgres) as url:
        settings = Settings(data_dir=tmp_path, database_url=url, sources="hf://org")
        engine = make_engine(settings)
        migrations.upgrade(engine)
        queue.migrate(engine)
        client = queue.LateClient(engine)
        for round_ in range(5):
            spec = json.dumps({"name": f"round {round_}", "source": "hf://org/net"}).encode()
            ask = partial(fetches.create_if_asked, engine, client, settings, "checkpoint", Upload(spec, None))
            with ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(ask) for _ in range(4)]
            found = {fetch.id for one in asked if (fetch := one.result()) is not None}
            assert len(found) == 1
        client.destroy()
        engine.dispose()


# Registers a queue, as a worker of a later version does, and ends.
_LATER = """
import sys
import time
from dbos import DBOS
from app import queue
from app.database import make_engine, write
from app.settings import load_settings
queue.close_pickle()
DBOS(config={"name": queue.APPLICATION, "system_database_engine": make_engine(load_settings()),
             "serializer": queue.serializer(), "executor_id": "later", "application_version": queue.VERSION,
             "run_migrations": False})
DBOS.listen_queues([])
DBOS.launch()
DBOS.register_queue("later", worker_concurrency=1, polling_interval_sec=0.1)
DBOS.destroy()
"""


def test_a_worker_leaves_queues_alone_that_it_does_not_know(fetching: Fetching) -> None:
    """In an upgrade from machine to machine, an older worker would claim what it cannot run, and hold it for ever."""
    service = fetching.service
    subprocess.run([sys.executable, "-c", _LATER], env=service.environment, check=True, timeout=60)
    engine = make_engine(Settings(data_dir=service.data_dir))
    client = queue.make_client(engine)
    try:
        with write(engine) as session:
            queue.enqueue(client, session, "of-later", workflow="of_a_later_version", queue="later")
        time.sleep(4)
        [run] = client.list_workflows(workflow_ids=["of-later"])
        assert run.status == "ENQUEUED"
        client.cancel_workflow("of-later")
    finally:
        client.destroy()
        engine.dispose()

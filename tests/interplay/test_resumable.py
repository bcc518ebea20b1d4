"""Large files through the client, against real services and against servers that fail as scripted."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from safetensors.numpy import save_file

from interplay import Client, ProblemError, ServiceUnreachable, resumable
from tests import services
from tests.interplay.command.running import interplay
from tests.interplay.scripted import BREAK, Answer, answer, scripted
from tests.services import Service, until

MEBIBYTE = 2**20
PROBLEM = "urn:interplay:problem:"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files over 1 MiB are large here, requests are small, and notes have a folder of their own."""
    monkeypatch.setattr(resumable, "LEAST_BYTES", MEBIBYTE)
    monkeypatch.setattr(resumable, "_LEAST_BYTES", (2**18, 2**17))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service without a worker."""
    with services.running(tmp_path_factory.mktemp("resumable") / "data", command="api") as service:
        yield service


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write the features of a set, 5 MiB."""
    path = tmp_path / "features.safetensors"
    values = np.random.default_rng(0).normal(size=(10_000, 128)).astype(np.float32)
    save_file({"features": values, "labels": np.arange(10_000) % 4, "head": values[:4].copy()}, path)
    return path


def notes(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").rglob("*") if path.is_file()]


class Break(Exception):
    """Ends a push from within."""


class Seen:
    """What a push says of its progress; it can be ended at an offset."""

    def __init__(self, end_at: int | None = None) -> None:
        self.offsets: list[int] = []
        self._end_at = end_at

    def __call__(self, sent_bytes: int, size_bytes: int) -> None:
        self.offsets.append(sent_bytes)
        if self._end_at is not None and sent_bytes >= self._end_at:
            raise Break


@pytest.mark.slow
def test_large_file_goes_in_many_requests(api: Service, file: Path, tmp_path: Path) -> None:
    """A file over the limit arrives whole, progress never goes back, and no note is left."""
    seen = Seen()
    with Client(api.url) as client:
        made = client.push_feature_set(file, name="large", on_progress=seen)
    assert made["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert seen.offsets == sorted(seen.offsets)
    assert seen.offsets[-1] == file.stat().st_size
    assert notes(tmp_path) == []
    assert [path.name for path in (api.data_dir / "blobs" / "staging").iterdir()] == ["place"]


def test_small_file_goes_in_a_form(api: Service, tmp_path: Path) -> None:
    """A file up to the limit begins no upload."""
    path = tmp_path / "small.safetensors"
    save_file(
        {"features": np.ones((8, 4), np.float32), "labels": np.arange(8) % 2, "head": np.ones((2, 4), np.float32)}, path
    )
    seen = Seen()
    with Client(api.url) as client:
        client.push_feature_set(path, name="small", on_progress=seen)
    assert seen.offsets == []


@pytest.mark.slow
def test_next_process_goes_on(api: Service, file: Path, tmp_path: Path) -> None:
    """A push that ended half way is continued by the next one of the same file, and only by that."""
    with Client(api.url) as client:
        with pytest.raises(Break):
            client.push_feature_set(file, name="large", on_progress=Seen(end_at=3 * MEBIBYTE))
        assert len(notes(tmp_path)) == 1
        seen = Seen()
        with pytest.raises(Break):
            client.push_feature_set(file, name="large", on_progress=(again := Seen(end_at=4 * MEBIBYTE)))
        assert again.offsets[0] > 2 * MEBIBYTE
        made = client.push_feature_set(file, name="large", on_progress=seen)
        assert seen.offsets[0] > 3 * MEBIBYTE
        assert made["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert notes(tmp_path) == []
        # It is done: another push is another one.
        other = client.push_feature_set(file, name="large", on_progress=(anew := Seen()))
        assert anew.offsets[0] == 0
        assert other["id"] != made["id"]


@pytest.mark.slow
def test_changed_file_begins_anew(api: Service, file: Path) -> None:
    """A file that was written since is another one."""
    with Client(api.url) as client:
        with pytest.raises(Break):
            client.push_feature_set(file, name="large", on_progress=Seen(end_at=3 * MEBIBYTE))
        os.utime(file)
        client.push_feature_set(file, name="large", on_progress=(seen := Seen()))
    assert seen.offsets[0] == 0


def test_file_that_changes_on_its_way_is_no_resource(api: Service, file: Path, tmp_path: Path) -> None:
    """If a file's bytes change while its time and size do not, its hash tells, and the next push begins anew."""
    status = file.stat()
    with Client(api.url) as client:
        with pytest.raises(Break):
            client.push_feature_set(file, name="large", on_progress=Seen(end_at=3 * MEBIBYTE))
        content = bytearray(file.read_bytes())
        content[500_000] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        (upload,) = [note.read_text() for note in notes(tmp_path)]
        with pytest.raises(ProblemError, match="sha256"):
            client.push_feature_set(file, name="large")
        assert notes(tmp_path) == []
        assert api.client.head(f"/v1/uploads/{upload}").status_code == 404
        made = client.push_feature_set(file, name="large")
    assert made["sha256"] == hashlib.sha256(content).hexdigest()


def test_refused_spec_costs_no_second_transfer(api: Service, file: Path) -> None:
    """A file whose spec was refused is not sent again for a better one."""
    with Client(api.url) as client:
        with pytest.raises(ProblemError, match="metadata"):
            client.push_feature_set(file, name="large", metadata={"a": {"b": 1}})
        client.push_feature_set(file, name="large", on_progress=(seen := Seen()))
    assert seen.offsets == [file.stat().st_size]


def test_two_at_a_time_do_not_meet(api: Service, file: Path) -> None:
    """Two processes that push one file at a time both succeed."""
    made: list[str] = []

    def push() -> None:
        with Client(api.url) as client:
            made.append(client.push_feature_set(file, name="twice")["id"])

    threads = [threading.Thread(target=push) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 2


@pytest.mark.slow
def test_expired_upload_begins_anew(tmp_path: Path, file: Path) -> None:
    """If the service has forgotten an upload, the file is sent from its beginning."""
    with (
        services.running(tmp_path / "data", command="api", upload_expires_seconds="2") as api,
        Client(api.url) as client,
    ):
        with pytest.raises(Break):
            client.push_feature_set(file, name="large", on_progress=Seen(end_at=3 * MEBIBYTE))
        (upload,) = [note.read_text() for note in notes(tmp_path)]
        until(lambda: api.client.head(f"/v1/uploads/{upload}").status_code == 404)
        client.push_feature_set(file, name="large", on_progress=(seen := Seen()))
        assert seen.offsets[0] == 0


def test_service_restarted_meanwhile(tmp_path: Path, file: Path) -> None:
    """A push waits for a service that is killed and started again, and goes on."""
    made: list[str] = []
    reached, go_on = threading.Event(), threading.Event()

    def show(sent_bytes: int, _: int) -> None:
        if sent_bytes >= 3 * MEBIBYTE and not reached.is_set():
            reached.set()
            go_on.wait(60)

    def push(url: str) -> None:
        with Client(url, retry_seconds=60) as client:
            made.append(client.push_feature_set(file, name="large", on_progress=show)["sha256"])

    with services.running(tmp_path / "data", command="api") as api:
        thread = threading.Thread(target=push, args=(api.url,))
        thread.start()
        assert reached.wait(60)
        api.process.kill()
        api.process.wait()
        go_on.set()
    port = urlsplit(api.url).port
    assert port is not None
    with services.running(tmp_path / "data", command="api", port=port):
        thread.join()
    assert made == [hashlib.sha256(file.read_bytes()).hexdigest()]


def test_folder_goes_on(api: Service, tmp_path: Path) -> None:
    """A folder is packed again, into the same bytes, and goes on where it was."""
    folder = tmp_path / "images"
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            (folder / name / f"{index}.png").write_bytes(generator.bytes(MEBIBYTE))
    with Client(api.url) as client:
        with pytest.raises(Break):
            client.push_probe(folder, name="images", on_progress=Seen(end_at=3 * MEBIBYTE))
        made = client.push_probe(folder, name="images", on_progress=(seen := Seen()))
    assert seen.offsets[0] > 2 * MEBIBYTE
    assert made["n_samples"] == 6


def test_no_place_for_notes(api: Service, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder for notes a file is sent as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with Client(api.url) as client:
        assert client.push_feature_set(file, name="large")["name"] == "large"


@pytest.mark.parametrize(
    "refusal",
    [
        answer({"title": "no such route"}, 404),
        answer({"title": "not that method"}, 405),
        answer({"title": "many", "type": f"{PROBLEM}too-many-uploads"}, 503),
    ],
)
def test_service_without_resumable_uploads(file: Path, refusal: Answer) -> None:
    """A file goes in a form where the service takes it in no other way."""
    with scripted(refusal, answer({"id": "f"}, 201)) as server, Client(server.url) as client:
        assert client.push_feature_set(file, name="f")["id"] == "f"
    assert [seen.target for seen in server.seen] == ["/v1/uploads", "/v1/feature-sets"]
    assert server.seen[1].body_bytes > file.stat().st_size


def test_what_was_lost_is_asked_for(file: Path) -> None:
    """After a break, a wrong offset, damage or a busy upload, HEAD tells where to go on; then requests are small."""
    size = file.stat().st_size

    def at(offset: int) -> Answer:
        return answer({}, 200, Upload_Offset=str(offset))

    answers = (
        answer({"id": "u" * 36}, 201),
        answer({}, 204),
        BREAK,
        at(300_000),
        answer({"title": "busy"}, 423),
        at(300_000),
        answer({"title": "offset"}, 409),
        at(310_000),
        answer({"title": "checksum"}, 460),
        at(310_000),
        answer({}, 204),
        BREAK,
        at(size),
        answer({"id": "f"}, 201),
    )
    with scripted(*answers) as server, Client(server.url) as client:
        assert client.push_feature_set(file, name="f")["id"] == "f"
    patches = [seen for seen in server.seen if seen.method == "PATCH"]
    assert [int(seen.headers["Upload-Offset"]) for seen in patches] == [
        0, 2**18, 300_000, 300_000, 310_000, 310_000, 310_000 + 2**17,
    ]  # fmt: skip
    assert [seen.body_bytes for seen in patches] == [2**18] * 2 + [2**17] * 5
    assert [seen.method for seen in server.seen].count("HEAD") == 5


def test_smaller_requests_where_something_between_wants_them(file: Path) -> None:
    """A proxy that takes less in one request gets less."""
    refused = (413, b"<html>413 Request Entity Too Large</html>", {"Content-Type": "text/html"})
    size = file.stat().st_size
    answers = (
        answer({"id": "u" * 36}, 201),
        refused,
        answer({}, 204),
        BREAK,
        answer({}, 200, Upload_Offset=str(size)),
        answer({"id": "f"}, 201),
    )
    with scripted(*answers) as server, Client(server.url) as client:
        assert client.push_feature_set(file, name="f")["id"] == "f"
    patches = [seen for seen in server.seen if seen.method == "PATCH"]
    assert [seen.body_bytes for seen in patches] == [2**18, 2**17, 2**17]


def test_end_of_patience(file: Path) -> None:
    """A service that stays away ends the push with an error once the time for retries is up."""
    with (
        scripted(answer({"id": "u" * 36}, 201), BREAK) as server,
        Client(server.url, retry_seconds=1) as client,
        pytest.raises(ServiceUnreachable, match="broke"),
    ):
        client.push_feature_set(file, name="f")
    assert len(server.seen) < 20


def test_command_shows_and_goes_on(api: Service, file: Path, tmp_path: Path) -> None:
    """`interplay push` of a file over 64 MiB that was killed goes on with what the service has."""
    large = tmp_path / "large.safetensors"
    values = np.random.default_rng(0).normal(size=(140_000, 128)).astype(np.float32)
    save_file({"features": values, "labels": np.arange(140_000) % 4, "head": values[:4].copy()}, large)
    environment = {**os.environ, "INTERPLAY_URL": api.url}
    command = [sys.executable, "-m", "interplay.command", "push", "features", str(large)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until(lambda: notes(tmp_path) and notes(tmp_path)[0].read_text())
        (upload,) = [note.read_text() for note in notes(tmp_path)]

        def offset() -> int:
            return int(api.client.head(f"/v1/uploads/{upload}").headers["Upload-Offset"])

        until(lambda: offset() > 0)
        process.kill()
    assert 0 < offset() < large.stat().st_size
    ran = interplay("push", "features", large, "--json", url=api.url, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert ran.returncode == 0, ran.stderr
    assert api.client.get(f"/v1/uploads/{upload}").json()["resource_id"] in ran.stdout
    assert hashlib.sha256(large.read_bytes()).hexdigest() in ran.stdout

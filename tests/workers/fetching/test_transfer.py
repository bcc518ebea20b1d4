"""Transfers from a web server on loopback, in this process: what comes, is asked for again, and is refused."""

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load, save

from app.errors import (
    InsufficientStorage,
    InvalidFile,
    ServiceError,
    SourceChanged,
    SourceDenied,
    SourceMissing,
    SourceNotAllowed,
    SourceUnavailable,
    TooLarge,
)
from app.files.archives import open_folder, write_weights
from app.settings import Settings
from app.sources import parse_allowed, parse_source
from app.staging import StagedFile, WholeFile
from app.storage import Storage
from tests.sources import COMMIT, SourceServer, source_server
from workers.fetching import process
from workers.fetching.main import BEARER, open_origin
from workers.fetching.messages import Fetched, Order
from workers.fetching.transfer import transfer
from workers.tasks import Progress

CONTENT = np.random.default_rng(0).bytes(3 * 2**20 + 12_345)


@pytest.fixture
def server() -> Iterator[SourceServer]:
    """Run a server that nobody else uses."""
    with source_server() as running:
        running.files["/nets/a.bin"] = CONTENT
        yield running


class Fetching:
    """Fetches into one file, as a worker's attempts do, and remembers what was told."""

    def __init__(self, server: SourceServer, path: Path) -> None:
        self.server, self.path = server, path
        self.told: list[Progress] = []
        self.on_told: Callable[[Progress], None] = self.told.append

    def __call__(self, source: str, **given: Any) -> Fetched:
        order = Order(
            **{
                "source": source,
                "of_adapter": False,
                "makes": "checkpoint",
                "path": str(self.path),
                "sources": f"{self.server.url}/nets inside, hf://org",
                "hub_url": self.server.url,
                "silence_seconds": 5.0,
                "patience_seconds": 20.0,
                "max_bytes": 2**40,
                **given,
            }
        )
        address = parse_source(source)
        with closing(open_origin(order, address, parse_allowed(order.sources))) as origin:
            return transfer(origin, order, address.shown, self.on_told)

    def a(self, **given: Any) -> Fetched:
        """Fetch the file that the server has."""
        return self(f"{self.server.url}/nets/a.bin", **given)


@pytest.fixture
def fetching(server: SourceServer, tmp_path: Path) -> Fetching:
    return Fetching(server, tmp_path / "one.fetch")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_comes_whole(fetching: Fetching) -> None:
    """Its bytes, its hash and its source's own mark of it are those of the server."""
    found = fetching.a()
    assert fetching.path.read_bytes() == CONTENT
    assert (found.sha256, found.size_bytes) == (sha256(CONTENT), len(CONTENT))
    [file] = found.origin.files
    assert file.name == "a.bin"
    assert file.etag == f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert file.sha256 == sha256(CONTENT)
    assert found.origin.source == f"{fetching.server.url}/nets/a.bin"
    assert found.origin.revision is None
    assert fetching.told[-1] == Progress(phase="storing", done=len(CONTENT), total=len(CONTENT))


def test_a_query_is_sent_and_not_recorded(fetching: Fetching) -> None:
    """A signature reaches the server, and nobody who reads the resource."""
    found = fetching(f"{fetching.server.url}/nets/a.bin?X-Signature=secret")
    assert found.sha256 == sha256(CONTENT)
    assert "secret" not in found.model_dump_json()


@pytest.mark.parametrize("cuts", [1, 5])
def test_connections_that_break_are_gone_on_with(fetching: Fetching, cuts: int) -> None:
    """Each byte that has come is not asked for again; the waiting is told."""
    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 2**19, cuts
    assert fetching.a().sha256 == sha256(CONTENT)
    ranges = [asked for _, asked in fetching.server.requests[1:]]
    assert len(ranges) == cuts + 1
    # What was in flight when the connection broke may come twice.
    assert fetching.server.sent_bytes["/nets/a.bin"] <= len(CONTENT) + 1 + cuts * 2**18
    assert any(told.phase == "waiting for the source" for told in fetching.told)


def test_a_server_that_is_busy_is_asked_again(fetching: Fetching) -> None:
    fetching.server.faults.failing = 3
    assert fetching.a().sha256 == sha256(CONTENT)


def test_a_server_without_ranges_is_read_from_the_beginning(fetching: Fetching) -> None:
    """What is there already is passed over as it comes again."""
    fetching.server.faults.without_ranges = True
    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 2**20, 1
    assert fetching.a().sha256 == sha256(CONTENT)
    assert fetching.path.read_bytes() == CONTENT


def test_a_server_without_etags_is_not_gone_on_with(fetching: Fetching) -> None:
    """Nothing says that the rest would be of the same file, so all of it is asked for."""
    fetching.server.faults.without_etags = True
    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 2**20, 1
    assert fetching.a().sha256 == sha256(CONTENT)
    assert [asked for _, asked in fetching.server.requests].count(f"bytes=0-{len(CONTENT) - 1}") == 2


def test_what_an_earlier_attempt_left_is_kept(fetching: Fetching) -> None:
    """A killed worker's file is gone on with, and hashed as if it had come at once."""
    fetching.a()
    asked = len(fetching.server.requests)
    with fetching.path.open("r+b") as file:
        file.truncate(2**20)
    found = fetching.a()
    assert found.sha256 == sha256(CONTENT)
    assert fetching.path.read_bytes() == CONTENT
    assert [asked for _, asked in fetching.server.requests[asked:]] == [
        "bytes=0-0",
        f"bytes={2**20}-{len(CONTENT) - 1}",
    ]


@pytest.mark.parametrize("same_size", [True, False])
def test_another_file_is_not_mixed_with_the_first(fetching: Fetching, same_size: bool) -> None:
    """A file that has changed since an earlier attempt is fetched from its beginning."""
    fetching.a()
    with fetching.path.open("r+b") as file:
        file.truncate(2**20)
    other = bytes(len(CONTENT) if same_size else 100)
    fetching.server.files["/nets/a.bin"] = other
    assert fetching.a().sha256 == sha256(other)
    assert fetching.path.read_bytes() == other


def test_a_file_that_changes_meanwhile_is_fetched_again(fetching: Fetching) -> None:
    """The bytes of two versions never meet in one file."""
    other = CONTENT[::-1]

    def change(told: Progress) -> None:
        if told.phase == "waiting for the source":
            fetching.server.files["/nets/a.bin"] = other

    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 2**20, 1
    fetching.on_told = change
    assert fetching.a().sha256 == sha256(other)


@pytest.mark.parametrize("size", [-10_000, 0])
@pytest.mark.parametrize(
    "marks",
    [{"weak_etags": True}, {"without_etags": True}, {"marks_once": True}, {"modified": "NOW"}, {"modified": "OLD"}],
)
def test_versions_are_not_mixed_whatever_marks_there_are(fetching: Fetching, marks: dict[str, Any], size: int) -> None:
    """A file that changes as its connection breaks comes whole, of one version, or is refused."""
    other = CONTENT[::-1][: len(CONTENT) + size]
    times = {"NOW": datetime.now(UTC), "OLD": datetime.now(UTC) - timedelta(days=1)}
    for name, value in marks.items():
        value = format_datetime(times[value], usegmt=True) if value in times else value
        setattr(fetching.server.faults, name, value)

    def change(told: Progress) -> None:
        if told.phase == "waiting for the source":
            fetching.server.files["/nets/a.bin"] = other
            if marks.get("modified") == "OLD":
                fetching.server.faults.modified = format_datetime(times["NOW"], usegmt=True)

    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 2**20, 1
    fetching.on_told = change
    try:
        found = fetching.a()
    except SourceChanged:
        assert "marks_once" in marks
        return
    assert found.sha256 == sha256(other)
    assert fetching.path.read_bytes() == other


def test_an_old_date_is_gone_on_with(fetching: Fetching) -> None:
    """A file that has not changed for a day is the same one after a break."""
    fetching.server.faults.modified = "Sat, 01 Aug 2026 12:00:00 GMT"
    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 2**20, 1
    assert fetching.a().sha256 == sha256(CONTENT)
    assert fetching.server.sent_bytes["/nets/a.bin"] < 1.5 * len(CONTENT)


def test_a_blob_that_the_file_has_become_is_not_written_into(fetching: Fetching, tmp_path: Path) -> None:
    """A worker that dies between the storage and the database leaves a file that is the blob: it must stay."""
    storage = Storage(Settings(data_dir=tmp_path))
    fetching.path = storage.fetched_path("one")
    found = fetching.a()
    with WholeFile(fetching.path, found.sha256) as file:
        storage.put(file)
    other = CONTENT[::-1]
    fetching.server.files["/nets/a.bin"] = other
    assert fetching.a().sha256 == sha256(other)
    assert storage.sha256_of(found.sha256) == found.sha256


def test_a_file_that_is_written_again_is_not_taken(fetching: Fetching) -> None:
    """Whoever fetched first finds that another one has begun anew, and puts nothing under its own hash."""
    first = fetching.a()
    WholeFile(fetching.path, first.sha256).close()
    fetching.server.files["/nets/a.bin"] = CONTENT[::-1]
    second = fetching.a()
    with pytest.raises(BlockingIOError):
        WholeFile(fetching.path, first.sha256)

    def fail_after_looking(told: Progress) -> None:
        if told.phase == "hashing":
            fetching.server.faults.failing = 10_000

    fetching.server.files["/nets/a.bin"] = bytes(len(CONTENT))
    fetching.on_told = fail_after_looking
    with pytest.raises(SourceUnavailable):
        fetching.a(patience_seconds=0.2)
    with pytest.raises(BlockingIOError):
        WholeFile(fetching.path, second.sha256)


def test_a_source_that_drips_is_given_up(fetching: Fetching) -> None:
    """A few bytes now and then are no answer."""
    fetching.server.faults.bytes_per_second = 20
    begun = time.monotonic()
    with pytest.raises(SourceUnavailable, match="bytes in 2 s"):
        fetching.a(patience_seconds=2.0)
    assert time.monotonic() - begun < 15


class _Changing(dict[str, bytes]):
    """A server's files, of which one is another one each time it is looked at."""

    def __getitem__(self, path: str) -> bytes:
        self.count = getattr(self, "count", 0) + 1
        return super().__getitem__(path)[: -self.count]


def test_a_file_that_always_changes_is_given_up(fetching: Fetching) -> None:
    fetching.server.files = _Changing(fetching.server.files)
    with pytest.raises(SourceChanged, match=r"in 3 tries: a\.bin is another file now"):
        fetching.a()


def test_a_silent_source_is_given_up(fetching: Fetching) -> None:
    """The error says for how long nothing came, and the last reason."""
    fetching.server.faults.failing = 10_000
    with pytest.raises(SourceUnavailable, match="nothing for 1 s: 503 busy"):
        fetching.a(patience_seconds=1.0)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"token": "secret"}, SourceDenied),
        ({"files": {}}, SourceMissing),
        ({"files": {"/nets/a.bin": b""}}, SourceMissing),
    ],
)
def test_a_refusal_is_final(fetching: Fetching, fault: dict[str, Any], error: type[ServiceError]) -> None:
    for name, value in fault.items():
        setattr(fetching.server, name, value)
    with pytest.raises(error):
        fetching.a()
    assert len(fetching.server.requests) == 1


def test_a_file_of_unknown_size_is_refused(fetching: Fetching) -> None:
    fetching.server.faults.without_ranges = fetching.server.faults.without_length = True
    with pytest.raises(SourceUnavailable, match="how large"):
        fetching.a()


def test_a_file_over_the_limit_is_refused_before_it_comes(fetching: Fetching) -> None:
    with pytest.raises(TooLarge, match=str(len(CONTENT))):
        fetching.a(max_bytes=len(CONTENT) - 1)
    assert len(fetching.server.requests) == 1
    assert fetching.a(max_bytes=len(CONTENT)).size_bytes == len(CONTENT)


def test_a_file_larger_than_the_disk_is_refused(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InsufficientStorage, match="1000 are free"):
        fetching.a()


def test_tokens_go_to_their_own_host_alone(fetching: Fetching, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A redirect to another host takes the file from there, and the token does not go with it."""
    monkeypatch.setenv(BEARER, "secret")
    fetching.server.token = "secret"
    with source_server() as other:
        other.files["/cdn/a"] = CONTENT
        fetching.server.redirects["/nets/b"] = f"{other.url}/cdn/a"
        allowed = f"{fetching.server.url}/nets SOME_TOKEN inside, {other.url}/cdn inside"
        assert fetching(f"{fetching.server.url}/nets/b", sources=allowed).sha256 == sha256(CONTENT)
        assert fetching.server.tokens["/nets/b"] == "Bearer secret"
        assert other.tokens == {"/cdn/a": None}


@pytest.mark.parametrize("other", ["OTHER_TOKEN", ""])
def test_tokens_stay_below_their_own_entry(fetching: Fetching, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """A part of the same host that has other credentials, or none, does not get these."""
    monkeypatch.setenv(BEARER, "secret")
    url = fetching.server.url
    fetching.server.files["/b/a"] = CONTENT
    fetching.server.redirects["/nets/b"] = f"{url}/b/a"
    fetching(f"{url}/nets/b", sources=f"{url}/nets SOME_TOKEN inside, {url}/b {other} inside")
    assert fetching.server.tokens == {"/nets/b": "Bearer secret", "/b/a": None}


def test_bodies_of_redirects_are_not_read(fetching: Fetching) -> None:
    """Only where they lead is of use."""
    fetching.server.redirects["/nets/b"] = f"{fetching.server.url}/nets/a.bin"
    fetching.server.faults.redirect_body = bytes(200 * 2**20)
    before = psutil.Process().memory_info().rss
    assert fetching(f"{fetching.server.url}/nets/b").sha256 == sha256(CONTENT)
    assert psutil.Process().memory_info().rss - before < 100 * 2**20


@pytest.mark.parametrize("token", ["secret\n", " secret "])
def test_a_token_in_a_file_of_its_own_has_a_line_break(tmp_path: Path, token: str) -> None:
    found = process.environment_of(_settings(tmp_path, "hf://org T"), _order("hf://org/a"), {"T": token})
    assert found[BEARER] == "secret"


@pytest.mark.parametrize("token", ["sec\nret", "s\u00e9cret", "sec\x00ret"])
def test_what_cannot_be_a_credential_is_not_told(tmp_path: Path, token: str) -> None:
    for source, names in (("hf://org/a", "hf://org T"), ("s3://b/a", "s3://b T")):
        with pytest.raises(SourceDenied, match="T") as caught:
            process.environment_of(_settings(tmp_path, names), _order(source), {"T": token, "T_ACCESS_KEY_ID": token})
        assert "ret" not in caught.value.detail


def test_credentials_of_a_longer_name_stay_out(tmp_path: Path) -> None:
    given = {"A_ACCESS_KEY_ID": "mine", "A_B_ACCESS_KEY_ID": "other's"}
    settings = _settings(tmp_path, "s3://b A, s3://c A_B")
    found = process.environment_of(settings, _order("s3://b/a"), given)
    assert {name: value for name, value in found.items() if name.startswith("AWS_")} == {"AWS_ACCESS_KEY_ID": "mine"}
    found = process.environment_of(settings, _order("s3://c/a"), given)
    assert found["AWS_ACCESS_KEY_ID"] == "other's"


def _settings(folder: Path, sources: str) -> Settings:
    return Settings(data_dir=folder, sources=sources)


def _order(source: str) -> Order:
    return Order(
        source=source, of_adapter=False, makes="probe", path="", sources="", hub_url="", silence_seconds=1,
        patience_seconds=1, max_bytes=1,
    )  # fmt: skip


@pytest.mark.parametrize("place", ["/elsewhere/a", "/nets/../elsewhere/a", "/netsa", "/nets%2f..%2felsewhere/a"])
def test_redirects_out_of_what_is_listed_are_refused(fetching: Fetching, place: str) -> None:
    """The server at the other end is never asked."""
    with source_server() as other:
        for host in (other.url, fetching.server.url):
            fetching.server.redirects["/nets/b"] = f"{host}{place}"
            with pytest.raises(SourceNotAllowed):
                fetching(f"{fetching.server.url}/nets/b")
        assert not other.requests
        assert {path for path, _ in fetching.server.requests} == {"/nets/b"}


@pytest.mark.parametrize(
    "address", ["http://169.254.169.254/latest", "file:///etc/passwd", "ftp://127.0.0.1/a", "//", "http://[::1"]
)
def test_redirects_to_other_places_are_refused(fetching: Fetching, address: str) -> None:
    fetching.server.redirects["/nets/b"] = address
    with pytest.raises(ServiceError) as caught:
        fetching(f"{fetching.server.url}/nets/b")
    assert caught.value.kind in ("source-not-allowed", "source-unavailable", "source-missing")


def test_a_redirect_without_end_is_refused(fetching: Fetching) -> None:
    fetching.server.redirects["/nets/b"] = f"{fetching.server.url}/nets/b"
    with pytest.raises(SourceMissing, match="redirects"):
        fetching(f"{fetching.server.url}/nets/b")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "127.1", "2130706433", "0x7f.1"])
def test_addresses_inside_are_refused(fetching: Fetching, host: str) -> None:
    """Whatever name or way of writing leads there; nobody is asked."""
    port = fetching.server.url.rpartition(":")[2]
    with pytest.raises(ServiceError) as caught:
        fetching(f"http://{host}:{port}/nets/a.bin", sources=f"http://{host}:{port}/", patience_seconds=0.5)
    assert caught.value.kind in ("source-not-allowed", "source-unavailable")
    assert not fetching.server.requests


# Folders: shards, descriptions, the Hub.


def shards() -> dict[str, bytes]:
    """Return the files of a folder with two shards, of which one holds a tensor that the index gives to the other."""
    random = np.random.default_rng(1)
    first = {"a": random.random((50, 70)), "b": random.random(5), "twice": random.random(9)}
    second = {"c": random.random((70, 3)), "twice": random.random(9)}
    names = {"a": 1, "b": 1, "c": 2, "twice": 2}
    index = {"weight_map": {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in names.items()}}
    return {
        "config.json": json.dumps({"model_type": "bert"}).encode(),
        "tokenizer.json": json.dumps({"model": {}}).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": save(first),
        "model-00002-of-00002.safetensors": save(second),
        "README.md": b"words",
        "pytorch_model.bin": b"a pickle",
        "onnx/model.safetensors": save({"other": random.random(3)}),
    }


def as_pushed(files: dict[str, bytes], folder: Path) -> bytes:
    """Return the weights that the service keeps of a folder that is sent as a zip."""
    with zipfile.ZipFile(folder / "sent.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with open_folder(folder / "sent.zip", max_bytes=2**30) as opened, StagedFile(folder) as staged:
        write_weights(opened, staged)
        staged.flush()
        return staged.path.read_bytes()


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("cuts", [0, 3])
def test_a_repository_becomes_one_file(fetching: Fetching, tmp_path: Path, sizes: bool, cuts: int) -> None:
    """Shards, descriptions and commit are those of the repository, and the file is the one of a pushed folder."""
    files = shards()
    fetching.server.add_repository("org/net", files, sizes=sizes)
    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 200, cuts
    found = fetching("hf://org/net@v1.0")
    expected = as_pushed(files, tmp_path)
    assert fetching.path.read_bytes() == expected
    assert found.sha256 == sha256(expected)
    assert found.descriptions == {"config": {"model_type": "bert"}, "tokenizer": {"model": {}}}
    assert found.origin.revision == COMMIT
    recorded = {file.name: file for file in found.origin.files}
    # The tensor that the index gives to the second shard is not taken from the first, so nobody knows its hash.
    assert recorded["model-00001-of-00002.safetensors"].sha256 is None
    second = "model-00002-of-00002.safetensors"
    assert recorded[second].sha256 == sha256(files[second])
    assert recorded["config.json"].sha256 == sha256(files["config.json"])
    assert not {"README.md", "pytorch_model.bin", "onnx/model.safetensors"} & recorded.keys()
    assert sorted(load(fetching.path.read_bytes())) == ["a", "b", "c", "twice"]
    if sizes and not cuts:
        asked = sum(fetching.server.sent_bytes.get(f"/org/net/resolve/{COMMIT}/{name}", 0) for name in files)
        # Small files are asked for twice, once for their headers: buffers are larger than they are.
        assert asked < 3 * len(expected)


def test_shards_are_gone_on_with_in_their_middle(fetching: Fetching) -> None:
    """At each place at which a first attempt may have ended, the second one makes the same file."""
    fetching.server.add_repository("org/net", shards())
    whole = fetching("hf://org/net").sha256
    content = fetching.path.read_bytes()
    for size in (0, 10, 500, 20_000, 30_000, len(content) - 1, len(content)):
        fetching.path.write_bytes(content[:size])
        assert fetching("hf://org/net").sha256 == whole
        assert fetching.path.read_bytes() == content


def test_a_file_of_a_repository_comes_alone(fetching: Fetching) -> None:
    files = shards()
    fetching.server.add_repository("org/net", files)
    found = fetching("hf://org/net@main/onnx/model.safetensors")
    assert found.sha256 == sha256(files["onnx/model.safetensors"])
    assert [file.name for file in found.origin.files] == ["model.safetensors"]
    assert not found.descriptions


def test_a_folder_of_a_repository_is_one_of_its_own(fetching: Fetching) -> None:
    files = shards()
    fetching.server.add_repository("org/net", files)
    assert fetching("hf://org/net/onnx").sha256 == sha256(files["onnx/model.safetensors"])


def test_an_index_may_be_named(fetching: Fetching, tmp_path: Path) -> None:
    """On the web, which lists no folders, it leads to the shards and the descriptions beside it."""
    files = shards()
    for name, content in files.items():
        fetching.server.files[f"/nets/of/{name}"] = content
    found = fetching(f"{fetching.server.url}/nets/of/model.safetensors.index.json")
    assert found.sha256 == sha256(as_pushed(files, tmp_path))
    assert found.descriptions["config"] == {"model_type": "bert"}
    # Of two networks in one folder it says which.
    files["model.safetensors"] = save({"another": np.zeros(3)})
    fetching.server.add_repository("org/net", files)
    assert fetching("hf://org/net/model.safetensors.index.json").sha256 == found.sha256
    assert fetching("hf://org/net").sha256 == sha256(files["model.safetensors"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model-00002-of-00002.safetensors": None}, "1 shards that the folder does not hold"),
        ({"model-00002-of-00002.safetensors": b"not one"}, "In 'model-00002-of-00002.safetensors'"),
        ({"config.json": b"[]"}, "'config.json' in the folder is not a JSON object"),
        ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_named(
    fetching: Fetching, change: dict[str, bytes | None], words: str
) -> None:
    files = {name: content for name, content in {**shards(), **change}.items() if content is not None}
    fetching.server.add_repository("org/net", files)
    with pytest.raises(InvalidFile, match=words):
        fetching("hf://org/net")


def test_an_index_cannot_lead_out_of_its_folder(fetching: Fetching) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    fetching.server.files["/nets/of/model.safetensors.index.json"] = json.dumps(index).encode()
    fetching.server.files["/secret.safetensors"] = save({"a": np.zeros(3)})
    with pytest.raises(InvalidFile, match="does not lie beside it"):
        fetching(f"{fetching.server.url}/nets/of/model.safetensors.index.json")
    assert len(fetching.server.requests) == 2


def test_shards_that_nothing_ties_together_are_refused(fetching: Fetching) -> None:
    """Without ETags a header of one version and the data of another would make a file."""
    for name, content in shards().items():
        fetching.server.files[f"/nets/of/{name}"] = content
    fetching.server.faults.without_etags = True
    with pytest.raises(SourceUnavailable, match="no strong ETag of 'model-00001-of-00002"):
        fetching(f"{fetching.server.url}/nets/of/model.safetensors.index.json")


def test_a_large_tensor_that_is_left_out_is_not_fetched(fetching: Fetching) -> None:
    """One at the beginning of its shard, which the index gives to another one."""
    left_out, kept = np.zeros(24 * 2**18), np.ones(7)
    files = {
        "model-1.safetensors": save({"a": left_out, "b": kept}),
        "model-2.safetensors": save({"a": np.ones(3)}),
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
        ).encode(),
    }
    fetching.server.add_repository("org/net", files)
    found = fetching("hf://org/net")
    assert fetching.server.sent_bytes[f"/org/net/resolve/{COMMIT}/model-1.safetensors"] < 2**20
    assert {file.name: file.sha256 for file in found.origin.files}["model-1.safetensors"] is None
    tensors = load(fetching.path.read_bytes())
    assert np.array_equal(tensors["a"], np.ones(3))
    assert np.array_equal(tensors["b"], kept)


@pytest.mark.slow
def test_an_index_of_many_files_is_looked_at_with_patience(fetching: Fetching) -> None:
    """What has been answered is not asked for again, and counts as an answer."""
    names = [f"s{number}.safetensors" for number in range(12)]
    for number, name in enumerate(names):
        fetching.server.files[f"/nets/of/{name}"] = save({f"t{number}": np.ones(3)})
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(names)}}
    fetching.server.files["/nets/of/model.safetensors.index.json"] = json.dumps(index).encode()
    asked = fetching.server.requests
    fetching.server.failing_each = 3
    fetching(f"{fetching.server.url}/nets/of/model.safetensors.index.json", patience_seconds=1.5)
    probes = [path for path, wanted in asked if wanted == "bytes=0-0" and path.endswith(".safetensors")]
    # Of each three requests one fails, one reads the index again, and one gets on.
    assert len(probes) <= 2 * len(names)


def test_an_adapter_is_fetched_as_one(fetching: Fetching) -> None:
    files = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": save({"a": np.zeros(3)})}
    fetching.server.add_repository("org/adapter", files)
    found = fetching("hf://org/adapter", of_adapter=True)
    assert found.descriptions == {"adapter": {"peft_type": "LORA"}}
    assert found.sha256 == sha256(files["adapter_model.safetensors"])


def test_bytes_that_are_not_those_announced_are_refused(fetching: Fetching) -> None:
    """The Hub announces the hashes of large files; others are no such file, however often they come."""
    fetching.server.add_repository("org/net", {"model.safetensors": save({"a": np.zeros(3)})})
    fetching.server.files[f"/org/net/resolve/{COMMIT}/model.safetensors"] = save({"a": np.ones(3)})
    with pytest.raises(SourceChanged):
        fetching("hf://org/net/model.safetensors")
    assert fetching.path.read_bytes() == b""


@pytest.mark.parametrize("name", ["none", "net@none", "net/none", "net@v1.0/none.safetensors"])
def test_what_the_hub_does_not_have_is_named(fetching: Fetching, name: str) -> None:
    fetching.server.add_repository("org/net", shards())
    with pytest.raises(SourceMissing, match="none"):
        fetching(f"hf://org/{name}")


@pytest.mark.parametrize("cuts", [0, 2])
def test_files_of_a_probe_become_a_zip(fetching: Fetching, cuts: int) -> None:
    """Parquet files below a folder are one file, in the order of their names, the same one each time."""
    files = {f"data/test-{number}.parquet": CONTENT[number * 10**6 :][: 10**6] for number in (2, 0, 1)}
    fetching.server.add_repository("datasets/org/set", {**files, "README.md": b"words", ".gitattributes": b""})
    fetching.server.faults.cut_after_bytes, fetching.server.faults.cuts = 2**18, cuts
    order = {"makes": "probe", "sources": "hf://datasets/org"}
    found = fetching("hf://datasets/org/set", **order)
    with zipfile.ZipFile(fetching.path) as archive:
        assert archive.namelist() == sorted(files)
        assert {name: archive.read(name) for name in files} == files
    content = fetching.path.read_bytes()
    assert found.sha256 == sha256(content)
    assert [file.sha256 for file in found.origin.files] == [sha256(files[name]) for name in sorted(files)]
    for size in (1, 40, 10**6 + 5, 10**6 + 100, 2_500_000, len(content) - 30, len(content)):
        fetching.path.write_bytes(content[:size])
        assert fetching("hf://datasets/org/set", **order).sha256 == found.sha256
        assert fetching.path.read_bytes() == content


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["cat/1.png", "dog/2.JPG", "README.md", ".hidden/3.png"], ["cat/1.png", "dog/2.JPG"]),
        (["a.npz", "README.md"], None),
        (["a.parquet"], None),
    ],
)
def test_which_files_of_a_folder_are_a_probe(fetching: Fetching, files: list[str], taken: list[str] | None) -> None:
    """Images are zipped; a single file of data is taken as it is."""
    fetching.server.add_repository("org/set", {name: name.encode() for name in files})
    found = fetching("hf://org/set", makes="probe")
    if taken is None:
        assert found.sha256 == sha256(files[0].encode())
    else:
        with zipfile.ZipFile(fetching.path) as archive:
            assert archive.namelist() == taken


@pytest.mark.parametrize("files", [["a.npz", "b.npz"], ["README.md"]])
def test_a_folder_that_is_no_probe_is_named(fetching: Fetching, files: list[str]) -> None:
    fetching.server.add_repository("org/set", dict.fromkeys(files, b"x"))
    with pytest.raises(InvalidFile, match=files[0]):
        fetching("hf://org/set", makes="probe")

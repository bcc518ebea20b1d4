"""What lies elsewhere, through the client: a real service fetches from a web server on loopback."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interplay import Client, FetchFailed, ProblemError, WaitTimeout
from interplay.calls.fetching import name_of, source_of
from tests.datafiles import mlp_adapter
from tests.elsewhere import Elsewhere
from tests.interplay.scripted import BREAK, answer, scripted
from tests.services import until

FETCH = {
    "id": "00000000-0000-4000-8000-00000000000f",
    "status": "running",
    "progress": {"done": 0, "total": 0, "phase": "looking"},
    "resource_id": None,
}


@pytest.fixture
def client(elsewhere: Elsewhere) -> Iterator[Client]:
    with Client(elsewhere.service.url) as opened:
        yield opened


def test_a_checkpoint_and_a_probe(
    client: Client, elsewhere: Elsewhere, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Both are as if they had been sent, with all that their specs say, and know where they come from."""
    told: list[tuple[int, int]] = []
    size = mlp_checkpoint_file.stat().st_size
    # Slow enough to be seen under way, however busy the machine is.
    elsewhere.server.faults.bytes_per_second = size // 4
    address = elsewhere.address("mlp.safetensors")
    checkpoint = client.push_checkpoint(
        f"{address}?signature=secret", name="fetched", metadata={"epoch": 3}, on_progress=lambda *at: told.append(at)
    )
    assert (checkpoint["name"], checkpoint["metadata"]) == ("fetched", {"epoch": 3})
    assert checkpoint["sha256"] == client.push_checkpoint(mlp_checkpoint_file, name="sent")["sha256"]
    assert checkpoint["origin"] is not None
    assert checkpoint["origin"]["source"] == address
    assert {total for _, total in told} == {size}
    assert len({done for done, _ in told}) > 1
    assert max(done for done, _ in told) == size
    elsewhere.server.faults.bytes_per_second = None
    elsewhere.server.add_repository("datasets/org/digits", {"data/digits.safetensors": digits_probe_file.read_bytes()})
    names = [f"digit {n}" for n in range(10)]
    probe = client.push_probe(
        "hf://datasets/org/digits/data/digits.safetensors",
        name="digits",
        class_names=(name for name in names),  # type: ignore[arg-type]  # any iterable, as with a file
        preprocess={"scale": 0.0625},
    )
    assert probe["class_names"] == names
    assert probe["sha256"] == client.push_probe(digits_probe_file, name="sent", class_names=names)["sha256"]


@pytest.mark.slow
def test_an_adapter_of_what_was_fetched(client: Client, elsewhere: Elsewhere, tmp_path: Path) -> None:
    """With `base` the folder is an adapter's; nothing is looked for on this machine."""
    base = client.push_checkpoint(elsewhere.address("mlp.safetensors"), name="base")
    mlp_adapter(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    elsewhere.server.add_repository("org/adapter", files)
    adapter = client.push_checkpoint("hf://org/adapter", name="adapter", base=base["id"])
    assert adapter["base_id"] == base["id"]
    assert adapter["origin"] is not None
    assert {file["name"] for file in adapter["origin"]["files"]} == set(files)


def test_a_fetch_is_begun_looked_at_listed_and_cancelled(client: Client, elsewhere: Elsewhere) -> None:
    """The same call is the same fetch while that goes on; who waits for one that is cancelled is told."""
    elsewhere.server.faults.bytes_per_second = 2000
    address = elsewhere.address("mlp.safetensors")
    fetch = client.create_fetch("checkpoints", address, name="slow", metadata={"a": 1})
    assert (fetch["makes"], fetch["source"], fetch["resource_id"]) == ("checkpoint", address, None)
    assert client.create_fetch("checkpoints", address, name="slow", metadata={"a": 1})["id"] == fetch["id"]
    other = client.create_fetch("probes", address, name="slow")
    assert (other["makes"], other["id"] != fetch["id"]) == ("probe", True)
    client.cancel_fetch(other["id"])
    until(lambda: client.get_fetch(fetch["id"])["progress"]["done"] > 0)
    assert [one["id"] for one in client.list("fetches", status="running", name="slow")] == [fetch["id"]]
    assert client.find("fetches", fetch["id"][:13])["id"] == fetch["id"]
    with pytest.raises(WaitTimeout, match=r"has not ended within 0\.1 s; it continues"):
        client.wait_for_fetch(fetch["id"], timeout_seconds=0.1)
    stopping = threading.Timer(0.5, elsewhere.service.client.post, (f"/v1/fetches/{fetch['id']}/cancel",))
    stopping.start()
    with pytest.raises(FetchFailed, match="cancelled") as caught:
        client.wait_for_fetch(fetch["id"])
    stopping.join()
    assert (caught.value.fetch["status"], caught.value.problem) == ("cancelled", None)


def test_an_announced_hash_is_checked(client: Client, elsewhere: Elsewhere) -> None:
    """A fetch with a `sha256` that is not the file's fails, and makes nothing."""
    fetch = client.create_fetch("checkpoints", elsewhere.address("mlp.safetensors"), name="other", sha256="0" * 64)
    with pytest.raises(FetchFailed, match="sha256"):
        client.wait_for_fetch(fetch["id"])
    assert not [*client.list("checkpoints", name="other")]


def test_what_cannot_be_fetched(client: Client, elsewhere: Elsewhere) -> None:
    """What is not there fails with the source's answer; what is not allowed is refused at once, as is no address."""
    with pytest.raises(FetchFailed, match="no such file") as caught:
        client.push_checkpoint(elsewhere.address("none.safetensors"), name="none")
    assert caught.value.problem is not None
    assert caught.value.problem["type"] == "urn:interplay:problem:source-missing"
    with pytest.raises(ProblemError, match="INTERPLAY_SOURCES") as refused:
        client.push_probe("s3://bucket/probe.npz", name="none")
    assert (refused.value.status, refused.value.type) == (403, "urn:interplay:problem:source-not-allowed")
    with pytest.raises(ProblemError, match="source") as refused:
        client.push_probe("S3://bucket/probe.npz", name="none")
    assert refused.value.status == 422


@pytest.mark.slow
def test_nothing_is_hashed_or_read_of_an_address(client: Client, elsewhere: Elsewhere) -> None:
    """`push_checkpoint_once` has what lies elsewhere fetched each time; a Path of the same letters is a file."""
    address = elsewhere.address("mlp.safetensors")
    first, second = (client.push_checkpoint_once(address, name="once") for _ in range(2))
    assert (first[1], second[1]) == (True, True)
    assert first[0]["id"] != second[0]["id"]
    with pytest.raises(FileNotFoundError):
        client.push_checkpoint(Path(address), name="a file")


def test_a_fetch_is_begun_and_polled_through_faults() -> None:
    """A begin whose answer is lost is asked again, and so is a poll: the service gives the same fetch."""
    made = {**FETCH, "status": "succeeded", "resource_id": "c"}
    answers = (BREAK, answer(FETCH, 202), answer({}, 503), answer(FETCH), BREAK, answer(made), answer({"id": "c"}))
    with scripted(*answers) as server, Client(server.url) as client:
        assert client.push_checkpoint("hf://org/net", name="net")["id"] == "c"
    fetch = f"/v1/fetches/{FETCH['id']}"
    asked = [(seen.method, seen.target) for seen in server.asked()]
    assert asked == [("POST", "/v1/checkpoints")] * 2 + [("GET", fetch)] * 4 + [("GET", "/v1/checkpoints/c")]
    assert server.seen[0].body_end == b'{"name":"net","source":"hf://org/net"}'


@pytest.mark.parametrize(
    ("path", "is_source"),
    [
        ("s3://a/b", True), ("gs://a/b", True), ("az://a/b", True), ("hf://a/b", True), ("http://a/b", True),
        ("HTTPS://a/b", True), ("s3:/a/b", False), ("ftp://a/b", False), ("a/s3://b", False), ("net.pt2", False),
        (Path("s3://a/b"), False),
    ],
)  # fmt: skip
def test_addresses_are_told_from_paths(path: Any, is_source: bool) -> None:
    """Text with one of the schemes is an address; a Path, which has lost a slash, is never one."""
    assert (source_of(path) is not None) == is_source


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s3://models/resnet/epoch-90.safetensors", "epoch-90"),
        ("s3://models/resnet/v1.0/", "v1.0"),
        ("gs://models/resnet-v1.0", "resnet-v1.0"),
        ("az://my.models", "my.models"),
        ("s3://models/a%20?b#c.npz", "a%20?b#c"),
        ("https://example.com/a%20net.pt2?signature=x/y.z", "a net"),
        ("https://example.com/net/model.safetensors.index.json", "model"),
        ("https://example.com", "example.com"),
        ("hf://org/bert-base.v2@refs%2Fpr%2F1/model.safetensors", "bert-base.v2"),
        ("hf://org/net", "net"),
        ("hf://datasets/org/pets@main/data", "pets"),
        ("hf://org", "hf://org"),
    ],
)
def test_names_of_addresses(source: str, name: str) -> None:
    """It is the last part without a suffix; of the Hub the repository's name, without the revision."""
    assert name_of(source) == name

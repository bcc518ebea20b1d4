"""Fetches from a real S3 server, each in a process of its own with the credentials that its entry names."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest

from app.settings import Settings
from tests.buckets import BucketServer, bucket_server
from tests.services import until
from tests.workers.fetching.test_transfer import CONTENT, as_pushed, sha256, shards
from workers.fetching import process
from workers.fetching.messages import Fetched, Order
from workers.tasks import Progress


class Bucket:
    """A place in the bucket of a server, and how to fetch from it."""

    def __init__(self, server: BucketServer, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.url = server.fresh_url()
        self._folder = folder
        self.store = server.store
        self.prefix = self.url.removeprefix("s3://").partition("/")[2]
        for name, value in server.environment.items():
            patch.setenv(name.replace("AWS_", "PARTNER_"), value)
        patch.delenv("AWS_ACCESS_KEY_ID", raising=False)
        self.told: list[Progress] = []
        self.cancelled = False

    def put(self, name: str, content: bytes) -> None:
        obstore.put(self.store, f"{self.prefix}/{name}", content)

    def settings(self, **given: Any) -> Settings:
        sources = given.pop("sources", f"{self.url} PARTNER")
        return Settings(data_dir=self._folder, sources=sources, storage_timeout_seconds=5, **given)

    def fetch(self, name: str, *, settings: Settings | None = None, **given: Any) -> Fetched | dict[str, Any] | None:
        settings = settings or self.settings()
        order = Order(
            **{
                "source": f"{self.url}/{name}" if name else self.url,
                "of_adapter": False,
                "makes": "checkpoint",
                "path": str(self._folder / "one.fetch"),
                "sources": settings.sources,
                "hub_url": settings.hub_url,
                "silence_seconds": 5.0,
                "patience_seconds": 30.0,
                "max_bytes": 2**40,
                **given,
            }
        )
        return process.run(settings, order, self._tick)

    def whole(self, name: str, **given: Any) -> Fetched:
        found = self.fetch(name, **given)
        assert isinstance(found, Fetched), found
        return found

    def kind(self, name: str, **given: Any) -> str:
        """Return the kind of the problem that prevents a fetch."""
        found = self.fetch(name, **given)
        assert isinstance(found, dict), found
        return str(found["type"]).rpartition(":")[2]

    def _tick(self, progress: Progress | None) -> bool:
        if progress is not None:
            self.told.append(progress)
        return self.cancelled


@pytest.fixture
def bucket(s3: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return Bucket(s3, tmp_path, monkeypatch)


def content_of(tmp_path: Path) -> bytes:
    return (tmp_path / "one.fetch").read_bytes()


@pytest.mark.parametrize("name", ["a.safetensors", "deep/er/a.bin", "with space+plus%2F.bin", "ünïcode-日本.bin"])
def test_an_object_comes_whole(bucket: Bucket, tmp_path: Path, name: str) -> None:
    """Names are taken as they are, and the hash is recorded beside the bucket's own mark."""
    bucket.put(name, CONTENT)
    found = bucket.whole(name)
    assert found.sha256 == sha256(CONTENT)
    assert content_of(tmp_path) == CONTENT
    [file] = found.origin.files
    assert file.name == name.rpartition("/")[2]
    assert file.etag is not None
    assert file.sha256 == sha256(CONTENT)


def test_a_folder_becomes_one_file(bucket: Bucket, tmp_path: Path) -> None:
    files = shards()
    for name, content in files.items():
        bucket.put(f"net/{name}", content)
    expected = as_pushed(files, tmp_path)
    for name in ("net", "net/", "net/model.safetensors.index.json"):
        found = bucket.whole(name)
        assert found.sha256 == sha256(expected)
        assert found.descriptions["config"] == {"model_type": "bert"}
    assert bucket.whole("net/onnx").sha256 == sha256(files["onnx/model.safetensors"])


def test_images_of_a_folder_become_a_zip(bucket: Bucket) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        bucket.put(f"val/{name}", name.encode())
    found = bucket.whole("val", makes="probe")
    assert [file.name for file in found.origin.files] == ["cat/1.png", "dog/1.png"]


def test_what_is_not_there_is_missing(bucket: Bucket) -> None:
    assert bucket.kind("none") == "source-missing"
    assert bucket.kind("none/") == "source-missing"


@pytest.mark.slow
def test_what_is_not_listed_is_refused(bucket: Bucket) -> None:
    """Also once the worker no longer lists what the service still did."""
    bucket.put("a", CONTENT)
    for sources in ("", f"{bucket.url}2 PARTNER", f"{bucket.url}/b PARTNER", "hf://org"):
        assert bucket.kind("a", settings=bucket.settings(sources=sources)) == "source-not-allowed"


def test_credentials_are_those_that_the_entry_names(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither others of the environment nor the usual ones are used in their place."""
    bucket.put("a", CONTENT)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"OTHER_{name}", "wrong")
    for name in ("ENDPOINT_URL", "REGION", "ALLOW_HTTP"):
        monkeypatch.setenv(f"OTHER_{name}", os.environ[f"PARTNER_{name}"])
    assert bucket.kind("a", settings=bucket.settings(sources=f"{bucket.url} OTHER")) == "source-denied"
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", os.environ[f"PARTNER_{name}"])
    assert bucket.kind("a", settings=bucket.settings(sources=f"{bucket.url} OTHER")) == "source-denied"
    # An entry without a name sends none; this bucket is not open.
    assert bucket.kind("a", settings=bucket.settings(sources=bucket.url), patience_seconds=1.0) != "source-missing"
    assert bucket.whole("a").sha256 == sha256(CONTENT)


def test_a_process_has_the_credentials_of_its_source_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {
        "PATH": "/bin",
        "AWS_ACCESS_KEY_ID": "the service's",
        "PARTNER_ACCESS_KEY_ID": "a partner's",
        "HUB": "a token",
        "FILES": "another token",
        "INTERPLAY_API_KEY": "the service's",
        "INTERPLAY_DATABASE_URL": "the service's",
    }
    settings = Settings(
        data_dir=tmp_path, sources="s3://own AWS, s3://theirs PARTNER, s3://open, hf://org HUB, https://h/ FILES"
    )

    def secrets(source: str) -> dict[str, str]:
        order = Order(
            source=source, of_adapter=False, makes="probe", path="", sources="", hub_url="", silence_seconds=1,
            patience_seconds=1, max_bytes=1,
        )  # fmt: skip
        found = process.environment_of(settings, order, given)
        return {name: value for name, value in found.items() if value in given.values() and name != "PATH"}

    assert secrets("s3://own/a") == {"AWS_ACCESS_KEY_ID": "the service's"}
    assert secrets("s3://theirs/a") == {"AWS_ACCESS_KEY_ID": "a partner's"}
    assert secrets("s3://open/a") == {}
    assert secrets("hf://org/a") == {"SOURCE_BEARER": "a token"}
    assert secrets("https://h/a") == {"SOURCE_BEARER": "another token"}
    assert secrets("https://elsewhere/a") == {}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bucket, BucketServer]]:
    """A server that nobody else uses, which may be killed."""
    with bucket_server() as server:
        yield Bucket(server, tmp_path, monkeypatch), server


@pytest.mark.slow
def test_a_server_that_is_killed_is_waited_for(own: tuple[Bucket, BucketServer], tmp_path: Path) -> None:
    """A fetch that finds no server begins once there is one."""
    bucket, server = own
    bucket.put("a", CONTENT)
    server.kill()
    found: list[Fetched] = []
    thread = threading.Thread(target=lambda: found.append(bucket.whole("a")))
    thread.start()
    until(lambda: any(told.phase == "waiting for the source" for told in bucket.told))
    server.start()
    thread.join()
    assert found[0].sha256 == sha256(CONTENT)


def test_a_cancelled_fetch_ends_at_once(own: tuple[Bucket, BucketServer]) -> None:
    bucket, server = own
    server.kill()
    settings = bucket.settings()
    bucket.cancelled = True
    assert bucket.fetch("a", settings=settings) is None

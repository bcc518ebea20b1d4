"""The whole service with its blobs in a bucket, whose server is killed and started again under load."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from interplay import Client, resumable
from tests import services
from tests.app.test_analyses import pair, without_identity
from tests.buckets import BucketServer, bucket_server
from tests.campaigns import campaign
from tests.databases import fresh_database
from tests.interplay.test_upload_kills import write_features
from tests.services import Service, running, until

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class InBucket:
    """A service, and the server of its bucket, which nobody else uses."""

    service: Service
    server: BucketServer
    url: str


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InBucket]:
    """Run a service with its blobs on an S3 server of its own."""
    with bucket_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        url = server.fresh_url()
        folder = tmp_path_factory.mktemp("bucket")
        with running(folder / "data", storage_url=url, storage_timeout_seconds="5") as service:
            yield InBucket(service, server, url)


def blob(own: InBucket, sha256: str) -> bytes:
    """Read a blob from the bucket itself, with the library that the service reads with."""
    import obstore
    from obstore.store import from_url

    return bytes(obstore.get(from_url(own.url), f"{sha256[:2]}/{sha256}").bytes())


def test_everything_works_in_a_bucket(own: InBucket, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Uploads lie in the bucket and nowhere else, analyses read them from there, and downloads give them back."""
    service = own.service
    ids = pair(service, mlp_checkpoint_file, digits_probe_file)
    report = service.report(service.wait(service.analyze(**ids)["id"]))
    assert report["subject"]["sha256"] == hashlib.sha256(mlp_checkpoint_file.read_bytes()).hexdigest()
    assert blob(own, report["subject"]["sha256"]) == mlp_checkpoint_file.read_bytes()
    content = service.client.get(f"/v1/checkpoints/{ids['checkpoint_id']}/file").content
    assert content == mlp_checkpoint_file.read_bytes()
    assert not list((service.data_dir / "blobs").glob("??/*"))
    # Kept features come from the bucket as well.
    again = service.report(service.wait(service.analyze(**ids)["id"]))
    assert without_identity(again)["splits"] == without_identity(report)["splits"]
    assert again["provenance"]["features_reused"] is True
    assert service.client.delete(f"/v1/probes/{ids['probe_id']}").status_code == 204


@pytest.mark.slow
@pytest.mark.parametrize("kills", campaign([1, 3], often=[1]))
def test_server_killed_under_uploads(
    own: InBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """The bucket's server is killed while four clients push: all files arrive, once each, as they are."""
    monkeypatch.setattr(resumable, "LEAST_BYTES", 2 * _MEBIBYTE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = []
    for index in range(8):
        # Every second one is small enough for a form.
        files.append(tmp_path / f"{kills}-{index}.safetensors")
        write_features(files[-1], (6 if index % 2 else 1) * _MEBIBYTE + 520 * (index + 10 * kills))
    made: dict[str, str] = {}

    def push(share: list[Path]) -> None:
        with Client(own.service.url, retry_seconds=120) as client:
            for path in share:
                made[path.name] = client.push_feature_set(path, name=path.name)["sha256"]

    threads = [threading.Thread(target=push, args=(files[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for kill in range(kills):
        until(partial(_have_pushed, made, 2 * kill + 1, threads))
        own.server.kill()
        time.sleep(1)
        own.server.start()
    for thread in threads:
        thread.join()
    for path in files:
        assert made[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert blob(own, made[path.name]) == path.read_bytes()
        listed = own.service.client.get("/v1/feature-sets", params={"name": path.name}).json()["items"]
        assert len(listed) == 1
    staging = own.service.data_dir / "staging"
    assert [path.name for path in staging.iterdir()] == ["place"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", campaign([1, 3], often=[1]))
def test_server_killed_under_analyses(
    own: InBucket, mlp_checkpoint_file: Path, digits_probe_file: Path, kills: int
) -> None:
    """The bucket's server is killed while analyses wait and run: each succeeds, once, with its digits."""
    service = own.service
    ids = pair(service, mlp_checkpoint_file, digits_probe_file)
    expected = without_identity(service.report(service.wait(service.analyze(**ids)["id"])))
    analyses = []
    for index in range(4):
        # Files that this machine has no copy of.
        own_ids = pair(service, _alike(mlp_checkpoint_file, index + 10 * kills), digits_probe_file)
        analyses.append(service.analyze(**own_ids))
    for path in (service.data_dir / "cache").glob("??/*"):
        path.unlink()
    for _ in range(kills):
        own.server.kill()
        time.sleep(3)
        own.server.start()
        time.sleep(1)
    for analysis in analyses:
        done = service.wait(analysis["id"], seconds=200)
        assert done["status"] == "succeeded", done
        assert without_identity(service.report(done))["splits"] == expected["splits"]
        reports = service.client.get("/v1/reports", params={"checkpoint_id": analysis["checkpoint_id"]}).json()["items"]
        assert len(reports) == 1


def _have_pushed(made: dict[str, str], count: int, threads: list[threading.Thread]) -> bool:
    return len(made) >= count or not any(thread.is_alive() for thread in threads)


def _alike(file: Path, index: int) -> Path:
    """Return a copy of a checkpoint whose header has spaces at its end, so that its hash is another one."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(length + 8 * (index + 1))
    copy = file.with_name(f"alike-{index}.safetensors")
    copy.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return copy


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_calls_while_the_server_is_away(own: InBucket, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Without the bucket each call ends within its deadline, and others are answered; once it is back all is well."""
    service = own.service
    ids = pair(service, mlp_checkpoint_file, digits_probe_file)
    for path in (service.data_dir / "cache").glob("??/*"):
        path.unlink()
    own.server.kill()
    try:
        needing: list[Callable[[], httpx.Response]] = [
            lambda: service.post("/v1/checkpoints", {"name": "a"}, mlp_checkpoint_file),
            lambda: service.client.get(f"/v1/checkpoints/{ids['checkpoint_id']}/file"),
            lambda: service.client.delete(f"/v1/probes/{ids['probe_id']}"),
        ]
        for call in needing:
            started = time.monotonic()
            answer = call()
            assert answer.status_code == 503, answer.text
            assert answer.json()["type"] == "urn:interplay:problem:unavailable"
            assert time.monotonic() - started < 25
        assert service.client.get("/healthz").status_code == 200
        assert service.client.get(f"/v1/checkpoints/{ids['checkpoint_id']}").status_code == 200
        until(lambda: service.client.get("/readyz").json()["storage"] != "ok")
        waiting = service.analyze(**ids)
    finally:
        own.server.start()
    assert service.wait(waiting["id"], seconds=200)["status"] == "succeeded"
    until(lambda: service.client.get("/readyz").json()["storage"] == "ok")
    assert service.post("/v1/checkpoints", {"name": "a"}, mlp_checkpoint_file).status_code == 201


@pytest.mark.slow
def test_machines_share_a_bucket(tmp_path: Path, postgres: str, s3: BucketServer, mlp_checkpoint_file: Path) -> None:
    """What came in through one API another one has, from the bucket; each stages resumable uploads of its own."""
    with fresh_database(postgres) as url, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        settings: dict[str, Any] = {"database_url": url, "storage_url": s3.fresh_url()}
        with (
            services.running(tmp_path / "one", **settings) as one,
            services.running(tmp_path / "two", command="api", tables=False, **settings) as two,
        ):
            made = one.post("/v1/checkpoints", {"name": "shared"}, mlp_checkpoint_file).json()
            assert two.client.get(f"/v1/checkpoints/{made['id']}/file").content == mlp_checkpoint_file.read_bytes()
            again = two.post("/v1/checkpoints", {"name": "again", "sha256": made["sha256"]})
            assert again.status_code == 201, again.text

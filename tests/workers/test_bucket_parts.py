"""Parts of uploads that go straight into the bucket of the service."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
from obstore.store import from_url

from app import parts
from interplay import Client, resumable
from interplay import parts as client_parts
from tests import services
from tests.app.api.test_resumable import TUS, bring, use
from tests.app.api.test_uploads import problem
from tests.buckets import BucketServer
from tests.interplay.test_resumable import Break, Seen
from tests.interplay.test_upload_kills import write_features
from tests.services import Service, until

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def place(s3: BucketServer) -> Iterator[str]:
    """Return the URL of a storage in the bucket, for this process too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        yield s3.fresh_url()


@pytest.fixture(scope="module")
def api(place: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service with its blobs in the bucket."""
    with services.running(tmp_path_factory.mktemp("parts") / "data", command="api", storage_url=place) as service:
        yield service


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a feature set of three parts, the last of them small."""
    path = tmp_path_factory.mktemp("files") / "features.safetensors"
    write_features(path, 34 * MEBIBYTE)
    return path


@pytest.fixture(autouse=True)
def notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resumable, "LEAST_BYTES", MEBIBYTE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def begin(service: Service, size: int) -> str:
    headers = {**TUS, "Upload-Length": str(size), "Upload-Parts": "presigned"}
    answer = service.client.post("/v1/uploads", headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


def missing(service: Service, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.client.get(f"{path}/parts").json()["missing"]
    return found


def objects(place: str) -> set[str]:
    """Return the names of all parts in the bucket."""
    return {entry["path"] for entries in obstore.list(from_url(place), prefix="parts") for entry in entries}


def test_parts_become_a_resource(api: Service, place: str, file: Path) -> None:
    """Parts arrive in any order, several at a time; all of them are one file, and none is left in the bucket."""
    content = file.read_bytes()
    path = begin(api, len(content))
    assert api.client.get(path).json()["part_bytes"] == 16 * MEBIBYTE
    listed = missing(api, path)
    assert [part["number"] for part in listed] == [0, 1, 2]
    assert sum(part["size_bytes"] for part in listed) == len(content)

    def put(part: dict[str, Any]) -> int:
        body = content[part["offset_bytes"] : part["offset_bytes"] + part["size_bytes"]]
        return httpx.put(part["url"], content=body, timeout=60).status_code

    assert put(listed[1]) == 200
    # Nothing is there without a gap.
    assert api.client.head(path, headers=TUS).headers["Upload-Offset"] == "0"
    assert problem(use(api, path), 409, "upload-unfinished")["offset_bytes"] == 0
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(put, [listed[2], listed[0]])) == [200, 200]
    assert missing(api, path) == []
    assert api.client.head(path, headers=TUS).headers["Upload-Offset"] == str(len(content))
    sha256 = hashlib.sha256(content).hexdigest()
    problem(use(api, path, sha256="0" * 64), 422, "invalid-file")
    assert len(objects(place)) == 3
    made = use(api, path, sha256=sha256)
    assert made.json()["sha256"] == sha256
    assert bytes(obstore.get(from_url(place), f"{sha256[:2]}/{sha256}").bytes()) == content
    assert objects(place) == set()
    assert use(api, path, sha256=sha256).json() == made.json()
    assert [left.name for left in (api.data_dir / "staging").iterdir()] == ["place"]


@pytest.mark.slow
def test_part_of_another_size_is_missing(api: Service, place: str, file: Path) -> None:
    """A part with too few or too many bytes counts as none; damage of its bytes is found by the hash of all."""
    content = bytearray(file.read_bytes())
    path = begin(api, len(content))
    for part in missing(api, path):
        body = bytes(content[part["offset_bytes"] : part["offset_bytes"] + part["size_bytes"]])
        for wrong in (body[:-1], body + b"x"):
            assert httpx.put(part["url"], content=wrong, timeout=60).status_code == 200
            assert part["number"] in [one["number"] for one in missing(api, path)]
        damaged = bytes([body[0] ^ 1]) + body[1:] if part["number"] == 1 else body
        assert httpx.put(part["url"], content=damaged, timeout=60).status_code == 200
    problem(use(api, path, sha256=hashlib.sha256(content).hexdigest()), 422, "invalid-file")
    assert api.client.delete(path, headers=TUS).status_code == 204
    assert objects(place) == set()


def test_urls_take_one_part_and_nothing_else(api: Service, file: Path) -> None:
    """A signed URL is for one object and for PUT; neither another part nor a blob can be written or read with it."""
    path = begin(api, file.stat().st_size)
    url = missing(api, path)[0]["url"]
    assert httpx.get(url).status_code == 403
    assert httpx.put(url.replace("/00000?", "/00001?"), content=b"x").status_code == 403
    assert httpx.put(url.partition("?")[0], content=b"x").status_code == 403
    problem(bring(api, path, 0, b"x"), 422, "invalid-request")
    api.client.delete(path, headers=TUS)
    problem(api.client.get(f"{path}/parts"), 404, "not-found")


@pytest.mark.slow
def test_storage_without_signatures_has_no_parts(tmp_path: Path) -> None:
    """With a folder as its storage the service takes bytes by PATCH, and says so."""
    with services.running(tmp_path / "data", command="api") as service:
        path = begin(service, 5)
        assert service.client.get(path).json()["part_bytes"] is None
        problem(service.client.get(f"{path}/parts"), 422, "invalid-request")
        assert bring(service, path, 0, b"12345").status_code == 204


def test_client_sends_parts_and_goes_on(api: Service, place: str, file: Path) -> None:
    """The client sends parts into the bucket; one that was ended leaves those that arrived to the next."""
    with Client(api.url) as client:
        with pytest.raises(Break):
            client.push_feature_set(file, name="parts", on_progress=Seen(end_at=34 * MEBIBYTE))
        there = sum(entry["size"] for entries in obstore.list(from_url(place), prefix="parts") for entry in entries)
        made = client.push_feature_set(file, name="parts", on_progress=(seen := Seen()))
    assert made["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert seen.offsets[-1] == file.stat().st_size
    assert seen.offsets[0] == there
    assert objects(place) == set()


def test_client_that_does_not_reach_the_bucket(api: Service, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the bucket is in a network of the service's own, the bytes go to the service."""

    def elsewhere(*arguments: Any) -> dict[str, Any]:
        # Nobody listens there.
        answer = found(*arguments)
        return {**answer, "missing": [{**part, "url": "http://127.0.0.1:9/"} for part in answer["missing"]]}

    found = client_parts._missing
    monkeypatch.setattr(client_parts, "_missing", elsewhere)
    with Client(api.url) as client:
        made = client.push_feature_set(file, name="around")
    assert made["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
def test_parts_of_no_upload_are_swept(api: Service, place: str, s3: BucketServer, file: Path, tmp_path: Path) -> None:
    """Parts of uploads that have expired, or that there are none of, go; those of open ones stay."""
    obstore.put(from_url(place), "parts/00000000-0000-0000-0000-000000000000/00000", b"x")
    other = s3.fresh_url()
    obstore.put(from_url(other), "parts/00000000-0000-0000-0000-000000000000/00000", b"x")
    with services.running(tmp_path / "data", command="api", storage_url=other, upload_expires_seconds="4") as service:
        until(lambda: objects(other) == set())
        path = begin(service, file.stat().st_size)
        part = missing(service, path)[0]
        httpx.put(part["url"], content=os.urandom(part["size_bytes"]), timeout=60)
        assert len(objects(other)) == 1
        until(lambda: service.client.get(path).status_code == 404)
    with services.running(tmp_path / "data", command="api", storage_url=other):
        until(lambda: objects(other) == set())


def test_sizes_of_parts() -> None:
    """A file has a thousand parts or fewer, of 16 MiB or more, that cover it."""
    for size in (1, 2**24, 2**24 + 1, 2**34 + 7, 20 * 2**30):
        part = max(2**24, -(-size // 1000))
        places = parts.extents(size, part)
        assert len(places) <= 1000
        assert places[0][0] == 0
        assert all(start + length == following for (start, length), (following, _) in pairwise(places))
        assert sum(places[-1]) == size

"""Resumable uploads over HTTP: the protocol, what survives kills, limits, and the resources that they become."""

import base64
import hashlib
import json
import os
import random
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from tests import services
from tests.app.api.test_uploads import blobs, problem, raw_connection
from tests.conftest import MLP
from tests.databases import fresh_database
from tests.services import Service, until

TUS = {"Tus-Resumable": "1.0.0"}
BYTES = {**TUS, "Content-Type": "application/offset+octet-stream"}


def features(rows: int = 2000) -> bytes:
    """Return the file of a feature set of half a kilobyte a row."""
    values = np.random.default_rng(0).normal(size=(rows, 128)).astype(np.float32)
    return save({"features": values, "labels": np.arange(rows) % 4, "head": values[:4].copy()})


def begin(service: Service, size: int, **headers: str) -> str:
    """Begin an upload; return its path."""
    answer = service.client.post("/v1/uploads", headers={**TUS, "Upload-Length": str(size), **headers})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


def bring(service: Service, path: str, offset: int, content: bytes, **headers: str) -> httpx.Response:
    return service.client.patch(path, content=content, headers={**BYTES, "Upload-Offset": str(offset), **headers})


def offset_of(service: Service, path: str) -> int:
    answer = service.client.head(path, headers=TUS)
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    return int(answer.headers["Upload-Offset"])


def checksum(algorithm: str, content: bytes) -> str:
    return f"{algorithm} {base64.b64encode(hashlib.new(algorithm, content).digest()).decode()}"


def staged(service: Service, path: str) -> Path:
    return service.data_dir / "blobs" / "staging" / f"{path.rsplit('/', 1)[1]}.upload"


def use(service: Service, path: str, **spec: Any) -> httpx.Response:
    """Make a feature set of an upload."""
    return service.post("/v1/feature-sets", {"name": "resumed", "upload_id": path.rsplit("/", 1)[1], **spec})


def test_options_tell_what_there_is(service: Service) -> None:
    """OPTIONS has version, extensions, algorithms and the largest size."""
    answer = service.client.options("/v1/uploads")
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["Tus-Version"] == answer.headers["Tus-Resumable"] == "1.0.0"
    extensions = set(answer.headers["Tus-Extension"].split(","))
    assert extensions == {"creation", "creation-with-upload", "checksum", "expiration", "termination"}
    assert answer.headers["Tus-Checksum-Algorithm"] == "sha256,sha1"
    assert answer.headers["Tus-Max-Size"] == str(20 * 2**30)


def test_upload_in_parts_becomes_what_a_form_would(any_service: Service) -> None:
    """A file that came in three requests becomes the same resource as one that came in a form."""
    content = features()
    direct = any_service.post("/v1/feature-sets", {"name": "resumed"}, content).json()
    path = begin(any_service, len(content), **{"Upload-Metadata": "filename Zi5zYWZldGVuc29ycw==,flag"})
    offset = 0
    for size in (1, 300_000, len(content) - 300_001):
        answer = bring(any_service, path, offset, content[offset : offset + size])
        offset += size
        assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(offset))
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        assert parsedate_to_datetime(answer.headers["Upload-Expires"]) > datetime.now(UTC) + timedelta(hours=23)
        assert offset_of(any_service, path) == offset
    head = any_service.client.head(path, headers=TUS)
    assert head.headers["Upload-Length"] == str(len(content))
    assert head.headers["Upload-Metadata"] == "filename Zi5zYWZldGVuc29ycw==,flag"
    assert any_service.client.get(path).json()["metadata"] == {"filename": "f.safetensors", "flag": ""}
    made = use(any_service, path, sha256=hashlib.sha256(content).hexdigest())
    assert made.status_code == 201, made.text
    assert made.headers["Location"] == f"/v1/feature-sets/{made.json()['id']}"
    ours = {key: value for key, value in made.json().items() if key not in ("id", "created_at")}
    assert ours == {key: value for key, value in direct.items() if key not in ("id", "created_at")}
    assert any_service.client.get(f"/v1/feature-sets/{made.json()['id']}/file").content == content
    assert not staged(any_service, path).exists()


def test_same_call_gives_the_same_resource(any_service: Service) -> None:
    """A call whose answer was lost may be repeated; another spec, or another kind, is a problem."""
    content = features(8)
    path = begin(any_service, len(content))
    bring(any_service, path, 0, content)
    made = [use(any_service, path).json() for _ in range(2)]
    assert made[0] == made[1]
    assert any_service.client.get(path).json()["resource_id"] == made[0]["id"]
    body = problem(use(any_service, path, name="another"), 409, "idempotency-conflict")
    assert body["resource_id"] == made[0]["id"]
    id_ = path.rsplit("/", 1)[1]
    problem(any_service.post("/v1/probes", {"name": "resumed", "upload_id": id_}), 404, "not-found")
    problem(bring(any_service, path, 0, b""), 404, "not-found")


def test_what_is_refused_can_be_used_again(service: Service, mlp_checkpoint_file: Path) -> None:
    """A spec that is refused leaves the upload, so that another one needs no bytes."""
    content = mlp_checkpoint_file.read_bytes()
    path = begin(service, len(content))
    bring(service, path, 0, content)
    id_ = path.rsplit("/", 1)[1]
    problem(service.post("/v1/checkpoints", {"name": "a", "upload_id": id_, "head": "\0"}), 422, "invalid-request")
    problem(service.post("/v1/checkpoints", {"name": "a", "upload_id": id_, "sha256": "0" * 64}), 422, "invalid-file")
    problem(use(service, path), 422, "invalid-file")
    problem(service.post("/v1/checkpoints", {"name": "a", "upload_id": id_}, content), 422, "invalid-request")
    assert service.post("/v1/checkpoints", {"name": "a", "upload_id": id_, "architecture": MLP}).status_code == 201


def test_unfinished_upload_becomes_nothing(service: Service) -> None:
    """An upload that lacks bytes, or that there is not, makes no resource."""
    content = features(8)
    path = begin(service, len(content))
    body = problem(use(service, path), 409, "upload-unfinished")
    assert (body["offset_bytes"], body["size_bytes"]) == (0, len(content))
    bring(service, path, 0, content[:100])
    assert problem(use(service, path), 409, "upload-unfinished")["offset_bytes"] == 100
    for unknown in ("none", "../place", "00000000-0000-0000-0000-000000000000"):
        problem(service.post("/v1/feature-sets", {"name": "a", "upload_id": unknown}), 404, "not-found")
        assert service.client.head(f"/v1/uploads/{unknown.replace('/', '%2F')}", headers=TUS).status_code == 404


def test_wrong_offset_is_told_the_right_one(service: Service) -> None:
    """Bytes for another offset than the upload's are refused, and nothing changes."""
    content = features(8)
    path = begin(service, len(content))
    bring(service, path, 0, content[:100])
    for offset in (0, 99, 101, len(content)):
        assert problem(bring(service, path, offset, content[100:200]), 409, "upload-offset")["offset_bytes"] == 100
    assert offset_of(service, path) == 100
    assert bring(service, path, 100, content[100:]).status_code == 204
    assert use(service, path).status_code == 201


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
def test_checksum_decides(service: Service, algorithm: str) -> None:
    """Bytes with another checksum are 460 and not kept; with theirs they are."""
    content = features(8)
    path = begin(service, len(content))
    right = checksum(algorithm, content[:100])
    problem(bring(service, path, 0, content[1:101], **{"Upload-Checksum": right}), 460, "checksum-mismatch")
    assert offset_of(service, path) == 0
    assert bring(service, path, 0, content[:100], **{"Upload-Checksum": right}).status_code == 204
    wrong = bring(service, path, 100, content[100:], **{"Upload-Checksum": right})
    assert problem(wrong, 460, "checksum-mismatch")["offset_bytes"] == 100
    assert bring(service, path, 100, content[100:]).status_code == 204
    assert use(service, path).status_code == 201


BAD_REQUESTS: dict[str, tuple[str, dict[str, str], int, str]] = {
    "no length": ("POST", {}, 422, "invalid-request"),
    "no number": ("POST", {"Upload-Length": "1e3"}, 422, "invalid-request"),
    "below zero": ("POST", {"Upload-Length": "-1"}, 422, "invalid-request"),
    "too long": ("POST", {"Upload-Length": str(20 * 2**30 + 1)}, 413, "too-large"),
    "odd metadata": ("POST", {"Upload-Length": "1", "Upload-Metadata": "name no base64"}, 422, "invalid-request"),
    "a key twice": ("POST", {"Upload-Length": "1", "Upload-Metadata": "a YQ==,a YQ=="}, 422, "invalid-request"),
    "much metadata": ("POST", {"Upload-Length": "1", "Upload-Metadata": "a " + "YQ==" * 2000}, 422, "invalid-request"),
    "another version": ("POST", {"Upload-Length": "1", "Tus-Resumable": "0.2.2"}, 412, "tus-version"),
    "no offset": ("PATCH", {"Content-Type": BYTES["Content-Type"]}, 422, "invalid-request"),
    "another media type": (
        "PATCH",
        {"Upload-Offset": "0", "Content-Type": "text/plain"},
        415,
        "unsupported-media-type",
    ),
    "an unknown algorithm": (
        "PATCH",
        {**BYTES, "Upload-Offset": "0", "Upload-Checksum": "md4 YQ=="},
        422,
        "invalid-request",
    ),
    "a short checksum": (
        "PATCH",
        {**BYTES, "Upload-Offset": "0", "Upload-Checksum": "sha1 YQ=="},
        422,
        "invalid-request",
    ),
    "more than is lacking": ("PATCH", {**BYTES, "Upload-Offset": "0"}, 413, "too-large"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_a_problem(service: Service, case: str) -> None:
    """A request that does not keep to the protocol is a problem with its version, and nothing comes of it."""
    method, headers, status, kind = BAD_REQUESTS[case]
    path = begin(service, 5) if method == "PATCH" else "/v1/uploads"
    body = b"123456" if method == "PATCH" else b""
    answer = service.client.request(method, path, content=body, headers={**TUS, **headers})
    problem(answer, status, kind)
    assert answer.headers["Tus-Resumable"] == "1.0.0"
    assert answer.headers.get("Tus-Version") == ("1.0.0" if status == 412 else None)
    if method == "PATCH":
        assert offset_of(service, path) == 0


def test_more_than_is_lacking_without_a_length(service: Service) -> None:
    """Bytes are counted as they come, and those of a request that brings too many are not kept."""
    path = begin(service, 100_000)
    bring(service, path, 0, b"1")
    chunks = iter([bytes(60_000), bytes(60_000)])
    answer = service.client.patch(path, content=chunks, headers={**BYTES, "Upload-Offset": "1"})
    assert problem(answer, 413, "too-large")["limit_bytes"] == 99_999
    assert offset_of(service, path) == 1


def test_bytes_may_come_with_the_creation(service: Service) -> None:
    """A creation may have the first bytes, or all of them."""
    content = features(8)
    for n_bytes in (100, len(content)):
        headers = {**BYTES, "Upload-Length": str(len(content))}
        answer = service.client.post("/v1/uploads", content=content[:n_bytes], headers=headers)
        assert (answer.status_code, answer.headers["Upload-Offset"]) == (201, str(n_bytes))
        assert answer.json()["offset_bytes"] == n_bytes
        path = answer.headers["Location"]
        assert bring(service, path, n_bytes, content[n_bytes:]).status_code == 204
        assert use(service, path).status_code == 201


def test_cancelled_upload_is_gone(any_service: Service) -> None:
    """DELETE removes an upload with its file; so does a POST that stands for it."""
    for method, headers in (("DELETE", TUS), ("POST", {**TUS, "X-HTTP-Method-Override": "DELETE"})):
        path = begin(any_service, 5)
        bring(any_service, path, 0, b"123")
        assert staged(any_service, path).exists()
        assert any_service.client.request(method, path, headers=headers).status_code == 204
        assert not staged(any_service, path).exists()
        assert any_service.client.head(path, headers=TUS).status_code == 404
        problem(bring(any_service, path, 3, b"45"), 404, "not-found")
        problem(any_service.client.request(method, path, headers=headers), 404, "not-found")


def send_head(connection: socket.socket, path: str, offset: int, announced: int, headers: str = "") -> None:
    connection.sendall(
        f"PATCH {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/offset+octet-stream\r\n"
        f"Tus-Resumable: 1.0.0\r\nUpload-Offset: {offset}\r\n{headers}Content-Length: {announced}\r\n\r\n".encode()
    )


def test_what_came_before_a_break_is_kept(any_service: Service) -> None:
    """A connection that breaks leaves what came of its bytes; only with a checksum nothing of it."""
    content = features()
    path = begin(any_service, len(content))
    with raw_connection(any_service) as connection:
        send_head(connection, path, 0, len(content))
        connection.sendall(content[:500_000])
        until(lambda: staged(any_service, path).exists() and staged(any_service, path).stat().st_size == 500_000)
        # One at a time.
        problem(bring(any_service, path, 0, content), 423, "upload-busy")
        assert offset_of(any_service, path) == 0
    until(lambda: offset_of(any_service, path) == 500_000)
    with raw_connection(any_service) as connection:
        send_head(connection, path, 500_000, 9000, f"Upload-Checksum: {checksum('sha256', content[:9000])}\r\n")
        connection.sendall(content[500_000:505_000])
        until(lambda: staged(any_service, path).stat().st_size == 505_000)
    until(lambda: bring(any_service, path, 500_000, b"").status_code == 204)
    assert staged(any_service, path).stat().st_size == 500_000
    assert bring(any_service, path, 500_000, content[500_000:]).status_code == 204
    assert use(any_service, path).json()["sha256"] == hashlib.sha256(content).hexdigest()


def test_cancelled_while_bytes_come(service: Service) -> None:
    """A request that writes to an upload that was cancelled meanwhile is told so, and leaves no file."""
    path = begin(service, 1000)
    with raw_connection(service) as connection:
        send_head(connection, path, 0, 1000)
        connection.sendall(bytes(500))
        until(lambda: staged(service, path).exists())
        assert service.client.delete(path, headers=TUS).status_code == 204
        connection.sendall(bytes(500))
        assert b" 404 " in connection.recv(65536).split(b"\r\n")[0]
    assert not staged(service, path).exists()


@pytest.fixture
def killable(tmp_path: Path) -> Any:
    """Return a function that starts a service, which a test may kill and start again with the same folder."""
    return lambda **settings: services.running(tmp_path / "data", command="api", **settings)


def kill(service: Service) -> None:
    service.process.kill()
    service.process.wait()


@pytest.mark.parametrize("with_checksum", [False, True])
def test_killed_service_goes_on_where_it_was(killable: Any, with_checksum: bool) -> None:
    """After kill -9 HEAD tells what had been written; unless its checksum was still to come."""
    content = features()
    header = f"Upload-Checksum: {checksum('sha256', content[1000:])}\r\n" if with_checksum else ""
    with killable() as service:
        path = begin(service, len(content))
        bring(service, path, 0, content[:1000])
        with raw_connection(service) as connection:
            send_head(connection, path, 1000, len(content) - 1000, header)
            connection.sendall(content[1000:700_000])
            until(lambda: staged(service, path).stat().st_size == 700_000)
            kill(service)
    with killable() as service:
        expected = 1000 if with_checksum else 700_000
        assert offset_of(service, path) == expected
        assert bring(service, path, expected, content[expected:]).status_code == 204
        assert use(service, path).json()["sha256"] == hashlib.sha256(content).hexdigest()
        assert {file.name for file in blobs(service) if "staging" in str(file)} == {"place"}


def test_service_killed_before_the_upload_became_a_resource(killable: Any) -> None:
    """A complete upload survives a kill, and is hashed from the disk then."""
    content = features()
    with killable() as service:
        path = begin(service, len(content))
        bring(service, path, 0, content)
        kill(service)
    with killable() as service:
        assert offset_of(service, path) == len(content)
        assert use(service, path).json()["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.slow
def test_uploads_expire(killable: Any) -> None:
    """An upload that gets no bytes is told when it ends, is not there then, and its file is swept at the next start."""
    with killable(upload_expires_seconds="1") as service:
        path = begin(service, 5)
        bring(service, path, 0, b"123")
        until(lambda: service.client.head(path, headers=TUS).status_code == 404)
        problem(bring(service, path, 3, b"45"), 404, "not-found")
    with killable() as service:
        until(lambda: not staged(service, path).exists())
        other = begin(service, 5)
        bring(service, other, 0, b"123")
    with killable() as service:
        time.sleep(1)
        assert offset_of(service, other) == 3


def test_open_uploads_are_limited(killable: Any) -> None:
    """Beyond the limit a creation is refused until another upload has ended; 0 takes none."""
    with killable(max_open_uploads="2") as service:
        paths = [begin(service, 5) for _ in range(2)]
        answer = service.client.post("/v1/uploads", headers={**TUS, "Upload-Length": "5"})
        assert problem(answer, 503, "too-many-uploads")["limit"] == 2
        assert "Retry-After" in answer.headers
        service.client.delete(paths[0], headers=TUS)
        begin(service, 5)


def test_room_that_is_not_there_is_told_at_once(killable: Any) -> None:
    """A file for which the disk has no room beside what other uploads have announced is refused before its bytes."""
    with killable(max_upload_bytes=str(2**60)) as service:
        free = os.statvfs(service.data_dir)
        size = free.f_bavail * free.f_frsize * 2 // 3
        path = begin(service, size)
        answer = service.client.post("/v1/uploads", headers={**TUS, "Upload-Length": str(size)})
        problem(answer, 507, "insufficient-storage")
        service.client.delete(path, headers=TUS)
        begin(service, size)


def test_upload_that_stalls_is_dropped(killable: Any) -> None:
    """A request that sends nothing until the idle timeout is ended, and what came is kept."""
    with killable(upload_idle_seconds="0.5") as service, raw_connection(service) as connection:
        path = begin(service, 1000)
        send_head(connection, path, 0, 1000)
        connection.sendall(bytes(300))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b" 400 " in answer.split(b"\r\n")[0]
        assert b"upload-incomplete" in answer
        assert offset_of(service, path) == 300


def test_key_is_needed(killable: Any) -> None:
    """Without the service's key no upload is begun, seen, continued or cancelled."""
    with killable(api_key="secret") as service:
        key = {"Authorization": "Bearer secret"}
        path = begin(service, 5, **key)
        problem(service.client.post("/v1/uploads", headers={**TUS, "Upload-Length": "5"}), 401, "unauthorized")
        problem(bring(service, path, 0, b"1"), 401, "unauthorized")
        problem(service.client.get(path), 401, "unauthorized")
        problem(service.client.delete(path), 401, "unauthorized")
        # Nor may a GET, for which a browser's cookie would do, stand for another method.
        overridden = service.client.get(path, headers={**key, "X-HTTP-Method-Override": "DELETE"})
        assert overridden.json()["offset_bytes"] == 0
        assert bring(service, path, 0, b"1", **key).status_code == 204


@pytest.mark.slow
def test_file_on_another_machine(tmp_path: Path, postgres: str) -> None:
    """With a storage of blobs for all machines each has its own staged files: the other one says so."""
    content = features(8)
    with (
        fresh_database(postgres) as url,
        services.running(tmp_path / "one", database_url=url, storage_url="memory:///") as one,
        services.running(
            tmp_path / "two", command="api", tables=False, database_url=url, storage_url="memory:///"
        ) as two,
    ):
        path = begin(one, len(content))
        bring(one, path, 0, content[:10])
        problem(bring(two, path, 10, content[10:]), 503, "upload-elsewhere")
        problem(use(two, path), 503, "upload-elsewhere")
        assert bring(one, path, 10, content[10:]).status_code == 204
        assert use(one, path).status_code == 201


def test_random_cuts(service: Service) -> None:
    """Whatever the sizes of the requests, with checksums or without, the file is right."""
    generator = random.Random(0)
    content = features(4000)
    path = begin(service, len(content))
    offset = 0
    while offset < len(content):
        part = content[offset : offset + generator.randrange(1, 400_000)]
        headers = {"Upload-Checksum": checksum("sha256", part)} if generator.random() < 0.5 else {}
        if headers and generator.random() < 0.3:
            problem(bring(service, path, offset, part[::-1] + b"", **headers), 460, "checksum-mismatch")
            continue
        assert bring(service, path, offset, part, **headers).status_code == 204
        offset += len(part)
    assert json.loads(use(service, path).text)["sha256"] == hashlib.sha256(content).hexdigest()

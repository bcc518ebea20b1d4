"""Uploads over HTTP: stored content, and no trace of invalid or broken uploads."""

import io
import json
import pickle
import random
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from safetensors.numpy import save

from tests import services
from tests.conftest import MLP
from tests.datafiles import nameless, zipped
from tests.services import Service, until


def blobs(service: Service) -> set[Path]:
    """Return every file of the service's storage, staged ones included."""
    return {path for path in (service.data_dir / "blobs").rglob("*") if path.is_file()}


def problem(response: Any, status: int, kind: str) -> dict[str, Any]:
    """Check for a problem of this kind; return its body."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = dict(response.json())
    assert body["type"] == f"urn:interplay:problem:{kind}", body
    assert body["status"] == status
    assert body["detail"]
    return body


def safetensors_bytes(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADER_ATTACKS: dict[str, Callable[[], bytes]] = {
    "not safetensors": lambda: b"PK this is something else entirely, and long enough",
    "shorter than a length": lambda: b"\x01\x02",
    "empty": lambda: b"",
    "truncated": lambda: save({"a": np.zeros(100, np.float32)})[:-1],
    "header cut off": lambda: save({"a": np.zeros(100, np.float32)})[:20],
    "huge header announced": lambda: struct.pack("<Q", 2**40) + b"{}",
    "header over 16 MiB": lambda: safetensors_bytes(b"{" + b" " * (16 * 2**20) + b"}"),
    "overlap": lambda: safetensors_bytes({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "hole": lambda: safetensors_bytes({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, bytes(20)),
    "trailing bytes": lambda: safetensors_bytes({"a": tensor([2], 0, 8)}, bytes(12)),
    "too few bytes for the shape": lambda: safetensors_bytes({"a": tensor([3], 0, 8)}, bytes(8)),
    "overflowing shape": lambda: safetensors_bytes({"a": tensor([2**40, 2**40], 0, 8)}, bytes(8)),
    "empty but for a huge dimension": lambda: safetensors_bytes({"a": tensor([0, 2**62], 0, 0)}),
    "duplicate keys": lambda: safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "duplicate key after 100,000 others": lambda: safetensors_bytes(
        b"{" + b",".join(b'"%d":{}' % i for i in range(99_999)) + b',"99998":{}}'
    ),
    "leading spaces": lambda: safetensors_bytes(b"  " + json.dumps({"a": tensor([1], 0, 4)}).encode(), bytes(4)),
    "too many tensors": lambda: safetensors_bytes({f"{i}": tensor([0], 0, 0) for i in range(100_001)}),
    "rank 9": lambda: safetensors_bytes({"a": tensor([1] * 9, 0, 4)}, bytes(4)),
    "long name": lambda: safetensors_bytes({"a" * 512: tensor([1], 0, 4)}, bytes(4)),
    "name that is half a character": lambda: safetensors_bytes(
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "a million empty objects": lambda: safetensors_bytes(b'{"a":[' + b"{}," * 1_000_000 + b"{}]}"),
    "unprintable name": lambda: safetensors_bytes({"a\x1b[31m": tensor([1], 0, 4)}, bytes(4)),
    "negative dimension": lambda: safetensors_bytes({"a": tensor([-1], 0, 4)}, bytes(4)),
    "unknown dtype": lambda: safetensors_bytes({"a": tensor([1], 0, 4, "Q99")}, bytes(4)),
    "header is a list": lambda: safetensors_bytes(b"[1, 2]"),
    "header nested too deep": lambda: safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "pickle": lambda: pickle.dumps({"a": [1.0] * 100}),
}


@pytest.mark.parametrize("attack", HEADER_ATTACKS)
def test_hostile_file_is_refused(service: Service, attack: str) -> None:
    """A malformed safetensors file is a problem, within a time limit, and leaves nothing behind."""
    before = blobs(service)
    started = time.monotonic()
    response = service.post("/v1/checkpoints", {"name": "bad", "architecture": MLP}, HEADER_ATTACKS[attack]())
    problem(response, 422, "invalid-file")
    # A guard against reading for ever, not a measurement: other tests run beside this one.
    assert time.monotonic() - started < 60
    assert blobs(service) == before
    assert service.client.get("/v1/checkpoints", params={"name": "bad"}).json()["items"] == []


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def labels(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


INPUTS = np.ones((4, 3), np.float32)


def npz_with_header(header: bytes, version: bytes = b"\x01\x00") -> bytes:
    """Return an npz whose array `inputs` has this npy header."""
    buffer = io.BytesIO()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.npy", b"\x93NUMPY" + version + length + header)
    return buffer.getvalue()


def npz_with_twins() -> bytes:
    """Return an npz with two members that numpy reads as one array."""
    buffer = io.BytesIO(npz(inputs=INPUTS, labels=labels(0, 1, 0, 1)))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("labels", b"")
    return buffer.getvalue()


BAD_PROBES: dict[str, tuple[Callable[[], bytes], dict[str, Any]]] = {
    "pickled objects": (lambda: npz(inputs=np.array([{}, {}, {}, {}], object), labels=labels(0, 1, 0, 1)), {}),
    "zip bomb": (lambda: npz(inputs=np.zeros((4, 2**22), np.float32), labels=labels(0, 1, 0, 1)), {}),
    "not a zip": (lambda: b"PK\x03\x04 and then nothing of the kind", {}),
    "truncated npz": (lambda: npz(inputs=INPUTS, labels=labels(0, 1, 0, 1))[:-40], {}),
    "npy header that is not closed": (lambda: npz_with_header(b"(((("), {}),
    "npy header of another kind": (lambda: npz_with_header(b"{[]: 1}"), {}),
    "npy header that is no literal": (lambda: npz_with_header(b"[1 2L"), {}),
    "npy dtype that is none": (
        lambda: npz_with_header(b"{'descr': ',,', 'fortran_order': False, 'shape': (1,)}"),
        {},
    ),
    "npy shape below zero": (
        lambda: npz_with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, -1, -3)}"),
        {},
    ),
    "npy header of 30 MB": (lambda: npz_with_header(random.Random(0).randbytes(30_000_000), b"\x02\x00"), {}),
    "two members of one name": (npz_with_twins, {}),
    "a member without a name": (lambda: nameless(zipped({"labels.npy": b"", "x": b""})), {}),
    "a member without a name, not at its start": (
        lambda: b"PK\x07\x08" + nameless(zipped({"labels.npy": b"", "x": b""})),
        {},
    ),
    "no inputs": (lambda: save({"labels": labels(0, 1)}), {}),
    "no labels": (lambda: save({"inputs": INPUTS}), {}),
    "no samples": (lambda: save({"inputs": np.ones((0, 3), np.float32), "labels": labels()}), {}),
    "one class only": (lambda: save({"inputs": INPUTS, "labels": labels(1, 1, 1, 1)}), {}),
    "negative label": (lambda: save({"inputs": INPUTS, "labels": labels(0, 1, -1, 1)}), {}),
    "absurd label": (lambda: save({"inputs": INPUTS, "labels": labels(0, 1, 2**40, 1)}), {}),
    "label without a name": (
        lambda: save({"inputs": INPUTS, "labels": labels(0, 1, 2, 1)}),
        {"class_names": ["a", "b"]},
    ),
    "labels are floats": (lambda: save({"inputs": INPUTS, "labels": np.ones(4, np.float32)}), {}),
    "fewer labels than inputs": (lambda: save({"inputs": INPUTS, "labels": labels(0, 1, 0)}), {}),
    "split is neither 0 nor 1": (
        lambda: save({"inputs": INPUTS, "labels": labels(0, 1, 0, 1), "split": labels(0, 1, 2, 0)}),
        {},
    ),
    "unknown tensor": (
        lambda: save({"inputs": INPUTS, "labels": labels(0, 1, 0, 1), "splits": labels(0, 1, 1, 0)}),
        {},
    ),
    "scalars": (lambda: save({"inputs": np.ones(4, np.float32), "labels": labels(0, 1, 0, 1)}), {}),
}


@pytest.mark.parametrize("case", BAD_PROBES)
def test_bad_probe_is_refused(service: Service, case: str) -> None:
    """A probe that cannot be evaluated is a problem at its upload and leaves nothing behind."""
    before = blobs(service)
    content, spec = BAD_PROBES[case]
    problem(service.post("/v1/probes", {"name": "bad", **spec}, content()), 422, "invalid-file")
    assert blobs(service) == before


FEATURES = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
HEAD = np.ones((2, 3), np.float32)
BAD_FEATURE_SETS: dict[str, dict[str, Any]] = {
    "no head": {"features": FEATURES, "labels": labels(0, 1, 0, 1)},
    "head of another width": {"features": FEATURES, "labels": labels(0, 1, 0, 1), "head": np.ones((2, 4), np.float32)},
    "N of features and labels differ": {"features": FEATURES, "labels": labels(0, 1, 0), "head": HEAD},
    "label outside the head": {"features": FEATURES, "labels": labels(0, 1, 2, 1), "head": HEAD},
    "bias of another size": {
        "features": FEATURES, "labels": labels(0, 1, 0, 1), "head": HEAD, "head_bias": np.ones(3, np.float32),
    },
    "logits of another size": {
        "features": FEATURES, "labels": labels(0, 1, 0, 1), "head": HEAD, "logits": np.ones((4, 3), np.float32),
    },
    "integer features": {"features": np.ones((4, 3), np.int64), "labels": labels(0, 1, 0, 1), "head": HEAD},
    "one class only": {"features": FEATURES, "labels": labels(1, 1, 1, 1), "head": HEAD},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FEATURE_SETS)
def test_bad_feature_set_is_refused(service: Service, case: str) -> None:
    """Features, labels and head that do not match each other are a problem at their upload."""
    response = service.post("/v1/feature-sets", {"name": "bad"}, save(BAD_FEATURE_SETS[case]))
    problem(response, 422, "invalid-file")


# The two bytes at the start of a pickle of each protocol, of a zip, of a gzip and of Zstandard.
MARKS = [0x0280, 0x0380, 0x0480, 0x0580, int.from_bytes(b"PK", "little"), 0x8B1F, 0xB528]


@pytest.mark.parametrize("length", MARKS)
def test_header_of_any_length_is_safetensors(service: Service, length: int, mlp_checkpoint_file: Path) -> None:
    """The header's length is a file's first bytes, and may equal the magic number of a pickle or an archive."""
    fitting = save({"inputs": INPUTS, "labels": labels(0, 1, 0, 1)})
    features = save({"features": INPUTS, "labels": labels(0, 1, 0, 1), "head": np.ones((2, 3), np.float32)})
    files = {
        "checkpoints": ({"architecture": MLP}, mlp_checkpoint_file.read_bytes()),
        "probes": ({}, fitting),
        "feature-sets": ({}, features),
    }
    for collection, (spec, content) in files.items():
        n_bytes = int.from_bytes(content[:8], "little")
        padded = content[8 : 8 + n_bytes].rstrip(b" ").ljust(length, b" ")
        # The magic number and more: a checkpoint's header alone is longer than the shortest of them.
        padded = padded.ljust(length + 2**16 * (len(padded) > length), b" ")
        assert len(padded) % 2**16 == length
        response = service.post(
            f"/v1/{collection}", {"name": "padded", **spec}, safetensors_bytes(padded, content[8 + n_bytes :])
        )
        assert response.status_code == 201, response.text


BAD_SPECS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no name": ("checkpoints", {"architecture": MLP}, "spec.name"),
    "unknown member": ("checkpoints", {"name": "a", "architecture": MLP, "size": 3}, "spec.size"),
    "nested metadata": ("checkpoints", {"name": "a", "architecture": MLP, "metadata": {"a": {"b": 1}}}, "metadata"),
    "control character": ("checkpoints", {"name": "a\x1bb", "architecture": MLP}, "spec.name"),
    "metadata that is not a number": (
        "checkpoints",
        {"name": "a", "architecture": MLP, "metadata": {"a": float("nan")}},
        "",
    ),
    "metadata with NUL": ("checkpoints", {"name": "a", "architecture": MLP, "metadata": {"a": "\0"}}, "metadata"),
    "metadata with half a character": ("checkpoints", {"name": "a", "metadata": {"a": "\ud800"}}, ""),
    "long list in metadata": ("checkpoints", {"name": "a", "metadata": {"a": list(range(101))}}, "metadata"),
    "head with NUL": ("checkpoints", {"name": "a", "architecture": MLP, "head": "\0"}, "spec.head"),
    "no class names": ("probes", {"name": "a", "class_names": []}, "spec.class_names"),
    "unknown family": ("checkpoints", {"name": "a", "architecture": {"family": "x", "name": "mlp"}}, "architecture"),
    "unknown network": (
        "checkpoints",
        {"name": "a", "architecture": {"family": "builtin", "name": "vgg", "args": {}}},
        "architecture",
    ),
    "depth that does not fit": (
        "checkpoints",
        {
            "name": "a",
            "architecture": {"family": "builtin", "name": "wide_resnet", "args": {"depth": 29, "n_classes": 10}},
        },
        "depth must be",
    ),
    "absurd depth": (
        "checkpoints",
        {
            "name": "a",
            "architecture": {
                "family": "builtin",
                "name": "wide_resnet",
                "args": {"depth": 6 * 10**6 + 4, "n_classes": 2},
            },
        },
        "depth",
    ),
    "mean of another length": ("probes", {"name": "a", "preprocess": {"mean": [1.0, 2.0]}}, "preprocess.mean"),
    "std of zero": ("probes", {"name": "a", "preprocess": {"std": 0.0}}, "preprocess.std"),
    "not JSON's infinity": ("probes", {"name": "a", "preprocess": {"scale": float("inf")}}, "spec"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_spec_is_refused(service: Service, case: str, mlp_checkpoint_file: Path) -> None:
    """An invalid spec is a problem that names the place."""
    path, spec, place = BAD_SPECS[case]
    file = mlp_checkpoint_file.read_bytes()
    if path == "probes":
        file = save({"inputs": INPUTS, "labels": labels(0, 1, 0, 1)})
    assert place in problem(service.post(f"/v1/{path}", spec, file), 422, "invalid-request")["detail"]


def form(boundary: str, *parts: tuple[str, bytes], end: bool = True) -> bytes:
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in parts
    )
    return body + f"--{boundary}--\r\n".encode() if end else body


BAD_FORMS: dict[str, tuple[bytes, int, str]] = {
    "no parts": (form("b"), 422, "invalid-request"),
    "no spec": (form("b", ("file", b"x")), 422, "invalid-request"),
    "no file": (form("b", ("spec", b'{"name": "a"}')), 422, "invalid-request"),
    "unknown part": (form("b", ("spec", b"{}"), ("extra", b"x")), 422, "invalid-request"),
    "two files": (form("b", ("spec", b"{}"), ("file", b"x"), ("file", b"x")), 422, "invalid-request"),
    "two specs": (form("b", ("spec", b"{}"), ("spec", b"{}")), 422, "invalid-request"),
    "spec is not JSON": (form("b", ("spec", b"{nonsense"), ("file", b"x")), 422, "invalid-request"),
    "huge spec": (form("b", ("spec", b" " * (2**20 + 1)), ("file", b"x")), 413, "too-large"),
    "no last boundary": (form("b", ("spec", b"{}"), ("file", b"x"), end=False), 400, "upload-incomplete"),
    "another boundary": (form("c", ("spec", b"{}")), 422, "invalid-request"),
    "part without a name": (b"--b\r\nX: y\r\n\r\nz\r\n--b--\r\n", 422, "invalid-request"),
    "empty body": (b"", 400, "upload-incomplete"),
}


@pytest.mark.parametrize("case", BAD_FORMS)
def test_bad_form_is_refused(service: Service, case: str) -> None:
    """A form with a missing or extra part or without an end is a problem."""
    body, status, kind = BAD_FORMS[case]
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    problem(service.client.post("/v1/probes", content=body, headers=headers), status, kind)


def test_another_media_type_is_refused(service: Service) -> None:
    """An upload that is neither a form nor a spec in JSON is a problem."""
    for kind in ("text/plain", "application/octet-stream", "application/jsonl", "json"):
        response = service.client.post("/v1/probes", content=b"{}", headers={"Content-Type": kind})
        problem(response, 415, "unsupported-media-type")
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        response = service.client.post("/v1/probes", content=b"{}", headers={"Content-Type": kind})
        problem(response, 422, "invalid-request")
    problem(service.client.post("/v1/probes", content=b""), 415, "unsupported-media-type")


@pytest.fixture(scope="module")
def small_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service that accepts files up to 100,000 bytes, and waits half a second for more of a body."""
    data_dir = tmp_path_factory.mktemp("small") / "data"
    with services.running(data_dir, max_upload_bytes="100000", upload_idle_seconds="0.5", command="api") as service:
        yield service


def test_file_over_the_limit_is_counted_while_it_streams(small_service: Service) -> None:
    """Without a Content-Length the limit applies as well, and the body is not read to its end first."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield form("b", ("spec", b'{"name": "a"}'), end=False)
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(64):
            sent += 2**16
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    body = problem(small_service.client.post("/v1/probes", content=endless(), headers=headers), 413, "too-large")
    assert body["limit_bytes"] == 100_000
    assert blobs(small_service) == set()


def test_file_over_the_limit_is_refused_by_its_announced_size(small_service: Service) -> None:
    """A body with a Content-Length over the limit is refused; the service then accepts a file of the limit's size."""
    problem(small_service.post("/v1/checkpoints", {"name": "a"}, bytes(2_000_000)), 413, "too-large")
    header = json.dumps({"a": tensor([24_900], 0, 99_600)}).encode().ljust(400 - 8)
    exact = safetensors_bytes(header, bytes(99_600))
    assert len(exact) == 100_000
    spec = {"name": "exact", "architecture": MLP}
    assert small_service.post("/v1/checkpoints", spec, exact).status_code == 201
    assert small_service.post("/v1/checkpoints", spec, exact + b"\0").status_code == 413


def raw_connection(service: Service) -> socket.socket:
    url = urlsplit(service.url)
    assert url.hostname is not None
    assert url.port is not None
    return socket.create_connection((url.hostname, url.port), timeout=20)


def begin_upload(connection: socket.socket, body: bytes, announced: int) -> None:
    connection.sendall(
        b"POST /v1/checkpoints HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        + f"Content-Length: {announced}\r\n\r\n".encode()
        + body
    )


def test_upload_cut_off_half_way_leaves_nothing(any_service: Service) -> None:
    """A connection that closes in the middle of a file leaves no blob and no row, and the service goes on."""
    before = blobs(any_service)
    spec = json.dumps({"name": "cut off", "architecture": MLP}).encode()
    body = form("b", ("spec", spec), ("file", bytes(3 * 2**20)))
    with raw_connection(any_service) as connection:
        begin_upload(connection, body[: len(body) // 2], len(body))
        until(lambda: blobs(any_service) - before)
    until(lambda: blobs(any_service) == before)
    assert any_service.client.get("/v1/checkpoints", params={"name": "cut off"}).json()["items"] == []


def test_upload_that_stalls_is_dropped(small_service: Service) -> None:
    """A client that sends nothing until the idle timeout receives a problem, and nothing is stored."""
    before = blobs(small_service)
    body = form("b", ("spec", b"{}"), ("file", bytes(50_000)))
    with raw_connection(small_service) as connection:
        begin_upload(connection, body[:30_000], len(body))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert b"upload-incomplete" in answer
    assert blobs(small_service) == before


def test_early_refusal_reaches_a_client_that_asks_to_continue(small_service: Service) -> None:
    """A client that waits for `100 Continue` is told that its file is too large before it sends any byte."""
    with raw_connection(small_service) as connection:
        connection.sendall(
            b"POST /v1/checkpoints HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
        )
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


def test_length_and_chunks_together_are_refused(service: Service) -> None:
    """Content-Length beside Transfer-Encoding, a way to smuggle requests, is refused."""
    with raw_connection(service) as connection:
        connection.sendall(
            b"POST /v1/probes HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_npz_with_flipped_bytes_is_a_probe_or_a_problem(service: Service) -> None:
    """Whatever byte of an npz is changed, the answer is 201 or 422, never a fault of the service."""
    good = npz(inputs=np.random.default_rng(0).normal(size=(40, 3)), labels=np.arange(40) % 4)
    changes = random.Random(0)
    answers = set()
    for _ in range(150):
        changed = bytearray(good)
        for _ in range(changes.randint(1, 3)):
            changed[changes.randrange(len(changed))] = changes.randrange(256)
        answers.add(service.post("/v1/probes", {"name": "fuzz"}, bytes(changed)).status_code)
    assert answers <= {201, 422}
    assert 422 in answers


def test_media_type_may_be_written_in_any_case(service: Service) -> None:
    """`Multipart/Form-Data` is the same type, also for a file over the size limit of JSON."""
    content = save({"inputs": np.zeros((40, 20_000), np.float32), "labels": np.arange(40) % 4})
    body = form("b", ("spec", b'{"name": "case"}'), ("file", content))
    headers = {"Content-Type": "Multipart/Form-Data; boundary=b"}
    assert service.client.post("/v1/probes", content=body, headers=headers).status_code == 201


def test_parts_may_come_in_any_order_and_any_slices(service: Service) -> None:
    """The file may come before the spec, and the body in slices of any size, boundaries cut in two included."""
    content = save({"inputs": INPUTS, "labels": labels(0, 1, 0, 1), "split": labels(0, 0, 1, 1)})
    body = form("b", ("file", content), ("spec", b'{"name": "slices"}'))
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    hashes = set()
    for size in (1, 7, len(body)):
        slices = (body[start : start + size] for start in range(0, len(body), size))
        response = service.client.post("/v1/probes", content=slices, headers=headers)
        assert response.status_code == 201, response.text
        hashes.add(response.json()["sha256"])
    assert len(hashes) == 1


def test_killed_service_leaves_no_process_and_after_its_restart_no_file(tmp_path: Path) -> None:
    """A service killed during an upload leaves no worker, no compute process, and until its restart a staged file."""
    spec = json.dumps({"name": "cut off", "architecture": MLP}).encode()
    body = form("b", ("spec", spec), ("file", bytes(3 * 2**20)))
    with services.running(tmp_path / "data") as service, raw_connection(service) as connection:
        family = [service.compute_child(), service.worker()]
        begin_upload(connection, body[: len(body) // 2], len(body))
        until(lambda: blobs(service))
        service.process.kill()
        service.process.wait()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
        assert blobs(service)
    with services.running(tmp_path / "data", command="api") as service:
        until(lambda: not blobs(service))
        assert service.client.get("/v1/checkpoints").json()["items"] == []

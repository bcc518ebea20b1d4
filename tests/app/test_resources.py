"""Checkpoints, probes and feature sets over HTTP: created, listed, shared blobs, deleted. On both databases."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from safetensors.numpy import save

from tests.app.api.test_uploads import blobs, problem
from tests.conftest import MLP
from tests.services import Service


def probe_bytes(seed: int, n: int = 12) -> bytes:
    """Return a small probe; another seed gives another file."""
    inputs = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    return save({"inputs": inputs, "labels": np.arange(n) % 3})


def unique(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex[:8]}"


def test_checkpoint_is_described(any_service: Service, mlp_checkpoint_file: Path) -> None:
    """A checkpoint's answer holds the sent values and those of its header, and its Location can be fetched."""
    metadata = {"run": "a", "epoch": 3, "tags": ["x", "y"], "final": True}
    spec = {"name": "mlp", "architecture": MLP, "metadata": metadata}
    response = any_service.post("/v1/checkpoints", spec, mlp_checkpoint_file)
    assert response.status_code == 201, response.text
    body = response.json()
    content = mlp_checkpoint_file.read_bytes()
    assert body["sha256"] == hashlib.sha256(content).hexdigest()
    assert body["size_bytes"] == len(content)
    assert body["n_parameters"] == 64 * 32 + 32 + 32 * 10 + 10
    assert body["architecture"] == MLP
    assert body["metadata"] == metadata
    assert body["head"] is None
    assert any_service.client.get(response.headers["Location"]).json() == body


def test_architecture_is_read_from_the_file(any_service: Service, mlp_checkpoint_file: Path) -> None:
    """Without an architecture in the spec, the file's own metadata names it."""
    response = any_service.post("/v1/checkpoints", {"name": "mlp"}, mlp_checkpoint_file)
    assert response.status_code == 201, response.text
    assert response.json()["architecture"] == MLP


def test_probe_is_described(any_service: Service, digits_probe_file: Path) -> None:
    """A probe answers with its counts, shapes and splits."""
    spec = {"name": "digits", "class_names": list("0123456789"), "preprocess": {"scale": 0.0625}}
    response = any_service.post("/v1/probes", spec, digits_probe_file)
    assert response.status_code == 201, response.text
    body = response.json()
    assert (body["n_samples"], body["n_classes"], body["input_shape"]) == (1797, 10, [64])
    assert body["class_counts"] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert body["splits"] == {"train": 1437, "test": 360}
    assert {name: body["preprocess"][name] for name in ("scale", "mean", "std", "resize", "crop")} == {
        "scale": 0.0625,
        "mean": 0.0,
        "std": 1.0,
        "resize": None,
        "crop": None,
    }
    assert (body["content"], body["format"]) == ("tensors", "safetensors")
    assert any_service.client.get(response.headers["Location"]).json() == body


def test_npz_probe_is_accepted(any_service: Service, tmp_path: Path) -> None:
    """An npz file is a probe as well, compressed or not."""
    arrays: dict[str, Any] = {"inputs": np.arange(24.0).reshape(4, 2, 3), "labels": np.array([0, 1, 1, 0])}
    for save_npz in (np.savez, np.savez_compressed):
        save_npz(tmp_path / "probe.npz", **arrays)
        response = any_service.post("/v1/probes", {"name": "npz"}, tmp_path / "probe.npz")
        assert response.status_code == 201, response.text
        assert response.json()["format"] == "npz"
        assert response.json()["input_shape"] == [2, 3]


def test_blob_is_reused_by_its_hash(any_service: Service) -> None:
    """`spec.sha256` instead of a file uses the stored blob; an unknown one is a 404."""
    first = any_service.post("/v1/probes", {"name": "first"}, probe_bytes(1)).json()
    second = any_service.post("/v1/probes", {"name": "second", "sha256": first["sha256"]})
    assert second.status_code == 201, second.text
    assert second.json()["id"] != first["id"]
    assert second.json()["sha256"] == first["sha256"]
    problem(any_service.post("/v1/probes", {"name": "third", "sha256": "0" * 64}), 404, "not-found")


def test_hash_beside_a_file_must_be_its_own(any_service: Service) -> None:
    """A file with another hash than its spec states is refused."""
    response = any_service.post("/v1/probes", {"name": "a", "sha256": "0" * 64}, probe_bytes(2))
    assert "sha256" in problem(response, 422, "invalid-file")["detail"]


def test_unknown_ids_are_404(any_service: Service) -> None:
    """An unknown id is a problem on every route that takes one."""
    client = any_service.client
    for collection in ("checkpoints", "probes", "feature-sets"):
        problem(client.get(f"/v1/{collection}/nothing"), 404, "not-found")
        problem(client.delete(f"/v1/{collection}/nothing"), 404, "not-found")
    problem(client.get("/v1/analyses/nothing"), 404, "not-found")
    problem(client.post("/v1/analyses/nothing/cancel"), 404, "not-found")
    problem(client.get("/v1/reports/nothing"), 404, "not-found")
    body = {"kind": "evaluation", "feature_set_id": "nothing"}
    problem(client.post("/v1/analyses", json=body), 404, "not-found")


def test_blob_goes_when_nothing_refers_to_it(any_service: Service) -> None:
    """Deleting the last of two resources that share a file removes the file; deleting the first does not."""
    content = probe_bytes(3)
    sha256 = hashlib.sha256(content).hexdigest()
    first, second = (any_service.post("/v1/probes", {"name": "shared"}, content).json() for _ in range(2))
    assert sum(path.name == sha256 for path in blobs(any_service)) == 1
    assert any_service.client.delete(f"/v1/probes/{first['id']}").status_code == 204
    assert any(path.name == sha256 for path in blobs(any_service))
    assert any_service.client.delete(f"/v1/probes/{second['id']}").status_code == 204
    assert not any(path.name == sha256 for path in blobs(any_service))
    problem(any_service.post("/v1/probes", {"name": "gone", "sha256": sha256}), 404, "not-found")
    problem(any_service.client.get(f"/v1/probes/{first['id']}"), 404, "not-found")


def test_uploads_and_deletions_of_one_file_do_not_meet(any_service: Service) -> None:
    """While several clients upload and delete one file repeatedly, existing resources always have their file."""
    content = probe_bytes(4)

    def churn(_: int) -> None:
        for _ in range(5):
            made = any_service.post("/v1/probes", {"name": "churn"}, content)
            assert made.status_code == 201, made.text
            again = any_service.post("/v1/probes", {"name": "churn", "sha256": made.json()["sha256"]})
            assert again.status_code == 201, again.text
            for body in (made.json(), again.json()):
                assert any_service.client.delete(f"/v1/probes/{body['id']}").status_code == 204

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    sha256 = hashlib.sha256(content).hexdigest()
    assert not any(path.name == sha256 for path in blobs(any_service))


def test_lists_are_filtered(any_service: Service) -> None:
    """Collections filter by name, metadata (lists match any entry, several filters combine) and time."""
    name = unique("filtered")
    specs = [{"epoch": 1, "tags": ["a", "b"]}, {"epoch": 2, "tags": ["b"]}, {"epoch": 2, "best": True}]
    made = [
        any_service.post("/v1/probes", {"name": name, "metadata": metadata}, probe_bytes(5)).json()
        for metadata in specs
    ]

    def listed(**params: Any) -> list[int]:
        response = any_service.client.get("/v1/probes", params={"name": name, **params})
        assert response.status_code == 200, response.text
        ids = [item["id"] for item in response.json()["items"]]
        return [index for index in (2, 1, 0) if made[index]["id"] in ids]

    assert listed() == [2, 1, 0]
    assert listed(metadata="epoch=2") == [2, 1]
    assert listed(metadata=["epoch=2", "tags=b"]) == [1]
    assert listed(metadata="best=true") == [2]
    assert listed(metadata="epoch=20") == []
    assert listed(created_after=made[1]["created_at"]) == [2, 1]
    assert listed(created_before=made[1]["created_at"]) == [0]
    problem(any_service.client.get("/v1/probes", params={"metadata": "epoch"}), 422, "invalid-request")
    problem(any_service.client.get("/v1/probes", params={"created_after": "2026-01-01T00:00"}), 422, "invalid-request")


def test_deleted_metadata_is_not_found(any_service: Service) -> None:
    """Metadata is deleted with its resource."""
    value = unique("value")
    made = any_service.post("/v1/probes", {"name": "m", "metadata": {"key": value}}, probe_bytes(6)).json()
    any_service.client.delete(f"/v1/probes/{made['id']}")
    assert any_service.client.get("/v1/probes", params={"metadata": f"key={value}"}).json()["items"] == []


@pytest.mark.timeout(600)
def test_pages_show_every_row_once_while_rows_arrive(any_service: Service) -> None:
    """Paging through 300 rows while others are added shows each of the 300 once, newest first."""
    name = unique("paged")
    sha256 = any_service.post("/v1/probes", {"name": "paged"}, probe_bytes(7)).json()["sha256"]

    def add(_: int) -> str:
        response = any_service.post("/v1/probes", {"name": name, "sha256": sha256})
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    with ThreadPoolExecutor(4) as pool:
        first = set(pool.map(add, range(300)))
    stop = threading.Event()

    def keep_adding() -> int:
        count = 0
        while not stop.is_set():
            add(0)
            count += 1
        return count

    seen: list[dict[str, Any]] = []
    cursor: str | None = None
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(keep_adding)
        try:
            while True:
                params: dict[str, Any] = {"limit": 11, "name": name, **({"cursor": cursor} if cursor else {})}
                page = any_service.client.get("/v1/probes", params=params).json()
                seen += page["items"]
                cursor = page["next_cursor"]
                if cursor is None:
                    break
        finally:
            stop.set()
        assert adding.result() > 0
    ids = [item["id"] for item in seen]
    assert len(ids) == len(set(ids))
    assert first <= set(ids)
    times = [item["created_at"] for item in seen]
    assert times == sorted(times, reverse=True)


def test_files_are_downloaded(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """What was pushed comes back byte by byte, whole or in parts, under a name that no browser takes for a path."""
    made = {
        "checkpoints": (
            service.post("/v1/checkpoints", {"name": "../a/\u202eb"}, mlp_checkpoint_file),
            mlp_checkpoint_file,
        ),
        "probes": (service.post("/v1/probes", {"name": "digits.safetensors"}, digits_probe_file), digits_probe_file),
    }
    for collection, (answer, file) in made.items():
        body, content = answer.json(), file.read_bytes()
        address = f"/v1/{collection}/{body['id']}/file"
        whole = service.client.get(address)
        assert (whole.status_code, whole.content) == (200, content)
        assert whole.headers["etag"] == f'"{body["sha256"]}"'
        assert whole.headers["content-type"] == "application/octet-stream"
        assert whole.headers["x-content-type-options"] == "nosniff"
        name = whole.headers["content-disposition"]
        assert name.startswith("attachment; filename")
        assert "/" not in name
        assert name.isascii()
        part = service.client.get(address, headers={"Range": f"bytes={len(content) - 5}-"})
        assert (part.status_code, part.content) == (206, content[-5:])
        beyond = service.client.get(address, headers={"Range": f"bytes={len(content)}-"})
        assert problem(beyond, 416, "range-outside")["size_bytes"] == len(content)
        problem(service.client.get(address, headers={"Range": "bytes=x"}), 422, "invalid-request")
    assert (
        'filename="digits.safetensors"'
        in service.client.get(f"/v1/probes/{made['probes'][0].json()['id']}/file").headers["content-disposition"]
    )
    problem(service.client.get(f"/v1/checkpoints/{uuid4()}/file"), 404, "not-found")


def test_lists_are_sorted_over_http(service: Service, mlp_checkpoint_file: Path) -> None:
    """Metadata that are numbers sort as numbers, and a part of a name finds; a wrong order names the right ones."""
    run = f"run {uuid4()}"
    for epoch in (9, 10, 1):
        spec = {"name": f"{run} Epoch {epoch}", "metadata": {"epoch": epoch}}
        assert service.post("/v1/checkpoints", spec, mlp_checkpoint_file).status_code == 201
    asked = {"search": f"{run} EPOCH", "sort": "metadata.epoch", "order": "asc"}
    items = service.client.get("/v1/checkpoints", params=asked).json()["items"]
    assert [item["metadata"]["epoch"] for item in items] == [1, 9, 10]
    first = service.client.get("/v1/checkpoints", params={"id": items[0]["id"][:13]}).json()["items"]
    assert [item["id"] for item in first] == [items[0]["id"]]
    refused = problem(service.client.get("/v1/checkpoints", params={"sort": "epoch"}), 422, "invalid-request")
    assert "metadata.KEY" in refused["detail"]
    problem(service.client.get("/v1/checkpoints", params={"id": "xyz"}), 422, "invalid-request")

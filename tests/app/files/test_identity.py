"""Data have one identity whatever their file: the content of the hash, and its uses."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from safetensors.numpy import save_file

from analysis.networks.loading import build
from app.database import make_engine
from app.descriptions.labels import named_labels
from app.files import identity
from app.files.datafile import Limits, detect, open_dataset
from app.files.tensorfile import inspect_npz, inspect_safetensors
from app.settings import Settings
from tests.conftest import MLP
from tests.datafiles import encoded, image_column, parquet, picture, zipped
from tests.services import Service

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(30, 64)).astype(np.float32)
TENSORS: dict[str, Any] = {
    "inputs": INPUTS,
    "labels": np.arange(30) % 10,
    "split": (np.arange(30) % 2).astype(np.uint8),
}


def npz(tensors: dict[str, Any], *, compressed: bool = False) -> bytes:
    """Return the arrays as numpy saves them."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **tensors)
    return buffer.getvalue()


def of_npz(content: bytes, folder: Path) -> str:
    """Return the identity of an npz."""
    (folder / "x.npz").write_bytes(content)
    return identity.hash_tensors(folder / "x.npz", inspect_npz(folder / "x.npz", max_bytes=10**9, max_ratio=1000))


def of_safetensors(tensors: dict[str, Any], folder: Path) -> str:
    """Return the identity of a safetensors file."""
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "x.safetensors")
    return identity.hash_tensors(folder / "x.safetensors", inspect_safetensors(folder / "x.safetensors"))


def test_the_hash_is_what_the_documentation_says(tmp_path: Path) -> None:
    """The hash equals one computed by hand: a sorted JSON text of names, types, shapes and hashes of bytes."""
    words = {"inputs": "F32", "labels": "I64", "split": "U8"}
    tensors = {
        name: {"dtype": words[name], "sha256": hashlib.sha256(array.tobytes()).hexdigest(), "shape": list(array.shape)}
        for name, array in TENSORS.items()
    }
    text = json.dumps({"format": "interplay-data-1", "tensors": tensors}, sort_keys=True, separators=(",", ":"))
    assert of_safetensors(TENSORS, tmp_path) == hashlib.sha256(text.encode()).hexdigest()


def test_arrays_are_the_same_in_every_container(tmp_path: Path) -> None:
    """Order of members, memory order, byte order and compression belong to the file and do not change the identity."""
    expected = of_safetensors(TENSORS, tmp_path)
    assert of_npz(npz(TENSORS), tmp_path) == expected
    assert of_npz(npz(TENSORS, compressed=True), tmp_path) == expected
    assert of_npz(npz(dict(reversed(TENSORS.items()))), tmp_path) == expected
    assert of_npz(npz({**TENSORS, "inputs": np.asfortranarray(INPUTS)}), tmp_path) == expected
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in TENSORS.items()}
    assert of_npz(npz(swapped), tmp_path) == expected
    assert of_npz(npz({**swapped, "inputs": np.asfortranarray(swapped["inputs"])}), tmp_path) == expected


@pytest.mark.parametrize("shape", [(3, 2**19), (2**19, 3), (5, 3, 2**17), (2, 2, 2, 2**18), (1, 2**20), (2**20, 1)])
def test_large_arrays_in_the_other_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Large arrays in the other memory order are hashed in parts, whichever dimension is long."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert of_npz(npz({"x": np.asfortranarray(array)}), tmp_path) == of_safetensors({"x": array}, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": INPUTS + 1},
        {"inputs": INPUTS.astype(np.float64)},
        {"inputs": INPUTS.reshape(30, 8, 8)},
        {"labels": (np.arange(30) + 1) % 10},
        {"labels": (np.arange(30) % 10).astype(np.int32)},
        {"split": np.zeros(30, np.uint8)},
        {"pixel_values": INPUTS},
    ],
    ids=["values", "type", "shape", "labels", "labels' type", "split", "a name"],
)
def test_other_arrays_are_other_data(tmp_path: Path, change: dict[str, Any]) -> None:
    """A difference that a network or a report would see changes the identity."""
    assert of_npz(npz({**TENSORS, **change}), tmp_path) != of_npz(npz(TENSORS), tmp_path)


def of_dataset(content: bytes, folder: Path, *, class_names: list[str] | None = None, **columns: str | None) -> str:
    """Return the identity of images or texts, with the labels that a probe of them has."""
    (folder / "dataset").write_bytes(content)
    limits = Limits.of(Settings(data_dir=folder))
    format = detect(folder / "dataset", limits)
    assert format is not None
    dataset = open_dataset(folder / "dataset", format, limits, columns)
    labels, names = dataset.labels, dataset.class_names
    if labels is not None:
        labels, names = named_labels(labels, names, class_names)
    return identity.hash_dataset(dataset, labels, names)


def test_images_are_the_same_in_every_container(tmp_path: Path) -> None:
    """A zip of folders and both Parquet layouts agree; another order, content, label, split or name differs."""
    contents = [encoded(picture(seed, 8, 8)) for seed in range(4)]
    names = {"label": ["cat", "dog"]}
    columns = {"image": image_column(contents), "label": [0, 0, 1, 1], "split": ["train", "test"] * 2}
    files = {
        f"{split}/{name}/{row}.png": contents[row]
        for row, (split, name) in enumerate(zip(["train", "test"] * 2, ["cat", "cat", "dog", "dog"], strict=True))
    }
    found = of_dataset(parquet(columns, names=names), tmp_path)
    assert of_dataset(parquet({**columns, "image": contents}, names=names), tmp_path) == found
    assert of_dataset(parquet({**columns, "label": ["cat", "cat", "dog", "dog"]}), tmp_path) == found
    assert of_dataset(zipped(files), tmp_path) == found
    others = [
        {**columns, "image": image_column(contents[::-1])},
        {**columns, "label": [0, 1, 1, 1]},
        {**columns, "split": ["train"] * 3 + ["test"]},
    ]
    changed = [of_dataset(parquet(other, names=names), tmp_path) for other in others]
    changed.append(of_dataset(parquet(columns, names={"label": ["cat", "eel"]}), tmp_path))
    changed.append(of_dataset(parquet(columns, names=names), tmp_path, class_names=["dog", "cat"]))
    assert len({found, *changed}) == 6


def test_texts_are_the_same_in_every_container(tmp_path: Path) -> None:
    """CSV, JSON lines and Parquet agree, with and without labels; labels or another column change the identity."""
    texts, labels = ["good", "bad, very", "ä"], ["pos", "neg", "pos"]
    lines = "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(texts, labels, strict=True)).encode()
    table = parquet({"sentence": texts, "other": texts[::-1], "label": labels})
    found = of_dataset(table, tmp_path)
    assert of_dataset(lines, tmp_path) == found
    assert of_dataset(b'text,label\ngood,pos\n"bad, very",neg\n\xc3\xa4,pos\n', tmp_path) == found
    assert len({found, of_dataset(lines, tmp_path, label=None), of_dataset(table, tmp_path, text="other")}) == 3


def pushed(service: Service, content: bytes, **spec: Any) -> dict[str, Any]:
    """Push a probe; return the service's description of it."""
    response = service.post("/v1/probes", {"name": "p", **spec}, content)
    assert response.status_code == 201, response.text
    return dict(response.json())


def test_a_probe_of_parquet_has_the_hash_of_its_texts(service: Service, tmp_path: Path) -> None:
    """A probe of Parquet has the hash of its texts, also if another process inspects the file."""
    content = parquet({"text": ["a", "b"], "label": [0, 1]})
    assert pushed(service, content)["data_sha256"] == of_dataset(content, tmp_path)


def test_a_damaged_npz_is_refused_at_the_upload(service: Service) -> None:
    """All of an npz is read at the upload, so damage that its headers do not show is refused."""
    large = np.arange(30 * 2**12, dtype=np.float32).reshape(30, -1)
    content = bytearray(npz({**TENSORS, "inputs": large}))
    content[content.index(large[29].tobytes())] ^= 255
    response = service.post("/v1/probes", {"name": "p"}, bytes(content))
    assert (response.status_code, "cannot be read" in response.json()["detail"]) == (422, True)


def test_reports_and_kept_features_go_by_the_data(service: Service, tmp_path: Path) -> None:
    """An npz and safetensors of equal arrays share baselines and cached features, which go with the last probe."""
    kept = service.data_dir / "blobs" / "features"
    before = {*kept.glob("*")}
    torch.manual_seed(0)
    torch_state = build(MLP, device="cpu").state_dict()
    save_file({name: tensor.numpy() for name, tensor in torch_state.items()}, tmp_path / "net")
    checkpoint = service.post("/v1/checkpoints", {"name": "n", "architecture": MLP}, tmp_path / "net").json()
    save_file(TENSORS, tmp_path / "probe")
    probes = [pushed(service, npz(TENSORS)), pushed(service, (tmp_path / "probe").read_bytes())]
    probes.append(pushed(service, npz({**TENSORS, "inputs": INPUTS * 2})))
    reports = []
    for probe in probes:
        body = {"checkpoint_id": checkpoint["id"], "probe_id": probe["id"], "options": {"null_permutations": 0}}
        reports.append(service.report(service.wait(service.analyze(**body)["id"])))
    assert [report["probe"]["data_sha256"] for report in reports] == [probe["data_sha256"] for probe in probes]
    assert [report["provenance"]["features_reused"] for report in reports] == [False, True, False]
    assert reports[0]["splits"] == reports[1]["splits"]
    gate = {"name": "g", "checks": [{"metric": "splits.all.accuracy", "min_change": 0}]}
    gate_id = service.client.post("/v1/gates", json=gate).json()["id"]
    verdicts = [
        service.client.post(
            f"/v1/reports/{report['id']}/gate", json={"gate_id": gate_id, "baseline_report_id": reports[0]["id"]}
        )
        for report in reports
    ]
    assert [verdict.status_code for verdict in verdicts] == [200, 200, 422]
    assert verdicts[1].json()["checks"][0]["status"] == "pass"
    assert verdicts[2].json()["differing"][0]["member"] == "probe.data_sha256"
    assert len({*kept.iterdir()} - before) == 2
    service.client.delete(f"/v1/probes/{probes[0]['id']}")
    assert len({*kept.iterdir()} - before) == 2
    service.client.delete(f"/v1/probes/{probes[1]['id']}")
    assert len({*kept.iterdir()} - before) == 1


def test_what_was_there_before_has_no_hash(service: Service, tmp_path: Path) -> None:
    """A probe without a hash is identified by its file, for reports and cached features, until it is pushed again."""
    torch_state = build(MLP, device="cpu").state_dict()
    save_file({name: tensor.numpy() for name, tensor in torch_state.items()}, tmp_path / "net")
    checkpoint = service.post("/v1/checkpoints", {"name": "n", "architecture": MLP}, tmp_path / "net").json()
    content = npz(TENSORS)
    probe, again = pushed(service, content), pushed(service, content)
    engine = make_engine(Settings(data_dir=service.data_dir))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE probes SET data_sha256 = NULL WHERE id = :id"), {"id": probe["id"]})
    engine.dispose()
    assert service.client.get(f"/v1/probes/{probe['id']}").json()["data_sha256"] is None
    found: list[dict[str, Any]] = []
    for id_ in (probe["id"], probe["id"], again["id"]):
        body = {"checkpoint_id": checkpoint["id"], "probe_id": id_, "options": {"null_permutations": len(found)}}
        found.append(service.report(service.wait(service.analyze(**body)["id"])))
    assert [report["provenance"]["features_reused"] for report in found] == [False, True, False]
    gate = {"name": "old", "checks": [{"metric": "splits.all.accuracy", "min_change": 0}]}
    gate_id = service.client.post("/v1/gates", json=gate).json()["id"]
    asked = {"gate_id": gate_id, "baseline_report_id": found[0]["id"]}
    assert service.client.post(f"/v1/reports/{found[2]['id']}/gate", json=asked).status_code == 200

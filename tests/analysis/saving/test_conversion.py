"""Pickles of torch.save to safetensors: kept tensors, listed rest, and nothing run."""

import argparse
import gzip
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict_saver as distributed
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from analysis.networks.loading import build, load_network
from analysis.saving.conversion import ConversionError, read_weights, write_safetensors

ARCHITECTURE = {"family": "builtin", "name": "mlp", "args": {"sizes": [4, 8, 3], "norm": "batch"}}


def saved(content: Any, path: Path, **how: Any) -> Path:
    """Return the content as torch.save writes it."""
    torch.save(content, path, **how)
    return path


def training_state() -> dict[str, Any]:
    """Return the content of a training script's file, after a step."""
    network = build(ARCHITECTURE, device="cpu")
    optimizer = torch.optim.AdamW(network.parameters())
    torch.autograd.backward(network(torch.randn(5, 4)).sum())
    optimizer.step()
    ema = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = network.state_dict()
    return {"epoch": 3, "model": state, "ema": ema, "optimizer": optimizer.state_dict(), "decay": torch.tensor(0.99)}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_a_state_dict_becomes_the_same_checkpoint(tmp_path: Path, legacy: bool) -> None:
    """Every tensor bit for bit, the architecture inside, and the network loads."""
    state = build(ARCHITECTURE, device="cpu").state_dict()
    path = saved(state, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    weights = read_weights(path)
    assert (weights.key, weights.left_out, weights.others) == ("", {}, [])
    write_safetensors(weights.tensors, out := tmp_path / "net.safetensors", architecture=ARCHITECTURE)
    written = load_file(out)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    with safe_open(out, framework="pt") as file:
        assert '"mlp"' in file.metadata()["architecture"]
    load_network(ARCHITECTURE, out, head=None, device="cpu")


def test_the_weights_are_found_in_a_training_state(tmp_path: Path) -> None:
    """Not the optimizer's, not the average; both are listed, and the average can be requested."""
    content = training_state()
    path = saved(content, tmp_path / "run.ckpt")
    weights = read_weights(path)
    assert weights.key == "model"
    assert weights.tensors.keys() == content["model"].keys()
    assert set(weights.left_out) == {"epoch", "ema", "optimizer", "decay"}
    assert weights.left_out["epoch"] == "int"
    assert "ema" in weights.others
    assert not any("optim" in name for name in weights.others)
    content["ema"]["head.weight"] += 1
    averaged = read_weights(saved(content, tmp_path / "run.ckpt"), key="ema")
    assert torch.equal(averaged.tensors["head.weight"], content["ema"]["head.weight"])


def test_a_nested_key_and_numbers_beside_the_weights(tmp_path: Path) -> None:
    """Dots separate levels; other values than tensors are listed by name."""
    content = {"student": {"backbone": OrderedDict(w=torch.ones(2, 2), version=7)}, "teacher": {"w": torch.zeros(9)}}
    path = saved(content, tmp_path / "x.pth")
    weights = read_weights(path, key="student.backbone")
    assert list(weights.tensors) == ["w"]
    assert weights.left_out == {"student.backbone.version": "int", "teacher": "dict of 1"}
    assert read_weights(path).key == "teacher"  # the most numbers, where no place is usual
    with pytest.raises(ConversionError, match=r"no weights under 'nobody'.*'student.backbone', 'teacher'"):
        read_weights(path, key="nobody")


class Leaves:
    """Its pickle creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    """The code of a pickle is not run; the weights are read, and the code is listed."""
    trace = tmp_path / "trace"
    weights = read_weights(saved({"model": {"w": torch.ones(1)}, "x": Leaves(trace)}, tmp_path / "evil.pt"))
    assert weights.tensors["w"].tolist() == [1]
    assert weights.left_out == {"x": "a call of what __builtin__.getattr gives"}
    with pytest.raises(ConversionError, match=r"holds no mapping from names to tensors"):
        read_weights(saved(Leaves(trace), tmp_path / "evil.bin"))
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Leaves(trace)))
    with pytest.raises(ConversionError):
        read_weights(tmp_path / "bare.pkl")
    assert not trace.exists()


STATE = {
    "w": torch.randn(3, 4),
    "t": torch.randn(2, 3).T,
    "half": torch.randn(5).half(),
    "bfloat": torch.randn(5).bfloat16(),
    "double": torch.randn(2, dtype=torch.float64),
    "complex": torch.randn(2, dtype=torch.complex64),
    "n": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "short": torch.tensor([1, 2], dtype=torch.uint16),
    "none": torch.zeros(0, 3),
    "repeated": torch.arange(3.0).expand(4, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_tensors_are_those_that_torch_reads(tmp_path: Path, legacy: bool, protocol: int) -> None:
    """Every type and layout, views of one storage, parameters with attributes and subclasses of dict."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "kept by hand"  # type: ignore[attr-defined]
    large = torch.randn(6, 4)
    state = OrderedDict(STATE | {"noted": parameter, "tied": STATE["w"], "rows": large[2:4], "columns": large[:, 1]})
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    path = saved(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    weights = read_weights(path)
    assert weights.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert weights.tensors[name].dtype == tensor.dtype
        assert torch.equal(weights.tensors[name], tensor)
    assert weights.tensors["w"].data_ptr() == weights.tensors["tied"].data_ptr()


def test_either_byte_order_is_read(tmp_path: Path) -> None:
    """A big-endian file, as torch itself reads it."""
    saved(STATE, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        widths = [tensor.dtype.itemsize // (2 if tensor.is_complex() else 1) for tensor in STATE.values()]
        for name in little.namelist():
            content = little.read(name)
            if "/data/" in name:
                width = widths[int(name.rpartition("/")[2])]
                content = np.frombuffer(content, f"u{width}").byteswap().tobytes()
            big.writestr(name, b"big" if name.endswith("/byteorder") else content)
    weights = read_weights(tmp_path / "big.pt")
    theirs = torch.load(tmp_path / "big.pt", weights_only=True)
    for name, tensor in STATE.items():
        assert torch.equal(weights.tensors[name], tensor)
        # torch itself leaves types whose storage says bytes as they are.
        assert name == "short" or torch.equal(weights.tensors[name], theirs[name])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_what_training_scripts_keep_is_named(tmp_path: Path, legacy: bool) -> None:
    """Entries of timm, Lightning and others: arguments, paths, times, scalars, types; a whole network."""
    content = {
        "state_dict": {"w": torch.ones(2)},
        "args": argparse.Namespace(lr=0.1, output=Path("out")),
        "hyper_parameters": {"root": Path("/data"), "when": datetime.now(UTC), "rate": np.float32(0.1)},
        "metric": np.float64(91.2),
        "array": np.zeros(3),
        "when": datetime.now(UTC),
        "dtype": torch.float32,
        "classes": {"cat"},
        "model": torch.nn.Linear(2, 2),
        3: "three",
    }
    weights = read_weights(saved(content, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=not legacy))
    assert (weights.key, list(weights.tensors)) == ("state_dict", ["w"])
    assert weights.left_out == {
        "args": "argparse.Namespace",
        "hyper_parameters": "dict of 3",
        "metric": "numpy scalar",
        "array": "numpy array",
        "when": "datetime.datetime",
        "dtype": "torch.float32",
        "classes": "set",
        "model": "torch.nn.modules.linear.Linear, a whole network",
        "3": "str",
    }


def test_tensors_without_plain_numbers(tmp_path: Path) -> None:
    """A meta tensor has no numbers and is listed; a sparse or quantised one has, and nothing is written."""
    state = {"w": torch.ones(2), "m": torch.empty(3, 4, device="meta")}
    weights = read_weights(saved(state, tmp_path / "x.pt"))
    assert (list(weights.tensors), weights.left_out) == (["w"], {"m": "meta tensor [3, 4], which has no numbers"})
    with pytest.raises(ConversionError, match=r"no plain tensor; 'm' is a meta tensor \[3, 4\]"):
        read_weights(saved({"state_dict": {"m": state["m"]}}, tmp_path / "x.pt"))
    for kind, tensor in (("sparse", torch.eye(3).to_sparse()), ("conjugated", torch.ones(2).to(torch.cfloat).conj())):
        with pytest.raises(ConversionError, match=f"'s' in 'x.pt' is a tensor, but {kind}"):
            read_weights(saved({"w": torch.ones(2), "s": tensor}, tmp_path / "x.pt"))


def _with_pickle(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Return the same file with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"K\x00K\x03K\x04\x86", b"K\x01K\x03K\x04\x86", "beyond its numbers"),
        (b"K\x03K\x04\x86", b"K\x04K\x04\x86", "beyond its numbers"),
        (b"K\x04K\x01\x86", b"K\x05K\x01\x86", "beyond its numbers"),
        (b"K\x04K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "damaged"),
        (b"K\x04K\x01\x86", b"K\x04\x85", "damaged"),
        (b"K\x0ctq", b"M\xff\xfftq", "lacks numbers"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "lacks the numbers"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00.", "lacks the numbers"),
        (b"ctorch\nFloatStorage", b"cposix\nFloatStorage", "unknown kind of numbers"),
        (b"K\x03K\x04\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", "damaged"),
    ],
)
def test_storages_are_not_read_beyond(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    """Offsets, sizes, strides and storages outside of the file are refused before reading."""
    path = saved({"w": torch.randn(3, 4)}, tmp_path / "x.pt")

    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    with pytest.raises(ConversionError, match=words):
        read_weights(_with_pickle(path, change))


def test_numbers_that_repeat_are_bounded(tmp_path: Path) -> None:
    """A tensor of strides 0 may announce any size; the bound follows from the size of the file."""
    path = saved({"w": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match="would have 4398046511104 bytes"):
        read_weights(path)


def test_a_distributed_checkpoint_is_put_together(tmp_path: Path) -> None:
    """A folder of torch.distributed.checkpoint, also of several processes, without a process group."""
    state = {"model": {"a.weight": torch.randn(6, 4), "b": torch.randn(5).bfloat16(), "n": torch.tensor(7)}}
    saved_state = {**state, "optimizer": {"state": {"0": {"exp_avg": torch.zeros(6, 4)}}}, "args": Path("x")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.save(saved_state, checkpoint_id=tmp_path / "run", no_dist=True)
    weights = read_weights(tmp_path / "run")
    assert weights.key == "model"
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in state["model"].items())
    assert weights.left_out == {"optimizer": "dict of 1", "args": "an object, which was not opened"}
    (tmp_path / "run" / "__0_0.distcp").rename(tmp_path / "run" / "away")
    with pytest.raises(ConversionError, match=r"'run' lacks __0_0.distcp: copy the \.distcp files of all processes"):
        read_weights(tmp_path / "run")


def _distributed(folder: Path, parts: Sequence[tuple[int, torch.Tensor]], relative: str = "__{}_0.distcp") -> Path:
    """Return a tensor (6, 2) in parts, each in the file of another process, as .metadata describes it."""
    folder.mkdir()
    chunks, places = [], {}
    for number, (first, part) in enumerate(parts):
        torch.save(part, folder / f"__{number}_0.distcp")
        n_bytes = (folder / f"__{number}_0.distcp").stat().st_size
        offset, size = torch.Size([first, 0]), part.shape
        chunks.append(ChunkStorageMetadata(offset, size))
        places[MetadataIndex("w", offset)] = _StorageInfo(relative.format(number), 0, n_bytes)
    properties = TensorProperties(torch.float32)
    entry = TensorStorageMetadata(properties, torch.Size([6, 2]), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, {"w": ("w",)}, places)))
    return folder


def test_parts_of_several_processes(tmp_path: Path) -> None:
    """Each part has its place; missing, overlapping or misplaced parts are refused."""
    whole = torch.arange(12.0).reshape(6, 2)
    good = _distributed(tmp_path / "good", [(0, whole[:2].clone()), (2, whole[2:].clone())])
    assert torch.equal(read_weights(good).tensors["w"], whole)
    for name, parts, relative, words in (
        ("missing", [(0, whole[:2].clone())], "__{}_0.distcp", "lacks a part of 'w'"),
        ("twice", [(0, whole[:3].clone()), (0, whole[:3].clone())], "__{}_0.distcp", "lacks a part of 'w'"),
        ("beyond", [(0, whole[:3].clone()), (4, whole[:3].clone())], "__{}_0.distcp", "reaches beyond it"),
        ("elsewhere", [(0, whole.clone())], "../good/__{}_0.distcp", "leads out of the folder"),
    ):
        with pytest.raises(ConversionError, match=words):
            read_weights(_distributed(tmp_path / name, parts, relative))


def test_a_hugging_face_folder_of_pickles(tmp_path: Path) -> None:
    """pytorch_model.bin, or the shards that its index names; a missing one is an error."""
    saved({"w": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    saved(OrderedDict(v=torch.zeros(3)), tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"w": "pytorch_model-00001-of-00002.bin", "v": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert {name: tensor.tolist() for name, tensor in read_weights(tmp_path).tensors.items()} == {
        "w": [1, 1],
        "v": [0, 0, 0],
    }
    (tmp_path / names["v"]).unlink()
    with pytest.raises(ConversionError, match=r"lacks 'pytorch_model-00002-of-00002.bin', one of 2 shards"):
        read_weights(tmp_path)
    saved({"all": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(read_weights(tmp_path).tensors) == ["all"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="is a folder, but neither"):
        read_weights(tmp_path / "empty")


def test_programs_and_other_files_get_one_true_sentence(tmp_path: Path) -> None:
    """TorchScript, torch.export, whole networks and other files; never cut short, without escape codes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script"))  # type: ignore[no-untyped-call]
    for legacy in (False, True):
        content = {"model": torch.nn.Sequential(torch.nn.Linear(2, 2)), "epoch": 3}
        saved(content, tmp_path / f"module {legacy}", _use_new_zipfile_serialization=not legacy)
    with zipfile.ZipFile(tmp_path / "exported", "w") as archive:
        archive.writestr("x/archive_format", "pt2")
    (tmp_path / "pointer").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    save_file({"w": torch.ones(1)}, tmp_path / "safetensors")
    saved({"\x1b[31m" + "k" * 5000: 1}, tmp_path / "long")
    (tmp_path / "packed").write_bytes(gzip.compress(b"x"))
    words = {
        "script": "is a TorchScript archive",
        "module False": "holds a whole network, an instance of 'torch.nn.modules.container.Sequential'",
        "module True": "holds a whole network, an instance of 'torch.nn.modules.container.Sequential'",
        "exported": "is an archive of torch.export",
        "pointer": "git lfs pull",
        "safetensors": "is safetensors already",
        "long": "its keys are",
        "packed": "is packed with gzip",
    }
    for name, said in words.items():
        with pytest.raises(ConversionError) as caught:
            read_weights(tmp_path / name)
        message = str(caught.value)
        assert said in message
        assert message.startswith(f"{name!r} ")
        assert message.endswith(".")
        assert message.isprintable()


@pytest.mark.parametrize(
    ("content", "words"),
    [({"epoch": 1}, "keys are 'epoch'"), ([torch.ones(1)], "list of 1"), ({}, "empty"), (torch.ones(2), "tensor")],
    ids=["no tensors", "a list", "nothing", "a tensor"],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any, words: str) -> None:
    """The message lists the content."""
    with pytest.raises(ConversionError, match=words):
        read_weights(saved(content, tmp_path / "x.pt"))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut", b"\x80\x02"])
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    """Any other bytes give the same kind of error."""
    (path := tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ConversionError):
        read_weights(path)


def test_tied_and_sliced_tensors_are_written_whole(tmp_path: Path) -> None:
    """Two names of one tensor and a view into a large one are written with exactly their own bytes."""
    large = torch.randn(1000, 10)
    tensors = {"a": large[:2], "b": large[:2], "c": large.T[:3]}
    write_safetensors(tensors, out := tmp_path / "x.safetensors")
    written = load_file(out)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert out.stat().st_size < 20_000
    with pytest.raises(ConversionError, match="sparse"):
        write_safetensors({"s": torch.eye(3).to_sparse()}, out)

"""Pickles of torch.save to safetensors: what is kept, what is named, and what is never run."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from analysis.conversion import ConversionError, read_weights, write_safetensors
from analysis.networks import build, load_network

ARCHITECTURE = {"family": "builtin", "name": "mlp", "args": {"sizes": [4, 8, 3], "norm": "batch"}}


def saved(content: Any, path: Path, **how: Any) -> Path:
    """The content as torch.save writes it."""
    torch.save(content, path, **how)
    return path


def training_state() -> dict[str, Any]:
    """What a training script saves beside its weights, after a step."""
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
    """Not the optimizer's, not the average; both are named, and the average can be asked for."""
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
    """Dots lead inwards; what is no tensor stays behind by name."""
    content = {"student": {"backbone": OrderedDict(w=torch.ones(2, 2), version=7)}, "teacher": {"w": torch.zeros(9)}}
    path = saved(content, tmp_path / "x.pth")
    weights = read_weights(path, key="student.backbone")
    assert list(weights.tensors) == ["w"]
    assert weights.left_out == {"student.backbone.version": "int", "teacher": "dict of 1"}
    assert read_weights(path).key == "teacher"  # the most numbers, where no place is usual
    with pytest.raises(ConversionError, match=r"no weights under 'nobody'.*'student.backbone', 'teacher'"):
        read_weights(path, key="nobody")


class Leaves:
    """Its pickle makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    """A pickle that would leave a trace leaves none, and the message says what to save instead."""
    trace = tmp_path / "trace"
    for name, content in (
        ("evil.pt", {"model": {"w": torch.ones(1)}, "x": Leaves(trace)}),
        ("evil.bin", Leaves(trace)),
    ):
        path = saved(content, tmp_path / name)
        with pytest.raises(ConversionError, match=r"model\.state_dict\(\)"):
            read_weights(path)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Leaves(trace)))
    with pytest.raises(ConversionError):
        read_weights(tmp_path / "bare.pkl")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [({"epoch": 1}, "keys are 'epoch'"), ([torch.ones(1)], "list of 1"), ({}, "empty"), (torch.ones(2), "tensor")],
    ids=["no tensors", "a list", "nothing", "a tensor"],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any, words: str) -> None:
    """The message lists what there is."""
    with pytest.raises(ConversionError, match=words):
        read_weights(saved(content, tmp_path / "x.pt"))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut", b"\x80\x02"])
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    """Whatever the bytes, one kind of error."""
    (path := tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ConversionError):
        read_weights(path)


def test_tied_and_sliced_tensors_are_written_whole(tmp_path: Path) -> None:
    """Two names of one tensor and a view into a large one: each as it is, and no more bytes than that."""
    large = torch.randn(1000, 10)
    tensors = {"a": large[:2], "b": large[:2], "c": large.T[:3]}
    write_safetensors(tensors, out := tmp_path / "x.safetensors")
    written = load_file(out)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert out.stat().st_size < 20_000
    with pytest.raises(ConversionError, match="sparse"):
        write_safetensors({"s": torch.eye(3).to_sparse()}, out)

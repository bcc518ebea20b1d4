"""Networks: builders, their mirror in app, and loading of checkpoints."""

import inspect
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from analysis.errors import AnalysisError
from analysis.networks import builtin
from analysis.networks.loading import build, expected_tensors, load_network
from app.descriptions import architectures

Architecture = dict[str, Any]


def _builtin(name: str, **args: Any) -> Architecture:
    return {"family": "builtin", "name": name, "args": args}


NETWORKS: dict[str, tuple[Architecture, tuple[int, ...]]] = {
    "mlp": (_builtin("mlp", sizes=[64, 32, 16, 10]), (8, 8)),
    "mlp-linear": (_builtin("mlp", sizes=[12, 3]), (12,)),
    "mlp-batch-gelu": (_builtin("mlp", sizes=[64, 32, 10], norm="batch", activation="gelu"), (1, 8, 8)),
    "mlp-layer-tanh": (_builtin("mlp", sizes=[64, 32, 10], norm="layer", activation="tanh"), (64,)),
    "cnn": (_builtin("cnn", n_classes=10), (3, 8, 8)),
    "cnn-none": (_builtin("cnn", n_classes=4, in_channels=1, channels=[4, 6], norm="none"), (1, 9, 7)),
    "cnn-layer": (_builtin("cnn", n_classes=4, in_channels=1, channels=[4], norm="layer"), (1, 8, 8)),
    "resnet18": (_builtin("resnet", n_classes=5, width=4), (3, 16, 16)),
    "resnet34": (_builtin("resnet", depth=34, n_classes=5, in_channels=1, width=2), (1, 9, 9)),
    "wide_resnet": (_builtin("wide_resnet", depth=10, widen_factor=1, n_classes=7), (3, 8, 8)),
    "wide_resnet-2": (_builtin("wide_resnet", depth=16, n_classes=7, in_channels=2), (2, 8, 8)),
}
SMALL = _builtin("mlp", sizes=[6, 5, 4], norm="batch")


def _trained(architecture: Architecture, seed: int = 0) -> nn.Module:
    """Return a network whose every tensor, including running statistics, differs from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    network = build(architecture, device="cpu")
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator) * 0.5
            tensor.add_(noise if name.endswith("running_var") else noise - 0.25)
        else:
            tensor.add_(7)
    return network.eval()


def _saved(tensors: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _inputs(shape: tuple[int, ...], n: int = 5) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))


def _error(*args: Any, head: str | None = None) -> AnalysisError:
    with pytest.raises(AnalysisError) as caught:
        load_network(*args, head=head, device="cpu")
    return caught.value


@pytest.mark.parametrize("name", sorted(builtin.BUILDERS))
def test_the_mirror_in_app_has_the_same_arguments_and_defaults(name: str) -> None:
    """Arguments that app checks without torch are those of the builders."""
    models = {model.model_fields["name"].annotation.__args__[0]: model for model in _models()}
    assert set(models) == set(builtin.BUILDERS) == set(builtin.HEADS)
    fields = models[name].model_fields["args"].annotation.model_fields
    parameters = inspect.signature(builtin.BUILDERS[name]).parameters
    assert list(fields) == list(parameters)
    for argument, field in fields.items():
        default = parameters[argument].default
        assert field.is_required() == (default is inspect.Parameter.empty)
        if not field.is_required():
            assert field.default == (list(default) if isinstance(default, tuple) else default)


def _models() -> tuple[Any, ...]:
    return (architectures.Mlp, architectures.Cnn, architectures.Resnet, architectures.WideResnet)


@pytest.mark.parametrize("key", NETWORKS)
def test_what_app_accepts_can_be_built(key: str) -> None:
    """A description with app's defaults filled in builds the same network as without."""
    architecture, _ = NETWORKS[key]
    assert expected_tensors(architectures.check_architecture(architecture)) == expected_tensors(architecture)


@pytest.mark.parametrize("key", NETWORKS)
def test_the_head_maps_features_to_logits(key: str, tmp_path: Path) -> None:
    """The head's inputs, times its rows, plus its bias, are the network's outputs."""
    architecture, shape = NETWORKS[key]
    path = _saved(_trained(architecture).state_dict(), tmp_path / "checkpoint")
    network = load_network(architecture, path, head=None, device="cpu")
    received: list[Tensor] = []
    head = network.module.get_submodule(network.head_name)
    head.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    logits = network.module(_inputs(shape))
    n_classes = network.weight.shape[0]
    assert logits.shape == (5, n_classes)
    assert received[0].shape == (5, network.weight.shape[1])
    assert network.bias is not None
    torch.testing.assert_close(received[0] @ network.weight.T + network.bias, logits)
    assert n_classes == architecture["args"].get("n_classes", (architecture["args"].get("sizes") or [0])[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("key", ["mlp-batch-gelu", "cnn", "resnet18", "wide_resnet"])
def test_a_stored_network_comes_back(key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every tensor is the stored one widened to float32, integers unchanged, and outputs agree with the original's."""
    architecture, shape = NETWORKS[key]
    original = _trained(architecture)
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in original.state_dict().items()}
    network = load_network(architecture, _saved(stored, tmp_path / "checkpoint"), head=None, device="cpu")
    loaded = network.module.state_dict()
    assert list(loaded) == list(stored)
    for name, tensor in stored.items():
        wide = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        assert loaded[name].dtype == wide.dtype, name
        assert torch.equal(loaded[name], wide), name
    original.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in stored.items()})
    inputs = _inputs(shape)
    torch.testing.assert_close(network.module(inputs), original(inputs).detach(), rtol=0, atol=0)


def test_a_loaded_network_is_ready_to_evaluate(tmp_path: Path) -> None:
    """It is in evaluation mode, has no gradients, and shares no memory with the file."""
    path = _saved(_trained(SMALL).state_dict(), tmp_path / "checkpoint")
    before = path.read_bytes()
    network = load_network(SMALL, path, head=None, device="cpu")
    assert not any(module.training for module in network.module.modules())
    assert not any(p.requires_grad for p in network.module.parameters())
    assert not network.weight.requires_grad
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    assert not bool(network.weight.any()), "weight is the module's own"


def test_batch_counters_are_no_matter(tmp_path: Path) -> None:
    """num_batches_tracked may be missing, or stored as a float."""
    tensors = _trained(SMALL).state_dict()
    counter = "norms.0.num_batches_tracked"
    without = {name: tensor for name, tensor in tensors.items() if name != counter}
    network = load_network(SMALL, _saved(without, tmp_path / "without"), head=None, device="cpu")
    assert int(network.module.state_dict()[counter]) == 0
    averaged = tensors | {counter: torch.tensor(7.0)}
    network = load_network(SMALL, _saved(averaged, tmp_path / "averaged"), head=None, device="cpu")
    value = network.module.state_dict()[counter]
    assert value.dtype == torch.int64
    assert int(value) == 7


def test_another_linear_module_can_be_the_head(tmp_path: Path) -> None:
    """The head may be named; a name without a linear module gives the candidates."""
    path = _saved(_trained(SMALL).state_dict(), tmp_path / "checkpoint")
    network = load_network(SMALL, path, head="layers.0", device="cpu")
    assert network.head_name == "layers.0"
    assert network.weight.shape == (5, 6)
    for name in ("classifier", "norms.0", "", "head.weight"):
        error = _error(SMALL, path, head=name)
        assert error.kind == "head-not-found"
        assert error.members["candidates"] == ["layers.0", "head"]


def test_a_mismatch_lists_names_and_shapes(tmp_path: Path) -> None:
    """Missing, unexpected, misshaped and mistyped tensors are all listed, with their numbers."""
    tensors = _trained(SMALL).state_dict()
    del tensors["head.bias"], tensors["norms.0.running_mean"]
    tensors |= {"extra": torch.zeros(1), "head.weight": torch.zeros(4, 6), "norms.0.bias": torch.zeros(5).long()}
    error = _error(SMALL, _saved(tensors, tmp_path / "checkpoint"))
    assert error.kind == "checkpoint-mismatch"
    assert error.members == {
        "missing": ["norms.0.running_mean", "head.bias"],
        "unexpected": ["extra"],
        "misshaped": [{"name": "head.weight", "expected": [4, 5], "found": [4, 6]}],
        "mistyped": [{"name": "norms.0.bias", "expected": "float32", "found": "I64"}],
        "n_missing": 2,
        "n_unexpected": 1,
        "n_misshaped": 1,
        "n_mistyped": 1,
    }
    json.dumps(error.members)


def test_a_long_mismatch_lists_twenty_of_each(tmp_path: Path) -> None:
    """Lists stop at 20 names; the numbers count all."""
    deep = _builtin("mlp", sizes=[4] * 40)
    tensors = {f"other.{i}": torch.zeros(1) for i in range(30)}
    tensors |= {f"layers.{i}.weight": torch.zeros(4, 5) for i in range(25)}
    members = _error(deep, _saved(tensors, tmp_path / "checkpoint")).members
    assert {key: len(members[key]) for key in ("missing", "unexpected", "misshaped")} == {
        "missing": 20, "unexpected": 20, "misshaped": 20,
    }  # fmt: skip
    assert (members["n_missing"], members["n_unexpected"], members["n_misshaped"]) == (2 * 39 - 25, 30, 25)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    """The error gives the first such tensor in the network's order, and their number; buffers count too."""
    tensors = _trained(SMALL).state_dict()
    tensors["norms.0.running_var"][3] = value
    error = _error(SMALL, _saved(tensors, tmp_path / "one"))
    assert error.kind == "non-finite-values"
    assert error.members == {"tensor": "norms.0.running_var", "n_tensors": 1}
    tensors["head.bias"][0] = value
    assert _error(SMALL, _saved(tensors, tmp_path / "two")).members == {"tensor": "norms.0.running_var", "n_tensors": 2}


def test_a_float64_value_beyond_float32_is_not_finite(tmp_path: Path) -> None:
    """A value too large for float32 is refused, not read as infinity."""
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in _trained(SMALL).state_dict().items()}
    tensors["head.weight"][0, 0] = 1e300
    assert _error(SMALL, _saved(tensors, tmp_path / "checkpoint")).members["tensor"] == "head.weight"


ABSURD = {
    "mlp": _builtin("mlp", sizes=[1_000_000] * 200),
    "cnn": _builtin("cnn", n_classes=1_000_000, channels=[1_000_000] * 50),
    "resnet": _builtin("resnet", depth=34, n_classes=1_000_000, width=1_000_000),
    "wide_resnet": _builtin("wide_resnet", depth=28, widen_factor=1000, n_classes=1_000_000),
    "deep": _builtin("wide_resnet", depth=604, widen_factor=1000, n_classes=1_000_000),
}
MEASURED = """
import json, resource, sys, time
from pathlib import Path
from analysis.errors import AnalysisError
from analysis.networks.loading import load_network
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, started = peak(), time.perf_counter()
try:
    load_network(json.loads(sys.argv[1]), Path(sys.argv[2]), head=None, device="cpu")
except AnalysisError as error:
    print(json.dumps([error.kind, peak() - before, time.perf_counter() - started]))
"""


@pytest.mark.parametrize("key", ABSURD)
def test_an_absurd_description_costs_nothing(key: str, tmp_path: Path) -> None:
    """10^12 parameters and more against a file of a few bytes: refused in seconds, with megabytes."""
    architecture = ABSURD[key]
    n_parameters = sum(torch.Size(shape).numel() for shape in expected_tensors(architecture).values())
    assert n_parameters > (1e12 if key != "wide_resnet" else 1e11)
    path = _saved({"head.weight": torch.zeros(2, 2)}, tmp_path / "checkpoint")
    arguments = [sys.executable, "-c", MEASURED, json.dumps(architecture), str(path)]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout
    kind, grown_bytes, seconds = json.loads(output)
    assert kind == "checkpoint-mismatch"
    assert grown_bytes < 50 * 2**20
    assert seconds < 4


def test_shapes_are_compared_before_a_byte_of_weights_is_read(tmp_path: Path) -> None:
    """A file with non-finite data is refused for its names first."""
    tensors = {"head.weight": torch.full((4, 5), float("nan"))}
    assert _error(SMALL, _saved(tensors, tmp_path / "checkpoint")).kind == "checkpoint-mismatch"


def _header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


BROKEN = {
    "empty": b"",
    "text": b"this is no tensor file, whatever its name says",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00",
    "announces a huge header": struct.pack("<Q", 2**60) + b"{}",
    "overlap": _header(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")},
        b"\0" * 4,
    ),
    "hole": _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    "cut short": _header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "unknown type": _header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "shape and bytes differ": _header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, b"\0" * 4),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_apart_from_a_bug(case: str, tmp_path: Path) -> None:
    """Errors of the library are a mismatch with a reason, never a bare exception."""
    path = tmp_path / "checkpoint"
    path.write_bytes(BROKEN[case])
    error = _error(SMALL, path)
    assert error.kind == "checkpoint-mismatch"
    assert error.members == {"reason": "unreadable"}


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "C64"])
def test_numbers_that_are_no_weights_are_a_mismatch(dtype: str, tmp_path: Path) -> None:
    """Types of less than a byte, bare exponents and complex numbers are refused by the header."""
    architecture = _builtin("mlp", sizes=[4, 4])
    bits = {"F4": 4, "F6_E2M3": 6, "F8_E8M0": 8, "C64": 64}[dtype]
    n_weight, n_bias = 16 * bits // 8, 4 * bits // 8
    entries = {
        "head.weight": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, n_weight]},
        "head.bias": {"dtype": dtype, "shape": [4], "data_offsets": [n_weight, n_weight + n_bias]},
    }
    path = tmp_path / "checkpoint"
    path.write_bytes(_header(entries, b"\0" * (n_weight + n_bias)))
    error = _error(architecture, path)
    assert error.kind == "checkpoint-mismatch"
    assert error.members["n_mistyped"] == 2


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"family": "builtin", "name": "mlp"},
        {"family": "builtin", "name": "mlp", "args": [1, 2]},
        {"family": "builtin", "name": ["mlp"], "args": {}},
        {"family": "builtin", "name": "mlp", "args": {"sizes": [2, 2]}, "more": 1},
        {"family": "os", "name": "system", "args": {}},
        {"family": "builtin", "name": "__import__", "args": {}},
        {"family": "builtin", "name": "Mlp", "args": {}},
        _builtin("mlp"),
        _builtin("mlp", sizes=[8]),
        _builtin("mlp", sizes=[8, 0, 2]),
        _builtin("mlp", sizes=[8, -1]),
        _builtin("mlp", sizes=[8, 2.5]),
        _builtin("mlp", sizes=[8, True]),
        _builtin("mlp", sizes=[8, "2"]),
        _builtin("mlp", sizes="88"),
        _builtin("mlp", sizes=8),
        _builtin("mlp", sizes=[2] * 201),
        _builtin("mlp", sizes=[2**62, 2**62]),
        _builtin("mlp", sizes=[2**70, 2]),
        _builtin("mlp", sizes=[8, 2], activation="swish"),
        _builtin("mlp", sizes=[8, 4, 2], norm="group"),
        _builtin("mlp", sizes=[8, 2], device="cpu"),
        _builtin("cnn", n_classes=2, channels=[]),
        _builtin("cnn", n_classes=2, channels=[1] * 51),
        _builtin("cnn", n_classes=2, norm=None),
        _builtin("cnn"),
        _builtin("resnet", n_classes=2, depth=50),
        _builtin("resnet", n_classes=2, depth=[18]),
        _builtin("resnet", n_classes=0),
        _builtin("wide_resnet", n_classes=2, depth=27),
        _builtin("wide_resnet", n_classes=2, depth=4),
        _builtin("wide_resnet", n_classes=2, depth=60_004),
    ],
)
def test_a_description_of_nothing_is_refused(architecture: Architecture) -> None:
    """Unknown families, names and arguments, and arguments out of bounds, have one kind."""
    with pytest.raises(AnalysisError) as caught:
        build(architecture)
    assert caught.value.kind == "invalid-architecture"
    assert caught.value.detail


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("mlp", (5, 63)),
        ("mlp", (5,)),
        ("cnn", (5, 1, 8, 8)),
        ("cnn", (5, 3, 7, 8)),
        ("cnn", (3, 8, 8)),
        ("resnet18", (5, 48)),
        ("wide_resnet", (5, 4, 8, 8)),
    ],
)
def test_inputs_of_another_shape_are_refused(key: str, shape: tuple[int, ...]) -> None:
    """The error gives the expected shape of samples instead of torch's words about matrices."""
    network = build(NETWORKS[key][0], device="cpu").eval()
    with pytest.raises(AnalysisError) as caught:
        network(torch.zeros(shape))
    assert caught.value.kind == "inputs-refused"
    assert caught.value.members == {"shape": list(shape[1:])}


def test_parameter_counts_are_the_papers() -> None:
    """ResNet-18 has the 11.2 million parameters known for CIFAR, WRN-28-10 36.5 million, WRN-40-4 8.9 million."""

    def millions(architecture: Architecture) -> float:
        return sum(parameter.numel() for parameter in build(architecture).parameters()) / 1e6

    assert millions(_builtin("resnet", n_classes=10)) == pytest.approx(11.173962, abs=1e-6)
    assert millions(_builtin("wide_resnet", widen_factor=10, n_classes=10)) == pytest.approx(36.479194, abs=1e-6)
    assert millions(_builtin("wide_resnet", depth=40, widen_factor=4, n_classes=10)) == pytest.approx(8.9, abs=0.1)


def test_resnet_names_are_torchvisions() -> None:
    """A checkpoint of torchvision's resnet18 with the small stem fits by name."""
    names = set(expected_tensors(_builtin("resnet", n_classes=10)))
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight"} <= names
    assert {"layer2.0.downsample.1.num_batches_tracked", "layer4.1.bn2.bias", "fc.weight", "fc.bias"} <= names
    assert len(names) == 122
    assert not any(name.startswith(("layer1.0.downsample", "layer2.1.downsample")) for name in names)


def test_normalisations_do_what_they_say() -> None:
    """Layer normalisation acts within a sample, batch normalisation across samples; no module follows the head."""
    inputs = _inputs((64,), 16)
    for norm, dimension in (("layer", 1), ("batch", 0)):
        network = build(_builtin("mlp", sizes=[64, 32, 10], norm=norm), device="cpu").train()
        normalised: list[Tensor] = []
        network.get_submodule("norms.0").register_forward_hook(lambda _, __, output, to=normalised: to.append(output))
        network(inputs)
        torch.testing.assert_close(
            normalised[0].mean(dimension), torch.zeros(16 if dimension else 32), atol=1e-5, rtol=0
        )
    image_norm = build(_builtin("cnn", n_classes=2, in_channels=1, channels=[4], norm="layer")).get_submodule("norms.0")
    assert isinstance(image_norm, nn.GroupNorm)
    assert image_norm.num_groups == 1
    assert image_norm.num_channels == 4


def test_build_on_a_device_is_seeded_by_torch() -> None:
    """On a real device the initialisation is reproducible; on meta no tensor has memory."""
    torch.manual_seed(3)
    first = build(SMALL, device="cpu")
    torch.manual_seed(3)
    second = build(SMALL, device="cpu")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert all(tensor.is_meta for tensor in build(SMALL).state_dict().values())


def test_wrappers_are_taken_off_and_tensors_beside_weights_left_out(tmp_path: Path) -> None:
    """The network is the same as from plain names; the tests of names cover every wrapper."""
    state = build(SMALL, device="cpu").state_dict()
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}
    beside = {"optimizer.exp_avg": torch.tensor([torch.nan]), "ema_model.head.bias": torch.ones(2)}
    path = _saved({**wrapped, **beside}, tmp_path / "wrapped")
    network = load_network(SMALL, path, head=None, device="cpu")
    loaded = network.module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert network.naming.prefix == "_orig_mod.module."
    assert network.naming.ignored == {"ema_model.": 1, "optimizer.": 1}
    with pytest.raises(AnalysisError) as caught:
        load_network(SMALL, path, head=None, device="cpu", prefix="ema_model.")
    assert caught.value.kind == "checkpoint-mismatch"

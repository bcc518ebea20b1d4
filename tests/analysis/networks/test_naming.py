"""Names of a file against a network's own: wrappers before and within them, further tensors, copies, ties."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torchvision.models.vision_transformer import MLPBlock

from analysis.errors import AnalysisError
from analysis.networks import builtin
from analysis.networks.naming import Entry, Naming, match_names
from analysis.networks.ties import Ties

CPU = torch.device("cpu")


State = dict[str, Tensor]


DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL", torch.float16: "F16"}


class Plain(nn.Module):
    """Layers, normalisation and a head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width)])
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)


class Net(nn.Module):
    """A network with a part named like a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Named(nn.Module):
    """Parts named like wrappers, copies and training's own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.model = nn.ModuleDict({"ema": nn.Linear(3, 3)})
        self.scaler = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("step", torch.tensor(3))


class Flat(nn.Module):
    """Tensors at the top, without any part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.head = nn.Linear(3, 2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"plain": Plain, "net": Net, "named": Named, "flat": Flat}


def state_of(network: nn.Module, seed: int = 0) -> State:
    """Return the network's tensors with random values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in network.state_dict().items()
    }


def behind(prefix: str, state: Mapping[str, Tensor]) -> State:
    """Return the same tensors with a prefix on each name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def within(infix: str, state: Mapping[str, Tensor], depth: int = 1) -> State:
    """Return the tensors with an infix after so many parts of each longer name."""

    def wrapped(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:depth], infix, *parts[depth:]]) if len(parts) > depth else name

    return {wrapped(name): tensor for name, tensor in state.items()}


def matched(network: nn.Module, state: State, prefix: str | None = None) -> tuple[State, Naming]:
    """Return the matched tensors by the network's own names, and the naming."""
    with torch.device("meta"):
        template = network.to("meta")
    header = {name: Entry(DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in state.items()}
    ties = Ties.of(template, builtin)
    stored, naming = match_names(
        template, builtin, header, ties, prefix=prefix, same=lambda a, b: torch.equal(state[a], state[b])
    )
    return {name: state[full] for name, full in stored.items()}, naming


def refused(call: Callable[[], Any]) -> AnalysisError:
    with pytest.raises(AnalysisError) as caught:
        call()
    assert caught.value.kind == "checkpoint-mismatch"
    return caught.value


COUNTER, FLAG, NUMBERS = torch.tensor(5), torch.tensor(True), torch.ones(3)


# What torch, Lightning, accelerate, DeepSpeed, ema-pytorch and PEFT make of a state: the prefix, and what is left out.
WRAPPED: dict[str, tuple[Callable[[State], State], str, dict[str, int]]] = {
    "bare": (dict, "", {}),
    "DataParallel, DDP, DeepSpeed": (lambda state: behind("module.", state), "module.", {}),
    "torch.compile": (lambda state: behind("_orig_mod.", state), "_orig_mod.", {}),
    "DDP of compiled": (lambda state: behind("module._orig_mod.", state), "module._orig_mod.", {}),
    "compiled DDP": (lambda state: behind("_orig_mod.module.", state), "_orig_mod.module.", {}),
    "AveragedModel": (
        lambda state: {"n_averaged": COUNTER, **behind("module.", state)}, "module.", {"n_averaged": 1}
    ),
    "AveragedModel of DDP": (
        lambda state: {"n_averaged": COUNTER, **behind("module.module.", state)}, "module.module.", {"n_averaged": 1}
    ),
    "FSDP": (lambda state: behind("_fsdp_wrapped_module.", state), "_fsdp_wrapped_module.", {}),
    "checkpoint_wrapper": (
        lambda state: behind("_checkpoint_wrapped_module.", state), "_checkpoint_wrapped_module.", {}
    ),
    "Lightning": (lambda state: behind("model.", state), "model.", {}),
    "Lightning with a loss": (
        lambda state: {**behind("model.", state), "criterion.weight": NUMBERS}, "model.", {"criterion.": 1}
    ),
    "Lightning with metrics": (
        lambda state: {
            **behind("model.", state), "train_acc.tp": COUNTER, "val.confusion": NUMBERS, "best": torch.tensor(0.5),
        },
        "model.",
        {"best": 1, "train_acc.": 1, "val.": 1},
    ),
    "DDP beside a loss": (
        lambda state: {**behind("module.", state), "criterion.weight": NUMBERS}, "module.", {"criterion.": 1}
    ),
    "Lightning's strategy": (lambda state: behind("_forward_module.model.", state), "_forward_module.model.", {}),
    "Fabric": (
        lambda state: {**behind("_forward_module.", state), **behind("_original_module.", state)},
        "_forward_module.",
        {"_original_module.": -1},
    ),
    "a LightningModule that is the network": (
        lambda state: {**state, "criterion.weight": NUMBERS, "train_acc.tp": COUNTER},
        "",
        {"criterion.": 1, "train_acc.": 1},
    ),
    "ema-pytorch": (
        lambda state: {**behind("ema_model.", state), "initted": FLAG, "step": COUNTER},
        "ema_model.",
        {"initted": 1, "step": 1},
    ),
    "averages beside weights": (
        lambda state: {**behind("model.", state), **behind("model_ema.module.", twice(state))},
        "model.",
        {"model_ema.": -1},
    ),
    "averages beside bare weights": (
        lambda state: {**state, **behind("ema_model.", twice(state))}, "", {"ema_model.": -1}
    ),
    "an optimizer's state": (
        lambda state: {**behind("state_dict.", state), "optimizer.0.exp_avg": NUMBERS, "optimizer.1.exp_avg": NUMBERS},
        "state_dict.",
        {"optimizer.": 2},
    ),
    "PEFT, merged": (lambda state: behind("base_model.model.", state), "base_model.model.", {}),
    "any other attribute": (lambda state: behind("student.backbone.", state), "student.backbone.", {}),
    "a sequence with what normalises": (
        lambda state: {"0.mean": NUMBERS, "0.std": NUMBERS, **behind("1.", state)}, "1.", {"0.": 2}
    ),
    "equal copies": (
        lambda state: {**behind("model.", state), **behind("student.", state)}, "model.", {"student.": -1}
    ),
    "a copy of another size": (
        lambda state: {**behind("a.", state), **behind("b.", {name: torch.cat([t, t]) if t.ndim else t
                                                              for name, t in state.items()})},
        "a.",
        {"b.": -1},
    ),
}  # fmt: skip


def twice(state: State) -> State:
    return {name: 2 * tensor for name, tensor in state.items()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_taken_off_by_what_the_network_names(wrapper: str, network: str) -> None:
    """For any wrapper around any network: its tensors, the prefix, and the number of further tensors."""
    state = state_of(NETWORKS[network]())
    wrap, prefix, ignored = WRAPPED[wrapper]
    found, naming = matched(NETWORKS[network](), wrap(state))
    assert found.keys() == state.keys()
    assert all(found[name] is tensor or torch.equal(found[name], tensor) for name, tensor in state.items())
    assert naming.prefix == prefix
    assert naming.infixes == {}
    # As many as the network has, where a whole copy is left out.
    assert naming.ignored == {name: len(state) if n == -1 else n for name, n in ignored.items()}
    assert naming.n_parameters == sum(
        tensor.numel() for name, tensor in state.items() if tensor.is_floating_point() and "running_" not in name
    )


@pytest.mark.parametrize(
    "infix", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "module"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_fsdp_wrapped_module."])
def test_parts_of_wrappers_within_names_are_taken_out(infix: str, prefix: str) -> None:
    """Around layers and around the network at once, around only some layers, and nested."""
    state = state_of(Plain())
    for depth in (1, 2):
        wrapped = within(infix, state, depth)
        found, naming = matched(Plain(), behind(prefix, wrapped))
        assert all(found[name] is tensor for name, tensor in state.items())
        assert (naming.prefix, naming.ignored) == (prefix, {})
        assert naming.infixes == {f"{infix}.": sum(name.count(".") >= depth for name in state)}
    nested = behind(prefix, within(infix, within("_orig_mod._checkpoint_wrapped_module", state, 2), 1))
    found, naming = matched(Plain(), nested)
    assert all(found[name] is tensor for name, tensor in state.items())
    assert set(naming.infixes) == {f"{infix}.", "_orig_mod.", "_checkpoint_wrapped_module."}


def test_torchs_own_wrappers() -> None:
    """Names from DataParallel, torch.compile, AveragedModel and a checkpointed layer themselves."""
    network = Plain()
    state = network.state_dict()
    averaged = AveragedModel(nn.DataParallel(network))
    compiled: Any = torch.compile(network, backend="eager")
    for wrapped, prefix in ((averaged, "module.module."), (compiled, "_orig_mod."), (nn.DataParallel(compiled), None)):
        found, naming = matched(Plain(), dict(wrapped.state_dict()))
        assert found.keys() == state.keys()
        assert naming.prefix == (prefix or "module._orig_mod.")
    part: Any = Plain()
    part.layers[0] = torch.compile(checkpoint_wrapper(part.layers[0]), backend="eager")
    names = {name: tensor.detach() for name, tensor in [*part.named_parameters(), *part.named_buffers()]}
    _, naming = matched(Plain(), names)
    assert naming.infixes == {"_orig_mod.": 2, "_checkpoint_wrapped_module.": 2}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("first", "second"),
    [("student.", "teacher."), ("model.", "net."), ("", "teacher."), ("online_model.", "ema_model."), ("ema.", "swa.")],
)
def test_a_guess_that_is_not_unique_shows_both(network: str, first: str, second: str) -> None:
    """Two complete sets that differ are an error that lists both; a given prefix chooses one."""
    state = state_of(NETWORKS[network]())
    both = {**behind(first, state), **behind(second, twice(state))}
    error = refused(lambda: matched(NETWORKS[network](), both))
    assert error.members["reason"] == "ambiguous"
    assert sorted(error.members["candidates"]) == sorted([first, second])
    for prefix, expected in ((first, state), (second, twice(state))):
        found, naming = matched(NETWORKS[network](), both, prefix)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert naming.prefix == prefix
        assert sum(naming.ignored.values()) == len(state)
    assert refused(lambda: matched(NETWORKS[network](), both, "other.")).members["n_missing"] > 0


def test_two_names_of_one_tensor_are_a_problem_where_they_differ() -> None:
    """One of them has a wrapper in the middle; equal ones are one tensor."""
    state = state_of(Plain())
    state["layers._orig_mod.0.weight"] = state["layers.0.weight"].clone()
    found, naming = matched(Plain(), state)
    assert found["layers.0.weight"] is state["layers.0.weight"]
    assert sum(naming.ignored.values()) == 1
    state["layers._orig_mod.0.weight"] += 1
    error = refused(lambda: matched(Plain(), state))
    assert error.members["candidates"] == ["layers.0.weight", "layers._orig_mod.0.weight"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "extra", ["layers.2.weight", "head.extra", "norm.weight_scale", "fc_norm.weight", "head.lora_A.weight"]
)
def test_weights_of_a_larger_network_are_a_mismatch(extra: str, prefix: str) -> None:
    """Tensors that would take part in another network's forward pass are never ignored."""
    error = refused(lambda: matched(Plain(), behind(prefix, {**state_of(Plain()), extra: NUMBERS})))
    assert error.members["unexpected"] == [prefix + extra]


def test_a_mismatch_is_told_of_the_best_place() -> None:
    """Missing tensors are listed for the prefix that holds most of the network."""
    state = behind("module.", state_of(Plain()))
    del state["module.head.bias"]
    error = refused(lambda: matched(Plain(), state))
    assert (error.members["missing"], error.members["n_unexpected"]) == (["head.bias"], 0)
    assert "'module.'" in error.detail
    error = refused(lambda: matched(Plain(), behind("module.", state_of(Plain(5)))))
    assert error.members["n_misshaped"] > 0
    assert error.members["n_missing"] == 0


def test_old_names_of_weight_norm_are_taken() -> None:
    """`weight_g` and `weight_v` become the names of the parametrisation, with any prefix, as in torch's loading."""
    network = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    state = state_of(network)
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }
    assert "0.weight_g" in old
    network.load_state_dict(old)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    for prefix in ("", "module."):
        found, naming = matched(network, behind(prefix, old))
        assert all(found[name] is tensor for name, tensor in state.items())
        assert (naming.prefix, naming.ignored) == (prefix, {})
        network = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))


def test_modules_rename_what_their_earlier_versions_saved() -> None:
    """torchvision's MLP of a vision transformer had `linear_1` and `linear_2`, and renames them when torch loads it."""
    network = nn.Sequential(MLPBlock(4, 8, 0.0), nn.Linear(4, 2))
    state = state_of(network)
    old = {name.replace("0.0.", "0.linear_1.").replace("0.3.", "0.linear_2."): t for name, t in state.items()}
    assert "0.linear_1.weight" in old
    found, naming = matched(network, behind("module.", old))
    assert found.keys() == state.keys()
    assert all(found[name] is tensor for name, tensor in state.items())
    assert (naming.prefix, naming.ignored) == ("module.", {})


def test_shared_tensors_that_differ_are_refused_where_no_library_parts_them() -> None:
    """For a network that uses one tensor twice, a file holds it once, or twice with equal values."""
    network = Plain()
    network.layers[0] = network.head
    with torch.device("meta"):
        ties = Ties.of(network.to("meta"), builtin)
    tensors = state_of(network)
    tensors["head.weight"], tensors["head.bias"] = tensors["layers.0.weight"].clone(), tensors["layers.0.bias"].clone()
    assert ties.untied(tensors) == []
    tensors["head.weight"] += 1
    error = refused(lambda: ties.untied(tensors))
    assert error.members["reason"] == "tied"


def test_what_is_left_out_is_summed_up() -> None:
    """Names are summed up by their beginnings, numbers as *; the rest of a long list is one number."""
    state = state_of(Plain())
    many = {f"beside{n}.weight": NUMBERS for n in range(60)}
    _, naming = matched(Plain(), {**behind("model.", state), **many})
    assert len(naming.ignored) == 51
    assert sum(naming.ignored.values()) == 60
    assert naming.ignored["*"] == 10


def test_names_without_end_cost_seconds() -> None:
    """Forty thousand names, each with its own prefix, and each as deep as allowed."""
    header = {f"{n}." * 20 + "weight": Entry("F32", [2, 3]) for n in range(20_000)}
    header |= {f"{n}.head.weight": Entry("F32", [2, 3]) for n in range(20_000)}
    with torch.device("meta"):
        network = Flat()
    error = refused(
        lambda: match_names(
            network, builtin, header, Ties.of(network, builtin), prefix=None, same=lambda one, other: False
        )
    )
    assert error.members["n_missing"] > 0

"""Two networks are the same function of their weights: descriptions may differ, outputs may not."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from analysis.errors import AnalysisError
from analysis.networks.loading import LoadedNetwork, _family, build
from analysis.sweeps.sameness import require_same_function

_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
    "hidden_act": "gelu", "id2label": {str(number): f"LABEL_{number}" for number in range(3)},
}  # fmt: skip
_IDS = torch.arange(24).reshape(4, 6) % 37 + 3
_IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ABSENT = "absent"


def _description(family: str, **args: Any) -> dict[str, Any]:
    match family:
        case "llama" | "bert":
            config = {**(_LLAMA if family == "llama" else _BERT), **args}
            return {"family": "transformers", "config": {k: v for k, v in config.items() if v is not ABSENT}}
        case "mlp":
            return {"family": "builtin", "name": "mlp", "args": {"sizes": [6, 8, 4], **args}}
        case "timm":
            return {
                "family": "timm",
                "name": "vit_tiny_patch16_224",
                "args": {"img_size": 32, "num_classes": 3, **args},
            }
    return {"family": family, "name": "resnet18", "args": {"num_classes": 3, **args}}


def _network(description: Mapping[str, Any], seed: int = 0) -> LoadedNetwork:
    torch.manual_seed(seed)
    module = build(description, device="cpu").eval().requires_grad_(False)
    return LoadedNetwork(module, str(_family(description).head(module, description)))


def _batch(family: str) -> Any:
    if family in ("llama", "bert"):
        return {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS)}
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) if family == "mlp" else _IMAGES


def _check(ours: dict[str, Any], theirs: dict[str, Any], family: str) -> None:
    first, second = _network(ours), _network(theirs, 1)
    before = {name: tensor.clone() for name, tensor in first.module.state_dict().items()}
    try:
        require_same_function(first, second, (ours, theirs), _batch(family))
    finally:
        # Nothing of all that was tried is left in the network that a path will move.
        assert all(torch.equal(before[name], tensor) for name, tensor in first.module.state_dict().items())


UNSEEN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_dropout": 0.1}),
    ("llama", {"eos_token_id": 6, "bos_token_id": 5, "pad_token_id": 7}),
    ("llama", {"initializer_range": 0.01, "task_specific_params": {"a": 1}}),
    ("llama", {"max_position_embeddings": 64}),
    ("llama", {"hidden_act": "silu", "num_key_value_heads": 2, "tie_word_embeddings": False}),
    ("llama", {"rms_norm_eps": ABSENT}),
    ("bert", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2}),
    ("bert", {"id2label": {"0": "cat", "1": "dog", "2": "fish"}}),
    ("bert", {"layer_norm_eps": 1e-12, "problem_type": "single_label_classification"}),
]
SEEN: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"rms_norm_eps": 1e-5}, ["architecture.config.rms_norm_eps"]),
    ("llama", {"rms_norm_eps": 1e-5, "attention_dropout": 0.1}, ["architecture.config.rms_norm_eps"]),
    ("llama", {"hidden_act": "gelu"}, ["architecture.config.hidden_act"]),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}, ["architecture.config.num_attention_heads"]),
    ("llama", {"vocab_size": 41}, ["architecture.config.vocab_size"]),
    ("llama", {"tie_word_embeddings": True}, ["architecture.config.tie_word_embeddings"]),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, ["rope_theta"]),
    ("bert", {"hidden_act": "gelu_new", "hidden_dropout_prob": 0.3}, ["architecture.config.hidden_act"]),
    ("bert", {"layer_norm_eps": 1e-6}, ["architecture.config.layer_norm_eps"]),
    ("bert", {"id2label": {str(number): f"LABEL_{number}" for number in range(4)}}, ["architecture.config.id2label"]),
    ("mlp", {"activation": "gelu"}, ["architecture.args.activation"]),
    ("mlp", {"sizes": [6, 9, 4]}, ["architecture.args.sizes"]),
]


@pytest.mark.parametrize(("family", "changed"), UNSEEN, ids=str)
def test_what_evaluation_does_not_see_does_not_count(family: str, changed: dict[str, Any]) -> None:
    """Dropout, ids of tokens, initialisation, a default spelled out or not, names other than LABEL_n."""
    _check(_description(family), _description(family, **changed), family)
    _check(_description(family, **changed), _description(family), family)


@pytest.mark.parametrize(("family", "changed", "members"), SEEN, ids=str)
def test_a_real_difference_is_refused_by_name(family: str, changed: dict[str, Any], members: list[str]) -> None:
    """Only the members that make the difference are listed, not other differences of the descriptions."""
    ours, theirs = _description(family), _description(family, **changed)
    with pytest.raises(AnalysisError) as caught:
        _check(ours, theirs, family)
    assert caught.value.kind == "architectures-differ"
    found = [one["member"] for one in caught.value.members["differing"]]
    assert len(found) == len(members) or family == "llama"
    assert all(any(member in name for name in found) for member in members)
    assert members[0].split(".")[-1] in caught.value.detail
    if len(found) == 1:
        one = caught.value.members["differing"][0]
        assert one["found"] != one["expected"]


def test_a_dropout_of_timm_and_torchvision_does_not_count() -> None:
    """Also if timm builds other modules for it; values used in forward do count."""
    for family, changed in (
        ("timm", {"drop_rate": 0.1, "attn_drop_rate": 0.1}),
        ("timm", {"drop_path_rate": 0.2}),
        ("torchvision", {"zero_init_residual": True}),
    ):
        _check(_description(family), _description(family, **changed), family)
    ours, theirs = _description("timm"), _description("timm", act_layer="gelu_tanh", drop_rate=0.1)
    with pytest.raises(AnalysisError) as caught:
        _check(ours, theirs, "timm")
    assert [one["member"] for one in caught.value.members["differing"]] == ["architecture.args.act_layer"]


def test_a_head_of_zeros_hides_nothing() -> None:
    """Random weights reveal an activation before it; large ones reveal weights that clip."""
    ours, theirs = _description("mlp"), _description("mlp", activation="gelu")
    first, second = _network(ours), _network(theirs, 1)
    for network in (first, second):
        network.module.get_parameter("head.weight").zero_()
    with pytest.raises(AnalysisError, match="activation is 'gelu' where A has"):
        require_same_function(first, second, (ours, theirs), _batch("mlp"))

    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval().requires_grad_(False)
    clipped = copy.deepcopy(module)
    clipped[1] = nn.ReLU6()
    with pytest.raises(AnalysisError, match=r"architecture\.clip"):
        require_same_function(
            LoadedNetwork(module, "2"), LoadedNetwork(clipped, "2"), ({}, {"clip": True}), _batch("mlp")
        )


def test_two_heads_are_named() -> None:
    """Also if one description names the head that is the other's default."""
    description = _description("mlp")
    first, second = _network(description), _network(description, 1)
    require_same_function(first, second, (description, description), _batch("mlp"))
    other = LoadedNetwork(second.module, "layers.0")
    with pytest.raises(AnalysisError, match=r"head is 'layers\.0' where A has 'head'"):
        require_same_function(first, other, (description, description), _batch("mlp"))

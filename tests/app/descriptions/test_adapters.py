"""Configurations of adapters: what decides the merged weights is kept, what is not built is refused by name."""

import json
from typing import Any

import pytest

from app.descriptions.adapters import check_adapter
from app.errors import InvalidFile, InvalidRequest


def config(**members: Any) -> dict[str, Any]:
    """Return an adapter_config.json as PEFT writes it, with some members of its own."""
    from peft import LoraConfig

    plain = LoraConfig(target_modules=["query"]).to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}
    return {**json.loads(json.dumps(written)), **members}


def test_what_peft_writes_is_taken_with_its_defaults() -> None:
    """PEFT's own defaults and an empty configuration of the kind are the same adapter."""
    expected = {
        "kind": "lora",
        "r": 8,
        "lora_alpha": 8.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["query"],
        "partial": False,
        "modules_to_save": [],
        "bias": "none",
    }
    assert check_adapter(config()) == expected
    assert check_adapter({"peft_type": "LORA"}) == {**expected, "target_modules": None}


@pytest.mark.parametrize(
    ("members", "kept"),
    [
        ({"use_rslora": True}, {"kind": "rslora", "use_rslora": True}),
        ({"use_rslora": True, "use_dora": True}, {"kind": "dora", "use_rslora": True, "use_dora": True}),
        ({"lora_alpha": 16}, {"lora_alpha": 16.0}),
        ({"target_modules": "all-linear"}, {"target_modules": None}),
        ({"target_modules": "(a+)+$"}, {"target_modules": None}),
        ({"layers_to_transform": 0}, {"partial": True}),
        ({"layers_to_transform": []}, {"partial": False}),
        ({"exclude_modules": "(a+)+$"}, {"partial": True}),
        ({"rank_pattern": {r"layers\.0\.q$": 4, "layers.0.q": 5}}, {"rank_pattern": {"layers.0.q": 4}}),
        ({"alpha_pattern": {"^layers.0.q": 3}}, {"alpha_pattern": {"^layers.0.q": 3.0}}),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, {}),
        ({"init_lora_weights": "gaussian", "task_type": "SEQ_CLS", "revision": "main"}, {}),
        ({"a_later_member": False, "another_one": {}, "a_third": None}, {}),
    ],
)
def test_what_decides_the_weights_is_kept(members: dict[str, Any], kept: dict[str, Any]) -> None:
    """Members that decide the merged weights are kept in one form; those without an effect leave no trace."""
    assert check_adapter(config(**members)) == {**check_adapter(config()), **kept}


@pytest.mark.parametrize(
    ("members", "adapter", "member"),
    [
        ({"peft_type": "IA3"}, "IA3", "peft_type"),
        ({"peft_type": "ADALORA"}, "ADALORA", "peft_type"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING", "peft_type"),
        ({"peft_type": None}, "None", "peft_type"),
        ({"peft_type": ["LORA"]}, "['LORA']", "peft_type"),
        ({"init_lora_weights": "pissa"}, "pissa", "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16", "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "olora", "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "corda", "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "loftq", "init_lora_weights"),
        ({"init_lora_weights": ["pissa"]}, "['pissa']", "init_lora_weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "LORA", "loftq_config"),
        ({"megatron_config": {"a": 1}}, "LORA", "megatron_config"),
        ({"use_qalora": True}, "LORA", "use_qalora"),
        ({"lora_bias": True}, "LORA", "lora_bias"),
        ({"trainable_token_indices": [0]}, "LORA", "trainable_token_indices"),
        ({"target_parameters": ["experts.w"]}, "LORA", "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "LORA", "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "LORA", "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1e-4}}, "LORA", "kasa_config"),
        ({"use_something_new": True}, "LORA", "use_something_new"),
        ({"x" * 1000: 1}, "LORA", "x" * 100),
    ],
)
def test_what_is_not_built_is_refused_by_name(members: dict[str, Any], adapter: str, member: str) -> None:
    """A kind or a member that makes another function of the base is refused with its name."""
    with pytest.raises(InvalidFile, match=member) as caught:
        check_adapter(config(**members))
    assert caught.value.members == {"adapter": adapter, "member": member}


def test_members_that_are_not_built_are_members_of_peft() -> None:
    """Every member that is refused or passed over by name is one that PEFT has, so that no name here is mistyped."""
    from peft import LoraConfig

    from app.descriptions import adapters

    known = {*LoraConfig(target_modules=["q"]).to_dict(), "runtime_config"}
    assert known == {*adapters._NOT_BUILT, *adapters._WITHOUT_EFFECT, *adapters._Config.model_fields}


@pytest.mark.parametrize(
    ("members", "place"),
    [
        ({"r": 0}, "adapter.r"),
        ({"r": 2**40}, "adapter.r"),
        ({"r": True}, "adapter.r"),
        ({"r": "8"}, "adapter.r"),
        ({"lora_alpha": float("nan")}, "adapter.lora_alpha"),
        ({"lora_alpha": float("inf")}, "adapter.lora_alpha"),
        ({"lora_alpha": None}, "adapter.lora_alpha"),
        ({"use_dora": 1}, "adapter.use_dora"),
        ({"rank_pattern": {"q": 0}}, "adapter.rank_pattern.q"),
        ({"rank_pattern": ["q"]}, "adapter.rank_pattern"),
        ({"rank_pattern": {str(n): 1 for n in range(12_000)}}, "adapter.rank_pattern"),
        ({"alpha_pattern": {"q": "8"}}, "adapter.alpha_pattern.q"),
        ({"target_modules": ["q", ""]}, "adapter.target_modules"),
        ({"target_modules": ["q\x00"]}, "adapter.target_modules"),
        ({"target_modules": ["\ud800"]}, "adapter.target_modules"),
        ({"modules_to_save": "classifier"}, "adapter.modules_to_save"),
        ({"modules_to_save": ["m"] * 2000}, "adapter.modules_to_save"),
        ({"bias": "some"}, "adapter.bias"),
    ],
)
def test_wrong_types_and_sizes_are_refused_with_their_place(members: dict[str, Any], place: str) -> None:
    """A member of another type or out of bounds is a problem of the request, at its place."""
    with pytest.raises(InvalidRequest) as caught:
        check_adapter(config(**members))
    assert ".".join(caught.value.members["errors"][0]["loc"]).startswith(place)


@pytest.mark.parametrize(
    "key", [".*", "(a+)+", "q|k", "layers.[0-9]+.q", "q)", "", "a..b", ".q", "q.", "^", "\\d", "q "]
)
@pytest.mark.parametrize("member", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_no_names_are_refused(member: str, key: str) -> None:
    """A regular expression as a key is refused with what it is, and never run."""
    with pytest.raises((InvalidFile, InvalidRequest), match=member):
        check_adapter(config(**{member: {key: 2}}))


def test_large_and_deep_configurations_are_refused_at_once() -> None:
    """More than 256 KiB of text, or nesting beyond Python's own limit, is refused without looking at the members."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for members in (
        {"eva_config": {"x": "y" * 2**18}},
        {"rank_pattern": {str(number): 1 for number in range(100_000)}},
        {"eva_config": deep},
    ):
        with pytest.raises(InvalidFile, match="adapter_config"):
            check_adapter({"peft_type": "LORA", **members})

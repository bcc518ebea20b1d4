"""Check an adapter_config.json of PEFT without torch: kinds that can be merged, types and bounds of their members.

What PEFT would do with a member decides. Those that only concern training are left out, and what changes the adapted
network in a way that is not built here is refused by name. Patterns must be plain names, as a regular expression from
a stranger is never run.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from app.errors import InvalidFile, invalid_request
from app.schemas.adapters import AdapterKind
from app.schemas.base import PLAIN_TEXT

MAX_CONFIG_BYTES = 2**18
_MAX_NAMES = 10_000
_MAX_SAVED = 100
_MAX_RANK = 2**20

# Ways to begin training that leave the base's weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Of the other ways: those that PEFT itself can save as plain low-rank adapters.
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
# Members that have no effect on merged weights.
_WITHOUT_EFFECT = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "lora_dropout", "lora_ga_config",
        "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    )
)  # fmt: skip
# Members that make an adapter another function than W + scale B A of its base, and what they are.
_NOT_BUILT: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA, which works on some of the tokens only",
    "arrow_config": "a mixture of adapters (Arrow)",
    "kasa_config": "KaSA, which changes the base's own weights",
    "layer_replication": "a network with some layers of its base several times",
    "loftq_config": "LoftQ, of a base with quantised weights",
    "lora_bias": "an adapter with biases of its own",
    "megatron_config": "an adapter of Megatron's layers",
    "monteclora_config": "MonteCLoRA, which draws weights at random",
    "target_parameters": "an adapter of parameters outside of modules",
    "trainable_token_indices": "an adapter with rows of the embedding trained by themselves",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA, of a base with quantised weights",
    "velora_config": "VeLoRA",
}
_PLAIN_NAME = re.compile(r"\^?[\w-]+(\\?\.[\w-]+)*\$?\Z", re.ASCII)

ModuleName = Annotated[str, Field(min_length=1, max_length=500, pattern=PLAIN_TEXT)]
Names = Annotated[list[ModuleName], Field(max_length=_MAX_NAMES)]
Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]


class _Config(BaseModel):
    """The members of an adapter_config.json that are used, with PEFT's defaults."""

    model_config = ConfigDict(extra="ignore", strict=True)

    r: Rank = 8
    lora_alpha: FiniteFloat = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Annotated[dict[ModuleName, Rank], Field(max_length=_MAX_NAMES)] | None = None
    alpha_pattern: Annotated[dict[ModuleName, FiniteFloat], Field(max_length=_MAX_NAMES)] | None = None
    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    layers_to_transform: Annotated[list[int], Field(max_length=_MAX_NAMES)] | int | None = None
    modules_to_save: Annotated[list[ModuleName], Field(max_length=_MAX_SAVED)] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"


def check_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an adapter_config.json decides the merged weights: an `Adapter` without its rank.

    Raises:
        InvalidFile: an adapter of a kind that is not built, by name in `adapter`, with the `member` that says so.
        InvalidRequest: members of wrong types or out of bounds.
    """
    try:
        size_bytes = len(json.dumps(config))
    except RecursionError:
        raise InvalidFile("adapter_config.json is nested too deeply.") from None
    if size_bytes > MAX_CONFIG_BYTES:
        raise InvalidFile(
            f"adapter_config.json has {size_bytes} bytes as text; at most {MAX_CONFIG_BYTES} are allowed.",
            limit_bytes=MAX_CONFIG_BYTES,
        )
    _refuse_what_is_not_built(config)
    try:
        checked = _Config.model_validate(dict(config))
    except ValidationError as error:
        raise invalid_request("adapter_config.json", error.errors(), prefix="adapter") from None
    kind: AdapterKind = "dora" if checked.use_dora else "rslora" if checked.use_rslora else "lora"
    targets = checked.target_modules
    return {
        "kind": kind,
        "r": checked.r,
        "lora_alpha": checked.lora_alpha,
        "use_rslora": checked.use_rslora,
        "use_dora": checked.use_dora,
        "rank_pattern": _plain_names("rank_pattern", checked.rank_pattern or {}),
        "alpha_pattern": _plain_names("alpha_pattern", checked.alpha_pattern or {}),
        "target_modules": sorted(targets) if isinstance(targets, list) else None,
        "partial": bool(checked.exclude_modules) or checked.layers_to_transform not in (None, []),
        "modules_to_save": checked.modules_to_save or [],
        "bias": checked.bias,
    }


def _refuse_what_is_not_built(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _not_built(str(kind)[:100], "peft_type", kind, "LoRA, rsLoRA and DoRA are merged here (peft_type LORA)")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        name = str(start)[:100]
        advice = "train it with a plain initialisation"
        if name.startswith(_CONVERTIBLE):
            advice = (
                "have PEFT save it as a plain one: save_pretrained(OUT, path_initial_model_for_weight_conversion="
                "INITIAL)"
            )
        reason = f"it is for a base whose own weights its initialisation changed; {advice}"
        raise _not_built(name, "init_lora_weights", start, reason)
    for member, value in sorted(config.items()):
        if not value or member in _WITHOUT_EFFECT or member in _Config.model_fields:
            continue
        what = _NOT_BUILT.get(member)
        reason = "the member is unknown here, and may change what the network computes" if what is None else what
        raise _not_built("LORA", member, value, reason)


def _not_built(adapter: str, member: str, found: Any, reason: str) -> InvalidFile:
    text = json.dumps(found)
    return InvalidFile(
        f"This adapter cannot be merged here: {member[:100]} of adapter_config.json is {text[:100]}: {reason}. Or "
        "merge it where torch is (merge_and_unload) and send the whole network.",
        adapter=adapter,
        member=member[:100],
    )


def _plain_names(member: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pattern by plain names, in its order; a `^` at the start stays, for a module's whole name."""
    names: dict[str, Any] = {}
    for key, value in pattern.items():
        if not _PLAIN_NAME.match(key):
            raise InvalidFile(
                f"{member} of adapter_config.json has the key {key[:100]!r}; it must be the name of a module or the "
                "end of one, perhaps after a ^: regular expressions are not run here. List the modules by name.",
                adapter="LORA",
                member=member,
            )
        # Of two keys for one name PEFT takes the first.
        names.setdefault(key.removesuffix("$").replace("\\", ""), value)
    return names

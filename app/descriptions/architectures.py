"""Check descriptions of networks without torch: names, types and bounds.

The parameters mirror the builders in analysis/networks/builtin.py (a test compares the two). Widths are cheap to
describe, and the file's content then bounds them. Depth is bounded here, since a description of many layers costs time
before its shapes can be compared with the file (measured: 50,000 blocks, 62 s).

For families whose networks a library describes, only the form is checked here: plain JSON of bounded size, no member
that points outside, no excessive number of layers. Only a worker can check whether the network exists.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from app.errors import InvalidRequest, invalid_request
from app.schemas.base import STORABLE

Width = Annotated[int, Field(ge=1, le=1_000_000)]
Norm = Literal["none", "batch", "layer"]

# The bounds of analysis/networks/building.py, and the size of a description as text: a configuration with the names of
# 20,000 classes has 600 KB.
MAX_DESCRIPTION_BYTES = 2**20
MAX_NESTING = 8
MAX_LIST = 4096
MAX_DEPTH = 100_000
DEPTH = re.compile(r"layer|depth|block|stage|repeat|expert", re.IGNORECASE)

# Members that analysis/networks/transformers.py, timm.py and torchvision.py refuse (tests compare).
FORBIDDEN_IN_CONFIGS = (
    "attribute_map", "auto_map", "backbone", "backbone_config", "backbone_kwargs", "base_config_key",
    "custom_pipelines", "extra_config_files", "extra_files", "quantization_config", "sub_configs_defaults",
    "trust_remote_code", "use_pretrained_backbone", "use_timm_backbone",
)  # fmt: skip
FORBIDDEN_IN_TIMM = (
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "features_only", "kwargs_filter",
    "model_cfg", "no_jit", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_custom_load",
    "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable",
)  # fmt: skip
FORBIDDEN_IN_TORCHVISION = ("pretrained", "pretrained_backbone", "progress", "weights", "weights_backbone")
# Members of a config.json that do not affect the function that a network computes. They are not kept: checkpoints that
# differ only in them have one architecture.
LEFT_OUT_OF_CONFIGS = (
    "attn_implementation", "dtype", "experts_implementation", "gradient_checkpointing", "label2id", "name_or_path",
    "output_attentions", "output_hidden_states", "return_dict", "torch_dtype", "torchscript", "transformers_version",
    "use_cache", "use_return_dict",
)  # fmt: skip


# How analysis/networks/transformers.py recognises a causal language model (a test compares).
CAUSAL_LM = re.compile(r"(ForCausalLM|LMHeadModel)\Z")


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MlpArgs(_Described):
    sizes: Annotated[list[Width], Field(min_length=2, max_length=200)]
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    norm: Norm = "none"


class CnnArgs(_Described):
    in_channels: Width = 3
    n_classes: Width
    channels: Annotated[list[Width], Field(min_length=1, max_length=50)] = [32, 64, 128]
    norm: Norm = "batch"


class ResnetArgs(_Described):
    depth: Literal[18, 34] = 18
    n_classes: Width
    in_channels: Width = 3
    width: Width = 64


class WideResnetArgs(_Described):
    depth: Annotated[int, Field(ge=10, le=604)] = 28
    widen_factor: Annotated[int, Field(ge=1, le=1000)] = 2
    n_classes: Width
    in_channels: Width = 3

    @model_validator(mode="after")
    def _whole_blocks(self) -> "WideResnetArgs":
        if (self.depth - 4) % 6:
            raise ValueError("depth must be 6k + 4 (10, 16, 22, 28, ...)")
        return self


class Mlp(_Described):
    family: Literal["builtin"]
    name: Literal["mlp"]
    args: MlpArgs


class Cnn(_Described):
    family: Literal["builtin"]
    name: Literal["cnn"]
    args: CnnArgs


class Resnet(_Described):
    family: Literal["builtin"]
    name: Literal["resnet"]
    args: ResnetArgs


class WideResnet(_Described):
    family: Literal["builtin"]
    name: Literal["wide_resnet"]
    args: WideResnetArgs


def _check_plain(value: Any, name: str = "", nesting: int = 0) -> None:
    if nesting > MAX_NESTING:
        raise ValueError(f"objects and lists are nested {MAX_NESTING} deep at most")
    if isinstance(value, dict | list):
        if isinstance(value, list) and len(value) > MAX_LIST:
            raise ValueError(f"{name} has {len(value)} entries; at most {MAX_LIST} are allowed")
        entries = value.items() if isinstance(value, dict) else ((name, entry) for entry in value)
        for key, entry in entries:
            _check_plain(entry, str(key), nesting + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value) or abs(value) > 2**53:
            raise ValueError(f"{name} must be a finite number below 2^53")
    elif isinstance(value, str) and not STORABLE.match(value):
        raise ValueError(f"{name} holds characters that cannot be stored")
    if not isinstance(value, dict) and DEPTH.search(name) and _sum(value) > MAX_DEPTH:
        raise ValueError(f"{name} asks for {_sum(value):g} layers; at most {MAX_DEPTH} are allowed")


def _sum(value: Any) -> float:
    if isinstance(value, list):
        return sum(map(_sum, value))
    return abs(value) if isinstance(value, int | float) else 0


def _plain(description: dict[str, Any]) -> dict[str, Any]:
    _check_plain(description)
    size_bytes = len(json.dumps(description))
    if size_bytes > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"it has {size_bytes} bytes as text; at most {MAX_DESCRIPTION_BYTES} are allowed")
    return description


def _config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the relevant members of a config.json, checked."""
    return _plain(_without_what_is_left_out(config))


def _without_what_is_left_out(config: dict[str, Any], nesting: int = 0) -> dict[str, Any]:
    if forbidden := sorted(name for name in FORBIDDEN_IN_CONFIGS if config.get(name)):
        raise ValueError(f"the members {', '.join(forbidden)} of a configuration are not allowed")
    return {
        name: _without_what_is_left_out(value, nesting + 1)
        if isinstance(value, dict) and name != "id2label" and nesting < MAX_NESTING
        else value
        for name, value in config.items()
        if not name.startswith("_") and name not in LEFT_OUT_OF_CONFIGS and name not in FORBIDDEN_IN_CONFIGS
    }


def _without(forbidden: tuple[str, ...]) -> AfterValidator:
    def check(args: dict[str, Any]) -> dict[str, Any]:
        if found := sorted(set(args) & set(forbidden)):
            raise ValueError(f"the arguments {', '.join(found)} are not allowed: weights come from the checkpoint")
        return args

    return AfterValidator(check)


RegistryName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_.-]+$")]


class Transformers(_Described):
    """A classifier or causal language model of Hugging Face transformers, by its own config.json."""

    family: Literal["transformers"]
    config: Annotated[dict[str, Any], AfterValidator(_config)]

    @model_validator(mode="after")
    def _names_a_class(self) -> "Transformers":
        match self.config:
            case {"model_type": str(), "architectures": [str()]}:
                return self
        raise ValueError("config needs a model_type and, in architectures, the name of one class")


class Timm(_Described):
    """timm.create_model(name, **args), without weights."""

    family: Literal["timm"]
    name: RegistryName
    args: Annotated[dict[str, Any], AfterValidator(_plain), _without(FORBIDDEN_IN_TIMM)] = {}


class Torchvision(_Described):
    """torchvision.models.get_model(name, weights=None, **args)."""

    family: Literal["torchvision"]
    name: RegistryName
    args: Annotated[dict[str, Any], AfterValidator(_plain), _without(FORBIDDEN_IN_TORCHVISION)] = {}


class Custom(_Described):
    """A network of the operator's own, which a package on the worker declares under `interplay.networks`."""

    family: Literal["custom"]
    name: RegistryName
    args: Annotated[dict[str, Any], AfterValidator(_plain)] = {}


class GraphInput(_Described):
    """An input of an exported network; null for a dimension that may vary."""

    name: str
    dtype: str
    shape: list[int | None]


class Exported(_Described):
    """A network that torch.export wrote as a graph, which lies in the file of its weights.

    The service makes this description from the file: nobody writes it by hand.
    """

    family: Literal["exported"]
    graph: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    inputs: Annotated[list[GraphInput], Field(min_length=1, max_length=64)]
    logits: list[int | None]
    n_nodes: int


Builtin = Annotated[Mlp | Cnn | Resnet | WideResnet, Field(discriminator="name")]
Architecture = Annotated[Builtin | Transformers | Timm | Torchvision | Custom | Exported, Field(discriminator="family")]
_adapter: TypeAdapter[Any] = TypeAdapter(Architecture)


def check_architecture(description: Any) -> dict[str, Any]:
    """Return the description with defaults filled in, and without members that do not affect the network.

    Raises:
        InvalidRequest: a member is unknown, missing or out of bounds; names its path in the description.
    """
    try:
        checked: dict[str, Any] = _adapter.validate_python(description).model_dump(mode="json")
    except ValidationError as error:
        raise invalid_request("The architecture", error.errors(), prefix="architecture") from None
    return checked


def is_causal_lm(architecture: Mapping[str, Any]) -> bool:
    """Return whether a description is of a causal language model, whose classes are tokens."""
    match architecture:
        case {"family": "transformers", "config": {"architectures": [str(name)]}}:
            return CAUSAL_LM.search(name) is not None
        case {"family": "exported", "inputs": [*inputs], "logits": [_, _, _]}:
            # Logits of each token, from whole numbers, one for each.
            return any(one["dtype"] == "int64" and len(one["shape"]) == 2 for one in inputs)
    return False


def architecture_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the description in a folder's config.json: from transformers, from timm, or in our own form.

    Raises:
        InvalidRequest: it names no known family.
    """
    match config:
        case {"family": str()}:
            return config
        case {"model_type": str()}:
            return {"family": "transformers", "config": config}
        case {"architecture": str(name)}:
            args = config.get("model_args") or {}
            classes = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
            return {"family": "timm", "name": name, "args": {**classes, **args}}
    raise InvalidRequest(
        "config.json names neither a model_type, as transformers' do, nor an architecture, as timm's do; give the "
        "spec an 'architecture'."
    )

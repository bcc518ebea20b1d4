"""Networks of Hugging Face transformers, built only from their own config.json.

The configuration class is the one that the library registers for `model_type`. The network class is one of those that
it registers for this type, for image or sequence classification or causal language modelling: no `auto_map`, no
`from_pretrained`, no hub. Members that name places, devices, number types or implementations are left out, so that
every network computes in float32 with the library's own attention.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..errors import AnalysisError
from .building import MAX_CLASSES, check_plain, name_of, refused, require_classes

#: Members that point outside of the configuration or describe weights that are not those of the plain network.
FORBIDDEN = (
    "attribute_map", "auto_map", "backbone", "backbone_config", "backbone_kwargs", "base_config_key",
    "custom_pipelines", "extra_config_files", "extra_files", "quantization_config", "sub_configs_defaults",
    "trust_remote_code", "use_pretrained_backbone", "use_timm_backbone",
)  # fmt: skip
# Members that do not affect the function of a network, or that request another output than its logits.
_LEFT_OUT = frozenset(
    (
        "architectures", "attn_implementation", "dtype", "experts_implementation", "gradient_checkpointing", "label2id",
        "model_type", "name_or_path", "output_attentions", "output_hidden_states", "return_dict", "torch_dtype",
        "torchscript", "transformers_version", "use_cache", "use_return_dict",
    )
)  # fmt: skip
#: Pattern of the class names of causal language models; other registered classes also take images or sound, or are
#: decoders of something else. A test compares it with the one in app/descriptions/architectures.py.
CAUSAL_LM = re.compile(r"(ForCausalLM|LMHeadModel)\Z")
# Model types whose networks are timm's own, fetched by name; the family `timm` builds them.
_ELSEWHERE = ("timm_wrapper",)


def create(description: Mapping[str, Any]) -> nn.Module:
    """Build a network from `{"config": {...}}` that maps a batch to logits; a language model gives them at each token.

    It takes one tensor, or a mapping of tensors by their names in the library's own `forward`, such as input_ids and
    attention_mask.

    Raises:
        AnalysisError: `invalid-architecture`; errors of the library itself, of any type.
    """
    config = description["config"]
    check_plain(config)
    model_type, name = config.get("model_type"), _class_name(config)
    values = _cleaned(config)
    if isinstance(values.get("num_labels"), int) and values["num_labels"] > MAX_CLASSES:
        raise refused(f"num_labels is {values['num_labels']}; at most {MAX_CLASSES} are allowed")
    parsed = CONFIG_MAPPING[model_type](**values)
    if not CAUSAL_LM.search(name):
        require_classes(parsed.num_labels)
        if parsed.problem_type == "regression":
            raise refused("The configuration's problem_type is a regression; a classifier is needed")
    # Nothing is generated, so the results of earlier positions need not be cached.
    parsed.use_cache = False
    network: nn.Module = getattr(transformers, name)(parsed)
    _take_batches(network, "pixel_values" if "ImageClassification" in name else "input_ids")
    return network


def try_imports() -> None:
    """Trigger the library's lazy imports, for one network of texts and one of images."""
    for model_type, name in (("llama", "LlamaForCausalLM"), ("vit", "ViTForImageClassification")):
        _ = CONFIG_MAPPING[model_type], getattr(transformers, name)


def predicts_tokens(network: nn.Module) -> bool:
    """Return whether it is a causal language model."""
    return CAUSAL_LM.search(type(network).__name__) is not None


def head(network: nn.Module, description: Mapping[str, Any]) -> str | None:
    """Return the last linear module with an output for each label, or a language model's output embedding; or None."""
    config: Any = network.config
    if predicts_tokens(network):
        model: Any = network
        return name_of(network, model.get_output_embeddings())
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == config.num_labels
    ]
    return names[-1] if names else None


def stored_names(network: nn.Module) -> Callable[[str], str]:
    """Return a function that converts a name of a saved file into the network's own, as the library's loading does.

    The library saves some networks, such as Swin, under names of earlier versions, and loads still older ones.
    """
    mapping = get_model_conversion_mapping(network)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = network.state_dict(), network.base_model_prefix

    def rename(stored: str) -> str:
        """Return the network's name of a stored tensor."""
        name, converter = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            return stored
        if converter is not None:
            raise AnalysisError(
                "checkpoint-mismatch",
                f"The library merges or splits the stored tensor {stored!r} when it loads it, which this service does "
                "not. Load it with the library and save `model.state_dict()` instead.",
                reason="conversion",
            )
        return str(name)

    return rename


def leaves_out(network: nn.Module) -> Callable[[str], bool]:
    """Return a function that tells whether the library would ignore a further tensor; it only warns of unknown ones.

    Examples are heads of other tasks, and buffers of its earlier versions. Tensors within a layer of the network are
    not ignored, except a bias: adapters and scales of quantised weights mean that the layer computes something else.
    """
    # As in the library's loading: constants that earlier versions saved, under names that have changed since.
    known: Any = network._keys_to_ignore_on_load_unexpected
    patterns = [*(known or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)bias$"]
    expected = re.compile("|".join(f"({pattern})" for pattern in patterns))
    layers = {f"{name}." for name, module in network.named_modules() if module._parameters and not module._modules}

    def passes_over(name: str) -> bool:
        """Return whether the library ignores a further tensor of this name."""
        within = any(name[: at + 1] in layers for at, character in enumerate(name) if character == ".")
        return not within or expected.search(name) is not None

    return passes_over


def ties(network: nn.Module) -> dict[str, str]:
    """Return the ties of the library's configuration, name to source; it keeps them unless a file's tensors differ."""
    model: Any = network
    return dict(model.all_tied_weights_keys)


def _class_name(config: Mapping[str, Any]) -> str:
    """Return the network's class name, if the library registers it for this model type and one of the three tasks."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    known = [
        *_registered(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, model_type),
        *_registered(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, model_type),
        *filter(CAUSAL_LM.search, _registered(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, model_type)),
    ]
    if not known:
        raise refused(
            f"transformers {transformers.__version__} has no image or sequence classifier, and no causal language "
            f"model, for the model_type {model_type!r}"
        )
    match architectures:
        case [str(name)] if name in known:
            return name
    raise refused(f"architectures must be a list of one of {', '.join(known)}, not {architectures!r}")


def _registered(mapping: Mapping[str, Any], model_type: Any) -> list[str]:
    """Return the class names that the library registers for a model type and a task."""
    names = mapping.get(model_type, ()) if isinstance(model_type, str) and model_type not in _ELSEWHERE else ()
    return [names] if isinstance(names, str) else list(names)


def _cleaned(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the members that are left out, also in nested configurations."""
    if forbidden := sorted(name for name in FORBIDDEN if config.get(name)):
        raise refused(f"The members {', '.join(forbidden)} of a configuration are not allowed")
    return {
        name: _cleaned(value) if isinstance(value, dict) and name != "id2label" else value
        for name, value in config.items()
        if name not in _LEFT_OUT and name not in FORBIDDEN and not name.startswith("_")
    }


def _take_batches(network: nn.Module, single: str) -> None:
    """Let the network take one batch and return its logits, without changing the names of its modules."""
    names = [name for name in inspect.signature(network.forward).parameters if name not in ("labels", "kwargs")]

    def spread(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn the one batch into keyword arguments of the network."""
        if len(args) != 1:
            return args, kwargs
        batch = dict(args[0]) if isinstance(args[0], Mapping) else {single: args[0]}
        if unknown := sorted(set(batch) - set(names)):
            raise AnalysisError(
                "inputs-refused",
                f"{type(network).__name__} takes {', '.join(names)}; the probe also has {', '.join(unknown)}.",
                unknown=unknown,
            )
        if "input_ids" in batch:
            batch["input_ids"] = _whole(batch["input_ids"])
            if predicts_tokens(network):
                _require_positions(network, batch["input_ids"])
        return (), {**batch, **kwargs}

    network.register_forward_pre_hook(spread, with_kwargs=True)
    network.register_forward_hook(lambda _, __, output: getattr(output, "logits", output))
    for name, module in network.named_modules():
        # Not its subclasses: some take other arguments than row indices.
        if type(module) is nn.Embedding:
            module.register_forward_pre_hook(_within(name))


def _require_positions(network: Any, ids: Tensor) -> None:
    """Refuse sequences beyond the network's positions, on which networks with rotary positions would still compute."""
    positions, length = getattr(network.config, "max_position_embeddings", None), ids.shape[-1]
    if isinstance(positions, int) and length > positions:
        raise AnalysisError(
            "inputs-refused",
            f"The sequences have {length} tokens, padding included; the network has positions for {positions}.",
            n_tokens=length,
            n_positions=positions,
        )


def _whole(ids: Tensor) -> Tensor:
    if not ids.is_floating_point():
        return ids
    whole = ids.long()
    # A probe's plain `inputs` are float32, in which every id below 2^24 is exact.
    if type(ids) is Tensor and not bool((whole == ids).all()):
        raise AnalysisError("inputs-refused", "The inputs must be token ids, which are whole numbers.")
    return whole


def _within(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
    """Return a hook that checks indices of an embedding, as an index out of range would end a GPU's whole process."""

    def check(module: Any, args: tuple[Any, ...]) -> None:
        """Raise an error for an index without a row."""
        indices = args[0] if args else None
        # While a network is traced, its tensors have no values.
        if type(indices) is not Tensor or indices.is_meta or indices.numel() == 0:
            return
        low, high = (int(value) for value in torch.aminmax(indices))
        rows = module.num_embeddings
        if low < 0 or high >= rows:
            raise AnalysisError(
                "inputs-refused",
                f"The embedding {name!r} has {rows} rows; the inputs ask for {low if low < 0 else high}.",
                embedding=name,
                rows=rows,
            )

    return check

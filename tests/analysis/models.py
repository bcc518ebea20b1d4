"""Tiny classifiers of transformers, timm and torchvision, saved as their libraries save them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis.probes.inputs import Inputs
from analysis.probes.probe import Probe

N_CLASSES = 4
# Samples of most probes.
N = 7
PAD = 1

_IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
_TEXT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 20, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_BART = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20,
    "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip

# The class, before "For...Classification", and its configuration beside the number of classes.
IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "ViT": _IMAGE,
    "DeiT": _IMAGE,
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
    "Beit": {**_IMAGE, "use_relative_position_bias": True},
    "Levit": {
        "image_size": 32,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
    },
    "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 32},
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 320},
}
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "Bert": _TEXT,
    "DistilBert": {
        "vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20,
        "pad_token_id": PAD,
    },
    "Roberta": _TEXT,
    "GPT2": {
        "vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "pad_token_id": PAD,
        "bos_token_id": 0, "eos_token_id": 2,
    },
    "Llama": {**_TEXT, "num_key_value_heads": 1},
    "Bart": _BART,
}  # fmt: skip
# The class of each, and its configuration. Of most the output embedding is the input's, and is not stored.
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2LMHeadModel", TEXT_MODELS["GPT2"]),
    "Llama": ("LlamaForCausalLM", {**TEXT_MODELS["Llama"], "tie_word_embeddings": False}),
    "Llama, tied": ("LlamaForCausalLM", {**TEXT_MODELS["Llama"], "tie_word_embeddings": True}),
    "OPT": (
        "OPTForCausalLM",
        {
            "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
            "max_position_embeddings": 20, "word_embed_proj_dim": 16, "pad_token_id": PAD,
        },
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", {**_TEXT, "tie_word_embeddings": False}),
    "GPTNeo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
            "max_position_embeddings": 20, "attention_types": [[["global", "local"], 1]], "window_size": 6,
            "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
        },
    ),
    "GPTJ": (
        "GPTJForCausalLM",
        {
            "vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "rotary_dim": 4,
            "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False,
        },
    ),
    "Qwen2": ("Qwen2ForCausalLM", {**TEXT_MODELS["Llama"], "tie_word_embeddings": True}),
    "Mistral": ("MistralForCausalLM", {**TEXT_MODELS["Llama"], "sliding_window": 6}),
    # An encoder's class, whose config makes it look back alone; its head has a bias.
    "Bert": ("BertLMHeadModel", {**_TEXT, "is_decoder": True}),
}  # fmt: skip
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "depths": [1, 2], "embed_dim": 24, "num_heads": [1, 2], "window_size": 4,
    },
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    # Its head is a 1x1 convolution.
    "resnetv2_50x1_bit": {},
}  # fmt: skip
TORCHVISION_MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenet_v2": {},
    # Dropout and an activation before its last linear module.
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "shufflenet_v2_x0_5": {},
    # Computes its widths with tensors, and warns where nothing says whether to sample initial weights.
    "regnet_y_400mf": {},
    "googlenet": {},
}


@dataclass(frozen=True)
class Saved:
    """A model in its library, and the files that a client would send.

    Attributes:
        architecture: the description.
        path: safetensors.
        library: returns the library's own logits of a batch by name.
    """

    architecture: dict[str, Any]
    path: Path
    library: Callable[[Mapping[str, Tensor]], Tensor]


def images(n: int, side: int = 32) -> dict[str, Tensor]:
    """Return random pixels."""
    return {"pixel_values": torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))}


def texts(n: int) -> dict[str, Tensor]:
    """Return ids of 3 to 9 tokens, an end token and padding, and the mask of them."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 50, (n, 10), generator=generator)
    lengths = torch.randint(3, 10, (n,), generator=generator)
    places = torch.arange(10)
    ids[places == lengths[:, None]] = 2
    ids[places > lengths[:, None]] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def saved_transformers(name: str, config: Mapping[str, Any], folder: Path, *, change: Any = None) -> Saved:
    """Save a classifier with random weights by `save_pretrained`, and load it again by `from_pretrained`."""
    task = "ImageClassification" if name in IMAGE_MODELS else "SequenceClassification"
    cls = _class_of_transformers(f"{name}For{task}")
    return _saved_pretrained(cls, cls.config_class(**config, num_labels=N_CLASSES), folder, change)


# The libraries take seconds to import: each process of the tests imports only those that its tests use.
def _class_of_transformers(name: str) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, name)


def _saved_pretrained(cls: Any, config: Any, folder: Path, change: Any) -> Saved:
    model = cls(config)
    at_random(model)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    library = cls.from_pretrained(folder).eval()
    description = {"family": "transformers", "config": json.loads((folder / "config.json").read_text())}
    return Saved(description, folder / "model.safetensors", torch.no_grad()(lambda batch: library(**batch).logits))


def saved_language_model(name: str, folder: Path, *, change: Any = None) -> Saved:
    """Save a causal language model with random weights by `save_pretrained`, and load it again."""
    class_name, config = LANGUAGE_MODELS[name]
    cls = _class_of_transformers(class_name)
    return _saved_pretrained(cls, cls.config_class(**config), folder, change)


def saved_timm(name: str, args: Mapping[str, Any], folder: Path) -> Saved:
    """Save a network of timm with random weights."""
    import timm

    return _saved("timm", name, args, timm.create_model(name, num_classes=N_CLASSES, **args), folder)


def saved_torchvision(name: str, args: Mapping[str, Any], folder: Path) -> Saved:
    """Save a network of torchvision with random weights."""
    import torchvision

    quiet = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=N_CLASSES, **args, **quiet)
    return _saved("torchvision", name, args, model, folder)


def _saved(family: str, name: str, args: Mapping[str, Any], model: nn.Module, folder: Path) -> Saved:
    at_random(model)
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    description = {"family": family, "name": name, "args": {"num_classes": N_CLASSES, **args}}
    return Saved(description, path, torch.no_grad()(lambda batch: model(batch["pixel_values"])))


def at_random(model: nn.Module) -> None:
    """Move every parameter and running statistic away from its initial value, without dead or exploding layers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            middle = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + middle)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    model.eval()


def labelled(inputs: Inputs, n: int = N) -> Probe:
    """Return a probe of n inputs with N_CLASSES classes in turn."""
    return Probe(inputs, torch.arange(n) % N_CLASSES, None, N_CLASSES, None)

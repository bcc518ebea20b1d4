"""Adapters as PEFT saves them, and the merged networks that PEFT makes of them."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from analysis.networks.adapters import Adapter
from analysis.networks.loading import build
from app import schemas
from app.descriptions.adapters import check_adapter
from tests.analysis.models import Saved
from workers.compute.context import mathematical


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter of a saved network.

    Attributes:
        folder: with adapter_config.json and adapter_model.safetensors.
        merged: returns the logits of the network that PEFT merges from both.
        beside: returns those of PEFT's network with the adapter beside its base, as it was trained.
    """

    folder: Path
    merged: Callable[[Mapping[str, Tensor]], Tensor]
    beside: Callable[[Mapping[str, Tensor]], Tensor]

    @property
    def path(self) -> Path:
        """The tensors."""
        return self.folder / "adapter_model.safetensors"

    @property
    def config(self) -> dict[str, Any]:
        """The configuration."""
        return dict(json.loads((self.folder / "adapter_config.json").read_text()))


def saved_adapter(
    saved: Saved, folder: Path, *, seed: int = 0, spread: float = 0.1, task: str | None = None, **config: Any
) -> SavedAdapter:
    """Save an adapter with random weights, and have PEFT merge what was saved into the network that was saved.

    Args:
        saved: the network.
        folder: where the adapter is saved.
        seed: of the adapter's weights.
        spread: of what is added to the weights with which an adapter begins.
        task: PEFT's type of task, which may add modules to save.
        config: arguments of LoraConfig.
    """
    # Seconds to import: each process of the tests imports it only where its tests use it.
    import peft

    with warnings.catch_warnings():
        # Of embeddings, of transformers' next version, of layers that it sets right: no business of these tests.
        warnings.simplefilter("ignore")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(library_model(saved), peft.LoraConfig(task_type=task, **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
        adapted.save_pretrained(str(folder))
        beside = peft.PeftModel.from_pretrained(library_model(saved), folder).eval()
        merged = peft.PeftModel.from_pretrained(library_model(saved), folder).merge_and_unload().eval()
    return SavedAdapter(
        folder,
        torch.no_grad()(lambda batch: _logits(merged, saved, batch)),
        torch.no_grad()(lambda batch: _logits(beside, saved, batch)),
    )


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """Return an adapter's configuration as the service takes it from adapter_config.json, and hands it on."""
    return mathematical(schemas.Adapter.model_validate({**check_adapter(config), "rank": 1}))


def library_model(saved: Saved) -> nn.Module:
    """Return a saved network, loaded by its own library."""
    model: nn.Module
    match saved.architecture:
        case {"family": "transformers", "config": {"architectures": [str(name)]}}:
            import transformers

            model = getattr(transformers, name).from_pretrained(saved.path.parent)
        case {"family": "timm", "name": str(name), "args": dict(args)}:
            import timm

            model = timm.create_model(name, **args)
            model.load_state_dict(load_file(saved.path))
        case _:
            model = build(saved.architecture, device="cpu")
            model.load_state_dict(load_file(saved.path))
    return model.eval()


def _logits(model: nn.Module, saved: Saved, batch: Mapping[str, Tensor]) -> Tensor:
    of_transformers = saved.architecture["family"] == "transformers"
    logits: Tensor = model(**batch).logits if of_transformers else model(batch["pixel_values"])
    return logits

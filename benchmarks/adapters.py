"""A series of adapters on one base, beside as many passes of the base over the same probe."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import tests.operators.sitecustomize  # noqa: F401  torchvision may be imported beside a CPU build of torch
from analysis.networks.adapters import PREFIX, Adapter
from analysis.networks.adapting import Adaptable
from analysis.networks.loading import build, load_network
from analysis.passes.extraction import extract_features
from analysis.probes.inputs import Inputs
from analysis.probes.probe import Probe

Row = dict[str, object]
_ADAPTERS, _RANK = 20, 16
_BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 30_522, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "id2label": {str(n): f"LABEL_{n}" for n in range(10)},
}  # fmt: skip
# The more inputs, the less a change of the weights matters beside a pass: few, for networks of real size.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "WRN-28-2, 200 images of 32 x 32": (
        {"family": "builtin", "name": "wide_resnet", "args": {"depth": 28, "widen_factor": 2, "n_classes": 10}},
        "images",
    ),
    "BERT base (110 million parameters), 16 texts of 32 tokens": (
        {"family": "transformers", "config": _BERT}, "texts",
    ),
}  # fmt: skip


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Time series of adapters of every linear and convolutional module, of two kinds, against passes of the base.

    Args:
        device: where both sides run.

    Returns:
        Two rows a network: the measurement, its target, and whether it is reached.
    """
    return [_row(name, dora, torch.device(device)) for name in CASES for dora in (False, True)]


def _row(name: str, dora: bool, device: torch.device) -> Row:
    architecture, content = CASES[name]
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        base = Path(folder) / "base.safetensors"
        network = build(json.loads(json.dumps(architecture)), device="cpu")
        save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, base)
        files = [Path(folder) / f"{number}.safetensors" for number in range(_ADAPTERS)]
        for file in files:
            save_file(_tensors(network, dora, generator), file)
        del network
        loaded = load_network(architecture, base, head=None, device=device)
        probe = Probe(_inputs(content, generator), torch.arange(_n(content)) % 10, None, 10, None).prepared(device)
        size = extract_features(loaded, probe, device=device)[2]
        adaptable, adapter = Adaptable(loaded, architecture), Adapter(r=_RANK, alpha=32.0, dora=dora)
        changing, own, alone = 0.0, 0.0, 0.0
        # In turns, so that other load on the machine affects both sides.
        for file in files:
            begin = _now(device)
            adapted = adaptable.put_on(adapter, file, base)
            changed = _now(device)
            extract_features(adapted, probe, device=device, batch_size=size)
            changing, own = changing + changed - begin, own + _now(device) - begin
            adaptable.take_off(base)
            begin = _now(device)
            extract_features(loaded, probe, device=device, batch_size=size)
            alone += _now(device) - begin
        n_bytes = base.stat().st_size
    return {
        "case": f"{_ADAPTERS} {'DoRA' if dora else 'LoRA'} adapters of rank {_RANK}, {name}",
        "against": f"{_ADAPTERS} passes of the base over the same inputs",
        "seconds": own,
        "against_seconds": alone,
        "seconds_to_change": changing / _ADAPTERS,
        "base_bytes": n_bytes,
        "times": own / alone,
        "must": "at most 2 times",
        "reached": own <= 2 * alone,
    }


def _n(content: str) -> int:
    return 200 if content == "images" else 16


def _inputs(content: str, generator: torch.Generator) -> Inputs:
    if content == "images":
        return torch.randn(_n(content), 3, 32, 32, generator=generator)
    ids = torch.randint(0, 30_000, (_n(content), 32), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tensors(network: nn.Module, dora: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return an adapter of every linear and convolutional module but the head, as PEFT saves one."""
    tensors = {}
    modules = [(name, one) for name, one in network.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    for name, module in modules[:-1]:
        out, into, *kernel = module.weight.shape
        ones = [1] * len(kernel)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(_RANK, into, *kernel, generator=generator) * 0.01
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, _RANK, *ones, generator=generator) * 0.01
        if dora:
            magnitudes = module.weight.detach().flatten(1).norm(dim=1)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitudes.view(1, out, *ones) if kernel else magnitudes
    return tensors


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""A pass of an exported network's graph beside a pass of the network itself."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

import tests.operators.sitecustomize  # noqa: F401  torchvision may be imported beside a CPU build of torch
from analysis.networks.loading import LoadedNetwork, load_network
from analysis.passes.extraction import extract_features
from analysis.probes.inputs import Inputs, first_samples
from analysis.probes.probe import Probe
from analysis.saving.checkpoint import save_checkpoint

Row = dict[str, object]
_ROUNDS, _MUST = 7, 0.9


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Time passes over a probe, in turns, by the graph and by the network; the median of each counts.

    Args:
        device: where both run.

    Returns:
        One row a network: the measurement, its target, and whether it is reached.
    """
    return [_row(name, torch.device(device)) for name in _CASES]


def _row(name: str, device: torch.device) -> Row:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, head, inputs, n = _CASES[name]()
        model = model.eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            example = first_samples(inputs, 2)
            path = save_checkpoint(model, Path(folder) / "graph.safetensors", example_inputs=example, check=False)
            begin = time.perf_counter()
            graph = load_network({"family": "exported", "graph": "of the file"}, path, head=None, device=device)
            loading = time.perf_counter() - begin
        network = LoadedNetwork(_Called(model).to(device), f"model.{head}")
        probe = Probe(inputs, torch.arange(n) % 10, None, 10, None).prepared(device)
        size = extract_features(graph, probe, device=device)[2]
        seconds: dict[str, list[float]] = {"graph": [], "network": []}
        for _ in range(_ROUNDS):
            for side, of in (("graph", graph), ("network", network)):
                begin = time.perf_counter()
                extract_features(of, probe, device=device, batch_size=size)
                seconds[side].append(time.perf_counter() - begin)
    ratio = median(seconds["network"]) / median(seconds["graph"])
    return {
        "case": f"a pass by the graph of {name}",
        "against": "a pass by the network",
        "seconds": median(seconds["graph"]),
        "against_seconds": median(seconds["network"]),
        "seconds_to_load": loading,
        "batch_size": size,
        "speed": ratio,
        "must": f"at least {_MUST} of the network's speed",
        "reached": ratio >= _MUST,
    }


class _Called(nn.Module):
    """Calls a model with a batch, and returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Inputs) -> torch.Tensor:
        output = self.model(batch) if isinstance(batch, torch.Tensor) else self.model(**batch)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits


def _resnet() -> tuple[nn.Module, str, Inputs, int]:
    from torchvision.models import resnet18

    return resnet18(num_classes=10), "fc", torch.randn(64, 3, 64, 64), 64


def _bert() -> tuple[nn.Module, str, Inputs, int]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_labels=10
    )
    ids = torch.randint(0, 30_000, (64, 64))
    return BertForSequenceClassification(config), "classifier", {"input_ids": ids, "attention_mask": ids * 0 + 1}, 64


_CASES: dict[str, Callable[[], tuple[nn.Module, str, Inputs, int]]] = {
    "ResNet-18, 64 images of 64 x 64": _resnet,
    "a transformer of 4 layers of width 256 (BERT), 64 texts of 64 tokens": _bert,
}

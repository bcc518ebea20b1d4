"""Small networks and probes that several test files share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from analysis.errors import AnalysisError
from analysis.networks.loading import LoadedNetwork, build
from analysis.probes.probe import Probe

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mlp": {"family": "builtin", "name": "mlp", "args": {"sizes": [12, 16, 16, 5], "norm": "batch"}},
    "cnn": {"family": "builtin", "name": "cnn", "args": {"n_classes": 5, "in_channels": 1, "channels": [6, 8]}},
    "resnet": {"family": "builtin", "name": "resnet", "args": {"n_classes": 5, "in_channels": 1, "width": 4}},
}
HEADS = {"mlp": "head", "cnn": "head", "resnet": "fc"}
INPUT_SHAPES = {"mlp": (12,), "cnn": (1, 8, 8), "resnet": (1, 8, 8)}


def network_of(name: str, seed: int) -> LoadedNetwork:
    """Return a network with random weights and running statistics, which no training leaves at 0 and 1."""
    torch.manual_seed(seed)
    module = build(ARCHITECTURES[name], device="cpu").eval().requires_grad_(False)
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_()
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return LoadedNetwork(module, HEADS[name])


def probe_of(name: str, n: int = 60) -> Probe:
    """Return inputs that fit a network, of 5 classes, with two splits."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 5
    inputs = torch.randn(n, *INPUT_SHAPES[name], generator=generator) + labels.view(n, *[1] * len(INPUT_SHAPES[name]))
    return Probe(inputs, labels, (torch.arange(n) % 3 == 0).long(), 5, None)


def small_network(n_inputs: int = 12, d: int = 8, n_classes: int = 5) -> LoadedNetwork:
    """Return a perceptron with dropout and random weights; its head is the module `3`."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(n_inputs, d), nn.Dropout(0.5), nn.ReLU(), nn.Linear(d, n_classes))
    return loaded(module, "3")


def loaded(module: nn.Module, head_name: str) -> LoadedNetwork:
    """Return a module as a loaded network."""
    module.requires_grad_(False)
    return LoadedNetwork(module, head_name)


def small_probe(n: int = 90, n_inputs: int = 12, n_classes: int = 5, split: bool = True) -> Probe:
    """Return vectors that `small_network` takes, shifted by their labels, with two splits if wanted."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(n_classes, (n,), generator=generator)
    inputs = torch.randn(n, n_inputs, generator=generator) + labels[:, None]
    parts = (torch.arange(n) % 3 == 0).long() if split else None
    return Probe(inputs, labels, parts, n_classes, None)


def error_of(call: Callable[[], Any]) -> AnalysisError:
    """Return the error that a call raises."""
    with pytest.raises(AnalysisError) as caught:
        call()
    return caught.value

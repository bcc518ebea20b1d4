"""Files of exported networks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from analysis.networks.loading import LoadedNetwork, load_network
from analysis.saving.checkpoint import save_checkpoint

DESCRIPTION: dict[str, Any] = {"family": "exported", "graph": "of the file"}

Exported = Callable[..., LoadedNetwork]


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    """Return a function that saves a model as a graph and loads it as a worker does."""

    def through_a_file(model: nn.Module, example: Any, **options: Any) -> LoadedNetwork:
        path = save_checkpoint(model, tmp_path / "model.safetensors", example_inputs=example, check=False, **options)
        return load_network(DESCRIPTION, path, head=None, device="cpu")

    return through_a_file


def graph_of(model: nn.Module, example: Any) -> dict[str, Any]:
    """Return a model's graph as JSON."""
    from analysis.saving.exporting import export_model

    graph: dict[str, Any] = json.loads(json.dumps(export_model(model, example).graph))
    return graph

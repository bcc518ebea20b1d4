"""Models of any class are saved as graphs, or refused with the reason and the line of their code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from analysis.errors import AnalysisError
from analysis.saving.checkpoint import save_checkpoint
from analysis.saving.conversion import ConversionError

X = torch.randn(4, 6)


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Linear(6, 6), nn.Linear(6, 3)


class Plain(_Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(nn.functional.dropout(torch.relu(self.inner(x)), 0.5, self.training))
        return logits


class DependsOnValues(_Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that is told
            x = -x
        logits: Tensor = self.fc(x)
        return logits


class ReadsValues(_Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x * float(x.max().item()))
        return logits


class Chooses(_Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.nonzero(x)[: len(x), :1] * x)
        return logits


class Random(_Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x + torch.rand_like(x))
        return logits


class Raises(_Base):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("not on a Sunday")


class TwoHeads(_Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x) + self.fc(self.inner(x))
        return logits


def _graph(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        graph: dict[str, Any] = json.loads(file.metadata()["graph"])
        return graph


def test_a_model_of_any_class_becomes_one_file(tmp_path: Path) -> None:
    """Its modes stay, a wrapper is taken off, one sample is enough, and the number of samples may vary."""
    model = Plain()
    model.inner.eval()
    path = save_checkpoint(torch.nn.DataParallel(model), tmp_path / "a.safetensors", example_inputs=X[:1])
    assert model.training
    assert not model.inner.training
    graph = _graph(path)
    assert graph["inputs"] == [["x", "float32", [[2, None], 6]]]
    assert [name for name, *_ in graph["tensors"]] == ["inner.weight", "inner.bias", "fc.weight", "fc.bias"]


def test_dimensions_vary_as_asked(tmp_path: Path) -> None:
    """`dynamic_shapes` is torch's own argument."""
    shapes = ({0: torch.export.Dim("n", min=3, max=9)},)
    path = save_checkpoint(Plain(), tmp_path / "a.safetensors", example_inputs=(X,), dynamic_shapes=shapes)
    assert _graph(path)["inputs"] == [["x", "float32", [[3, 9], 6]]]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (DependsOnValues(), "depends on values of a tensor"),
        (DependsOnValues(), "test_exporting.py:33: if x.sum() > 0:  # the line that is told"),
        (ReadsValues(), "test_exporting.py:"),
        (ReadsValues(), "x.max().item()"),
        (Chooses(), "1 operation that the service does not run: aten.nonzero.default at test_exporting.py:"),
        (Random(), "1 operation that the service does not run: aten.rand_like.default at test_exporting.py:"),
        (Raises(), "not on a Sunday (at test_exporting.py:"),
    ],
)
def test_what_cannot_be_exported_is_said_in_plain_words(model: nn.Module, said: str, tmp_path: Path) -> None:
    """With the line of the model's own code, and without leaving a file."""
    with pytest.raises(ConversionError) as caught:
        save_checkpoint(model, tmp_path / "a.safetensors", example_inputs=X)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_worker_would_refuse_is_not_written(tmp_path: Path) -> None:
    """The check builds the network of the graph, and finds its head."""
    with pytest.raises(AnalysisError, match="The head must be a linear module") as caught:
        save_checkpoint(Plain(), tmp_path / "a.safetensors", example_inputs=X, head="nowhere")
    assert caught.value.members["candidates"] == ["inner", "inner.weight", "fc", "fc.weight"]
    assert list(tmp_path.iterdir()) == []


def test_a_description_and_an_example_are_one_too_many(tmp_path: Path) -> None:
    """Either describes the network."""
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": [6, 3]}}
    with pytest.raises(ConversionError, match="not both"):
        save_checkpoint(Plain(), tmp_path / "a.safetensors", architecture, example_inputs=X)


def test_an_example_of_another_kind_is_refused(tmp_path: Path) -> None:
    """It must be a tensor, a tuple or a dictionary."""
    with pytest.raises(ConversionError, match="example_inputs must be a tensor"):
        save_checkpoint(Plain(), tmp_path / "a.safetensors", example_inputs=4)


def test_a_graph_of_other_logits_is_refused(tmp_path: Path) -> None:
    """The check compares the graph with the model on the example."""

    class Another(_Base):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(x * 2 if torch.compiler.is_exporting() else x)
            return logits

    with pytest.raises(ConversionError, match="The graph gives logits that differ from the model's by"):
        save_checkpoint(Another(), tmp_path / "a.safetensors", example_inputs=X)
    assert list(tmp_path.iterdir()) == []

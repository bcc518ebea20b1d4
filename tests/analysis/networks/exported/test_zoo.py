"""Graphs of real networks give what the networks give."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.networks.exported.network import ExportedNetwork, input_names
from analysis.networks.loading import LoadedNetwork
from analysis.passes.extraction import watching
from tests.analysis.networks.exported.conftest import Exported
from tests.analysis.networks.exported.zoo import OFTEN, ZOO, case
from tests.campaigns import campaign


@pytest.mark.parametrize("name", campaign(ZOO, OFTEN))
def test_a_graph_gives_logits_and_features_of_its_network(name: str, exported: Exported) -> None:
    """On a batch of another size, and another length of texts: logits to 1e-5 of the largest, features to the bit."""
    made = case(name)
    network = exported(made.model, made.example)
    with torch.no_grad(), _plain_attention(), _features(made.model, network) as features:
        expected = _logits(_called(made.model, made.batch))
        with watching(network) as run:
            passed = run(_by_name(network, made.batch))
    assert float((passed.output - expected).abs().max() / expected.abs().max()) <= 1e-5
    if features:
        assert torch.equal(passed.received.reshape(-1, passed.received.shape[-1]), features[0])


def _called(model: nn.Module, given: Any) -> Any:
    match given:
        case Tensor():
            return model(given)
        case tuple():
            return model(*given)
    return model(**given)


def _by_name(network: LoadedNetwork, given: Any) -> Any:
    assert isinstance(network.module, ExportedNetwork)
    if isinstance(given, tuple) and not isinstance(given[0], Tensor):
        return given[0]
    return dict(zip(input_names(network.module), given, strict=True)) if isinstance(given, tuple) else given


def _logits(output: Any) -> Tensor:
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        output = output[0]
    found = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _features(model: nn.Module, network: LoadedNetwork) -> Iterator[list[Tensor]]:
    """Yield the inputs of the model's own head, where the graph's head has a module's name."""
    found: list[Tensor] = []
    head = dict(model.named_modules()).get(network.head_name)

    def keep(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        received = args[0].movedim(1, -1) if isinstance(head, nn.Conv2d) else args[0]
        found.append(received.reshape(-1, received.shape[-1]))

    # A head that is also an embedding is called with numbers.
    if not isinstance(head, nn.Linear | nn.Conv2d):
        yield found
        return
    handle = head.register_forward_hook(keep)
    yield found
    handle.remove()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Let torch's own encoder compute as it was traced: in evaluation mode it has one kernel for a whole layer."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)

"""Networks that were exported as a graph: `torch.export` wrote their operations, and an interpreter runs them.

A description is `{"family": "exported", "graph": {...}}`, with the graph in the form that `graph` defines. A row's
description names the graph by its hash; the file of the weights holds it (`described`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..building import refused
from .graph import MAX_GRAPH_BYTES, parse_graph
from .network import ExportedNetwork, check_runs, head_of
from .network import linear_maps as maps_of
from .operations import allowed

#: Key of the graph in the metadata of a safetensors file.
GRAPH = "graph"


def names() -> list[str]:
    """Return the operations that a graph may use."""
    return sorted(allowed())


def described(description: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return a description with the graph that a file's metadata hold.

    Raises:
        AnalysisError: `invalid-architecture` where there is none, or it is no JSON.
    """
    text = metadata.get(GRAPH)
    if text is None or len(text) > MAX_GRAPH_BYTES:
        raise refused("The file must hold the graph of the network, as save_checkpoint and `interplay push` write it")
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused("The file's graph is no JSON") from error
    return {**description, GRAPH: graph}


def create(description: Mapping[str, Any]) -> nn.Module:
    """Build the network of a graph; on the meta device it also runs there once, with every size bounded.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    network = ExportedNetwork(parse_graph(description.get(GRAPH)))
    if torch.get_default_device().type == "meta":
        check_runs(network)
    return network


def head(network: nn.Module, description: Mapping[str, Any]) -> str | None:
    """Return the last linear map on the way to the logits; feature extraction checks that it gives them."""
    assert isinstance(network, ExportedNetwork), "`create` made it"
    return head_of(network)


def linear_maps(network: nn.Module) -> Sequence[str]:
    """Return the names of the graph's linear maps: of their modules, and of their weights."""
    assert isinstance(network, ExportedNetwork), "`create` made it"
    return list(maps_of(network))


def try_imports() -> None:
    """Import nothing: torch is all that it needs."""


def predicts_tokens(network: nn.Module) -> bool:
    """Return whether it is a causal language model: from whole numbers, one for each token, logits of each token."""
    assert isinstance(network, ExportedNetwork), "`create` made it"
    graph = network._graph
    return len(graph.logits_shape) == 3 and any(one.dtype == "int64" and len(one.shape) == 2 for one in graph.inputs)


def stored_names(network: nn.Module) -> Callable[[str], str]:
    """Return names as they are: the file was written with the graph's."""
    return str


def leaves_out(network: nn.Module) -> Callable[[str], bool]:
    """Return that no tensor beside the graph's is ignored."""
    return lambda _: False


def ties(network: nn.Module) -> dict[str, str]:
    """Return no ties: a tensor that a network shares has one name in its graph."""
    return {}

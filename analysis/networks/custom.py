"""Networks of the worker's operator, by the entry points that packages installed beside it declare.

    [project.entry-points."interplay.networks"]
    our-net = "our_package.networks:OurNet"

names a class or function that takes the description's `args` by keyword and returns a `torch.nn.Module`: the operator's
own code, which the operator has chosen to install. A description only names it; nothing of a checkpoint is ever run.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from .building import check_plain, last_linear, refused

GROUP = "interplay.networks"


def names() -> list[str]:
    """Return the declared names of installed packages, without importing any of them."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def create(description: Mapping[str, Any]) -> nn.Module:
    """Build a network from `{"name": ..., "args": {...}}`.

    Raises:
        AnalysisError: `invalid-architecture` where no installed package declares the name, or the result is not a
            module; errors of the operator's own code, of any type.
    """
    name, args = description["name"], description["args"]
    found: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise refused(
            f"no package on this worker declares {name!r} for {GROUP} (it has {', '.join(names()) or 'none'})"
        )
    check_plain(args)
    network = found[name].load()(**args)
    if not isinstance(network, nn.Module):
        raise refused(f"{found[name].value} returns {type(network).__name__}, not a torch.nn.Module")
    return network


def head(network: nn.Module, description: Mapping[str, Any]) -> str | None:
    """Return the last linear module; feature extraction checks that it gives the logits."""
    return last_linear(network)

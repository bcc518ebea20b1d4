"""Networks of whoever runs the worker, by the entry points that packages installed beside it declare.

    [project.entry-points."interplay.networks"]
    our-net = "our_package.networks:OurNet"

names a class or function that takes the description's `args` by keyword and gives a `torch.nn.Module`: the operator's
own code, which the operator has chosen to install. A description only names it; nothing of a checkpoint is ever run.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from analysis.networks.building import check_plain, last_linear, refused

GROUP = "interplay.networks"


def names() -> list[str]:
    """What packages here declare, without importing any of them."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def create(description: Mapping[str, Any]) -> nn.Module:
    """A network from `{"name": ..., "args": {...}}`.

    Raises:
        AnalysisError: `invalid-architecture` where no package here declares the name, or gives something else; what
            the operator's own code raises, of any type.
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
        raise refused(f"{found[name].value} gives {type(network).__name__} and not a torch.nn.Module")
    return network


def head(network: nn.Module, description: Mapping[str, Any]) -> str | None:
    """The last linear module; that it gives the logits is checked when features are extracted."""
    return last_linear(network)

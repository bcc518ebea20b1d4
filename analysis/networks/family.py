"""What a family of networks, a module of this package, offers to the loading of networks.

Each family is a module that `loading` imports by its name. Every family offers `Family`. A family whose networks are
listed by name offers `Listed` too, one whose library saves, loads and ties tensors in its own way offers `OwnLoading`,
and one whose networks are graphs `OfGraphs`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Family(Protocol):
    """A family of networks."""

    def create(self, description: Mapping[str, Any]) -> nn.Module:
        """Build a network on torch's current default device."""

    def head(self, network: nn.Module, description: Mapping[str, Any]) -> str | None:
        """Return the name of the classification head; None where the network does not end with one."""


@runtime_checkable
class Listed(Family, Protocol):
    """A family with a list of its networks."""

    def names(self) -> Sequence[str]:
        """Return the names that a description may have."""


@runtime_checkable
class OfGraphs(Family, Protocol):
    """A family whose networks are graphs that lie in the files of their weights."""

    def described(self, description: Mapping[str, Any], metadata: Mapping[str, str]) -> Mapping[str, Any]:
        """Return the whole description, from a row's and from the metadata of the file."""

    def linear_maps(self, network: nn.Module) -> Sequence[str]:
        """Return the names of the linear maps that may be a head."""


@runtime_checkable
class OwnLoading(Family, Protocol):
    """A family whose library loads files in its own way, which loading here follows."""

    def try_imports(self) -> None:
        """Trigger imports that the library postpones, so that they fail now."""

    def predicts_tokens(self, network: nn.Module) -> bool:
        """Return whether it is a causal language model."""

    def stored_names(self, network: nn.Module) -> Callable[[str], str]:
        """Return a function that converts a name of a file into the network's own."""

    def leaves_out(self, network: nn.Module) -> Callable[[str], bool]:
        """Return a function that tells whether the library ignores a further tensor of a file, by its name."""

    def ties(self, network: nn.Module) -> Mapping[str, str]:
        """Return the names that share a tensor unless a file holds different ones, and the name each is tied to."""

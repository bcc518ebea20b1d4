"""Names of a network that share one tensor, such as input embeddings that are also the output's.

A file may hold the tensor under any of them, or under several. Where these differ, a library may keep them apart.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from ..errors import AnalysisError
from .family import Family, OwnLoading


@dataclass(frozen=True)
class Ties:
    """The names that share a tensor.

    Attributes:
        first: for each further name, the name that it is tied to.
        separable: further names that the network's library keeps apart where a file holds different tensors.
    """

    first: Mapping[str, str]
    separable: Collection[str]

    @classmethod
    def of(cls, network: nn.Module, family: Family) -> "Ties":
        """Return the ties of a network, by its parameters' identity; by its library's table where it has one."""
        library: Mapping[str, str] = family.ties(network) if isinstance(family, OwnLoading) else {}
        groups: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        first: dict[str, str] = {}
        for group in (group for group in groups.values() if len(group) > 1):
            source = next((library[name] for name in library if name in group and library[name] in group), group[0])
            # In the order of the table, which decides whose tensor fills a source that is missing in the file.
            ordered = [name for name in library if name in group] + [name for name in group if name not in library]
            first |= {name: source for name in ordered if name != source}
        return cls(first, {name for name in first if name in library})

    def fill(self, stored: dict[str, str]) -> None:
        """Fill in names without a tensor in the file by the tensor that they share; `stored` is changed."""
        for name, first in self.first.items():
            if name in stored:
                stored.setdefault(first, stored[name])
        for name, first in self.first.items():
            if first in stored:
                stored.setdefault(name, stored[first])

    def untied(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> list[str]:
        """Return the names whose tensors differ from those that they are tied to, where the library keeps them apart.

        Args:
            tensors: of a file, by the network's names, all of them.

        Raises:
            AnalysisError: `checkpoint-mismatch` with the reason `tied`, where the library does not.
        """
        differing = [name for name, first in self.first.items() if not torch.equal(tensors[name], tensors[first])]
        for name in differing:
            if name not in self.separable:
                raise AnalysisError(
                    "checkpoint-mismatch",
                    f"The network uses one tensor as {self.first[name]!r} and {name!r}; the file holds two that "
                    "differ.",
                    reason="tied",
                )
        return differing

    def tie(self, network: nn.Module, *, but_for: Collection[str] = ()) -> None:
        """Make names share one parameter again, as they did before a file's tensors were assigned."""
        for name, first in self.first.items():
            if name not in but_for:
                parameter = network.get_parameter(first)
                place, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(place), leaf, parameter)


def untie(network: nn.Module, names: Collection[str]) -> None:
    """Give names parameters of their own, equal to those that they shared."""
    for name in names:
        place, _, leaf = name.rpartition(".")
        shared = network.get_parameter(name)
        setattr(network.get_submodule(place), leaf, nn.Parameter(shared.detach().clone(), requires_grad=False))

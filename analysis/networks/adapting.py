"""Put adapters on a loaded network, in place, one after the other.

Each tensor that an adapter changes is computed from the base's file and the adapter's alone. So neither the order of
adapters nor an earlier one changes a digit, and there is never a second copy of the network.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import AnalysisError
from .adapters import PREFIX, Adapter, Change, LowRank, Parts, match_adapter
from .loading import LoadedNetwork, header_of, is_finite, renaming_of
from .naming import BATCH_COUNTER, mismatch_members


class Adaptable:
    """A network that adapters are put on, one at a time.

    Args:
        network: as its own file has it; from here on adapters change it in place. Tensors that the file lacks, such as
            a head, are to be in each adapter.
        architecture: its description.

    Numerics: float32, tensor by tensor. Beside the network there is memory for the largest tensor of its file that is
        changed, and for the adapter's parts of it. What an adapter changed is read from the base's file again, bit for
        bit, before the next is put on. B A is added as it is multiplied, by one call of `addmm`.

    Source: Hu et al. 2021, "LoRA"; Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA";
        Liu et al. 2024, "DoRA", equation 5. Names, and what is merged into what, are PEFT's (0.21).
    """

    def __init__(self, network: LoadedNetwork, architecture: Mapping[str, Any]) -> None:
        self._network = network
        state, modules = network.module.state_dict(), dict(network.module.named_modules())
        absent = [name for name in state if name not in network.stored and not name.endswith(BATCH_COUNTER)]
        self._parts = Parts(state, modules, renaming_of(network.module, architecture), absent)
        self._shared = _shared(network.module)
        self._changed: set[str] = set()

    def put_on(self, adapter: Adapter, path: Path, base: Path) -> LoadedNetwork:
        """Change the network to that of an adapter, whatever was on it before.

        Args:
            adapter: its configuration.
            path: its safetensors file.
            base: the file that the network was loaded from.

        Returns:
            The network, with the naming of the adapter's file.

        Raises:
            AnalysisError: `checkpoint-mismatch` with the file's names that are missing, unexpected, misshaped or
                mistyped, or with a reason: `adapted-module` for a module whose weight cannot be merged with, `tied`,
                `conversion`, `unreadable`; `non-finite-values` with the first tensor's name; `out-of-memory`.
        """
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                changes, ignored = match_adapter(adapter, header_of(file), self._parts)
                self._require_separate(changes, file)
                self._write(changes, file, base)
        except SafetensorError as error:
            raise AnalysisError(
                "checkpoint-mismatch", f"A file is not complete, valid safetensors: {error}.", reason="unreadable"
            ) from None
        except torch.OutOfMemoryError as error:
            raise AnalysisError("out-of-memory", "The adapter's tensors do not fit the memory.") from error
        own = self._network.naming
        n_supplied = sum(self._parts.state[name].numel() for name in self._parts.absent)
        naming = replace(own, prefix=PREFIX, infixes={}, ignored=ignored, n_parameters=own.n_parameters + n_supplied)
        return replace(self._network, naming=naming)

    def take_off(self, base: Path) -> LoadedNetwork:
        """Change the network back to what its own file has, and return it.

        Args:
            base: the file that the network was loaded from.

        Raises:
            AnalysisError: `checkpoint-mismatch` with the names that are missing, where the file lacks some.
        """
        if absent := list(self._parts.absent):
            detail = f"The file holds no network by itself: it lacks {len(absent)} tensors, which its adapters bring."
            raise AnalysisError("checkpoint-mismatch", detail, **mismatch_members({"missing": absent}))
        self._write({}, None, base)
        return self._network

    def _write(self, changes: Mapping[str, Change], file: Any, base: Path) -> None:
        """Compute every tensor that is changed now, or was before."""
        names = [name for name in self._parts.state if name in changes or name in self._changed]
        # Noted first: where this fails half-way, the next adapter finds all that is to be restored.
        self._changed.update(changes)
        with torch.no_grad(), safe_open(base, framework="pt", device="cpu") as originals:
            for name in names:
                target, change = self._parts.state[name], changes.get(name, Change())
                if change.whole is not None:
                    target.copy_(file.get_tensor(change.whole))
                elif name in self._network.stored:
                    target.copy_(originals.get_tensor(self._network.stored[name]))
                else:
                    target.zero_()
                if change.low_rank is not None:
                    _add(target, change.low_rank, file)
                if name in changes and target.is_floating_point() and not is_finite(target):
                    raise AnalysisError(
                        "non-finite-values",
                        f"With the adapter, {name!r} holds NaN or infinity, as float32.",
                        tensor=name,
                        n_tensors=1,
                    )
        self._changed = set(changes)
        self._network.weights_changed()

    def _require_separate(self, changes: Mapping[str, Change], file: Any) -> None:
        """Refuse to change a tensor that the network uses under several names, unless all get the same one instead.

        PEFT trains one of the uses and, as it merges, changes all of them.
        """
        for group in self._shared:
            changed = [changes[name] for name in group if name in changes]
            whole = [change.whole for change in changed if change.whole is not None and change.low_rank is None]
            if len(whole) == len(group) and _are_equal([file.get_tensor(name) for name in whole]):
                continue
            if changed:
                uses = " and ".join(map(repr, group))
                raise AnalysisError(
                    "checkpoint-mismatch",
                    f"The adapter changes a tensor that its base uses as {uses}. PEFT trains one of these uses and "
                    "merges into all of them, so there are two answers to what the adapted network is. Merge it where "
                    "torch is, as you mean it, and push the whole network.",
                    reason="tied",
                    tensors=group[:20],
                )


def _are_equal(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


def _shared(network: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _add(target: Shaped[Tensor, "..."], change: LowRank, file: Any) -> None:
    """Add scale B A to a tensor; with magnitudes, scale each row of the sum to its own."""
    a, b = (file.get_tensor(change.names[role]).to(target).flatten(1) for role in ("a", "b"))
    rows = target.T if change.transposed else target.view(len(target), -1)
    rows.addmm_(b, a, alpha=change.scale)
    if "magnitude" in change.names:
        magnitude = file.get_tensor(change.names["magnitude"]).to(target).flatten()
        rows.mul_((magnitude / torch.linalg.vector_norm(rows, dim=1)).unsqueeze(1))

"""What a compute process keeps loaded, for which analyses, and how much of it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from workers.compute.context import Held, n_bytes


@dataclass(frozen=True)
class _Loaded:
    module: nn.Module
    inputs: dict[str, torch.Tensor]


def _loaded(kilobytes: int) -> _Loaded:
    return _Loaded(nn.Identity(), {"x": torch.zeros(kilobytes, 256)})


def test_the_bytes_of_what_is_loaded() -> None:
    """Parameters, buffers and tensors in any container count, each storage once."""
    module = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    weights = 4 * (100 + 4 * 10) + 8
    assert n_bytes(module) == weights
    shared = torch.zeros(1000)
    value = {"a": _Loaded(module, {"x": shared}), "b": [shared[:10], shared[10:]], "c": "text", "d": None}
    assert n_bytes(value) == weights + 4000


def test_networks_of_several_analyses_are_held_within_the_limit() -> None:
    """The current analysis counts for nothing; of the others the one that was used longest ago goes first."""
    held, loads = Held(2500), []

    def get(analysis_id: str, kilobytes: int = 1) -> None:
        held.begin(analysis_id)

        def load() -> _Loaded:
            loads.append(analysis_id)
            return _loaded(kilobytes)

        held.get(analysis_id, _Loaded, load)

    for analysis_id in ("a", "b", "a", "b", "c", "a", "b", "c"):
        get(analysis_id)
    assert loads == ["a", "b", "c"]
    # Beside a fourth only the last two are kept.
    for analysis_id in ("d", "c", "b", "a"):
        get(analysis_id)
    assert loads == ["a", "b", "c", "d", "a"]
    get("large", 1000)
    assert loads[-1] == "large"
    get("a")
    assert loads[-1] == "large", "a was the last before it"
    get("large", 1000)
    assert loads[-2:] == ["large", "large"], "it was beyond the limit"


@pytest.mark.parametrize("limit", [0, 10**9])
def test_what_is_held_for_others_can_be_freed(limit: int) -> None:
    """When memory runs out everything but the current analysis's goes; a finished analysis leaves nothing."""
    held = Held(limit)
    for analysis_id in ("a", "b"):
        held.begin(analysis_id)
        held.get(analysis_id, _Loaded, lambda: _loaded(1))
    assert held.keep_only("b") == bool(limit)
    assert not held.keep_only("b")
    held.forget("b")
    assert not held.keep_only("c")

"""The descriptions of checkpoints and probes: arguments of calls, and the specs that the service takes."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class CheckpointDescription(TypedDict, total=False):
    """The optional arguments of `push_checkpoint`, which documents them."""

    base: str | None
    adapter: Mapping[str, Any] | None
    architecture: Mapping[str, Any] | None
    head: str | None
    prefix: str | None
    preprocess: Mapping[str, Any] | None
    tokenizer: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None


class ProbeDescription(TypedDict, total=False):
    """The optional arguments of `push_probe`, which documents them."""

    class_names: Sequence[str] | None
    preprocess: Mapping[str, Any] | None
    columns: Mapping[str, str | None] | None
    tokenizer: Mapping[str, Any] | None
    max_length: int | None
    metadata: Mapping[str, Any] | None


def checkpoint_spec(name: str, described: CheckpointDescription) -> dict[str, Any]:
    """Return a checkpoint's spec; members that are not given are None or missing."""
    spec = {"name": name, **described}
    spec["base_id"] = spec.pop("base", None)
    return spec


def probe_spec(name: str, described: ProbeDescription) -> dict[str, Any]:
    """Return a probe's spec; members that are not given are None or missing."""
    spec = {"name": name, **described}
    if (names := described.get("class_names")) is not None:
        spec["class_names"] = [*names]
    return spec

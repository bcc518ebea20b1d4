"""The kinds of analysis: how the points, the summary and the gate of each kind differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

KindName = Literal["evaluation", "comparison", "path", "pruning", "series"]


@dataclass(frozen=True)
class Kind:
    """What the client needs to know of one kind of analysis.

    Attributes:
        name: the `kind` of its analyses and reports.
        place: member of a point that holds its place on the axis; None if a report of this kind has no points.
        names_axis: whether the report itself names the axis; otherwise the axis is named as `place`.
        summary: labels of the members of a split's summary.
        places_in_summary: those of them that are places, not measurements.
        judges_checkpoint: whether `interplay gate` can make the report from one checkpoint.
        needs_baseline: whether it then needs the checkpoint of a baseline too.
    """

    name: KindName
    place: str | None = None
    names_axis: bool = False
    summary: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    places_in_summary: frozenset[str] = frozenset()
    judges_checkpoint: bool = False
    needs_baseline: bool = False


EVALUATION = Kind("evaluation", judges_checkpoint=True)
COMPARISON = Kind("comparison", judges_checkpoint=True, needs_baseline=True)
PATH = Kind(
    "path",
    place="w",
    summary=MappingProxyType(
        {
            "loss_barrier": "loss barrier",
            "error_barrier": "error barrier",
            "mir_barrier": "MIR barrier",
            "hdr_barrier": "HDR barrier",
            "connected": "connected",
        }
    ),
)
PRUNING = Kind(
    "pruning",
    place="sparsity",
    summary=MappingProxyType({"knee": "knee"}),
    places_in_summary=frozenset({"knee"}),
)
SERIES = Kind(
    "series",
    place="x",
    names_axis=True,
    summary=MappingProxyType(
        {"spearman_mir_accuracy": "MIR ~ accuracy", "spearman_hdr_accuracy": "HDR ~ accuracy"},
    ),
)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {kind.name: kind for kind in (EVALUATION, COMPARISON, PATH, PRUNING, SERIES)}
)

"""Combine the points of a path, a pruning sweep or a series into a report. Runs in the child.

MIR and HDR of a summary are those of the sample level with global centring, as reports state under `measured`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from analysis.sweeps.paths import CONNECTED, Barrier, barrier, instability, midpoint_barrier
from analysis.sweeps.pruning import knee
from analysis.sweeps.series import generalisation, spearman
from workers.compute.series import require_comparable

Body = dict[str, Any]

_LEVEL, _CENTRING = "sample", "global"
_ROUNDING = 1e-12
# Members known once a network is loaded; a point computed by an earlier version has fewer.
_OF_NETWORK = ("head", "n_features", "n_classes", "n_parameters", "prefix", "infixes", "ignored", "untied")
_MEASURED = {"level": _LEVEL, "centring": _CENTRING}


def _path(task: Body) -> Body:
    entries = sorted(task["points"], key=lambda entry: entry["known"]["w"])
    points = [entry["point"] for entry in entries]
    layers = {entry["known"]["recalibrated_layers"] for entry in entries} - {None}
    last = task["points"][-1]["known"]
    return {
        "subjects": _subjects(task),
        "points": points,
        "summary": {
            "splits": {split: _path_split(points, split) for split in points[0]["splits"]},
            "measured": _MEASURED,
            "l2_distance": last["l2_distance"],
            "cosine": last["cosine"],
            "reasons": {"cosine": "zero_length"} if last["cosine"] is None else {},
            "alignment": last["alignment"],
            "recalibrated_layers": max(layers, default=None),
            **_looked_at(task, [point["w"] for point in points]),
        },
    }


def _looked_at(task: Body, ws: Sequence[float]) -> Body:
    """Return how densely a path was sampled: by its points, and by the first look of an adaptive grid."""
    look = task["points"][0]["known"].get("look")
    places = sorted({w for w in [*ws, *(look["ws"] if look else [])] if 0 <= w <= 1})
    found = None
    if look is not None:
        found = {"n_points": len(look["ws"]), "n_samples": look["n_samples"]}
        found["loss_barrier"] = asdict(barrier(look["ws"], look["losses"]))
    return {"resolution": max(high - low for low, high in pairwise(places)), "look": found}


def _path_split(points: Sequence[Body], split: str) -> Body:
    """Return the barriers of one split; a quantity that is undefined at any point has none."""
    ws = [point["w"] for point in points]
    reasons: dict[str, str] = {}

    def barrier_of(name: str, values: Sequence[float | None], form: Callable[..., Barrier], **how: bool) -> Body | None:
        defined = [value for value in values if value is not None]
        if len(defined) < len(values):
            reasons[name] = "undefined_points"
            return None
        return asdict(form(ws, defined, **how))

    losses = [point["splits"][split]["loss"] for point in points]
    errors = [1 - point["splits"][split]["accuracy"] for point in points]
    found = {
        "loss_barrier": barrier_of("loss_barrier", losses, barrier),
        "error_barrier": barrier_of("error_barrier", errors, instability),
        "mir_barrier": barrier_of("mir_barrier", _of_interplay(points, split, "mir"), barrier, falls=True),
        "hdr_barrier": barrier_of("hdr_barrier", _of_interplay(points, split, "hdr"), barrier),
    }
    # An error barrier of 1 in 50 samples is 0.020000000000000018 after the subtractions that give it.
    connected = found["error_barrier"] is not None and found["error_barrier"]["value"] <= CONNECTED + _ROUNDING
    forms = {"loss_forms": _forms(ws, losses), "error_forms": _forms(ws, errors)}
    reasons |= {f"{name}.midpoint": "no_midpoint" for name, form in forms.items() if form["midpoint"] is None}
    return {**found, "connected": connected, **forms, "reasons": reasons}


def _forms(ws: Sequence[float], values: Sequence[float]) -> Body:
    return {
        "frankle": asdict(instability(ws, values)),
        "entezari": asdict(barrier(ws, values)),
        "midpoint": midpoint_barrier(ws, values),
    }


def _pruning(task: Body) -> Body:
    points = [entry["point"] for entry in task["points"]]
    sparsities = [point["sparsity"] for point in points]
    splits = {}
    for split in points[0]["splits"]:
        accuracies = [point["splits"][split]["accuracy"] for point in points]
        splits[split] = {"knee": knee(sparsities, accuracies), "reasons": {}}
    summary = {"n_prunable": task["points"][0]["known"]["n_prunable"], "splits": splits}
    return {"subject": _subjects(task)[0], "points": points, "summary": summary}


def _series(task: Body) -> Body:
    known = [entry["known"] for entry in task["points"]]
    for position in range(len(known)):
        # Points reused from existing reports have not been checked yet.
        require_comparable(known[: position + 1])
    points = [entry["point"] for entry in task["points"]]
    names = points[0]["splits"]
    accuracies = {split: [point["splits"][split]["accuracy"] for point in points] for split in names}
    came: Body | None = None
    if "train" in names and "test" in names:
        came = asdict(generalisation(task["axis"]["values"], accuracies["train"], accuracies["test"]))
        came["reasons"] = {name: "not_reached" for name, x in came.items() if x is None}
    return {
        "axis": task["axis"],
        "subjects": _subjects(task),
        "points": points,
        "summary": {
            "splits": {split: _series_split(points, split, accuracies[split]) for split in names},
            "measured": _MEASURED,
            "generalisation": came,
        },
    }


def _series_split(points: Sequence[Body], split: str, accuracies: Sequence[float | None]) -> Body:
    found: Body = {}
    reasons: dict[str, str] = {}
    for name in ("mir", "hdr"):
        correlation = spearman(_of_interplay(points, split, name), accuracies)
        found[f"spearman_{name}_accuracy"] = correlation
        if correlation is None:
            reasons[f"spearman_{name}_accuracy"] = "too_few_or_constant"
        found[f"{name}_distance"] = [
            point["splits"][split]["interplay"][_LEVEL][_CENTRING]["distance_to_optimum"][name] for point in points
        ]
        if None in found[f"{name}_distance"]:
            # The points have the reasons, which may differ between them.
            reasons[f"{name}_distance"] = "undefined_points"
    return {**found, "reasons": reasons}


def _of_interplay(points: Sequence[Body], split: str, name: str) -> list[float | None]:
    return [point["splits"][split]["interplay"][_LEVEL][_CENTRING][name] for point in points]


def _subjects(task: Body) -> list[Body]:
    """Return the subjects with the facts found by loading them; a series has them per point, a path for both ends."""
    known = [entry["known"] for entry in task["points"]]
    ends = known[0].get("ends", [{}] * len(known))
    return [
        described(subject, {name: value for name, value in (about | end).items() if name in _OF_NETWORK})
        for subject, about, end in zip(task["subjects"], known, ends, strict=False)
    ]


def described(subject: Body, known: Body) -> Body:
    """Return a report's `subject`: the members of the row, overridden by those found when the network was loaded."""
    return {name: value for name, value in subject.items() if name != "asked_prefix"} | known


REPORTS: dict[str, Callable[[Body], Body]] = {"path": _path, "pruning": _pruning, "series": _series}

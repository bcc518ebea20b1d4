"""Map each kind of analysis to the function of `analysis` that computes it. Runs in the child.

An evaluation or a comparison is one task, whose body is the report's. Kinds with points take several tasks. A task of
the step `point` gives one point, the facts that later points and the report need of it, and whether it was the last. A
task of the step `report` combines all points. So each point is recorded when it is done, and none is computed twice
after a kill. Modules that only some kinds need are imported there: without scipy a worker is ready half a second
earlier.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path as FilePath
from typing import Any, Literal, TypeVar

import torch

from analysis.clock import Clock
from analysis.errors import AnalysisError
from analysis.evaluation import Evaluation, EvaluationOptions, capture, evaluate_features, evaluate_network
from analysis.networks.loading import LoadedNetwork, load_network
from analysis.networks.ties import untie
from analysis.probes.inputs import Inputs
from analysis.probes.probe import Probe
from analysis.sweeps.looks import look
from analysis.sweeps.paths import Path, even_grid, next_point, recalibrate, require_variances
from analysis.sweeps.pruning import Pruning
from analysis.sweeps.sameness import require_same_function
from app.descriptions.labels import own_class_names
from workers.compute.features import FeatureCache, Kept, name_of
from workers.compute.probes import About, read_feature_set, read_probe
from workers.compute.series import require_comparable

Task = dict[str, Any]
OnProgress = Callable[[str, int, int], None]
T = TypeVar("T")

# Inputs on which an aligned network must give the same results as before; for a language model, which gives logits of a
# whole vocabulary at each token, sequences.
_CHECKED_INPUTS, _CHECKED_SEQUENCES = 64, 4
# Least number of points of an adaptive grid, the first total of its progress.
_ADAPTIVE_POINTS = 17


def compute(
    task: Task, device: torch.device, cache: FeatureCache, on_progress: OnProgress, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Compute the body of an evaluation's or a comparison's report, of a point, or of the report of all points.

    Args:
        task: as `attempts.begin` made it, with the paths of its files; `step` and `points` for kinds with points.
        device: where everything is computed.
        cache: the cache of an evaluation's features.
        on_progress: called with phase, done and total as the work proceeds.
        provenance: the provenance that reports of all kinds share.

    Returns:
        JSON values.

    Raises:
        AnalysisError: the task cannot be computed.
    """
    if task["analysis_id"] not in _held:
        # Another analysis: free the memory that an earlier one, possibly failed, still holds.
        _held.clear()
    if task["kind"] in _WHOLE:
        return _WHOLE[task["kind"]](task, device, cache, on_progress, provenance)
    if task["step"] == "point":
        number, (name, place) = len(task["points"]) + 1, _place(task)
        try:
            return _POINTS[task["kind"]](task, device, on_progress)
        except AnalysisError as error:
            # The place is more useful than the number: points are not computed in the order of a path.
            detail = f"Point {number}, at {name} {place:.15g}: {error.detail}"
            raise AnalysisError(error.kind, detail, **error.members, point=number, at=place) from error
    _held.clear()
    from workers.compute import summaries

    return summaries.REPORTS[task["kind"]](task) | _common(task, provenance)


def _evaluation(
    task: Task, device: torch.device, cache: FeatureCache, on_progress: OnProgress, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate a checkpoint on a probe, or a feature set."""
    clock, subject = Clock(), task["subjects"][0]
    about_network: dict[str, Any] = {"head": None}
    batch_size, reused = None, False
    on_progress("loading", 0, 0)
    if subject["kind"] == "feature_set":
        with clock.phase("load"):
            feature_set, about = read_feature_set(task)
    else:
        kept, reused = _kept(task, device, cache, on_progress, provenance, clock)
        feature_set, about_network, batch_size = kept.feature_set, kept.about_network, kept.batch_size
        about = {**task["probe"], **kept.about_probe}
    with _as_probe() if subject["kind"] == "checkpoint" else nullcontext():
        evaluation = evaluate_features(feature_set, device=device, options=_options(task), progress=on_progress)
    known = {"n_features": evaluation.n_features, "n_classes": evaluation.n_classes, **about_network}
    timings = evaluation.timings_seconds
    timings["features"] += clock.seconds.pop("features", 0.0)
    from workers.compute import summaries

    return {
        "subject": summaries.described(subject, known),
        "probe": about,
        "provenance": {
            **provenance,
            "feature_dtype": str(feature_set.features.dtype).removeprefix("torch."),
            "precision": None if subject["kind"] == "feature_set" else _options(task).precision,
            "batch_size": batch_size,
            "features_reused": reused,
        },
        "timings_seconds": {**clock.seconds, **timings},
        "splits": _splits(evaluation),
    }


def _comparison(
    task: Task, device: torch.device, cache: FeatureCache, on_progress: OnProgress, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Compare two checkpoints on one probe's samples, each with its own preprocessing if the probe gives none."""
    from analysis.comparison import ComparisonOptions, compare
    from workers.compute import summaries

    clock, kept, reused = Clock(), [], []
    on_progress("loading", 0, 0)
    for subject, brought in zip(task["subjects"], task["brought"], strict=True):
        one = {**task, "subjects": [subject], "brought": [brought]}
        found, was_there = _kept(one, device, cache, on_progress, provenance, clock)
        kept.append(found)
        reused.append(was_there)
    first, second = (found.feature_set for found in kept)
    options = ComparisonOptions(**_known(ComparisonOptions, task))
    with _as_probe():
        comparison = compare(first, second, device=device, options=options, progress=on_progress)
    timings = {**clock.seconds, **comparison.timings_seconds}
    timings["features"] += clock.seconds.get("features", 0.0)
    return {
        "subjects": [
            summaries.described(
                subject, {"n_features": entry.n_features, "n_classes": entry.n_classes, **found.about_network}
            )
            for subject, entry, found in zip(task["subjects"], (comparison.a, comparison.b), kept, strict=True)
        ],
        "probe": {**task["probe"], **kept[0].about_probe},
        "probe_b": {**task["probe"], **kept[1].about_probe},
        "provenance": {
            **provenance,
            "feature_dtype": str(first.features.dtype).removeprefix("torch."),
            "precision": options.precision,
            "batch_size": min(found.batch_size for found in kept),
            "features_reused": all(reused),
        },
        "timings_seconds": timings,
        "splits": {name: asdict(split) for name, split in comparison.splits.items()},
    }


_WHOLE: dict[str, Callable[[Task, torch.device, FeatureCache, OnProgress, dict[str, Any]], dict[str, Any]]] = {
    "evaluation": _evaluation,
    "comparison": _comparison,
}


@contextmanager
def _as_probe() -> Iterator[None]:
    """Map `invalid-feature-set` to `invalid-probe`: faulty features of a checkpoint on a probe come from the probe."""
    try:
        yield
    except AnalysisError as error:
        if error.kind == "invalid-feature-set":
            raise AnalysisError("invalid-probe", error.detail, **error.members) from error
        raise


def _kept(
    task: Task,
    device: torch.device,
    cache: FeatureCache,
    on_progress: OnProgress,
    provenance: dict[str, Any],
    clock: Clock,
) -> tuple[Kept, bool]:
    """Return features and whether they were cached; features that were not are computed, and cached now."""
    if task["subjects"][0]["architecture"]["family"] == "custom":
        # Not cached: a cache name cannot cover the operator's own code.
        return _extracted(task, device, on_progress, clock), False
    name = name_of(task, provenance)
    with clock.phase("load"):
        found = cache.find(name)
    if found is not None:
        return found, True
    computed = _extracted(task, device, on_progress, clock)
    with clock.phase("keep"):
        cache.keep(name, computed)
    return computed, False


def _extracted(task: Task, device: torch.device, on_progress: OnProgress, clock: Clock) -> Kept:
    """Pass the probe through the network once; return a feature set with the network's logits or predictions."""
    options = _options(task)
    with clock.phase("load"):
        network = _load_network(task, 0, device)
        probe, about = read_probe(task, network)
    with clock.phase("features"):
        feature_set, batch_size = capture(network, probe, device=device, options=options, progress=on_progress)
    return Kept(feature_set, _about(network), batch_size, about)


def _place(task: Task) -> tuple[str, float]:
    """Return the name of the axis of a task's points, and the next point's place on it."""
    position = len(task["points"])
    match task["kind"]:
        case "path":
            w = next_point(_grid(task["options"]["grid"]), _losses(task), _seen(task))
            assert w is not None, "the last point has said that it was the last"
            return "w", w
        case "pruning":
            return "sparsity", task["options"]["sparsities"][position]
    return task["axis"]["name"], task["axis"]["values"][position]


def _losses(task: Task) -> dict[float, float]:
    return {point["w"]: point["loss"] for point in task["points"]}


def _seen(task: Task) -> dict[float, float] | None:
    """Return the losses that the look of an adaptive path found, by w, recorded with the first point.

    None if there is no point yet, or if an earlier version computed it.
    """
    look = task["points"][0].get("look") if task["points"] else None
    return dict(zip(look["ws"], look["losses"], strict=True)) if look else None


def _path_point(task: Task, device: torch.device, on_progress: OnProgress) -> dict[str, Any]:
    grid, known, w = _grid(task["options"]["grid"]), _losses(task), _place(task)[1]
    total = len(grid) if grid != "adaptive" else max(_ADAPTIVE_POINTS, len(known) + 1)
    clock, options, on_look = Clock(), _options(task), on_progress
    on_progress = _of_point(on_progress, len(known), total)
    with clock.phase("load"):
        path, probe, about_probe, alignment, ends = _cached_for_analysis(
            task, on_progress, lambda: _load_path(task, device)
        )
    with clock.phase("mix"):
        network = path.move_to(w)
    layers = None
    # The two ends are the checkpoints themselves, including their statistics.
    if task["options"]["normalisation"] == "interpolate":
        require_variances(network, w)
    elif w not in (0.0, 1.0):
        with clock.phase("recalibrate"):
            on_progress("recalibrating", 0, 0)
            size = task["points"][0]["batch_size"]
            layers = recalibrate(network, probe, device=device, batch_size=size, precision=options.precision)
    evaluation = evaluate_network(network, probe, device=device, options=options, progress=on_progress)
    loss = evaluation.splits["all"].loss
    assert loss is not None, "a loss is defined where there are samples"
    look, seen = None, _seen(task)
    if grid == "adaptive" and not known:
        look = _look(task, device, path, probe, evaluation, clock, on_look)
        seen = dict(zip(look["ws"], look["losses"], strict=True))
    last = next_point(grid, {**known, w: loss}, seen) is None
    distance = cosine = None
    if last:
        with clock.phase("distances"):
            distance, cosine = path.distances()
    about: dict[str, Any] = {"w": w, "loss": loss, "l2_distance": distance, "cosine": cosine}
    about |= {"recalibrated_layers": layers, "alignment": alignment, "probe": about_probe, "ends": ends, "look": look}
    return _point({"w": w}, network, evaluation, clock, last, total if not last else len(known) + 1, **about)


def _look(
    task: Task,
    device: torch.device,
    path: Path,
    probe: Probe,
    evaluation: Evaluation,
    clock: Clock,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Take a look along a path and return it as JSON; recorded with the first point, for a worker that takes over."""
    assert evaluation.batch_size is not None, "a network was passed"
    with clock.phase("look"):
        found = look(
            path,
            probe,
            device=device,
            options=replace(_options(task), batch_size=evaluation.batch_size),
            recalibrating=task["options"]["normalisation"] == "recalibrate",
            progress=lambda done, total: on_progress("looking along the path", done, total),
        )
    ws = sorted(found.losses)
    return {"ws": ws, "losses": [found.losses[w] for w in ws], "n_samples": found.n_samples}


def _pruning_point(task: Task, device: torch.device, on_progress: OnProgress) -> dict[str, Any]:
    position, sparsities = len(task["points"]), task["options"]["sparsities"]
    clock, on_progress = Clock(), _of_point(on_progress, position, len(sparsities))
    with clock.phase("load"):
        pruning, probe, about = _cached_for_analysis(task, on_progress, lambda: _load_pruning(task, device))
    with clock.phase("prune"):
        n_pruned = pruning.prune_to(sparsities[position])
    evaluation = evaluate_network(pruning.network, probe, device=device, options=_options(task), progress=on_progress)
    point = {"sparsity": sparsities[position], "n_pruned": n_pruned}
    last = position == len(sparsities) - 1
    known = {"n_prunable": pruning.n_prunable, "probe": about}
    return _point(point, pruning.network, evaluation, clock, last, len(sparsities), **known)


def _series_point(task: Task, device: torch.device, on_progress: OnProgress) -> dict[str, Any]:
    position, total = len(task["points"]), len(task["subjects"])
    clock, on_progress = Clock(), _of_point(on_progress, position, total)
    with clock.phase("load"):
        network = _load_network(task, position, device)
        probe, about = _series_probe(task, position, network, device, on_progress)
    evaluation = evaluate_network(network, probe, device=device, options=_options(task), progress=on_progress)
    point = {"x": task["axis"]["values"][position], "checkpoint_id": task["subjects"][position]["id"]}
    point["reused_report_id"] = None
    answer = _point(point, network, evaluation, clock, position == total - 1, total, probe=about)
    # Checked at each point and not only at the end, since a series may be long.
    require_comparable([*task["points"], answer["known"]])
    return answer


def _series_probe(
    task: Task, position: int, network: LoadedNetwork, device: torch.device, on_progress: OnProgress
) -> tuple[Probe, About]:
    """Return the probe as read for this checkpoint's description; read once for equal descriptions in a row."""
    subject = task["subjects"][position]
    held = _held.get(task["analysis_id"])
    if held is None or held[0] != subject["architecture"]:
        _held.clear()
        own = {**task, "subjects": [subject]}
        held = (
            subject["architecture"],
            *_cached_for_analysis(own, on_progress, lambda: _load_probe(own, network, device)),
        )
        _held[task["analysis_id"]] = held
    _, probe, about = held
    return probe, about


_POINTS: dict[str, Callable[[Task, torch.device, OnProgress], dict[str, Any]]] = {
    "path": _path_point,
    "pruning": _pruning_point,
    "series": _series_point,
}


def _point(
    point: dict[str, Any],
    network: LoadedNetwork,
    evaluation: Evaluation,
    clock: "Clock",
    last: bool,
    total: int,
    **known: Any,
) -> dict[str, Any]:
    return {
        "point": {**point, "splits": _splits(evaluation)},
        "known": {
            **known,
            **_about(network),
            "n_features": evaluation.n_features,
            "n_classes": evaluation.n_classes,
            "batch_size": evaluation.batch_size,
        },
        "timings_seconds": {**clock.seconds, **evaluation.timings_seconds},
        "last": last,
        "total": total,
    }


def _common(task: Task, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the members common to the reports of all kinds with points."""
    timings: dict[str, float] = {}
    for point in task["points"]:
        for phase, seconds in point["timings_seconds"].items():
            timings[phase] = timings.get(phase, 0.0) + seconds
    sizes = [point["known"]["batch_size"] for point in task["points"] if point["known"].get("batch_size")]
    return {
        # A point computed by an earlier version does not describe the probe.
        "probe": task["points"][0]["known"].get("probe", task["probe"]),
        "provenance": {
            **provenance,
            "feature_dtype": "float32",
            "precision": _options(task).precision,
            "batch_size": min(sizes, default=None),
            "features_reused": False,
        },
        "timings_seconds": timings,
    }


def _splits(evaluation: Evaluation) -> dict[str, Any]:
    return {name: asdict(split) for name, split in evaluation.splits.items()}


def _options(task: Task) -> EvaluationOptions:
    return EvaluationOptions(**_known(EvaluationOptions, task))


def _known(options: type[EvaluationOptions], task: Task) -> dict[str, Any]:
    """Return the requested options that the mathematics takes."""
    names = {field.name for field in fields(options)}
    return {name: value for name, value in task["options"].items() if name in names}


def _grid(grid: Any) -> Sequence[float] | Literal["adaptive"]:
    """Return the points of a path, both ends first, because points between them are measured from the ends."""
    if grid == "adaptive":
        return "adaptive"
    points = even_grid(grid["points"]) if "points" in grid else grid["values"]
    return [0.0, 1.0, *sorted({float(w) for w in points} - {0.0, 1.0})]


# Networks and probe shared by the points of the current analysis, so that they are read once for all points.
_held: dict[str, Any] = {}


def _cached_for_analysis(task: Task, on_progress: OnProgress, load: Callable[[], T]) -> T:
    """Return the result of `load`, cached until the report is made or a task of another analysis comes."""
    if task["analysis_id"] not in _held:
        on_progress("loading", 0, 0)
        _held[task["analysis_id"]] = load()
    kept: T = _held[task["analysis_id"]]
    return kept


def _load_path(
    task: Task, device: torch.device
) -> tuple[Path, Probe, About, dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the path, the probe, the report's `probe` section, the alignment of B to A if requested, and both ends."""
    first, second = (_load_network(task, position, device) for position in (0, 1))
    ends = [_about(network) for network in (first, second)]
    # Weights that only one file ties are mixed as two tensors; otherwise B's end would not be B.
    for network, other in ((first, second), (second, first)):
        untie(network.module, set(other.naming.untied) - set(network.naming.untied))
    # Of two checkpoints of one network, one may name its classes where the other has LABEL_0, LABEL_1, ...
    named = [subject for subject in task["subjects"] if own_class_names(subject["architecture"])]
    probe, about_probe = _load_probe({**task, "subjects": [*named, *task["subjects"]][:1]}, first, device)
    checked = _CHECKED_SEQUENCES if first.predicts_tokens else _CHECKED_INPUTS
    batch = next(probe.batches(checked, device=device))
    _require_one_network(task, first, second, batch)
    if task["options"]["alignment"] == "none":
        return Path(first, second.module.state_dict()), probe, about_probe, None, ends
    from analysis.sweeps.alignment import aligned

    generator = torch.Generator().manual_seed(task["options"]["seed"])
    state, alignment, change = aligned(first.module, second.module, batch, generator=generator)
    about = {"n_groups": len(alignment.permutations), "sweeps": alignment.sweeps, "gain": alignment.gain}
    return Path(first, state), probe, about_probe, {**about, "change_of_logits": change}, ends


def _require_one_network(task: Task, first: LoadedNetwork, second: LoadedNetwork, batch: Inputs) -> None:
    """Check that two built networks compute the same function; the API has refused the certain cases already."""
    a, b = task["subjects"]
    try:
        require_same_function(first, second, (a["architecture"], b["architecture"]), batch)
    except AnalysisError as error:
        if error.kind != "architectures-differ":
            raise
        named = [{"checkpoint_id": b["id"], "name": b["name"], **one} for one in error.members["differing"]]
        raise AnalysisError(error.kind, error.detail, differing=named) from error


def _load_pruning(task: Task, device: torch.device) -> tuple[Pruning, Probe, About]:
    options, network = task["options"], _load_network(task, 0, device)
    pruning = Pruning(network, options["scope"], include_head=options["include_head"])
    return pruning, *_load_probe(task, network, device)


def _load_network(task: Task, position: int, device: torch.device) -> LoadedNetwork:
    subject = task["subjects"][position]
    return load_network(
        subject["architecture"],
        _file(task, subject),
        head=subject["head"],
        device=device,
        prefix=subject.get("asked_prefix"),
    )


def _about(network: LoadedNetwork) -> dict[str, Any]:
    """Return a network's members of a report that its checkpoint's row does not have."""
    return {"head": network.head_name, **asdict(network.naming)}


def _load_probe(task: Task, network: LoadedNetwork, device: torch.device) -> tuple[Probe, About]:
    """Return the probe, prepared for repeated passes, and the report's `probe` section."""
    probe, about = read_probe(task, network)
    return probe.prepared(device), about


def _file(task: Task, resource: dict[str, Any]) -> FilePath:
    return FilePath(task["paths"][resource["sha256"]])


def _of_point(on_progress: OnProgress, done: int, total: int) -> OnProgress:
    """Return a callback for progress within a point, which passes on the phase but counts the points."""
    return lambda phase, _done, _total: on_progress(phase, done, total)

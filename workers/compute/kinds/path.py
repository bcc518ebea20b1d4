"""Evaluate points of the line between two checkpoints, and combine them into a report."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import torch

from analysis.clock import Clock
from analysis.errors import AnalysisError
from analysis.evaluation import Evaluation, EvaluationOptions, evaluate_network
from analysis.networks.loading import LoadedNetwork
from analysis.networks.ties import untie
from analysis.probes.inputs import Inputs
from analysis.sweeps import grids
from analysis.sweeps.grids import CONNECTED, barrier, instability, midpoint_barrier
from analysis.sweeps.looks import look
from analysis.sweeps.paths import Path, recalibrate, require_variances
from analysis.sweeps.sameness import require_same_function
from app.descriptions.labels import own_class_names
from app.schemas.reports import Alignment, Barrier, BarrierForms, PathLook, PathPoint, PathSplit, PathSummary
from workers.compute.context import Context, load, network_facts, options_of
from workers.compute.kinds.points import (
    MEASURED,
    LoadedProbe,
    common_members,
    defined,
    described_with,
    known_of,
    load_probe,
    measured,
    options_of_point,
    splits_of_point,
    timings_of,
    within_point,
)
from workers.tasks import Json, KnownOfPath, Look, Network, PathAnswer, PathPointTask, PathReportTask, PathTask

# Inputs on which an aligned network must give the same results as before; for a language model, which gives logits of a
# whole vocabulary at each token, sequences.
_CHECKED_INPUTS, _CHECKED_SEQUENCES = 64, 4
_ROUNDING = 1e-12


@dataclass(frozen=True)
class _LoadedPath:
    path: Path
    probe: LoadedProbe
    alignment: Alignment | None
    ends: list[Network]


def path_point(task: PathPointTask, context: Context) -> PathAnswer:
    """Compute a point of a path; the first also finds what the others and the report need."""
    clock, options, w, within = Clock(), options_of_point(task), task.place, within_point(context)
    with clock.phase("load"):
        loaded = context.held.get(task.analysis_id, _LoadedPath, lambda: _load_path(task, within))
    with clock.phase("mix"):
        network = loaded.path.move_to(w)
    layers = None
    # The two ends are the checkpoints themselves, including their statistics.
    if task.options.normalisation == "interpolate":
        require_variances(network, w)
    elif w not in (0.0, 1.0):
        with clock.phase("recalibrate"):
            within.on_progress("recalibrating", 0, 0)
            size = options.batch_size
            assert size is not None, "the first point, which is an end, has it"
            layers = recalibrate(
                network, loaded.probe.probe, device=context.device, batch_size=size, precision=options.precision
            )
    evaluation = evaluate_network(
        network, loaded.probe.probe, device=context.device, options=options, progress=within.on_progress
    )
    loss = evaluation.splits["all"].loss
    assert loss is not None, "a loss is defined where there are samples"
    first_look = distance = cosine = None
    if task.number == 0:
        if task.options.grid == "adaptive":
            first_look = _look(task, context, loaded, evaluation, clock)
        with clock.phase("distances"):
            distance, cosine = loaded.path.distances()
    known = KnownOfPath(
        **dict(known_of(network, evaluation, loaded.probe.about, context)),
        w=w,
        loss=loss,
        l2_distance=distance,
        cosine=cosine,
        recalibrated_layers=layers,
        alignment=loaded.alignment,
        ends=loaded.ends,
        look=first_look,
    )
    return PathAnswer(
        point=PathPoint.model_validate({"w": w, "splits": splits_of_point(evaluation)}),
        known=known,
        timings_seconds=timings_of(clock, evaluation),
    )


def path_report(task: PathReportTask, context: Context) -> Json:
    """Return the body of the report of all points of a path, in the order of w."""
    answers = sorted(task.points, key=lambda answer: answer.known.w)
    points = [answer.point for answer in answers]
    layers = [answer.known.recalibrated_layers for answer in answers if answer.known.recalibrated_layers is not None]
    first = task.points[0].known
    ends: Sequence[Network | None] = first.ends or (None, None)
    assert first.l2_distance is not None, "the first point has the distances"
    resolution, summary_of_look = _looked_at(first.look, [point.w for point in points])
    summary = PathSummary(
        splits={split: _path_split(points, split) for split in points[0].splits},
        measured=MEASURED,
        l2_distance=first.l2_distance,
        cosine=first.cosine,
        reasons={"cosine": "zero_length"} if first.cosine is None else {},
        alignment=first.alignment,
        recalibrated_layers=max(layers, default=None),
        resolution=resolution,
        look=summary_of_look,
    )
    return {
        "subjects": [
            described_with(checkpoint, answer.known, end).model_dump(mode="json")
            for checkpoint, answer, end in zip(task.checkpoints, task.points, ends, strict=False)
        ],
        "points": [point.model_dump(mode="json", by_alias=True) for point in points],
        "summary": summary.model_dump(mode="json"),
        **common_members(task, answers, context),
    }


def _look(task: PathTask, context: Context, loaded: _LoadedPath, evaluation: Evaluation, clock: Clock) -> Look:
    """Take a look along a path; it is recorded with the first point, for a worker that takes over."""
    with clock.phase("look"):
        found = look(
            loaded.path,
            loaded.probe.probe,
            device=context.device,
            options=replace(options_of(EvaluationOptions, task), batch_size=evaluation.batch_size),
            recalibrating=task.options.normalisation == "recalibrate",
            progress=lambda done, total: context.on_progress("looking along the path", done, total),
        )
    ws = sorted(found.losses)
    return Look(ws=ws, losses=[found.losses[w] for w in ws], n_samples=found.n_samples)


def _load_path(task: PathTask, context: Context) -> _LoadedPath:
    """Load both ends and the probe; align B to A if requested."""
    context.on_progress("loading", 0, 0)
    first, second = (load(context, checkpoint) for checkpoint in task.checkpoints)
    ends = [network_facts(network) for network in (first, second)]
    # Weights that only one file ties are mixed as two tensors; otherwise B's end would not be B.
    for network, other in ((first, second), (second, first)):
        untie(network.module, set(other.naming.untied) - set(network.naming.untied))
    # Of two checkpoints of one network, one may name its classes where the other has LABEL_0, LABEL_1, ...
    named = [checkpoint for checkpoint in task.checkpoints if own_class_names(checkpoint.architecture)]
    probe = load_probe(task, context, first, [*named, *task.checkpoints][0])
    checked = _CHECKED_SEQUENCES if first.predicts_tokens else _CHECKED_INPUTS
    batch = next(probe.probe.batches(checked, device=context.device))
    _require_one_network(task, first, second, batch)
    if task.options.alignment == "none":
        return _LoadedPath(Path(first, second.module.state_dict()), probe, None, ends)
    # Imported late, for scipy: a worker is ready half a second earlier without it.
    from analysis.sweeps.alignment import aligned

    generator = torch.Generator().manual_seed(task.options.seed)
    state, found, change = aligned(first.module, second.module, batch, generator=generator)
    alignment = Alignment(
        n_groups=len(found.permutations), sweeps=found.sweeps, gain=found.gain, change_of_logits=change
    )
    return _LoadedPath(Path(first, state), probe, alignment, ends)


def _require_one_network(task: PathTask, first: LoadedNetwork, second: LoadedNetwork, batch: Inputs) -> None:
    """Check that two built networks compute the same function; the API has refused the certain cases already."""
    a, b = task.checkpoints
    try:
        require_same_function(first, second, (a.architecture, b.architecture), batch)
    except AnalysisError as error:
        if error.kind != "architectures-differ":
            raise
        named = [{"checkpoint_id": b.id, "name": b.name, **one} for one in error.members["differing"]]
        raise AnalysisError(error.kind, error.detail, differing=named) from error


def _looked_at(look: Look | None, ws: Sequence[float]) -> tuple[float, PathLook | None]:
    """Return how densely a path was sampled by its points and by the look of an adaptive grid, and the look."""
    places = sorted({w for w in [*ws, *(look.ws if look else [])] if 0 <= w <= 1})
    resolution = max(high - low for low, high in pairwise(places))
    if look is None:
        return resolution, None
    highest = Barrier(**asdict(barrier(look.ws, look.losses)))
    return resolution, PathLook(n_points=len(look.ws), n_samples=look.n_samples, loss_barrier=highest)


def _path_split(points: Sequence[PathPoint], split: Literal["all", "train", "test"]) -> PathSplit:
    """Return the barriers of one split; a quantity that is undefined at any point has none."""
    ws, of_split = [point.w for point in points], [point.splits[split] for point in points]
    losses, errors = [defined(one.loss) for one in of_split], [1 - defined(one.accuracy) for one in of_split]
    barriers = {
        "loss_barrier": _highest(ws, losses, barrier),
        "error_barrier": _highest(ws, errors, instability),
        "mir_barrier": _highest(ws, [measured(one).mir for one in of_split], partial(barrier, falls=True)),
        "hdr_barrier": _highest(ws, [measured(one).hdr for one in of_split], barrier),
    }
    error, forms = barriers["error_barrier"], {"loss_forms": _forms(ws, losses), "error_forms": _forms(ws, errors)}
    reasons = {name: "undefined_points" for name, found in barriers.items() if found is None}
    reasons |= {f"{name}.midpoint": "no_midpoint" for name, form in forms.items() if form.midpoint is None}
    # An error barrier of 1 in 50 samples is 0.020000000000000018 after the subtractions that give it.
    connected = error is not None and error.value <= CONNECTED + _ROUNDING
    return PathSplit.model_validate({**barriers, **forms, "connected": connected, "reasons": reasons})


def _highest(
    ws: Sequence[float],
    values: Sequence[float | None],
    form: Callable[[Sequence[float], Sequence[float]], grids.Barrier],
) -> Barrier | None:
    """Return a barrier in one of its forms; None if a value is undefined."""
    defined = [value for value in values if value is not None]
    return Barrier(**asdict(form(ws, defined))) if len(defined) == len(values) else None


def _forms(ws: Sequence[float], values: Sequence[float]) -> BarrierForms:
    return BarrierForms(
        frankle=Barrier(**asdict(instability(ws, values))),
        entezari=Barrier(**asdict(barrier(ws, values))),
        midpoint=midpoint_barrier(ws, values),
    )

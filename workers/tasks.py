"""What a worker asks of its compute process, and what it answers: one frozen type for each kind and step.

An evaluation and a comparison take one step, whose answer is the body of the report. A path, a pruning sweep and a
series take one step for each point and a last one for the report. An answer for a point holds the point, the facts
that later points and the report need, and whether it was the last. So each point is recorded when it is computed, and
a kill costs one point.

Tasks and answers cross between processes as JSON and are validated on arrival.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, TypeAdapter

from app.files.datafile import Format, Limits
from app.schemas import Axis, ComparisonOptions, EvaluationOptions, Kind, PathOptions, PruningOptions
from app.schemas.adapters import Adapter
from app.schemas.reports import Alignment, PathPoint, ProbeSubject, PruningPoint, SeriesPoint

Json = dict[str, JsonValue]
Row = TypeVar("Row", bound="_Row")


class Frozen(BaseModel):
    """A value that crosses between processes."""

    # Validators are built at first use: most processes use few of them.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class _Row(Frozen):
    """Members of a database row, by the row's own names."""

    id: str
    name: str
    sha256: str

    @classmethod
    def of(cls: type[Row], row: object) -> Row:
        """Return the members of a row; metadata is `metadata_` there, since `metadata` is SQLAlchemy's own name."""
        names = {name: "metadata_" if name == "metadata" else name for name in cls.model_fields}
        return cls(**{name: getattr(row, theirs) for name, theirs in names.items()})


class Base(_Row):
    """The checkpoint whose weights an adapter changes."""

    model_config = ConfigDict(from_attributes=True)

    asked_prefix: str | None


class Checkpoint(_Row):
    """A checkpoint, and what it brings for the probe: preprocessing of images, a tokenizer for texts.

    An adapter has its base and its configuration; architecture and head are of the network that both make.
    """

    size_bytes: int
    n_parameters: int
    architecture: Json
    base: Base | None = None
    adapter: Adapter | None = None
    head: str | None
    prefix: str
    ignored: dict[str, int]
    asked_prefix: str | None
    preprocess: Json | None
    tokenizer_sha256: str | None
    metadata: Json


class Probe(_Row):
    """A probe, and how its file is read."""

    data_sha256: str | None
    n_samples: int
    n_classes: int
    class_counts: list[int]
    class_names: list[str] | None
    format: Format | Literal["safetensors", "npz"]
    content: str
    input_shape: list[int] | None
    preprocess: Json | None
    columns: dict[str, str | None] | None
    tokenizer_sha256: str | None
    max_length: int | None


class FeatureSet(_Row):
    """Features with labels and a head, which need no network."""

    size_bytes: int
    data_sha256: str | None
    n_samples: int
    n_classes: int
    class_counts: list[int]
    metadata: Json


class Files(Frozen):
    """The files of a step.

    Attributes:
        paths: of the blobs that the step needs, by sha256.
        dataset: the operator's limits on a probe's file.
        image_pixels: most pixels of an image that is decoded.
    """

    paths: dict[str, Path]
    dataset: Limits
    image_pixels: int


# Tasks of analyses, as their rows give them.


class Task(Frozen):
    """A task for one analysis."""

    analysis_id: str
    # Of the request that asked for it, for logs.
    request_id: str | None = None
    options: EvaluationOptions


class FeatureSetTask(Task):
    """Evaluate a feature set."""

    step: Literal["feature_set"] = "feature_set"
    feature_set: FeatureSet


class NetworkTask(Task):
    """A task on one or several checkpoints and a probe."""

    checkpoints: tuple[Checkpoint, ...] = Field(min_length=1)
    probe: Probe


class EvaluationTask(NetworkTask):
    """Evaluate a checkpoint on a probe."""

    step: Literal["evaluation"] = "evaluation"


class ComparisonTask(NetworkTask):
    """Compare two checkpoints on a probe."""

    step: Literal["comparison"] = "comparison"
    options: ComparisonOptions


class PointsTask(NetworkTask):
    """A task whose report has points."""


class PathTask(PointsTask):
    """Evaluate points of the line between two checkpoints."""

    options: PathOptions


class PruningTask(PointsTask):
    """Prune a checkpoint and evaluate it at each sparsity."""

    options: PruningOptions


class SeriesTask(PointsTask):
    """Evaluate checkpoints in order."""

    axis: Axis


# Answers for points. A member with a default is missing from points that an earlier version recorded, which may have
# others that are gone: an analysis goes on after an upgrade.


class Network(BaseModel):
    """Facts of a network that its checkpoint's row does not have; a feature set has none of them."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    head: str | None = None
    prefix: str | None = None
    infixes: dict[str, int] | None = None
    ignored: dict[str, int] | None = None
    untied: list[str] | None = None
    n_parameters: int | None = None
    filled_to: int | None = None


class Known(Network):
    """Facts of a point that later points and the report need."""

    n_features: int
    n_classes: int
    batch_size: int | None = None
    probe: ProbeSubject | None = None


class Look(Frozen):
    """Losses on a part of the probe, by which an adaptive path chooses its points."""

    ws: list[FiniteFloat]
    losses: list[FiniteFloat]
    n_samples: int


class KnownOfPath(Known):
    """Facts of a point of a path; distances are known at the last point, the look at the first."""

    w: FiniteFloat
    loss: FiniteFloat
    l2_distance: FiniteFloat | None = None
    cosine: FiniteFloat | None = None
    recalibrated_layers: int | None = None
    alignment: Alignment | None = None
    ends: list[Network] | None = None
    look: Look | None = None


class KnownOfPruning(Known):
    """Facts of a pruned network."""

    n_prunable: int


class Answer(Frozen):
    """The answer for a point.

    Attributes:
        known: facts that later points and the report need.
        timings_seconds: elapsed time by phase.
        last: whether no point follows.
        total: points that the analysis will have, as far as is known.
    """

    known: Known
    timings_seconds: dict[str, FiniteFloat]
    last: bool
    total: int


class PathAnswer(Answer):
    """The answer for a point of a path."""

    point: PathPoint
    known: KnownOfPath


class PruningAnswer(Answer):
    """The answer for a sparsity."""

    point: PruningPoint
    known: KnownOfPruning


class SeriesAnswer(Answer):
    """The answer for a checkpoint of a series."""

    point: SeriesPoint


# Steps of the kinds with points.


class PathPointTask(PathTask):
    """Compute the next point of a path."""

    step: Literal["path.point"] = "path.point"
    known: tuple[KnownOfPath, ...]
    total: int = 0


class PathReportTask(PathTask):
    """Make the report of all points of a path."""

    step: Literal["path.report"] = "path.report"
    points: tuple[PathAnswer, ...]


class PruningPointTask(PruningTask):
    """Compute the next point of a pruning sweep."""

    step: Literal["pruning.point"] = "pruning.point"
    known: tuple[KnownOfPruning, ...]
    total: int = 0


class PruningReportTask(PruningTask):
    """Make the report of all points of a pruning sweep."""

    step: Literal["pruning.report"] = "pruning.report"
    points: tuple[PruningAnswer, ...]


class SeriesPointTask(SeriesTask):
    """Compute the next point of a series."""

    step: Literal["series.point"] = "series.point"
    known: tuple[Known, ...]
    total: int = 0


class SeriesReportTask(SeriesTask):
    """Make the report of all points of a series."""

    step: Literal["series.report"] = "series.report"
    points: tuple[SeriesAnswer, ...]


WholeStep = FeatureSetTask | EvaluationTask | ComparisonTask
PointStep = PathPointTask | PruningPointTask | SeriesPointTask
ReportStep = PathReportTask | PruningReportTask | SeriesReportTask
Step = Annotated[WholeStep | PointStep | ReportStep, Field(discriminator="step")]


@dataclass(frozen=True)
class _Steps:
    """The types of a kind's steps, and of its answer for a point."""

    point: type[PathPointTask] | type[PruningPointTask] | type[SeriesPointTask]
    report: type[PathReportTask] | type[PruningReportTask] | type[SeriesReportTask]
    answer: type[Answer]


# The task of each kind of analysis of checkpoints, and the steps of the kinds that have points.
TASKS: dict[Kind, type[NetworkTask]] = {
    "evaluation": EvaluationTask,
    "comparison": ComparisonTask,
    "path": PathTask,
    "pruning": PruningTask,
    "series": SeriesTask,
}
_STEPS: dict[type[PointsTask], _Steps] = {
    PathTask: _Steps(PathPointTask, PathReportTask, PathAnswer),
    PruningTask: _Steps(PruningPointTask, PruningReportTask, PruningAnswer),
    SeriesTask: _Steps(SeriesPointTask, SeriesReportTask, SeriesAnswer),
}


def point_step(task: PointsTask, answers: Sequence[Answer]) -> PointStep:
    """Return the step that computes the point after these."""
    known = tuple(answer.known for answer in answers)
    total = answers[-1].total if answers else 0
    return _STEPS[type(task)].point.model_validate({**dict(task), "known": known, "total": total})


def report_step(task: PointsTask, answers: Sequence[Answer]) -> ReportStep:
    """Return the step that makes the report of these points, which are all."""
    return _STEPS[type(task)].report.model_validate({**dict(task), "points": tuple(answers)})


def answer_of(task: PointsTask, body: Json) -> Answer:
    """Return the answer for a point, as recorded or as it comes from the compute process."""
    return _STEPS[type(task)].answer.model_validate(body)


# Messages between the worker and its compute process, one in a line.


class Work(Frozen):
    """Worker to compute process: a step to compute."""

    step: Step
    files: Files


class Progress(Frozen):
    """Progress of a step: a phase in words, and how much of it is done; a total of 0 is unknown."""

    phase: str
    done: int
    total: int


class Result(Frozen):
    """How a step ended: with the body of a report or an answer, with a problem, or, if cancelled, with neither."""

    outcome: Literal["succeeded", "failed", "cancelled"]
    body: Json | None = None
    problem: Json | None = None


class Hello(Frozen):
    """The first message of a compute process: the device, and the families of networks that it may build.

    Attributes:
        device: the GPU's name, or `cpu`.
        torch_version: version of torch.
        families: families that need no import.
        untried: families that are installed and not tried yet.
    """

    device: str
    torch_version: str
    families: list[str]
    untried: list[str]


class OfAnalysis(Frozen):
    """Compute process to worker: one of progress, the body that was computed, and the problem that prevented it."""

    analysis_id: str
    progress: Progress | None = None
    body: Json | None = None
    problem: Json | None = None


MESSAGES: TypeAdapter[Hello | OfAnalysis] = TypeAdapter(Hello | OfAnalysis)

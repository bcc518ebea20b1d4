"""What a worker asks of its compute process, and what it answers: one frozen type for each kind and step.

An evaluation takes one step, whose answer is the body of the report. All other kinds are planned, and so is an
evaluation over a large probe: they take a step for each point, side of a comparison or shard of a pass, and a last one
for the report. An answer for a point holds the point and the facts that the other points, or the report, need. Each
point is recorded when it is computed, so a kill costs one point, and points that need nothing of each other are
computed by several workers.

Tasks and answers cross between processes as JSON and are validated on arrival.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, TypeAdapter

from analysis.sweeps.grids import even_grid, next_points
from app.files.datafile import Format, Limits
from app.schemas import (
    Axis,
    ComparisonOptions,
    EvaluationOptions,
    EvenGrid,
    Kind,
    PathOptions,
    PruningOptions,
)
from app.schemas.adapters import Adapter
from app.schemas.reports import Alignment, ComputedOn, PathPoint, ProbeSubject, PruningPoint, SeriesPoint

Json = dict[str, JsonValue]
_WEIGHT_BYTES = 4
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
    # Of the request that asked for it, for logs and traces.
    request_id: str | None = None
    traceparent: str | None = None
    # How long it waited for its first attempt, which this is.
    waited_seconds: FiniteFloat | None = None
    options: EvaluationOptions

    @property
    def needs_bytes(self) -> int:
        """The device memory that the analysis needs at least, as far as its rows say."""
        return 0


class FeatureSetTask(Task):
    """Evaluate a feature set."""

    step: Literal["feature_set"] = "feature_set"
    feature_set: FeatureSet


class NetworkTask(Task):
    """A task on one or several checkpoints and a probe."""

    # How often the weights of a network lie on the device at a time.
    weight_copies: ClassVar[int] = 1
    checkpoints: tuple[Checkpoint, ...] = Field(min_length=1)
    probe: Probe
    # Samples of each shard of the pass, and of each file of its features; null for one.
    shard_samples: int | None = None

    @property
    def needs_bytes(self) -> int:
        """The device memory that the weights take, as float32.

        A pass needs more, which is known once memory has run out with one input at a time.
        """
        largest = max(checkpoint.n_parameters for checkpoint in self.checkpoints)
        return _WEIGHT_BYTES * self.weight_copies * largest


class EvaluationTask(NetworkTask):
    """Evaluate a checkpoint on a probe."""

    step: Literal["evaluation"] = "evaluation"


class PlannedTask(NetworkTask, ABC):
    """A task of several steps, which several workers may compute."""

    # Points of the first round, which are computed without the facts of the first point.
    n_first: ClassVar[int] = 2

    @abstractmethod
    def further(self, answers: Sequence["Answer"]) -> list[float]:
        """Return the places of the next points, all of which may be computed at once.

        Args:
            answers: for all points so far, in the order in which their places were returned.

        Returns:
            The places on the axis; none if these were all points, and the report comes next.
        """


class ShardedTask(PlannedTask):
    """Evaluate a checkpoint on a large probe. The points are shards of the pass, at their first samples."""

    # The first decides the batch size of all, and where they begin.
    n_first = 1

    def further(self, answers: Sequence["Answer"]) -> list[float]:
        """Return the first shard, and then all others."""
        if not answers:
            return [0.0]
        first = answers[0].known
        assert isinstance(first, KnownOfShard)
        return [float(start) for start in range(first.stop, first.n_samples, first.stop)] if len(answers) == 1 else []


class ComparisonTask(PlannedTask):
    """Compare two checkpoints on a probe. The points are its two sides."""

    options: ComparisonOptions

    def further(self, answers: Sequence["Answer"]) -> list[float]:
        """Return both sides at once, in a comparison whose features can be kept."""
        # A name of kept features cannot cover the operator's own code, so the last step computes both sides.
        if answers or any(checkpoint.architecture["family"] == "custom" for checkpoint in self.checkpoints):
            return []
        return [0.0, 1.0]


class PointsTask(PlannedTask):
    """A task whose report has points."""

    @abstractmethod
    def place_name(self) -> str:
        """Return what a place on the axis is, as a failure names it."""

    @abstractmethod
    def places(self) -> list[float]:
        """Return the places of all points that are known from the start, in the order in which they are computed."""

    def further(self, answers: Sequence["Answer"]) -> list[float]:
        """Return the first places, the facts of the first of which all later ones need, and then all others."""
        places = self.places()
        return places[len(answers) :] if answers else places[: self.n_first]


class PathTask(PointsTask):
    """Evaluate points of the line between two checkpoints."""

    # Both ends, and what lies between them.
    weight_copies = 3
    options: PathOptions

    def place_name(self) -> str:
        """Return the name of a path's axis."""
        return "w"

    def places(self) -> list[float]:
        """Return both ends, from which points between them are measured, and the points of a fixed grid."""
        grid, ends = self.options.grid, [0.0, 1.0]
        if grid == "adaptive":
            return ends
        points = even_grid(grid.points) if isinstance(grid, EvenGrid) else grid.values
        return [*ends, *sorted({float(w) for w in points} - set(ends))]

    def further(self, answers: Sequence["Answer"]) -> list[float]:
        """Return both ends, then all points between them, or the rounds of an adaptive grid."""
        if self.options.grid != "adaptive" or not answers:
            return super().further(answers)
        known = [answer.known for answer in answers if isinstance(answer.known, KnownOfPath)]
        look = known[0].look
        seen = None if look is None else dict(zip(look.ws, look.losses, strict=True))
        return next_points({one.w: one.loss for one in known}, seen)


class PruningTask(PointsTask):
    """Prune a checkpoint and evaluate it at each sparsity."""

    # Before and after.
    weight_copies = 2
    options: PruningOptions

    def place_name(self) -> str:
        """Return the name of a sweep's axis."""
        return "sparsity"

    def places(self) -> list[float]:
        """Return the sparsities."""
        return list(self.options.sparsities)


class SeriesTask(PointsTask):
    """Evaluate checkpoints in order. Each must be comparable with the first."""

    n_first = 1
    axis: Axis

    def place_name(self) -> str:
        """Return the name that the request gave the axis."""
        return self.axis.name

    def places(self) -> list[float]:
        """Return the values on the axis."""
        return list(self.axis.values)


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
    """Facts of a point that other points and the report need."""

    n_features: int
    n_classes: int
    batch_size: int | None = None
    probe: ProbeSubject | None = None
    computed_on: ComputedOn | None = None


class Look(Frozen):
    """Losses on a part of the probe, by which an adaptive path chooses its points."""

    ws: list[FiniteFloat]
    losses: list[FiniteFloat]
    n_samples: int


class KnownOfPath(Known):
    """Facts of a point of a path; distances, ends and a look are known at the first."""

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


class KnownOfShard(Known):
    """Facts of a shard, whose features are kept under a name.

    Attributes:
        entry: the name of the whole pass, as its worker calls it: unlike workers have unlike names.
        start: its first sample.
        stop: the first sample after it.
        n_samples: of the whole pass.
        n_rows: rows of its features: samples, or positions of sequences.
    """

    entry: str
    start: int
    stop: int
    n_samples: int
    n_rows: int


class Answer(Frozen):
    """The answer for a point.

    Attributes:
        known: facts that other points and the report need.
        timings_seconds: elapsed time by phase.
    """

    known: Known
    timings_seconds: dict[str, FiniteFloat]


class ShardAnswer(Answer):
    """The answer for a shard; `reused` if its features were kept before."""

    known: KnownOfShard
    reused: bool


class SideAnswer(Answer):
    """The answer for a side of a comparison, whose features are kept; `reused` if an earlier analysis kept them."""

    reused: bool


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


# Steps of the planned kinds.


class AtPlace(Frozen):
    """Where a point is.

    Attributes:
        number: of the point in the order of its plan, from 0.
        place: its place on the axis.
    """

    number: int
    place: FiniteFloat


class ShardTask(ShardedTask, AtPlace):
    """Pass one shard, and keep its features."""

    step: Literal["evaluation.shard"] = "evaluation.shard"
    first: KnownOfShard | None = None


class ShardedReportTask(ShardedTask):
    """Put the features of all shards together and measure them; without answers, compute them first."""

    step: Literal["evaluation.report"] = "evaluation.report"
    points: tuple[ShardAnswer, ...]


class SideTask(ComparisonTask, AtPlace):
    """Compute and keep the features of one side of a comparison."""

    step: Literal["comparison.side"] = "comparison.side"
    first: Known | None = None


class ComparisonReportTask(ComparisonTask):
    """Compare both sides; without answers, compute them first."""

    step: Literal["comparison.report"] = "comparison.report"
    points: tuple[SideAnswer, ...]


class PathPointTask(PathTask, AtPlace):
    """Compute a point of a path."""

    step: Literal["path.point"] = "path.point"
    first: KnownOfPath | None = None


class PathReportTask(PathTask):
    """Make the report of all points of a path."""

    step: Literal["path.report"] = "path.report"
    points: tuple[PathAnswer, ...]


class PruningPointTask(PruningTask, AtPlace):
    """Compute a point of a pruning sweep."""

    step: Literal["pruning.point"] = "pruning.point"
    first: KnownOfPruning | None = None


class PruningReportTask(PruningTask):
    """Make the report of all points of a pruning sweep."""

    step: Literal["pruning.report"] = "pruning.report"
    points: tuple[PruningAnswer, ...]


class SeriesPointTask(SeriesTask, AtPlace):
    """Compute a point of a series."""

    step: Literal["series.point"] = "series.point"
    first: Known | None = None


class SeriesReportTask(SeriesTask):
    """Make the report of all points of a series."""

    step: Literal["series.report"] = "series.report"
    points: tuple[SeriesAnswer, ...]


WholeStep = FeatureSetTask | EvaluationTask
PointStep = ShardTask | SideTask | PathPointTask | PruningPointTask | SeriesPointTask
ReportStep = ShardedReportTask | ComparisonReportTask | PathReportTask | PruningReportTask | SeriesReportTask
AnyStep = WholeStep | PointStep | ReportStep
# What a turn works at. One step has a turn if it needs a worker with more memory than the one that took it first.
TurnTask = PlannedTask | WholeStep
Step = Annotated[AnyStep, Field(discriminator="step")]


@dataclass(frozen=True)
class _Steps:
    """The types of a kind's steps, and of its answer for a point."""

    point: type[PointStep]
    report: type[ReportStep]
    answer: type[Answer]


# The task of each kind of analysis of checkpoints, and the steps of the kinds that are planned.
TASKS: dict[Kind, type[NetworkTask]] = {
    "evaluation": EvaluationTask,
    "comparison": ComparisonTask,
    "path": PathTask,
    "pruning": PruningTask,
    "series": SeriesTask,
}
_STEPS: dict[type[PlannedTask], _Steps] = {
    ShardedTask: _Steps(ShardTask, ShardedReportTask, ShardAnswer),
    ComparisonTask: _Steps(SideTask, ComparisonReportTask, SideAnswer),
    PathTask: _Steps(PathPointTask, PathReportTask, PathAnswer),
    PruningTask: _Steps(PruningPointTask, PruningReportTask, PruningAnswer),
    SeriesTask: _Steps(SeriesPointTask, SeriesReportTask, SeriesAnswer),
}


def point_step(task: PlannedTask, *, number: int, place: float, first: Known | None) -> PointStep:
    """Return the step that computes a point; `first` has the facts of the first, if it is another."""
    return _STEPS[type(task)].point.model_validate({**dict(task), "number": number, "place": place, "first": first})


def next_places(task: TurnTask, answers: Sequence[Answer]) -> list[float]:
    """Return the places of the next points; none if the report comes next, as it does at once for one step."""
    return task.further(answers) if isinstance(task, PlannedTask) else []


def report_step(task: TurnTask, answers: Sequence[Answer]) -> ReportStep | WholeStep:
    """Return the step that makes the report of these points, which are all."""
    if not isinstance(task, PlannedTask):
        return task
    return _STEPS[type(task)].report.model_validate({**dict(task), "points": tuple(answers)})


def answer_of(task: PlannedTask, body: Json) -> Answer:
    """Return the answer for a point, as recorded or as it comes from the compute process."""
    return _STEPS[type(task)].answer.model_validate(body)


# Messages between the worker and its compute process, one in a line.


class Work(Frozen):
    """Worker to compute process: a step to compute, and whether to tell when its phases were."""

    step: Step
    files: Files
    timed: bool = False


class Progress(Frozen):
    """Progress of a step: a phase in words, and how much of it is done; a total of 0 is unknown."""

    phase: str
    done: int
    total: int


class Result(Frozen):
    """How a step ended: with the body of a report or an answer, with a problem, or, if cancelled, with neither.

    Attributes:
        outcome: as the API names it.
        body: of a report, or an answer for a point.
        problem: of a failure.
        too_little_bytes: the device memory that ran out, of the worker that computed.
    """

    outcome: Literal["succeeded", "failed", "cancelled"]
    body: Json | None = None
    problem: Json | None = None
    too_little_bytes: int | None = None


class Hello(Frozen):
    """The first message of a compute process: the device, and the families of networks that it may build.

    Attributes:
        device: the GPU's name, or `cpu`.
        memory_bytes: the device's memory, or as much as the operator allows.
        torch_version: version of torch.
        families: families that need no import.
        untried: families that are installed and not tried yet.
    """

    device: str
    memory_bytes: int
    torch_version: str
    families: list[str]
    untried: list[str]


class OfAnalysis(Frozen):
    """Compute process to worker: one of progress, the body that was computed, and the problem that prevented it.

    With the last two come the phases of the step, if they were asked for, as `analysis.clock.Course` has them.
    """

    analysis_id: str
    progress: Progress | None = None
    body: Json | None = None
    problem: Json | None = None
    phases: list[tuple[str, int, int, int | None]] = []


MESSAGES: TypeAdapter[Hello | OfAnalysis] = TypeAdapter(Hello | OfAnalysis)

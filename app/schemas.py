"""What goes over the wire: requests and resources, as pydantic models that make up the OpenAPI document."""

import math
import re
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Generic, Literal, TypeVar
from unicodedata import normalize

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def metadata_text(value: Any) -> str:
    """A metadata value as filters compare it: `epoch=10`, `final=true`, `run=a`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _check_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    if len(metadata) > 100:
        raise ValueError("at most 100 keys")
    for key, value in metadata.items():
        if not 0 < len(key) <= 100:
            raise ValueError("keys have 1 to 100 characters")
        entries = value if isinstance(value, list) else [value]
        if len(entries) > 100:
            raise ValueError(f"{key!r} is a list of more than 100 values")
        for entry in entries:
            if isinstance(entry, dict | list) or len(metadata_text(entry)) > 500:
                raise ValueError(f"{key!r} must be text, a number, true, false, null or a list of these (500 chars)")
            if isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"{key!r} is not a finite number")
        for text in (key, *(entry for entry in entries if isinstance(entry, str))):
            if not _STORABLE.match(text):
                raise ValueError(f"{key!r} holds characters that cannot be stored")
    return metadata


# Not NUL, which PostgreSQL refuses, and not half of a surrogate pair, which is no text.
_STORABLE = re.compile(r"\A[^\x00\ud800-\udfff]*\Z")
PLAIN_TEXT = r"^[^\x00-\x1f]*$"
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=PLAIN_TEXT)]
# What becomes part of a URL, of a file's name and of a hidden comment.
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Id = Annotated[str, Field(min_length=1, max_length=36, pattern=PLAIN_TEXT)]
Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
# A place on an axis: neither true nor "0.5", which a plain float would take for one.
Number = Annotated[FiniteFloat, Field(strict=True)]
Kind = Literal["evaluation", "comparison", "path", "pruning", "series"]


# --- requests -------------------------------------------------------------------------------------------------------


def _ending_with_a_dot(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else f"{prefix}."


Prefix = Annotated[str, Field(max_length=199, pattern=PLAIN_TEXT), AfterValidator(_ending_with_a_dot)]


class CheckpointSpec(Strict):
    """`spec` of POST /v1/checkpoints. Without `architecture` the file's own metadata must hold one."""

    name: Name
    architecture: dict[str, Any] | None = None
    head: str | None = Field(
        default=None, max_length=500, pattern=PLAIN_TEXT, description="Module name of the head; default: by family."
    )
    prefix: Prefix | None = Field(
        default=None,
        description="What stands before the weights' names, such as `ema_model.`, where the file holds several copies.",
    )
    preprocess: dict[str, Any] | None = Field(
        default=None, description="Of images, where a probe gives none: as of a probe, or a preprocessor_config.json."
    )
    tokenizer: dict[str, Any] | None = Field(default=None, description="Content of a tokenizer.json, for texts.")
    metadata: Metadata = {}
    sha256: Sha256 | None = Field(default=None, description="Instead of a file: a blob that the service holds.")


Side = Annotated[int, Field(ge=1, le=4096)]
Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]


class Preprocess(Strict):
    """What happens to inputs before the network sees them: x * scale, then (x - mean) / std; of images resize, centre
    crop and colour first, in grey levels 0 to 255."""

    scale: FiniteFloat | None = Field(default=None, description="Default: 1; 1/255 of images that are decoded.")
    mean: FiniteFloat | list[FiniteFloat] = 0.0
    std: PositiveFloat | list[PositiveFloat] = 1.0
    resize: Side | Sides | None = Field(default=None, description="Shorter side, or [height, width], in pixels.")
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = Field(
        default="bilinear", description="Pillow's filter, antialiased."
    )
    crop: Side | Sides | None = Field(default=None, description="Side, or [height, width], about the centre.")
    crop_offset: Literal["rounded", "floored"] = Field(
        default="rounded", description="Half of an odd number of pixels: as torchvision, or as transformers has it."
    )
    pad_offset: Literal["floored", "ceiled"] = Field(
        default="floored",
        description="Half of an odd number of pixels that the image lacks, before it: as torchvision, or as the Pillow "
        "backend of transformers has it.",
    )
    colour: Literal["rgb", "grey"] | None = Field(default=None, description="null: grey stays grey, all else is RGB.")

    def for_images(self) -> "Preprocess":
        """All of it said, of images that are decoded."""
        crop = [self.crop, self.crop] if isinstance(self.crop, int) else self.crop
        return self.model_copy(update={"scale": 1 / 255 if self.scale is None else self.scale, "crop": crop})

    def for_tensors(self) -> "Preprocess":
        """All of it said, of tensors, which are not resized."""
        return self.model_copy(update={"scale": 1.0 if self.scale is None else self.scale})


# Compared with names from elsewhere: composed, as Unicode has it (NFC), however it was typed.
ClassName = Annotated[str, Field(max_length=200, pattern=PLAIN_TEXT), AfterValidator(partial(normalize, "NFC"))]
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


class Columns(Strict):
    """Names of columns, where they are not the usual ones."""

    image: ColumnName | None = Field(default=None, description="Default: image, img.")
    text: ColumnName | None = Field(default=None, description="Default: text, sentence, content.")
    label: ColumnName | None = Field(
        default=None, description="Default: label, labels, fine_label. null, where it is given: texts without labels."
    )
    split: ColumnName | None = Field(default=None, description="Default: split, where there is one.")

    def named(self) -> dict[str, str | None]:
        """Names by role; of labels null where somebody says that there are none."""
        said = self.model_dump(exclude_unset=True)
        return {role: name for role, name in said.items() if name is not None or role == "label"}


class ProbeSpec(Strict):
    """`spec` of POST /v1/probes. Lists in `preprocess` run along dimension 1 of the inputs."""

    name: Name
    class_names: list[ClassName] | None = Field(
        default=None,
        min_length=2,
        max_length=100_000,
        description="In the order of the labels; of a file that has names itself, the order or other names for them.",
    )
    preprocess: Preprocess | None = None
    columns: Columns | None = Field(default=None, description="Of Parquet, CSV and JSON lines.")
    tokenizer: dict[str, Any] | None = Field(default=None, description="Content of a tokenizer.json, for texts.")
    max_length: int | None = Field(
        default=None, ge=1, le=100_000, description="Tokens of a text that are kept; default: see docs/report.md."
    )
    metadata: Metadata = {}
    sha256: Sha256 | None = None


class FeatureSetSpec(Strict):
    """`spec` of POST /v1/feature-sets."""

    name: Name
    metadata: Metadata = {}
    sha256: Sha256 | None = None


class EvaluationOptions(Strict):
    """How an evaluation is computed; the defaults suit nearly everyone."""

    null_permutations: int = Field(default=10, ge=0, le=1000, description="Permutations of the null baseline.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the permutations and of their subsample.")
    tolerance: float = Field(default=1e-4, ge=0, le=0.1, description="Largest change of MIR that counts as settled.")
    batch_size: int | None = Field(default=None, ge=1, le=1_000_000, description="Inputs at a time; default: chosen.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of the network's forward pass; `bfloat16` runs it under autocast. A feature set has none.",
    )
    samples: int | None = Field(
        default=None,
        ge=2,
        description="So many of the probe's, drawn in proportion to classes and splits; of sequences to splits.",
    )


class ComparisonOptions(EvaluationOptions):
    """How two checkpoints are compared, and where the intervals of the differences come from."""

    interval: Literal["delta", "bootstrap"] = Field(
        default="delta",
        description="`delta` takes standard errors from influence functions, `bootstrap` from paired resamples.",
    )
    resamples: int = Field(default=200, ge=10, le=10_000, description="Of the bootstrap, each two evaluations.")
    confidence: float = Field(default=0.95, ge=0.5, le=0.9999, description="Of the intervals.")


class EvenGrid(Strict):
    """So many points evenly from 0 to 1, both ends among them."""

    points: int = Field(ge=2, le=1001)


class NamedGrid(Strict):
    """These points; both ends are added where they are not named, as barriers are measured from them."""

    values: list[Number] = Field(min_length=1, max_length=1000)


def _of_one_form(grid: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A grid, held against the form that was given alone: nobody wants to hear what the other two would need."""
    if isinstance(grid, dict) and ("points" in grid) != ("values" in grid):
        return (EvenGrid if "points" in grid else NamedGrid).model_validate(grid)
    if isinstance(grid, EvenGrid | NamedGrid) or grid == "adaptive":
        return validate(grid)
    raise ValueError('give one of {"points": 25}, {"values": [0.25, 0.5]} and "adaptive"')


class PathOptions(EvaluationOptions):
    """Which points of a path, and what happens to the networks there. Each point is a full evaluation."""

    grid: Annotated[EvenGrid | NamedGrid | Literal["adaptive"], WrapValidator(_of_one_form)] = Field(
        default=EvenGrid(points=25), description="`adaptive` looks for peaks of the loss, then refines them."
    )
    normalisation: Literal["interpolate", "recalibrate"] = Field(
        default="interpolate",
        description="`recalibrate` takes running statistics anew at each point between the ends, from the probe.",
    )
    alignment: Literal["none", "weight_matching"] = Field(
        default="none", description="`weight_matching` permutes B's hidden units to match A's before the path."
    )
    extrapolate: bool = Field(default=False, description="Allow named points beyond the ends, from -2 to 3.")

    @model_validator(mode="after")
    def _within(self) -> "PathOptions":
        if isinstance(self.grid, NamedGrid):
            low, high = (-2, 3) if self.extrapolate else (0, 1)
            if not all(low <= w <= high for w in self.grid.values):
                beyond = "" if self.extrapolate else "; points beyond the ends need extrapolate"
                raise ValueError(f"grid.values lie in [{low}, {high}]{beyond}")
        elif self.extrapolate:
            raise ValueError("extrapolate needs a grid with values, which name the points beyond the ends")
        return self


def _check_sparsities(values: list[float]) -> list[float]:
    return sorted({0.0, *values})


class PruningOptions(EvaluationOptions):
    """How much is pruned, and of what. Each sparsity is a full evaluation."""

    sparsities: Annotated[
        list[Annotated[Number, Field(ge=0, lt=1)]],
        Field(min_length=1, max_length=1000),
        AfterValidator(_check_sparsities),
    ] = Field(
        default=[0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99],
        description="Shares of the prunable weights; 0 is added where it is not named.",
    )
    scope: Literal["global", "layerwise"] = Field(
        default="global", description="One threshold for all prunable weights, or the same share of each layer."
    )
    include_head: bool = Field(default=False, description="Prune the classification head too.")


class Axis(Strict):
    """What a series runs along: a name, and for each checkpoint a number, rising."""

    name: str = Field(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="Such as `epoch` or `step`.")
    values: list[Number] = Field(min_length=2, max_length=1000)

    @model_validator(mode="after")
    def _rising(self) -> "Axis":
        if any(first >= second for first, second in pairwise(self.values)):
            raise ValueError("the values of an axis rise from each checkpoint to the next")
        return self


class SeriesAxis(Axis):
    """What a series that is asked for runs along: the difference of any two of its values is a number too."""

    values: list[Annotated[Number, Field(ge=-1e15, le=1e15)]] = Field(min_length=2, max_length=1000)


class EvaluationRequest(Strict):
    """One evaluation, of a checkpoint on a probe or of a feature set."""

    kind: Literal["evaluation"]
    checkpoint_id: Id | None = None
    probe_id: Id | None = None
    feature_set_id: Id | None = None
    options: EvaluationOptions = EvaluationOptions()

    @model_validator(mode="after")
    def _one_subject(self) -> "EvaluationRequest":
        pair = (self.checkpoint_id is not None, self.probe_id is not None)
        if self.feature_set_id is not None and not any(pair):
            return self
        if self.feature_set_id is None and all(pair):
            return self
        raise ValueError("give either checkpoint_id and probe_id, or feature_set_id alone")


class ComparisonRequest(Strict):
    """Two checkpoints on the same samples; differences are B - A. Their architectures may differ."""

    kind: Literal["comparison"]
    checkpoint_a_id: Id
    checkpoint_b_id: Id
    probe_id: Id
    options: ComparisonOptions = ComparisonOptions()


class PathRequest(Strict):
    """The straight line between the weights of two checkpoints of one architecture."""

    kind: Literal["path"]
    checkpoint_a_id: Id
    checkpoint_b_id: Id
    probe_id: Id
    options: PathOptions = PathOptions()


class PruningRequest(Strict):
    """A checkpoint whose weights of least magnitude are set to zero, sparsity by sparsity."""

    kind: Literal["pruning"]
    checkpoint_id: Id
    probe_id: Id
    options: PruningOptions = PruningOptions()


class SeriesRequest(Strict):
    """Checkpoints of one architecture in order, such as those of a training run."""

    kind: Literal["series"]
    axis: SeriesAxis
    checkpoint_ids: list[Id] = Field(min_length=2, max_length=1000)
    probe_id: Id
    options: EvaluationOptions = EvaluationOptions()

    @model_validator(mode="after")
    def _as_many(self) -> "SeriesRequest":
        if len(self.axis.values) != len(self.checkpoint_ids):
            raise ValueError(
                f"axis.values has {len(self.axis.values)} numbers and checkpoint_ids {len(self.checkpoint_ids)} ids"
            )
        return self


AnalysisRequest = Annotated[
    EvaluationRequest | ComparisonRequest | PathRequest | PruningRequest | SeriesRequest, Field(discriminator="kind")
]


# --- resources ------------------------------------------------------------------------------------------------------


class Checkpoint(Strict):
    id: str
    name: str
    sha256: str
    size_bytes: int
    n_parameters: int
    architecture: dict[str, Any]
    head: str | None
    prefix: str = Field(description="Before the network's own names in the file, such as `module.`.")
    ignored: dict[str, int] = Field(
        description="Tensors that are none of the network's, by how their names begin (* for a number): how many."
    )
    names_checked: bool = Field(
        description="Whether a worker has built the network and compared names. Before that `prefix`, `ignored` and "
        "`n_parameters` are told by the file's names alone, and decide nothing."
    )
    preprocess: Preprocess | None
    tokenizer_sha256: str | None
    metadata: dict[str, Any]
    created_at: datetime


class Probe(Strict):
    id: str
    name: str
    sha256: str
    data_sha256: str | None = Field(
        description="Of the data, the same whatever file they came in; null of uploads of before there was one."
    )
    size_bytes: int
    format: Literal["safetensors", "npz", "parquet", "imagefolder", "csv", "jsonl"]
    content: Literal["tensors", "images", "texts"]
    columns: dict[str, str | None] | None
    n_samples: int
    n_classes: int = Field(description="0 where samples have no labels, as sequences for language models need none.")
    class_counts: list[int]
    class_names: list[str] | None
    input_shape: list[int] | None = Field(description="Of tensors; images and texts differ.")
    splits: dict[str, int]
    preprocess: Preprocess | None
    tokenizer_sha256: str | None
    max_length: int | None
    metadata: dict[str, Any]
    created_at: datetime


class FeatureSet(Strict):
    id: str
    name: str
    sha256: str
    data_sha256: str | None = Field(
        description="Of the data, the same whatever file they came in; null of uploads of before there was one."
    )
    size_bytes: int
    n_samples: int
    n_classes: int
    n_features: int
    class_counts: list[int]
    splits: dict[str, int]
    metadata: dict[str, Any]
    created_at: datetime


class Problem(BaseModel):
    """RFC 9457; further members by type, see docs/problems.md."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    detail: str
    status: int | None = None


class Progress(Strict):
    done: int
    total: int
    phase: str


Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class Analysis(Strict):
    id: str
    kind: str
    name: str
    status: Status
    progress: Progress
    checkpoint_id: str | None = Field(description="Where it looks at one checkpoint.")
    checkpoint_ids: list[str] = Field(description="All that it looks at, in order: of a path A and B.")
    probe_id: str | None
    feature_set_id: str | None
    axis: Axis | None
    options: dict[str, Any]
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    report_id: str | None
    problem: dict[str, Any] | None


class ReportSummary(Strict):
    """A report without its content, as collections list it."""

    id: str
    analysis_id: str
    kind: str
    name: str
    checkpoint_id: str | None
    checkpoint_ids: list[str]
    probe_id: str | None
    feature_set_id: str | None
    created_at: datetime


Item = TypeVar("Item")


class Page(Strict, Generic[Item]):
    """Newest first. Pass `next_cursor` as `cursor` for what follows; null at the end."""

    items: list[Item]
    next_cursor: str | None


class GateRequest(Strict):
    """Which gate judges a report, and against what."""

    gate_id: Id
    baseline: Slug | None = Field(
        default=None, description="Name of a baseline; one that is not there yet is no error."
    )
    baseline_report_id: Id | None = Field(
        default=None,
        description="A report in place of where the baseline points now; `baseline` is then its name alone.",
    )


class BaselinePut(Strict):
    """Where a baseline shall point."""

    report_id: Id
    expected_report_id: Id | None = Field(
        default=None,
        description="Move it only from here, null: only where there is none yet. Left out: wherever it is.",
    )
    note: str | None = Field(default=None, max_length=500, pattern=PLAIN_TEXT, description="Why, for the history.")


class Baseline(Strict):
    """A name for what candidates are compared with."""

    name: str
    report_id: str
    report_kind: str
    checkpoint_id: str | None = Field(description="That an evaluation looked at; of a comparison B.")
    probe_id: str | None
    created_at: datetime
    moved_at: datetime


class BaselineMove(Strict):
    """A move that was asked for; not `done` where the baseline was no longer where the caller had seen it."""

    id: str
    report_id: str
    before_report_id: str | None
    done: bool
    note: str | None
    created_at: datetime


class Charts(Strict):
    """What GET /v1/reports/{id}/charts/{name}.{format} draws."""

    names: list[str]
    formats: list[str]


class Readiness(Strict):
    """Answer of /readyz: each part is "ok" or says what is wrong with it."""

    ready: bool
    database: str
    storage: str
    worker: str


class WorkerVersion(Strict):
    id: str
    device: str | None
    torch_version: str | None
    families: list[str] | None = Field(description="Of networks, those whose libraries it has imported.")
    untried: list[str] = Field(description="Installed, and still to be tried: a worker begins with it when it starts.")
    unavailable: dict[str, str] = Field(description="Installed, and not to be imported: the library's own words.")


class Version(Strict):
    version: str
    schema_version: str
    definitions_version: str
    workers: list[WorkerVersion]

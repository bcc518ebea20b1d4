"""What goes over the wire: requests, resources and the report, as pydantic models that make up the OpenAPI document.

`docs/report.md` explains every field of a report in words; `definitions_version` names the state of the definitions.
"""

import math
import re
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from app.models import metadata_text

SCHEMA_VERSION = "1"
DEFINITIONS_VERSION = "1"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
Id = Annotated[str, Field(max_length=36, pattern=PLAIN_TEXT)]
Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]


# --- requests -------------------------------------------------------------------------------------------------------


class CheckpointSpec(Strict):
    """`spec` of POST /v1/checkpoints. Without `architecture` the file's own metadata must hold one."""

    name: Name
    architecture: dict[str, Any] | None = None
    head: str | None = Field(
        default=None, max_length=500, pattern=PLAIN_TEXT, description="Module name of the head; default: by family."
    )
    metadata: Metadata = {}
    sha256: Sha256 | None = Field(default=None, description="Instead of a file: a blob that the service holds.")


class Preprocess(Strict):
    """What happens to `inputs` before the network sees them: x * scale, then (x - mean) / std."""

    scale: FiniteFloat = 1.0
    mean: FiniteFloat | list[FiniteFloat] = 0.0
    std: PositiveFloat | list[PositiveFloat] = 1.0


class ProbeSpec(Strict):
    """`spec` of POST /v1/probes. Lists in `preprocess` run along dimension 1 of the inputs."""

    name: Name
    class_names: list[Annotated[str, Field(max_length=200, pattern=PLAIN_TEXT)]] | None = Field(
        default=None, min_length=2, max_length=100_000
    )
    preprocess: Preprocess | None = None
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


# --- resources ------------------------------------------------------------------------------------------------------


class Checkpoint(Strict):
    id: str
    name: str
    sha256: str
    size_bytes: int
    n_parameters: int
    architecture: dict[str, Any]
    head: str | None
    metadata: dict[str, Any]
    created_at: datetime


class Probe(Strict):
    id: str
    name: str
    sha256: str
    size_bytes: int
    format: Literal["safetensors", "npz"]
    n_samples: int
    n_classes: int
    class_counts: list[int]
    class_names: list[str] | None
    input_shape: list[int]
    splits: dict[str, int]
    preprocess: Preprocess | None
    metadata: dict[str, Any]
    created_at: datetime


class FeatureSet(Strict):
    id: str
    name: str
    sha256: str
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
    checkpoint_id: str | None
    probe_id: str | None
    feature_set_id: str | None
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
    probe_id: str | None
    feature_set_id: str | None
    created_at: datetime


Item = TypeVar("Item")


class Page(Strict, Generic[Item]):
    """Newest first. Pass `next_cursor` as `cursor` for what follows; null at the end."""

    items: list[Item]
    next_cursor: str | None


# --- the report -----------------------------------------------------------------------------------------------------

Reasons = dict[str, str]


class Optimum(Strict):
    """MIR and HDR where neural collapse leads, for these class counts; `reachable` where d >= C - 1."""

    mir: FiniteFloat | None
    hdr: FiniteFloat | None
    reachable: bool


class Distance(Strict):
    mir: FiniteFloat | None
    hdr: FiniteFloat | None


class Null(Strict):
    """The permutation baseline of MIR, and the observed value on the same samples."""

    mean: FiniteFloat
    std: FiniteFloat
    n: int
    n_samples: int
    observed: FiniteFloat


class Method(Strict):
    """How the joint spectrum was computed; `error_estimate` bounds the error of MIR."""

    name: str
    kept: int
    total: int
    tail_mass: FiniteFloat
    error_estimate: FiniteFloat


class Interplay(Strict):
    """MIR and HDR at one level and centring, with everything needed to read them. Entropies are in nats."""

    mir: FiniteFloat | None
    hdr: FiniteFloat | None
    mutual_information: FiniteFloat | None
    entropy_features: FiniteFloat | None
    entropy_head: FiniteFloat | None
    entropy_joint: FiniteFloat | None
    optimum: Optimum
    distance_to_optimum: Distance
    null: Null | None
    mir_z: FiniteFloat | None
    degenerate_samples: int
    degenerate_classes: int
    method: Method | None
    reasons: Reasons


class Centrings(Strict):
    none: Interplay
    global_: Interplay = Field(alias="global")


class Levels(Strict):
    sample: Centrings
    class_mean: Centrings


class Collapse(Strict):
    nc1: FiniteFloat | None
    nc1_condition: FiniteFloat | None
    nc2_equinorm_means: FiniteFloat | None
    nc2_equinorm_head: FiniteFloat | None
    nc2_equiangularity_means: FiniteFloat | None
    nc2_equiangularity_head: FiniteFloat | None
    nc2_max_angle_means: FiniteFloat | None
    nc2_max_angle_head: FiniteFloat | None
    nc3: FiniteFloat | None
    nc4: FiniteFloat | None
    absent_classes: int
    reasons: Reasons


class SplitEvaluation(Strict):
    n_samples: int
    class_counts: list[int]
    accuracy: FiniteFloat | None
    loss: FiniteFloat | None
    calibration_error: FiniteFloat | None
    effective_rank: FiniteFloat | None
    interplay: Levels
    collapse: Collapse
    reasons: Reasons


class Subject(Strict):
    """What was looked at, so that the report is readable after its deletion."""

    kind: Literal["checkpoint", "feature_set"]
    id: str
    name: str
    sha256: str
    size_bytes: int
    n_parameters: int | None
    architecture: dict[str, Any] | None
    head: str | None
    n_features: int
    n_classes: int
    metadata: dict[str, Any]


class ProbeSubject(Strict):
    """The data; of a feature set, its own."""

    kind: Literal["probe", "feature_set"]
    id: str
    name: str
    sha256: str
    n_samples: int
    n_classes: int
    class_counts: list[int]
    class_names: list[str] | None
    input_shape: list[int] | None
    preprocess: Preprocess | None


class Provenance(Strict):
    interplay_version: str
    code_sha256: str
    torch_version: str
    numpy_version: str
    python_version: str
    device: str
    threads: int
    feature_dtype: str
    spectrum_dtype: str
    batch_size: int | None
    options: EvaluationOptions


class EvaluationReport(Strict):
    schema_version: str
    definitions_version: str
    kind: Literal["evaluation"]
    id: str
    analysis_id: str
    created_at: datetime
    subject: Subject
    probe: ProbeSubject
    provenance: Provenance
    timings_seconds: dict[str, FiniteFloat]
    splits: dict[str, SplitEvaluation]


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
    families: list[str] | None


class Version(Strict):
    version: str
    schema_version: str
    definitions_version: str
    workers: list[WorkerVersion]

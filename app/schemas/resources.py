"""What the service answers with: resources, pages of them, and problems."""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.schemas.base import Strict
from app.schemas.requests import Axis
from app.schemas.specs import Preprocess


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

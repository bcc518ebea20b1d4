"""Answers of the service: resources, pages of resources, and problems."""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from app.schemas.adapters import Adapter
from app.schemas.base import Makes, Strict
from app.schemas.requests import Axis
from app.schemas.specs import Preprocess


class Upload(Strict):
    """A resumable upload (tus 1.0.0)."""

    id: str
    size_bytes: int
    offset_bytes: int = Field(description="So many bytes are on the service's disk, or in the bucket without a gap.")
    part_bytes: int | None = Field(description="Size of the parts that go into the bucket; null: bytes come by PATCH.")
    metadata: dict[str, str] = Field(description="Pairs of Upload-Metadata, decoded.")
    resource_id: str | None = Field(description="What the upload has become.")
    created_at: datetime
    expires_at: datetime = Field(description="It is removed then; each request that brings bytes puts it off.")


class UploadPart(Strict):
    """A part of an upload that the bucket lacks."""

    number: int = Field(description="From 0.")
    offset_bytes: int
    size_bytes: int
    url: str = Field(description="Takes the part by PUT, within an hour and without the service's key.")


class UploadParts(Strict):
    missing_bytes: int = Field(description="Of all parts that the bucket lacks.")
    missing: list[UploadPart] = Field(description="The first of them; empty once the upload is complete.")


class OriginFile(Strict):
    """A file as its source named it when it was fetched."""

    name: str
    size_bytes: int
    etag: str | None = Field(description="The source's own mark of the content; of the Hub's large files their sha256.")
    version: str | None = Field(description="The bucket's version, if it keeps versions.")
    sha256: str | None = Field(description="Of the bytes that came; null if only some of the file's were needed.")


class Origin(Strict):
    """Where a file was fetched from."""

    source: str = Field(description="The address, without its query.")
    revision: str | None = Field(description="Of the Hub: the commit.")
    fetched_at: datetime
    n_files: int = Field(description="1, or as many as a folder had that became one file.")
    files: list[OriginFile] = Field(description="The first hundred of these.")


class Checkpoint(Strict):
    id: str
    name: str
    sha256: str
    size_bytes: int
    n_parameters: int
    architecture: dict[str, Any]
    base_id: str | None = Field(description="Of an adapter: the checkpoint whose weights it changes.")
    adapter: Adapter | None
    head: str | None
    prefix: str = Field(description="Prefix of the network's own names in the file, such as `module.`.")
    ignored: dict[str, int] = Field(
        description="Tensors that are not the network's, counted by the start of their names (* for a number)."
    )
    names_checked: bool = Field(
        description="Whether a worker has built the network and compared names. Before that `prefix`, `ignored` and "
        "`n_parameters` come from the file's names alone, and decide nothing."
    )
    preprocess: Preprocess | None
    tokenizer_sha256: str | None
    origin: Origin | None = Field(description="Null if the file was sent.")
    metadata: dict[str, Any]
    created_at: datetime


class Probe(Strict):
    id: str
    name: str
    sha256: str
    data_sha256: str | None = Field(
        description="Hash of the data, independent of the file; null for uploads older than this member."
    )
    size_bytes: int
    format: Literal["safetensors", "npz", "parquet", "imagefolder", "csv", "jsonl"]
    content: Literal["tensors", "images", "texts"]
    columns: dict[str, str | None] | None
    n_samples: int
    n_classes: int = Field(description="0 if samples have no labels; sequences for language models need none.")
    class_counts: list[int]
    class_names: list[str] | None
    input_shape: list[int] | None = Field(description="Shape of tensors; images and texts have no common shape.")
    splits: dict[str, int]
    preprocess: Preprocess | None
    tokenizer_sha256: str | None
    max_length: int | None
    origin: Origin | None = Field(description="Null if the file was sent.")
    metadata: dict[str, Any]
    created_at: datetime


class FeatureSet(Strict):
    id: str
    name: str
    sha256: str
    data_sha256: str | None = Field(
        description="Hash of the data, independent of the file; null for uploads older than this member."
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
    """A problem of RFC 9457; further members depend on the type, see docs/problems.md."""

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


class Fetch(Strict):
    """A file that a worker fetches, to become a checkpoint or a probe. Its progress counts bytes."""

    id: str
    makes: Makes
    name: str = Field(description="Of the resource.")
    source: str = Field(description="The address, without its query.")
    status: Status
    progress: Progress
    resource_id: str | None = Field(description="What the file has become; null before it has succeeded.")
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    problem: dict[str, Any] | None


class Analysis(Strict):
    id: str
    kind: str
    name: str
    status: Status
    progress: Progress
    checkpoint_id: str | None = Field(description="Set if the analysis has exactly one checkpoint.")
    checkpoint_ids: list[str] = Field(description="All checkpoints of the analysis, in order: A and B of a path.")
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
    metrics: dict[str, FiniteFloat | None] = Field(
        description="By path: the metrics that the list is sorted or filtered by, and those asked for by `show`."
    )


Item = TypeVar("Item")


class Page(Strict, Generic[Item]):
    """A page, newest first. Pass `next_cursor` as `cursor` for the next page; null at the end."""

    items: list[Item]
    next_cursor: str | None


class Charts(Strict):
    """The names and formats that GET /v1/reports/{id}/charts/{name}.{format} accepts."""

    names: list[str]
    formats: list[str]


class Readiness(Strict):
    """Answer of /readyz: each part is "ok" or says what is wrong with it."""

    ready: bool = Field(description="Whether all parts are ok that were not excluded.")
    database: str
    storage: str
    worker: str


class WorkerVersion(Strict):
    id: str
    device: str | None
    memory_bytes: int | None = Field(description="Memory of the device, or as much of it as analyses may use.")
    torch_version: str | None
    families: list[str] | None = Field(description="Families of networks whose libraries the worker has imported.")
    untried: list[str] = Field(description="Installed families not tried yet; a worker tries them when it starts.")
    unavailable: dict[str, str] = Field(
        description="Installed families that fail to import, with the library's own message."
    )


class Version(Strict):
    version: str
    schema_version: str
    definitions_version: str
    workers: list[WorkerVersion]

"""Settings: every one is an environment variable with the prefix INTERPLAY_. docs/settings.md lists them."""

import gc
import ipaddress
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.sources import Allowed, parse_allowed, parse_source

#: Pattern of a device's name.
DEVICE = r"(auto|cpu|cuda(:\d+)?)"


class Settings(BaseSettings):
    """What an operator can choose. The same values must be given to every process of one service."""

    model_config = SettingsConfigDict(env_prefix="INTERPLAY_", extra="ignore", frozen=True)

    data_dir: Path = Field(
        default=Path("interplay-data"), description="Folder of the SQLite database, local blobs, staged uploads."
    )
    database_url: str = Field(default="", description="SQLAlchemy URL; empty: a SQLite file in data_dir.")
    storage_url: str = Field(
        default="", description="Where blobs live: file://, s3://, gs:// or az:// URL; empty: a folder in data_dir."
    )
    host: str = Field(default="127.0.0.1", description="Address to bind; any but loopback needs api_key.")
    port: int = Field(default=8321, ge=0, le=65535, description="Port to bind; 0 picks a free one.")
    api_key: SecretStr | None = Field(default=None, description="When set, every /v1 call needs it as a bearer token.")
    sources: str = Field(
        default="",
        description="Addresses below which the service itself fetches files, with names of credentials; empty: none.",
    )
    hub_url: str = Field(default="https://huggingface.co", description="The Hub of hf:// sources, or a mirror of it.")
    device: str = Field(
        default="auto", pattern=rf"^{DEVICE}$", description="auto, cpu, cuda or cuda:N; auto prefers CUDA."
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of a compute process; 0: torch's own choice.")
    max_upload_bytes: int = Field(default=20 * 2**30, ge=1, description="Largest file accepted in one upload.")
    max_spec_bytes: int = Field(default=2**20, ge=1, description="Largest `spec` part and JSON body accepted.")
    upload_idle_seconds: float = Field(
        default=30.0, gt=0, description="An upload that sends nothing for so long is dropped."
    )
    max_open_uploads: int = Field(
        default=200, ge=0, description="Resumable uploads that are not resources yet; 0 takes none."
    )
    upload_expires_seconds: float = Field(
        default=24 * 3600.0, gt=0, le=366 * 86400, description="A resumable upload that gets no bytes for so long goes."
    )
    max_fetch_bytes: int = Field(
        default=200 * 2**30, ge=1, description="Largest file that the service fetches by itself from a source."
    )
    fetch_patience_seconds: float = Field(
        default=600.0, gt=0, description="A source that brings nothing for so long fails its fetch."
    )
    max_npz_bytes: int = Field(default=20 * 2**30, ge=1, description="Largest unpacked size of an npz probe.")
    max_npz_ratio: float = Field(default=200.0, gt=1, description="Largest unpacked-to-packed ratio of an npz probe.")
    max_image_pixels: int = Field(
        default=64_000_000, ge=1, description="Largest image of a probe, looked at before it is decoded."
    )
    max_rows: int = Field(default=10_000_000, ge=1, description="Most images or texts of a probe.")
    max_members: int = Field(default=200_000, ge=1, description="Most files in a zip of images.")
    max_unpacked_bytes: int = Field(
        default=20 * 2**30, ge=1, description="Largest unpacked size of a zip of images or a Parquet file."
    )
    max_unpacked_ratio: float = Field(
        default=200.0,
        gt=1,
        description="Largest unpacked-to-packed ratio of a zip, a Parquet file or a checkpoint's folder.",
    )
    max_text_bytes: int = Field(default=2**30, ge=1, description="Largest size of all texts of a probe.")
    max_tokenizer_bytes: int = Field(
        default=32 * 2**20, ge=1, description="Largest `tokenizer` of a spec; it comes on top of max_spec_bytes."
    )
    max_features_bytes: int = Field(
        default=10 * 2**30, ge=0, description="Features kept for analyses that come again; 0 keeps none."
    )
    shard_work: int = Field(
        default=2**35,
        ge=0,
        description="Weights times samples of a shard; evaluations of two shards or more are cut. 0 cuts none.",
    )
    device_memory_bytes: int | None = Field(
        default=None, ge=1, description="Device memory that a worker's analyses may use. Default: all."
    )
    max_loaded_bytes: int = Field(
        default=2 * 2**30,
        ge=0,
        description="Networks and probes that a compute process keeps of analyses beside its current one.",
    )
    cache_bytes: int = Field(
        default=100 * 2**30, ge=0, description="Blobs of a remote store that a machine keeps; the least used go first."
    )
    max_charts_bytes: int = Field(default=256 * 2**20, ge=0, description="Drawn charts kept in data_dir; 0 keeps none.")
    max_event_streams: int = Field(
        default=500, ge=0, description="Streams of events open at a time; clients beyond it ask again and again."
    )
    max_connections: int = Field(
        default=1000, ge=1, description="Connections open at a time; the oldest without a request goes first."
    )
    header_timeout_seconds: float = Field(
        default=10.0, gt=0, description="A request's line and headers must have come within this."
    )
    body_timeout_seconds: float = Field(default=30.0, gt=0, description="A JSON body must have come within this.")
    min_upload_rate: int = Field(
        default=10 * 2**10, ge=0, description="Bytes per second of an upload, over upload_idle_seconds; 0: any."
    )
    database_timeout_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="Longest statement, wait for a lock, and silence of the database."
    )
    storage_timeout_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="Longest silence of a remote storage."
    )
    analysis_timeout_seconds: float = Field(
        default=6 * 3600.0, gt=0, description="An attempt that computes for longer fails."
    )
    queue_polling_seconds: float = Field(
        default=0.1,
        ge=0.02,
        le=60,
        description="Pause between a worker's looks for work; longer costs less when idle, and starts later.",
    )
    memory_patience_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How long what needs more device memory than any worker has waits for one that has it, then fails.",
    )
    stall_seconds: float = Field(
        default=600.0,
        gt=0,
        description="A compute process that neither tells progress nor computes for so long is replaced.",
    )
    child_environment: str = Field(
        default="", description="Further variables of the environment that compute processes get, with commas."
    )
    max_attempts: int = Field(
        default=50, ge=1, description="An analysis whose worker died so often is given up as failed."
    )
    worker_restart_max_seconds: float = Field(
        default=30.0, gt=0, description="Longest pause of `serve` before it restarts a worker that died."
    )
    keep_days: float | None = Field(
        default=None,
        ge=0,
        le=36525,
        description="Analyses that ended so long ago go, with their reports. Default: none.",
    )
    keep_failed_days: float | None = Field(
        default=None, ge=0, le=36525, description="The same of failed and cancelled ones. Default: as keep_days."
    )
    keep_files_days: float | None = Field(
        default=None,
        ge=0,
        le=36525,
        description="Checkpoints, probes and feature sets that nothing uses go so long after they came. Default: none.",
    )
    keep_if: str = Field(
        default="", description="Metadata of what always stays: KEY=VALUE with commas, * in a VALUE is any text."
    )
    keep_unless: str = Field(
        default="", description="Metadata without which nothing goes, in the form of keep_if; empty: all may go."
    )
    log_level: str = Field(
        default="warning", pattern="^(debug|info|warning|error)$", description="Verbosity on stderr."
    )
    log_format: str = Field(
        default="text", pattern="^(text|json)$", description="Lines for people, or one JSON object each."
    )

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value and not re.match(r"(sqlite:///.|postgresql(\+psycopg)?://)", value):
            raise ValueError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")
        return value

    @field_validator("storage_url")
    @classmethod
    def _known_storage(cls, value: str) -> str:
        if value and not re.match(r"(file:///|memory:///|(s3|gs|az)://.)", value):
            raise ValueError("must be file:///FOLDER, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX")
        return value

    @field_validator("keep_if", "keep_unless")
    @classmethod
    def _known_metadata(cls, value: str) -> str:
        parse_metadata(value)
        return value

    @field_validator("sources")
    @classmethod
    def _known_sources(cls, value: str) -> str:
        parse_allowed(value)
        return value

    @field_validator("hub_url")
    @classmethod
    def _known_hub(cls, value: str) -> str:
        if not (hub := parse_source(value)).is_web or hub.query:
            raise ValueError("must be https://HOST, with a path if the mirror has one")
        return hub.shown.rstrip("/")

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("api_key")
    @classmethod
    def _no_empty_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not value.get_secret_value():
            return None
        if not (value.get_secret_value().isascii() and value.get_secret_value().isprintable()):
            raise ValueError("must be printable ASCII, which a header can carry")
        return value

    @cached_property
    def keeps_if(self) -> tuple[tuple[str, str], ...]:
        return parse_metadata(self.keep_if)

    @cached_property
    def keeps_unless(self) -> tuple[tuple[str, str], ...]:
        return parse_metadata(self.keep_unless)

    @cached_property
    def allowed_sources(self) -> tuple[Allowed, ...]:
        return parse_allowed(self.sources)

    @cached_property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'interplay.db'}"

    @cached_property
    def effective_storage_url(self) -> str:
        return self.storage_url or (self.data_dir / "blobs").as_uri()

    @property
    def binds_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_metadata(text: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs of KEY=VALUE,KEY=VALUE.

    Raises:
        ValueError: it has not that form.
    """
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    for key, separator, _ in pairs:
        if not key.strip() or not separator:
            raise ValueError("must be KEY=VALUE, several with commas, such as release=true, branch=main")
    return tuple((key.strip(), value.strip()) for key, _, value in pairs)


def load_settings(**given: Any) -> Settings:
    """Return the settings of this process, from its environment and the values `given` on its command line.

    Raises:
        SystemExit: a value is not valid; the message names its environment variable.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for wrong in error.errors():
            name = str(wrong["loc"][0])
            # A URL may hold a password.
            value = "" if name.endswith(("_key", "_url", "sources")) else f" ({wrong['input']!r})"
            # Not logged: logging depends on the settings.
            sys.stderr.write(f"INTERPLAY_{name.upper()}{value} is not valid: {wrong['msg']}.\n")
        raise SystemExit(2) from None


def freeze_loaded_objects() -> None:
    """Exclude loaded objects from later searches for reference cycles; call it once, when the process is ready.

    Modules and their half a million objects are never freed. Each full search of them held all threads of the API for
    100 to 200 ms, several times a second under load.
    """
    gc.collect()
    gc.freeze()

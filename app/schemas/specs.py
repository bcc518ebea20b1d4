"""The `spec` of an upload: of a checkpoint, a probe or a feature set."""

from functools import partial
from typing import Annotated, Any, Literal
from unicodedata import normalize

from pydantic import AfterValidator, Field, FiniteFloat

from app.schemas.base import MAX_CLASSES, PLAIN_TEXT, Id, Metadata, Name, PositiveFloat, Sha256, Strict


def _ending_with_a_dot(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else f"{prefix}."


UploadId = Annotated[
    Id | None, Field(description="Instead of a file: the id of a complete resumable upload (docs/uploads.md).")
]
# Parsed by app/sources.py, whose messages say what is wrong with it.
SourceAddress = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=2000,
        pattern=PLAIN_TEXT,
        description="Instead of a file: where it lies, for a worker to fetch: s3://, gs://, az://, hf:// or https:// "
        "(docs/sources.md). The answer is then 202 with the fetch.",
    ),
]
Prefix = Annotated[str, Field(max_length=199, pattern=PLAIN_TEXT), AfterValidator(_ending_with_a_dot)]


class CheckpointSpec(Strict):
    """`spec` of POST /v1/checkpoints. Without `architecture` the file's own metadata must hold one.

    With `base_id` the file is an adapter of PEFT. Its architecture is its base's, or for a head that the adapter brings
    the one that is given; it has no `prefix`.
    """

    name: Name
    base_id: Id | None = Field(default=None, description="For an adapter: the checkpoint whose weights it changes.")
    adapter: dict[str, Any] | None = Field(
        default=None, description="Content of adapter_config.json, which an archive of the adapter's folder holds."
    )
    architecture: dict[str, Any] | None = None
    head: str | None = Field(
        default=None, max_length=500, pattern=PLAIN_TEXT, description="Module name of the head; default: by family."
    )
    prefix: Prefix | None = Field(
        default=None,
        description="Prefix of the weights' names, such as `ema_model.`, if the file holds several copies.",
    )
    preprocess: dict[str, Any] | None = Field(
        default=None, description="For images of a probe without one: in a probe's form, or a preprocessor_config.json."
    )
    tokenizer: dict[str, Any] | None = Field(default=None, description="Content of a tokenizer.json, for texts.")
    metadata: Metadata = Field(default={})
    sha256: Sha256 | None = Field(
        default=None, description="Instead of a file: hash of a stored blob. Beside a file: its hash, which is checked."
    )
    upload_id: UploadId = None
    source: SourceAddress = None


Side = Annotated[int, Field(ge=1, le=4096)]
Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]


class Preprocess(Strict):
    """Preprocessing of inputs: x * scale, then (x - mean) / std; for images resize, centre crop and colour come
    first, in grey levels 0 to 255."""

    scale: FiniteFloat | None = Field(default=None, description="Default: 1; 1/255 for decoded images.")
    mean: FiniteFloat | list[FiniteFloat] = 0.0
    std: PositiveFloat | list[PositiveFloat] = 1.0
    resize: Side | Sides | None = Field(default=None, description="Shorter side, or [height, width], in pixels.")
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = Field(
        default="bilinear", description="Pillow's filter, antialiased."
    )
    crop: Side | Sides | None = Field(default=None, description="Side, or [height, width], about the centre.")
    crop_offset: Literal["rounded", "floored"] = Field(
        default="rounded",
        description="Half of an odd number of pixels: as torchvision (rounded) or transformers (floored).",
    )
    pad_offset: Literal["floored", "ceiled"] = Field(
        default="floored",
        description="Padding before the image, half of an odd number of pixels: `floored` as torchvision, `ceiled` as "
        "the Pillow backend of transformers.",
    )
    colour: Literal["rgb", "grey"] | None = Field(default=None, description="null: grey stays grey, others become RGB.")

    def for_images(self) -> "Preprocess":
        """Return the preprocessing of decoded images, with defaults filled in."""
        crop = [self.crop, self.crop] if isinstance(self.crop, int) else self.crop
        return self.model_copy(update={"scale": 1 / 255 if self.scale is None else self.scale, "crop": crop})

    def for_tensors(self) -> "Preprocess":
        """Return the preprocessing of tensors, which are not resized, with defaults filled in."""
        return self.model_copy(update={"scale": 1.0 if self.scale is None else self.scale})


# Compared with names from other sources, so composed (NFC) however it was typed.
ClassName = Annotated[str, Field(max_length=200, pattern=PLAIN_TEXT), AfterValidator(partial(normalize, "NFC"))]
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


class Columns(Strict):
    """Names of columns, where they are not the usual ones."""

    image: ColumnName | None = Field(default=None, description="Default: image, img.")
    text: ColumnName | None = Field(default=None, description="Default: text, sentence, content.")
    label: ColumnName | None = Field(
        default=None, description="Default: label, labels, fine_label. An explicit null: texts without labels."
    )
    split: ColumnName | None = Field(default=None, description="Default: split, if present.")

    def named(self) -> dict[str, str | None]:
        """Return names by role; an explicit null for `label` means that there are no labels."""
        said = self.model_dump(exclude_unset=True)
        return {role: name for role, name in said.items() if name is not None or role == "label"}


class ProbeSpec(Strict):
    """`spec` of POST /v1/probes. Lists in `preprocess` run along dimension 1 of the inputs."""

    name: Name
    class_names: list[ClassName] | None = Field(
        default=None,
        min_length=2,
        max_length=MAX_CLASSES,
        description="In the order of the labels; for a file with its own names, their order or other names.",
    )
    preprocess: Preprocess | None = None
    columns: Columns | None = Field(default=None, description="Columns of Parquet, CSV and JSON lines.")
    tokenizer: dict[str, Any] | None = Field(default=None, description="Content of a tokenizer.json, for texts.")
    max_length: int | None = Field(
        default=None, ge=1, le=100_000, description="Most tokens kept of a text; default: see docs/report.md."
    )
    metadata: Metadata = Field(default={})
    sha256: Sha256 | None = None
    upload_id: UploadId = None
    source: SourceAddress = None


class FeatureSetSpec(Strict):
    """`spec` of POST /v1/feature-sets."""

    name: Name
    metadata: Metadata = Field(default={})
    sha256: Sha256 | None = None
    upload_id: UploadId = None

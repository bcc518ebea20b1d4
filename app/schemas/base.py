"""Types that every schema is made of: names, ids, metadata and numbers."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def metadata_text(value: Any) -> str:
    """Return a metadata value as filters compare it: `epoch=10`, `final=true`, `run=a`."""
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
            if not STORABLE.match(text):
                raise ValueError(f"{key!r} holds characters that cannot be stored")
    return metadata


# Excludes NUL, which PostgreSQL refuses, and half of a surrogate pair, which is not text.
STORABLE = re.compile(r"\A[^\x00\ud800-\udfff]*\Z")
# Upper bound on the classes of a probe, a feature set or a description.
MAX_CLASSES = 100_000
PLAIN_TEXT = r"^[^\x00-\x1f]*$"
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=PLAIN_TEXT)]
# Used in URLs, file names and hidden comments.
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Id = Annotated[str, Field(min_length=1, max_length=36, pattern=PLAIN_TEXT)]
Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
# A place on an axis: strict, as a plain float would accept true and "0.5".
Number = Annotated[FiniteFloat, Field(strict=True)]
Kind = Literal["evaluation", "comparison", "path", "pruning", "series"]
# What a file can become that the service fetches by itself.
Makes = Literal["checkpoint", "probe"]

"""The form of a gate's file: a list of checks, each of one number of a report. docs/gates.md explains it."""

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

from app.errors import InvalidRequest
from app.gates.paths import UnknownPath, number_paths, require_number
from app.schemas import PLAIN_TEXT, Kind, Name, Number, Slug, Strict
from app.schemas.kinds import KINDS

Quantity = Literal["value", "change", "relative_change"]

_SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"
_LISTED_ERRORS = 20
_BOUNDS: dict[Quantity, tuple[str, str]] = {
    "value": ("min", "max"),
    "change": ("min_change", "max_change"),
    "relative_change": ("min_relative_change", "max_relative_change"),
}


class Check(Strict):
    """Bounds of one number: of its value, of its change, or of its relative change against a baseline."""

    metric: str = Field(
        min_length=1,
        max_length=500,
        pattern=PLAIN_TEXT,
        description="Path in the report, such as splits.test.accuracy.",
    )
    name: Name | None = Field(default=None, description="Displayed name; default: metric and bounds.")
    min: Number | None = Field(default=None, description="The value is at least this.")
    max: Number | None = Field(default=None, description="The value is at most this.")
    min_change: Number | None = Field(default=None, description="Value minus the baseline's is at least this.")
    max_change: Number | None = Field(default=None, description="Value minus the baseline's is at most this.")
    min_relative_change: Number | None = Field(
        default=None, description="The change as a share of the baseline's value is at least this; -0.05 is 5 % less."
    )
    max_relative_change: Number | None = Field(
        default=None, description="The change as a share of the baseline's value is at most this."
    )
    severity: Literal["fail", "warn"] = Field(default="fail", description="Outcome of a number beyond its bounds.")
    significance: Annotated[FiniteFloat, Field(strict=True, ge=0.5, le=0.9999)] | None = Field(
        default=None,
        description="Confidence, such as 0.95, of the change's interval, which decides instead of the change itself.",
    )
    proof: Literal["within", "beyond"] = Field(
        default="within",
        description="With significance. within: passes only where the interval shows the change to be within bounds "
        "(non-inferiority). beyond: fails only where it shows the change to be beyond one (proven regression).",
    )
    when_undefined: Literal["fail", "warn", "pass"] | None = Field(
        default=None, description="Outcome of an undefined number or a missing baseline; default: severity."
    )

    @model_validator(mode="after")
    def _one_quantity(self) -> Self:
        given = [quantity for quantity in _BOUNDS if self._bounds(quantity) != (None, None)]
        if len(given) != 1:
            raise ValueError(
                "a check has min or max, or min_change or max_change, or min_relative_change or max_relative_change; "
                f"this has {'those of ' + ' and '.join(given) if given else 'none'}"
            )
        low, high = self._bounds(given[0])
        if low is not None and high is not None and low > high:
            raise ValueError(f"{_BOUNDS[given[0]][0]} {low:g} is above {_BOUNDS[given[0]][1]} {high:g}")
        if self.significance is not None and given[0] != "change":
            raise ValueError("significance needs min_change or max_change: the interval is that of the change")
        if self.significance is None and "proof" in self.model_fields_set:
            raise ValueError("proof says how an interval decides; it needs significance")
        return self

    @property
    def quantity(self) -> Quantity:
        """The bounded quantity."""
        return next(quantity for quantity in _BOUNDS if self._bounds(quantity) != (None, None))

    @property
    def low(self) -> float | None:
        """The lower bound."""
        return self._bounds(self.quantity)[0]

    @property
    def high(self) -> float | None:
        """The upper bound."""
        return self._bounds(self.quantity)[1]

    @property
    def label(self) -> str:
        """The displayed label: its name, or the metric and its bounds."""
        if self.name is not None:
            return self.name
        words = [f"{bound} {value:g}" for bound, value in self.named_bounds()]
        significant = [] if self.significance is None else [f"at {self.significance:g}"]
        return " ".join([self.metric, *words, *significant])

    def named_bounds(self) -> Iterator[tuple[str, float]]:
        """Yield the given bounds with their names."""
        for name, value in zip(_BOUNDS[self.quantity], self._bounds(self.quantity), strict=True):
            if value is not None:
                yield name, value

    def _bounds(self, quantity: Quantity) -> tuple[float | None, float | None]:
        low, high = _BOUNDS[quantity]
        return getattr(self, low), getattr(self, high)


def _known_kind(kind: Any) -> Any:
    """Check the kind before its type does: the type's message would not say that the kinds are those of reports."""
    if kind not in [*KINDS]:
        raise ValueError(f"reports are of kind {', '.join(KINDS)}")
    return kind


def _with_paths(schema: dict[str, Any]) -> None:
    """Add, for editors, the kinds and the paths of the default kind."""
    schema["$schema"] = _SCHEMA_URL
    schema["properties"]["kind"]["enum"] = [*KINDS]
    paths = [path for path in number_paths("evaluation") if "*" not in path and ".0" not in path]
    open_paths = sorted({path.partition(".*")[0].partition(".0")[0] for path in number_paths("evaluation")} - {*paths})
    metric = {"anyOf": [{"enum": paths}, {"pattern": rf"^({'|'.join(open_paths)})\."}]}
    checks = {"items": {"properties": {"metric": metric}}}
    schema["if"] = {"properties": {"kind": {"const": "evaluation"}}}
    schema["then"] = {"properties": {"checks": checks}}


class GateSpec(Strict):
    """A gate: what a report must satisfy for a checkpoint to be fit to ship."""

    model_config = ConfigDict(title="Interplay gate", json_schema_extra=_with_paths)

    name: Slug = Field(description="Letters, digits, dots, dashes, underscores; an existing name gets a new version.")
    description: str | None = Field(default=None, max_length=2000)
    kind: Annotated[Kind, BeforeValidator(_known_kind)] = Field(
        default="evaluation", description="Kind of the judged reports. evaluation: also B of comparisons."
    )
    checks: list[Check] = Field(min_length=1, max_length=10_000)


class Gate(GateSpec):
    """One version of a gate; it never changes."""

    model_config = ConfigDict(title="Gate", json_schema_extra=None)

    id: str
    version: int
    sha256: str
    created_at: datetime


class GateSummary(Strict):
    """A gate without its checks, as the collection lists it."""

    id: str
    name: str
    version: int
    kind: Kind
    description: str | None
    n_checks: int
    created_at: datetime


def require_sound(gate: GateSpec) -> None:
    """Check conditions beyond the form: paths exist, names differ, intervals are available.

    Raises:
        InvalidRequest: with `errors`, the first twenty; a wrong path comes with the nearest existing one.
    """
    errors: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, check in enumerate(gate.checks):
        place = ["checks", str(number)]
        try:
            require_number(gate.kind, check.metric)
        except UnknownPath as error:
            errors.append({"loc": [*place, "metric"], "message": str(error)})
        if check.significance is not None and gate.kind != "evaluation":
            message = f"intervals are those of comparisons, which a gate of kind {gate.kind} does not judge so"
            errors.append({"loc": [*place, "significance"], "message": message})
        if (first := seen.setdefault(check.label, number)) != number:
            message = f"{check.label!r} is what check {first} is called already; give one of them another name"
            errors.append({"loc": [*place, "name"], "message": message})
        if len(errors) >= _LISTED_ERRORS:
            break
    if errors:
        words = "; ".join(f"{'.'.join(error['loc'])}: {error['message']}" for error in errors[:5])
        raise InvalidRequest(f"The gate cannot judge a report: {words}.", errors=errors)


def file_schema() -> dict[str, Any]:
    """Return the JSON Schema of a gate's file, for editors."""
    return GateSpec.model_json_schema()

"""Requests for analyses: kind, subjects and options."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from app.schemas.base import PLAIN_TEXT, Id, Number, Strict


class EvaluationOptions(Strict):
    """How an evaluation is computed; the defaults suit nearly everyone."""

    null_permutations: int = Field(default=10, ge=0, le=1000, description="Permutations of the null baseline.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the permutations and of their subsample.")
    tolerance: float = Field(default=1e-4, ge=0, le=0.1, description="Largest change of MIR that counts as settled.")
    batch_size: int | None = Field(default=None, ge=1, le=1_000_000, description="Inputs per batch; default: chosen.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Precision of the network's forward pass; `bfloat16` uses autocast. Unused for feature sets.",
    )
    samples: int | None = Field(
        default=None,
        ge=2,
        description="Number of samples to draw from the probe, in proportion to classes and splits; of sequences, in "
        "proportion to splits.",
    )


class ComparisonOptions(EvaluationOptions):
    """How two checkpoints are compared, and how the intervals of the differences are computed."""

    interval: Literal["delta", "bootstrap"] = Field(
        default="delta",
        description="`delta` takes standard errors from influence functions, `bootstrap` from paired resamples.",
    )
    resamples: int = Field(default=200, ge=10, le=10_000, description="Bootstrap resamples, each two evaluations.")
    confidence: float = Field(default=0.95, ge=0.5, le=0.9999, description="Confidence of the intervals.")


class EvenGrid(Strict):
    """The number of points, evenly from 0 to 1, both ends included."""

    points: int = Field(ge=2, le=1001)


class NamedGrid(Strict):
    """The given points; missing ends are added, as barriers are measured from them."""

    values: list[Number] = Field(min_length=1, max_length=1000)


def _of_one_form(grid: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate a grid against the given form alone: errors about the other forms would not help."""
    if isinstance(grid, dict) and ("points" in grid) != ("values" in grid):
        return (EvenGrid if "points" in grid else NamedGrid).model_validate(grid)
    if isinstance(grid, EvenGrid | NamedGrid) or grid == "adaptive":
        return validate(grid)
    raise ValueError('give one of {"points": 25}, {"values": [0.25, 0.5]} and "adaptive"')


class PathOptions(EvaluationOptions):
    """The points of a path, and the treatment of the networks there. Each point is a full evaluation."""

    grid: Annotated[EvenGrid | NamedGrid | Literal["adaptive"], WrapValidator(_of_one_form)] = Field(
        default=EvenGrid(points=25), description="`adaptive` looks for peaks of the loss, then refines them."
    )
    normalisation: Literal["interpolate", "recalibrate"] = Field(
        default="interpolate",
        description="`recalibrate` recomputes running statistics at each point between the ends, from the probe.",
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
    """The amount and scope of pruning. Each sparsity is a full evaluation."""

    sparsities: Annotated[
        list[Annotated[Number, Field(ge=0, lt=1)]],
        Field(min_length=1, max_length=1000),
        AfterValidator(_check_sparsities),
    ] = Field(
        default=[0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99],
        description="Shares of the prunable weights; 0 is added if missing.",
    )
    scope: Literal["global", "layerwise"] = Field(
        default="global", description="One threshold for all prunable weights, or the same share of each layer."
    )
    include_head: bool = Field(default=False, description="Prune the classification head too.")


class Axis(Strict):
    """The axis of a series: a name, and a rising number for each checkpoint."""

    name: str = Field(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="Such as `epoch` or `step`.")
    values: list[Number] = Field(min_length=2, max_length=1000)

    @model_validator(mode="after")
    def _rising(self) -> "Axis":
        if any(first >= second for first, second in pairwise(self.values)):
            raise ValueError("the values of an axis rise from each checkpoint to the next")
        return self


class SeriesAxis(Axis):
    """The axis of a requested series, bounded so that the difference of any two values is finite."""

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

"""Reports as they are stored and served: one model for each kind, which together make up the schema of a report.

`docs/report.md` explains every field in words; `definitions_version` names the state of the definitions.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, FiniteFloat

from app.schemas import Axis, ComparisonOptions, EvaluationOptions, PathOptions, Preprocess, PruningOptions, Strict
from app.schemas.adapters import Adapter

SCHEMA_VERSION = "1"
DEFINITIONS_VERSION = "1"

Reasons = dict[str, str]
SplitName = Literal["all", "train", "test"]


class Optimum(Strict):
    """MIR and HDR at neural collapse, for these class counts; `reachable` if d >= C - 1."""

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
    # Reports older than the estimates are exact.
    method: Literal["exact", "estimated"] = "exact"


class Method(Strict):
    """How the joint spectrum was computed; `error_estimate` bounds the error of MIR."""

    name: str
    kept: int
    total: int
    tail_mass: FiniteFloat
    error_estimate: FiniteFloat


class Interplay(Strict):
    """MIR and HDR at one level and centring, with everything needed to interpret them. Entropies are in nats."""

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


class Confusion(Strict):
    """Samples of class `label` for which class `predicted` is predicted."""

    label: int
    predicted: int | None = Field(description="Null for a token of a language model that is no class.")
    n_samples: int


class ByClass(Strict):
    """Predictions by class, in the order of `class_counts`."""

    accuracy: list[FiniteFloat | None] = Field(description="Recall of each class; null for a class without samples.")
    predicted_counts: list[int] = Field(description="Samples of any class that are predicted as each class.")
    confusions: list[Confusion] = Field(description="The 1,000 largest at most, the largest first.")
    n_confused_otherwise: int = Field(description="Wrongly predicted samples whose confusions are not listed.")


class ReliabilityBin(Strict):
    """Samples whose predicted class has a probability in (low, high]."""

    low: FiniteFloat
    high: FiniteFloat
    n_samples: int
    confidence: FiniteFloat | None = Field(description="Mean probability of the predicted class; null without samples.")
    accuracy: FiniteFloat | None


class SplitEvaluation(Strict):
    n_samples: int
    class_counts: list[int]
    accuracy: FiniteFloat | None
    loss: FiniteFloat | None
    calibration_error: FiniteFloat | None
    effective_rank: FiniteFloat | None
    interplay: Levels
    collapse: Collapse
    by_class: ByClass | None = Field(default=None, description="Null in points, and in reports older than this member.")
    reliability: list[ReliabilityBin] | None = Field(
        default=None, description="The 15 bins of the calibration error; null where `by_class` is."
    )
    reasons: Reasons


class SubjectBase(Strict):
    """The checkpoint whose weights an adapter changes."""

    id: str
    name: str
    sha256: str


class Subject(Strict):
    """The analysed checkpoint or feature set, described so that the report is readable after its deletion."""

    kind: Literal["checkpoint", "feature_set"]
    id: str
    name: str
    sha256: str
    size_bytes: int
    n_parameters: int | None
    architecture: dict[str, Any] | None
    base: SubjectBase | None = Field(default=None, description="Of an adapter; what was analysed is the two, merged.")
    adapter: Adapter | None = None
    head: str | None
    prefix: str | None = Field(default=None, description="Prefix of the network's own names in the file.")
    ignored: dict[str, int] | None = Field(
        default=None, description="Tensors of the file that are not the network's, counted by the start of their names."
    )
    infixes: dict[str, int] | None = Field(
        default=None, description="Parts of wrappers that were removed from within names, and the number of names."
    )
    untied: list[str] | None = Field(
        default=None,
        description="Tensors that the configuration ties to others but that differ in the file; they were kept "
        "separate.",
    )
    filled_to: int | None = Field(
        default=None,
        description="The least number of samples that an exported network takes: smaller batches were filled up with "
        "their last sample, and what came of it was left out.",
    )
    n_features: int
    n_classes: int
    metadata: dict[str, Any]


class Tokenizer(Strict):
    """The tokenization of texts."""

    sha256: str
    source: Literal["probe", "checkpoint"]
    max_length: int
    pad_id: int | None
    n_truncated: int


class LabelMap(Strict):
    """The mapping of the probe's labels to the checkpoint's."""

    matched: Literal["order", "name", "name_ignoring_case"]
    reordered: bool = Field(description="If true, class counts of the splits are in the checkpoint's order.")


class Samples(Strict):
    """A part of the probe, drawn in proportion to classes and splits."""

    used: int
    of: int
    seed: int


class NextTokens(Strict):
    """How sequences became samples of a causal language model: each position that has a next token is one."""

    ignored_labels: bool = Field(description="True if the probe's labels were unused, as they are of whole samples.")
    n_sequences: dict[str, int] = Field(description="By split: sequences with a position that counts.")
    n_positions: dict[str, int] = Field(description="By split: positions that count, the samples.")
    n_vocabulary: int = Field(description="Size of the network's vocabulary; accuracy and loss are over all of it.")
    token_ids: list[int] = Field(description="Tokens that occur as labels: the classes, in the order of class_counts.")


class ProbeSubject(Strict):
    """The probe, or a feature set's own data. Reports of earlier versions lack the members with a default."""

    kind: Literal["probe", "feature_set"]
    id: str
    name: str
    sha256: str
    data_sha256: str | None = Field(default=None, description="Hash of the data, independent of the file.")
    n_samples: int
    n_classes: int
    class_counts: list[int]
    class_names: list[str] | None
    format: str | None = None
    content: str | None = None
    input_shape: list[int] | None
    preprocess: Preprocess | None = Field(description="The preprocessing that was applied.")
    preprocess_source: Literal["probe", "checkpoint", "timm"] | None = None
    tokenizer: Tokenizer | None = None
    label_map: LabelMap | None = None
    samples: Samples | None = None
    next_tokens: NextTokens | None = Field(default=None, description="Null except for causal language models.")


Options = TypeVar("Options", bound=EvaluationOptions)


class ComputedOn(Strict):
    """What decides the last digits of a pass beside the code: numbers are equal where these are."""

    device: str
    threads: int
    torch_version: str


class Provenance(Strict, Generic[Options]):
    interplay_version: str
    code_sha256: str
    torch_version: str
    numpy_version: str
    library: str | None = Field(default=None, description="The library that built the network, such as `timm 1.0.31`.")
    python_version: str
    device: str
    threads: int
    feature_dtype: str
    spectrum_dtype: str
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="Precision of the network's forward pass; null for a feature set."
    )
    batch_size: int | None
    features_reused: bool = Field(
        default=False, description="Whether features and logits are those of an earlier analysis."
    )
    options: Options
    computed_on: list[ComputedOn] | None = Field(
        default=None,
        description="Of each point, shard of an evaluation or side of a comparison, if unlike workers did; else null.",
    )


class _Report(Strict):
    schema_version: str
    definitions_version: str
    id: str
    analysis_id: str
    created_at: datetime
    probe: ProbeSubject
    timings_seconds: dict[str, FiniteFloat]


class EvaluationReport(_Report):
    kind: Literal["evaluation"]
    subject: Subject
    provenance: Provenance[EvaluationOptions]
    splits: dict[SplitName, SplitEvaluation]


class Difference(Strict):
    """A metric of A and of B, and B - A with its standard error and interval; `reason` says why there is none."""

    a: FiniteFloat | None
    b: FiniteFloat | None
    difference: FiniteFloat | None
    standard_error: FiniteFloat | None = Field(
        description="Standard error over paired draws of the samples within classes."
    )
    low: FiniteFloat | None = Field(description="Lower end of the interval, at `options.confidence`.")
    high: FiniteFloat | None
    significant: bool | None = Field(
        description="Whether 0 lies outside of the interval by more than rounding and stated errors."
    )
    bias: FiniteFloat | None = Field(description="Bias of the difference, by the bootstrap; not subtracted.")
    bias_a: FiniteFloat | None
    bias_b: FiniteFloat | None
    reason: str | None


class Predictions(Strict):
    """Agreement of the two networks' predicted classes, and whether their accuracies differ by more than chance."""

    agreement: FiniteFloat
    both_correct: int
    only_a_correct: int
    only_b_correct: int
    neither_correct: int
    mcnemar_p: FiniteFloat = Field(description="Two-sided p-value of McNemar's exact test.")
    smallest_difference: FiniteFloat | None = Field(
        description="Smallest difference of accuracy that McNemar's test shows with probability 0.8 at "
        "`options.confidence`."
    )
    reason: str | None


@dataclass(frozen=True)
class PathsOf:
    """Marks keys of a dictionary that are paths to numbers of another model."""

    model: type[Strict]


class ComparedSplit(Strict):
    a: SplitEvaluation
    b: SplitEvaluation
    differences: dict[Annotated[str, PathsOf(SplitEvaluation)], Difference] = Field(
        description="By the metric's path in a split, such as collapse.nc1."
    )
    predictions: Predictions


class ComparisonReport(_Report):
    """Two checkpoints on the same samples; `probe` is as A saw it."""

    kind: Literal["comparison"]
    subjects: list[Subject] = Field(min_length=2, max_length=2, description="A and B.")
    probe_b: ProbeSubject = Field(description="The probe as B saw it: each may bring its own preprocessing.")
    provenance: Provenance[ComparisonOptions]
    splits: dict[SplitName, ComparedSplit]


class Barrier(Strict):
    """The largest excess of a value on the path over its reference, and the w at which it occurs."""

    value: FiniteFloat
    at: FiniteFloat


class BarrierForms(Strict):
    """The three forms in use: Frankle's over the mean of the ends, Entezari's over the chord, their code's at 1/2."""

    frankle: Barrier
    entezari: Barrier
    midpoint: FiniteFloat | None


class PathSplit(Strict):
    """Barriers of one split. MIR's barrier is how far it falls under the chord, HDR's how far it rises over it."""

    loss_barrier: Barrier | None
    error_barrier: Barrier | None
    mir_barrier: Barrier | None
    hdr_barrier: Barrier | None
    connected: bool | None = Field(description="Whether the error barrier is at most 0.02.")
    loss_forms: BarrierForms | None
    error_forms: BarrierForms | None
    reasons: Reasons


class Measured(Strict):
    """The level and centring of a summary's MIR and HDR."""

    level: Literal["sample", "class_mean"]
    centring: Literal["none", "global"]


class Alignment(Strict):
    """The permutation of B's hidden units before the path, whose last point is then the permuted B."""

    n_groups: int = Field(description="Sets of axes that share one permutation each.")
    sweeps: int
    gain: FiniteFloat = Field(description="Rise of the inner product of the two ends' parameters.")
    change_of_logits: FiniteFloat = Field(
        description="Change of B's logits on a batch of the probe, as a share of the largest logit."
    )


class PathLook(Strict):
    """An adaptive grid's pass before its evaluations: the loss alone, at many points, on a part of the probe."""

    n_points: int
    n_samples: int = Field(
        description="Drawn from the probe, in proportion to classes and splits; sequences for texts."
    )
    loss_barrier: Barrier = Field(description="Barrier of the loss on these samples.")


class PathSummary(Strict):
    splits: dict[SplitName, PathSplit]
    measured: Measured
    l2_distance: FiniteFloat = Field(description="Euclidean distance of the two ends' parameters.")
    cosine: FiniteFloat | None = Field(description="Cosine of the angle between the two ends' parameters.")
    reasons: Reasons = Field(default_factory=dict)
    alignment: Alignment | None
    recalibrated_layers: int | None = Field(description="Normalisation layers with recomputed statistics.")
    resolution: FiniteFloat | None = Field(
        default=None,
        description="Largest distance in w between neighbouring places, from 0 to 1, at which the loss was taken: a "
        "narrower barrier may have been missed.",
    )
    look: PathLook | None = Field(default=None, description="Null except for adaptive grids.")


class PathPoint(Strict):
    w: FiniteFloat
    splits: dict[SplitName, SplitEvaluation]


class PathReport(_Report):
    """Points in order of w; at 0 and 1 they are the two checkpoints themselves."""

    kind: Literal["path"]
    subjects: list[Subject] = Field(min_length=2, max_length=2, description="A and B.")
    provenance: Provenance[PathOptions]
    points: list[PathPoint]
    summary: PathSummary


class PruningPoint(Strict):
    sparsity: FiniteFloat
    n_pruned: int
    splits: dict[SplitName, SplitEvaluation]


class PruningSplit(Strict):
    knee: FiniteFloat | None = Field(description="Largest sparsity whose accuracy is within 1 point of that at 0.")
    reasons: Reasons


class PruningSummary(Strict):
    n_prunable: int
    splits: dict[SplitName, PruningSplit]


class PruningReport(_Report):
    kind: Literal["pruning"]
    subject: Subject
    provenance: Provenance[PruningOptions]
    points: list[PruningPoint]
    summary: PruningSummary


class SeriesPoint(Strict):
    x: FiniteFloat
    checkpoint_id: str
    reused_report_id: str | None = Field(description="The report of a reused evaluation.")
    splits: dict[SplitName, SplitEvaluation]


class SeriesSplit(Strict):
    """Spearman's rank correlations over the points, and the distances to the optimum at each, in order."""

    spearman_mir_accuracy: FiniteFloat | None
    spearman_hdr_accuracy: FiniteFloat | None
    mir_distance: list[FiniteFloat | None]
    hdr_distance: list[FiniteFloat | None]
    reasons: Reasons


class Generalisation(Strict):
    """The first x with a train accuracy of 0.99, the first with a test accuracy of 0.99, and their difference."""

    train_at: FiniteFloat | None
    test_at: FiniteFloat | None
    delay: FiniteFloat | None
    reasons: Reasons = Field(default_factory=dict)


class SeriesSummary(Strict):
    splits: dict[SplitName, SeriesSplit]
    measured: Measured
    generalisation: Generalisation | None = Field(description="Null unless the probe has both splits.")


class SeriesReport(_Report):
    kind: Literal["series"]
    axis: Axis
    subjects: list[Subject]
    provenance: Provenance[EvaluationOptions]
    points: list[SeriesPoint]
    summary: SeriesSummary


Report = Annotated[
    EvaluationReport | ComparisonReport | PathReport | PruningReport | SeriesReport, Field(discriminator="kind")
]

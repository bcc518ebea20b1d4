"""What the service answers: dictionaries, as JSON has them, with keys and types for editors and mypy.

Made from the service's own models by `make types`; a test fails where the two differ. Times are texts (ISO 8601). A
report that an earlier version wrote may lack a key that is `NotRequired`.
"""

from typing import Any, Literal, NotRequired, TypedDict


class Adapter(TypedDict):
    """A low-rank adapter: `kind` and `rank` in short, then members of its adapter_config.json by PEFT's names."""

    kind: Literal["lora", "rslora", "dora"]
    rank: int
    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str] | None
    partial: bool
    modules_to_save: list[str]
    bias: Literal["none", "all", "lora_only"]


class Alignment(TypedDict):
    """The permutation of B's hidden units before the path, whose last point is then the permuted B."""

    n_groups: int
    sweeps: int
    gain: float
    change_of_logits: float


class Axis(TypedDict):
    """The axis of a series: a name, and a rising number for each checkpoint."""

    name: str
    values: list[float]


class Progress(TypedDict):
    done: int
    total: int
    phase: str


class Analysis(TypedDict):
    id: str
    kind: str
    name: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: Progress
    checkpoint_id: str | None
    checkpoint_ids: list[str]
    probe_id: str | None
    feature_set_id: str | None
    axis: Axis | None
    options: dict[str, Any]
    attempts: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    report_id: str | None
    problem: dict[str, Any] | None


class Barrier(TypedDict):
    """The largest excess of a value on the path over its reference, and the w at which it occurs."""

    value: float
    at: float


class BarrierForms(TypedDict):
    """The three forms in use: Frankle's over the mean of the ends, Entezari's over the chord, their code's at 1/2."""

    frankle: Barrier
    entezari: Barrier
    midpoint: float | None


class Baseline(TypedDict):
    """A named report that candidates are compared with."""

    name: str
    report_id: str
    report_kind: str
    checkpoint_id: str | None
    probe_id: str | None
    created_at: str
    moved_at: str


class BaselineMove(TypedDict):
    """A requested move; `done` is false if the baseline no longer pointed at the report that the caller expected."""

    id: str
    report_id: str
    before_report_id: str | None
    done: bool
    note: str | None
    created_at: str


class BaselineReference(TypedDict):
    """The baseline of a report; for a comparison its own A. Null members: no baseline exists yet."""

    name: str | None
    report_id: str | None
    subject: str | None


class Confusion(TypedDict):
    """Samples of class `label` for which class `predicted` is predicted."""

    label: int
    predicted: int | None
    n_samples: int


class ByClass(TypedDict):
    """Predictions by class, in the order of `class_counts`."""

    accuracy: list[float | None]
    predicted_counts: list[int]
    confusions: list[Confusion]
    n_confused_otherwise: int


class Distance(TypedDict):
    mir: float | None
    hdr: float | None


class Method(TypedDict):
    """How the joint spectrum was computed; `error_estimate` bounds the error of MIR."""

    name: str
    kept: int
    total: int
    tail_mass: float
    error_estimate: float


class Null(TypedDict):
    """The permutation baseline of MIR, and the observed value on the same samples."""

    mean: float
    std: float
    n: int
    n_samples: int
    observed: float
    method: NotRequired[Literal["exact", "estimated"]]


class Optimum(TypedDict):
    """MIR and HDR at neural collapse, for these class counts; `reachable` if d >= C - 1."""

    mir: float | None
    hdr: float | None
    reachable: bool


class Interplay(TypedDict):
    """MIR and HDR at one level and centring, with everything needed to interpret them. Entropies are in nats."""

    mir: float | None
    hdr: float | None
    mutual_information: float | None
    entropy_features: float | None
    entropy_head: float | None
    entropy_joint: float | None
    optimum: Optimum
    distance_to_optimum: Distance
    null: Null | None
    mir_z: float | None
    degenerate_samples: int
    degenerate_classes: int
    method: Method | None
    reasons: dict[str, str]


Centrings = TypedDict("Centrings", {"none": Interplay, "global": Interplay})


class Charts(TypedDict):
    """The names and formats that GET /v1/reports/{id}/charts/{name}.{format} accepts."""

    names: list[str]
    formats: list[str]


class Check(TypedDict):
    """Bounds of one number: of its value, of its change, or of its relative change against a baseline."""

    metric: str
    name: NotRequired[str | None]
    min: NotRequired[float | None]
    max: NotRequired[float | None]
    min_change: NotRequired[float | None]
    max_change: NotRequired[float | None]
    min_relative_change: NotRequired[float | None]
    max_relative_change: NotRequired[float | None]
    severity: NotRequired[Literal["fail", "warn"]]
    significance: NotRequired[float | None]
    proof: NotRequired[Literal["within", "beyond"]]
    when_undefined: NotRequired[Literal["fail", "warn", "pass"] | None]


class Interval(TypedDict):
    """Interval of the change; its ends, by `method`: the comparison's own, or normal from its standard error."""

    low: float
    high: float
    confidence: float
    method: Literal["delta", "bootstrap", "normal"]


class CheckResult(TypedDict):
    """The result of one check. `undefined` counts as a failure of the gate that no number caused; `skip` is an
    undefined number that the check lets pass. `decided_by` names the number that was compared with the bounds, null if
    there was none."""

    label: str
    name: str | None
    metric: str
    severity: Literal["fail", "warn"]
    status: Literal["pass", "warn", "fail", "undefined", "skip"]
    quantity: Literal["value", "change", "relative_change"]
    min: float | None
    max: float | None
    value: float | None
    baseline: float | None
    change: float | None
    interval: Interval | None
    decided_by: Literal["value", "low", "high", "both"] | None
    why: str
    seconds: float


class OriginFile(TypedDict):
    """A file as its source named it when it was fetched."""

    name: str
    size_bytes: int
    etag: str | None
    version: str | None
    sha256: str | None


class Origin(TypedDict):
    """Where a file was fetched from."""

    source: str
    revision: str | None
    fetched_at: str
    n_files: int
    files: list[OriginFile]


class Preprocess(TypedDict):
    """Preprocessing of inputs: x * scale, then (x - mean) / std; for images resize, centre crop and colour come first,
    in grey levels 0 to 255."""

    scale: NotRequired[float | None]
    mean: NotRequired[float | list[float]]
    std: NotRequired[float | list[float]]
    resize: NotRequired[int | list[int] | None]
    resample: NotRequired[Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]]
    crop: NotRequired[int | list[int] | None]
    crop_offset: NotRequired[Literal["rounded", "floored"]]
    pad_offset: NotRequired[Literal["floored", "ceiled"]]
    colour: NotRequired[Literal["rgb", "grey"] | None]


class Checkpoint(TypedDict):
    id: str
    name: str
    sha256: str
    size_bytes: int
    n_parameters: int
    architecture: dict[str, Any]
    base_id: str | None
    adapter: Adapter | None
    head: str | None
    prefix: str
    ignored: dict[str, int]
    names_checked: bool
    preprocess: Preprocess | None
    tokenizer_sha256: str | None
    origin: Origin | None
    metadata: dict[str, Any]
    created_at: str


class Collapse(TypedDict):
    nc1: float | None
    nc1_condition: float | None
    nc2_equinorm_means: float | None
    nc2_equinorm_head: float | None
    nc2_equiangularity_means: float | None
    nc2_equiangularity_head: float | None
    nc2_max_angle_means: float | None
    nc2_max_angle_head: float | None
    nc3: float | None
    nc4: float | None
    absent_classes: int
    reasons: dict[str, str]


class Difference(TypedDict):
    """A metric of A and of B, and B - A with its standard error and interval; `reason` says why there is none."""

    a: float | None
    b: float | None
    difference: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    significant: bool | None
    bias: float | None
    bias_a: float | None
    bias_b: float | None
    reason: str | None


class Predictions(TypedDict):
    """Agreement of the two networks' predicted classes, and whether their accuracies differ by more than chance."""

    agreement: float
    both_correct: int
    only_a_correct: int
    only_b_correct: int
    neither_correct: int
    mcnemar_p: float
    smallest_difference: float | None
    reason: str | None


class Levels(TypedDict):
    sample: Centrings
    class_mean: Centrings


class ReliabilityBin(TypedDict):
    """Samples whose predicted class has a probability in (low, high]."""

    low: float
    high: float
    n_samples: int
    confidence: float | None
    accuracy: float | None


class SplitEvaluation(TypedDict):
    n_samples: int
    class_counts: list[int]
    accuracy: float | None
    loss: float | None
    calibration_error: float | None
    effective_rank: float | None
    interplay: Levels
    collapse: Collapse
    by_class: NotRequired[ByClass | None]
    reliability: NotRequired[list[ReliabilityBin] | None]
    reasons: dict[str, str]


class ComparedSplit(TypedDict):
    a: SplitEvaluation
    b: SplitEvaluation
    differences: dict[str, Difference]
    predictions: Predictions


class ComparisonOptions(TypedDict):
    """How two checkpoints are compared, and how the intervals of the differences are computed."""

    null_permutations: NotRequired[int]
    seed: NotRequired[int]
    tolerance: NotRequired[float]
    batch_size: NotRequired[int | None]
    precision: NotRequired[Literal["float32", "bfloat16"]]
    samples: NotRequired[int | None]
    interval: NotRequired[Literal["delta", "bootstrap"]]
    resamples: NotRequired[int]
    confidence: NotRequired[float]


class LabelMap(TypedDict):
    """The mapping of the probe's labels to the checkpoint's."""

    matched: Literal["order", "name", "name_ignoring_case"]
    reordered: bool


class NextTokens(TypedDict):
    """How sequences became samples of a causal language model: each position that has a next token is one."""

    ignored_labels: bool
    n_sequences: dict[str, int]
    n_positions: dict[str, int]
    n_vocabulary: int
    token_ids: list[int]


class Samples(TypedDict):
    """A part of the probe, drawn in proportion to classes and splits."""

    used: int
    of: int
    seed: int


class Tokenizer(TypedDict):
    """The tokenization of texts."""

    sha256: str
    source: Literal["probe", "checkpoint"]
    max_length: int
    pad_id: int | None
    n_truncated: int


class ProbeSubject(TypedDict):
    """The probe, or a feature set's own data. Reports of earlier versions lack the members with a default."""

    kind: Literal["probe", "feature_set"]
    id: str
    name: str
    sha256: str
    data_sha256: NotRequired[str | None]
    n_samples: int
    n_classes: int
    class_counts: list[int]
    class_names: list[str] | None
    format: NotRequired[str | None]
    content: NotRequired[str | None]
    input_shape: list[int] | None
    preprocess: Preprocess | None
    preprocess_source: NotRequired[Literal["probe", "checkpoint", "timm"] | None]
    tokenizer: NotRequired[Tokenizer | None]
    label_map: NotRequired[LabelMap | None]
    samples: NotRequired[Samples | None]
    next_tokens: NotRequired[NextTokens | None]


class ComputedOn(TypedDict):
    """What decides the last digits of a pass beside the code: numbers are equal where these are."""

    device: str
    threads: int
    torch_version: str


class ProvenanceComparisonOptions(TypedDict):
    interplay_version: str
    code_sha256: str
    torch_version: str
    numpy_version: str
    library: NotRequired[str | None]
    python_version: str
    device: str
    threads: int
    feature_dtype: str
    spectrum_dtype: str
    precision: NotRequired[Literal["float32", "bfloat16"] | None]
    batch_size: int | None
    features_reused: NotRequired[bool]
    options: ComparisonOptions
    computed_on: NotRequired[list[ComputedOn] | None]


class SubjectBase(TypedDict):
    """The checkpoint whose weights an adapter changes."""

    id: str
    name: str
    sha256: str


class Subject(TypedDict):
    """The analysed checkpoint or feature set, described so that the report is readable after its deletion."""

    kind: Literal["checkpoint", "feature_set"]
    id: str
    name: str
    sha256: str
    size_bytes: int
    n_parameters: int | None
    architecture: dict[str, Any] | None
    base: NotRequired[SubjectBase | None]
    adapter: NotRequired[Adapter | None]
    head: str | None
    prefix: NotRequired[str | None]
    ignored: NotRequired[dict[str, int] | None]
    infixes: NotRequired[dict[str, int] | None]
    untied: NotRequired[list[str] | None]
    filled_to: NotRequired[int | None]
    n_features: int
    n_classes: int
    metadata: dict[str, Any]


class ComparisonReport(TypedDict):
    """Two checkpoints on the same samples; `probe` is as A saw it."""

    schema_version: str
    definitions_version: str
    id: str
    analysis_id: str
    created_at: str
    probe: ProbeSubject
    timings_seconds: dict[str, float]
    kind: Literal["comparison"]
    subjects: list[Subject]
    probe_b: ProbeSubject
    provenance: ProvenanceComparisonOptions
    splits: dict[str, ComparedSplit]


class EvaluationOptions(TypedDict):
    """How an evaluation is computed; the defaults suit nearly everyone."""

    null_permutations: NotRequired[int]
    seed: NotRequired[int]
    tolerance: NotRequired[float]
    batch_size: NotRequired[int | None]
    precision: NotRequired[Literal["float32", "bfloat16"]]
    samples: NotRequired[int | None]


class ProvenanceEvaluationOptions(TypedDict):
    interplay_version: str
    code_sha256: str
    torch_version: str
    numpy_version: str
    library: NotRequired[str | None]
    python_version: str
    device: str
    threads: int
    feature_dtype: str
    spectrum_dtype: str
    precision: NotRequired[Literal["float32", "bfloat16"] | None]
    batch_size: int | None
    features_reused: NotRequired[bool]
    options: EvaluationOptions
    computed_on: NotRequired[list[ComputedOn] | None]


class EvaluationReport(TypedDict):
    schema_version: str
    definitions_version: str
    id: str
    analysis_id: str
    created_at: str
    probe: ProbeSubject
    timings_seconds: dict[str, float]
    kind: Literal["evaluation"]
    subject: Subject
    provenance: ProvenanceEvaluationOptions
    splits: dict[str, SplitEvaluation]


class EvenGrid(TypedDict):
    """The number of points, evenly from 0 to 1, both ends included."""

    points: int


class FeatureSet(TypedDict):
    id: str
    name: str
    sha256: str
    data_sha256: str | None
    size_bytes: int
    n_samples: int
    n_classes: int
    n_features: int
    class_counts: list[int]
    splits: dict[str, int]
    metadata: dict[str, Any]
    created_at: str


class Fetch(TypedDict):
    """A file that a worker fetches, to become a checkpoint or a probe. Its progress counts bytes."""

    id: str
    makes: Literal["checkpoint", "probe"]
    name: str
    source: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: Progress
    resource_id: str | None
    attempts: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    problem: dict[str, Any] | None


class Gate(TypedDict):
    """One version of a gate; it never changes."""

    name: str
    description: NotRequired[str | None]
    kind: NotRequired[Literal["evaluation", "comparison", "path", "pruning", "series"]]
    checks: list[Check]
    id: str
    version: int
    sha256: str
    created_at: str


class GateReference(TypedDict):
    id: str
    name: str
    version: int


class GateSummary(TypedDict):
    """A gate without its checks, as the collection lists it."""

    id: str
    name: str
    version: int
    kind: Literal["evaluation", "comparison", "path", "pruning", "series"]
    description: str | None
    n_checks: int
    created_at: str


class Generalisation(TypedDict):
    """The first x with a train accuracy of 0.99, the first with a test accuracy of 0.99, and their difference."""

    train_at: float | None
    test_at: float | None
    delay: float | None
    reasons: NotRequired[dict[str, str]]


class Measured(TypedDict):
    """The level and centring of a summary's MIR and HDR."""

    level: Literal["sample", "class_mean"]
    centring: Literal["none", "global"]


class NamedGrid(TypedDict):
    """The given points; missing ends are added, as barriers are measured from them."""

    values: list[float]


class PathLook(TypedDict):
    """An adaptive grid's pass before its evaluations: the loss alone, at many points, on a part of the probe."""

    n_points: int
    n_samples: int
    loss_barrier: Barrier


class PathOptions(TypedDict):
    """The points of a path, and the treatment of the networks there. Each point is a full evaluation."""

    null_permutations: NotRequired[int]
    seed: NotRequired[int]
    tolerance: NotRequired[float]
    batch_size: NotRequired[int | None]
    precision: NotRequired[Literal["float32", "bfloat16"]]
    samples: NotRequired[int | None]
    grid: NotRequired[EvenGrid | NamedGrid | Literal["adaptive"]]
    normalisation: NotRequired[Literal["interpolate", "recalibrate"]]
    alignment: NotRequired[Literal["none", "weight_matching"]]
    extrapolate: NotRequired[bool]


class PathPoint(TypedDict):
    w: float
    splits: dict[str, SplitEvaluation]


class PathSplit(TypedDict):
    """Barriers of one split. MIR's barrier is how far it falls under the chord, HDR's how far it rises over it."""

    loss_barrier: Barrier | None
    error_barrier: Barrier | None
    mir_barrier: Barrier | None
    hdr_barrier: Barrier | None
    connected: bool | None
    loss_forms: BarrierForms | None
    error_forms: BarrierForms | None
    reasons: dict[str, str]


class PathSummary(TypedDict):
    splits: dict[str, PathSplit]
    measured: Measured
    l2_distance: float
    cosine: float | None
    reasons: NotRequired[dict[str, str]]
    alignment: Alignment | None
    recalibrated_layers: int | None
    resolution: NotRequired[float | None]
    look: NotRequired[PathLook | None]


class ProvenancePathOptions(TypedDict):
    interplay_version: str
    code_sha256: str
    torch_version: str
    numpy_version: str
    library: NotRequired[str | None]
    python_version: str
    device: str
    threads: int
    feature_dtype: str
    spectrum_dtype: str
    precision: NotRequired[Literal["float32", "bfloat16"] | None]
    batch_size: int | None
    features_reused: NotRequired[bool]
    options: PathOptions
    computed_on: NotRequired[list[ComputedOn] | None]


class PathReport(TypedDict):
    """Points in order of w; at 0 and 1 they are the two checkpoints themselves."""

    schema_version: str
    definitions_version: str
    id: str
    analysis_id: str
    created_at: str
    probe: ProbeSubject
    timings_seconds: dict[str, float]
    kind: Literal["path"]
    subjects: list[Subject]
    provenance: ProvenancePathOptions
    points: list[PathPoint]
    summary: PathSummary


class Probe(TypedDict):
    id: str
    name: str
    sha256: str
    data_sha256: str | None
    size_bytes: int
    format: Literal["safetensors", "npz", "parquet", "imagefolder", "csv", "jsonl"]
    content: Literal["tensors", "images", "texts"]
    columns: dict[str, str | None] | None
    n_samples: int
    n_classes: int
    class_counts: list[int]
    class_names: list[str] | None
    input_shape: list[int] | None
    splits: dict[str, int]
    preprocess: Preprocess | None
    tokenizer_sha256: str | None
    max_length: int | None
    origin: Origin | None
    metadata: dict[str, Any]
    created_at: str


class PruningOptions(TypedDict):
    """The amount and scope of pruning. Each sparsity is a full evaluation."""

    null_permutations: NotRequired[int]
    seed: NotRequired[int]
    tolerance: NotRequired[float]
    batch_size: NotRequired[int | None]
    precision: NotRequired[Literal["float32", "bfloat16"]]
    samples: NotRequired[int | None]
    sparsities: NotRequired[list[float]]
    scope: NotRequired[Literal["global", "layerwise"]]
    include_head: NotRequired[bool]


class ProvenancePruningOptions(TypedDict):
    interplay_version: str
    code_sha256: str
    torch_version: str
    numpy_version: str
    library: NotRequired[str | None]
    python_version: str
    device: str
    threads: int
    feature_dtype: str
    spectrum_dtype: str
    precision: NotRequired[Literal["float32", "bfloat16"] | None]
    batch_size: int | None
    features_reused: NotRequired[bool]
    options: PruningOptions
    computed_on: NotRequired[list[ComputedOn] | None]


class PruningPoint(TypedDict):
    sparsity: float
    n_pruned: int
    splits: dict[str, SplitEvaluation]


class PruningSplit(TypedDict):
    knee: float | None
    reasons: dict[str, str]


class PruningSummary(TypedDict):
    n_prunable: int
    splits: dict[str, PruningSplit]


class PruningReport(TypedDict):
    schema_version: str
    definitions_version: str
    id: str
    analysis_id: str
    created_at: str
    probe: ProbeSubject
    timings_seconds: dict[str, float]
    kind: Literal["pruning"]
    subject: Subject
    provenance: ProvenancePruningOptions
    points: list[PruningPoint]
    summary: PruningSummary


class Readiness(TypedDict):
    """Answer of /readyz: each part is "ok" or says what is wrong with it."""

    ready: bool
    database: str
    storage: str
    worker: str


class ReportSummary(TypedDict):
    """A report without its content, as collections list it."""

    id: str
    analysis_id: str
    kind: str
    name: str
    checkpoint_id: str | None
    checkpoint_ids: list[str]
    probe_id: str | None
    feature_set_id: str | None
    created_at: str
    metrics: dict[str, float | None]


class SeriesPoint(TypedDict):
    x: float
    checkpoint_id: str
    reused_report_id: str | None
    splits: dict[str, SplitEvaluation]


class SeriesSplit(TypedDict):
    """Spearman's rank correlations over the points, and the distances to the optimum at each, in order."""

    spearman_mir_accuracy: float | None
    spearman_hdr_accuracy: float | None
    mir_distance: list[float | None]
    hdr_distance: list[float | None]
    reasons: dict[str, str]


class SeriesSummary(TypedDict):
    splits: dict[str, SeriesSplit]
    measured: Measured
    generalisation: Generalisation | None


class SeriesReport(TypedDict):
    schema_version: str
    definitions_version: str
    id: str
    analysis_id: str
    created_at: str
    probe: ProbeSubject
    timings_seconds: dict[str, float]
    kind: Literal["series"]
    axis: Axis
    subjects: list[Subject]
    provenance: ProvenanceEvaluationOptions
    points: list[SeriesPoint]
    summary: SeriesSummary


class SucceededAnalysis(TypedDict):
    """It has a report."""

    id: str
    kind: str
    name: str
    status: Literal["succeeded"]
    progress: Progress
    checkpoint_id: str | None
    checkpoint_ids: list[str]
    probe_id: str | None
    feature_set_id: str | None
    axis: Axis | None
    options: dict[str, Any]
    attempts: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    report_id: str
    problem: dict[str, Any] | None


class SucceededFetch(TypedDict):
    """It has made a resource."""

    id: str
    makes: Literal["checkpoint", "probe"]
    name: str
    source: str
    status: Literal["succeeded"]
    progress: Progress
    resource_id: str
    attempts: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    problem: dict[str, Any] | None


class Upload(TypedDict):
    """A resumable upload (tus 1.0.0)."""

    id: str
    size_bytes: int
    offset_bytes: int
    part_bytes: int | None
    metadata: dict[str, str]
    resource_id: str | None
    created_at: str
    expires_at: str


class UploadPart(TypedDict):
    """A part of an upload that the bucket lacks."""

    number: int
    offset_bytes: int
    size_bytes: int
    url: str


class UploadParts(TypedDict):
    missing_bytes: int
    missing: list[UploadPart]


class Verdict(TypedDict):
    """`fail` if a check of that severity failed, else `undefined` if a number was missing, else `warn` or `pass`."""

    status: Literal["pass", "warn", "fail", "undefined"]
    report_id: str
    report_kind: str
    subject: str
    probe: str
    gate: GateReference
    baseline: BaselineReference | None
    counts: dict[str, int]
    checks: list[CheckResult]
    judged_at: str


class WorkerVersion(TypedDict):
    id: str
    device: str | None
    memory_bytes: int | None
    torch_version: str | None
    families: list[str] | None
    untried: list[str]
    unavailable: dict[str, str]


class Version(TypedDict):
    version: str
    schema_version: str
    definitions_version: str
    workers: list[WorkerVersion]


Report = EvaluationReport | ComparisonReport | PathReport | PruningReport | SeriesReport
"""Told apart by `kind`."""

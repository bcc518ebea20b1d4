"""Tasks and answers of a worker, complete and small."""

from pathlib import Path

from app.files.datafile import Limits
from app.schemas import Axis, EvaluationOptions, PathOptions, PruningOptions
from app.schemas.reports import (
    Centrings,
    Collapse,
    Distance,
    Interplay,
    Levels,
    Optimum,
    PathPoint,
    ProbeSubject,
    PruningPoint,
    SeriesPoint,
    SplitEvaluation,
    SplitName,
)
from workers.compute.probes import ProbeFacts, described_probe
from workers.tasks import (
    Checkpoint,
    Files,
    Known,
    KnownOfPath,
    KnownOfPruning,
    PathAnswer,
    PathTask,
    Probe,
    PruningAnswer,
    PruningTask,
    SeriesAnswer,
    SeriesTask,
)

PROBE = Probe(
    id="p",
    name="digits",
    sha256="0" * 64,
    data_sha256=None,
    n_samples=4,
    n_classes=2,
    class_counts=[2, 2],
    class_names=None,
    format="safetensors",
    content="tensors",
    input_shape=[3],
    preprocess=None,
    columns=None,
    tokenizer_sha256=None,
    max_length=None,
)
ABOUT = described_probe(PROBE, ProbeFacts())
FILES = Files(
    paths={"0" * 64: Path("probe")},
    dataset=Limits(rows=1, members=1, unpacked_bytes=1, ratio=1.5, text_bytes=1),
    image_pixels=1,
)
Splits = dict[SplitName, SplitEvaluation]


def checkpoint(name: str) -> Checkpoint:
    """Return a checkpoint of a small network."""
    return Checkpoint(
        id=name,
        name=name,
        sha256="1" * 64,
        size_bytes=8,
        n_parameters=2,
        architecture={"family": "builtin", "name": "mlp", "args": {"sizes": [3, 2]}},
        head=None,
        prefix="",
        ignored={},
        asked_prefix=None,
        preprocess=None,
        tokenizer_sha256=None,
        metadata={"epoch": 1},
    )


def split(accuracy: float, distance: float | None = 0.1) -> SplitEvaluation:
    """Return a split's evaluation with this accuracy and this distance to the optimum."""
    interplay = Interplay(
        mir=0.9,
        hdr=0.1,
        mutual_information=1.0,
        entropy_features=1.0,
        entropy_head=1.0,
        entropy_joint=1.0,
        optimum=Optimum(mir=1.0, hdr=0.0, reachable=True),
        distance_to_optimum=Distance(mir=distance, hdr=distance),
        null=None,
        mir_z=None,
        degenerate_samples=0,
        degenerate_classes=0,
        method=None,
        reasons={},
    )
    centrings = Centrings.model_validate({"none": interplay, "global": interplay})
    nothing = dict.fromkeys(Collapse.model_fields, None)
    return SplitEvaluation(
        n_samples=4,
        class_counts=[2, 2],
        accuracy=accuracy,
        loss=1.0,
        calibration_error=0.0,
        effective_rank=1.0,
        interplay=Levels(sample=centrings, class_mean=centrings),
        collapse=Collapse.model_validate({**nothing, "absent_classes": 0, "reasons": {}}),
        reasons={},
    )


def known(n_classes: int = 2, n_features: int = 2, probe: ProbeSubject | None = ABOUT) -> Known:
    """Return the facts of a point."""
    return Known(head="head", n_features=n_features, n_classes=n_classes, batch_size=4, probe=probe)


def path_task() -> PathTask:
    """Return a path between two checkpoints."""
    return PathTask(analysis_id="a", options=PathOptions(), checkpoints=(checkpoint("a"), checkpoint("b")), probe=PROBE)


def pruning_task() -> PruningTask:
    """Return a sweep of two sparsities."""
    options = PruningOptions(sparsities=[0.0, 0.5])
    return PruningTask(analysis_id="a", options=options, checkpoints=(checkpoint("a"),), probe=PROBE)


def series_task(*values: float) -> SeriesTask:
    """Return a series along epochs."""
    return SeriesTask(
        analysis_id="a",
        options=EvaluationOptions(),
        checkpoints=tuple(checkpoint(f"{x:g}") for x in values),
        probe=PROBE,
        axis=Axis(name="epoch", values=list(values)),
    )


def path_answer(w: float, splits: Splits, *, cosine: float | None = 0.5) -> PathAnswer:
    """Return a point of a path, with distances."""
    found = KnownOfPath(**dict(known()), w=w, loss=1.0, l2_distance=1.0, cosine=cosine)
    point = PathPoint(w=w, splits=splits)
    return PathAnswer(point=point, known=found, timings_seconds={"features": 0.5})


def pruning_answer(sparsity: float, splits: Splits) -> PruningAnswer:
    """Return a point of a pruning sweep."""
    found = KnownOfPruning(**dict(known()), n_prunable=2)
    point = PruningPoint(sparsity=sparsity, n_pruned=0, splits=splits)
    return PruningAnswer(point=point, known=found, timings_seconds={})


def series_answer(x: float, splits: Splits) -> SeriesAnswer:
    """Return a point of a series."""
    point = SeriesPoint(x=x, checkpoint_id=f"{x:g}", reused_report_id=None, splits=splits)
    return SeriesAnswer(point=point, known=known(), timings_seconds={})

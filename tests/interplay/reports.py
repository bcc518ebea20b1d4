"""Reports in the service's form, to render and export without a service."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from app.schemas.reports import ComparisonReport, EvaluationReport, PathReport, PruningReport, SeriesReport

_ID = "01990000-0000-7000-8000-000000000001"
_MEASURED = {"level": "sample", "centring": "global"}


def evaluation_report(**changes: Any) -> dict[str, Any]:
    """Return a report with a null for each kind of reason, checked against the service's own schema."""
    report: dict[str, Any] = {
        "schema_version": "1",
        "definitions_version": "1",
        "kind": "evaluation",
        "id": _ID,
        "analysis_id": _ID,
        "created_at": "2026-01-31T12:00:00Z",
        "subject": {
            "kind": "checkpoint",
            "id": _ID,
            "name": "digits, epoch 10",
            "sha256": "0" * 64,
            "size_bytes": 1234,
            "n_parameters": 2410,
            "architecture": {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 32, 10], "norm": "none"}},
            "head": None,
            "n_features": 32,
            "n_classes": 10,
            "metadata": {"epoch": 10, "final": True, "tags": ["a", "b"]},
        },
        "probe": {
            "kind": "probe",
            "id": _ID,
            "name": "digits",
            "sha256": "1" * 64,
            "n_samples": 1797,
            "n_classes": 10,
            "class_counts": [180] * 10,
            "class_names": None,
            "input_shape": [64],
            "preprocess": None,
        },
        "provenance": {
            "interplay_version": "0.1.0",
            "code_sha256": "2" * 64,
            "torch_version": "2.13.0",
            "numpy_version": "2.4.6",
            "python_version": "3.11.9",
            "device": "cpu",
            "threads": 2,
            "feature_dtype": "float32",
            "spectrum_dtype": "float64",
            "batch_size": 256,
            "options": {},
        },
        "timings_seconds": {"features": 0.25, "spectrum": 1.0},
        "splits": {"all": _split()},
        **changes,
    }
    EvaluationReport.model_validate(report)
    return report


def comparison_report(differences: dict[str, dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Return a comparison whose test split has these differences; values of A and B follow from them."""
    report = evaluation_report()
    a, b = _split(), _split()
    for path, difference in differences.items():
        for side, split in (("a", a), ("b", b)):
            *above, last = path.split(".")
            holder: Any = split
            for name in above:
                holder = holder[name]
            holder[last] = difference[side]
    first = report.pop("subject")
    second = {**first, "id": _ID[:-1] + "2", "name": "digits, epoch 20", "sha256": "3" * 64}
    report["provenance"]["options"] = {"interval": "delta", "resamples": 200, "confidence": 0.95, **options}
    predictions = {
        "agreement": 0.95,
        "both_correct": 1700,
        "only_a_correct": 40,
        "only_b_correct": 30,
        "neither_correct": 27,
        "mcnemar_p": 0.28,
        "smallest_difference": 0.01,
        "reason": None,
    }
    report["splits"] = {"test": {"a": a, "b": b, "differences": differences, "predictions": predictions}}
    report |= {"kind": "comparison", "subjects": [first, second], "probe_b": report["probe"]}
    ComparisonReport.model_validate(report)
    return report


def series_report(values: Sequence[float], **came: float | None) -> dict[str, Any]:
    """Return a series along steps; `came` is when it generalised: train_at, test_at, delay."""
    split = {
        "spearman_mir_accuracy": None,
        "spearman_hdr_accuracy": 0.5,
        "mir_distance": [None, *[0.1] * (len(values) - 1)],
        "hdr_distance": [0.2] * len(values),
        "reasons": {"spearman_mir_accuracy": "too_few_or_constant"},
    }
    points = [{"x": x, "checkpoint_id": _ID, "reused_report_id": None, "splits": {"all": _split()}} for x in values]
    report = evaluation_report()
    report |= {
        "kind": "series",
        "axis": {"name": "step", "values": [*values]},
        "subjects": [report.pop("subject")] * len(values),
        "points": points,
        "summary": {"splits": {"all": split}, "measured": _MEASURED, "generalisation": came or None},
    }
    del report["splits"]
    SeriesReport.model_validate(report)
    return report


def path_report(ws: Sequence[float], *, barrier_at: float) -> dict[str, Any]:
    """Return a path with these points, on which the loss is highest at one of them."""
    barrier = {"value": 0.25, "at": barrier_at}
    forms = {"frankle": barrier, "entezari": barrier, "midpoint": None}
    split = {
        **dict.fromkeys(("loss_barrier", "error_barrier", "hdr_barrier"), barrier),
        "mir_barrier": None,
        "connected": False,
        "loss_forms": forms,
        "error_forms": forms,
        "reasons": {"mir_barrier": "undefined_points"},
    }
    whole = {"l2_distance": 3.0, "cosine": 0.5, "alignment": None, "recalibrated_layers": None}
    whole |= {"resolution": max(high - low for low, high in pairwise(sorted(ws))), "look": None}
    report = evaluation_report()
    report |= {
        "kind": "path",
        "subjects": [report.pop("subject")] * 2,
        "points": [{"w": w, "splits": {"all": _split()}} for w in ws],
        "summary": {"splits": {"all": split}, "measured": _MEASURED, **whole},
    }
    del report["splits"]
    PathReport.model_validate(report)
    return report


def pruning_report(sparsities: Sequence[float], *, knee: float) -> dict[str, Any]:
    """Return a sweep over these sparsities."""
    report = evaluation_report()
    report |= {
        "kind": "pruning",
        "points": [{"sparsity": s, "n_pruned": 7, "splits": {"all": _split()}} for s in sparsities],
        "summary": {"n_prunable": 2048, "splits": {"all": {"knee": knee, "reasons": {}}}},
    }
    del report["splits"]
    PruningReport.model_validate(report)
    return report


def difference(a: float | None, b: float | None, error: float | None, **changes: Any) -> dict[str, Any]:
    """Return a difference as a comparison reports it, with the 95 % interval of the normal distribution."""
    change = None if a is None or b is None else b - a
    margin = None if error is None else 1.959963984540054 * error
    known = change is not None and margin is not None
    return {
        "a": a,
        "b": b,
        "difference": change,
        "standard_error": error,
        "low": change - margin if change is not None and margin is not None else None,
        "high": change + margin if change is not None and margin is not None else None,
        "significant": abs(change) > margin if change is not None and margin is not None else None,
        "bias": None,
        "bias_a": None,
        "bias_b": None,
        "reason": None if known else "not_computed",
        **changes,
    }


def _split() -> dict[str, Any]:
    undefined = _interplay(mir=None, hdr=0.0, mir_z=None, null=None, reasons={"mir": "zero_entropy"})
    return {
        "n_samples": 1797,
        "class_counts": [180] * 10,
        "accuracy": 0.97,
        "loss": 0.0000321,
        "calibration_error": None,
        "effective_rank": 9.5,
        "interplay": {
            "sample": {"none": undefined, "global": _interplay(degenerate_samples=3)},
            "class_mean": {
                "none": _interplay(mir_z=None, reasons={"mir_z": "null_degenerate"}),
                "global": _interplay(optimum={"mir": 0.9524, "hdr": 0.0, "reachable": False}),
            },
        },
        "collapse": {
            "nc1": 0.1234,
            "nc1_condition": 3.0,
            "nc2_equinorm_means": 0.1,
            "nc2_equinorm_head": 0.2,
            "nc2_equiangularity_means": 0.3,
            "nc2_equiangularity_head": 0.4,
            "nc2_max_angle_means": 0.5,
            "nc2_max_angle_head": 0.6,
            "nc3": None,
            "nc4": 0.01,
            "absent_classes": 2,
            "reasons": {"nc3": "head_is_zero"},
        },
        "reasons": {"calibration_error": "no_logits"},
    }


def _interplay(**changes: Any) -> dict[str, Any]:
    return {
        "mir": 0.8123,
        "hdr": 0.0456,
        "mutual_information": 1.7,
        "entropy_features": 2.2,
        "entropy_head": 2.1,
        "entropy_joint": 2.6,
        "optimum": {"mir": 0.9524, "hdr": 0.0, "reachable": True},
        "distance_to_optimum": {"mir": 0.1401, "hdr": 0.0456},
        "null": {"mean": 0.2, "std": 0.01, "n": 10, "n_samples": 512, "observed": 0.81},
        "mir_z": 61.0,
        "degenerate_samples": 0,
        "degenerate_classes": 0,
        "method": None,
        "reasons": {},
        **changes,
    }

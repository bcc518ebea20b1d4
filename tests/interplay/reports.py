"""An evaluation's report as the service would send it, to render without a service."""

from typing import Any

from app.reports import ComparisonReport, EvaluationReport

_ID = "01990000-0000-7000-8000-000000000001"


def evaluation_report(**changes: Any) -> dict[str, Any]:
    """A report in which something is null for each kind of reason; checked against the service's own schema."""
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
    """A comparison of two checkpoints whose test split has these differences; values of A and B follow from them."""
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


def difference(a: float | None, b: float | None, error: float | None, **changes: Any) -> dict[str, Any]:
    """A difference as a comparison reports it, with the 95 % interval of the normal distribution."""
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

"""Shared helpers of tests of gates: gates of single checks, and their results."""

import math
from typing import Any

from app.gates import verdicts
from app.gates.form import GateSpec, require_sound
from tests.interplay.reports import evaluation_report

ACCURACY = "splits.all.accuracy"
MIR = "splits.all.interplay.sample.global.mir"


def gate(*checks: dict[str, Any], **members: Any) -> GateSpec:
    """Return a gate of these checks, in the form of its file; its paths are valid."""
    spec = GateSpec.model_validate(
        {"name": "g", "checks": [{"metric": ACCURACY, **check} for check in checks], **members}
    )
    require_sound(spec)
    return spec


def with_accuracy(value: float | None) -> dict[str, Any]:
    report = evaluation_report()
    report["splits"]["all"]["accuracy"] = value
    return report


def result(
    check: dict[str, Any], report: dict[str, Any], baseline: dict[str, Any] | None = None
) -> verdicts.CheckResult:
    """Return the result of one check."""
    spec = gate(check)
    (found,) = verdicts.judge(spec, verdicts.sides(spec, report, baseline))
    return found


def above(value: float) -> float:
    return math.nextafter(value, math.inf)


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)

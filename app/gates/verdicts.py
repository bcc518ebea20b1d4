"""Compute a gate's verdict on a report: each check with value, bounds, baseline, interval, status and a reason.

It is a pure function of the gate, the report and the baseline's report. These three never change.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import NormalDist
from time import perf_counter
from typing import Any, Literal

from pydantic import Field

from app.errors import NotComparable
from app.gates.form import Check, GateSpec, Quantity
from app.gates.paths import Undefined, number_at
from app.schemas import Kind, Strict
from app.schemas.kinds import KINDS

Report = Mapping[str, Any]
Status = Literal["pass", "warn", "fail", "undefined", "skip"]
STATUSES: tuple[Status, ...] = ("fail", "undefined", "warn", "skip", "pass")
DecidedBy = Literal["value", "low", "high", "both"]
_ENDS: dict[DecidedBy, str] = {"value": "", "low": "its lower end ", "high": "its upper end "}
_BEYOND = "the change is shown to be beyond"
_KEPT = {"within": "the change is shown to be within", "beyond": "the change is not shown to be beyond"}
_NO_BASELINE = "no baseline was given, and the check is of a change against one"


class Interval(Strict):
    """Interval of the change; its ends, by `method`: the comparison's own, or normal from its standard error."""

    low: float
    high: float
    confidence: float
    method: Literal["delta", "bootstrap", "normal"]


class CheckResult(Strict):
    """The result of one check.

    `undefined` counts as a failure of the gate that no number caused; `skip` is an undefined number that the check lets
    pass. `decided_by` names the number that was compared with the bounds, null if there was none.
    """

    label: str = Field(description="The check's name, else its metric and bounds; unique within a gate.")
    name: str | None
    metric: str
    severity: Literal["fail", "warn"]
    status: Status
    quantity: Quantity
    min: float | None
    max: float | None
    value: float | None
    baseline: float | None
    change: float | None = Field(description="Change against the baseline; relative if the bounds are.")
    interval: Interval | None
    decided_by: DecidedBy | None
    why: str
    seconds: float


class GateReference(Strict):
    id: str
    name: str
    version: int


class BaselineReference(Strict):
    """The baseline of a report; for a comparison its own A. Null members: no baseline exists yet."""

    name: str | None
    report_id: str | None
    subject: str | None


class Verdict(Strict):
    """`fail` if a check of that severity failed, else `undefined` if a number was missing, else `warn` or `pass`."""

    status: Literal["pass", "warn", "fail", "undefined"]
    report_id: str
    report_kind: str
    subject: str
    probe: str
    gate: GateReference
    baseline: BaselineReference | None
    counts: dict[Status, int]
    checks: list[CheckResult]
    judged_at: datetime


@dataclass(frozen=True)
class Sides:
    """The input of checks: the candidate, the baseline or why it is missing, differences by split and path."""

    candidate: Report
    baseline: Report | None
    missing: str
    differences: Mapping[str, Mapping[str, Any]] | None
    confidence: float | None
    method: str | None


@dataclass(frozen=True)
class _Finding:
    """The numbers found for a check; those that could not be found are None, and `gap` says why."""

    value: float | None = None
    baseline: float | None = None
    change: float | None = None
    interval: Interval | None = None
    gap: str | None = None


def sides(gate: GateSpec, report: Report, baseline: Report | None, missing: str | None = None) -> Sides:
    """Return the candidate's and the baseline's side of the reports.

    Args:
        gate: its kind decides which reports it judges; kind evaluation also judges comparisons, B against A.
        report: the candidate's, or a comparison with the baseline.
        baseline: the baseline's report.
        missing: why a requested baseline is missing.

    Raises:
        NotComparable: gate, report and baseline do not belong together.
    """
    reads = tuple(name for name, kind in KINDS.items() if gate.kind in (name, kind.also_judged_as))
    if report["kind"] not in reads:
        raise NotComparable(
            f"The gate judges reports of kind {' or '.join(reads)}, and this one is of kind {report['kind']}.",
            differing=[{"member": "kind", "expected": gate.kind, "found": report["kind"]}],
        )
    absent = missing or _NO_BASELINE
    if gate.kind == "evaluation" and report["kind"] == "comparison":
        _require_subject(report, baseline)
        options = report["provenance"]["options"]
        differences = {name: split["differences"] for name, split in report["splits"].items()}
        return Sides(
            _side(report, "b"), _side(report, "a"), absent, differences, options["confidence"], options["interval"]
        )
    if baseline is not None:
        if gate.kind == "evaluation" and baseline["kind"] == "comparison":
            baseline = _side(baseline, "b")
        _require_comparable(report, baseline, reads)
    return Sides(report, baseline, absent, None, None, None)


def judge(gate: GateSpec, sides: Sides) -> list[CheckResult]:
    """Return the result of every check, in the gate's order."""
    return [_judge(check, sides) for check in gate.checks]


def overall(checks: list[CheckResult]) -> Literal["pass", "warn", "fail", "undefined"]:
    """Return the overall status of the checks."""
    found = {check.status for check in checks}
    for status in ("fail", "undefined", "warn"):
        if status in found:
            return status
    return "pass"


def subject_name(report: Report) -> str:
    """Return the name of a report's subject: B for a comparison, A and B for a path, the last for a series."""
    if report["kind"] == "path":
        return " to ".join(subject["name"] for subject in report["subjects"])
    subject = report["subjects"][-1] if "subjects" in report else report["subject"]
    return str(subject["name"])


def _side(comparison: Report, side: Literal["a", "b"]) -> Report:
    """Return one checkpoint of a comparison, as its own evaluation would report it."""
    splits = {name: split[side] for name, split in comparison["splits"].items()}
    shared = {name: value for name, value in comparison.items() if name not in ("subjects", "splits", "probe_b")}
    probe = comparison["probe"] if side == "a" else comparison["probe_b"]
    return {**shared, "subject": comparison["subjects"]["ab".index(side)], "probe": probe, "splits": splits}


def _require_subject(comparison: Report, baseline: Report | None) -> None:
    """Check that a comparison's own baseline, A, is the requested one."""
    if baseline is None:
        return
    expected = baseline["subjects"][-1] if "subjects" in baseline else baseline["subject"]
    found = comparison["subjects"][0]
    if _of_base(found) != _of_base(expected):
        raise NotComparable(
            f"The comparison is with {found['name']!r}, an adapter of another base than the baseline's, or the one is "
            "an adapter and the other is not. Compare with the baseline's checkpoint.",
            differing=[{"member": "subject.base.sha256", "expected": _of_base(expected), "found": _of_base(found)}],
        )
    if found["sha256"] != expected["sha256"]:
        raise NotComparable(
            f"The comparison is with {found['name']!r} (sha256 {found['sha256'][:12]}), the baseline is of "
            f"{expected['name']!r} (sha256 {expected['sha256'][:12]}). Compare with the baseline's checkpoint.",
            differing=[{"member": "subject.sha256", "expected": expected["sha256"], "found": found["sha256"]}],
        )


def _of_base(subject: Report) -> str | None:
    """Return the sha256 of an adapter's base; None for whole networks."""
    base = subject.get("base")
    return None if base is None else str(base["sha256"])


def _require_comparable(report: Report, baseline: Report, kinds: tuple[Kind, ...]) -> None:
    """Check that two reports are comparable: of one probe, in one precision, by one set of definitions."""
    # Reports older than the data hash identify the file instead.
    hashed = all(side["probe"].get("data_sha256") for side in (report, baseline))
    identity = "data_sha256" if hashed else "sha256"
    expected, found = _circumstances(baseline, identity), _circumstances(report, identity)
    if baseline["kind"] == report["kind"]:
        expected, found = {**expected, **_choices(baseline)}, {**found, **_choices(report)}
    differing = [
        {"member": member, "expected": expected[member], "found": found[member]}
        for member in found
        if found[member] != expected[member]
    ]
    if baseline["kind"] not in kinds:
        differing.insert(0, {"member": "kind", "expected": baseline["kind"], "found": report["kind"]})
    if differing:
        one = differing[0]
        raise NotComparable(
            f"The report cannot be compared with the baseline: {one['member']} is {one['found']!r} where the "
            f"baseline's is {one['expected']!r}. Values of different probes, samples, precisions, options or "
            "definitions differ for reasons that are not the checkpoint's.",
            differing=differing,
        )


def _circumstances(report: Report, identity: str) -> dict[str, Any]:
    """Return the members that must be equal; `identity` is the member of the probe that identifies its data."""
    probe = report["probe"]
    # A checkpoint's own settings are part of it and may differ; a probe's are part of the data.
    preprocess = None
    if probe.get("preprocess_source") == "probe":
        # Reports older than this member are floored.
        preprocess = {"pad_offset": "floored", **probe["preprocess"]}
    samples, tokenizer = probe.get("samples") or {}, probe.get("tokenizer") or {}
    return {
        f"probe.{identity}": probe[identity],
        # The same file may be read with other columns.
        "probe.class_counts": probe["class_counts"],
        "probe.preprocess": preprocess,
        "probe.tokenizer.sha256": tokenizer.get("sha256") if tokenizer.get("source") == "probe" else None,
        "probe.samples.used": samples.get("used"),
        "probe.samples.seed": samples.get("seed"),
        # Reports older than this option are float32.
        "provenance.precision": report["provenance"].get("precision") or "float32",
        "definitions_version": report["definitions_version"],
    }


def _choices(report: Report) -> dict[str, Any]:
    """Return the chosen options that affect a number as much as the checkpoint does."""
    return {path: _choice(report, path) for path in KINDS[report["kind"]].choices}


def _choice(report: Report, path: str) -> Any:
    section, name = path.split(".")
    if path == "options.grid":
        return _grid(report)
    return (report["provenance"]["options"] if section == "options" else report[section])[name]


def _grid(report: Report) -> Any:
    """Return a path's grid in one form, however it was requested."""
    if report["provenance"]["options"]["grid"] == "adaptive":
        return "adaptive"
    ws = [point["w"] for point in report["points"]]
    return {"points": len(ws)} if ws == [i / (len(ws) - 1) for i in range(len(ws))] else {"values": ws}


def _judge(check: Check, sides: Sides) -> CheckResult:
    started = perf_counter()
    finding = _find(check, sides)
    decided_by: DecidedBy | None = None
    status: Status
    if finding.gap is None:
        beyond, decided_by, why = _decide(check, finding)
        status = check.severity if beyond else "pass"
    else:
        why = f"Undefined: {finding.gap}."
        outcomes: dict[str, Status] = {"fail": "undefined", "warn": "warn", "pass": "skip"}
        status = outcomes[check.when_undefined or check.severity]
    return CheckResult(
        label=check.label,
        name=check.name,
        metric=check.metric,
        severity=check.severity,
        status=status,
        quantity=check.quantity,
        min=check.low,
        max=check.high,
        value=finding.value,
        baseline=finding.baseline,
        change=finding.change,
        interval=finding.interval,
        decided_by=decided_by,
        why=why,
        seconds=perf_counter() - started,
    )


def _find(check: Check, sides: Sides) -> _Finding:
    """Return the numbers that the check needs, as far as they exist."""
    finding = _Finding()
    try:
        finding = replace(finding, value=number_at(sides.candidate, check.metric))
        if check.quantity == "value":
            return finding
        finding = replace(finding, baseline=_baseline_of(check, sides))
        finding = replace(finding, change=_change(check, finding))
        if check.significance is not None:
            finding = replace(finding, interval=_interval(check.metric, check.significance, sides))
    except Undefined as gap:
        return replace(finding, gap=str(gap))
    return finding


def _baseline_of(check: Check, sides: Sides) -> float:
    """Return the check's number in the baseline's report.

    Raises:
        Undefined: there is no baseline, or its number is of another point or undefined.
    """
    if sides.baseline is None:
        raise Undefined(sides.missing)
    _require_same_place(check.metric, sides.candidate, sides.baseline)
    try:
        return number_at(sides.baseline, check.metric)
    except Undefined as gap:
        raise Undefined(f"of the baseline, {gap}") from None


def _change(check: Check, finding: _Finding) -> float:
    """Return the change of a value against its baseline, relative where the check's bounds are.

    Raises:
        Undefined: a share of 0, or larger than a number can be.
    """
    assert finding.value is not None
    assert finding.baseline is not None
    change = finding.value - finding.baseline
    if check.quantity == "relative_change":
        if finding.baseline == 0:
            raise Undefined("the baseline's value is 0, of which no change is a share")
        change /= abs(finding.baseline)
    if abs(change) == float("inf"):
        raise Undefined("the change is larger than a number can be")
    return change


def _require_same_place(metric: str, candidate: Report, baseline: Report) -> None:
    """Check that a point has one w, sparsity or x in both reports; skip points counted from the end of a series."""
    first, *rest = metric.split(".")
    kind = KINDS[candidate["kind"]]
    if first != "points" or (kind.grows and rest[0].startswith("-")):
        return
    places = [number_at(report, f"points.{rest[0]}.{kind.place}") for report in (candidate, baseline)]
    if places[0] != places[1]:
        raise Undefined(f"point {rest[0]} is at {kind.place} {places[0]!r}, and at {places[1]!r} in the baseline")


def _interval(metric: str, confidence: float, sides: Sides) -> Interval:
    """Return the interval of the change: the comparison's own at its own confidence, else from its standard error."""
    if sides.differences is None:
        raise Undefined(
            "significance needs the interval of the change, which only a comparison of the two checkpoints has: judge "
            "a report of kind comparison, or let `interplay gate --checkpoint FILE --baseline NAME` queue one"
        )
    _, split, *path = [*metric.split("."), ""]
    found = sides.differences.get(split, {}).get(".".join(path[:-1]))
    if found is None:
        raise Undefined("the comparison has no interval of the change of this number")
    low, high, error = found["low"], found["high"], found["standard_error"]
    if confidence == sides.confidence and low is not None and high is not None:
        method: Literal["delta", "bootstrap"] = "bootstrap" if sides.method == "bootstrap" else "delta"
        return Interval(low=low, high=high, confidence=confidence, method=method)
    if error is None or found["difference"] is None:
        reason = f" ({found['reason']})" if found.get("reason") else ""
        raise Undefined(f"the comparison has no standard error of this change{reason}")
    difference = found["difference"]
    if found.get("reason") and low is not None and high is not None and sides.confidence is not None:
        # Near a kink the interval is not symmetric: its sides are stretched like those of a normal one.
        stretch = _normal(confidence) / _normal(sides.confidence)
        low, high = difference + stretch * (low - difference), difference + stretch * (high - difference)
        return Interval(low=low, high=high, confidence=confidence, method="normal")
    margin = _normal(confidence) * error
    return Interval(low=difference - margin, high=difference + margin, confidence=confidence, method="normal")


def _normal(confidence: float) -> float:
    """Return the two-sided quantile of the normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _decide(check: Check, finding: _Finding) -> tuple[bool, DecidedBy, str]:
    """Return whether the number is beyond its bounds, the number compared with them, and a sentence that says so."""
    slack = _rounding(check, finding)
    ends: list[DecidedBy] = []
    clauses: list[str] = []
    for name, bound in check.named_bounds():
        lower = name.startswith("min")
        end, amount = _held(check, finding, lower)
        beyond = amount < bound - slack if lower else amount > bound + slack
        relation = ("below" if lower else "above") if beyond else ("at least" if lower else "at most")
        clause = f"{_ENDS[end]}is {relation} {name} {_exact(bound, amount)}"
        if beyond:
            return True, end, _sentence(check, finding, clause, _shown(check, finding, bound, lower))
        ends.append(end)
        clauses.append(clause)
    return (
        False,
        ends[0] if len(set(ends)) == 1 else "both",
        _sentence(check, finding, " and ".join(clauses), _KEPT[check.proof]),
    )


def _held(check: Check, finding: _Finding, lower: bool) -> tuple[DecidedBy, float]:
    """Return the number compared with a bound: the value or change, or the interval's end that `proof` selects."""
    if finding.interval is None:
        number = finding.value if finding.change is None else finding.change
        assert number is not None, "_find returns a value, or a gap"
        return "value", number
    if lower == (check.proof == "within"):
        return "low", finding.interval.low
    return "high", finding.interval.high


def _shown(check: Check, finding: _Finding, bound: float, lower: bool) -> str:
    """Return the conclusion from a failing interval: the change is beyond the bound, or is not shown to be within."""
    if finding.interval is None or check.proof == "beyond":
        return _BEYOND
    farther = finding.interval.high if lower else finding.interval.low
    return _BEYOND if (farther < bound if lower else farther > bound) else "the change is not shown to be within"


def _sentence(check: Check, finding: _Finding, clause: str, shown: str) -> str:
    assert finding.value is not None, "_find returns a value, or a gap"
    if finding.change is None or finding.baseline is None:
        return f"{_number(finding.value)} {clause}."
    kind = "relative change" if check.quantity == "relative_change" else "change"
    told = f"{_number(finding.value)} after {_number(finding.baseline)}, a {kind} of {_signed(finding.change)},"
    if finding.interval is None:
        return f"{told} {clause}."
    low, high = _signed(finding.interval.low), _signed(finding.interval.high)
    return f"{told} {finding.interval.confidence * 100:g} % interval {low} to {high}: {clause}, so {shown}."


def _rounding(check: Check, finding: _Finding) -> float:
    """Return the tolerance for rounding in a change: 0.89 after 0.90 is -0.01 except for the last bits.

    A value is compared exactly.
    """
    if finding.baseline is None or finding.value is None:
        return 0.0
    scale = abs(finding.value) + abs(finding.baseline)
    if check.quantity == "relative_change":
        scale /= abs(finding.baseline)
    return 4 * sys.float_info.epsilon * scale


def _number(value: float) -> str:
    return f"{value:.6g}"


def _signed(value: float) -> str:
    return f"{value:+.6g}" if value else "0"


def _exact(bound: float, amount: float) -> str:
    """Return a bound as text; add both numbers to the last digit if they differ but would read alike."""
    if bound != amount and _number(bound) == _number(amount):
        return f"{_number(bound)} (to the last digit: {amount!r} and {bound!r})"
    return _number(bound)

"""Verdicts, judged without a service: thresholds at their boundary, and undefined values."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.gates import verdicts
from tests.app.gates.checks import above, below, gate, result, with_accuracy
from tests.interplay.reports import evaluation_report


@pytest.mark.parametrize(
    ("bounds", "value", "status"),
    [
        ({"min": 0.95}, 0.95, "pass"),
        ({"min": 0.95}, below(0.95), "fail"),
        ({"min": 0.95}, above(0.95), "pass"),
        ({"max": 0.95}, 0.95, "pass"),
        ({"max": 0.95}, above(0.95), "fail"),
        ({"max": 0.95}, below(0.95), "pass"),
        ({"min": 0.9, "max": 0.9}, 0.9, "pass"),
        ({"min": 0.9, "max": 0.95}, below(0.9), "fail"),
        ({"min": 0.9, "max": 0.95}, above(0.95), "fail"),
        ({"min": 0}, 0.0, "pass"),
        ({"min": 0}, -5e-324, "fail"),
        ({"min": 1}, 1.0, "pass"),
    ],
)
def test_a_value_at_its_bound_passes_and_the_next_number_beyond_does_not(
    bounds: dict[str, float], value: float, status: str
) -> None:
    """A value equal to its bound passes, to the last bit, and the next float beyond does not."""
    found = result(bounds, with_accuracy(value))
    assert (found.status, found.value, found.decided_by) == (status, value, "value")


@pytest.mark.parametrize(
    ("bounds", "baseline", "value", "status"),
    [
        ({"min_change": -0.01}, 0.90, 0.89, "pass"),
        ({"min_change": -0.01}, 0.90, 0.8899999, "fail"),
        ({"min_change": -0.01}, 0.98, 0.97, "pass"),
        ({"min_change": 0}, 0.5, 0.5, "pass"),
        ({"min_change": 0}, 0.5, below(below(below(0.5))) - 1e-12, "fail"),
        ({"max_change": 0.01}, 0.97, 0.98, "pass"),
        ({"max_change": 0.01}, 0.97, 0.9800001, "fail"),
        ({"min_change": -0.1, "max_change": 0.1}, 0.3, 0.4, "pass"),
        ({"min_relative_change": -0.1}, 0.3, 0.27, "pass"),
        ({"min_relative_change": -0.1}, 0.3, 0.2699999, "fail"),
        ({"max_relative_change": 0.1}, 0.7, 0.77, "pass"),
        ({"max_relative_change": 0.1}, 0.7, 0.7700001, "fail"),
    ],
)
def test_a_change_at_its_bound_passes_whatever_the_subtraction_rounds(
    bounds: dict[str, float], baseline: float, value: float, status: str
) -> None:
    """0.89 - 0.90 is below -0.01 in binary, but a change at its bound passes."""
    found = result(bounds, with_accuracy(value), with_accuracy(baseline))
    assert (found.status, found.baseline) == (status, baseline)


def test_a_relative_change_is_a_share_of_the_size_of_the_baseline() -> None:
    """A relative change is a share of the baseline's size: an increase is positive for a negative baseline too."""
    report, baseline = evaluation_report(), evaluation_report()
    path = "splits.all.interplay.sample.global.mir_z"
    for one, value in ((report, -1.0), (baseline, -2.0)):
        one["splits"]["all"]["interplay"]["sample"]["global"]["mir_z"] = value
    assert result({"metric": path, "min_relative_change": 0.5}, report, baseline).change == 0.5


@given(value=st.floats(0, 1), baseline=st.floats(0, 1), bound=st.floats(-1, 1), margin=st.floats(1e-9, 0.1))
def test_a_wider_bound_never_fails_what_a_narrower_one_passed(
    value: float, baseline: float, bound: float, margin: float
) -> None:
    """Status follows the bound monotonically, and equals exact comparison if numbers are well apart."""
    narrow = result({"min_change": bound}, with_accuracy(value), with_accuracy(baseline))
    wide = result({"min_change": bound - margin}, with_accuracy(value), with_accuracy(baseline))
    assert (narrow.status, wide.status) != ("pass", "fail")
    if abs(value - baseline - bound) > 1e-12:
        assert narrow.status == ("pass" if value - baseline > bound else "fail")


# --- what a check means ---------------------------------------------------------------------------------------------


def test_severity_is_what_a_number_beyond_its_bounds_means() -> None:
    """The same number fails one check and warns in the other; the verdict is the worst of them."""
    spec = gate({"min": 0.99}, {"min": 0.99, "severity": "warn", "name": "w"}, {"min": 0.5})
    checks = verdicts.judge(spec, verdicts.sides(spec, evaluation_report(), None))
    assert [check.status for check in checks] == ["fail", "warn", "pass"]
    assert verdicts.overall(checks) == "fail"
    assert verdicts.overall(checks[1:]) == "warn"
    assert verdicts.overall(checks[2:]) == "pass"


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, "undefined"),
        ({"severity": "warn"}, "warn"),
        ({"when_undefined": "warn"}, "warn"),
        ({"when_undefined": "pass"}, "skip"),
        ({"when_undefined": "fail"}, "undefined"),
        ({"severity": "warn", "when_undefined": "fail"}, "undefined"),
        ({"severity": "warn", "when_undefined": "pass"}, "skip"),
    ],
)
def test_what_an_undefined_number_means(options: dict[str, str], status: str) -> None:
    """An undefined number has the outcome of `when_undefined`, else the severity; value and `decided_by` are null."""
    found = result({"metric": "splits.all.collapse.nc3", "max": 1, **options}, evaluation_report())
    assert (found.status, found.value, found.decided_by) == (status, None, None)
    assert found.why == "Undefined: splits.all.collapse.nc3 is null in the report (head_is_zero)."


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.9"], ids=str)
def test_what_is_no_finite_number_is_undefined(value: Any) -> None:
    """A value that is not finite is undefined and passes no check, though reports hold no such value."""
    found = result({"max": 2}, with_accuracy(value))
    assert (found.status, found.value) == ("undefined", None)


@pytest.mark.parametrize(
    ("check", "report", "baseline", "why"),
    [
        ({"min_change": 0}, evaluation_report(), None, "no baseline was given"),
        ({"min_change": 0}, with_accuracy(None), evaluation_report(), "splits.all.accuracy is null in the report"),
        ({"min_change": 0}, evaluation_report(), with_accuracy(None), "of the baseline, splits.all.accuracy is null"),
        ({"min_relative_change": 0}, evaluation_report(), with_accuracy(0.0), "the baseline's value is 0"),
        ({"metric": "splits.test.accuracy", "min": 0}, evaluation_report(), None, "no splits.test; it has all"),
        ({"metric": "splits.all.class_counts.10", "min": 0}, evaluation_report(), None, "10 class_counts, none at 10"),
        ({"metric": "splits.all.class_counts.-1", "max": 0}, evaluation_report(), None, ""),
        ({"min_change": 0}, with_accuracy(1.7e308), with_accuracy(-1.7e308), "larger than a number can be"),
        ({"min_change": 0, "significance": 0.9}, evaluation_report(), evaluation_report(), "report of kind comparison"),
    ],
)  # fmt: skip
def test_why_something_is_undefined(
    check: dict[str, Any], report: dict[str, Any], baseline: dict[str, Any] | None, why: str
) -> None:
    """The sentence names what is missing."""
    found = result(check, report, baseline)
    assert found.status == ("undefined" if why else "fail")
    assert why in found.why


def test_sentences() -> None:
    """Each sentence gives number, bound and relation; numbers that would read alike are given to the last digit."""
    report, baseline = with_accuracy(0.9627), with_accuracy(0.975)
    assert result({"min": 0.95}, report).why == "0.9627 is at least min 0.95."
    assert result({"min": 0.97}, report).why == "0.9627 is below min 0.97."
    assert result({"max": 0.95}, report).why == "0.9627 is above max 0.95."
    assert result({"min": 0.9, "max": 1}, report).why == "0.9627 is at least min 0.9 and is at most max 1."
    change = "0.9627 after 0.975, a change of -0.0123, is below min_change -0.01."
    assert result({"min_change": -0.01}, report, baseline).why == change
    relative = "0.9627 after 0.975, a relative change of -0.0126154, is at least min_relative_change -0.05."
    assert result({"min_relative_change": -0.05}, report, baseline).why == relative
    close = "0.95 is below min 0.95 (to the last digit: 0.9499999999999998 and 0.95)."
    assert result({"min": 0.95}, with_accuracy(below(0.95))).why == close

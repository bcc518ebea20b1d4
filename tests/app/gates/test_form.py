"""The form of a gate: meaningless checks are refused."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from app.errors import InvalidRequest
from app.gates.paths import UnknownPath, number_at, number_paths, require_number
from app.schemas import Kind
from app.schemas.kinds import KINDS
from tests.app.gates.checks import gate
from tests.interplay.reports import evaluation_report


@pytest.mark.parametrize(
    "check",
    [
        {},
        {"min": 0.9, "min_change": 0},
        {"min": 2, "max": 1},
        {"min": "0.9"},
        {"min": True},
        {"min": math.nan},
        {"min": math.inf},
        {"min": 0, "severity": "error"},
        {"min": 0, "significance": 0.95},
        {"min_relative_change": 0, "significance": 0.95},
        {"min_change": 0, "significance": 95},
        {"min_change": 0, "significance": 0},
        {"min_change": 0, "proof": "beyond"},
        {"min_change": 0, "when_undefined": "skip"},
        {"minimum": 0},
        {"min": 0, "metric": ""},
        {"min": 0, "metric": None},
    ],
    ids=str,
)
def test_checks_that_cannot_be_meant_are_refused(check: dict[str, Any]) -> None:
    """A check has one quantity, valid numbers, significance only with a change, and no unknown member."""
    with pytest.raises(ValidationError):
        gate(check)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a-->b", "ä", "a" * 101])
def test_names_of_gates_fit_into_urls_and_comments(name: str) -> None:
    """Names of gates consist of letters, digits, dots, dashes and underscores."""
    with pytest.raises(ValidationError):
        gate({"min": 0}, name=name)


@pytest.mark.parametrize(
    ("kind", "path", "nearest"),
    [
        ("evaluation", "splits.test.acuracy", "splits.test.accuracy"),
        ("evaluation", "splits.tset.accuracy", "splits.test.accuracy"),
        ("evaluation", "test.accuracy", "splits.test.accuracy"),
        ("evaluation", "splits.test.nc1", "splits.test.collapse.nc1"),
        ("evaluation", "splits.test.interplay.sample.global_.mir", "splits.test.interplay.sample.global.mir"),
        ("evaluation", "splits.test.interplay.sample.globl.mir", "splits.test.interplay.sample.global.mir"),
        ("evaluation", "splits.test.accuracy.value", "splits.test.accuracy"),
        ("path", "summary.splits.test.los_barrier.value", "summary.splits.test.loss_barrier.value"),
        ("path", "points.first.splits.test.loss", "points.0.splits.test.loss"),
        ("pruning", "summary.splits.test.kne", "summary.splits.test.knee"),
        ("series", "summary.generalisation.dely", "summary.generalisation.delay"),
        ("comparison", "splits.test.differences.acuracy.low", "splits.test.differences.accuracy.low"),
        ("comparison", "splits.test.differences.collapse.nc1.lo", "splits.test.differences.collapse.nc1.low"),
    ],
)
def test_an_unknown_path_is_refused_with_the_nearest_real_one(kind: Kind, path: str, nearest: str) -> None:
    """An unknown path is refused with the nearest existing one, whether mistyped, incomplete or of another kind."""
    with pytest.raises(UnknownPath, match="is no path") as caught:
        require_number(kind, path)
    assert f"nearest is '{nearest}" in str(caught.value)


def test_a_path_of_another_kind_of_report_is_told() -> None:
    """For a path of another kind of report the problem says that the gate's kind is missing."""
    with pytest.raises(UnknownPath, match="no path of a report of kind evaluation, but of kind path"):
        require_number("evaluation", "summary.splits.test.loss_barrier.value")


@pytest.mark.parametrize(
    ("kind", "path", "noun"),
    [
        ("evaluation", "splits.test.interplay", "an object"),
        ("evaluation", "splits.test.class_counts", "a list"),
        ("evaluation", "subject.name", "text"),
        ("path", "summary.splits.test.connected", "true or false"),
    ],
)
def test_a_path_to_what_is_no_number_is_refused(kind: Kind, path: str, noun: str) -> None:
    """A path to a value that is not a number is refused."""
    with pytest.raises(UnknownPath, match=f"is {noun} in a report of kind {kind}, not a number"):
        require_number(kind, path)


def test_every_number_of_the_report_models_has_a_path() -> None:
    """Every enumerated path can be followed, for every kind, and every number of an evaluation has a path."""
    for kind in KINDS:
        paths = number_paths(kind)
        assert len(paths) > 300
        for path in paths:
            require_number(kind, path.replace("*", "any"))
    assert "splits.test.differences.interplay.sample.global.mir.low" in number_paths("comparison")
    report = evaluation_report()

    def numbers(value: Any, path: str) -> list[str]:
        match value:
            case dict():
                return [found for key, member in value.items() for found in numbers(member, f"{path}.{key}")]
            case list():
                return [found for index, member in enumerate(value) for found in numbers(member, f"{path}.{index}")]
            case bool() | str() | None:
                return []
        return [path.removeprefix(".")]

    described = [path for path in numbers(report, "") if not path.startswith(("subject.metadata.", "subject.arch"))]
    assert len(described) > 100
    for path in described:
        require_number("evaluation", path)
        number_at(report, path)


def test_a_gate_names_all_its_errors_by_place() -> None:
    """A gate's problem lists up to twenty errors, each with its check and member."""
    checks = [{"metric": "splits.test.acuracy", "min": 0, "name": f"{n}"} for n in range(30)]
    with pytest.raises(InvalidRequest) as caught:
        gate(*checks)
    errors = caught.value.members["errors"]
    assert len(errors) == 20
    assert errors[3]["loc"] == ["checks", "3", "metric"]
    with pytest.raises(InvalidRequest, match="check 0 is called already"):
        gate({"min": 0}, {"min": 0})
    with pytest.raises(InvalidRequest, match="does not judge so"):
        gate({"metric": "summary.l2_distance", "min_change": 0, "significance": 0.9}, kind="path")
    with pytest.raises(ValidationError, match="reports are of kind evaluation"):
        gate({"min": 0}, kind="evaluations")

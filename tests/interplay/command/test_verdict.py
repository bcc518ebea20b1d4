"""A verdict as a table, as JUnit XML and as Markdown; the verdicts come from the service's own judge."""

import functools
import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import junitparser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from app import models
from app.gates import verdicts
from app.gates.form import GateSpec
from interplay.command.verdict import Run, junit, markdown, marker, verdict_view, worst
from tests.interplay.reports import comparison_report, difference, evaluation_report

if TYPE_CHECKING:
    import xmlschema


@functools.cache
def junit_schema() -> "xmlschema.XMLSchema":
    """Return the schema that readers of JUnit files go by."""
    import xmlschema

    return xmlschema.XMLSchema(str(Path(__file__).with_name("junit") / "junit.xsd"))


PASS = {"metric": "splits.all.accuracy", "min": 0.5}
FAIL = {"metric": "splits.all.accuracy", "min": 0.99, "name": "very accurate"}
WARN = {"metric": "splits.all.accuracy", "min": 0.98, "severity": "warn", "name": "accurate"}
UNDEFINED = {"metric": "splits.all.collapse.nc3", "max": 1, "name": "self-dual"}
SKIPPED = {**UNDEFINED, "when_undefined": "pass", "name": "let pass"}
WARNED_UNDEFINED = {**UNDEFINED, "when_undefined": "warn", "name": "unclear"}


def run(*checks: dict[str, Any], strict: bool = False, report: Any = None, baseline: Any = None) -> Run:
    """Return a run whose verdict is that of a gate with these checks on the report of tests/interplay/reports.py."""
    gate = GateSpec.model_validate({"name": "release", "checks": [*checks]})
    report = report or evaluation_report()
    judged = verdicts.judge(gate, verdicts.sides(gate, report, baseline))
    verdict = verdicts.Verdict(
        status=verdicts.overall(judged),
        report_id="r",
        report_kind=report["kind"],
        subject=verdicts.subject_name(report),
        probe=report["probe"]["name"],
        gate=verdicts.GateReference(id="g", name="release", version=3),
        baseline=None,
        counts={status: sum(check.status == status for check in judged) for status in verdicts.STATUSES},
        checks=judged,
        judged_at=models.now(),
    )
    seconds = {"upload": 0.5, "analysis": 61.25, "verdict": 0.25}
    links = {"charts": "http://h/v1/reports/r/charts/overview.png", "report": "http://h/v1/reports/r"}
    return Run(
        "release",
        strict,
        datetime(2026, 1, 31, 12, 0, 30, tzinfo=UTC),
        seconds,
        verdict.model_dump(mode="json"),
        links=links,
    )


def parsed(text: str) -> junitparser.TestSuite:
    """Return the one suite of valid JUnit XML."""
    junit_schema().validate(text)
    (suite,) = junitparser.JUnitXml.fromstring(text.encode())
    return suite


def outcomes(suite: junitparser.TestSuite) -> list[str]:
    return [type(case.result[0]).__name__ if case.result else "" for case in suite]


def rendered(run: Run, width: int = 200) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width, markup=False, highlight=False, emoji=False).print(verdict_view(run))
    return buffer.getvalue()


ALL = (PASS, FAIL, WARN, UNDEFINED, SKIPPED, WARNED_UNDEFINED)


# --- what the checks amount to --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "lenient", "strict"),
    [
        ((PASS,), "pass", "pass"),
        ((PASS, SKIPPED), "pass", "pass"),
        ((PASS, WARN), "warn", "fail"),
        ((PASS, WARNED_UNDEFINED), "warn", "undefined"),
        ((PASS, WARN, UNDEFINED), "undefined", "fail"),
        (ALL, "fail", "fail"),
    ],
)
def test_the_worst_check_is_the_verdict(checks: tuple[dict[str, Any], ...], lenient: str, strict: str) -> None:
    """Without --strict it is the service's verdict; with --strict a warning counts as what it warns of."""
    found = run(*checks).verdict
    assert found is not None
    assert worst(found["checks"], strict=False) == found["status"] == lenient
    assert worst(found["checks"], strict=True) == strict


# --- JUnit ----------------------------------------------------------------------------------------------------------


def test_junit_tells_failure_error_and_skipped_apart() -> None:
    """There is one test case per check, in the gate's order, with the run's counts and times."""
    suite = parsed(junit(run(*ALL)))
    assert outcomes(suite) == ["", "Failure", "Skipped", "Error", "Skipped", "Skipped"]
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (6, 1, 1, 3)
    assert (suite.name, suite.time, suite.timestamp) == ("release", 62.0, "2026-01-31T12:00:30")
    cases = [*suite]
    assert [case.name for case in cases[:3]] == ["splits.all.accuracy min 0.5", "very accurate", "accurate"]
    assert {case.classname for case in cases} == {"interplay.release"}
    assert all(0 < case.time < 1 for case in cases)
    assert cases[1].result[0].message == "0.97 is below min 0.99."
    assert [case.result[0].type for case in cases[1:]] == ["value", "warning", "undefined", "undefined", "warning"]
    assert '<property name="seconds.analysis" value="61.250" />' in junit(run(*ALL))


def test_junit_of_a_strict_run_has_failures_in_place_of_warnings() -> None:
    """An undefined number with a warning is an error."""
    suite = parsed(junit(run(*ALL, strict=True)))
    assert outcomes(suite) == ["", "Failure", "Failure", "Error", "Skipped", "Error"]
    assert (suite.failures, suite.errors, suite.skipped) == (2, 2, 1)


def test_junit_of_a_run_without_a_verdict_is_one_error() -> None:
    """The error says why there is no verdict."""
    stopped = Run("release", False, datetime.now(UTC), {"upload": 1.0, "analysis": 2.0})
    stopped.problem = {"type": "urn:x", "title": "Out of memory", "detail": "One input\x00 was too much."}
    suite = parsed(junit(stopped))
    (case,) = suite
    assert (suite.tests, suite.errors, case.name, case.time) == (1, 1, "analysis", 3.0)
    assert (case.result[0].type, case.result[0].message) == ("urn:x", "Out of memory")
    assert case.result[0].text == "One input\N{REPLACEMENT CHARACTER} was too much."


def test_junit_of_an_interval_says_its_ends() -> None:
    """The interval comes with its confidence and method."""
    check = {"metric": "splits.test.accuracy", "min_change": 0.0, "significance": 0.95}
    suite = parsed(junit(run(check, report=comparison_report({"accuracy": difference(0.9, 0.89, 0.01)}))))
    (case,) = suite
    assert "interval: -0.0296 to 0.0096 (95 %, delta)" in case.result[0].text


@given(name=st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_name_makes_valid_xml_and_one_row(name: str) -> None:
    """With any name of a check JUnit can be parsed, its row stays one row, and no part of it is markup."""
    found = run({**FAIL, "name": name})
    (case,) = parsed(junit(found))
    assert case.name is not None
    text = markdown(found)
    (row,) = [line for line in text.split("\n") if line.startswith("| ❌")]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 7
    assert "<" not in row
    rendered(found)


# --- Markdown -------------------------------------------------------------------------------------------------------


def test_markdown_begins_with_a_marker_that_stays() -> None:
    """The hidden line is the same for every run of a gate, and different for another gate."""
    first, second = markdown(run(PASS)), markdown(run(*ALL))
    assert first.split("\n")[0] == second.split("\n")[0] == marker("release") == "<!-- interplay-gate: release -->"
    assert marker("a-->b") == "<!-- interplay-gate: a--_b -->"


def test_markdown_has_what_matters_first() -> None:
    """Verdict, subject and checks that did not pass come first, then the others, folded, and a link to the charts."""
    text = markdown(run(*ALL))
    lines = text.split("\n")
    assert lines[1] == "### ❌ Gate release failed: 1 failed, 1 undefined, 2 warned, 1 skipped, 1 passed"
    rows = [line.split(" | ")[1] for line in lines if line.startswith("| ") and "check" not in line]
    assert rows == ["very accurate", "self-dual", "accurate", "unclear", "let pass", "splits.all.accuracy"]
    assert text.index("unclear") < text.index("<details>") < text.index("let pass")
    assert "<summary>2 of 6 checks passed</summary>" in text
    assert "[charts](http://h/v1/reports/r/charts/overview.png)" in text


def test_markdown_of_names_with_markup_mentions_nobody_and_breaks_no_table() -> None:
    """Untrusted names stay text."""
    text = markdown(run({**FAIL, "name": "@team | <b> `x` [l](http://e) <!-- -->"}))
    assert "@team" not in text
    assert "\\| &lt;b&gt; \\`x\\` \\[l\\]\\(http://e\\) &lt;\\!-- --&gt;" in text


@pytest.mark.parametrize("n", [1, 200, 5_000])
@pytest.mark.parametrize("template", [PASS, FAIL], ids=["pass", "fail"])
def test_markdown_is_short_whatever_the_number_of_checks(n: int, template: dict[str, Any]) -> None:
    """It stays under 65,000 bytes; omitted checks are counted, and the table and the fold are complete."""
    name = "ü|" * 60
    text = markdown(run(*({**template, "name": f"{name} {number}"} for number in range(n))))
    assert len(text.encode()) < 65_000
    assert text.count("<details>") == text.count("</details>")
    shown = sum(line.startswith("| ❌") or line.startswith("| ✅") for line in text.split("\n"))
    left_out = re.search(r"^([\d,]+) more checks are not shown", text, flags=re.MULTILINE)
    assert shown + (int(left_out[1].replace(",", "")) if left_out else 0) == n
    assert shown >= min(n, 50)
    assert "[charts]" in text


def test_markdown_and_json_of_a_run_without_a_verdict_say_why() -> None:
    """The reason replaces the table; a long detail is cut."""
    stopped = Run("release", False, datetime.now(UTC), problem={"title": "Out", "detail": "of *it* " + "x" * 99_999})
    text = markdown(stopped)
    assert text.split("\n")[1] == "### ❔ Gate release: no verdict"
    assert "**Out** of \\*it\\* xxx" in text
    assert len(text.encode()) < 65_000
    assert json.loads(json.dumps(stopped.body()))["verdict"] is None


# --- the table ------------------------------------------------------------------------------------------------------


def test_table_shows_value_bounds_baseline_and_why() -> None:
    """There is one row per check, worst first; an undefined number is a dash."""
    change = {"metric": "splits.all.accuracy", "min_change": -0.01, "max_change": 0.5}
    baseline = evaluation_report()
    baseline["splits"]["all"]["accuracy"] = 0.99
    text = rendered(run(change, UNDEFINED, baseline=baseline))
    first, second = [line for line in text.splitlines() if line.startswith((" failed", " undefined"))]
    assert re.split(r"\s{2,}", first.strip()) == [
        "failed",
        "splits.all.accuracy",
        "0.9700",
        "change ≥ -0.01 and ≤ 0.5",
        "0.9900",
        "0.97 after 0.99, a change of -0.02, is below min_change -0.01.",
    ]
    assert re.split(r"\s{2,}", second.strip())[2] == "–"
    assert "Gate release failed: 1 failed, 1 undefined" in text


def test_table_takes_no_markup_and_no_control_characters() -> None:
    """Untrusted names are text."""
    assert "[red]x" in rendered(run({**FAIL, "name": "[red]x"}))

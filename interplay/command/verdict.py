"""Render a gate's verdict: a table for a terminal, JUnit for a pipeline, Markdown for a comment.

Names and sentences come from gates and reports, which are untrusted: they are never interpreted as markup.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from xml.etree import ElementTree

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from interplay.command.rendering import number, printable

Body = Mapping[str, Any]
Outcome = Literal["pass", "warn", "fail", "undefined", "skip"]

# GitHub refuses comments of more than 65,536 characters. Bytes are counted, which are never fewer than characters.
MARKDOWN_BYTES = 65_000
_TAIL_BYTES = 1_500
_CELL_CHARACTERS = 300
_ORDER: tuple[Outcome, ...] = ("fail", "undefined", "warn", "skip", "pass")
_WORDS = {"fail": "failed", "undefined": "undefined", "warn": "warned", "skip": "skipped", "pass": "passed"}
_COLOURS = {"fail": "red", "undefined": "magenta", "warn": "yellow", "skip": "dim", "pass": "green"}
_SIGNS = {"fail": "❌", "undefined": "❔", "warn": "⚠️", "skip": "⏭️", "pass": "✅"}
_QUANTITIES = {"value": "", "change": "change ", "relative_change": "relative "}
# Characters that XML 1.0 cannot express.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


@dataclass
class Run:
    """The result of a run of `interplay gate`.

    Attributes:
        gate: name of the gate.
        strict: whether warnings count as failures.
        started_at: when it began.
        seconds: of each phase: upload, analysis, verdict.
        verdict: as the service gave it; None if there is no verdict.
        problem: why there is no verdict, or why the baseline was not moved.
        links: URLs of the report's pages, by their name.
        promoted: the baseline that was moved to this report.
        exit_code: of the command.
    """

    gate: str
    strict: bool
    started_at: datetime
    seconds: dict[str, float] = field(default_factory=dict)
    verdict: Body | None = None
    problem: Body | None = None
    links: dict[str, str] = field(default_factory=dict)
    promoted: str | None = None
    exit_code: int = 0

    def body(self) -> dict[str, Any]:
        """Return the run as JSON."""
        return {
            "exit_code": self.exit_code,
            "gate": self.gate,
            "strict": self.strict,
            "started_at": self.started_at.isoformat(),
            "seconds": self.seconds,
            "verdict": self.verdict,
            "problem": self.problem,
            "links": self.links,
            "promoted": self.promoted,
        }


def outcome(check: Body, strict: bool) -> Outcome:
    """Return the outcome of a check; if `strict`, a warning counts as what it warns of: undefined or failed."""
    status: Outcome = check["status"]
    if status == "warn" and strict:
        return "undefined" if check["decided_by"] is None else "fail"
    return status


def worst(checks: Iterable[Body], strict: bool) -> Outcome:
    """Return the worst outcome of a verdict's checks."""
    found = {outcome(check, strict) for check in checks}
    return next((status for status in _ORDER if status in found and status != "skip"), "pass")


def verdict_view(run: Run) -> RenderableType:
    """Render one row per check, worst first, with its value, bounds, baseline and reason, and the headline below."""
    verdict = run.verdict
    assert verdict is not None, "there is nothing to show"
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "check", "value", "bounds", "baseline", "why"):
        right = column in ("value", "baseline")
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for status, check in _sorted(verdict["checks"], run.strict):
        table.add_row(
            Text(_WORDS[status], style=_COLOURS[status]),
            printable(check["name"] or check["metric"]),
            number(check["value"]),
            _bounds(check),
            number(check["baseline"]),
            printable(check["why"]),
        )
    return Group(table, Text(_headline(run), style="bold"), *(Text(line, style="dim") for line in _facts(run)))


def junit(run: Run) -> str:
    """Return JUnit XML with one test case per check, and with times.

    A number beyond its bounds is a failure, an undefined one an error. Warnings and undefined numbers that the gate
    allows are skipped, since they do not stop the pipeline.
    """
    checks = run.verdict["checks"] if run.verdict is not None else []
    counted = [outcome(check, run.strict) for check in checks]
    cases = [_case(run, check, status) for check, status in zip(checks, counted, strict=True)]
    if run.verdict is None:
        cases = [_unjudged(run)]
    totals = {
        "tests": str(len(cases)),
        "failures": str(counted.count("fail")),
        "errors": str(counted.count("undefined") + (run.verdict is None)),
    }
    seconds = f"{sum(run.seconds.values()):.6f}"
    suites = ElementTree.Element("testsuites", {"name": "interplay", **totals, "time": seconds})
    skipped = str(counted.count("warn") + counted.count("skip"))
    stamp = run.started_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": _xml(run.gate), **totals, "skipped": skipped, "time": seconds, "timestamp": stamp}
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(run):
        ElementTree.SubElement(properties, "property", {"name": _xml(name), "value": _xml(value)})
    suite.extend(cases)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def markdown(run: Run) -> str:
    """Return a summary for a comment or a step: under 65,000 bytes whatever the number of checks, worst checks first.

    Its first line is a hidden marker that is the same for every run of the gate, so that a comment can be found again.
    """
    head = [marker(run.gate), f"### {_SIGNS[_sign(run)]} {_escaped(_headline(run))}", ""]
    head += [f"{_escaped(line)}  " for line in _facts(run)]
    tail = ["", " · ".join(f"[{_escaped(name)}]({_url(url)})" for name, url in run.links.items())]
    if run.problem is not None:
        title, detail = _short(run.problem.get("title", "")), _short(run.problem.get("detail", ""), 3000)
        head += ["", f"**{_escaped(title)}** {_escaped(detail)}".rstrip()]
    lines = [*head, ""]
    if run.verdict is not None:
        left = MARKDOWN_BYTES - _TAIL_BYTES - _bytes([*head, *tail])
        lines += _markdown_tables(_sorted(run.verdict["checks"], run.strict), left)
    return "\n".join([*lines, *tail]).rstrip() + "\n"


def marker(gate: str) -> str:
    """Return the hidden line that identifies the comment of a gate."""
    return f"<!-- interplay-gate: {re.sub('[^A-Za-z0-9._-]', '_', gate)} -->"


def _markdown_tables(checks: Sequence[tuple[Outcome, Body]], left: int) -> list[str]:
    """Return the checks that did not pass, then the others, folded; as many rows as fit into `left` bytes."""
    header = ["| | check | value | bounds | baseline | why |", "|---|---|--:|---|--:|---|"]
    rows: list[str] = []
    for status, check in checks:
        row = _row(status, check)
        if (left := left - _bytes([row])) < 0:
            break
        rows.append(row)
    n_passed = sum(status in ("pass", "skip") for status, _ in checks)
    open_rows, folded_rows = rows[: len(checks) - n_passed], rows[len(checks) - n_passed :]
    lines = [*header, *open_rows] if open_rows else []
    if folded_rows:
        fold = f"<details><summary>{n_passed:,} of {len(checks):,} checks passed</summary>"
        lines += ["", fold, "", *header, *folded_rows, "", "</details>"]
    if len(rows) < len(checks):
        more = len(checks) - len(rows)
        lines += ["", f"{more:,} more checks are not shown here; the JSON and the JUnit file contain all."]
    return lines


def _row(status: Outcome, check: Body) -> str:
    cells = [
        f"{_SIGNS[status]} {_WORDS[status]}",
        _escaped(_short(check["name"] or check["metric"])),
        number(check["value"]),
        _escaped(_bounds(check)),
        number(check["baseline"]),
        _escaped(_short(check["why"])),
    ]
    return f"| {' | '.join(cells)} |"


def _case(run: Run, check: Body, status: Outcome) -> ElementTree.Element:
    names = {
        "classname": _xml(f"interplay.{run.gate}"),
        "name": _xml(check["label"]),
        "time": f"{check['seconds']:.6f}",
    }
    case = ElementTree.Element("testcase", names)
    told = _xml(check["why"])
    warned = check["status"] == "warn"
    match status:
        case "fail":
            kind = "warning" if warned else check["quantity"]
            ElementTree.SubElement(case, "failure", {"type": kind, "message": told}).text = _xml(_detail(check))
        case "undefined":
            ElementTree.SubElement(case, "error", {"type": "undefined", "message": told}).text = _xml(_detail(check))
        case "warn" | "skip":
            kind = "warning" if warned else "undefined"
            ElementTree.SubElement(case, "skipped", {"type": kind, "message": told})
        case _:
            ElementTree.SubElement(case, "system-out").text = told
    return case


def _unjudged(run: Run) -> ElementTree.Element:
    """Return the one test case of a run without a verdict, an error."""
    problem = run.problem or {}
    title, detail = str(problem.get("title", "There is no verdict")), str(problem.get("detail", ""))
    names = {"classname": _xml(f"interplay.{run.gate}"), "name": "analysis", "time": f"{sum(run.seconds.values()):.6f}"}
    case = ElementTree.Element("testcase", names)
    error = {"type": _xml(problem.get("type", "about:blank")), "message": _xml(title)}
    ElementTree.SubElement(case, "error", error).text = _xml(detail)
    return case


def _properties(run: Run) -> Iterable[tuple[str, str]]:
    for phase, seconds in run.seconds.items():
        yield f"seconds.{phase}", f"{seconds:.3f}"
    if run.verdict is not None:
        yield "gate.version", str(run.verdict["gate"]["version"])
        yield "report.id", run.verdict["report_id"]
        if run.verdict["baseline"] is not None:
            yield "baseline.report.id", run.verdict["baseline"]["report_id"] or ""
    for name, url in run.links.items():
        yield f"link.{name}", url


def _detail(check: Body) -> str:
    lines = [f"metric: {check['metric']}", f"value: {number(check['value'])}", f"bounds: {_bounds(check)}"]
    if check["baseline"] is not None:
        lines.append(f"baseline: {number(check['baseline'])}")
    if check["interval"] is not None:
        interval = check["interval"]
        ends = f"{number(interval['low'])} to {number(interval['high'])}"
        lines.append(f"interval: {ends} ({interval['confidence'] * 100:g} %, {interval['method']})")
    return "\n".join([check["why"], *lines])


def _headline(run: Run) -> str:
    if run.verdict is None:
        return f"Gate {printable(run.gate)}: no verdict"
    status = worst(run.verdict["checks"], run.strict)
    words = {"pass": "passed", "warn": "passed with warnings", "fail": "failed", "undefined": "undefined"}
    counts = dict.fromkeys(_ORDER, 0)
    for check in run.verdict["checks"]:
        counts[outcome(check, run.strict)] += 1
    told = ", ".join(f"{n:,} {_WORDS[one]}" for one, n in counts.items() if n)
    return f"Gate {printable(run.gate)} {words[status]}: {told}"


def _facts(run: Run) -> Iterable[str]:
    """Yield the run's facts: subject, probe, baseline, version and report, and whether the baseline was moved."""
    if run.verdict is not None:
        verdict = run.verdict
        told = f"{_short(verdict['subject'])} on {_short(verdict['probe'])}"
        baseline = verdict["baseline"] or {"name": None, "subject": None}
        if baseline["subject"] is not None:
            name = f"{baseline['name']}, " if baseline["name"] else ""
            told += f", against the baseline {name}{_short(baseline['subject'])}"
        yield f"{told}; version {verdict['gate']['version']} of the gate, report {verdict['report_id']}"
        if baseline["name"] is not None and baseline["subject"] is None and run.promoted is None:
            command = f"interplay baseline set {baseline['name']} {verdict['report_id']}"
            yield f"The baseline {baseline['name']} does not exist yet; to start it with this report: {command}"
    if run.promoted is not None:
        yield f"The baseline {run.promoted} now points at this report."


def _sign(run: Run) -> Outcome:
    return "undefined" if run.verdict is None else worst(run.verdict["checks"], run.strict)


def _sorted(checks: Sequence[Body], strict: bool) -> Sequence[tuple[Outcome, Body]]:
    """Return the checks with their outcomes, worst first, then in the gate's order."""
    judged = [(outcome(check, strict), check) for check in checks]
    return sorted(judged, key=lambda one: _ORDER.index(one[0]))


def _bounds(check: Body) -> str:
    bounds = [f"{sign} {check[key]:.6g}" for sign, key in (("≥", "min"), ("≤", "max")) if check[key] is not None]
    return _QUANTITIES[check["quantity"]] + " and ".join(bounds)


def _short(value: Any, limit: int = _CELL_CHARACTERS) -> str:
    text = printable(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _escaped(text: str) -> str:
    """Return text escaped so that Markdown shows it as it is and mentions no user."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", plain).replace("@", "@\N{ZERO WIDTH SPACE}")


def _url(url: str) -> str:
    return re.sub(r"[\s()<>|]", "", url)


def _xml(text: Any) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", str(text))


def _bytes(lines: Iterable[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)

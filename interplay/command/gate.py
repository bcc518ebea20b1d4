"""`interplay gate`: push, analyse, wait and judge in one command.

Exit codes: 0 the gate passed (with warnings, unless --strict); 1 it failed; 2 usage, or a problem
that the service responded with; 3 the service cannot be reached; 4 the analysis failed; 5 a number is undefined.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Annotated, Any
from urllib.parse import urlencode

from cyclopts import Parameter

from interplay.calls.descriptions import CheckpointDescription
from interplay.client import AnalysisFailed, Body, Client, InterplayError, ProblemError, WaitTimeout
from interplay.command import rendering
from interplay.command.gatefile import GateFileError, line_of, read_gate
from interplay.command.naming import found_by, given_name, id_of
from interplay.command.options import (
    DESCRIBED_CHECKPOINT,
    EVALUATION,
    EXIT_TIMEOUT,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    FILES,
    SERVICE,
    DescribedCheckpoint,
    Evaluation,
    Service,
    Timeout,
    fail,
    note,
    write,
)
from interplay.command.problems import in_our_words
from interplay.command.progress import upload_shown, wait_for
from interplay.command.values import UsageError, stem
from interplay.command.verdict import Run, junit, markdown, verdict_view, worst
from interplay.kinds import KINDS
from interplay.results import Baseline, Gate

EXIT_GATE_FAILED, EXIT_ANALYSIS_FAILED, EXIT_UNDEFINED = 1, 4, 5
# Responses of a gateway in place of the service, or of the service itself while it is restarting or overloaded.
_AWAY = (429, 502, 503, 504)
_LINKS = {"charts": "/charts/overview.png", "report": ""}


@Parameter("*")
@dataclass(frozen=True, kw_only=True)
class Subject:
    """The candidate to judge: an existing report, or a checkpoint that is analysed first."""

    checkpoint: Annotated[
        str | None,
        Parameter(
            metavar="FILE|FOLDER|NAME|ID",
            converter=given_name,
            help="Push and analyse this checkpoint first; needs --probe.",
        ),
    ] = None
    probe: Annotated[
        str | None,
        Parameter(metavar="NAME|ID", converter=given_name, help="The probe; of several with the name, the newest."),
    ] = None
    report: Annotated[
        str | None,
        Parameter(
            metavar="NAME|ID", converter=given_name, help="An existing report, instead of --checkpoint and --probe."
        ),
    ] = None


@Parameter("*")
@dataclass(frozen=True, kw_only=True)
class Reference:
    """The baseline that changes are measured against."""

    baseline: Annotated[
        str | None, Parameter(metavar="NAME", help="The baseline that changes are measured against.")
    ] = None
    promote: Annotated[bool, Parameter(help="If the gate passes, point --baseline at this report.")] = False


@Parameter("*", group=FILES)
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files to write, whatever the result."""

    junit: Annotated[Path | None, Parameter(metavar="FILE", help="Write JUnit XML.")] = None
    markdown: Annotated[Path | None, Parameter(metavar="FILE", help="Write a summary for a comment.")] = None
    json: Annotated[
        Path | None,
        Parameter(metavar="FILE", allow_leading_hyphen=True, help="Write the verdict as JSON; - is stdout."),
    ] = None


SUBJECT, REFERENCE, OUTPUTS = Subject(), Reference(), Outputs()


def judge_candidate(
    *,
    gate: Annotated[str, Parameter(metavar="FILE|NAME")],
    subject: Subject = SUBJECT,
    reference: Reference = REFERENCE,
    strict: bool = False,
    outputs: Outputs = OUTPUTS,
    described: DescribedCheckpoint = DESCRIBED_CHECKPOINT,
    evaluation: Evaluation = EVALUATION,
    timeout: Timeout = None,
    service: Service = SERVICE,
) -> None:
    """Judge a checkpoint by a gate: push it, analyse it, and check its report.

    Exit codes: 0 passed, 1 failed, 2 usage, 3 service unreachable, 4 analysis failed, 5 a number is undefined,
    6 the analysis took longer than --timeout.

    Args:
        gate: A YAML file, or a gate of the service: NAME, NAME@3 or its id.
        strict: Warnings fail the gate too.
    """
    given = (subject.report is not None, subject.checkpoint is not None, subject.probe is not None)
    if given not in ((True, False, False), (False, True, True)):
        raise UsageError("Give either --checkpoint and --probe, or --report alone.")
    if reference.promote and reference.baseline is None:
        raise UsageError("requires --baseline, the baseline to move", "--promote")
    candidate = _Candidate(subject, described.name, described.parsed(), evaluation.chosen(), timeout)
    _require_writable(outputs)
    document = _document(gate)
    run = Run(str(document.get("name", gate)) if document else gate, strict, datetime.now(UTC))
    with service.client() as client:
        try:
            judging = client.get_gate(gate) if document is None else client.create_gate(document)
            _judge(client, run, judging, candidate, reference)
        except InterplayError as error:
            _note(run, error, Path(gate) if document else None)
    _finish(run, outputs)


@dataclass(frozen=True)
class _Candidate:
    """What is judged, and how it is pushed and analysed."""

    subject: Subject
    name: str | None
    described: CheckpointDescription
    options: dict[str, Any]
    timeout: float | None


def _judge(client: Client, run: Run, gate: Gate, candidate: _Candidate, reference: Reference) -> None:
    """Judge a candidate, and move the baseline if `promote` is set."""
    run.gate, baseline = gate["name"], reference.baseline
    held = None if baseline is None else _baseline(client, baseline)
    given = candidate.subject.report
    report_id = id_of(client, "reports", given, "--report") if given else _analysed(client, run, gate, held, candidate)
    asked = {
        "gate": gate["id"],
        "baseline": baseline,
        "baseline_report_id": None if held is None else held["report_id"],
    }
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    run.links = {
        "verdict": f"{client.page_of('reports', report_id)}/verdict?{query}",
        "page": client.page_of("reports", report_id),
        **{name: f"{client.url}/v1/reports/{report_id}{rest}" for name, rest in _LINKS.items()},
    }
    with _timed(run, "verdict"):
        run.verdict = client.judge(
            report_id,
            gate_id=gate["id"],
            baseline=baseline,
            # The report that it pointed at when the analysis began, so that everything uses the same one.
            baseline_report_id=None if held is None else held["report_id"],
        )
    codes = {"fail": EXIT_GATE_FAILED, "undefined": EXIT_UNDEFINED}
    run.exit_code = codes.get(worst(run.verdict["checks"], run.strict), 0)
    if reference.promote and run.exit_code == 0:
        assert baseline is not None, "the options were checked"
        reason = f"passed the gate {gate['name']}, version {gate['version']}"
        expected = None if held is None else held["report_id"]
        client.set_baseline(baseline, report_id, expected_report_id=expected, note=reason)
        run.promoted = baseline


def _analysed(client: Client, run: Run, gate: Gate, held: Baseline | None, candidate: _Candidate) -> str:
    """Push and analyse the candidate, wait, and return the id of its report."""
    probe = candidate.subject.probe
    assert probe is not None, "the options were checked"
    against = _compared_with(gate, held)
    probe_id = id_of(client, "probes", probe, "--probe")
    with _timed(run, "upload"):
        checkpoint_id = _checkpoint(client, candidate)
    with _timed(run, "analysis"):
        if against is None:
            analysis = client.create_analysis(checkpoint_id=checkpoint_id, probe_id=probe_id, options=candidate.options)
        else:
            # At the confidence that the gate's checks use, the interval is the comparison's own, not the normal one.
            asked = [check["significance"] for check in gate["checks"] if check["significance"] is not None]
            options = {**candidate.options, **({"confidence": asked[0]} if asked else {})}
            with _named(
                f"its checkpoint {against} has been deleted; point the baseline at another report", "--baseline"
            ):
                analysis = client.create_comparison(against, checkpoint_id, probe_id=probe_id, options=options)
        return wait_for(client, analysis, candidate.timeout)["report_id"]


def _compared_with(gate: Gate, held: Baseline | None) -> str | None:
    """Return the baseline's checkpoint if the gate needs intervals of changes; None if an evaluation is enough."""
    kind = KINDS.get(gate["kind"])
    if kind is None or not kind.judges_checkpoint:
        raise UsageError(
            f"the gate judges reports of kind {gate['kind']}: create one with its own command, then give --report",
            "--gate",
        )
    checkpoint_id = None if held is None else held["checkpoint_id"]
    if kind.needs_baseline and checkpoint_id is None:
        raise UsageError(
            f"a gate of kind {kind.name} needs an existing baseline whose report is of a checkpoint", "--baseline"
        )
    significant = any(check["significance"] is not None for check in gate["checks"])
    # Until the baseline exists, checks of changes are undefined, with or without intervals.
    return checkpoint_id if significant or kind.needs_baseline else None


def _checkpoint(client: Client, candidate: _Candidate) -> str:
    """Return the id of the candidate, pushed if it is a file; a file that the service has is not sent again."""
    given = candidate.subject.checkpoint
    assert given is not None, "the options were checked"
    path = Path(given)
    if not path.exists():
        try:
            return str(found_by(client, "checkpoints", given, "--checkpoint")["id"])
        except UsageError as error:
            raise UsageError(f"{given!r} is no local file, and {error}", "--checkpoint") from None
    note(f"pushing {rendering.printable(path.name or path)}")
    with upload_shown(path.name) as show:
        checkpoint, sent = client.push_checkpoint_once(
            path, name=candidate.name or stem(path), on_progress=show, **candidate.described
        )
    size = f"{checkpoint['size_bytes']:,} bytes"
    note(f"pushed {size}" if sent else f"not sent: the service already has its {size}")
    return str(checkpoint["id"])


def _baseline(client: Client, name: str) -> Baseline | None:
    """Return a baseline; None if it does not exist yet, which the gate judges."""
    try:
        return client.get_baseline(name)
    except ProblemError as error:
        if error.status != 404:
            raise
        return None


@contextmanager
def _named(message: str, option: str) -> Iterator[None]:
    """Map a 404 of the service to UsageError for the option that named the missing resource."""
    try:
        yield
    except ProblemError as error:
        if error.status != 404:
            raise
        raise UsageError(message, option) from None


@contextmanager
def _timed(run: Run, phase: str) -> Iterator[None]:
    started = monotonic()
    try:
        yield
    finally:
        run.seconds[phase] = monotonic() - started


def _document(gate: str) -> dict[str, Any] | None:
    """Return the content of a gate's file; None if the option names a gate of the service instead."""
    path = Path(gate)
    if not path.is_file():
        if path.suffix.lower() in (".yaml", ".yml", ".json") or "/" in gate:
            raise UsageError(f"the file {gate!r} does not exist", "--gate")
        return None
    try:
        return read_gate(path)
    except GateFileError as error:
        raise UsageError(str(error), "--gate") from None


def _require_writable(outputs: Outputs) -> None:
    """Check the output paths before the analysis, which may take hours."""
    for option, path in (("--junit", outputs.junit), ("--markdown", outputs.markdown), ("--json", outputs.json)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"{str(path)!r} cannot be written: it is a folder, or its folder is missing", option)


def _note(run: Run, error: InterplayError, file: Path | None) -> None:
    """Record on the run why there is no verdict or no new baseline, and the exit code."""
    match error:
        case AnalysisFailed():
            run.exit_code = EXIT_ANALYSIS_FAILED
            run.problem = error.problem or {"title": f"The analysis was {error.analysis['status']}", "detail": ""}
        case WaitTimeout():
            run.exit_code = EXIT_TIMEOUT
            run.problem = {"title": "The analysis took too long", "detail": str(error)}
        case ProblemError() if error.status not in _AWAY:
            run.exit_code = EXIT_USAGE
            title, detail, found = in_our_words(error)
            members = dict(found)
            if file is not None and "errors" in members:
                members["errors"] = [_placed(file, entry) for entry in members["errors"]]
            run.problem = {"type": error.type, "title": title, "detail": detail, **members}
        case _:
            run.exit_code = EXIT_UNREACHABLE
            run.problem = {"title": str(error), "detail": ""}


def _placed(file: Path, entry: Body) -> str:
    """Return a validation error of the gate as FILE:LINE: MEMBER: MESSAGE."""
    place = [name for name in entry["loc"] if name != "body"]
    line = line_of(file, place)
    return f"{file}{'' if line is None else f':{line}'}: {'.'.join(place)}: {entry['message']}"


def _finish(run: Run, outputs: Outputs) -> None:
    """Write the requested files, show the verdict, and exit with its code."""
    written = ((outputs.junit, junit), (outputs.markdown, markdown), (outputs.json, _as_json))
    for path, text_of in written:
        if path is not None and str(path) != "-":
            path.write_text(text_of(run), encoding="utf-8")
    if outputs.json is not None and str(outputs.json) == "-":
        write(_as_json(run))
    elif run.verdict is not None:
        rendering.console().print(verdict_view(run))
        rendering.console().print(run.links["verdict"], style="dim", soft_wrap=True)
    if run.problem is not None:
        fail(run.exit_code, run.problem.get("title", ""), run.problem.get("detail", ""), run.problem)
    sys.exit(run.exit_code)


def _as_json(run: Run) -> str:
    return json.dumps(run.body(), indent=2) + "\n"

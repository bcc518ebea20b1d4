"""`interplay gate`: push, analyse, wait and judge in one command. `interplay baseline`: the reference for changes.

Exit codes of `interplay gate`: 0 the gate passed (with warnings, unless --strict); 1 it failed; 2 usage, or a problem
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

import typer

from interplay.client import AnalysisFailed, Body, Client, InterplayError, ProblemError, WaitTimeout
from interplay.command import rendering
from interplay.command.gatefile import GateFileError, line_of, read_gate
from interplay.command.options import (
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    BatchSize,
    Metadata,
    Permutations,
    PrecisionOption,
    Prefix,
    Samples,
    Seed,
    Timeout,
    Tokenizer,
    Tolerance,
    Url,
    evaluation_options,
    fail,
    json_object,
    metadata_of,
    open_client,
    print_body,
    progress_shown,
    stem,
)
from interplay.command.verdict import Run, junit, markdown, verdict_view, worst
from interplay.results import Baseline, Gate

EXIT_GATE_FAILED, EXIT_ANALYSIS_FAILED, EXIT_UNDEFINED = 1, 4, 5
# Responses of a gateway in place of the service, or of the service itself while it is restarting or overloaded.
_AWAY = (429, 502, 503, 504)

baselines = typer.Typer(no_args_is_help=True)


@dataclass(frozen=True)
class _Candidate:
    """The candidate to judge: an existing report, or a checkpoint that is analysed first."""

    report: str | None
    checkpoint: str | None
    probe: str | None
    name: str | None
    described: dict[str, Any]
    options: dict[str, Any]
    timeout: float | None


@dataclass(frozen=True)
class _Outputs:
    """The files to write, whatever the result."""

    junit: Path | None
    markdown: Path | None
    json: Path | None


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("gate")(judge_candidate)
    app.add_typer(baselines, name="baseline", help="What candidates are compared with: set, show, list, history.")


def judge_candidate(
    gate: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="A YAML file, or a gate of the service: NAME, NAME@3 or its id.")
    ],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE|FOLDER|ID", help="With --probe: it is pushed and analysed first.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(metavar="NAME|ID", help="Of several that have the name, the newest.")
    ] = None,
    report: Annotated[str | None, typer.Option(metavar="ID", help="A report that there is, in place of both.")] = None,
    baseline: Annotated[str | None, typer.Option(metavar="NAME", help="What changes are measured against.")] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="If the gate passes, let --baseline point at this report.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail the gate too.")] = False,
    junit_file: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write a summary for a comment.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the verdict as JSON; - is stdout.")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="The network's description. Default: in the file, or config.json."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What people will call the checkpoint. Default: as its file.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Module name of the head. Default: by family.")] = None,
    prefix: Prefix = None,
    preprocess: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="Of images, where the probe gives none.")
    ] = None,
    tokenizer: Tokenizer = None,
    metadata: Metadata = None,
    timeout: Timeout = None,
    permutations: Permutations = None,
    seed: Seed = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = None,
    precision: PrecisionOption = None,
    samples: Samples = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Is this checkpoint fit to ship? Push it, analyse it, and judge its report by a gate.

    Exit codes: 0 passed, 1 the gate failed, 2 usage, 3 the service cannot be reached, 4 the analysis failed,
    5 a number is undefined or missing.
    """
    if (report is None) == (checkpoint is None) or (checkpoint is None) != (probe is None):
        raise typer.BadParameter("Give either --checkpoint and --probe, or --report alone.")
    if promote and baseline is None:
        raise typer.BadParameter("moves a baseline: name it with --baseline", param_hint="--promote")
    described = {
        "architecture": json_object("--architecture", architecture),
        "head": head,
        "prefix": prefix,
        "preprocess": json_object("--preprocess", preprocess),
        "tokenizer": json_object("--tokenizer", tokenizer),
        "metadata": metadata_of(metadata) or None,
    }
    options = evaluation_options(permutations, seed, tolerance, batch_size, precision, samples)
    candidate = _Candidate(report, checkpoint, probe, name, described, options, timeout)
    outputs = _Outputs(junit_file, markdown_file, json_file)
    _require_writable(outputs)
    document = _document(gate)
    run = Run(str(document.get("name", gate)) if document else gate, strict, datetime.now(UTC))
    with open_client(url, api_key) as client:
        try:
            _judge(client, run, gate, document, candidate, baseline, promote)
        except InterplayError as error:
            _note(run, error, Path(gate) if document else None)
    _finish(run, outputs)


def _judge(
    client: Client,
    run: Run,
    gate: str,
    document: Body | None,
    candidate: _Candidate,
    baseline: str | None,
    promote: bool,
) -> None:
    """Judge a candidate, and move the baseline if `promote` is set."""
    judging = client.get_gate(gate) if document is None else client.create_gate(document)
    run.gate = judging["name"]
    held = None if baseline is None else _baseline(client, baseline)
    report_id = candidate.report or _analysed(client, run, judging, held, candidate)
    run.links = {name: f"{client.url}/v1/reports/{report_id}{rest}" for name, rest in _LINKS.items()}
    with _timed(run, "verdict"):
        run.verdict = client.judge(
            report_id,
            gate_id=judging["id"],
            baseline=baseline,
            # The report that it pointed at when the analysis began, so that everything uses the same one.
            baseline_report_id=None if held is None else held["report_id"],
        )
    codes = {"fail": EXIT_GATE_FAILED, "undefined": EXIT_UNDEFINED}
    run.exit_code = codes.get(worst(run.verdict["checks"], run.strict), 0)
    if promote and run.exit_code == 0:
        assert baseline is not None, "the options were checked"
        note = f"passed the gate {judging['name']}, version {judging['version']}"
        expected = None if held is None else held["report_id"]
        client.set_baseline(baseline, report_id, expected_report_id=expected, note=note)
        run.promoted = baseline


_LINKS = {"charts": "/charts/overview.png", "report": ""}


def _analysed(client: Client, run: Run, gate: Gate, held: Baseline | None, candidate: _Candidate) -> str:
    """Push and analyse the candidate, wait, and return the id of its report."""
    assert candidate.probe is not None, "the options were checked"
    against = _compared_with(gate, held)
    with _named(f"{candidate.probe!r} is neither the name nor the id of a probe", "--probe"):
        probe_id = client.find_probe(candidate.probe)["id"]
    with _timed(run, "upload"):
        checkpoint_id = _checkpoint(client, candidate)
    with _timed(run, "analysis"):
        if against is None:
            analysis = client.create_analysis(checkpoint_id=checkpoint_id, probe_id=probe_id, options=candidate.options)
        else:
            # At the confidence that the gate's checks use, the interval is the comparison's own, not the normal one.
            asked = [check["significance"] for check in gate["checks"] if check["significance"] is not None]
            options = {**candidate.options, **({"confidence": asked[0]} if asked else {})}
            with _named(f"its checkpoint {against} has been deleted; let it point at another report", "--baseline"):
                analysis = client.create_comparison(against, checkpoint_id, probe_id=probe_id, options=options)
        try:
            with progress_shown() as show_progress:
                ended = client.wait(analysis["id"], timeout_seconds=candidate.timeout, on_progress=show_progress)
        except KeyboardInterrupt:
            typer.echo(f"It goes on; to stop it: interplay cancel {analysis['id']}", err=True)
            raise
    return str(ended["report_id"])


def _compared_with(gate: Gate, held: Baseline | None) -> str | None:
    """Return the baseline's checkpoint if the gate needs intervals of changes; None if an evaluation is enough."""
    if gate["kind"] not in ("evaluation", "comparison"):
        raise typer.BadParameter(
            f"it judges reports of kind {gate['kind']}: make one with its own command, then give --report",
            param_hint="--gate",
        )
    significant = any(check["significance"] is not None for check in gate["checks"])
    checkpoint_id = None if held is None else held["checkpoint_id"]
    if gate["kind"] == "comparison" and checkpoint_id is None:
        raise typer.BadParameter(
            "a gate of kind comparison needs a baseline that is there, of a checkpoint", param_hint="--baseline"
        )
    # As long as there is no baseline, checks of changes are undefined, with or without intervals.
    return checkpoint_id if significant or gate["kind"] == "comparison" else None


def _checkpoint(client: Client, candidate: _Candidate) -> str:
    """Return the id of the candidate, pushed if it is a file; a file that the service has is not sent again."""
    assert candidate.checkpoint is not None, "the options were checked"
    path = Path(candidate.checkpoint)
    if not path.exists():
        with _named(f"{candidate.checkpoint!r} is neither a file here nor the id of a checkpoint", "--checkpoint"):
            return str(client.get("checkpoints", candidate.checkpoint)["id"])
    shown = rendering.printable(path.name or path)
    typer.echo(f"pushing {shown}", err=True)
    checkpoint, sent = client.push_checkpoint_once(path, name=candidate.name or stem(path), **candidate.described)
    size = f"{checkpoint['size_bytes']:,} bytes"
    typer.echo(f"pushed {size}" if sent else f"not sent: the service holds its {size} already", err=True)
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
    """Map a 404 of the service to BadParameter for the option that named the missing resource."""
    try:
        yield
    except ProblemError as error:
        if error.status != 404:
            raise
        raise typer.BadParameter(message, param_hint=option) from None


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
            raise typer.BadParameter(f"there is no file {gate!r}", param_hint="--gate")
        return None
    try:
        return read_gate(path)
    except GateFileError as error:
        raise typer.BadParameter(str(error), param_hint="--gate") from None


def _require_writable(outputs: _Outputs) -> None:
    """Check the output paths before the analysis, which may take hours."""
    for option, path in (("--junit", outputs.junit), ("--markdown", outputs.markdown), ("--json", outputs.json)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise typer.BadParameter(f"{str(path)!r} cannot be written: no such folder", param_hint=option)


def _note(run: Run, error: InterplayError, file: Path | None) -> None:
    """Record on the run why there is no verdict or no new baseline, and the exit code."""
    match error:
        case AnalysisFailed():
            run.exit_code = EXIT_ANALYSIS_FAILED
            run.problem = error.problem or {"title": f"The analysis was {error.analysis['status']}", "detail": ""}
        case WaitTimeout():
            run.exit_code = EXIT_ANALYSIS_FAILED
            run.problem = {"title": "The analysis took too long", "detail": str(error)}
        case ProblemError() if error.status not in _AWAY:
            run.exit_code = EXIT_USAGE
            members = dict(error.members)
            if file is not None and "errors" in members:
                members["errors"] = [_placed(file, entry) for entry in members["errors"]]
            run.problem = {"type": error.type, "title": error.title, "detail": error.detail, **members}
        case _:
            run.exit_code = EXIT_UNREACHABLE
            run.problem = {"title": str(error), "detail": ""}


def _placed(file: Path, entry: Body) -> str:
    """Return a validation error of the gate as FILE:LINE: MEMBER: MESSAGE."""
    place = [name for name in entry["loc"] if name != "body"]
    line = line_of(file, place)
    return f"{file}{'' if line is None else f':{line}'}: {'.'.join(place)}: {entry['message']}"


def _finish(run: Run, outputs: _Outputs) -> None:
    """Write the requested files, show the verdict, and exit with its code."""
    written = ((outputs.junit, junit), (outputs.markdown, markdown), (outputs.json, _as_json))
    for path, text_of in written:
        if path is not None and str(path) != "-":
            path.write_text(text_of(run), encoding="utf-8")
    if outputs.json is not None and str(outputs.json) == "-":
        typer.echo(_as_json(run), nl=False)
    elif run.verdict is not None:
        rendering.console().print(verdict_view(run))
    if run.problem is not None:
        fail(run.exit_code, run.problem.get("title", ""), run.problem.get("detail", ""), run.problem)
    sys.exit(run.exit_code)


def _as_json(run: Run) -> str:
    return json.dumps(run.body(), indent=2) + "\n"


# --- baselines ------------------------------------------------------------------------------------------------------

BaselineName = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]


@baselines.command("set")
def set_baseline(
    name: BaselineName,
    report: Annotated[str, typer.Argument(metavar="REPORT", help="A report's id.", show_default=False)],
    note: Annotated[str | None, typer.Option(help="Why, for the history.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Let a baseline point at a report."""
    with open_client(url, api_key) as client:
        body = client.set_baseline(name, report, note=note)
    print_body(body, as_json, f"baseline {body['name']} is at report {body['report_id']}")


@baselines.command("show")
def show_baseline(name: BaselineName, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show where a baseline points, and the report there."""
    with open_client(url, api_key) as client:
        body = client.get_baseline(name)
        report = None if as_json else client.get_report(body["report_id"])
    print_body(body, as_json, None if report is None else rendering.report_view(report))


@baselines.command("list")
def list_baselines(url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List all baselines, newest first."""
    with open_client(url, api_key) as client:
        items = [*client.list("baselines")]
    print_body(items, as_json, rendering.collection_view("baselines", items))


@baselines.command("history")
def show_history(
    name: BaselineName,
    limit: Annotated[int, typer.Option(min=1, max=200, help="The newest so many.")] = 50,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List what was asked of a baseline, refused moves included, newest first."""
    with open_client(url, api_key) as client:
        items = [*client.baseline_history(name, limit=limit)]
    print_body(items, as_json, rendering.collection_view("moves", items))

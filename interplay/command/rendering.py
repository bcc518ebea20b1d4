"""Render reports, collections and problems for a terminal.

Names, metadata and details are untrusted, so they are never interpreted as markup and control characters never reach
the terminal.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from interplay.kinds import COMPARISON, KINDS, PATH, Kind

Body = Mapping[str, Any]

# Most entries shown of a list in a problem; the service itself sends at most 20 of most lists.
_LIST_LIMIT = 20
_UNDEFINED = "–"
# A number with more digits was computed, not typed.
_TYPED_DIGITS = 12

_LEVELS = (("sample", "none"), ("sample", "global"), ("class_mean", "none"), ("class_mean", "global"))
# An error of MIR above this is noted, since the four digits of a table would hide it.
_NOTICEABLE = 0.005
_MEASURES = (
    ("accuracy", "accuracy"),
    ("loss", "loss (mean cross-entropy)"),
    ("calibration_error", "calibration error"),
    ("effective_rank", "effective rank"),
)
_COLLAPSE = (
    ("nc1", "NC1 within / between"),
    ("nc2_equinorm_means", "NC2 equinorm, means"),
    ("nc2_equinorm_head", "NC2 equinorm, head"),
    ("nc2_equiangularity_means", "NC2 equiangularity, means"),
    ("nc2_equiangularity_head", "NC2 equiangularity, head"),
    ("nc2_max_angle_means", "NC2 max angle, means"),
    ("nc2_max_angle_head", "NC2 max angle, head"),
    ("nc3", "NC3 means to head"),
    ("nc4", "NC4 not the nearest mean"),
)
#: Metrics by which lists are sorted and shown without a path: of the test split, or of all samples.
SHORT_METRICS: dict[str, str] = {
    "accuracy": "accuracy",
    "loss": "loss",
    "mir": "interplay.sample.global.mir",
    "hdr": "interplay.sample.global.hdr",
    "nc1": "collapse.nc1",
}
_SPLITS = ("test", "all")
_COMPARED = {
    "accuracy": "accuracy",
    "loss": "loss",
    "calibration_error": "calibration error",
    "interplay.sample.global.mir": "MIR",
    "interplay.sample.global.hdr": "HDR",
    "interplay.sample.global.distance_to_optimum.mir": "MIR to optimum",
    "effective_rank": "effective rank",
    "collapse.nc1": "NC1",
    "collapse.nc3": "NC3",
    "collapse.nc4": "NC4",
}
# Columns of a list: "outcome" is an analysis's report, or what a fetch has made, or why there is none.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "checkpoints": ("id", "name", "created_at", "n_parameters", "metadata"),
    "probes": ("id", "name", "created_at", "n_samples", "n_classes", "content"),
    "feature-sets": ("id", "name", "created_at", "n_samples", "n_classes", "n_features", "metadata"),
    "fetches": ("id", "name", "makes", "status", "source", "outcome"),
    "analyses": ("id", "name", "kind", "status", "created_at", "outcome"),
    "reports": ("id", "name", "kind", "created_at", "accuracy", "mir", "hdr"),
    "gates": ("id", "name", "version", "kind", "n_checks", "created_at", "description"),
    "baselines": ("name", "report_id", "report_kind", "checkpoint_id", "moved_at"),
    "moves": ("created_at", "report_id", "before_report_id", "done", "note"),
}
_TITLES = {
    "created_at": "created, UTC",
    "moved_at": "moved, UTC",
    "n_parameters": "parameters",
    "n_samples": "samples",
    "n_classes": "classes",
    "n_features": "features",
    "n_checks": "checks",
    "size_bytes": "size",
    "report_id": "report",
    "report_kind": "kind",
    "checkpoint_id": "checkpoint",
    "before_report_id": "before",
    "mir": "MIR",
    "hdr": "HDR",
    "nc1": "NC1",
}
_SHORT_ID = 8


def console(*, stderr: bool = False) -> Console:
    """Return a console that reads no markup from data, and does not fold tables to 80 columns in a pipe or a log."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else 150
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def paths_of(metric: str) -> list[str]:
    """Return the paths of a metric that has a short name, the one that counts first; of another, its own path."""
    return [f"splits.{split}.{SHORT_METRICS[metric]}" for split in _SPLITS] if metric in SHORT_METRICS else [metric]


def printable(value: Any) -> str:
    """Return untrusted text with control characters replaced."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def printable_lines(text: str) -> list[str]:
    """Return the lines of untrusted text."""
    return [printable(line) for line in text.splitlines()]


def number(value: float | None, digits: int = 4) -> str:
    """Format a measurement; small ones keep their leading digits, an undefined one is a dash."""
    if value is None:
        return _UNDEFINED
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3e}"


def place(x: float | None, *, shorten: bool = True) -> str:
    """Format a w, a sparsity or a number of an axis exactly as it was given.

    Args:
        x: None is shown as a dash.
        shorten: keep six digits of numbers without a short form, as 1/24 or 0.1 + 0.2.
    """
    if x is None:
        return _UNDEFINED
    exact = repr(float(x) + 0.0).removesuffix(".0")  # + 0.0, as -0 is 0
    n_digits = sum(char.isdigit() for char in exact.partition("e")[0].lstrip("-0."))
    return f"{x:.6g}" if shorten and n_digits > _TYPED_DIGITS and abs(x) < 1000 else exact


def report_view(report: Body, page: str | None = None) -> RenderableType:
    """Render a report of any kind: its subjects, its results, and the address of its page."""
    kind = KINDS[report["kind"]]
    if kind.place is not None:
        show = _places(report, kind.place)
        shown: RenderableType = Group(_heading(report), _points(report, kind, show), *_summary(report, kind, show))
    else:
        shown = _comparison(report) if kind is COMPARISON else _evaluation(report)
    return shown if page is None else Group(shown, Text(page, style="dim"))


def collection_view(
    collection: str,
    items: Sequence[Body],
    columns: Sequence[str] | None = None,
    page: str | None = None,
    *,
    whole_ids: bool = False,
) -> RenderableType:
    """Render a table of the resources of a collection, in 80 columns where names are short.

    Args:
        collection: its name, or `moves` of a baseline.
        items: the resources.
        columns: members of the resources, `metadata.KEY`, or metrics, by a path or by one of `SHORT_METRICS`. Default:
            what matters.
        page: address of the page that shows the same to people.
        whole_ids: whether ids are shown whole; else their first characters, which commands take too.
    """
    chosen = columns or _COLUMNS[collection]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    values = [[_entry(item, column, whole=whole_ids) for column in chosen] for item in items]
    for index, column in enumerate(chosen):
        foldable = column in ("name", "metadata", "outcome", "source", "description", "note", "architecture")
        numeric = bool(values) and all(isinstance(_raw(item, column), int | float | None) for item in items)
        title = _TITLES.get(column) or (column if "." in column else column.replace("_", " "))
        justify: Literal["left", "right"] = "right" if numeric and column != "done" else "left"
        widest = max([0, *(len(row[index]) for row in values)])
        table.add_column(
            printable(title),
            # Long titles are folded, values of a fixed form never; a name keeps more than a letter a line.
            no_wrap=not foldable and len(title) <= widest,
            overflow="fold",
            justify=justify,
            min_width=min(widest, 12) if foldable else widest,
        )
    for row in values:
        table.add_row(*row)
    return table if page is None else Group(table, Text(page, style="dim"))


def analysis_view(analysis: Body, page: str) -> RenderableType:
    """Render one analysis: what was asked, how far it is, and its report or its problem."""
    table = Table.grid(padding=(0, 2))
    table.add_row("analysis", f"{analysis['id']}, {analysis['kind']}, {progress_line(analysis)}")
    table.add_row("of", printable(analysis["name"]))
    for member in ("checkpoint_ids", "probe_id", "feature_set_id"):
        if value := analysis.get(member):
            noun = member.removesuffix("s").removesuffix("_id").replace("_", " ")
            table.add_row(noun, ", ".join(value) if isinstance(value, list) else str(value))
    for member in ("created_at", "started_at", "finished_at"):
        if value := analysis.get(member):
            table.add_row(member.removesuffix("_at"), _cell("created_at", value))
    if analysis.get("report_id"):
        table.add_row("report", str(analysis["report_id"]))
    problem = analysis.get("problem")
    parts: list[RenderableType] = [table]
    if problem:
        parts.append(Text(problem_text(problem.get("title", ""), problem.get("detail", ""), problem)))
    elif analysis["status"] in ("queued", "running"):
        parts.append(Text(f"interplay wait {analysis['id']}  or  interplay cancel {analysis['id']}", style="dim"))
    return Group(*parts, Text(page, style="dim"))


def progress_line(analysis: Body) -> str:
    """Return the state of an analysis in one line."""
    progress = analysis["progress"]
    line = str(analysis["status"])
    if analysis["status"] == "running" and progress["total"]:
        line += f" {progress['done']}/{progress['total']}"
    phase = "null baseline" if progress["phase"] == "null" else printable(progress["phase"])
    return f"{line} {phase}".rstrip() if analysis["status"] == "running" else line


def problem_text(title: str, detail: str, members: Body) -> str:
    """Return a problem in lines: title and detail, then each further member, with one line for each entry of a list."""
    lines = [f"{printable(title)}: {printable(detail)}" if detail else printable(title)]
    for key, value in members.items():
        if key in ("type", "title", "detail", "status", "instance"):
            continue
        if not isinstance(value, list):
            lines.append(f"  {printable(key)}: {_inline(value)}")
        elif value:
            lines.append(f"  {printable(key)}:")
            lines += [f"    {_inline(entry)}" for entry in value[:_LIST_LIMIT]]
            if len(value) > _LIST_LIMIT:
                lines.append(f"    ... and {len(value) - _LIST_LIMIT} more")
    return "\n".join(lines)


def resource_text(noun: str, body: Body) -> str:
    """Return one line about a resource that was just created."""
    facts = [f"{noun} {body['id']}", printable(body["name"])]
    if "n_parameters" in body:
        facts.append(f"{body['n_parameters']:,} parameters")
    if adapter := body.get("adapter"):
        facts.append(f"{adapter['kind']} adapter of rank {adapter['rank']}, base {body['base_id']}")
    elif body.get("prefix"):
        facts.append(f"names without {printable(body['prefix'])}")
    facts += [f"{left_out} left out" for left_out in _left_out(body)]
    if "n_samples" in body:
        facts.append(_size(body))
    if "n_features" in body:
        facts.append(f"{body['n_features']} features")
    return ", ".join(facts)


def conversion_text(body: Body) -> str:
    """Return the items that `interplay convert` kept and left out, one per line."""
    where = f" under {printable(body['key'])!r}" if body["key"] else ""
    lines = [f"wrote {printable(body['output'])}: {body['n_tensors']:,} tensors, {body['n_numbers']:,} numbers{where}"]
    lines += [f"left out {printable(name)}: {printable(what)}" for name, what in body["left_out"].items()]
    if body["others"]:
        lines.append(f"other weights in the file, for --key: {', '.join(map(printable, body['others']))}")
    if body["architecture"] is None:
        lines.append("no architecture was given (--architecture): `interplay push checkpoint` will need it")
    return "\n".join(lines)


def export_text(done: Body) -> str:
    """Return the targets that a report was exported to, one per line."""
    lines = [
        f"{printable(done[form]['file'])}, {done[form]['rows']:,} rows" for form in ("csv", "parquet") if form in done
    ]
    if run := done.get("mlflow"):
        lines.append(f"MLflow run {printable(run['run_id'])}, {run['n_metrics']:,} metrics")
    return "\n".join(lines)


def _evaluation(report: Body) -> RenderableType:
    """Render the measures of each split, MIR and HDR with the values needed to interpret them."""
    splits: Mapping[str, Body] = report["splits"]
    parts: list[RenderableType] = [
        _heading(report),
        _measures(splits, report["probe"].get("next_tokens")),
        _interplay(splits),
        Text("MIR says little without accuracy and its null: z = (MIR - null mean) / null std.", style="dim"),
    ]
    notes = [*_notes(splits)]
    if notes:
        parts.append(Text("\n".join(notes), style="dim"))
    return Group(*parts)


def _comparison(report: Body) -> RenderableType:
    """Render for each split the differences of the main measures, and how far predictions differ."""
    splits: Mapping[str, Body] = report["splits"]
    confidence = f"{report['provenance']['options']['confidence'] * 100:g} %"
    parts: list[RenderableType] = [_heading(report)]
    for name, split in splits.items():
        table = Table(box=SIMPLE_HEAD)
        table.add_column(name)
        for column in ("A", "B", "B - A", f"{confidence} from", "to", ""):
            table.add_column(column, justify="right")
        for path, label in _COMPARED.items():
            found = split["differences"][path]
            mark = {True: "differs", False: "", None: printable(found["reason"] or "")}[found["significant"]]
            table.add_row(label, *(number(found[key]) for key in ("a", "b", "difference", "low", "high")), mark)
        samples = f"{split['a']['n_samples']:,} samples. "
        parts += [table, Text(samples + _agreement(split["predictions"]), style="dim")]
    how = {"delta": "influence functions (delta method)", "bootstrap": "a paired bootstrap"}
    notes = [
        "",
        f"Standard errors by {how[report['provenance']['options']['interval']]}, within classes; MIR and HDR: sample "
        "level, global centring.",
        "Some of many intervals miss the true value by chance. --json has every metric.",
    ]
    return Group(*parts, Text("\n".join(notes), style="dim"))


def _agreement(predictions: Body) -> str:
    smallest = predictions["smallest_difference"]
    shown = (
        "with so few samples the test detects no difference of accuracy"
        if smallest is None
        else f"with as many samples the test detects a difference of accuracy of {number(smallest)} in 4 of 5 cases"
    )
    return (
        f"Same prediction for {predictions['agreement']:.1%}; right in A alone {predictions['only_a_correct']:,}, in B "
        f"alone {predictions['only_b_correct']:,} (McNemar p = {number(predictions['mcnemar_p'])}); {shown}."
    )


def _left_out(body: Body) -> list[str]:
    """Return the tensors of a checkpoint's file that are not the network's: their numbers and names."""
    return [
        f"{n:,} tensor{'s' * (n != 1)} {printable(name)}{'*' * name.endswith('.')}"
        for name, n in (body.get("ignored") or {}).items()
    ]


def _heading(report: Body) -> Table:
    probe, provenance = report["probe"], report["provenance"]
    table = Table.grid(padding=(0, 2))
    table.add_row("report", f"{report['id']}, {report['kind']}, {report['created_at']}")
    for subject in report.get("subjects") or [report["subject"]]:
        _describe(table, subject)
    if probe["kind"] == "probe":
        table.add_row("probe", f"{printable(probe['name'])}, {_size(probe)} ({probe['id']})")
        if probe.get("next_tokens"):
            table.add_row("positions", _next_tokens(probe["next_tokens"]))
    seconds = sum(report["timings_seconds"].values())
    table.add_row("computed", f"on {provenance['device']}, torch {provenance['torch_version']}, in {seconds:.2f} s")
    return table


def _size(probe: Body) -> str:
    classes = f"of {probe['n_classes']} classes" if probe["n_classes"] else "without labels"
    return f"{probe['n_samples']:,} samples {classes}"


def _next_tokens(found: Body) -> str:
    """Describe the samples of a language model, and the tokens that each measure covers."""
    occur, vocabulary = f"{len(found['token_ids']):,}", f"{found['n_vocabulary']:,}"
    words = (
        f"{found['n_positions']['all']:,} in {found['n_sequences']['all']:,} sequences; each is a sample, its class "
        f"the token that follows. Of {vocabulary} tokens {occur} occur as classes: MIR, HDR and collapse are of these, "
        "accuracy, loss and calibration over all."
    )
    return words + (" The labels of the probe were not used." if found["ignored_labels"] else "")


def _describe(table: Table, subject: Body) -> None:
    about = [printable(subject["name"])]
    if base := subject.get("base"):
        adapter = subject["adapter"]
        about.append(f"{adapter['kind']} adapter of rank {adapter['rank']} on {printable(base['name'])}")
    if subject.get("architecture"):
        about.append(_architecture(subject["architecture"]))
    if subject.get("n_parameters"):
        about.append(f"{subject['n_parameters']:,} parameters")
    about.append(f"{subject['n_features']} features")
    table.add_row(subject["kind"].replace("_", " "), f"{', '.join(about)} ({subject['id']})")
    if left_out := _left_out(subject):
        table.add_row("left out", ", ".join(left_out))
    if subject.get("untied"):
        table.add_row("untied", f"{', '.join(map(printable, subject['untied']))}: its own tensor in the file")
    if subject.get("metadata"):
        table.add_row("metadata", _pairs(subject["metadata"]))


def _places(report: Body, member: str) -> Callable[[float | None], str]:
    """Return the formatter of a report's places: `place`, shortened unless that makes two of its points look alike."""
    places = {point[member] for point in report["points"]}
    return functools.partial(place, shorten=len({*map(place, places)}) == len(places))


def _points(report: Body, kind: Kind, show: Callable[[float | None], str]) -> Table:
    """Render a row per point: its place, then loss, accuracy, MIR and HDR (sample level, global centring) by split."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column(printable(report["axis"]["name"]) if kind.names_axis else str(kind.place), justify="right")
    for split in report["points"][0]["splits"]:
        for measure in ("loss", "acc", "MIR", "HDR"):
            table.add_column(f"{measure}\n{split}", justify="right")
    reused = any(point.get("reused_report_id") for point in report["points"])
    if reused:
        table.add_column("reused report", no_wrap=True)
    for point in report["points"]:
        cells = [show(point[kind.place])]
        for split in point["splits"].values():
            values = split["interplay"]["sample"]["global"]
            cells += map(number, (split["loss"], split["accuracy"], values["mir"], values["hdr"]))
        table.add_row(*cells, *([(point["reused_report_id"] or "")[:_SHORT_ID]] if reused else []))
    return table


def _summary(report: Body, kind: Kind, show: Callable[[float | None], str]) -> Iterable[RenderableType]:
    """Render the summary of the points, one row per split, and its notes."""
    summary = report["summary"]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("split")
    for label in kind.summary.values():
        table.add_column(label, justify="right")
    for name, split in summary["splits"].items():
        cells = (
            show(split[key]) if key in kind.places_in_summary else _amount(split[key], show) for key in kind.summary
        )
        table.add_row(name, *cells)
    yield table
    notes = [note for name, split in summary["splits"].items() for note in _reasons(name, split["reasons"])]
    if kind is PATH:
        notes += _path_notes(summary)
    if came := summary.get("generalisation"):
        places = ", ".join(f"{name} {show(came[f'{name}_at'])}" for name in ("train", "test"))
        notes.append(f"Accuracy of 0.99 first at: {places}; delay {show(came['delay'])}.")
    notes.append("MIR and HDR: sample level, global centring.")
    yield Text("\n".join(notes), style="dim")


def _path_notes(summary: Body) -> Iterable[str]:
    yield f"Weights are {number(summary['l2_distance'])} apart, their cosine is {number(summary['cosine'])}."
    if summary["alignment"] is not None:
        groups = summary["alignment"]["n_groups"]
        yield f"Hidden units of the second were permuted to match the first, in {groups} groups."
    if summary["recalibrated_layers"] is not None:
        yield f"Normalisation statistics of {summary['recalibrated_layers']} layers were recomputed between the ends."
    if summary.get("resolution") is not None:
        yield f"The loss was sampled in steps of {number(summary['resolution'])}; narrower peaks may be missed."


def _amount(value: Any, show: Callable[[float | None], str]) -> str:
    match value:
        case {"value": amount, "at": at}:
            return f"{number(amount)} at {show(at)}"
        case bool():
            return "yes" if value else "no"
    return number(value)


def _measures(splits: Mapping[str, Body], next_tokens: Body | None) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("split")
    for name in splits:
        table.add_column(name, justify="right")
    counted = "positions" if next_tokens else "samples"
    table.add_row(counted, *(f"{split['n_samples']:,}" for split in splits.values()))
    if next_tokens:
        table.add_row("sequences", *(f"{next_tokens['n_sequences'][name]:,}" for name in splits))
    for key, label in _MEASURES:
        table.add_row(label, *(number(split[key]) for split in splits.values()))
    for key, label in _COLLAPSE:
        table.add_row(label, *(number(split["collapse"][key]) for split in splits.values()))
    return table


def _interplay(splits: Mapping[str, Body]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("split", "level", "centring"):
        table.add_column(column)
    for column in ("MIR", "optimum", "null", "z", "HDR", "optimum"):
        table.add_column(column, justify="right")
    for name, split in splits.items():
        for row, (level, centring) in enumerate(_LEVELS):
            values = split["interplay"][level][centring]
            optimum, null = values["optimum"], values["null"]
            table.add_row(
                name if row == 0 else "",
                level.replace("_", " "),
                centring,
                number(values["mir"]),
                number(optimum["mir"]) + ("" if optimum["reachable"] else " *"),
                f"{number(null['mean'])} ± {number(null['std'])}" if null else _UNDEFINED,
                number(values["mir_z"], 1),
                number(values["hdr"]),
                number(optimum["hdr"]),
                end_section=row == len(_LEVELS) - 1,
            )
    return table


def _notes(splits: Mapping[str, Body]) -> Iterable[str]:
    blocks = [(level, centring) for level, centring in _LEVELS]
    if not all(
        split["interplay"][level][centring]["optimum"]["reachable"]
        for split in splits.values()
        for level, centring in blocks
    ):
        yield "* cannot be reached: a frame of C vertices needs at least C - 1 features."
    for name, split in splits.items():
        yield from _reasons(name, split["reasons"])
        for level, centring in blocks:
            values = split["interplay"][level][centring]
            where = f"{name}, {level.replace('_', ' ')}, {centring}"
            yield from _reasons(where, values["reasons"], values)
            if (method := values["method"]) and method["error_estimate"] > _NOTICEABLE:
                error, kept = number(method["error_estimate"], 2), f"{method['kept']:,} of {method['total']:,}"
                yield f"{where}: MIR may be up to {error} higher; {kept} rows of its spectrum were coupled."
            for what in ("samples", "classes"):
                if values[f"degenerate_{what}"]:
                    yield f"{where}: {values[f'degenerate_{what}']} {what} without a direction were omitted."
        yield from _reasons(f"{name}, collapse", split["collapse"]["reasons"])
        if split["collapse"]["absent_classes"]:
            yield f"{name}, collapse: {split['collapse']['absent_classes']} classes have no samples and were omitted."


def _reasons(where: str, reasons: Body, values: Body | None = None) -> Iterable[str]:
    for key, reason in reasons.items():
        if reason == "two_classes" and (values or {}).get(key) is not None:
            yield f"{where}: {printable(key)} carries no information: two centred head rows are always opposite."
        else:
            yield f"{where}: {printable(key)} is undefined ({printable(reason)})."


def _raw(item: Body, column: str) -> Any:
    """Return the value of a column: a member, one of the metadata, or a metric."""
    if column.startswith("metadata."):
        return (item.get("metadata") or {}).get(column.removeprefix("metadata."))
    if column == "outcome":
        if item.get("problem"):
            problem = item["problem"]
            return ": ".join(filter(None, (problem.get("title"), problem.get("detail"))))
        return item.get("report_id") or item.get("resource_id")
    metrics = item.get("metrics") or {}
    if column in SHORT_METRICS:
        return next((value for path in paths_of(column) if (value := metrics.get(path)) is not None), None)
    return metrics[column] if column in metrics else item.get(column)


def _entry(item: Body, column: str, *, whole: bool) -> str:
    value = _raw(item, column)
    if column == "status" and value == "running" and item["progress"]["total"]:
        # A fetch counts bytes, which are long numbers.
        done, total = item["progress"]["done"], item["progress"]["total"]
        return f"running {done / total:.0%}" if "makes" in item else f"running {done}/{total}"
    is_id = column == "id" or column.endswith("_id") or (column == "outcome" and not item.get("problem"))
    if is_id and value is not None and not whole:
        return printable(value)[:_SHORT_ID]
    if isinstance(value, float):
        return number(value) if column in SHORT_METRICS or column in (item.get("metrics") or {}) else place(value)
    return _cell(column, value)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return _UNDEFINED
    match column:
        case "architecture":
            return _architecture(value)
        case "progress":
            return f"{value['done']}/{value['total']}"
        case "created_at" | "moved_at":
            return printable(value)[:16].replace("T", " ")
        case "size_bytes" | "n_parameters" | "n_samples":
            return f"{value:,}"
        case "input_shape":
            return " × ".join(map(str, value))
    return _inline(value)


def _architecture(description: Body) -> str:
    match description:
        case {"config": {"architectures": [str(name)]}}:  # a configuration is too long for a cell
            return printable(name)
    name = printable(description.get("name", description.get("family", "?")))
    return f"{name}({_pairs(description.get('args', {}))})"


def _pairs(values: Body) -> str:
    return ", ".join(f"{printable(key)}={_inline(value)}" for key, value in values.items())


def _inline(value: Any) -> str:
    match value:
        case {"loc": list(loc), "message": message, **rest} if not rest:  # one error of a request's validation
            return f"{printable('.'.join(map(str, loc)))}: {printable(message)}"
        case dict():
            return _pairs(value)
        case list():
            return f"[{', '.join(map(_inline, value))}]"
        case bool():
            return "true" if value else "false"
    return printable(value)

"""Reports for other tools: a long table as CSV or Parquet, and runs of MLflow.

The table has a row for each number of a report, and one for each number that is not defined, with its reason. What a
number is, is its path in the report, without the levels that are columns of their own:

    report_id, kind, name   the report, and what it looks at
    point, x                of a path, pruning or series: which point, from 0, and its w, sparsity or x
    split                   all, train, test; empty for what belongs to none
    path                    such as interplay.sample.global.mir or timings_seconds.features
    value                   a number; true is 1, false 0; empty (null) where it is not defined
    reason                  why it is not defined

In CSV a text that a spreadsheet would take for a formula has an apostrophe before it; Parquet has it as it is.
"""

import csv
import importlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from interplay.transport import InterplayError

# Members that say what was looked at and how, not what was found: parameters of a run.
_PARAMETERS = ("axis", "probe", "probe_b", "provenance", "subject", "subjects")
_IDENTITY = ("analysis_id", "created_at", "definitions_version", "id", "kind", "schema_version")
_PLACES = ("w", "sparsity", "x")
# What MLflow takes at once, and how long its names and values may be.
_BATCH_METRICS, _BATCH_PARAMS, _NAME_CHARACTERS, _VALUE_CHARACTERS = 1000, 100, 200, 5000
# A slash groups names, and MLflow refuses what would be another place, such as "a/../b": only splits are a group.
_OTHER_CHARACTERS = re.compile(r"[^\w\-. :]", re.ASCII)
# A spreadsheet takes a cell for a formula that begins so; the wide forms are what some of them read as the narrow ones.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_BLANK = ("\t", "\r", "\n")


class MissingExtra(InterplayError):
    """What an export needs is not installed; the message says how to install it."""


class ExportFailed(InterplayError):
    """The other side did not take the report."""


@dataclass(frozen=True)
class Row:
    """One number of a report; the module's docstring says what is in it."""

    report_id: str
    kind: str
    name: str
    point: int | None
    x: float | None
    split: str | None
    path: str
    value: float | None
    reason: str | None


class Run(NamedTuple):
    """A run of MLflow that holds a report."""

    run_id: str
    experiment_id: str
    n_metrics: int


def rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """Every number of a report, and every number that is not defined with its reason.

    Texts are left out, but for the report's identity, which every row has.
    """
    subjects = report.get("subjects") or [report.get("subject") or {}]
    names = dict.fromkeys(str(subject.get("name", "")) for subject in (subjects[0], subjects[-1]))
    whole = Row(str(report["id"]), str(report["kind"]), " to ".join(names), None, None, None, "", None, None)
    for key, value in report.items():
        if key == "points":
            for index, point in enumerate(value):
                place = next((float(point[name]) for name in _PLACES if name in point), None)
                yield from _numbers(point, replace(whole, point=index, x=place), [], {})
        elif key not in _IDENTITY:
            yield from _numbers({key: value}, whole, [], {})


def _numbers(value: Any, where: Row, path: list[str], reasons: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a value; `reasons` are those of all objects above, by the path from here, "" for all that is here."""
    match value:
        case Mapping():
            # What was looked at has members that its makers named, and `reason` is not ours there.
            ours = not path or path[0] not in _PARAMETERS
            reasons = {**reasons, **_reasons_in(value)} if ours else {}
            for key, member in value.items():
                if key == "splits" and isinstance(member, Mapping):
                    for split, entry in member.items():
                        told = _below(_below(reasons, key), split)
                        yield from _numbers(entry, replace(where, split=split), path, told)
                elif not (ours and key == "reasons"):
                    yield from _numbers(member, where, [*path, str(key)], _below(reasons, str(key)))
        case list():
            for index, member in enumerate(value):
                yield from _numbers(member, where, [*path, str(index)], _below(reasons, str(index)))
        case bool() | int() | float():
            yield replace(where, path=".".join(path), value=float(value))
        case None if "" in reasons:
            yield replace(where, path=".".join(path), reason=reasons[""])


def _reasons_in(value: Mapping[str, Any]) -> dict[str, str]:
    """Why members of an object are null: its `reasons` by their paths, or the one `reason` for all of them."""
    one = value.get("reason")
    # That of a difference says why it has no standard error. Where it has one the reason is of that, as `near_zero` is.
    alone = {"": str(one)} if one is not None and value.get("standard_error") is None else {}
    return {**alone, **{path: str(reason) for path, reason in value.get("reasons", {}).items()}}


def _below(reasons: Mapping[str, str], key: str) -> dict[str, str]:
    """Those that are of a member; one of the whole, as of a list, is of each member that has none of its own."""
    own = {path[len(key) + 1 :]: reason for path, reason in reasons.items() if f"{path}.".startswith(f"{key}.")}
    return {**{path: reason for path, reason in reasons.items() if not path}, **own}


def write_csv(report: Mapping[str, Any], path: Path) -> int:
    """Write the table as CSV with a header, UTF-8; returns the number of its rows.

    Names, splits, paths and reasons come from others: none of them is a formula where somebody opens the file.
    """
    found = [{name: _harmless(value) for name, value in asdict(row).items()} for row in rows(report)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(found)
    return len(found)


def _harmless(cell: float | str | None) -> float | str | None:
    """Return a text that no spreadsheet computes; numbers stay numbers, negative ones too."""
    if isinstance(cell, str) and (cell.startswith(_BLANK) or cell.lstrip().startswith(_FORMULA)):
        return f"'{cell}"
    return cell


def write_parquet(report: Mapping[str, Any], path: Path) -> int:
    """Write the table as Parquet; returns the number of its rows.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    pa = _imported("pyarrow", "export")
    parquet = _imported("pyarrow.parquet", "export")
    types = {"point": pa.int64(), "x": pa.float64(), "value": pa.float64()}
    schema = pa.schema([(field.name, types.get(field.name, pa.string())) for field in fields(Row)])
    table = pa.Table.from_pylist([asdict(row) for row in rows(report)], schema=schema)
    parquet.write_table(table, path)
    return int(table.num_rows)


def log_to_mlflow(
    report: Mapping[str, Any], uri: str, *, experiment: str = "interplay", run_name: str | None = None
) -> Run:
    """Log a report as a finished run of MLflow: metrics, parameters, tags, and the report itself as report.json.

    Metrics are called SPLIT/PATH, such as `test/interplay.sample.global.mir`, and PATH for what belongs to no split. A
    point is a step: its x where all are different whole numbers, as those of a series over epochs are, else its
    number, from 0; `w`, `sparsity` and `x` are metrics too. What is not defined is no metric: a tag `undefined/METRIC`
    has the reason. Characters that MLflow does not take become underscores.

    Args:
        report: of any kind.
        uri: of the tracking server, or what else MLflow takes, such as `databricks`.
        experiment: by name; made where there is none.
        run_name: default: the name of what the report looks at.

    Raises:
        MissingExtra: mlflow is not installed.
        ExportFailed: the server did not answer, or refused; a run that was begun is marked as failed.
    """
    mlflow = _imported("mlflow", "mlflow")
    found = [*rows(report)]
    begun = None
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment_id = _experiment_id(client, experiment, mlflow.exceptions.MlflowException)
        name = run_name or (found[0].name if found else str(report["id"]))
        identity = {f"interplay.{key}": str(report[key]) for key in _IDENTITY if key in report}
        begun = client.create_run(experiment_id, run_name=name, tags=identity).info.run_id
        n_metrics = _log(client, mlflow.entities, begun, report, found)
        client.log_text(begun, json.dumps(report, indent=1), "report.json")
        client.set_terminated(begun)
    except (mlflow.exceptions.MlflowException, OSError) as error:
        if begun is not None:
            _mark_failed(client, begun, mlflow.exceptions.MlflowException)
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportFailed(f"MLflow at {uri} did not take the report: {text}") from error
    return Run(begun, experiment_id, n_metrics)


def _experiment_id(client: Any, name: str, error: type[Exception]) -> str:
    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return str(client.create_experiment(name))
        except error:
            # Somebody else may have made it meanwhile, as jobs that run side by side do.
            known = client.get_experiment_by_name(name)
            if known is None:
                raise
    return str(known.experiment_id)


def _log(client: Any, entities: Any, run_id: str, report: Mapping[str, Any], found: list[Row]) -> int:
    now = int(time.time() * 1000)
    steps = _steps(found)
    metrics, undefined = [], {}
    for row in found:
        if row.path.split(".")[0] in _PARAMETERS:
            continue
        name = f"{row.split}/{_name(row.path)}" if row.split else _name(row.path)
        if row.value is None:
            undefined[f"undefined/{name}"] = str(row.reason)
        elif math.isfinite(row.value):
            metrics.append(entities.Metric(name, row.value, now, steps[row.point]))
    params = {_name(key): value for key, value in _parameters(report)}
    for batch in _batches(params.items(), _BATCH_PARAMS):
        client.log_batch(run_id, params=[entities.Param(key, value) for key, value in batch])
    for batch in _batches(undefined.items(), _BATCH_PARAMS):
        client.log_batch(run_id, tags=[entities.RunTag(key, value) for key, value in batch])
    for batch in _batches(metrics, _BATCH_METRICS):
        client.log_batch(run_id, metrics=batch)
    return len(metrics)


def _mark_failed(client: Any, run_id: str, error: type[Exception]) -> None:
    try:
        client.set_terminated(run_id, status="FAILED")
    except (error, OSError):
        return  # what went wrong before is what matters


def _steps(found: Iterable[Row]) -> dict[int | None, int]:
    """The step of each point; what belongs to no point is at 0."""
    places = {row.point: row.x for row in found if row.point is not None}
    values = [place for place in places.values() if place is not None]
    whole = len(values) == len(places) and all(value == int(value) and abs(value) < 2**53 for value in values)
    if whole and len({*values}) == len(values):
        return {None: 0, **{point: int(value) for point, value in zip(places, values, strict=True)}}
    return {None: 0, **{point: point for point in places}}


def _parameters(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was looked at, and how, as names and texts; lists, and descriptions of networks, are JSON."""

    def flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and not path.endswith((".architecture", ".grid")):
            for key, member in value.items():
                yield from flat(member, f"{path}.{key}")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            yield path, text[:_VALUE_CHARACTERS]

    for key in _PARAMETERS:
        if key == "subjects":
            ends = [*report.get(key, ())]
            for place, subject in ((0, ends[:1]), (len(ends) - 1, ends[1:][-1:])):
                yield from flat(dict(*subject), f"subjects.{place}")
        elif report.get(key) is not None:
            yield from flat(report[key], key)


def _name(name: str) -> str:
    return _OTHER_CHARACTERS.sub("_", name)[:_NAME_CHARACTERS]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        text = f"This needs more than the client ({error.name} is missing): pip install 'interplay[{extra}]'"
        raise MissingExtra(text) from error

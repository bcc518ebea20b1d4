"""Export reports to other tools: a long table as CSV or Parquet, and runs of MLflow.

The table has a row for each number of a report, and one for each undefined number, with its reason. A number is
identified by its path in the report, without the levels that are separate columns:

    report_id, kind, name   the report, and the name of its subjects
    point, x                of a path, pruning or series: index of the point, from 0, and its w, sparsity or x
    split                   all, train, test; empty for numbers outside any split
    path                    for example interplay.sample.global.mir or timings_seconds.features
    value                   a number; true is 1, false 0; empty (null) if undefined
    reason                  why it is undefined

In CSV an apostrophe precedes text that a spreadsheet would read as a formula; Parquet has the text unchanged.
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
from typing import Any, NamedTuple, TextIO

from interplay.kinds import KINDS
from interplay.transport import InterplayError

# Members that describe the inputs and the method, not the results: parameters of a run.
_PARAMETERS = ("axis", "probe", "probe_b", "provenance", "subject", "subjects")
# Thousands of numbers where there are many classes: a run has them in its report.json, and no metric of each.
_BY_CLASS = ("by_class", "reliability")
_IDENTITY = ("analysis_id", "created_at", "definitions_version", "id", "kind", "schema_version")
_PLACES = tuple(kind.place for kind in KINDS.values() if kind.place is not None)
# MLflow's limits for one batch, and for the length of names and values.
_BATCH_METRICS, _BATCH_PARAMS, _NAME_CHARACTERS, _VALUE_CHARACTERS = 1000, 100, 200, 5000
# A slash groups names, and MLflow refuses names that resolve to another path, such as "a/../b": only splits are groups.
_OTHER_CHARACTERS = re.compile(r"[^\w\-. :]", re.ASCII)
# A spreadsheet reads a cell that begins with these as a formula; some read the wide forms as the narrow ones.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_BLANK = ("\t", "\r", "\n")


class MissingExtra(InterplayError):
    """A package that an export needs is not installed; the message says how to install it."""


class ExportFailed(InterplayError):
    """The target of the export did not accept the report."""


@dataclass(frozen=True)
class Row:
    """One number of a report; the module's docstring describes the columns."""

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
    """Yield every number of a report, and every undefined number with its reason.

    Texts are omitted, except the report's identity, which every row has.
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


def write_csv(report: Mapping[str, Any], path: Path) -> int:
    """Write the table as CSV with a header, UTF-8; return the number of its rows.

    Names, splits, paths and reasons are untrusted: none of them becomes a formula when the file is opened.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        return to_csv(report, file)


def to_csv(report: Mapping[str, Any], file: TextIO) -> int:
    """Write the table as `write_csv` does, to an open file."""
    found = [{name: _harmless(value) for name, value in asdict(row).items()} for row in rows(report)]
    writer = csv.DictWriter(file, [field.name for field in fields(Row)])
    writer.writeheader()
    writer.writerows(found)
    return len(found)


def write_parquet(report: Mapping[str, Any], path: Path) -> int:
    """Write the table as Parquet; return the number of its rows.

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

    Metrics are named SPLIT/PATH, such as `test/interplay.sample.global.mir`, or PATH outside any split. A point is a
    step: its x if all x are different whole numbers, as in a series over epochs, else its index, from 0; `w`,
    `sparsity` and `x` are metrics too. An undefined number is no metric: a tag `undefined/METRIC` has the reason.
    Characters that MLflow does not accept become underscores.

    Args:
        report: of any kind.
        uri: of the tracking server, or another value that MLflow accepts, such as `databricks`.
        experiment: its name; created if missing.
        run_name: default: the name of the report's subjects.

    Raises:
        MissingExtra: mlflow is not installed.
        ExportFailed: the server did not respond, or refused; a run that was begun is marked as failed.
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
        raise ExportFailed(f"MLflow at {uri} did not accept the report: {text}") from error
    return Run(begun, experiment_id, n_metrics)


def _numbers(value: Any, where: Row, path: list[str], reasons: Mapping[str, str]) -> Iterator[Row]:
    """Yield the rows of a value; `reasons` come from all objects above, by path from here, "" for the whole value."""
    match value:
        case Mapping():
            # Parameters have members named by users, so `reason` has no special meaning there.
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
    """Return why members of an object are null: its `reasons` by their paths, or the one `reason` for all."""
    one = value.get("reason")
    # The `reason` of a difference says why it has no standard error. If it has one, the reason, such as `near_zero`,
    # is about that standard error.
    alone = {"": str(one)} if one is not None and value.get("standard_error") is None else {}
    return {**alone, **{path: str(reason) for path, reason in value.get("reasons", {}).items()}}


def _below(reasons: Mapping[str, str], key: str) -> dict[str, str]:
    """Return the reasons of a member; a reason of the whole, such as a list, holds for members without their own."""
    own = {path[len(key) + 1 :]: reason for path, reason in reasons.items() if f"{path}.".startswith(f"{key}.")}
    return {**{path: reason for path, reason in reasons.items() if not path}, **own}


def _harmless(cell: float | str | None) -> float | str | None:
    """Return text escaped so that no spreadsheet computes it; numbers stay numbers, negative ones too."""
    if isinstance(cell, str) and (cell.startswith(_BLANK) or cell.lstrip().startswith(_FORMULA)):
        return f"'{cell}"
    return cell


def _experiment_id(client: Any, name: str, error: type[Exception]) -> str:
    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return str(client.create_experiment(name))
        except error:
            # A concurrent job may have created it meanwhile.
            known = client.get_experiment_by_name(name)
            if known is None:
                raise
    return str(known.experiment_id)


def _log(client: Any, entities: Any, run_id: str, report: Mapping[str, Any], found: list[Row]) -> int:
    now = int(time.time() * 1000)
    steps = _steps(found)
    metrics, undefined = [], {}
    for row in found:
        if row.path.split(".")[0] in (*_PARAMETERS, *_BY_CLASS):
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
        return  # the original error is the one to report


def _steps(found: Iterable[Row]) -> dict[int | None, int]:
    """Return the step of each point; numbers outside any point are at step 0."""
    places = {row.point: row.x for row in found if row.point is not None}
    values = [place for place in places.values() if place is not None]
    whole = len(values) == len(places) and all(value == int(value) and abs(value) < 2**53 for value in values)
    if whole and len({*values}) == len(values):
        return {None: 0, **{point: int(value) for point, value in zip(places, values, strict=True)}}
    return {None: 0, **{point: point for point in places}}


def _parameters(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a run's parameters as names and texts; lists, networks' descriptions, grids and patterns are JSON."""

    def flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
        """Yield the members of a value by their dotted paths."""
        if isinstance(value, Mapping) and not path.endswith((".architecture", ".grid", "_pattern")):
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

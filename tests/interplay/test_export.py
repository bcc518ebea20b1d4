"""Exports of reports: the long table, and runs of a real MLflow server."""

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
import pytest

from interplay import Client, export
from tests.interplay.command.running import interplay
from tests.interplay.command.test_command import ID
from tests.interplay.reports import comparison_report, difference, evaluation_report, series_report
from tests.interplay.scripted import answer, scripted
from tests.interplay.test_client import closed_port
from tests.mlflow import mlflow_server
from tests.services import Service

if TYPE_CHECKING:
    from mlflow import MlflowClient


def client_of(url: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a tracking server."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture(scope="module")
def reports(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> dict[str, Any]:
    """Return real reports of a path and of a series."""
    with Client(service.url) as client:
        first, second = (client.push_checkpoint(mlp_checkpoint_file, name=name)["id"] for name in ("a", "b"))
        probe = client.push_probe(digits_probe_file, name="digits", preprocess={"scale": 1 / 16})["id"]
        options = {"null_permutations": 2}
        queued = {
            "path": client.create_path(first, second, probe_id=probe, options={**options, "grid": {"points": 3}}),
            "series": client.create_series("epoch", {10: first, 20: second}, probe_id=probe, options=options),
        }
        return {kind: client.get_report(client.wait(analysis["id"])["report_id"]) for kind, analysis in queued.items()}


def dotted(report: Any, path: str) -> Any:
    """Return the value at a path of a report."""
    for key in path.split("."):
        report = report[int(key)] if isinstance(report, list) else report[key]
    return report


def numbers(value: Any) -> int:
    """Return the number of numbers and booleans in a JSON value."""
    if isinstance(value, dict | list):
        return sum(map(numbers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float)


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_number_is_a_row() -> None:
    """Each number of an evaluation has one row under its path; an undefined one has its reason."""
    report = evaluation_report()
    rows = [*export.rows(report)]
    assert sum(row.value is not None for row in rows) == numbers(report)
    assert max(Counter((row.split, row.path) for row in rows).values()) == 1
    for row in rows:
        place = report["splits"][row.split] if row.split else report
        found = dotted(place, row.path)
        assert (row.value, row.reason is None) == (found, found is not None)
        assert (row.report_id, row.kind, row.name, row.point) == (report["id"], "evaluation", "digits, epoch 10", None)
    undefined = {(row.split, row.path): row.reason for row in rows if row.value is None}
    assert undefined["all", "interplay.sample.none.mir"] == "zero_entropy"
    assert undefined["all", "collapse.nc3"] == "head_is_zero"
    epoch = next(row for row in rows if row.path == "subject.metadata.epoch")
    assert (epoch.value, epoch.split) == (10, None)


def undefined(report: dict[str, Any]) -> dict[tuple[str | None, str], str | None]:
    """Return the reason of each row without a value, by split and path."""
    return {(row.split, row.path): row.reason for row in export.rows(report) if row.value is None}


def test_reasons_of_objects_above() -> None:
    """A dotted key refers to a nested member, and the nearest object's reason takes precedence."""
    report = evaluation_report()
    split = report["splits"]["all"]
    entry = split["interplay"]["sample"]["none"]
    entry["distance_to_optimum"] = {"mir": None, "hdr": None}
    entry["optimum"] = {"mir": None, "hdr": 0.0, "reachable": True}
    entry["reasons"] |= {"distance_to_optimum.mir": "zero_entropy", "optimum.mir": "near"}
    split["reasons"] |= {"interplay.sample.none.optimum.mir": "far", "interplay.sample.none.mir_z": "not_requested"}
    found = undefined(report)
    place = "interplay.sample.none"
    assert found["all", f"{place}.distance_to_optimum.mir"] == "zero_entropy"
    assert ("all", f"{place}.distance_to_optimum.hdr") not in found
    assert found["all", f"{place}.optimum.mir"] == "near"
    assert found["all", f"{place}.mir_z"] == "not_requested"


def test_reasons_of_lists() -> None:
    """A reason of a list holds for each null entry without its own reason."""
    report = series_report([1, 2])
    split = report["summary"]["splits"]["all"]
    assert ("all", "summary.mir_distance.0") not in undefined(report)
    split["reasons"]["mir_distance"] = "undefined_points"
    assert undefined(report)["all", "summary.mir_distance.0"] == "undefined_points"
    assert ("all", "summary.mir_distance.1") not in undefined(report)
    split["reasons"]["mir_distance.0"] = "zero_entropy"
    assert undefined(report)["all", "summary.mir_distance.0"] == "zero_entropy"


def test_reasons_of_differences() -> None:
    """The reason of a difference is about its standard error; a difference that has one is not undefined."""
    differences = {
        "accuracy": difference(0.9, 0.95, 0.01),
        "interplay.sample.global.mir": difference(None, 0.5, None, reason="undefined"),
        "interplay.sample.global.mir_z": difference(50.0, 61.0, None, reason="no_standard_error"),
        "interplay.sample.global.hdr": difference(0.01, 0.02, 0.01, reason="near_zero"),
    }
    report = comparison_report(differences)
    report["splits"]["test"]["predictions"] |= {"smallest_difference": None, "reason": "too_few_disagreements"}
    found = {path: reason for (split, path), reason in undefined(report).items() if split == "test"}
    for member in ("a", "difference", "standard_error", "low", "high", "significant"):
        assert found[f"differences.interplay.sample.global.mir.{member}"] == "undefined"
    z = "differences.interplay.sample.global.mir_z"
    assert found[f"{z}.low"] == "no_standard_error"
    assert f"{z}.difference" not in found
    assert found["predictions.smallest_difference"] == "too_few_disagreements"
    assert not [path for path in found if path.startswith(("differences.accuracy", f"{z.removesuffix('mir_z')}hdr"))]


def test_names_that_mean_something_elsewhere() -> None:
    """Metadata may have members `reason` and `reasons`, without a special meaning."""
    report = evaluation_report()
    report["subject"]["metadata"] = {"reason": "retrained", "reasons": 3, "note": None}
    rows = {row.path: row.value for row in export.rows(report)}
    assert rows["subject.metadata.reasons"] == 3
    assert "subject.metadata.note" not in rows


@pytest.mark.parametrize("kind", ["path", "series"])
def test_points_are_columns(reports: dict[str, Any], kind: str) -> None:
    """Each point's numbers have its place; those of a summary have only the split."""
    report = reports[kind]
    rows = [*export.rows(report)]
    assert sum(row.value is not None for row in rows) == numbers(report)
    places = {row.point: row.x for row in rows if row.point is not None}
    assert places == {"path": {0: 0, 1: 0.5, 2: 1}, "series": {0: 10, 1: 20}}[kind]
    for point, values in enumerate(report["points"]):
        (accuracy,) = [row for row in rows if (row.point, row.split, row.path) == (point, "test", "accuracy")]
        assert accuracy.value == values["splits"]["test"]["accuracy"]
    if kind == "path":
        (barrier,) = [row for row in rows if (row.split, row.path) == ("test", "summary.loss_barrier.value")]
        assert barrier.value == report["summary"]["splits"]["test"]["loss_barrier"]["value"]
        assert barrier.point is None
    assert {row.name for row in rows} == {"a to b"}


def test_csv_and_parquet_are_the_same_table(tmp_path: Path) -> None:
    """Both have the rows of `rows`; an undefined value is an empty field or null."""
    report = evaluation_report()
    rows = [*export.rows(report)]
    with scripted(answer(report)) as server:
        places = ("--csv", tmp_path / "r.csv", "--parquet", tmp_path / "r.parquet")
        ran = interplay("export", ID, *places, "--json", url=server.url)
    assert (ran.returncode, ran.stderr) == (0, "")
    said = json.loads(ran.stdout)
    assert said["csv"]["rows"] == said["parquet"]["rows"] == len(rows)
    table = pyarrow.parquet.read_table(tmp_path / "r.parquet")
    assert [export.Row(**entry) for entry in table.to_pylist()] == rows
    assert str(table.schema.field("value").type) == "double"
    with (tmp_path / "r.csv").open(newline="") as file:
        listed = [*csv.DictReader(file)]
    assert [entry["path"] for entry in listed] == [row.path for row in rows]
    for entry, row in zip(listed, rows, strict=True):
        assert (float(entry["value"]) if entry["value"] else None) == row.value
        assert (entry["reason"] or None) == row.reason


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(1)", "\t=1", "\r=1", "  =1+1", "＝1+1"], ids=repr
)
def test_texts_are_no_formulas(tmp_path: Path, name: str) -> None:
    """A text that a spreadsheet would compute gets an apostrophe in CSV; numbers and Parquet are unchanged."""
    report = evaluation_report()
    report["subject"] |= {"name": name, "metadata": {"=1+1": -2.5}}
    report["splits"]["all"]["reasons"] = {"loss": "-1+1|reason"}
    report["splits"]["all"]["loss"] = None
    export.write_csv(report, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        listed = [*csv.DictReader(file)]
    assert {entry["name"] for entry in listed} == {f"'{name}"}
    assert "-2.5" in {entry["value"] for entry in listed}
    assert "'-1+1|reason" in {entry["reason"] for entry in listed}
    for entry in listed:
        assert not any(
            str(cell).strip().startswith(("=", "+", "@", "-")) for key, cell in entry.items() if key != "value"
        )
    export.write_parquet(report, tmp_path / "r.parquet")
    assert {entry["name"] for entry in pyarrow.parquet.read_table(tmp_path / "r.parquet").to_pylist()} == {name}


# --- MLflow ---------------------------------------------------------------------------------------------------------


def test_evaluation_as_a_run(mlflow: str, tmp_path: Path) -> None:
    """A finished run has numbers as metrics, reasons as tags, inputs as parameters, and the report."""
    report = evaluation_report()
    with scripted(answer(report)) as server:
        arguments = ("--mlflow", mlflow, "--experiment", "digits", "--run-name", "mine")
        ran = interplay("export", ID, *arguments, "--json", url=server.url)
        again = interplay("export", ID, *arguments, url=server.url)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)["mlflow"]
    assert again.stdout.startswith("MLflow run ")
    client = client_of(mlflow)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    assert experiment.experiment_id == said["experiment_id"]
    run = client.get_run(said["run_id"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert run.data.metrics["all/interplay.sample.global.mir"] == 0.8123
    assert run.data.metrics["all/class_counts.9"] == 180
    assert run.data.metrics["timings_seconds.spectrum"] == 1.0
    assert len(run.data.metrics) == said["n_metrics"]
    assert "all/collapse.nc3" not in run.data.metrics
    assert run.data.tags["undefined/all/collapse.nc3"] == "head_is_zero"
    assert run.data.tags["interplay.id"] == report["id"]
    assert run.data.params["subject.metadata.epoch"] == "10"
    assert json.loads(run.data.params["subject.architecture"]) == report["subject"]["architecture"]
    assert run.data.params["provenance.torch_version"] == "2.13.0"
    written = client.download_artifacts(said["run_id"], "report.json", str(tmp_path))
    assert json.loads(Path(written).read_text()) == report


@pytest.mark.slow
def test_points_are_steps(mlflow: str, reports: dict[str, Any]) -> None:
    """A series over whole epochs uses them as steps, a path the index of its points; places are metrics too."""
    client = client_of(mlflow)
    for kind, place, steps in (("path", "w", [0, 1, 2]), ("series", "x", [10, 20])):
        report = reports[kind]
        run = export.log_to_mlflow(report, mlflow)
        history = sorted(client.get_metric_history(run.run_id, "test/accuracy"), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == steps
        assert [metric.value for metric in history] == [
            point["splits"]["test"]["accuracy"] for point in report["points"]
        ]
        places = sorted(client.get_metric_history(run.run_id, place), key=lambda metric: metric.step)
        assert [metric.value for metric in places] == [point[place] for point in report["points"]]
        assert client.get_run(run.run_id).info.run_name == "a to b"
    assert client.get_experiment_by_name("interplay") is not None


@pytest.mark.slow
def test_names_that_mlflow_does_not_take(mlflow: str) -> None:
    """Metadata with keys that MLflow refuses or texts that are too long does not prevent an export."""
    report = evaluation_report()
    report["subject"]["metadata"] = {"learning rate (%)": 1, "größe": "x" * 10_000, "a/../b": 2}
    run = export.log_to_mlflow(report, mlflow)
    params = client_of(mlflow).get_run(run.run_id).data.params
    assert params["subject.metadata.learning rate ___"] == "1"
    assert len(params["subject.metadata.gr__e"]) == 5000


@pytest.mark.slow
def test_run_that_could_not_be_completed_is_marked(mlflow: str) -> None:
    """A run whose artifacts cannot be stored is marked as failed."""
    client = client_of(mlflow)
    experiment = client.create_experiment("broken", artifact_location="file:///dev/null/nowhere")
    with pytest.raises(export.ExportFailed, match="did not accept"):
        export.log_to_mlflow(evaluation_report(), mlflow, experiment="broken")
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_mlflow_that_does_not_listen_is_3() -> None:
    """Without a tracking server the command gives a message and exits with 3."""
    with scripted(answer(evaluation_report())) as server:
        nobody = f"http://127.0.0.1:{closed_port()}"
        ran = interplay("export", ID, "--mlflow", nobody, url=server.url, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert f"MLflow at {nobody} did not accept the report" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("option", "package", "extra"), [("--mlflow", "mlflow", "mlflow"), ("--parquet", "pyarrow", "export")]
)
def test_missing_extra_is_2(tmp_path: Path, option: str, package: str, extra: str) -> None:
    """Without its package an option says what to install."""
    script = f"import sys; sys.modules[{package!r}] = None; from interplay.command.main import main; main()"
    with scripted(answer(evaluation_report())) as server:
        command = [sys.executable, "-c", script, "export", ID, option, str(tmp_path / "x"), "--url", server.url]
        ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"pip install 'interplay[{extra}]'" in ran.stderr


def test_nowhere_to_go_is_2(tmp_path: Path) -> None:
    """An export needs a target, and a file that can be written."""
    with scripted(answer(evaluation_report())) as server:
        ran = interplay("export", ID, url=server.url)
        assert ran.returncode == 2
        assert "--parquet" in ran.stderr
        assert not server.seen
        ran = interplay("export", ID, "--csv", tmp_path / "no" / "such" / "folder.csv", url=server.url)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert "cannot be written" in ran.stderr

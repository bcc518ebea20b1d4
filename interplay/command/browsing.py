"""`interplay show`, `export`, `list`, `cancel` and `delete`: the resources of the service."""

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators

from interplay import export
from interplay.command import rendering
from interplay.command.options import COMMON, EXIT_UNREACHABLE, EXIT_USAGE, Common, fail
from interplay.command.values import UsageError, instant, pair, whole

Listed = Literal["checkpoints", "probes", "feature-sets", "analyses", "reports", "gates"]
Deletable = Literal["checkpoints", "probes", "feature-sets"]
Written = Annotated[Path | None, Parameter(metavar="FILE", validator=validators.Path(dir_okay=False))]
Id = Annotated[str | None, Parameter(metavar="ID")]
Instant = Annotated[datetime | None, Parameter(metavar="TIME", converter=instant)]


def show(
    report: str,
    /,
    *,
    chart: Written = None,
    chart_name: Annotated[str, Parameter(metavar="NAME", show_default=True)] = "overview",
    common: Common = COMMON,
) -> None:
    """Show a report, or write a chart of it to a file.

    Args:
        report: Id of the report.
        chart: Write a chart to this file: .svg, .png, or .json for Vega-Lite.
        chart_name: Name of the chart, such as loss or mir.
    """
    if chart is not None:
        _write_chart(report, chart, chart_name, common)
        return
    with common.client() as client:
        body = client.get_report(report)
    common.print(body, None if common.as_json else rendering.report_view(body))


def export_report(
    report: str,
    /,
    *,
    mlflow: Annotated[str | None, Parameter(metavar="URI")] = None,
    experiment: Annotated[str, Parameter(metavar="NAME", show_default=True)] = "interplay",
    run_name: Annotated[str | None, Parameter(metavar="NAME")] = None,
    csv: Written = None,
    parquet: Written = None,
    common: Common = COMMON,
) -> None:
    """Export a report to other tools: MLflow, CSV, Parquet. docs/report.md describes the content.

    Args:
        report: Id of the report.
        mlflow: Log a run to this MLflow tracking server.
        experiment: Experiment of MLflow; it is created if it is missing.
        run_name: Name of the run. Default: the name of the report's subjects.
        csv: Write a row for each number, as CSV.
        parquet: Write the same rows as Parquet.
    """
    if mlflow is None and csv is None and parquet is None:
        raise UsageError("Give one or more of --mlflow, --csv and --parquet.")
    # MLflow reports each run to its makers and on stdout, and retries for minutes if no server listens.
    for name, value in (
        ("DISABLE_TELEMETRY", "1"),
        ("SUPPRESS_PRINTING_URL_TO_STDOUT", "1"),
        ("HTTP_REQUEST_MAX_RETRIES", "3"),
    ):
        os.environ.setdefault(f"MLFLOW_{name}", value)
    with common.client() as client:
        body = client.get_report(report)
    done: dict[str, Any] = {"report_id": body["id"]}
    try:
        if csv is not None:
            done["csv"] = {"file": str(csv), "rows": export.write_csv(body, csv)}
        if parquet is not None:
            done["parquet"] = {"file": str(parquet), "rows": export.write_parquet(body, parquet)}
        if mlflow is not None:
            run = export.log_to_mlflow(body, mlflow, experiment=experiment, run_name=run_name)
            done["mlflow"] = run._asdict()
    except export.MissingExtra as error:
        fail(EXIT_USAGE, "Not installed", str(error), {})
    except export.ExportFailed as error:
        fail(EXIT_UNREACHABLE, str(error), "", {})
    except OSError as error:
        fail(EXIT_USAGE, "A file cannot be written", str(error), {})
    common.print(done, rendering.export_text(done))


def list_collection(
    collection: Listed,
    /,
    *,
    name: str | None = None,
    status: str | None = None,
    kind: str | None = None,
    checkpoint: Id = None,
    probe: Id = None,
    features: Id = None,
    metadata: Annotated[list[str] | None, Parameter("--metadata", metavar="KEY=VALUE")] = None,
    after: Instant = None,
    before: Instant = None,
    limit: Annotated[int, Parameter(converter=whole, validator=validators.Number(gte=1), show_default=True)] = 50,
    everything: Annotated[bool, Parameter("--all")] = False,
    common: Common = COMMON,
) -> None:
    """List a collection, newest first.

    Args:
        collection: The collection.
        name: Exactly this name.
        status: Status of an analysis: queued, running, succeeded, failed or cancelled.
        kind: Kind of the analysis or report, such as evaluation.
        checkpoint: Analyses or reports of this checkpoint.
        probe: Analyses or reports on this probe.
        features: Analyses or reports of this feature set.
        metadata: With this metadata; may be repeated.
        after: Created at or after this time, such as 2026-01-31 or 2026-01-31T12:00Z.
        before: Created before this time; without a zone it is local time.
        limit: Largest number of resources.
        everything: List all, regardless of --limit.
    """
    of_subject = {"kind": kind, "checkpoint": checkpoint, "probe": probe, "features": features}
    inapplicable: dict[str, dict[str, str | None]] = {"analyses": {}, "reports": {"status": status}}
    for option, value in inapplicable.get(collection, {"status": status, **of_subject}).items():
        if value is not None:
            raise UsageError(f"does not apply to {collection}", f"--{option}")
    wanted: dict[str, list[str]] = {}
    for key, text in map(pair, metadata or []):
        wanted.setdefault(key, []).append(text)
    with common.client() as client:
        listed = client.list(
            collection,
            limit=None if everything else limit,
            metadata=wanted,
            name=name,
            status=status,
            kind=kind,
            checkpoint_id=checkpoint,
            probe_id=probe,
            feature_set_id=features,
            created_after=after,
            created_before=before,
        )
        items = [*listed]
    common.print(items, rendering.collection_view(collection, items))


def cancel(analysis: str, /, *, common: Common = COMMON) -> None:
    """Cancel an analysis; it stops at its next step.

    Args:
        analysis: Id of the analysis.
    """
    with common.client() as client:
        body = client.cancel(analysis)
    common.print(body, f"analysis {body['id']}, {body['status']}")


def delete(collection: Deletable, resource: Annotated[str, Parameter("ID")], /, *, common: Common = COMMON) -> None:
    """Delete a checkpoint, probe or feature set that no analysis needs.

    Args:
        collection: The collection.
        resource: Id of the resource.
    """
    with common.client() as client:
        client.delete(collection, resource)
    common.print({"id": resource, "deleted": True}, f"deleted {rendering.printable(resource)}")


def _write_chart(report: str, file: Path, name: str, common: Common) -> None:
    format = file.suffix.removeprefix(".").lower()
    if format not in ("svg", "png", "json"):
        raise UsageError("must end in .svg, .png or .json", "--chart")
    with common.client() as client:
        picture = client.get_chart(report, name, format=format)
    try:
        file.write_bytes(picture)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", "--chart") from None
    common.print({"file": str(file), "bytes": len(picture)}, f"{file}, {len(picture):,} bytes")

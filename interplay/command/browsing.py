"""`interplay show`, `export`, `list`, `cancel` and `delete`: the resources of the service."""

import enum
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from interplay import export
from interplay.command import rendering
from interplay.command.options import (
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    Url,
    fail,
    open_client,
    pair,
    print_body,
)

commands = typer.Typer()


class Listed(enum.StrEnum):
    """The collections that `list` can list."""

    CHECKPOINTS = "checkpoints"
    PROBES = "probes"
    FEATURE_SETS = "feature-sets"
    ANALYSES = "analyses"
    REPORTS = "reports"
    GATES = "gates"


class Deletable(enum.StrEnum):
    """The collections that `delete` can delete from."""

    CHECKPOINTS = "checkpoints"
    PROBES = "probes"
    FEATURE_SETS = "feature-sets"


def _instant(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a time such as 2026-01-31T12:00") from None


@commands.command()
def show(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="A report's id.", show_default=False)],
    chart: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Write a picture: .svg, .png, or .json for Vega-Lite."),
    ] = None,
    chart_name: Annotated[str, typer.Option(metavar="NAME", help="Which picture, such as loss or mir.")] = "overview",
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a report, or write a picture of it."""
    if chart is not None:
        format = chart.suffix.removeprefix(".").lower()
        if format not in ("svg", "png", "json"):
            raise typer.BadParameter("ends in .svg, .png or .json", param_hint="--chart")
        with open_client(url, api_key) as client:
            picture = client.get_chart(report, chart_name, format=format)
        try:
            chart.write_bytes(picture)
        except OSError as error:
            raise typer.BadParameter(f"cannot be written: {error.strerror}", param_hint="--chart") from None
        print_body({"file": str(chart), "bytes": len(picture)}, as_json, f"{chart}, {len(picture):,} bytes")
        return
    with open_client(url, api_key) as client:
        body = client.get_report(report)
    print_body(body, as_json, None if as_json else rendering.report_view(body))


@commands.command("export")
def export_report(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="A report's id.", show_default=False)],
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Log a run to this MLflow tracking server.")] = None,
    experiment: Annotated[str, typer.Option(metavar="NAME", help="Of MLflow; made where there is none.")] = "interplay",
    run_name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: what the report looks at.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write a row for each number, as CSV.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", dir_okay=False, help="The same as Parquet.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Hand a report to other tools: MLflow, CSV, Parquet. docs/report.md says what is in them."""
    if mlflow is None and csv is None and parquet is None:
        raise typer.BadParameter("Give one or more of --mlflow, --csv and --parquet.")
    # MLflow reports each run to its makers and on stdout, and retries for minutes if no server listens.
    for name, value in (
        ("DISABLE_TELEMETRY", "1"),
        ("SUPPRESS_PRINTING_URL_TO_STDOUT", "1"),
        ("HTTP_REQUEST_MAX_RETRIES", "3"),
    ):
        os.environ.setdefault(f"MLFLOW_{name}", value)
    with open_client(url, api_key) as client:
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
    print_body(done, as_json, rendering.export_text(done))


@commands.command("list")
def list_collection(
    collection: Annotated[Listed, typer.Argument(show_default=False)],
    name: Annotated[str | None, typer.Option(help="Exactly this name.")] = None,
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    kind: Annotated[str | None, typer.Option(help="Such as evaluation.")] = None,
    checkpoint: Annotated[str | None, typer.Option(metavar="ID", help="Of this checkpoint.")] = None,
    probe: Annotated[str | None, typer.Option(metavar="ID", help="On this probe.")] = None,
    features: Annotated[str | None, typer.Option(metavar="ID", help="Of this feature set.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Has this metadata; may be repeated.")
    ] = None,
    after: Annotated[
        datetime | None,
        typer.Option(
            metavar="TIME", parser=_instant, help="Created at or after, such as 2026-01-31 or 2026-01-31T12:00Z."
        ),
    ] = None,
    before: Annotated[
        datetime | None,
        typer.Option(metavar="TIME", parser=_instant, help="Created before; local time without a zone."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    everything: Annotated[bool, typer.Option("--all", help="All of them, whatever --limit says.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List a collection, newest first."""
    of_subject = {"kind": kind, "checkpoint": checkpoint, "probe": probe, "features": features}
    refused = {Listed.ANALYSES: {}, Listed.REPORTS: {"status": status}}.get(
        collection, {"status": status, **of_subject}
    )
    for option, value in refused.items():
        if value is not None:
            raise typer.BadParameter(f"{collection.value} are not filtered by it", param_hint=f"--{option}")
    wanted: dict[str, list[str]] = {}
    for key, text in map(pair, metadata or []):
        wanted.setdefault(key, []).append(text)
    with open_client(url, api_key) as client:
        listed = client.list(
            collection.value,
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
    print_body(items, as_json, rendering.collection_view(collection.value, items))


@commands.command()
def cancel(
    analysis: Annotated[str, typer.Argument(metavar="ANALYSIS", help="An analysis' id.", show_default=False)],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Stop an analysis at its next step."""
    with open_client(url, api_key) as client:
        body = client.cancel(analysis)
    print_body(body, as_json, f"analysis {body['id']}, {body['status']}")


@commands.command()
def delete(
    collection: Annotated[Deletable, typer.Argument(show_default=False)],
    resource: Annotated[str, typer.Argument(metavar="ID", show_default=False)],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete a checkpoint, probe or feature set that no analysis needs."""
    with open_client(url, api_key) as client:
        client.delete(collection.value, resource)
    print_body({"id": resource, "deleted": True}, as_json, f"deleted {rendering.printable(resource)}")

"""`interplay show`, `open`, `export`, `list`, `download`, `cancel` and `delete`: the resources of the service."""

import os
import re
import webbrowser
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from cyclopts import Parameter, Token, validators

from interplay import export
from interplay.calls.collections import Collection, is_id, noun_of
from interplay.client import Client, ProblemError
from interplay.command import rendering
from interplay.command.fetching import fetch_view
from interplay.command.naming import Named, NamedOption, found_by, given_name, id_of, require_name, run_of
from interplay.command.options import COMMON, EXIT_UNREACHABLE, EXIT_USAGE, Common, fail, note
from interplay.command.values import UsageError, instant, values_by_key, whole

Listed = Literal["checkpoints", "probes", "feature-sets", "fetches", "analyses", "reports", "gates"]
Stored = Literal["checkpoints", "probes", "feature-sets"]
Deletable = Literal["checkpoints", "probes", "feature-sets", "analyses", "reports", "gates", "baselines"]
Written = Annotated[Path | None, Parameter(metavar="FILE", validator=validators.Path(dir_okay=False))]
Instant = Annotated[datetime | None, Parameter(metavar="TIME", converter=instant)]
# Where a name is looked for if it may be anything's, the likeliest first.
_ANYWHERE: tuple[Collection, ...] = (
    "reports",
    "analyses",
    "checkpoints",
    "probes",
    "feature-sets",
    "gates",
    "fetches",
)
# A bound of a metric; the service refuses what has another form.
_BOUND = re.compile(r"([^\s<>=]+)\s*([<>].*)", re.DOTALL)
_SUFFIXES = {"npz": ".npz", "parquet": ".parquet", "imagefolder": ".zip", "csv": ".csv", "jsonl": ".jsonl"}


def _collection(_type: Any, tokens: Sequence[Token]) -> Any:
    """Convert the name of a collection, also in the singular, and `features` as `push` has it."""
    text = tokens[0].value
    singular = {"analysis": "analyses", "fetch": "fetches", "features": "feature-sets"}
    name = singular.get(text, text if text.endswith("s") else f"{text}s")
    choices: tuple[str, ...] = getattr(_type, "__args__", ())
    if name not in choices:
        raise ValueError(f"{text!r} is no collection here. Choose from {', '.join(choices)}")
    return name


ListedCollection = Annotated[Listed, Parameter(converter=_collection)]
StoredCollection = Annotated[Stored, Parameter(converter=_collection)]
DeletableCollection = Annotated[Deletable, Parameter(converter=_collection)]


def show(
    report: Named,
    /,
    *,
    chart: Written = None,
    chart_name: Annotated[str, Parameter(metavar="NAME", show_default=True)] = "overview",
    common: Common = COMMON,
) -> None:
    """Show a report, an analysis or a fetch, or write a chart of a report to a file.

    Of an analysis it shows the status, the problem of one that failed, and the report of one that succeeded. A name is
    looked for in this order.

    Args:
        report: Name or id of the report, the analysis or the fetch.
        chart: Write a chart to this file: .svg, .png, or .json for Vega-Lite.
        chart_name: Name of the chart, such as loss or mir.
    """
    if chart is not None:
        _require_format(chart)
    with common.client() as client:
        collection, body = _anything(client, report, ("reports", "analyses", "fetches"))
        page = client.page_of(collection, body["id"])
        analysis = body if collection == "analyses" else None
        if analysis is not None and (chart is not None or not common.as_json) and analysis["report_id"]:
            body = client.get_report(analysis["report_id"])
            page = client.page_of("reports", body["id"])
        if chart is not None:
            if "schema_version" not in body:
                raise UsageError(f"the {noun_of(collection)} {body['id']} has no report, and so no chart", "--chart")
            _write_chart(client, body["id"], chart, chart_name, common)
            return
    if "schema_version" in body:
        shown = rendering.report_view(body, page)
    else:
        shown = fetch_view(body, page) if collection == "fetches" else rendering.analysis_view(body, page)
    common.print(body, shown)


def open_page(
    resource: Annotated[str | None, Parameter("NAME|ID", converter=given_name)] = None,
    /,
    *,
    common: Common = COMMON,
) -> None:
    """Open a page of the service in the browser, and print its address.

    Args:
        resource: Name or id of a report, an analysis, a checkpoint, a probe, a feature set, a gate or a fetch.
            Default: the overview.
    """
    with common.client() as client:
        page = f"{client.url}/"
        if resource is not None:
            collection, body = _anything(client, resource, _ANYWHERE)
            page = client.page_of(collection, body["id"])
    opened = webbrowser.open(page)
    common.print({"page": page, "opened": opened}, page)


def download(
    collection: StoredCollection,
    resource: Named,
    /,
    *,
    output: Annotated[Path | None, Parameter(("--output", "-o"), metavar="OUT")] = None,
    overwrite: bool = False,
    common: Common = COMMON,
) -> None:
    """Download the file of a checkpoint, a probe or a feature set; its hash is checked.

    Args:
        collection: checkpoint, probe or features.
        resource: Name or id of the resource.
        output: The file to write. Default: the resource's name, in the current folder.
        overwrite: Replace OUT if it exists.
    """
    with common.client() as client:
        found = client.get(collection, id_of(client, collection, resource))
        target = output or Path(_file_name(found))
        if target.is_dir():
            target = target / _file_name(found)
        if target.exists() and not overwrite:
            raise UsageError(f"{str(target)!r} already exists; --overwrite replaces it", "--output")
        client.download(collection, found["id"], target)
    size = f"{found['size_bytes']:,} bytes"
    common.print({"id": found["id"], "output": str(target), "sha256": found["sha256"]}, f"{target}, {size}")


def export_report(
    report: Named,
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
        report: Name or id of the report.
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
        body = client.get_report(id_of(client, "reports", report))
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
    collection: ListedCollection,
    /,
    *,
    name: str | None = None,
    search: Annotated[str | None, Parameter(metavar="TEXT")] = None,
    status: str | None = None,
    kind: str | None = None,
    checkpoint: NamedOption = None,
    probe: NamedOption = None,
    features: NamedOption = None,
    metadata: Annotated[list[str] | None, Parameter("--metadata", metavar="KEY=VALUE")] = None,
    metric: Annotated[list[str] | None, Parameter("--metric", metavar="PATH>=NUMBER")] = None,
    after: Instant = None,
    before: Instant = None,
    sort: Annotated[str | None, Parameter(metavar="COLUMN")] = None,
    order: Literal["asc", "desc"] | None = None,
    columns: Annotated[str | None, Parameter(metavar="COLUMN,...")] = None,
    limit: Annotated[int, Parameter(converter=whole, validator=validators.Number(gte=1), show_default=True)] = 50,
    everything: Annotated[bool, Parameter("--all")] = False,
    common: Common = COMMON,
) -> None:
    """List a collection, newest first, with the first characters of ids, which every command takes.

    Args:
        collection: The collection.
        name: Exactly this name.
        search: With this part in the name, in any case of letters.
        status: Status of an analysis or a fetch: queued, running, succeeded, failed or cancelled.
        kind: Kind of the analysis or report, such as evaluation.
        checkpoint: Analyses or reports of this checkpoint.
        probe: Analyses or reports on this probe.
        features: Analyses or reports of this feature set.
        metadata: With this metadata; may be repeated.
        metric: Reports with a metric within this bound, such as mir>=0.5; may be repeated.
        after: Created at or after this time, such as 2026-01-31 or 2026-01-31T12:00Z.
        before: Created before this time; without a zone it is local time.
        sort: Of reports a metric: accuracy, loss, mir, hdr or nc1 (of the test split, or of all samples), or its path.
            Of checkpoints, probes and feature sets a column, such as size_bytes or metadata.epoch.
        order: The largest first is desc, the default; asc is the smallest first.
        columns: What to show, separated by commas, such as id,name,metadata.epoch; of reports metrics too, such as
            mir or splits.train.accuracy.
        limit: Largest number of resources.
        everything: List all, regardless of --limit.
    """
    of_subject = {"kind": kind, "checkpoint": checkpoint, "probe": probe, "features": features}
    inapplicable: dict[str, dict[str, Any]] = {
        "analyses": {"sort": sort, "metric": metric},
        "reports": {"status": status},
        "fetches": {**of_subject, "sort": sort, "metric": metric},
        "gates": {"status": status, **of_subject, "sort": sort, "metric": metric},
    }
    for option, value in inapplicable.get(collection, {"status": status, **of_subject, "metric": metric}).items():
        if value is not None:
            raise UsageError(f"does not apply to {collection}", f"--{option}")
    if order is not None and sort is None:
        raise UsageError("needs --sort", "--order")
    chosen = None if columns is None else [part.strip() for part in columns.split(",") if part.strip()]
    filters: dict[str, Any] = {
        "limit": None if everything else limit,
        "metadata": values_by_key(metadata),
        "name": name,
        "search": search,
        "status": status,
        "kind": kind,
        "created_after": after,
        "created_before": before,
        "order": order,
    }
    with common.client() as client:
        subjects: tuple[tuple[str, str, Collection, str | None], ...] = (
            ("--checkpoint", "checkpoint_id", "checkpoints", checkpoint),
            ("--probe", "probe_id", "probes", probe),
            ("--features", "feature_set_id", "feature-sets", features),
        )
        for option, member, where, text in subjects:
            filters[member] = None if text is None else id_of(client, where, text, option)
        if collection == "reports":
            items = _reports(client, filters, sort, metric or [], chosen)
        else:
            items = [*client.list(collection, sort=sort, **filters)]
        page = f"{client.url}/{collection}"
    if collection == "reports" and sort is not None:
        asked = {"sort": rendering.paths_of(sort)[0], "order": order, "probe_id": filters["probe_id"]}
        page = f"{client.url}/leaderboard?{urlencode({key: value for key, value in asked.items() if value})}"
        chosen = chosen or ["id", "name", "kind", *dict.fromkeys([sort, "accuracy", "mir", "hdr"])]
    if columns is not None:
        _require_columns(items, chosen or [])
    common.print(items, rendering.collection_view(collection, items, chosen, page, whole_ids=columns is not None))


def _require_columns(items: Sequence[Any], columns: Sequence[str]) -> None:
    """Raise UsageError for a column that no resource has: a mistyped one must not look like missing numbers."""
    known = dict.fromkeys([key for item in items for key in item] + [*rendering.SHORT_METRICS, "outcome"])
    for column in columns:
        if items and column not in known and not column.startswith(("metadata.", "splits.", "summary.")):
            raise UsageError(f"there is no column {column!r}; there are {', '.join(known)}, metadata.KEY", "--columns")


def _reports(
    client: Client, filters: dict[str, Any], sort: str | None, bounds: Sequence[str], columns: Sequence[str] | None
) -> list[Any]:
    """Return reports with the metrics that are shown.

    Metrics with a short name that sort or bound are those of the test split, or of all samples where no report that the
    filters leave has a test split.
    """
    found = [_BOUND.fullmatch(bound) for bound in bounds]
    wanted = ["accuracy", "mir", "hdr", *(columns or []), *([sort] if sort else [])]
    shown = [path for name in wanted for path in rendering.paths_of(name) if path.startswith(("splits.", "summary."))]
    short = [name for name in (sort, *(match[1] for match in found if match)) if name in rendering.SHORT_METRICS]
    split = 0
    if short:
        first, _ = rendering.paths_of(str(short[0]))
        split = 0 if any(client.list("reports", **{**filters, "sort": first, "limit": 1})) else 1

    def path_of(name: str) -> str:
        """Return the path of a metric in the split that counts."""
        paths = rendering.paths_of(name)
        return paths[min(split, len(paths) - 1)]

    limits = [
        path_of(match[1]) + "".join(match[2].split()) if match else bound
        for match, bound in zip(found, bounds, strict=True)
    ]
    path = None if sort is None else path_of(sort)
    return [*client.list("reports", sort=path, metric=limits, show=list(dict.fromkeys(shown)), **filters)]


def cancel(analysis: Named, /, *, common: Common = COMMON) -> None:
    """Cancel an analysis, which stops at its next step, or a fetch.

    Args:
        analysis: Name or id of the analysis or the fetch; of several with one name the newest.
    """
    with common.client() as client:
        collection, run = run_of(client, analysis)
        body: Any = client.cancel_fetch(run["id"]) if collection == "fetches" else client.cancel(run["id"])
    common.print(body, f"{noun_of(collection)} {body['id']}, {body['status']}")


def delete(collection: DeletableCollection, resource: Named, /, *, common: Common = COMMON) -> None:
    """Delete a resource for good, unless a baseline or an analysis that has not ended needs it.

    An analysis takes its report along, a gate all its versions, a baseline its history.

    Args:
        collection: The collection.
        resource: Its id, the first characters of it, or a name that no other has; of a baseline its name.
    """
    with common.client() as client:
        id_ = resource if collection == "baselines" or is_id(resource) else _only(client, collection, resource)
        client.delete(collection, id_)
    name = "name" if collection == "baselines" else "id"
    common.print({name: id_, "deleted": True}, f"deleted {rendering.printable(id_)}")


def _only(client: Client, collection: Collection, text: str) -> str:
    """Return the id of the one resource that a text names; of a gate that of any version.

    Raises:
        UsageError: there is none, or there are several.
    """
    found = client.find_all(collection, text)
    if len(found) > 1:
        require_name(found, text)
        if collection != "gates":
            ids = ", ".join(str(one["id"]) for one in client.find_all(collection, text, limit=20))
            raise UsageError(f"several {collection} have the name {text!r}; give the id of one: {ids}")
        return str(found[0]["id"])
    return str(found_by(client, collection, text)["id"])


def _anything(client: Client, text: str, collections: Sequence[Collection]) -> tuple[Collection, Any]:
    """Return the resource that a text names, and its collection: the first that has one of this name, or this id.

    Raises:
        UsageError: there is none, or these characters begin several ids.
    """
    if is_id(text):
        for collection in collections:
            try:
                return collection, client.get(collection, text)
            except ProblemError as error:
                if error.status != 404:
                    raise
    found = [(collection, client.find_all(collection, text)) for collection in collections]
    named = [(collection, rows) for collection, rows in found if rows and rows[0].get("name") == text]
    begun = [(collection, row) for collection, rows in found for row in rows]
    if named:
        collection, rows = named[0]
        if len(rows) > 1:
            note(f"Several {collection} have the name {rendering.printable(text)}; the newest is {rows[0]['id']}.")
        return collection, client.get(collection, rows[0]["id"])
    if len(begun) > 1:
        ids = " and ".join(str(row["id"]) for _, row in begun[:2])
        raise UsageError(f"{text!r} begins several ids, such as {ids}: give more characters")
    if not begun:
        raise UsageError(f"there is nothing with the name or id {text!r} among {', '.join(collections)}")
    collection, row = begun[0]
    return collection, client.get(collection, row["id"])


def _file_name(resource: Any) -> str:
    """Return a name for a resource's file that is a plain one on every system."""
    suffix = _SUFFIXES.get(resource.get("format", ""), ".safetensors")
    name = re.sub(r"[^\w.+= -]", "_", str(resource["name"])).strip(". ").removesuffix(suffix)[:150]
    return f"{name or resource['id']}{suffix}"


def _require_format(file: Path) -> None:
    if file.suffix.lower() not in (".svg", ".png", ".json"):
        raise UsageError("must end in .svg, .png or .json", "--chart")


def _write_chart(client: Client, report_id: str, file: Path, name: str, common: Common) -> None:
    picture = client.get_chart(report_id, name, format=file.suffix.removeprefix(".").lower())
    try:
        file.write_bytes(picture)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", "--chart") from None
    common.print({"file": str(file), "bytes": len(picture)}, f"{file}, {len(picture):,} bytes")

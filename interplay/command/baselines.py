"""`interplay baseline`: the reports that candidates are compared with."""

from typing import Annotated

from cyclopts import Parameter, validators

from interplay.command import rendering
from interplay.command.naming import Named, id_of
from interplay.command.options import COMMON, Common
from interplay.command.values import whole


def set_baseline(
    name: str,
    report: Named,
    /,
    *,
    note: Annotated[str | None, Parameter(metavar="TEXT")] = None,
    common: Common = COMMON,
) -> None:
    """Point a baseline at a report.

    Args:
        name: Name of the baseline; it is created if it is missing.
        report: Name or id of the report.
        note: Reason, for the history.
    """
    with common.client() as client:
        body = client.set_baseline(name, id_of(client, "reports", report), note=note)
    common.print(body, f"baseline {body['name']} is at report {body['report_id']}")


def show_baseline(name: str, /, *, common: Common = COMMON) -> None:
    """Show the report that a baseline points at.

    Args:
        name: Name of the baseline.
    """
    with common.client() as client:
        body = client.get_baseline(name)
        report = None if common.as_json else client.get_report(body["report_id"])
        page = client.page_of("reports", body["report_id"])
    common.print(body, None if report is None else rendering.report_view(report, page))


def list_baselines(*, common: Common = COMMON) -> None:
    """List all baselines, newest first."""
    with common.client() as client:
        items = [*client.list("baselines")]
    common.print(items, rendering.collection_view("baselines", items))


def show_history(
    name: str,
    /,
    *,
    limit: Annotated[
        int, Parameter(converter=whole, validator=validators.Number(gte=1, lte=200), show_default=True)
    ] = 50,
    common: Common = COMMON,
) -> None:
    """List the requested moves of a baseline, refused ones included, newest first.

    Args:
        name: Name of the baseline.
        limit: Largest number of moves.
    """
    with common.client() as client:
        items = [*client.baseline_history(name, limit=limit)]
    common.print(items, rendering.collection_view("moves", items))

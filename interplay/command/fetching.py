"""Fetches in the command: what lies elsewhere is waited for and shown."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from interplay.calls.collections import Collection
from interplay.client import Client, FetchFailed
from interplay.command import rendering
from interplay.command.options import Common, note
from interplay.command.progress import LINE_SECONDS, followed, transfer_bar
from interplay.results import Fetch, SucceededFetch


def print_fetch(fetch: Fetch, common: Common) -> None:
    """Print a fetch that nobody waits for."""
    common.print(fetch, f"fetch {fetch['id']}, {fetch['status']}")


def follow_fetch(
    client: Client, fetch: Fetch, common: Common, *, timeout: float | None = None, as_fetch: bool = False
) -> None:
    """Wait for a fetch and print what the file has become.

    Args:
        client: of the service.
        fetch: as the service returned it.
        common: form of the output.
        timeout: seconds after which to give up.
        as_fetch: whether JSON is that of the fetch, not of what it has made.
    """
    try:
        ended = _wait_for(client, fetch, timeout)
    except FetchFailed as error:
        if common.as_json:
            common.print(error.fetch)
        raise
    if common.as_json and as_fetch:
        common.print(ended)
        return
    body = client.get(cast(Collection, f"{ended['makes']}s"), ended["resource_id"])
    common.print(body, rendering.resource_text(ended["makes"], body))


def fetch_view(fetch: Mapping[str, Any], page: str) -> RenderableType:
    """Render one fetch: what was asked, how far it is, and what it has made or its problem."""
    table = Table.grid(padding=(0, 2))
    table.add_row("fetch", f"{fetch['id']}, {_state_of(fetch)}")
    table.add_row("of", f"{fetch['makes']} {rendering.printable(fetch['name'])}")
    table.add_row("from", rendering.printable(fetch["source"]))
    for member in ("created_at", "started_at", "finished_at"):
        if value := fetch.get(member):
            table.add_row(member.removesuffix("_at"), rendering.printable(value)[:16].replace("T", " "))
    if fetch.get("resource_id"):
        table.add_row(fetch["makes"], str(fetch["resource_id"]))
    parts: list[RenderableType] = [table]
    if problem := fetch.get("problem"):
        parts.append(Text(rendering.problem_text(problem.get("title", ""), problem.get("detail", ""), problem)))
    elif fetch["status"] in ("queued", "running"):
        parts.append(Text(f"interplay wait {fetch['id']}  or  interplay cancel {fetch['id']}", style="dim"))
    return Group(*parts, Text(page, style="dim"))


def _wait_for(client: Client, fetch: Fetch, timeout: float | None) -> SucceededFetch:
    """Wait for a fetch and show its progress; after Ctrl-C, print how to cancel it."""
    with followed(client, "fetch", fetch, _progress_shown(fetch["name"])) as take:
        return client.wait_for_fetch(fetch["id"], timeout_seconds=timeout, on_progress=take)


@contextmanager
def _progress_shown(name: str) -> Iterator[tuple[Callable[[Fetch], None], Callable[[str], None]]]:
    """Yield two functions: one shows a state of the fetch, the other prints a line beside it.

    The state is a bar on a terminal; else a line for each change but that of the bytes, which comes now and then.
    """
    if not rendering.console(stderr=True).is_terminal:
        said, said_at = "", 0.0

        def print_line(fetch: Fetch) -> None:
            """Print the state, unless it was said a moment ago."""
            nonlocal said, said_at
            step = _step_of(fetch)
            if step != said or time.monotonic() - said_at > LINE_SECONDS:
                note(f"{rendering.printable(name)}: {_state_of(fetch)}")
                said, said_at = step, time.monotonic()

        yield print_line, note
        return
    with transfer_bar(name) as (bar, task):

        def move_bar(fetch: Fetch) -> None:
            """Move the bar to the state."""
            progress = fetch["progress"]
            description = f"{rendering.printable(name)}, {_step_of(fetch)}"
            total = progress["total"] or None
            bar.update(task, description=description, completed=progress["done"], total=total, visible=True)

        yield move_bar, bar.console.print


def _step_of(fetch: Mapping[str, Any]) -> str:
    """Return what is being done, or how it has ended."""
    phase = rendering.printable(fetch["progress"]["phase"])
    return phase if fetch["status"] == "running" and phase else str(fetch["status"])


def _state_of(fetch: Mapping[str, Any]) -> str:
    """Return what is being done, with the bytes."""
    done, total = fetch["progress"]["done"], fetch["progress"]["total"]
    if fetch["status"] != "running" or not total:
        return _step_of(fetch)
    unit, name = (2**20, "MiB") if total >= 2**20 else (2**10, "KiB")
    return f"{_step_of(fetch)}, {done / unit:,.1f} of {total / unit:,.1f} {name}"

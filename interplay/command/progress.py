"""Show the progress of an analysis or a transfer while the command waits for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from interplay.client import Client
from interplay.command import rendering
from interplay.command.options import note
from interplay.results import Analysis, Fetch, SucceededAnalysis

# An analysis that has not begun after so long may wait for a worker that nobody has started.
_NO_WORKER_SECONDS = 5.0
#: A transfer that nobody watches on a terminal says where it is so often.
LINE_SECONDS = 10.0


def wait_for(client: Client, analysis: Analysis, timeout: float | None) -> SucceededAnalysis:
    """Wait for an analysis and show its progress; after Ctrl-C, print how to cancel it.

    If no worker is there to begin it, a line says so.
    """
    with followed(client, "analysis", analysis, _progress_shown()) as take:
        return client.wait(analysis["id"], timeout_seconds=timeout, on_progress=take)


Run = TypeVar("Run", Analysis, Fetch)
Shown = AbstractContextManager[tuple[Callable[[Run], None], Callable[[str], None]]]


@contextmanager
def followed(
    client: Client, noun: Literal["analysis", "fetch"], run: Run, shown: Shown[Run]
) -> Iterator[Callable[[Run], None]]:
    """Yield a function that shows each state of what is waited for; after Ctrl-C, print how to cancel it.

    Args:
        client: of the service.
        noun: what it is.
        run: its state so far.
        shown: gives two functions: one shows a state, the other prints a line beside it.
    """
    latest = [run]
    try:
        with shown as (show_progress, say), missing_worker_said(client, noun, lambda: latest[0]["status"], say):

            def take(state: Run) -> None:
                """Keep and show a state."""
                latest[0] = state
                show_progress(state)

            yield take
    except KeyboardInterrupt:
        note(f"The {noun} continues. To cancel it: interplay cancel {run['id']}")
        raise


@contextmanager
def missing_worker_said(
    client: Client, noun: str, status: Callable[[], str], say: Callable[[str], None]
) -> Iterator[None]:
    """Say once that no worker is there, if the analysis or the fetch is still queued after a while."""

    def look() -> None:
        if status() == "queued":
            worker = (client.readiness() or {}).get("worker", "ok")
            if worker != "ok":
                say(f"The {noun} waits: {rendering.printable(worker)}. `interplay worker` starts one.")

    timer = threading.Timer(_NO_WORKER_SECONDS, look)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _progress_shown() -> Iterator[tuple[Callable[[Any], None], Callable[[str], None]]]:
    """Yield two functions: one shows a state of the analysis, a bar on a terminal, else a line for each change.

    The other prints a line beside it.
    """
    err = rendering.console(stderr=True)
    if not err.is_terminal:
        seen = [""]

        def print_line(analysis: Analysis) -> None:
            """Print the state if it differs from the last one."""
            line = rendering.progress_line(analysis)
            if line != seen[0]:
                note(line)
            seen[0] = line

        yield print_line, note
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("queued", total=None)

        def move_bar(analysis: Analysis) -> None:
            """Move the bar to the state."""
            progress = analysis["progress"]
            description = rendering.progress_line(analysis)
            bar.update(task, description=description, completed=progress["done"], total=progress["total"] or None)

        yield move_bar, bar.console.print


@contextmanager
def upload_shown(name: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how much of a large file was sent: a bar on a terminal, else a line now and then."""
    err = rendering.console(stderr=True)
    if not err.is_terminal:
        said_at = [time.monotonic()]

        def print_line(sent_bytes: int, size_bytes: int) -> None:
            """Print how much was sent, unless that was said a moment ago."""
            if time.monotonic() - said_at[0] > LINE_SECONDS:
                said_at[0] = time.monotonic()
                note(f"{rendering.printable(name)}: {sent_bytes / 2**20:,.0f} of {size_bytes / 2**20:,.0f} MiB sent")

        yield print_line
        return
    with transfer_bar(name) as (bar, task):

        def move_bar(sent_bytes: int, size_bytes: int) -> None:
            """Move the bar."""
            bar.update(task, completed=sent_bytes, total=size_bytes, visible=True)

        yield move_bar


@contextmanager
def transfer_bar(name: str) -> Iterator[tuple[Progress, TaskID]]:
    """Yield a bar that counts bytes, and its one task, which is not seen before it is moved."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=rendering.console(stderr=True), transient=True) as bar:
        yield bar, bar.add_task(rendering.printable(name), total=None, visible=False)

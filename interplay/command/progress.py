"""Show the progress of an analysis while the command waits for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from interplay.client import Client
from interplay.command import rendering
from interplay.command.options import note
from interplay.results import Analysis, SucceededAnalysis


def wait_for(client: Client, analysis: Analysis, timeout: float | None) -> SucceededAnalysis:
    """Wait for an analysis and show its progress; after Ctrl-C, print how to cancel it."""
    try:
        with _progress_shown() as show_progress:
            return client.wait(analysis["id"], timeout_seconds=timeout, on_progress=show_progress)
    except KeyboardInterrupt:
        note(f"The analysis continues. To cancel it: interplay cancel {analysis['id']}")
        raise


@contextmanager
def _progress_shown() -> Iterator[Callable[[Any], None]]:
    """Yield a callback for each state of an analysis: it shows a bar on a terminal, else a line for each change."""
    err = rendering.console(stderr=True)
    if not err.is_terminal:
        seen = [""]

        def print_line(analysis: Analysis) -> None:
            """Print the state if it differs from the last one."""
            line = rendering.progress_line(analysis)
            if line != seen[0]:
                note(line)
            seen[0] = line

        yield print_line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("queued", total=None)

        def move_bar(analysis: Analysis) -> None:
            """Move the bar to the state."""
            progress = analysis["progress"]
            description = rendering.progress_line(analysis)
            bar.update(task, description=description, completed=progress["done"], total=progress["total"] or None)

        yield move_bar

"""Shared parts of the experiments: requests to the service, waiting for reports, tables and pictures."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import altair as alt
import safetensors.torch
import vl_convert
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from examples.service import check_signals, console, run_example, service
from examples.training import Digits, save_probe
from interplay import Analysis, Client

Body = dict[str, Any]

ANALYSIS_SECONDS = 900.0


@dataclass(frozen=True)
class Experiment:
    """One run of an example.

    Attributes:
        client: client of the computing service.
        files: folder for the uploaded files.
        output: folder for pictures; None for none.
        quick: only check that everything runs: few epochs, one seed, no meaningful figures.
    """

    client: Client
    files: Path
    output: Path | None
    quick: bool

    def push_digits(self, digits: Digits) -> str:
        """Upload the digits; return the probe's id."""
        path = save_probe(digits, self.files / "digits.safetensors")
        names = [str(digit) for digit in range(10)]
        probe = self.client.push_probe(path, name="digits", class_names=names, preprocess=digits.preprocess)
        return str(probe["id"])

    def push_checkpoint(self, network: nn.Module, architecture: Mapping[str, Any], name: str) -> str:
        """Upload a checkpoint; return its id."""
        check_signals()
        path = self.files / "checkpoint.safetensors"
        safetensors.torch.save_file(network.state_dict(), path, metadata={"architecture": json.dumps(architecture)})
        return str(self.client.push_checkpoint(path, name=name)["id"])

    def reports(self, analyses: Sequence[Analysis]) -> list[Body]:
        """Wait for all analyses; return their reports in the same order."""
        columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        found: list[Any] = []
        with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
            waiting = bars.add_task("analyses", total=len(analyses))
            for queued in analyses:
                analysis = self.client.wait(
                    queued["id"], timeout_seconds=ANALYSIS_SECONDS, on_progress=lambda _: check_signals()
                )
                found.append(self.client.get_report(analysis["report_id"]))
                bars.advance(waiting)
        return found

    def save_chart(self, report: Body, name: str) -> None:
        """Save the service's own picture of a report as NAME.svg in the output folder."""
        if self.output is not None:
            (self.output / f"{name}.svg").write_bytes(self.client.get_chart(report["id"]))

    def draw(self, chart: alt.TopLevelMixin, name: str) -> None:
        """Draw an additional picture in the output folder."""
        if self.output is not None:
            (self.output / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(chart.to_dict()))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> None:
    """Show a table, aligned for people and valid Markdown; numbers have four decimals, undefined values are a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    console.print(f"\n{title}\n")
    console.print(_line(columns, widths), soft_wrap=True)
    console.print(f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|", soft_wrap=True)
    for row in cells:
        console.print(_line(row, widths), soft_wrap=True)


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean and, from two values on, its standard error.

    >>> mean_and_error([0.9, 0.95, 1.0])
    '0.9500 ± 0.0289'
    """
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def interplay_of(split: Body, centring: Literal["global", "none"] = "global") -> Body:
    """Return MIR, HDR and related values at sample level; "raw" in a table's title means uncentred, as in the paper."""
    measured: Body = split["interplay"]["sample"][centring]
    return measured


def main(name: str, description: str | None, body: Callable[[Experiment], None]) -> int:
    """Read the options, start a service, run the body, stop the service; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{name}", description=(description or "").partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="a folder for the pictures (default: none are drawn)")
    parser.add_argument("--url", help="ask the service that listens there (default: one is started)")
    parser.add_argument("--quick", action="store_true", help="see that all of it runs; the figures mean nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="interplay-example-") as temporary:
        folder = Path(temporary)

        def run() -> None:
            started = time.monotonic()
            if arguments.output is not None:
                arguments.output.mkdir(parents=True, exist_ok=True)
            if arguments.url is not None:
                _ask(arguments.url)
            else:
                with service(folder) as running:
                    _ask(running.url)
            console.print(f"\n{time.monotonic() - started:.0f} s.")

        def _ask(url: str) -> None:
            with Client(url) as client:
                body(Experiment(client, folder, arguments.output, arguments.quick))

        return run_example(name, run)


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"| {' | '.join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))} |"

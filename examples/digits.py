"""The main job on real data: train a small network on scikit-learn's digits and watch it collapse.

    python -m examples.digits [--keep] [--epochs 200] [--data-dir DIR]      (or: make demo ARGS=--keep)

Starts its own service, trains a multilayer perceptron on 1,437 scans of digits, pushes a checkpoint of about ten
epochs over HTTP during training, has each analysed, prints the results and stops the service.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from examples.service import Service, ServiceFailed, Stopped, check_signals, console, run_example, service
from examples.training import Digits, Recipe, Training, load, save_probe
from interplay import Client, EvaluationReport

CHECKPOINT_EPOCHS = (0, 1, 2, 5, 10, 20, 50, 100, 150, 200)
ARCHITECTURE = {
    "family": "builtin",
    "name": "mlp",
    "args": {"sizes": [64, 512, 512, 64, 10], "activation": "relu", "norm": "batch"},
}
ANALYSIS_SECONDS = 300.0
READING = """\
All columns but test acc are of the training samples; MIR and HDR at sample level, globally centred.
MIR: how much features and head rows know of each other, 0 to 1. It climbs towards its optimum, the value at full
neural collapse ({optimum:.4f} here). HDR, the gap between their entropies, and NC1, the spread within classes, fall
to 0. MIR alone is no verdict: unrelated vectors can score high, so read it beside accuracy and the null baseline of
each report."""


def main() -> int:
    """Run the example; return exit code 0 if every checkpoint has its report."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the service up until Ctrl-C")
    parser.add_argument("--epochs", type=int, default=200, help="length of the training (default: 200)")
    parser.add_argument("--data-dir", type=Path, help="keep the service's data here (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    with tempfile.TemporaryDirectory(prefix="interplay-demo-") as temporary:
        data_dir = arguments.data_dir or Path(temporary)
        return run_example("demo", lambda: run(data_dir, arguments.epochs, keep=arguments.keep))


def run(data_dir: Path, epochs: int, *, keep: bool) -> None:
    """Start the service, train and analyse, print the table, stop the service."""
    started = time.monotonic()
    files = data_dir / "demo"
    files.mkdir(parents=True, exist_ok=True)
    digits = load()
    probe_file = save_probe(digits, files / "digits.safetensors")
    with service(data_dir) as running:
        console.print(f"The service listens on {running.url}")
        with Client(running.url) as client:
            reports = train_and_analyse(client, digits, probe_file, epochs)
        console.print(results_table(reports))
        optimum = reports[0][1]["splits"]["train"]["interplay"]["sample"]["global"]["optimum"]["mir"]
        console.print(READING.format(optimum=optimum), soft_wrap=True)
        console.print(f"\n{len(reports)} checkpoints in {time.monotonic() - started:.0f} s.")
        if keep:
            keep_up(running, reports[-1][1])


def checkpoint_epochs(epochs: int) -> list[int]:
    """Return the epochs after which a checkpoint is saved: close together at first, where most happens, and last."""
    return sorted({epoch for epoch in CHECKPOINT_EPOCHS if epoch < epochs} | {epochs})


def train(digits: Digits, epochs: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train from a fixed seed; yield the network's state before the first epoch and after each one."""
    training = Training(digits, ARCHITECTURE, Recipe(epochs))
    yield 0, training.network.state_dict()
    for epoch in range(1, epochs + 1):
        training.run_epoch()
        yield epoch, training.network.state_dict()


def train_and_analyse(
    client: Client, digits: Digits, probe_file: Path, epochs: int
) -> list[tuple[int, EvaluationReport]]:
    """Push checkpoints during training, queue an analysis of each; return the epochs and their reports."""
    class_names = [str(digit) for digit in range(10)]
    probe = client.push_probe(probe_file, name="digits", class_names=class_names, preprocess=digits.preprocess)
    wanted = checkpoint_epochs(epochs)
    queued: list[tuple[int, str]] = []
    columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        training = bars.add_task("training, epochs", total=epochs)
        analysing = bars.add_task("analyses", total=len(wanted))
        for epoch, state in train(digits, epochs):
            check_signals()
            bars.update(training, completed=epoch)
            if epoch not in wanted:
                continue
            path = probe_file.with_name(f"epoch-{epoch:03}.safetensors")
            safetensors.torch.save_file(state, path, metadata={"architecture": json.dumps(ARCHITECTURE)})
            metadata = {"run": "digits", "epoch": epoch}
            checkpoint = client.push_checkpoint(path, name=f"digits, epoch {epoch}", metadata=metadata)
            analysis = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe["id"])
            queued.append((epoch, analysis["id"]))
        reports = []
        for epoch, analysis_id in queued:
            ended = client.wait(analysis_id, timeout_seconds=ANALYSIS_SECONDS, on_progress=lambda _: check_signals())
            reports.append((epoch, client.get_report(ended["report_id"], "evaluation")))
            bars.advance(analysing)
    return reports


def results_table(reports: list[tuple[int, EvaluationReport]]) -> Table:
    """Return the table of results, one row an epoch."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("epoch", "train acc", "test acc", "MIR", "to optimum", "HDR", "NC1"):
        table.add_column(column, justify="right")
    for epoch, report in reports:
        train_split = report["splits"]["train"]
        values = train_split["interplay"]["sample"]["global"]
        table.add_row(
            str(epoch),
            *(
                "-" if value is None else f"{value:.4f}"
                for value in (
                    train_split["accuracy"],
                    report["splits"]["test"]["accuracy"],
                    values["mir"],
                    values["distance_to_optimum"]["mir"],
                    values["hdr"],
                    train_split["collapse"]["nc1"],
                )
            ),
        )
    return table


def keep_up(running: Service, report: EvaluationReport) -> None:
    """Print suggestions of what to try next, and wait for Ctrl-C."""
    interplay = Path(sys.executable).with_name("interplay")
    command = interplay.relative_to(Path.cwd()) if interplay.is_relative_to(Path.cwd()) else interplay
    console.print(
        f"\nThe service stays up on {running.url} until Ctrl-C. In another terminal:\n"
        f"  export INTERPLAY_URL={running.url}\n"
        f"  {command} list reports --sort mir\n"
        f"  {command} show '{report['subject']['name']}'\n"
        f"  curl {running.url}/v1/reports/{report['id']}\n"
        "In a browser:\n"
        f"  {running.url}/reports/{report['id']}\n"
        f"  {running.url}/leaderboard",
        soft_wrap=True,
    )
    try:
        while True:
            check_signals()
            ended = running.process.poll()
            if ended is not None:
                raise ServiceFailed(f"the service ended by itself with exit code {ended}")
            time.sleep(0.1)
    except Stopped:
        console.print("Stopped.")


if __name__ == "__main__":
    sys.exit(main())

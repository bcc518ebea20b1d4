"""The main job on real data: train a small network on scikit-learn's digits and watch it collapse.

    python -m examples.digits [--keep] [--epochs 200] [--data-dir DIR]      (or: make demo ARGS=--keep)

Starts a service of its own, trains a multilayer perceptron on 1,437 scans of digits, pushes a checkpoint of about ten
epochs over HTTP as training goes on, has each analysed, prints what came back and stops what it started.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy

from analysis import networks
from interplay import Client, InterplayError

SEED = 0
N_TEST = 360
BATCH_SIZE = 64
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 2e-3
CHECKPOINT_EPOCHS = (0, 1, 2, 5, 10, 20, 50, 100, 150, 200)
ARCHITECTURE = {
    "family": "builtin",
    "name": "mlp",
    "args": {"sizes": [64, 512, 512, 64, 10], "activation": "relu", "norm": "batch"},
}
START_SECONDS, STOP_SECONDS, ANALYSIS_SECONDS = 60.0, 15.0, 300.0
READING = """\
All columns but test acc are of the training samples; MIR and HDR at sample level, globally centred.
MIR: how much features and head rows know of each other, 0 to 1. It climbs towards its optimum, the value at full
neural collapse ({optimum:.4f} here). HDR, the gap between their entropies, and NC1, the spread within classes, fall
to 0. MIR alone is no verdict: unrelated vectors can score high, so read it beside accuracy and the null baseline of
each report."""

console = Console(highlight=False)


# The signals that came; `check_signals` looks at them between two steps.
_received: list[int] = []


class Stopped(Exception):
    """Ctrl-C, or another signal that asks for the end."""


class ServiceFailed(Exception):
    """The service did not start, or ended by itself."""


@dataclass(frozen=True)
class Digits:
    """8 x 8 scans as rows of 64 grey levels, 0 to 16, and what makes them inputs of mean 0 and deviation 1."""

    pixels: Tensor
    labels: Tensor
    split: Tensor
    preprocess: dict[str, float]

    @property
    def train_inputs(self) -> Tensor:
        """What the network sees of the training samples: the same arithmetic as the service's."""
        scaled = self.pixels[self.split == 0].float() * self.preprocess["scale"]
        return (scaled - self.preprocess["mean"]) / self.preprocess["std"]

    @property
    def train_labels(self) -> Tensor:
        """Their digits."""
        return self.labels[self.split == 0]


def main() -> int:
    """Run the example; the exit code is 0 where every checkpoint has its report."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the service up until Ctrl-C")
    parser.add_argument("--epochs", type=int, default=200, help="length of the training (default: 200)")
    parser.add_argument("--data-dir", type=Path, help="keep the service's data here (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _note_signal)
    try:
        with tempfile.TemporaryDirectory(prefix="interplay-demo-") as temporary:
            run(arguments.data_dir or Path(temporary), arguments.epochs, keep=arguments.keep)
    except (Stopped, KeyboardInterrupt):
        console.print("Stopped.")
        return 130
    except (InterplayError, ServiceFailed) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def run(data_dir: Path, epochs: int, *, keep: bool) -> None:
    """Service up, training and analyses, table, service down."""
    started = time.monotonic()
    files = data_dir / "demo"
    files.mkdir(parents=True, exist_ok=True)
    with service(data_dir) as process:
        digits = load()
        probe_file = save_probe(digits, files / "digits.safetensors")
        url = service_url(process, data_dir)
        console.print(f"The service listens on {url}")
        with Client(url) as client:
            reports = train_and_analyse(client, digits, probe_file, epochs)
        console.print(results_table(reports))
        optimum = reports[0][1]["splits"]["train"]["interplay"]["sample"]["global"]["optimum"]["mir"]
        console.print(READING.format(optimum=optimum), soft_wrap=True)
        console.print(f"\n{len(reports)} checkpoints in {time.monotonic() - started:.0f} s.")
        if keep:
            keep_up(process, url, reports[-1][1])


def load() -> Digits:
    """scikit-learn's digits, 1,437 to train on and 360 to test on, each class in proportion."""
    pixels, labels = load_digits(return_X_y=True)
    _, test = train_test_split(np.arange(len(labels)), test_size=N_TEST, stratify=labels, random_state=SEED)
    split = torch.zeros(len(labels), dtype=torch.uint8)
    split[test] = 1
    grey = torch.from_numpy(pixels).to(torch.uint8)
    # One mean and deviation for all pixels: those at the rim never change, so some have no deviation of their own.
    scaled = grey[split == 0].double() / 16
    preprocess = {"scale": 1 / 16, "mean": scaled.mean().item(), "std": scaled.std().item()}
    return Digits(grey, torch.from_numpy(labels), split, preprocess)


def save_probe(digits: Digits, path: Path) -> Path:
    """Write both splits as one probe dataset."""
    tensors = {"inputs": digits.pixels, "labels": digits.labels, "split": digits.split}
    safetensors.torch.save_file(tensors, path)
    return path


def checkpoint_epochs(epochs: int) -> list[int]:
    """Epochs after which a checkpoint is saved: close together at first, where most happens, and the last one."""
    return sorted({epoch for epoch in CHECKPOINT_EPOCHS if epoch < epochs} | {epochs})


def train(digits: Digits, epochs: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train from a fixed seed; yields after each epoch, and before the first, with the network's state."""
    torch.set_num_threads(1)  # layers this small gain nothing from a second core, and the service has work for it
    torch.manual_seed(SEED)
    network = networks.build(ARCHITECTURE, device="cpu")
    inputs, labels = digits.train_inputs, digits.train_labels
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    shuffling = torch.Generator().manual_seed(SEED)
    steps = epochs * -(-len(inputs) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    yield 0, network.state_dict()
    for epoch in range(1, epochs + 1):
        network.train()
        for batch in torch.split(torch.randperm(len(inputs), generator=shuffling), BATCH_SIZE):
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(network(inputs[batch]), labels[batch]))
            optimizer.step()
            schedule.step()
        yield epoch, network.state_dict()


def train_and_analyse(
    client: Client, digits: Digits, probe_file: Path, epochs: int
) -> list[tuple[int, dict[str, Any]]]:
    """Push checkpoints while training goes on, queue an analysis of each; the epochs and their reports."""
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
            analysis = client.wait(analysis_id, timeout_seconds=ANALYSIS_SECONDS, on_progress=lambda _: check_signals())
            reports.append((epoch, client.get_report(analysis["report_id"])))
            bars.advance(analysing)
    return reports


def results_table(reports: list[tuple[int, dict[str, Any]]]) -> Table:
    """One row an epoch."""
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


@contextmanager
def service(data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service on a free port, SQLite and a local folder, one worker; stopped at the end, whatever happened."""
    # The demo's service must not end up in a database or a bucket that the shell is configured for.
    kept = ("INTERPLAY_DEVICE", "INTERPLAY_THREADS")
    environment = {key: value for key, value in os.environ.items() if key in kept or not key.startswith("INTERPLAY_")}
    environment["INTERPLAY_DATA_DIR"] = str(data_dir)
    # Matrices this small gain nothing from a second thread, and where cores are shared two that wait for each other
    # lose much: 27 s with one, 151 s with two, beside other work on two cores.
    environment.setdefault("INTERPLAY_THREADS", "1")
    output, log = output_file(data_dir), log_file(data_dir)
    with output.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop it after our last request
        )
    try:
        yield process
    except (InterplayError, ServiceFailed):
        print(f"The service said:\n{log.read_text(errors='replace')[-5000:]}", file=sys.stderr)
        raise
    finally:
        stop(process)


def output_file(data_dir: Path) -> Path:
    """Where the service's stdout goes; its first line says where it listens."""
    return data_dir / "demo" / "service.out"


def log_file(data_dir: Path) -> Path:
    """Where the service's stderr goes."""
    return data_dir / "demo" / "service.log"


def service_url(process: subprocess.Popen[bytes], data_dir: Path) -> str:
    """Wait for the service's first line and return the URL that it names."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        check_signals()
        ended = process.poll()
        first_line, newline, _ = output_file(data_dir).read_text().partition("\n")
        if newline:
            found = re.fullmatch(r"Interplay is listening on (http://\S+)", first_line)
            if not found:
                raise ServiceFailed(f"its first line was {first_line!r}")
            return found[1]
        if ended is not None:
            raise ServiceFailed(f"the service ended with exit code {ended} before it listened")
        time.sleep(0.05)
    raise ServiceFailed(f"the service did not listen within {START_SECONDS:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the service and its worker: asked first, then, after a while, killed."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def keep_up(process: subprocess.Popen[bytes], url: str, report: dict[str, Any]) -> None:
    """Say what to try next, and wait for Ctrl-C."""
    interplay = Path(sys.executable).with_name("interplay")
    command = interplay.relative_to(Path.cwd()) if interplay.is_relative_to(Path.cwd()) else interplay
    console.print(
        f"\nThe service stays up on {url} until Ctrl-C. In another terminal:\n"
        f"  export INTERPLAY_URL={url}\n"
        f"  {command} list checkpoints --metadata run=digits\n"
        f"  {command} show {report['id']}\n"
        f"  curl {url}/v1/reports/{report['id']}\n"
        f"  {url}/docs in a browser lists every call",
        soft_wrap=True,
    )
    while not _received:
        ended = process.poll()
        if ended is not None:
            raise ServiceFailed(f"the service ended by itself with exit code {ended}")
        time.sleep(0.1)
    console.print("Stopped.")


def check_signals() -> None:
    """End here if a signal came.

    The handler itself does not raise: an exception in the middle of an import or a destructor may be swallowed.
    """
    if _received:
        raise Stopped


def _note_signal(number: int, frame: FrameType | None) -> None:
    if _received:  # somebody insists
        raise KeyboardInterrupt
    _received.append(number)


if __name__ == "__main__":
    sys.exit(main())

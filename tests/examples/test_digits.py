"""The demo, whole, as `make demo` runs it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import safetensors.torch
import torch

from analysis.networks import loading
from examples.digits import ARCHITECTURE, checkpoint_epochs, main
from examples.training import load

ROOT = Path(__file__).parents[2]


@contextmanager
def demo(data_dir: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process of its own; whatever happens, it is ended with what it started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.digits", "--data-dir", str(data_dir), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        for left in started_for(data_dir):
            left.kill()


def started_for(data_dir: Path) -> list[psutil.Process]:
    """The service's processes: those that were given this data folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("INTERPLAY_DATA_DIR") == str(data_dir):
                found.append(process)
        except psutil.Error:
            continue
    return found


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """Its output up to the line that holds the text."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if wanted in line:
            return read
    raise AssertionError(f"{wanted!r} never came:\n{read}{process.stderr.read() if process.stderr else ''}")


def naive_mir_and_hdr(state_file: Path) -> tuple[float, float]:
    """MIR and HDR of the training samples, globally centred, from N x N Gram matrices in float64."""
    network = loading.build(ARCHITECTURE, device="cpu")
    network.load_state_dict(safetensors.torch.load_file(state_file))
    digits = load()
    *_, head = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network.eval()(digits.train_inputs)
    features, weights = seen[0].double().numpy(), head.weight.detach().double().numpy()
    labels = digits.train_labels.numpy()
    features = directions(features - np.mean([features[labels == c].mean(axis=0) for c in range(10)], axis=0))
    rows = directions(weights - weights.mean(axis=0))[labels]
    first, second = features @ features.T, rows @ rows.T
    h1, h2, joint = entropy(first), entropy(second), entropy(first * second)
    return (h1 + h2 - joint) / min(h1, h2), abs(h1 - h2) / max(h1, h2)


def directions(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each row divided by its norm."""
    norms: npt.NDArray[np.float64] = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / norms


def entropy(gram: npt.NDArray[np.float64]) -> float:
    """The matrix entropy in nats."""
    values = np.linalg.eigvalsh(gram / len(gram))
    values = values[values > 1e-15]
    return float(-(values * np.log(values)).sum())


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (200, [0, 1, 2, 5, 10, 20, 50, 100, 150, 200]),
        (5, [0, 1, 2, 5]),
        (1, [0, 1]),
        (30, [0, 1, 2, 5, 10, 20, 30]),
        (300, [0, 1, 2, 5, 10, 20, 50, 100, 150, 200, 300]),
    ],
)
def test_checkpoints_span_the_training(epochs: int, expected: list[int]) -> None:
    """Whatever the length, the start and the end are there."""
    assert checkpoint_epochs(epochs) == expected


def test_digits_are_split_in_proportion_and_standardised() -> None:
    """1,437 and 360 scans, every digit in both, and inputs of mean 0 and deviation 1."""
    digits = load()
    assert [int((digits.split == part).sum()) for part in (0, 1)] == [1437, 360]
    assert min(torch.bincount(digits.labels[digits.split == 1]).tolist()) >= 34
    assert digits.train_inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert digits.train_inputs.std().item() == pytest.approx(1, abs=1e-5)


def test_demo_shows_collapse_and_keeps_the_service_up(tmp_path: Path) -> None:
    """Five epochs: the table tells the story, its figures are those of a naive computation, Ctrl-C ends everything."""
    with demo(tmp_path, "--keep", "--epochs", "5") as process:
        output = read_until(process, "/leaderboard")
        url = re.search(r"stays up on (http://127\.0\.0\.1:\d+)", output)
        assert url
        assert httpx.get(f"{url[1]}/healthz", trust_env=False).status_code == 200
        assert started_for(tmp_path)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert not started_for(tmp_path)

    lines = re.findall(r"^ +(\d+)((?: +\d\.\d+){5} +\d+\.\d+) *$", output, flags=re.MULTILINE)
    table = {int(epoch): [float(cell) for cell in cells.split()] for epoch, cells in lines}
    assert [*table] == [0, 1, 2, 5]
    for epoch, (_, _, mir, distance, hdr, _) in table.items():
        assert (mir, hdr) == pytest.approx(
            naive_mir_and_hdr(tmp_path / "demo" / f"epoch-{epoch:03}.safetensors"), abs=2e-4
        )
        assert mir + distance == pytest.approx(0.9524, abs=2e-4)
    (train_0, test_0, mir_0, _, hdr_0, nc1_0), (train_5, test_5, mir_5, _, hdr_5, nc1_5) = table[0], table[5]
    assert max(train_0, test_0) < 0.3
    assert min(train_5, test_5) > 0.93
    assert (mir_0 < 0.5, mir_5 > 0.7, hdr_0 > 0.2, hdr_5 < 0.15, nc1_5 < nc1_0 / 3) == (True,) * 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_demo_stops_what_it_started(tmp_path: Path, number: signal.Signals) -> None:
    """A signal in the middle of the training leaves no service behind."""
    with demo(tmp_path, "--epochs", "5000") as process:
        read_until(process, "listens on")
        time.sleep(1)
        assert started_for(tmp_path)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert not started_for(tmp_path)


@pytest.mark.slow
def test_service_that_does_not_start_is_shown(tmp_path: Path) -> None:
    """The demo fails with what the service said on its stderr."""
    with demo(tmp_path, INTERPLAY_DEVICE="abacus") as process:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "abacus" in stderr
        assert "The demo failed: the service ended with exit code 2" in stderr
        assert not started_for(tmp_path)


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--bogus"]], ids=" ".join)
def test_usage(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be run is refused before anything starts."""
    monkeypatch.setattr(sys, "argv", ["digits", "--data-dir", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())

"""The phenomena's examples: each runs as people run it, short, against a real service; their parts do what they say."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from analysis.sweeps.pruning import knee
from examples.experiment import Experiment, mean_and_error
from examples.grokking import Addition, P, sums
from examples.semisupervised import choose, much_changed, train
from examples.training import Recipe, Training, load
from interplay import Client
from tests.services import Service

ROOT = Path(__file__).parents[2]
SMALL = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 16, 10], "norm": "batch"}}


Tables = list[list[list[str]]]
Quick = Callable[[str], Tables]


@pytest.fixture
def quick(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Quick:
    """Runs an example, short; gives the tables that it prints, and its pictures go to `tmp_path / "pictures"`."""

    def run(example: str) -> Tables:
        (output := tmp_path / "pictures").mkdir()
        with Client(service.url) as client:
            import_module(f"examples.{example}").run(Experiment(client, tmp_path, output, quick=True))
        return tables(capsys.readouterr().out)

    return run


def tables(printed: str) -> Tables:
    """Rows of cells, titles first, without the rules between them."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", printed, flags=re.MULTILINE)
    found = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    for table in found:
        assert all(re.fullmatch("-+:", cell) for cell in table.pop(1))
        assert {len(row) for row in table} == {len(table[0])}
    return found


def column(table: list[list[str]], name: str) -> list[float]:
    """A column's numbers, without their standard errors."""
    place = table[0].index(name)
    return [float(row[place].split()[0]) for row in table[1:]]


def test_dynamics_are_one_command(service: Service, tmp_path: Path) -> None:
    """As people type it: MIR rises and HDR falls over three epochs, and what is left to the optimum is said."""
    output = tmp_path / "pictures"
    command = [sys.executable, "-m", "examples.dynamics", "--quick", "--url", service.url, "--output", str(output)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    points, summary = tables(ended.stdout)
    assert [row[0] for row in points[1:]] == ["0", "1", "2", "3"]
    for split in ("train", "test"):
        assert column(points, f"{split} MIR")[-1] > column(points, f"{split} MIR")[0] + 0.2
        assert column(points, f"{split} HDR")[-1] < column(points, f"{split} HDR")[0]
    left = column(summary, "optimum of MIR")[0] - column(points, "train MIR")[-1]
    assert column(summary, "distance MIR")[0] == pytest.approx(left, abs=2e-4)
    assert (output / "dynamics.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_connectivity_compares_paths(quick: Quick, tmp_path: Path) -> None:
    """One row for each number of shared epochs and one for another start, whose path is not connected."""
    paths, middles, errors, losses = quick("connectivity")
    for table in (paths, middles, errors, losses):
        assert [row[0] for row in table[1:]] == ["0", "1", "other start"]
    assert paths[-1][paths[0].index("connected")] == "no"
    assert column(errors, "as it is") == column(paths, "error barrier")
    assert column(losses, "as it is") == column(paths, "loss barrier")
    assert column(errors, "aligned, recalibrated")[-1] < column(errors, "as it is")[-1]
    names = {"none-shared", "other-start", "other-start-aligned", "barriers"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"connectivity-{name}.svg" for name in names}


@pytest.mark.slow
def test_smoothing_costs_cross_entropy(quick: Quick, tmp_path: Path) -> None:
    """Trained towards smoothed targets a network is less sure of them, so its cross-entropy is higher."""
    tables = quick("smoothing")
    assert len(tables) == 2
    for table in tables:
        assert [row[0] for row in table[1:]] == ["0", "0.1"]
    without, smoothed = column(tables[0], "cross-entropy")
    assert smoothed > without
    assert (tmp_path / "pictures" / "smoothing.svg").exists()


@pytest.mark.slow
def test_pruning_names_its_knees(quick: Quick, tmp_path: Path) -> None:
    """A table for each scope, whose knees are those of its accuracies."""
    tables = quick("pruning")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"pruning-global.svg", "pruning-layerwise.svg"}
    for table in tables:
        accuracies = column(table, "train accuracy")
        assert knee(column(table, "sparsity"), accuracies) in column(table, "sparsity")


@pytest.mark.slow
def test_grokking_sees_both_halves(quick: Quick, tmp_path: Path) -> None:
    """After ten steps something of the training half is learnt and nothing of the other."""
    points, _ = quick("grokking")
    assert column(points, "train accuracy")[-1] > 0.1
    assert column(points, "test accuracy")[-1] < 0.05
    assert (tmp_path / "pictures" / "grokking.svg").exists()


@pytest.mark.slow
def test_loss_is_compared_seed_by_seed(quick: Quick, tmp_path: Path) -> None:
    """Both methods without and with the loss, gains only where there is something to compare with."""
    [table] = quick("semisupervised")
    assert [row[1:3] for row in table[1:]] == [
        [method, loss] for method in ("supervised", "pseudo-labels") for loss in ("without", "with")
    ]
    gains = [row[4] for row in table[1:]]
    assert (gains[0], gains[2]) == ("-", "-")
    accuracies = column(table, "test accuracy")
    assert float(gains[1].split()[0]) == pytest.approx(accuracies[1] - accuracies[0], abs=2e-4)


def test_a_run_that_takes_over_goes_on_alike() -> None:
    """With the same order to come two runs end in the same weights; with another order they do not."""
    digits = load()
    first, order = Training(digits, SMALL, Recipe(3)), torch.Generator().manual_seed(7)
    first.run_epoch()
    branches = [Training(digits, SMALL, Recipe(3), seed=9, order=7).take_over(first) for _ in range(2)]
    other = Training(digits, SMALL, Recipe(3), order=8).take_over(first)
    first._shuffling.set_state(order.get_state())
    for training in (first, *branches, other):
        training.run_epoch()
    states = [training.network.state_dict() for training in (first, *branches, other)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert torch.equal(tensor, states[2][name]), name
    assert not torch.equal(states[0]["head.weight"], states[3]["head.weight"])


def test_embeddings_merged_into_a_layer_compute_the_same() -> None:
    """The checkpoint's network gives the logits of the one that was trained."""
    torch.manual_seed(0)
    network, pairs = Addition(), sums().pairs
    one_hot = torch.nn.functional.one_hot(pairs, P).flatten(1).float()
    with torch.no_grad():
        torch.testing.assert_close(network.merged()(one_hot), network(pairs), rtol=0, atol=1e-5)


def test_sums_are_right_and_halved() -> None:
    """Every pair once, its sum mod 59, half of the pairs for training."""
    data = sums()
    assert len({tuple(pair) for pair in data.pairs.tolist()}) == P * P
    assert all(label == (a + b) % P for (a, b), label in zip(data.pairs.tolist(), data.labels.tolist(), strict=True))
    assert int((data.split == 0).sum()) == P * P // 2


def test_labels_are_chosen_evenly_and_images_shifted_whole() -> None:
    """So many rows of each class; without noise a shifted image is found at one of nine places."""
    digits, generator = load(), torch.Generator().manual_seed(0)
    rows = choose(digits.train_labels, 4, generator)
    assert torch.bincount(digits.train_labels[rows]).tolist() == [4] * 10
    image = digits.train_inputs[:1]
    changed = much_changed(image.expand(50, -1), generator).view(-1, 8, 8)
    padded = torch.nn.functional.pad(image.view(1, 8, 8), (1, 1, 1, 1), value=float(image.min()))[0]
    places = torch.stack([padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    nearest = (changed[:, None] - places).square().mean((2, 3)).min(1)
    assert nearest.values.sqrt().max() < 0.45  # noise of 0.3
    assert set(nearest.indices.tolist()) == set(range(9))


def test_training_with_few_labels_is_the_seeds() -> None:
    """The same seed gives the same network, another seed another."""
    digits = load()
    networks = [train(digits, 2, seed, 3, pseudo=True, interplay=True).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(networks[0]["head.weight"], networks[1]["head.weight"])
    assert not torch.equal(networks[0]["head.weight"], networks[2]["head.weight"])


def test_mean_and_error_by_hand() -> None:
    """Three values, their mean and standard error; one value has none."""
    assert mean_and_error([1.0, 2.0, 4.0]) == f"2.3333 ± {math.sqrt((16 + 1 + 25) / 9 / 2) / math.sqrt(3):.4f}"
    assert mean_and_error([0.5]) == "0.5000"

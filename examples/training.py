"""Real data and reproducible training: scikit-learn's digits, and networks trained on them from fixed seeds."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy

from analysis.networks import loading

N_TEST = 360
MOMENTUM = 0.9


@dataclass(frozen=True)
class Digits:
    """8 x 8 scans as rows of 64 grey levels, 0 to 16, and the shift and scale to inputs of mean 0 and deviation 1."""

    pixels: Tensor
    labels: Tensor
    split: Tensor
    preprocess: dict[str, float]

    @property
    def train_inputs(self) -> Tensor:
        """The network's inputs for the training samples: the same arithmetic as the service's."""
        scaled = self.pixels[self.split == 0].float() * self.preprocess["scale"]
        return (scaled - self.preprocess["mean"]) / self.preprocess["std"]

    @property
    def train_labels(self) -> Tensor:
        """The labels of the training samples."""
        return self.labels[self.split == 0]


def load() -> Digits:
    """Load scikit-learn's digits, 1,437 to train on and 360 to test on, each class in proportion."""
    pixels, labels = load_digits(return_X_y=True)
    _, test = train_test_split(np.arange(len(labels)), test_size=N_TEST, stratify=labels, random_state=0)
    split = torch.zeros(len(labels), dtype=torch.uint8)
    split[test] = 1
    grey = torch.from_numpy(pixels).to(torch.uint8)
    # One mean and deviation for all pixels: pixels at the rim never change, so some have a deviation of zero.
    scaled = grey[split == 0].double() / 16
    preprocess = {"scale": 1 / 16, "mean": scaled.mean().item(), "std": scaled.std().item()}
    return Digits(grey, torch.from_numpy(labels), split, preprocess)


def save_probe(digits: Digits, path: Path) -> Path:
    """Write both splits as one probe dataset."""
    tensors = {"inputs": digits.pixels, "labels": digits.labels, "split": digits.split}
    safetensors.torch.save_file(tensors, path)
    return path


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training.

    Attributes:
        epochs: length of the schedule.
        learning_rate: initial learning rate.
        weight_decay: of all parameters.
        batch_size: samples a step.
        label_smoothing: share of the target that is spread evenly over all classes.
    """

    epochs: int
    learning_rate: float = 0.1
    weight_decay: float = 2e-3
    batch_size: int = 64
    label_smoothing: float = 0.0


class Training:
    """SGD with momentum and a cosine schedule, on the training digits, on one thread, from fixed seeds.

    Args:
        digits: the data.
        architecture: as `loading.build` takes it.
        recipe: the hyperparameters.
        seed: of the initialisation.
        order: seed of the order of the samples.
    """

    def __init__(
        self, digits: Digits, architecture: Mapping[str, Any], recipe: Recipe, *, seed: int = 0, order: int = 0
    ) -> None:
        torch.set_num_threads(1)  # layers this small gain nothing from a second core, and the service needs it
        self._inputs, self._labels = digits.train_inputs, digits.train_labels
        self._recipe = recipe
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = loading.build(architecture, device="cpu")
        self._optimizer = torch.optim.SGD(
            self.network.parameters(), lr=recipe.learning_rate, momentum=MOMENTUM, weight_decay=recipe.weight_decay
        )
        steps = recipe.epochs * -(-len(self._inputs) // recipe.batch_size)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)
        self._shuffling = torch.Generator().manual_seed(order)

    def run_epoch(self) -> None:
        """Train once through the training samples, shuffled."""
        self.network.train()
        for batch in torch.split(torch.randperm(len(self._inputs), generator=self._shuffling), self._recipe.batch_size):
            self._optimizer.zero_grad()
            logits = self.network(self._inputs[batch])
            loss = cross_entropy(logits, self._labels[batch], label_smoothing=self._recipe.label_smoothing)
            torch.autograd.backward(loss)
            self._optimizer.step()
            self._schedule.step()

    def take_over(self, other: Self) -> Self:
        """Continue from the state of another training of the same network and schedule, in this one's own order."""
        self.network.load_state_dict(other.network.state_dict())
        # Loading would share the momentum, and each step of one run would change the other.
        self._optimizer.load_state_dict(deepcopy(other._optimizer.state_dict()))
        self._schedule.load_state_dict(other._schedule.state_dict())
        return self

"""The loss: digits with 2, 4 and 8 labels a class, without and with `InterplayLoss`.

    python -m examples.semisupervised [--output DIR]

Supervised on the labelled samples alone, and with pseudo-labels on the rest: a confident prediction on a weakly
augmented sample is the target for the same sample shifted and blurred (FixMatch). Five seeds each; a seed sets
labelled samples, initialisation and batches, the same without and with the loss.
"""

import sys
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from analysis.networks import loading
from examples.experiment import Experiment, interplay_of, main, mean_and_error, show
from examples.service import check_signals
from examples.training import MOMENTUM, Digits, load
from interplay import InterplayLoss

ARCHITECTURE = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 128, 128, 64, 10], "norm": "batch"}}
LABELS, SEEDS, STEPS = (2, 4, 8), 5, 400
LEARNING_RATE, WEIGHT_DECAY = 0.05, 5e-4
LABELLED_BATCH, UNLABELLED_BATCH, SURE = 64, 192, 0.95
# Chosen beforehand, independently of their effect on the test split.
MIR_WEIGHT = HDR_WEIGHT = 0.1
METHODS = tuple(product(("supervised", "pseudo-labels"), ("without", "with")))


def run(experiment: Experiment) -> None:
    """Train all, have each evaluated, show means over the seeds and the gain by the loss, seed by seed."""
    digits = load()
    labels, seeds, steps = (LABELS[:1], 2, 5) if experiment.quick else (LABELS, SEEDS, STEPS)
    probe_id = experiment.push_digits(digits)
    runs = list(product(labels, METHODS, range(seeds)))
    queued = []
    for per_class, (method, loss), seed in runs:
        network = train(digits, per_class, seed, steps, pseudo=method == "pseudo-labels", interplay=loss == "with")
        name = f"digits, {per_class} labels a class, {method}, {loss} the loss, seed {seed}"
        checkpoint_id = experiment.push_checkpoint(network, ARCHITECTURE, name)
        options = {"null_permutations": 0}
        queued.append(
            experiment.client.create_analysis(checkpoint_id=checkpoint_id, probe_id=probe_id, options=options)
        )
    splits = [report["splits"]["test"] for report in experiment.reports(queued)]
    found = dict(zip(runs, splits, strict=True))
    rows = []
    for per_class, (method, loss) in product(labels, METHODS):
        of_seeds = [found[per_class, (method, loss), seed] for seed in range(seeds)]
        before = [found[per_class, (method, "without"), seed]["accuracy"] for seed in range(seeds)]
        gains = [split["accuracy"] - earlier for split, earlier in zip(of_seeds, before, strict=True)]
        rows.append(
            [
                str(per_class),
                method,
                loss,
                mean_and_error([split["accuracy"] for split in of_seeds]),
                mean_and_error(gains) if loss == "with" else None,
                mean_and_error([interplay_of(split)["mir"] for split in of_seeds]),
                mean_and_error([interplay_of(split)["hdr"] for split in of_seeds]),
            ]
        )
    columns = ("labels a class", "method", "the loss", "test accuracy", "gain, paired", "test MIR", "test HDR")
    show(f"The loss, mean ± standard error of {seeds} seeds", columns, rows)


def train(digits: Digits, per_class: int, seed: int, steps: int, *, pseudo: bool, interplay: bool) -> nn.Module:
    """Train one network; all randomness comes from the seed."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    labelled = choose(digits.train_labels, per_class, generator)
    others = torch.tensor([row for row in range(len(digits.train_labels)) if row not in set(labelled.tolist())])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = loading.build(ARCHITECTURE, device="cpu")
    received: list[Tensor] = []
    network.get_submodule("head").register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    head = network.get_parameter("head.weight")
    criterion = InterplayLoss(MIR_WEIGHT, HDR_WEIGHT)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        check_signals()
        known = pick(labelled, LABELLED_BATCH, generator)
        unknown = pick(others, UNLABELLED_BATCH, generator)
        images = [hardly_changed(digits.train_inputs[known], generator)]
        if pseudo:
            inputs = digits.train_inputs[unknown]
            images += [hardly_changed(inputs, generator), much_changed(inputs, generator)]
        sizes = [len(part) for part in images]
        received.clear()
        outputs = torch.split(network(torch.cat(images)), sizes)
        features = torch.split(received[0], sizes)
        targets = digits.train_labels[known]
        loss = cross_entropy(outputs[0], targets)
        if interplay:
            loss = loss + criterion(features[0], head, targets)
        if pseudo:
            sure, guess = outputs[1].detach().softmax(1).max(1)
            mask = sure >= SURE
            loss = loss + (cross_entropy(outputs[2], guess, reduction="none") * mask).mean()
            if interplay:
                loss = loss + criterion(features[2], head, guess, mask)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return network


def choose(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return the given number of rows of each class."""
    rows = [torch.nonzero(labels == digit).flatten() for digit in range(10)]
    return torch.cat([of[torch.randperm(len(of), generator=generator)[:per_class]] for of in rows])


def pick(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return at most the given number of the rows, in random order."""
    return rows[torch.randperm(len(rows), generator=generator)[:most]]


def hardly_changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add a little noise."""
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def much_changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to a pixel each way, and add more noise."""
    padded = pad(images.view(-1, 8, 8), (1, 1, 1, 1), value=float(images.min()))
    shifts = torch.randint(0, 3, (len(images), 2), generator=generator)
    rows = shifts[:, :1] + torch.arange(8)
    columns = shifts[:, 1:] + torch.arange(8)
    shifted = padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.flatten(1) + 0.3 * torch.randn(images.shape, generator=generator)


if __name__ == "__main__":
    sys.exit(main("semisupervised", __doc__, run))

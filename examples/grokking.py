"""Grokking: MIR and HDR while a network memorises modular addition and, much later, generalises.

    python -m examples.grokking [--output DIR]

Learns (a + b) mod 59 from half of the pairs, full batch, AdamW with strong weight decay. Embeddings of a and b and the
hidden layer are trained separately; there is no nonlinearity between them, so the checkpoint holds their product, a
network of the family `builtin` that computes the same from one-hot inputs.
"""

import sys
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from analysis.networks import loading
from examples.experiment import Experiment, interplay_of, main, show
from examples.service import check_signals

P, EMBEDDING, HIDDEN = 59, 64, 256
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 3.0
STEPS = (0, 10, 20, 30, 40, 50, 75, *range(100, 1000, 50), *range(1000, 1501, 100))
# 59 classes whose vectors fill 256 dimensions: the exact spectra would take five times as long.
OPTIONS = {"tolerance": 1e-3}
ARCHITECTURE = {"family": "builtin", "name": "mlp", "args": {"sizes": [2 * P, HIDDEN, P]}}


class Addition(nn.Module):
    """Embeddings of both summands side by side, one hidden layer, a head of P classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(P, EMBEDDING)
        self.hidden = nn.Linear(2 * EMBEDDING, HIDDEN)
        self.head = nn.Linear(HIDDEN, P)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return logits (n, P) of pairs (n, 2)."""
        logits: Tensor = self.head(torch.relu(self.hidden(self.embedding(pairs).flatten(1))))
        return logits

    def merged(self) -> nn.Module:
        """Return the same function as a network of the two summands' one-hot codes side by side."""
        network = loading.build(ARCHITECTURE, device="cpu")
        halves = torch.split(self.hidden.weight.double(), EMBEDDING, dim=1)
        weight = torch.cat([half @ self.embedding.weight.double().T for half in halves], dim=1)
        state = {
            "layers.0.weight": weight.float(),
            "layers.0.bias": self.hidden.bias,
            "head.weight": self.head.weight,
            "head.bias": self.head.bias,
        }
        network.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
        return network


@dataclass(frozen=True)
class Sums:
    """Every pair of summands, its sum mod P, and which half it belongs to (0 train, 1 test)."""

    pairs: Tensor
    labels: Tensor
    split: Tensor


def sums() -> Sums:
    """Return all P x P pairs, half of them for training, chosen by a fixed seed."""
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    split = torch.zeros(len(pairs), dtype=torch.uint8)
    split[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[len(pairs) // 2 :]] = 1
    return Sums(pairs, pairs.sum(1) % P, split)


def run(experiment: Experiment) -> None:
    """Train, push checkpoints during training, analyse the series, show it."""
    data, steps = sums(), STEPS[:2] if experiment.quick else STEPS
    path = experiment.files / "sums.safetensors"
    one_hot = nn.functional.one_hot(data.pairs, P).flatten(1).to(torch.uint8)
    safetensors.torch.save_file({"inputs": one_hot, "labels": data.labels, "split": data.split}, path)
    probe_id = experiment.client.push_probe(path, name=f"sums mod {P}")["id"]
    checkpoints = train(experiment, data, steps)
    [report] = experiment.reports(
        [experiment.client.create_series("step", checkpoints, probe_id=probe_id, options=OPTIONS)]
    )
    rows = []
    for point in report["points"]:
        row: list[str | float | None] = [f"{point['x']:g}"]
        for split in ("train", "test"):
            found = point["splits"][split]
            measured = interplay_of(found)
            raw = interplay_of(found, "none")
            row += [
                found["accuracy"],
                measured["mir"],
                measured["hdr"],
                raw["mir"],
                raw["hdr"],
                found["collapse"]["nc1"],
            ]
        rows.append(row)
    names = ("accuracy", "MIR", "HDR", "raw MIR", "raw HDR", "NC1")
    show("Grokking", ("step", *(f"{split} {name}" for split in ("train", "test") for name in names)), rows)
    summary = report["summary"]
    places = ("train_at", "test_at", "delay")
    came = {key: None if (x := summary["generalisation"][key]) is None else f"{x:g}" for key in places}
    show(
        "When each half was learnt (accuracy 0.99), and how MIR and HDR go with accuracy",
        ("split", "learnt at step", "Spearman MIR, accuracy", "Spearman HDR, accuracy"),
        [
            (
                split,
                came[f"{split}_at"],
                summary["splits"][split]["spearman_mir_accuracy"],
                summary["splits"][split]["spearman_hdr_accuracy"],
            )
            for split in ("train", "test")
        ],
    )
    experiment.save_chart(report, "grokking")


def train(experiment: Experiment, data: Sums, steps: tuple[int, ...]) -> dict[int, str]:
    """Train; return checkpoint ids by step."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Addition()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    pairs, labels = data.pairs[data.split == 0], data.labels[data.split == 0]
    checkpoints = {}
    for step in range(max(steps) + 1):
        check_signals()
        if step in steps:
            checkpoints[step] = experiment.push_checkpoint(network.merged(), ARCHITECTURE, f"sums, step {step}")
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(network(pairs), labels))
        optimizer.step()
    return checkpoints


if __name__ == "__main__":
    sys.exit(main("grokking", __doc__, run))

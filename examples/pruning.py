"""Pruning: the effect of magnitude pruning on a trained network, sparsity by sparsity.

    python -m examples.pruning [--output DIR]

The demo's network after its training; one sweep with one threshold for all weights, one layer by layer.
"""

import sys

from examples.digits import ARCHITECTURE
from examples.experiment import Experiment, interplay_of, main, show
from examples.training import Recipe, Training, load

EPOCHS = 200
SPARSITIES = [0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99]


def run(experiment: Experiment) -> None:
    """Train, run the sweeps, show the results."""
    digits, epochs = load(), 2 if experiment.quick else EPOCHS
    probe_id = experiment.push_digits(digits)
    training = Training(digits, ARCHITECTURE, Recipe(epochs))
    for _ in range(epochs):
        training.run_epoch()
    checkpoint_id = experiment.push_checkpoint(training.network, ARCHITECTURE, f"digits, epoch {epochs}")
    scopes = ("global", "layerwise")
    sparsities = SPARSITIES[:3] if experiment.quick else SPARSITIES
    queued = [
        experiment.client.create_pruning(
            checkpoint_id, probe_id=probe_id, options={"sparsities": sparsities, "scope": scope}
        )
        for scope in scopes
    ]
    for scope, report in zip(scopes, experiment.reports(queued), strict=True):
        rows = []
        for point in report["points"]:
            row: list[str | float | None] = [f"{point['sparsity']:g}"]
            for split in ("train", "test"):
                measured = interplay_of(point["splits"][split])
                row += [point["splits"][split]["accuracy"], measured["mir"], measured["hdr"]]
            rows.append([*row, point["splits"]["train"]["collapse"]["nc1"]])
        columns = (
            "sparsity",
            *(f"{split} {what}" for split in ("train", "test") for what in ("accuracy", "MIR", "HDR")),
        )
        knees = {split: found["knee"] for split, found in report["summary"]["splits"].items()}
        about = ", ".join(f"{split} {knees[split]:g}" for split in ("train", "test"))
        show(f"Pruning, {scope}; knees: {about}", (*columns, "train NC1"), rows)
        experiment.save_chart(report, f"pruning-{scope}")


if __name__ == "__main__":
    sys.exit(main("pruning", __doc__, run))

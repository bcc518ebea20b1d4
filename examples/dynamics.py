"""Training dynamics: MIR climbs towards its optimum and HDR falls towards 0 on the training samples.

    python -m examples.dynamics [--output DIR]

The demo's network, checkpoints from epoch 0 to 200, and one analysis of the kind `series` over all of them.
"""

import sys

from examples.digits import ARCHITECTURE, checkpoint_epochs
from examples.experiment import Experiment, interplay_of, main, show
from examples.training import Recipe, Training, load

NAMES = ("accuracy", "MIR", "HDR", "raw MIR", "raw HDR")


def run(experiment: Experiment) -> None:
    """Train, push checkpoints during training, analyse the series, show it."""
    digits, epochs = load(), 3 if experiment.quick else 200
    probe_id = experiment.push_digits(digits)
    training, checkpoints = Training(digits, ARCHITECTURE, Recipe(epochs)), {}
    for epoch in range(epochs + 1):
        if epoch:
            training.run_epoch()
        if epoch in checkpoint_epochs(epochs):
            name = f"digits, epoch {epoch}"
            checkpoints[epoch] = experiment.push_checkpoint(training.network, ARCHITECTURE, name)
    [report] = experiment.reports([experiment.client.create_series("epoch", checkpoints, probe_id=probe_id)])
    columns = ("epoch", *(f"{split} {name}" for split in ("train", "test") for name in NAMES))
    rows = []
    for point in report["points"]:
        row: list[str | float | None] = [f"{point['x']:g}"]
        for split in ("train", "test"):
            found = point["splits"][split]
            measured, raw = interplay_of(found), interplay_of(found, "none")
            row += [found["accuracy"], measured["mir"], measured["hdr"], raw["mir"], raw["hdr"]]
        rows.append(row)
    show("Training dynamics", columns, rows)
    summaries, last = report["summary"]["splits"], report["points"][-1]["splits"]
    show(
        "How MIR and HDR go with accuracy, and how far they end from the optimum",
        ("split", "Spearman MIR, accuracy", "Spearman HDR, accuracy", "optimum of MIR", "distance MIR", "distance HDR"),
        [
            (
                split,
                summaries[split]["spearman_mir_accuracy"],
                summaries[split]["spearman_hdr_accuracy"],
                interplay_of(last[split])["optimum"]["mir"],
                summaries[split]["mir_distance"][-1],
                summaries[split]["hdr_distance"][-1],
            )
            for split in ("train", "test")
        ],
    )
    experiment.save_chart(report, "dynamics")


if __name__ == "__main__":
    sys.exit(main("dynamics", __doc__, run))

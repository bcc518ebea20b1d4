"""Label smoothing: MIR, HDR, accuracy and calibration of networks trained with 0 to half of the target smoothed.

    python -m examples.smoothing [--output DIR]

Five seeds for each smoothing; for each seed one analysis of the kind `series` along the smoothing.
"""

import sys

from examples.experiment import Experiment, interplay_of, main, mean_and_error, show
from examples.training import Recipe, Training, load

ARCHITECTURE = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 128, 128, 64, 10], "norm": "batch"}}
EPOCHS, SEEDS, SMOOTHINGS = 60, 5, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def run(experiment: Experiment) -> None:
    """Train, analyse a series for each seed, show means over the seeds."""
    digits = load()
    epochs, seeds, smoothings = (2, 1, SMOOTHINGS[:2]) if experiment.quick else (EPOCHS, SEEDS, SMOOTHINGS)
    probe_id = experiment.push_digits(digits)
    queued = []
    for seed in range(seeds):
        checkpoints = {}
        for smoothing in smoothings:
            training = Training(digits, ARCHITECTURE, Recipe(epochs, label_smoothing=smoothing), seed=seed, order=seed)
            for _ in range(epochs):
                training.run_epoch()
            name = f"digits, smoothing {smoothing:g}, seed {seed}"
            checkpoints[smoothing] = experiment.push_checkpoint(training.network, ARCHITECTURE, name)
        queued.append(experiment.client.create_series("label_smoothing", checkpoints, probe_id=probe_id))
    reports = experiment.reports(queued)
    for split in ("train", "test"):
        rows = []
        for position, smoothing in enumerate(smoothings):
            of_seeds = [report["points"][position]["splits"][split] for report in reports]
            columns = [
                [found["accuracy"] for found in of_seeds],
                [interplay_of(found)["mir"] for found in of_seeds],
                [interplay_of(found)["hdr"] for found in of_seeds],
                [interplay_of(found, "none")["mir"] for found in of_seeds],
                [interplay_of(found, "none")["hdr"] for found in of_seeds],
                [found["loss"] for found in of_seeds],
                [found["calibration_error"] for found in of_seeds],
                [found["collapse"]["nc1"] for found in of_seeds],
            ]
            rows.append([f"{smoothing:g}", *(mean_and_error(values) for values in columns)])
        titles = (
            "smoothing",
            "accuracy",
            "MIR",
            "HDR",
            "raw MIR",
            "raw HDR",
            "cross-entropy",
            "calibration error",
            "NC1",
        )
        show(f"Label smoothing, {split} split, mean ± standard error of {seeds} seeds", titles, rows)
    experiment.save_chart(reports[0], "smoothing")


if __name__ == "__main__":
    sys.exit(main("smoothing", __doc__, run))

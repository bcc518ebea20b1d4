"""Linear mode connectivity: how long two runs must share their training before a straight line connects them.

    python -m examples.connectivity [--output DIR]

A run on digits, and others that share its first k epochs and then see the samples in another order; one more starts
from another initialisation. Each is an end of a path from the first run, taken as it is, with recalibrated batch
normalisation, with weight matching, and with both.
"""

import sys
from itertools import product

import altair as alt

from examples.experiment import Body, Experiment, interplay_of, main, show
from examples.training import Recipe, Training, load

ARCHITECTURE = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, *[64] * 8, 10], "norm": "batch"}}
# High enough that two orders of the same samples diverge early in training.
LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE = 0.5, 1e-4, 32
EPOCHS, SHARED, POINTS = 30, (0, 1, 2, 3, 5, 10, 20), 25
FIRST, OTHER = "first run", "other start"
VARIANTS = {
    "as it is": {},
    "recalibrated": {"normalisation": "recalibrate"},
    "aligned": {"alignment": "weight_matching"},
    "aligned, recalibrated": {"normalisation": "recalibrate", "alignment": "weight_matching"},
}
Reports = dict[tuple[str, str], Body]


def run(experiment: Experiment) -> None:
    """Train the runs, queue a path from the first to each in every variant, show them."""
    epochs, shared, points = (3, (0, 1), 5) if experiment.quick else (EPOCHS, SHARED, POINTS)
    probe_id = experiment.push_digits(load())
    ends = train(experiment, epochs, shared)
    first_id = ends.pop(FIRST)
    common = {"grid": {"points": points}, "null_permutations": 0}
    paths = list(product(ends, VARIANTS))
    queued = [
        experiment.client.create_path(first_id, ends[end], probe_id=probe_id, options={**common, **VARIANTS[variant]})
        for end, variant in paths
    ]
    reports = dict(zip(paths, experiment.reports(queued), strict=True))
    show_paths_as_they_are(reports, list(ends))
    for measure in ("error", "loss"):
        rows = [[end, *(barrier(reports[end, variant], measure) for variant in VARIANTS)] for end in ends]
        show(f"Barrier of the {measure}, train split", ("shared epochs", *VARIANTS), rows)
    for end, name in ((str(shared[0]), "none-shared"), (OTHER, "other-start")):
        experiment.save_chart(reports[end, "as it is"], f"connectivity-{name}")
    experiment.save_chart(reports[OTHER, "aligned, recalibrated"], "connectivity-other-start-aligned")
    experiment.draw(barriers_chart(reports, [str(k) for k in shared]), "connectivity-barriers")


def train(experiment: Experiment, epochs: int, shared: tuple[int, ...]) -> dict[str, str]:
    """Return checkpoint ids: the first run's, those of runs that share k of its epochs, and one from another start."""
    digits = load()

    def training(*, seed: int = 0, order: int = 0) -> Training:
        recipe = Recipe(epochs, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, batch_size=BATCH_SIZE)
        return Training(digits, ARCHITECTURE, recipe, seed=seed, order=order)

    runs = {FIRST: training(), OTHER: training(seed=1, order=1)}
    for epoch in range(epochs):
        if epoch in shared:
            runs[str(epoch)] = training(order=1 + epoch).take_over(runs[FIRST])
        for each in runs.values():
            each.run_epoch()
    ids = {
        name: experiment.push_checkpoint(
            ended.network, ARCHITECTURE, name if name in (FIRST, OTHER) else f"{name} epochs shared"
        )
        for name, ended in runs.items()
    }
    return {name: ids[name] for name in (FIRST, *map(str, shared), OTHER)}


def show_paths_as_they_are(reports: Reports, ends: list[str]) -> None:
    """Show the barriers of each path, then its first end and its middle."""
    barriers, middles = [], []
    for end in ends:
        report = reports[end, "as it is"]
        found, by_w = report["summary"]["splits"]["train"], {point["w"]: point["splits"] for point in report["points"]}
        row: list[str | float | None] = [end]
        row += [barrier(report, measure) for measure in ("loss", "error", "mir", "hdr")]
        row += [f"{found['error_barrier']['at']:.2f}", "yes" if found["connected"] else "no"]
        barriers.append([*row, report["summary"]["l2_distance"]])
        row = [end]
        for w in (0.0, 0.5):
            split = by_w[w]["train"]
            row += [split["accuracy"], *(interplay_of(split)[name] for name in ("mir", "hdr"))]
            row += [interplay_of(split, "none")[name] for name in ("mir", "hdr")]
        middles.append(row)
    measures = (f"{measure} barrier" for measure in ("loss", "error", "MIR", "HDR"))
    columns = ("shared epochs", *measures, "error's peak at", "connected", "L2 distance")
    show("The paths as they are, train split", columns, barriers)
    names = ("accuracy", "MIR", "HDR", "raw MIR", "raw HDR")
    columns = ("shared epochs", *(f"{name}, w = {w}" for w in ("0", "0.5") for name in names))
    show("Their first end and their middle, train split", columns, middles)


def barrier(report: Body, measure: str) -> float | None:
    """Return how far the path rises over its reference (MIR: falls under it), on the train split."""
    found = report["summary"]["splits"]["train"][f"{measure}_barrier"]
    return None if found is None else float(found["value"])


def barriers_chart(reports: Reports, shared: list[str]) -> alt.Chart:
    """Draw the barrier of the error against k."""
    rows = [
        {"k": int(k), "barrier": barrier(reports[k, variant], "error"), "path": variant}
        for k in shared
        for variant in VARIANTS
    ]
    base = alt.Chart(alt.InlineData(values=rows), width=420, height=240, title="Error barrier on the train split")
    chart: alt.Chart = base.mark_line(point=True).encode(
        x=alt.X("k:Q", title="epochs shared", scale=alt.Scale(type="sqrt"), axis=alt.Axis(values=[*map(int, shared)])),
        y=alt.Y("barrier:Q", title="error barrier"),
        color=alt.Color("path:N", sort=list(VARIANTS), title=None),
    )
    return chart


if __name__ == "__main__":
    sys.exit(main("connectivity", __doc__, run))

"""What pages call the metrics, what each is in a sentence, and what a report says; docs/metrics.md defines them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.pages.rendering import number, percent, place


@dataclass(frozen=True)
class Metric:
    """A metric as pages name it.

    Attributes:
        label: as tables have it.
        meaning: one sentence.
        anchor: heading of docs/metrics.md that defines it.
        share: whether it is shown as a percentage.
    """

    label: str
    meaning: str
    anchor: str
    share: bool = False


# Predictions stand beside the collapse there.
_MIR, _COLLAPSE = "matrix-information", "neural-collapse"
#: By the last part of a metric's path.
METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("Accuracy", "Share of samples whose class the network predicts.", _COLLAPSE, share=True),
    "loss": Metric("Loss", "Mean cross-entropy of the samples' classes, in nats.", _COLLAPSE),
    "calibration_error": Metric(
        "Calibration error", "Expected calibration error over 15 bins of the top probability.", _COLLAPSE
    ),
    "effective_rank": Metric(
        "Effective rank",
        "exp of the matrix entropy of the globally centred features: how many directions they use.",
        _MIR,
    ),
    "mir": Metric(
        "MIR", "Mutual information of features and head rows over the smaller of their matrix entropies, 0 to 1.", _MIR
    ),
    "hdr": Metric(
        "HDR", "Absolute difference of the matrix entropies of features and head rows over the larger, 0 to 1.", _MIR
    ),
    "distance_to_optimum.mir": Metric("MIR to optimum", "Distance of MIR to its value at neural collapse.", _MIR),
    "distance_to_optimum.hdr": Metric("HDR to optimum", "Distance of HDR to its value at neural collapse.", _MIR),
    "mir_z": Metric("z of MIR", "MIR less the mean of its permutation baseline, in standard deviations of that.", _MIR),
    "entropy_features": Metric("H(features)", "Matrix entropy of the features' Gram matrix, in nats.", _MIR),
    "entropy_head": Metric("H(head)", "Matrix entropy of the Gram matrix of the samples' head rows, in nats.", _MIR),
    "entropy_joint": Metric("H(joint)", "Matrix entropy of the elementwise product of both, in nats.", _MIR),
    "mutual_information": Metric("Mutual information", "H(features) + H(head) - H(joint), in nats.", _MIR),
    "nc1": Metric("NC1", "Variability within classes over that between class means; 0 at collapse.", _COLLAPSE),
    "nc1_condition": Metric("NC1 condition", "Condition number of the covariance between classes.", _COLLAPSE),
    "nc2_equinorm_means": Metric(
        "NC2 equinorm, means", "Spread of the norms of class means; 0 at collapse.", _COLLAPSE
    ),
    "nc2_equinorm_head": Metric("NC2 equinorm, head", "Spread of the norms of head rows; 0 at collapse.", _COLLAPSE),
    "nc2_equiangularity_means": Metric(
        "NC2 equiangularity, means", "Spread of the cosines between class means; 0 at collapse.", _COLLAPSE
    ),
    "nc2_equiangularity_head": Metric(
        "NC2 equiangularity, head", "Spread of the cosines between head rows; 0 at collapse.", _COLLAPSE
    ),
    "nc2_max_angle_means": Metric(
        "NC2 maximal angle, means", "How far the cosines between class means are from -1 / (C - 1).", _COLLAPSE
    ),
    "nc2_max_angle_head": Metric(
        "NC2 maximal angle, head", "How far the cosines between head rows are from -1 / (C - 1).", _COLLAPSE
    ),
    "nc3": Metric("NC3", "Squared distance between head and class means, both of norm 1; 0 at collapse.", _COLLAPSE),
    "nc4": Metric("NC4", "Share of samples for which network and nearest class mean predict differently.", _COLLAPSE),
}


def metric_of(path: str) -> Metric | None:
    """Return the metric at the end of a path; None if pages have no words for it."""
    parts = path.split(".")
    return METRICS.get(".".join(parts[-2:])) or METRICS.get(parts[-1])


def first_split(splits: Mapping[str, Any]) -> str:
    """Return the split that is read first: the test split, if there is one."""
    return next(name for name in ("test", "all", *splits) if name in splits)


def evaluation_in_sentences(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader of an evaluation asks first, as sentences."""
    name = first_split(report["splits"])
    split = report["splits"][name]
    values, collapse = split["interplay"]["sample"]["global"], split["collapse"]
    return [
        _predictions(split, name),
        *_mir(values),
        *_collapse(collapse),
        *_classes(split, class_names(report)),
    ]


def _predictions(split: Mapping[str, Any], name: str) -> str:
    where = "all samples" if name == "all" else f"the {name} split"
    present = sum(1 for count in split["class_counts"] if count)
    text = (
        f"On {where} ({split['n_samples']:,} samples of {present:,} classes) accuracy is {percent(split['accuracy'])}"
    )
    text += f", the mean cross-entropy {number(split['loss'])}"
    if split["calibration_error"] is not None:
        text += f" and the calibration error {number(split['calibration_error'])}"
    return f"{text}."


def _mir(values: Mapping[str, Any]) -> list[str]:
    if values["mir"] is None:
        return ["MIR is undefined here; the table of MIR and HDR says why."]
    best = values["optimum"]["mir"]
    text = f"MIR is {number(values['mir'])}"
    if best is not None:
        reachable = "" if values["optimum"]["reachable"] else ", which so few features cannot reach"
        text += f"; neural collapse would give {number(best)}{reachable}"
    null = values["null"]
    if null is None:
        text += ". Without a permutation baseline it is unknown how much of it is chance."
    elif values["mir_z"] is None:
        text += f". The permutation baseline is {number(null['mean'])}, without spread."
    else:
        beyond = (
            "far beyond chance" if values["mir_z"] > 10 else "beyond chance" if values["mir_z"] > 3 else "like chance"
        )
        text += f". Under permuted classes it is {number(null['mean'])} ± {number(null['std'])}: {beyond}"
        text += f" (z = {number(values['mir_z'], 1)})."
    sentences = [text]
    if values["hdr"] is not None:
        sentences.append(
            f"HDR is {number(values['hdr'])}; neural collapse would give {number(values['optimum']['hdr'])}."
        )
    return sentences


def _collapse(collapse: Mapping[str, Any]) -> list[str]:
    if collapse["nc1"] is None:
        return []
    text = f"NC1 is {number(collapse['nc1'])} (0 where classes have collapsed to points)"
    if collapse["nc4"] is not None:
        text += f"; the nearest class mean disagrees with the network on {percent(collapse['nc4'])} of the samples"
    return [f"{text}."]


def _classes(split: Mapping[str, Any], names: list[str] | None) -> list[str]:
    found = split.get("by_class")
    if found is None:
        return []
    known = [(accuracy, label) for label, accuracy in enumerate(found["accuracy"]) if accuracy is not None]
    if len(known) < 2:
        return []
    worst, label = min(known)
    if worst == 1:
        return ["Every class is predicted without an error."]
    text = f"Class {class_name(label, names)} is recognised least, with {percent(worst)}"
    own = [entry for entry in found["confusions"] if entry["label"] == label and entry["predicted"] is not None]
    if own:
        other, n = own[0]["predicted"], own[0]["n_samples"]
        text += f"; most often ({n:,} of {split['class_counts'][label]:,}) it is taken for {class_name(other, names)}"
    return [f"{text}."]


def class_names(report: Mapping[str, Any]) -> list[str] | None:
    """Return the names of an evaluation's classes: of a language model, its tokens' ids; None where they have none."""
    tokens = report["probe"].get("next_tokens")
    if tokens is not None:
        return [f"token {id_}" for id_ in tokens["token_ids"]]
    names: list[str] | None = report["probe"].get("class_names")
    return names


def class_name(label: int, names: list[str] | None) -> str:
    """Return a class's name, or its number where the probe has no names."""
    return names[label] if names is not None and label < len(names) else str(label)


#: Metrics whose differences a reader looks at first, by path in a split.
COMPARED = (
    "accuracy",
    "loss",
    "calibration_error",
    "interplay.sample.global.mir",
    "interplay.sample.global.hdr",
    "interplay.sample.global.distance_to_optimum.mir",
    "effective_rank",
    "collapse.nc1",
    "collapse.nc3",
    "collapse.nc4",
)


def comparison_in_sentences(report: Mapping[str, Any]) -> list[str]:
    """Return how two checkpoints differ, as sentences: first where their intervals say so."""
    name = first_split(report["splits"])
    split = report["splits"][name]
    a, b = (subject["name"] for subject in report["subjects"])
    where = "all samples" if name == "all" else f"the {name} split"
    found = [(path, split["differences"].get(path)) for path in COMPARED]
    differ = [_difference(path, one) for path, one in found if one and one["significant"]]
    alike = [_label(path) for path, one in found if one and one["significant"] is False]
    sentences = [f"A is {a}, B is {b}; differences are B - A, on {where} ({split['a']['n_samples']:,} samples)."]
    if differ:
        sentences.append(f"They differ in {', '.join(differ)}.")
    if alike:
        sentences.append(f"No difference is shown in {', '.join(alike)}.")
    unknown = [_label(path) for path, one in found if one and one["significant"] is None]
    if unknown:
        sentences.append(f"No interval is known of the difference in {', '.join(unknown)}; the table says why.")
    predictions = split["predictions"]
    sentences.append(
        f"They predict the same class for {percent(predictions['agreement'])} of the samples; A alone is right on "
        f"{predictions['only_a_correct']:,}, B alone on {predictions['only_b_correct']:,} (McNemar's exact test: p = "
        f"{number(predictions['mcnemar_p'])})."
    )
    return sentences


def _label(path: str) -> str:
    metric = metric_of(path)
    return metric.label if metric else path


def _difference(path: str, found: Mapping[str, Any]) -> str:
    sign = "+" if found["difference"] > 0 else ""
    return f"{_label(path)} ({sign}{number(found['difference'])}, {number(found['low'])} to {number(found['high'])})"


def points_in_sentences(report: Mapping[str, Any]) -> list[str]:
    """Return what a path, a pruning sweep or a series shows, as sentences."""
    points, name = report["points"], first_split(report["points"][0]["splits"])
    summary = report["summary"]["splits"][name]
    where = "all samples" if name == "all" else f"the {name} split"
    match report["kind"]:
        case "path":
            return _path(report["summary"], summary, where)
        case "pruning":
            first = points[0]["splits"][name]["accuracy"]
            text = f"On {where} accuracy is {percent(first)} at sparsity {_at(points[0]['sparsity'])}"
            if summary["knee"] is not None:
                text += f" and stays within one point of the unpruned network's up to sparsity {_at(summary['knee'])}"
            return [f"{text}.", f"{report['summary']['n_prunable']:,} weights can be pruned."]
    first, last = points[0], points[-1]
    axis = report["axis"]["name"]
    before, after = (point["splits"][name] for point in (first, last))
    mirs = [split["interplay"]["sample"]["global"]["mir"] for split in (before, after)]
    sentences = [
        f"From {axis} {_at(first['x'])} to {_at(last['x'])}, on {where}, accuracy goes from "
        f"{percent(before['accuracy'])} to {percent(after['accuracy'])} and MIR from {number(mirs[0])} to "
        f"{number(mirs[1])}."
    ]
    if summary["spearman_mir_accuracy"] is not None:
        sentences.append(
            f"The rank correlation of MIR with accuracy over the {len(points)} points is "
            f"{number(summary['spearman_mir_accuracy'], 2)}."
        )
    came = report["summary"]["generalisation"]
    if came and came["delay"] is not None:
        sentences.append(
            f"Train accuracy reaches 0.99 at {axis} {_at(came['train_at'])}, test accuracy at "
            f"{_at(came['test_at'])}: a delay of {_at(came['delay'])}."
        )
    return sentences


def _at(place_: float) -> str:
    """Return a place of a sentence, to six digits; tables have all of them."""
    return place(float(f"{place_:.6g}"))


def _path(summary: Mapping[str, Any], split: Mapping[str, Any], where: str) -> list[str]:
    sentences = []
    if split["connected"] is not None:
        error = split["error_barrier"]
        words = "are linearly connected" if split["connected"] else "are not linearly connected"
        sentences.append(
            f"On {where} the two {words}: the error barrier is {number(error['value'])} at w = {_at(error['at'])} "
            "(at most 0.02 counts as connected)."
        )
    if split["loss_barrier"] is not None:
        barrier = split["loss_barrier"]
        sentences.append(f"The loss barrier is {number(barrier['value'])} nats at w = {_at(barrier['at'])}.")
    if split["mir_barrier"] is not None:
        barrier = split["mir_barrier"]
        sentences.append(f"MIR falls at most {number(barrier['value'])} under its chord, at w = {_at(barrier['at'])}.")
    if summary["alignment"] is not None:
        sentences.append("Hidden units of the second were permuted to match the first.")
    return sentences

"""Read a task's probe and build the `probe` section of its report. Runs in the child.

Tensors, images and texts all become a Probe here: subsampled if `samples` is given, with the labels in the
checkpoint's order, and with the preprocessing and the tokenizer of the probe, or else those of the checkpoint.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from analysis.errors import AnalysisError
from analysis.networks.loading import LoadedNetwork
from analysis.probes.feature_set import FeatureSet
from analysis.probes.images import open_images
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe, stratified_rows
from analysis.probes.reading import load_feature_set, load_probe
from analysis.probes.sequences import IGNORED, next_token_labels
from analysis.probes.texts import tokenise
from app.descriptions.labels import match_labels, named_labels
from app.descriptions.preprocessing import from_timm
from app.errors import ServiceError
from app.files.datafile import Dataset, Limits, open_dataset

Task = dict[str, Any]
About = dict[str, Any]

# Most threads that decode images; more are no faster than one disk.
_MOST_THREADS = 32
_NOTHING_DONE: About = dict.fromkeys(("preprocess_source", "tokenizer", "label_map", "samples", "next_tokens"))


def read_feature_set(task: Task) -> tuple[FeatureSet, About]:
    """Return the feature set of a task, and the `probe` section of its report."""
    feature_set = load_feature_set(_path(task, task["probe"]["sha256"]))
    about = {**task["probe"], **_NOTHING_DONE}
    rows = _rows(task, feature_set.labels, feature_set.split)
    if rows is None:
        return feature_set, about
    return feature_set.take(rows), {**about, "samples": _samples(task, len(rows))}


def read_probe(task: Task, network: LoadedNetwork) -> tuple[Probe, About]:
    """Return the probe of a task, and the `probe` section of its report.

    Args:
        task: as `attempts.begin` made it, with paths and limits.
        network: one of the networks that will be given it.

    Raises:
        AnalysisError: `invalid-probe`, or another refusal of the file, the preprocessing or the tokenizer.
    """
    about = {**task["probe"], **_NOTHING_DONE}
    try:
        read = _tensors if about["content"] == "tensors" else _dataset
        probe = read(task, network, about)
        if network.predicts_tokens:
            return probe, {**about, "next_tokens": _next_tokens(probe, about)}
        mapping = match_labels(about["class_names"], task["subjects"][0]["architecture"])
    except ServiceError as error:
        raise _as_analysis_error(error) from error
    about["label_map"] = {"matched": mapping.matched, "reordered": mapping.numbers is not None}
    if mapping.numbers is not None:
        labels = torch.tensor(mapping.numbers)[probe.labels]
        probe = Probe(probe.inputs, labels, probe.split, len(network.weight), probe.preprocess)
    return probe, about


def _tensors(task: Task, network: LoadedNetwork, about: About) -> Probe:
    given = about["preprocess"]
    about["preprocess_source"] = "probe" if given else None
    probe = load_probe(
        _path(task, about["sha256"]),
        format=about["format"],
        preprocess=_preprocess(given),
        n_classes=len(network.weight) if network.predicts_tokens else about["n_classes"],
        next_tokens=network.predicts_tokens,
    )
    rows = _rows(task, None if network.predicts_tokens else probe.labels, probe.split)
    if rows is None:
        return probe
    about["samples"] = _samples(task, len(rows))
    return probe.take(rows)


def _dataset(task: Task, network: LoadedNetwork, about: About) -> Probe:
    limits = Limits(**task["limits"]["dataset"])
    dataset = open_dataset(_path(task, about["sha256"]), about["format"], limits, task["file"]["columns"])
    # Labels of whole texts are ignored if tokens are predicted.
    labels = None
    if dataset.labels is not None and not network.predicts_tokens:
        labels = torch.from_numpy(named_labels(dataset.labels, dataset.class_names, about["class_names"])[0])
    split = None if dataset.split is None else torch.from_numpy(dataset.split)
    rows = _rows(task, labels, split)
    if rows is not None:
        about["samples"] = _samples(task, len(rows))
        labels, split = None if labels is None else labels[rows], None if split is None else split[rows]
    chosen = range(about["n_samples"]) if rows is None else rows.tolist()
    if dataset.content == "texts":
        inputs, n_classes = _tokens(task, network, dataset, chosen, about), about["n_classes"]
        if network.predicts_tokens:
            n_classes = len(network.weight)
            labels = next_token_labels(inputs["input_ids"], inputs["attention_mask"], n_vocabulary=n_classes)
        assert labels is not None, "a classifier's probe has labels, or no analysis is made of it"
        return Probe(inputs, labels, split, n_classes, None)
    assert labels is not None, "images have labels, and no language model sees them"
    about["preprocess"], about["preprocess_source"] = _of_images(task, network)
    preprocess = _preprocess(about["preprocess"]) or Preprocess()
    images = open_images(
        lambda rows: _checked(dataset.read(rows)),
        chosen,
        preprocess,
        most_pixels=task["limits"]["image_pixels"],
        threads=min(max(torch.get_num_threads(), 2), _MOST_THREADS),
    )
    return Probe(images, labels, split, about["n_classes"], preprocess)


def _next_tokens(probe: Probe, about: About) -> dict[str, Any]:
    """Return the report's `next_tokens` section, for sequences whose positions are samples."""
    kept = probe.labels != IGNORED
    rows = {"all": torch.ones(len(kept), dtype=torch.bool)}
    if probe.split is not None:
        rows |= {"train": probe.split == 0, "test": probe.split == 1}
    counted = {name: kept[chosen] for name, chosen in rows.items() if bool(kept[chosen].any())}
    return {
        "ignored_labels": about["n_classes"] > 0,
        "n_sequences": {name: int(part.any(dim=1).sum()) for name, part in counted.items()},
        "n_positions": {name: int(part.sum()) for name, part in counted.items()},
        "n_vocabulary": probe.n_classes,
        "token_ids": torch.unique(probe.labels[kept]).tolist(),
    }


def _of_images(task: Task, network: LoadedNetwork) -> tuple[Any, str | None]:
    """Return the preprocessing of the probe, else the checkpoint's, else timm's for the network; and its source."""
    if given := task["probe"]["preprocess"]:
        return given, "probe"
    brought = _brought(task, "preprocess")
    if brought is not None:
        return brought, "checkpoint"
    architecture = task["subjects"][0]["architecture"]
    if architecture["family"] == "timm":
        from analysis.networks.timm import data_config

        return from_timm(data_config(network.module, architecture)), "timm"
    # Unscaled grey levels would be no sensible input of any network.
    return {"scale": 1 / 255}, None


def _tokens(
    task: Task, network: LoadedNetwork, dataset: Dataset, rows: Sequence[int], about: About
) -> dict[str, torch.Tensor]:
    own, brought = task["file"]["tokenizer_sha256"], _brought(task, "tokenizer_sha256")
    sha256 = own or brought
    if sha256 is None:
        raise AnalysisError(
            "invalid-probe",
            "The probe holds texts, and neither it nor the checkpoint came with a tokenizer. Give one of them a "
            "tokenizer (the content of tokenizer.json).",
        )
    config = task["subjects"][0]["architecture"].get("config", {})
    texts = (content.decode() for _, content in _checked(dataset.read(rows)))
    definition = _path(task, sha256).read_text(encoding="utf-8")
    tokens = tokenise(
        texts,
        definition,
        max_length=task["file"]["max_length"],
        config=config,
        any_padding=network.predicts_tokens,
    )
    about["tokenizer"] = {
        "sha256": sha256,
        "source": "probe" if own else "checkpoint",
        "max_length": tokens.max_length,
        "pad_id": tokens.pad_id,
        "n_truncated": tokens.n_truncated,
    }
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def _brought(task: Task, member: str) -> Any:
    """Return the member that all checkpoints bring alike; None if none brings it.

    Raises:
        AnalysisError: `invalid-probe` if they differ.
    """
    values = [brought[member] for brought in task["brought"]]
    if any(value != values[0] for value in values):
        what = "preprocessings" if member == "preprocess" else "tokenizers"
        raise AnalysisError(
            "invalid-probe",
            f"The checkpoints bring different {what}, so their numbers would not be of the same inputs. Give the probe "
            "one of its own.",
        )
    return values[0]


def _preprocess(given: dict[str, Any] | None) -> Preprocess | None:
    return None if given is None else Preprocess(**given)


def _rows(task: Task, labels: torch.Tensor | None, split: torch.Tensor | None) -> torch.Tensor | None:
    """Return the rows of the requested samples, also for sequences without labels; None for all."""
    n, of, seed = task["options"].get("samples"), task["probe"]["n_samples"], task["options"]["seed"]
    if n is None or n >= of:
        return None
    if labels is None:
        return stratified_rows(torch.zeros(of, dtype=torch.int64), split, n, seed=seed, least_classes=1)
    return stratified_rows(labels, split, n, seed=seed)


def _samples(task: Task, used: int) -> dict[str, int]:
    return {"used": used, "of": task["probe"]["n_samples"], "seed": task["options"]["seed"]}


def _checked(contents: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yield contents; map a ServiceError from the middle of the file to AnalysisError."""
    try:
        yield from contents
    except ServiceError as error:
        raise _as_analysis_error(error) from error


def _as_analysis_error(error: ServiceError) -> AnalysisError:
    return AnalysisError("invalid-probe", error.detail, **error.members)


def _path(task: Task, sha256: str) -> Path:
    return Path(task["paths"][sha256])

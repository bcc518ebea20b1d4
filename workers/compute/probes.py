"""Read a task's probe and describe it for the report. Runs in the child.

Tensors, images and texts all become a Probe here: subsampled if `samples` is given, with the labels in the
checkpoint's order, and with the preprocessing and the tokenizer of the probe, or else those of the checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

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
from app import schemas
from app.descriptions.labels import match_labels, named_labels
from app.descriptions.preprocessing import from_timm
from app.errors import ServiceError
from app.files.datafile import Dataset, open_dataset
from app.schemas.reports import LabelMap, NextTokens, ProbeSubject, Samples, Tokenizer
from workers import tasks
from workers.tasks import Checkpoint, FeatureSetTask, Files, Frozen, Json, NetworkTask, Task

T = TypeVar("T")

# Most threads that decode images; more are no faster than one disk.
_MOST_THREADS = 32


class ProbeFacts(Frozen):
    """Members of a report's `probe` section that are determined when the probe is read."""

    preprocess: schemas.Preprocess | None = None
    preprocess_source: Literal["probe", "checkpoint", "timm"] | None = None
    tokenizer: Tokenizer | None = None
    label_map: LabelMap | None = None
    samples: Samples | None = None
    next_tokens: NextTokens | None = None


@dataclass(frozen=True)
class _Reader:
    """A probe that is read for a network: the task's, with the checkpoint whose classes and inputs count."""

    task: NetworkTask
    files: Files
    network: LoadedNetwork
    checkpoint: Checkpoint
    brought: Sequence[Checkpoint]
    check_inputs: bool


def read_feature_set(task: FeatureSetTask, files: Files) -> tuple[FeatureSet, ProbeSubject]:
    """Return the feature set of a task, and the `probe` section of its report."""
    row = task.feature_set
    feature_set = load_feature_set(files.paths[row.sha256])
    rows = _rows(task, row.n_samples, feature_set.labels, feature_set.split)
    samples = None
    if rows is not None:
        feature_set, samples = feature_set.take(rows), _samples(task, row.n_samples, len(rows))
    about = ProbeSubject(
        kind="feature_set",
        id=row.id,
        name=row.name,
        sha256=row.sha256,
        data_sha256=row.data_sha256,
        n_samples=row.n_samples,
        n_classes=row.n_classes,
        class_counts=row.class_counts,
        class_names=None,
        input_shape=None,
        preprocess=None,
        samples=samples,
    )
    return feature_set, about


def read_probe(
    task: NetworkTask,
    files: Files,
    network: LoadedNetwork,
    checkpoint: Checkpoint,
    *,
    brought: Sequence[Checkpoint],
    check_inputs: bool = True,
) -> tuple[Probe, ProbeFacts]:
    """Return the probe of a task, and what the report says of it beside the members of its row.

    Args:
        task: the task.
        files: its files.
        network: one of the networks that will be given the probe.
        checkpoint: the checkpoint with whose description labels and inputs are matched.
        brought: the checkpoints that must bring the same preprocessing and tokenizer.
        check_inputs: as of `reading.load_probe`; all inputs are checked where `samples` are drawn from them.

    Raises:
        AnalysisError: `invalid-probe`, or another refusal of the file, the preprocessing or the tokenizer.
    """
    reader = _Reader(task, files, network, checkpoint, brought, check_inputs)
    try:
        probe, facts = (_tensors if task.probe.content == "tensors" else _dataset)(reader)
        if network.predicts_tokens:
            return probe, facts.model_copy(update={"next_tokens": _next_tokens(probe, task.probe.n_classes)})
        mapping = match_labels(task.probe.class_names, checkpoint.architecture)
    except ServiceError as error:
        raise _as_analysis_error(error) from error
    label_map = LabelMap(matched=mapping.matched, reordered=mapping.numbers is not None)
    if mapping.numbers is not None:
        labels = torch.tensor(mapping.numbers)[probe.labels]
        probe = Probe(probe.inputs, labels, probe.split, len(network.weight), probe.preprocess)
    return probe, facts.model_copy(update={"label_map": label_map})


def described_probe(probe: tasks.Probe, facts: ProbeFacts) -> ProbeSubject:
    """Return the `probe` section of a report: the members of the row, and those found when the probe was read."""
    row = {name: value for name, value in probe if name in ProbeSubject.model_fields}
    return ProbeSubject(**{"kind": "probe", **row, **dict(facts)})


def _tensors(reader: _Reader) -> tuple[Probe, ProbeFacts]:
    row, network = reader.task.probe, reader.network
    given = _described_preprocess(row.preprocess)
    assert row.format in ("safetensors", "npz"), "other formats are datasets"
    probe = load_probe(
        reader.files.paths[row.sha256],
        format=row.format,
        preprocess=_preprocess(given),
        n_classes=len(network.weight) if network.predicts_tokens else row.n_classes,
        next_tokens=network.predicts_tokens,
        # Those that are drawn are copied anyway.
        check_inputs=reader.check_inputs or _draws(reader.task),
    )
    rows = _rows(reader.task, row.n_samples, None if network.predicts_tokens else probe.labels, probe.split)
    samples = None
    if rows is not None:
        probe, samples = probe.take(rows), _samples(reader.task, row.n_samples, len(rows))
    return probe, ProbeFacts(preprocess=given, preprocess_source="probe" if row.preprocess else None, samples=samples)


def _dataset(reader: _Reader) -> tuple[Probe, ProbeFacts]:
    row, network = reader.task.probe, reader.network
    assert row.format != "safetensors", "it holds tensors"
    assert row.format != "npz", "it holds tensors"
    dataset = open_dataset(reader.files.paths[row.sha256], row.format, reader.files.dataset, row.columns)
    # Labels of whole texts are ignored if tokens are predicted.
    labels = None
    if dataset.labels is not None and not network.predicts_tokens:
        labels = torch.from_numpy(named_labels(dataset.labels, dataset.class_names, row.class_names)[0])
    split = None if dataset.split is None else torch.from_numpy(dataset.split)
    rows = _rows(reader.task, row.n_samples, labels, split)
    samples = None
    if rows is not None:
        samples = _samples(reader.task, row.n_samples, len(rows))
        labels, split = None if labels is None else labels[rows], None if split is None else split[rows]
    chosen = range(row.n_samples) if rows is None else rows.tolist()
    if dataset.content == "texts":
        inputs, tokenizer = _tokens(reader, dataset, chosen)
        n_classes = row.n_classes
        if network.predicts_tokens:
            n_classes = len(network.weight)
            labels = next_token_labels(inputs["input_ids"], inputs["attention_mask"], n_vocabulary=n_classes)
        assert labels is not None, "a classifier's probe has labels, or no analysis is made of it"
        facts = ProbeFacts(preprocess=_described_preprocess(row.preprocess), tokenizer=tokenizer, samples=samples)
        return Probe(inputs, labels, split, n_classes, None), facts
    assert labels is not None, "images have labels, and no language model sees them"
    described, source = _of_images(reader)
    preprocess = _preprocess(described) or Preprocess()
    images = open_images(
        lambda rows: _checked(dataset.read(rows)),
        chosen,
        preprocess,
        most_pixels=reader.files.image_pixels,
        threads=min(max(torch.get_num_threads(), 2), _MOST_THREADS),
    )
    facts = ProbeFacts(preprocess=described, preprocess_source=source, samples=samples)
    return Probe(images, labels, split, row.n_classes, preprocess), facts


def _next_tokens(probe: Probe, n_classes: int) -> NextTokens:
    """Return the report's `next_tokens` section, for sequences whose positions are samples."""
    kept = probe.labels != IGNORED
    rows = {"all": torch.ones(len(kept), dtype=torch.bool)}
    if probe.split is not None:
        rows |= {"train": probe.split == 0, "test": probe.split == 1}
    counted = {name: kept[chosen] for name, chosen in rows.items() if bool(kept[chosen].any())}
    return NextTokens(
        ignored_labels=n_classes > 0,
        n_sequences={name: int(part.any(dim=1).sum()) for name, part in counted.items()},
        n_positions={name: int(part.sum()) for name, part in counted.items()},
        n_vocabulary=probe.n_classes,
        token_ids=torch.unique(probe.labels[kept]).tolist(),
    )


def _of_images(reader: _Reader) -> tuple[schemas.Preprocess | None, Literal["probe", "checkpoint", "timm"] | None]:
    """Return the preprocessing of the probe, else the checkpoint's, else timm's for the network; and its source."""
    if given := reader.task.probe.preprocess:
        return _described_preprocess(given), "probe"
    brought = _alike([checkpoint.preprocess for checkpoint in reader.brought], "preprocessings")
    if brought is not None:
        return _described_preprocess(brought), "checkpoint"
    architecture = reader.checkpoint.architecture
    if architecture["family"] == "timm":
        from analysis.networks.timm import data_config

        return _described_preprocess(from_timm(data_config(reader.network.module, architecture))), "timm"
    # Unscaled grey levels would be no sensible input of any network.
    return _described_preprocess({"scale": 1 / 255}), None


def _tokens(reader: _Reader, dataset: Dataset, rows: Sequence[int]) -> tuple[dict[str, torch.Tensor], Tokenizer]:
    row = reader.task.probe
    brought = _alike([checkpoint.tokenizer_sha256 for checkpoint in reader.brought], "tokenizers")
    sha256 = row.tokenizer_sha256 or brought
    if sha256 is None:
        raise AnalysisError(
            "invalid-probe",
            "The probe holds texts, and neither it nor the checkpoint came with a tokenizer. Give one of them a "
            "tokenizer (the content of tokenizer.json).",
        )
    config = reader.checkpoint.architecture.get("config")
    tokens = tokenise(
        (content.decode() for _, content in _checked(dataset.read(rows))),
        reader.files.paths[sha256].read_text(encoding="utf-8"),
        max_length=row.max_length,
        config=config if isinstance(config, dict) else {},
        any_padding=reader.network.predicts_tokens,
    )
    tokenizer = Tokenizer(
        sha256=sha256,
        source="probe" if row.tokenizer_sha256 else "checkpoint",
        max_length=tokens.max_length,
        pad_id=tokens.pad_id,
        n_truncated=tokens.n_truncated,
    )
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}, tokenizer


def _alike(brought: Sequence[T], what: str) -> T:
    """Return what all checkpoints bring alike; None if none brings it.

    Raises:
        AnalysisError: `invalid-probe` if they differ.
    """
    if any(value != brought[0] for value in brought):
        raise AnalysisError(
            "invalid-probe",
            f"The checkpoints bring different {what}, so their numbers would not be of the same inputs. Give the probe "
            "one of its own.",
        )
    return brought[0]


def _described_preprocess(given: Json | None) -> schemas.Preprocess | None:
    """Return stored preprocessing as reports describe it."""
    return None if given is None else schemas.Preprocess.model_validate(given)


def _preprocess(given: schemas.Preprocess | None) -> Preprocess | None:
    """Return the preprocessing as the mathematics takes it."""
    return None if given is None else Preprocess(**given.model_dump(exclude_unset=True))


def _draws(task: NetworkTask) -> bool:
    return task.options.samples is not None and task.options.samples < task.probe.n_samples


def _rows(task: Task, of: int, labels: torch.Tensor | None, split: torch.Tensor | None) -> torch.Tensor | None:
    """Return the rows of the requested samples, also for sequences without labels; None for all."""
    n, seed = task.options.samples, task.options.seed
    if n is None or n >= of:
        return None
    if labels is None:
        return stratified_rows(torch.zeros(of, dtype=torch.int64), split, n, seed=seed, least_classes=1)
    return stratified_rows(labels, split, n, seed=seed)


def _samples(task: Task, of: int, used: int) -> Samples:
    return Samples(used=used, of=of, seed=task.options.seed)


def _checked(contents: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yield contents; map a ServiceError from the middle of the file to AnalysisError."""
    try:
        yield from contents
    except ServiceError as error:
        raise _as_analysis_error(error) from error


def _as_analysis_error(error: ServiceError) -> AnalysisError:
    return AnalysisError("invalid-probe", error.detail, **error.members)

"""Cache of a checkpoint's features and predictions on a probe, in the storage, for repeated analyses. In the child.

An entry's name hashes everything that it depends on, so a hit is the same features. The features of a large pass lie in
several files, one a shard, which workers also pass to each other by this cache while they compute it. The cache never
fails an analysis: what cannot be read is computed, and what cannot be written is not cached.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import analysis
from analysis.measures.predictions import Predictions
from analysis.passes.parts import Joining, Span, cut, whole
from analysis.probes.feature_set import FeatureSet, Vocabulary
from app.descriptions import labels, preprocessing
from app.files import datafile, zips
from app.files.tensorfile import MAX_HEADER_BYTES, header_bytes
from app.kept import LARGEST_SHARE, make_room
from app.storage import StagedFile, Storage, StorageUnavailable
from workers.compute import probes
from workers.compute.probes import ProbeFacts
from workers.tasks import Checkpoint, Frozen, Json, Network, NetworkTask

logger = logging.getLogger("interplay")

# Tensors of more bytes are not read into memory.
_MAPPED = 2**28
# Libraries that build networks or turn files into inputs.
_LIBRARIES = ("numpy", "pillow", "pyarrow", "timm", "tokenizers", "torchvision", "transformers")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip
_TENSORS = ("features", "labels", "head", "logits", "split")
_OF_PREDICTIONS = ("predicted", "confidence", "loss")
# What is wrong with files that cannot be read.
_BROKEN = (SafetensorError, OSError, ValueError, KeyError, TypeError)


class About(Frozen):
    """What is kept beside the tensors of a part of a pass.

    Attributes:
        network: facts of the network.
        batch_size: of the pass.
        probe: how the report describes the probe; only with the first part, as tokens that occur may be many.
        n_vocabulary: tokens of a language model.
        n_features: d.
        n_classes: C; for a language model its whole vocabulary.
        n_rows: rows of features.
        start: the part's first sample.
        stop: the first sample after it.
        n_samples: of the whole pass.
    """

    network: Network
    batch_size: int
    probe: ProbeFacts | None
    n_vocabulary: int | None
    n_features: int
    n_classes: int
    n_rows: int
    start: int
    stop: int
    n_samples: int


@dataclass(frozen=True)
class KeptPart:
    """Features of a part of a pass, as `analysis.passes.parts` gives them, and what is known beside them."""

    feature_set: FeatureSet
    about: About


@dataclass(frozen=True)
class Kept:
    """A cached pass of a network over a probe, and how the report describes both.

    Attributes:
        feature_set: of all samples.
        network: facts of the network.
        batch_size: of the pass.
        probe: facts of the probe.
        rows: of features, in each of the files that it is kept in, by their samples; None for one file.
    """

    feature_set: FeatureSet
    network: Network
    batch_size: int
    probe: ProbeFacts
    rows: Mapping[Span, int] | None = None


class FeatureCache:
    """Features cached in a storage, up to a number of bytes; the oldest are evicted first.

    An entry is one file or several, each with the features of consecutive samples. The first has the entry's name, and
    each says where the next begins.

    Args:
        storage: the storage that holds the blobs too.
        max_bytes: size limit of the whole cache; 0 disables it, but for parts that workers pass to each other.
    """

    def __init__(self, storage: Storage, max_bytes: int) -> None:
        self._storage, self._max_bytes = storage, max_bytes

    def find(self, name: str) -> Kept | None:
        """Return the entry cached under a name, or None if it is missing or cannot be read."""
        if not self._max_bytes:
            return None
        parts: list[About] = []
        while not parts or parts[-1].stop < parts[-1].n_samples:
            about = self.about(name, parts[-1].stop if parts else 0)
            if about is None:
                return None
            parts.append(about)
        first = self.part(name, 0)
        if first is None or first.about.probe is None:
            return None
        feature_set = whole(first.feature_set) if len(parts) == 1 else self._joined(name, first, parts)
        if feature_set is None:
            return None
        return Kept(feature_set, first.about.network, first.about.batch_size, first.about.probe)

    def _joined(self, name: str, first: KeptPart, parts: Sequence[About]) -> FeatureSet | None:
        joining = Joining(sum(about.n_rows for about in parts), first.feature_set.head.shape[1])
        joining.take(first.feature_set)
        for about in parts[1:]:
            part = self.part(name, about.start)
            if part is None or part.about != about:
                return None
            joining.take(part.feature_set)
        return joining.feature_set()

    def keep(self, name: str, kept: Kept) -> None:
        """Cache computed features, and evict the oldest entries if there is no room."""
        found, n = kept.feature_set, len(kept.feature_set.labels)
        if sum(tensor.nbytes for tensor in _tensors(found).values()) > LARGEST_SHARE * self._max_bytes:
            return
        rows = kept.rows or {Span(0, n, n): n}
        n_classes = len(found.head) if found.vocabulary is None else found.vocabulary.size
        for span, part in zip(rows, cut(found, [*rows.values()]), strict=True):
            self.keep_part(name, kept_part(part, span, kept.network, kept.batch_size, kept.probe, n_classes))

    def about(self, name: str, start: int) -> About | None:
        """Return what is kept beside the tensors of the part that begins with a sample; None if there is no such."""
        with self._reading(name, start):
            length = int.from_bytes(self._storage.features_part(_file(name, start), 0, 8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = json.loads(self._storage.features_part(_file(name, start), 8, length + 8))
            return About.model_validate_json(header["__metadata__"]["about"])
        return None

    def part(self, name: str, start: int) -> KeptPart | None:
        """Return the part of an entry that begins with a sample; None if it is missing or cannot be read."""
        with self._reading(name, start):
            with (
                self._storage.features(_file(name, start)) as path,
                safe_open(path, framework="pt", device="cpu") as file,
            ):
                # What is much stays mapped: the file may be removed meanwhile, and its content is there until then.
                mapped = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                tensors = {key: one if one.nbytes > _MAPPED else one.clone() for key, one in mapped.items()}
                text = file.metadata()["about"]
                if _checksum(tensors, text) != file.metadata()["sha256"]:
                    raise ValueError("their checksum is another")
            about = About.model_validate_json(text)
            return KeptPart(_feature_set(tensors, about.n_vocabulary), about)
        return None

    @contextmanager
    def _reading(self, name: str, start: int) -> Iterator[None]:
        """End a block quietly where a part is missing, or cannot be read; one that is broken goes."""
        try:
            yield
        except FileNotFoundError:
            pass
        except StorageUnavailable as error:
            logger.warning("kept features cannot be read: %s", error)
        except _BROKEN as error:
            logger.warning("kept features are broken and go: %s", error)
            # Otherwise they would block the features computed now.
            with suppress(StorageUnavailable):
                self._storage.delete_features(_file(name, start))

    def keep_part(self, name: str, part: KeptPart) -> None:
        """Keep a part of an entry; evict other entries if there is no room and the whole entry may stay.

        One that may not stays until its analysis has ended (`app.shards.tidy`).
        """
        tensors = {key: tensor.cpu().contiguous() for key, tensor in _tensors(part.feature_set).items()}
        about = part.about
        text = about.model_dump_json()
        try:
            with self._storage.stage() as staged:
                _write(staged, tensors, {"about": text, "sha256": _checksum(tensors, text)})
                whole_bytes = staged.size_bytes * about.n_samples // (about.stop - about.start)
                if whole_bytes <= LARGEST_SHARE * self._max_bytes:
                    make_room(self._storage, staged.size_bytes, limit_bytes=self._max_bytes, but=name)
                self._storage.put_features(_file(name, about.start), staged)
        except StorageUnavailable as error:
            logger.warning("features were not kept: %s", error)


def kept_part(
    part: FeatureSet, span: Span, network: Network, batch_size: int, probe: ProbeFacts, n_classes: int
) -> KeptPart:
    """Return a part of a pass with what is kept beside it."""
    about = About(
        network=network,
        batch_size=batch_size,
        probe=None if span.start else probe,
        n_vocabulary=None if part.vocabulary is None else part.vocabulary.size,
        n_features=part.features.shape[1],
        n_classes=n_classes,
        n_rows=len(part.labels),
        start=span.start,
        stop=span.stop,
        n_samples=span.of,
    )
    return KeptPart(part, about)


def _file(name: str, start: int) -> str:
    """Return the name of the file of the part that begins with a sample."""
    return f"{name}.{start}" if start else name


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    """Return the sha256 of an entry, tensor by tensor in the order of their names, so that a flipped bit is found."""
    digest = hashlib.sha256(about.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_as_bytes(tensor))
    return digest.hexdigest()


def _as_bytes(tensor: Tensor) -> memoryview:
    # As bytes, since NumPy has no bfloat16.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(staged: StagedFile, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors. The library's `save` copies all tensors in memory; its `save_file` writes to another file."""
    header: Json = {"__metadata__": {**metadata}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    staged.write(header_bytes(header))
    for tensor in tensors.values():
        staged.write(_as_bytes(tensor))


def _tensors(feature_set: FeatureSet) -> dict[str, Tensor]:
    """Return a feature set's tensors by name; a vocabulary's size is not among them."""
    tensors = {key: getattr(feature_set, key) for key in _TENSORS}
    if feature_set.predictions is not None:
        tensors |= {key: getattr(feature_set.predictions, key) for key in _OF_PREDICTIONS}
    if feature_set.vocabulary is not None:
        tensors["tokens"] = feature_set.vocabulary.tokens
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def _feature_set(tensors: dict[str, Tensor], n_vocabulary: int | None) -> FeatureSet:
    """Rebuild the feature set that `_tensors` was given."""
    return FeatureSet(
        features=tensors["features"],
        labels=tensors["labels"],
        head=tensors["head"],
        head_bias=None,
        logits=tensors.get("logits"),
        split=tensors.get("split"),
        predictions=Predictions(*(tensors[key] for key in _OF_PREDICTIONS)) if "predicted" in tensors else None,
        vocabulary=None if n_vocabulary is None else Vocabulary(tensors["tokens"], n_vocabulary),
    )


def name_of(task: NetworkTask, checkpoint: Checkpoint, provenance: Json) -> str:
    """Return the cache name of a checkpoint's features: hashes of checkpoint, data and all else they depend on."""
    probe, options = task.probe, task.options
    # The data's hash covers the result of reading; without it, format and columns determine how the file is read.
    file = {"tokenizer_sha256", "max_length"} | (set() if probe.data_sha256 else {"format", "columns"})
    depends_on = {
        "checkpoint": checkpoint.model_dump(
            include={
                **dict.fromkeys(("architecture", "head", "asked_prefix", "preprocess", "tokenizer_sha256"), True),
                "base": {"sha256", "asked_prefix"},
                "adapter": True,
            }
        ),
        "probe": probe.model_dump(include={"content", "preprocess", "class_names", "n_classes", *file}),
        "batch_size": options.batch_size,
        "precision": options.precision,
        # Where its parts are cut.
        "shard_samples": task.shard_samples,
        # Without `samples` nothing is drawn, so the seed does not matter.
        "samples": None if options.samples is None else [options.samples, options.seed],
        "machine": {key: provenance[key] for key in ("device", "threads", "torch_version")},
        "code": _code_sha256(),
        "libraries": _versions(),
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return f"{checkpoint.sha256}-{probe.data_sha256 or probe.sha256}-{digest[:32]}"


@cache
def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _code_sha256() -> str:
    """Return the sha256 of all source code that turns a file into features."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for package in (analysis, datafile):
        yield from sorted(_path(package).parent.rglob("*.py"))
    yield from map(_path, (labels, preprocessing, zips, probes))


def _path(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__)

"""Cache of a checkpoint's features and predictions on a probe, in the storage, for repeated analyses. In the child.

An entry's name hashes everything that it depends on, so a hit is the same features. The cache never fails an analysis:
an entry that cannot be read is computed, and one that cannot be written is not cached.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import analysis
from analysis.measures.predictions import Predictions
from analysis.probes.feature_set import FeatureSet, Vocabulary
from app.descriptions import labels, preprocessing
from app.files import datafile, zips
from app.files.tensorfile import header_bytes
from app.storage import StagedFile, Storage, StorageUnavailable
from workers.compute import probes
from workers.compute.probes import ProbeFacts
from workers.tasks import Checkpoint, Frozen, Json, Network, NetworkTask

logger = logging.getLogger("interplay")

# Share of the cache that one entry may take, so that one evaluation does not evict all others.
_LARGEST_SHARE = 0.5
# Tensors of more bytes are not read into memory.
_MAPPED = 2**28
# Libraries that build networks or turn files into inputs.
_LIBRARIES = ("numpy", "pillow", "pyarrow", "timm", "tokenizers", "torchvision", "transformers")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip
_TENSORS = ("features", "labels", "head", "logits", "split")
_OF_PREDICTIONS = ("predicted", "confidence", "loss")


@dataclass(frozen=True)
class Kept:
    """A cached pass of a network over a probe, and how the report describes both."""

    feature_set: FeatureSet
    network: Network
    batch_size: int
    probe: ProbeFacts


class _About(Frozen):
    """What is cached beside the tensors."""

    network: Network
    batch_size: int
    probe: ProbeFacts
    n_vocabulary: int | None


class FeatureCache:
    """Features cached in a storage, up to a number of bytes; the oldest are evicted first.

    Args:
        storage: the storage that holds the blobs too.
        max_bytes: size limit of the whole cache; 0 disables it.
    """

    def __init__(self, storage: Storage, max_bytes: int) -> None:
        self._storage, self._max_bytes = storage, max_bytes

    def find(self, name: str) -> Kept | None:
        """Return the entry cached under a name, or None if it is missing or cannot be read."""
        if not self._max_bytes:
            return None
        try:
            with self._storage.features(name) as path, safe_open(path, framework="pt", device="cpu") as file:
                # What is much stays mapped: the file may be removed meanwhile, and its content is there until then.
                mapped = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                tensors = {key: one if one.nbytes > _MAPPED else one.clone() for key, one in mapped.items()}
                about = file.metadata()["about"]
                if _checksum(tensors, about) != file.metadata()["sha256"]:
                    raise ValueError("their checksum is another")
            found = _About.model_validate_json(about)
            return Kept(_feature_set(tensors, found.n_vocabulary), found.network, found.batch_size, found.probe)
        except FileNotFoundError:
            return None
        except StorageUnavailable as error:
            logger.warning("kept features cannot be read: %s", error)
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("kept features are broken and go: %s", error)
            # Otherwise they would block the features computed now.
            with suppress(StorageUnavailable):
                self._storage.delete_features(name)
            return None

    def keep(self, name: str, kept: Kept) -> None:
        """Cache computed features, and evict the oldest entries if there is no room."""
        vocabulary = kept.feature_set.vocabulary
        tensors = {key: tensor.cpu().contiguous() for key, tensor in _tensors(kept.feature_set).items()}
        if sum(tensor.nbytes for tensor in tensors.values()) > _LARGEST_SHARE * self._max_bytes:
            return
        about = _About(
            network=kept.network,
            batch_size=kept.batch_size,
            probe=kept.probe,
            n_vocabulary=None if vocabulary is None else vocabulary.size,
        )
        try:
            with self._storage.stage() as staged:
                text = about.model_dump_json()
                _write(staged, tensors, {"about": text, "sha256": _checksum(tensors, text)})
                self._make_room(staged.size_bytes)
                self._storage.put_features(name, staged)
        except StorageUnavailable as error:
            logger.warning("features were not kept: %s", error)

    def _make_room(self, size_bytes: int) -> None:
        entries = sorted(self._storage.list_features(), key=lambda entry: entry.stored_at)
        excess = sum(entry.size_bytes for entry in entries) + size_bytes - self._max_bytes
        for entry in entries:
            if excess <= 0:
                return
            self._storage.delete_features(entry.name)
            excess -= entry.size_bytes


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

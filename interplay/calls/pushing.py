"""Calls that upload checkpoints, probes and feature sets, or have the service fetch them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from interplay.calls.collections import Collection, given
from interplay.calls.descriptions import CheckpointDescription, ProbeDescription, checkpoint_spec, probe_spec
from interplay.calls.fetching import FetchingCalls, source_of
from interplay.folders import adapter_beside, packed_checkpoint, zipped_folder
from interplay.results import Checkpoint, FeatureSet, Probe
from interplay.resumable import Progress
from interplay.transport import Body, ProblemError
from interplay.uploads import push


class PushingCalls(FetchingCalls):
    """Calls that upload checkpoints, probes and feature sets, or have the service fetch them."""

    def push_checkpoint(
        self,
        path: str | Path,
        *,
        name: str,
        base: str | None = None,
        adapter: Mapping[str, Any] | None = None,
        architecture: Mapping[str, Any] | None = None,
        head: str | None = None,
        prefix: str | None = None,
        preprocess: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_progress: Progress | None = None,
    ) -> Checkpoint:
        """Upload a safetensors checkpoint; it streams from disk, whatever its size.

        A text such as s3://bucket/key, gs://, az://, hf://org/name or https:// is the address of a checkpoint that lies
        elsewhere (docs/sources.md). The service fetches it, and this call waits until it has; if the wait is
        interrupted, the fetch goes on. `create_fetch` begins one without waiting.

        A file over 64 MiB goes on where it was after a broken connection, a restart of the service or the end of this
        process: the next call with the same file (path, size and time) finds what is there. With a smaller file the
        client asks the service whether it has it, before it is sent again.

        Args:
            path: the file (safetensors, or what torch.export.save wrote), or a Hugging Face folder: config.json,
                weights in one file or in shards with their index, and optionally preprocessor_config.json and
                tokenizer.json. An archive of one is accepted too. Or the address of any of these.
            name: display name; need not be unique.
            base: for an adapter of PEFT: id of the checkpoint whose weights it changes, pushed before. `path` is then
                the adapter's folder, an archive of it, or its adapter_model.safetensors.
            adapter: content of adapter_config.json; default: the one in the folder, or beside the file.
            architecture: description of the network; default: the one in the file's own metadata, or config.json; of an
                adapter its base's, unless it brings another head.
            head: module name of the classification head; default: the family's own.
            prefix: prefix of the weights' names, such as `ema_model.`, if the file holds several copies.
            preprocess: of images, for probes without one: in a probe's form, or a preprocessor_config.json.
            tokenizer: content of a tokenizer.json, for texts of probes without one.
            metadata: for example run, epoch, tags; text, numbers, booleans or lists of these.
            on_progress: called with the bytes of a file over 64 MiB that were sent, and with its size; after a break
                with fewer than before. Of an address with the bytes that have come.

        Raises:
            FetchFailed: what lies at the address could not be fetched, or somebody cancelled the fetch.
        """
        described: CheckpointDescription = {
            "base": base,
            "adapter": adapter,
            "architecture": architecture,
            "head": head,
            "prefix": prefix,
            "preprocess": preprocess,
            "tokenizer": tokenizer,
            "metadata": metadata,
        }
        if (source := source_of(path)) is not None:
            return cast(Checkpoint, self._fetched("checkpoints", source, name, described, on_progress))
        path = Path(path)
        spec = _spec(path, name, described)
        if not path.is_dir():
            return cast(Checkpoint, self._push("checkpoints", path, spec, path, on_progress))
        with packed_checkpoint(path, adapter=base is not None) as archive:
            return cast(Checkpoint, self._push("checkpoints", archive, spec, path, on_progress))

    def push_probe(
        self,
        path: str | Path,
        *,
        name: str,
        class_names: Sequence[str] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        columns: Mapping[str, str | None] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_progress: Progress | None = None,
    ) -> Probe:
        """Upload a probe dataset; its format is detected from its content.

        A text that is an address is fetched by the service, as of a checkpoint.

        Args:
            path: safetensors or npz with `inputs`, `labels` and, optionally, `split`; Parquet with images or texts and
                labels; CSV or JSON lines with texts and labels; a zip of class folders with images, or of Parquet
                files; or a folder of either, which is zipped, uncompressed, in the temporary directory. For causal
                language models texts, or `input_ids` in place of `inputs`, need no labels. Or the address of any of
                these.
            name: display name.
            class_names: one for each class, in the order of the labels. For a file with its own class names: all of
                them in the order that the labels should have, or other names for them, in their sorted order.
            preprocess: `scale`, `mean`, `std`; the network's inputs are (inputs * scale - mean) / std. For images
                `resize`, `resample`, `crop`, `colour` come first; default: the checkpoint's preprocessing.
            columns: names of columns by `image`, `text`, `label`, `split`, if they are not the usual ones; `label`
                None for texts without labels.
            tokenizer: content of a tokenizer.json, for texts; default: the checkpoint's tokenizer.
            max_length: number of tokens of a text that are kept.
            metadata: as for a checkpoint.
            on_progress: as for a checkpoint.
        """
        described: ProbeDescription = {
            "class_names": class_names,
            "preprocess": preprocess,
            "columns": columns,
            "tokenizer": tokenizer,
            "max_length": max_length,
            "metadata": metadata,
        }
        if (source := source_of(path)) is not None:
            return cast(Probe, self._fetched("probes", source, name, described, on_progress))
        path, spec = Path(path), probe_spec(name, described)
        if not path.is_dir():
            return cast(Probe, self._push("probes", path, spec, path, on_progress))
        with zipped_folder(path) as archive:
            return cast(Probe, self._push("probes", archive, spec, path, on_progress))

    def push_feature_set(
        self,
        path: str | Path,
        *,
        name: str,
        metadata: Mapping[str, Any] | None = None,
        on_progress: Progress | None = None,
    ) -> FeatureSet:
        """Upload features, labels and head of a network that the service cannot build (safetensors)."""
        spec = {"name": name, "metadata": metadata}
        return cast(FeatureSet, self._push("feature-sets", Path(path), spec, Path(path), on_progress))

    def push_checkpoint_once(
        self,
        path: str | Path,
        *,
        name: str,
        on_progress: Progress | None = None,
        **described: Unpack[CheckpointDescription],
    ) -> tuple[Checkpoint, bool]:
        """Push a checkpoint as `push_checkpoint` does, but do not send a file whose content the service already has.

        Returns:
            The checkpoint, new in either case, and whether the file was sent. A folder is always sent, and what lies
            elsewhere is always fetched: neither has a hash that the service could look for.
        """
        if source_of(path) is not None or Path(path).is_dir():
            return self.push_checkpoint(path, name=name, on_progress=on_progress, **described), True
        path = Path(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        spec = json.dumps(given({**_spec(path, name, described), "sha256": sha256})).encode()
        try:
            held = self._call("POST", "/v1/checkpoints", files=[("spec", (None, spec, "application/json"))])
        except ProblemError as error:
            if error.status != 404:
                raise
            return self.push_checkpoint(path, name=name, on_progress=on_progress, **described), True
        return cast(Checkpoint, held), False

    def _push(
        self,
        collection: Collection,
        path: Path,
        spec: Mapping[str, Any],
        source: Path,
        on_progress: Progress | None,
    ) -> Body:
        return push(self._transport, collection, path, given(spec), source=source, on_progress=on_progress)


def _spec(path: Path, name: str, described: CheckpointDescription) -> dict[str, Any]:
    """Return a checkpoint's spec; that of an adapter's bare tensors has the configuration beside them."""
    spec = checkpoint_spec(name, described)
    if spec["base_id"] is not None and spec.get("adapter") is None and path.suffix == ".safetensors":
        spec["adapter"] = adapter_beside(path)
    return spec

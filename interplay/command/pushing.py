"""`interplay push` and `interplay convert`: upload files to the service or have it fetch them; convert them for it."""

import importlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from interplay.calls.descriptions import ProbeDescription
from interplay.calls.fetching import name_of
from interplay.client import Client
from interplay.command import rendering
from interplay.command.fetching import follow_fetch, print_fetch
from interplay.command.naming import NamedOption, id_of
from interplay.command.options import (
    COMMON,
    DESCRIBED,
    DESCRIBED_CHECKPOINT,
    EXIT_USAGE,
    AsJson,
    Columns,
    Common,
    Described,
    DescribedCheckpoint,
    FileOrJson,
    NoWait,
    fail,
    print_body,
)
from interplay.command.progress import upload_shown
from interplay.command.values import (
    UsageError,
    columns_of,
    existing,
    existing_file,
    existing_or_source,
    json_object,
    json_value,
    metadata_of,
    stem,
    whole,
)
from interplay.results import Fetch

File = Annotated[Path, Parameter(converter=existing_file)]
FileOrFolder = Annotated[Path, Parameter(converter=existing)]
FileOrSource = Annotated[Path | str, Parameter("FILE|ADDRESS", converter=existing_or_source)]


def push_checkpoint(
    file: FileOrSource,
    /,
    *,
    base: NamedOption = None,
    no_wait: NoWait = False,
    described: DescribedCheckpoint = DESCRIBED_CHECKPOINT,
    common: Common = COMMON,
) -> None:
    """Upload a checkpoint: safetensors, a .pt2 of torch.export, a Hugging Face folder; with --base an adapter of PEFT.

    From s3://, gs://, az://, hf:// and https:// the service fetches it by itself; the command waits and shows how far
    it is, and Ctrl-C leaves it going on.

    Args:
        file: A file, or a folder with config.json and the weights in one file or in shards. Of an adapter its folder,
            with adapter_config.json and adapter_model.safetensors. Or the address of any of these.
        base: For an adapter: the checkpoint whose weights it changes, pushed before.
    """
    _require_source(file, no_wait)
    parsed = described.parsed()
    with common.client() as client:
        if base is not None:
            parsed["base"] = id_of(client, "checkpoints", base, "--base")
        if isinstance(file, str):
            name = described.name or name_of(file)
            _follow(client, client.create_fetch("checkpoints", file, name=name, **parsed), no_wait, common)
            return
        with upload_shown(file.name) as show:
            body = client.push_checkpoint(file, name=described.name or stem(file), on_progress=show, **parsed)
    common.print(body, rendering.resource_text("checkpoint", body))


def push_probe(
    file: FileOrSource,
    /,
    *,
    class_names: FileOrJson = None,
    preprocess: FileOrJson = None,
    column: Columns = None,
    tokenizer: FileOrJson = None,
    max_length: Annotated[int | None, Parameter(converter=whole, validator=validators.Number(gte=1))] = None,
    no_wait: NoWait = False,
    described: Described = DESCRIBED,
    common: Common = COMMON,
) -> None:
    """Upload a probe dataset: tensors (safetensors, npz), or images or texts with labels.

    Images come as Parquet, as a zip of class folders, or as such a folder itself; texts as Parquet, CSV or JSON lines.
    For causal language models texts, or tensors with input_ids, need no labels. From s3://, gs://, az://, hf:// and
    https:// the service fetches it by itself, as a checkpoint.

    Args:
        file: A file, or a folder of class folders or of Parquet files. Or the address of any of these.
        class_names: A list such as ["cat", "dog"], in the order of the labels.
        preprocess: Such as {"resize": 256, "crop": 224, "mean": [0.5], "std": [0.2]}.
        column: image, text, label or split, such as image=photo; label= for texts without labels; may be repeated.
        tokenizer: A tokenizer.json, for texts.
        max_length: Number of tokens of a text that are kept.
    """
    _require_source(file, no_wait)
    names = json_value("--class-names", class_names)
    if names is not None and not (isinstance(names, list) and all(isinstance(entry, str) for entry in names)):
        raise UsageError("must be a JSON list of texts", "--class-names")
    parsed: ProbeDescription = {
        "class_names": names,
        "preprocess": json_object("--preprocess", preprocess),
        "columns": columns_of(column),
        "tokenizer": json_object("--tokenizer", tokenizer),
        "max_length": max_length,
        "metadata": metadata_of(described.metadata),
    }
    with common.client() as client:
        if isinstance(file, str):
            name = described.name or name_of(file)
            _follow(client, client.create_fetch("probes", file, name=name, **parsed), no_wait, common)
            return
        with upload_shown(file.name) as show:
            name = described.name or file.resolve().stem
            body = client.push_probe(file, name=name, on_progress=show, **parsed)
    common.print(body, rendering.resource_text("probe", body))


def push_features(file: File, /, *, described: Described = DESCRIBED, common: Common = COMMON) -> None:
    """Upload features, labels and head of a network that the service cannot build (safetensors).

    Args:
        file: The safetensors file.
    """
    metadata = metadata_of(described.metadata)
    with common.client() as client, upload_shown(file.name) as show:
        body = client.push_feature_set(file, name=described.name or stem(file), metadata=metadata, on_progress=show)
    common.print(body, rendering.resource_text("feature set", body))


def _require_source(file: Path | str, no_wait: bool) -> None:
    if no_wait and not isinstance(file, str):
        raise UsageError("is for addresses: a file is sent while the command runs", "--no-wait")


def _follow(client: Client, fetch: Fetch, no_wait: bool, common: Common) -> None:
    if no_wait:
        print_fetch(fetch, common)
    else:
        follow_fetch(client, fetch, common)


def convert(
    file: FileOrFolder,
    /,
    *,
    output: Annotated[Path, Parameter(("--output", "-o"), metavar="OUT", validator=validators.Path(dir_okay=False))],
    architecture: FileOrJson = None,
    key: Annotated[str | None, Parameter()] = None,
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Convert a PyTorch file (.pt, .pth, .ckpt, .bin) to safetensors, locally, without running code from the file.

    Args:
        file: A file; a folder of torch.distributed.checkpoint; or a Hugging Face folder with pytorch_model.bin or its
            shards.
        output: The safetensors file to write.
        architecture: Description of the network, to be embedded.
        key: Place of the weights in the file, such as ema.state_dict. Default: it is searched for.
        overwrite: Replace OUT if it exists.
    """
    described = json_object("--architecture", architecture)
    if output.exists() and not overwrite:
        raise UsageError(f"{str(output)!r} already exists; --overwrite replaces it", "--output")
    try:
        conversion = importlib.import_module("interplay._analysis.saving.conversion")
    except ModuleNotFoundError as error:
        detail = f"`interplay convert` needs PyTorch ({error.name} is missing): pip install 'interplay[train]'"
        fail(EXIT_USAGE, "Not installed", detail, {})
    try:
        weights = conversion.read_weights(file, key=key)
        conversion.write_safetensors(weights.tensors, output, architecture=described)
    except conversion.ConversionError as error:
        fail(EXIT_USAGE, "The file cannot be converted", str(error), {})
    body = {
        "output": str(output),
        "key": weights.key,
        "n_tensors": len(weights.tensors),
        "n_numbers": sum(tensor.numel() for tensor in weights.tensors.values()),
        "left_out": weights.left_out,
        "others": weights.others,
        "architecture": described,
    }
    print_body(body, as_json, rendering.conversion_text(body))

"""`interplay push` and `interplay convert`: upload files to the service, and convert them for it."""

import importlib
import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from interplay.command import rendering
from interplay.command.options import (
    EXIT_USAGE,
    ApiKey,
    AsJson,
    Metadata,
    Prefix,
    Tokenizer,
    Url,
    fail,
    json_object,
    json_value,
    metadata_of,
    open_client,
    pair,
    print_body,
    stem,
)

commands = typer.Typer()
push = typer.Typer(no_args_is_help=True)
commands.add_typer(push, name="push", help="Upload a checkpoint, a probe dataset or a feature set.")


File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, metavar="FILE", show_default=False)]
FileOrFolder = Annotated[Path, typer.Argument(exists=True, readable=True, metavar="FILE|FOLDER", show_default=False)]
Name = Annotated[str | None, typer.Option("--name", help="What people will call it. Default: the file's stem.")]


@push.command("checkpoint")
def push_checkpoint(
    file: FileOrFolder,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="The network's description. Default: in the file, or config.json."),
    ] = None,
    name: Name = None,
    head: Annotated[str | None, typer.Option(help="Module name of the head. Default: by family.")] = None,
    prefix: Prefix = None,
    preprocess: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="Of images, where a probe gives none; also a preprocessor_config.json."),
    ] = None,
    tokenizer: Tokenizer = None,
    metadata: Metadata = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint: safetensors, or a Hugging Face folder (config.json, weights in one file or in shards)."""
    described = json_object("--architecture", architecture)
    brought = {
        "preprocess": json_object("--preprocess", preprocess),
        "tokenizer": json_object("--tokenizer", tokenizer),
        "metadata": metadata_of(metadata) or None,
    }
    with open_client(url, api_key) as client:
        body = client.push_checkpoint(
            file, name=name or stem(file), architecture=described, head=head, prefix=prefix, **brought
        )
    print_body(body, as_json, rendering.resource_text("checkpoint", body))


@push.command("probe")
def push_probe(
    file: FileOrFolder,
    name: Name = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help='A list such as ["cat", "dog"], in the order of the labels.')
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help='Such as {"resize": 256, "crop": 224, "mean": [0.5], "std": [0.2]}.'),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="image, text, label or split, such as image=photo; label= for texts without labels; may be repeated.",
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text that are kept.")] = None,
    metadata: Metadata = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload a probe dataset: tensors (safetensors, npz), or images or texts with labels.

    Images come as Parquet, as a zip of class folders, or as such a folder itself; texts as Parquet, CSV or JSON lines.
    For causal language models texts, or tensors with input_ids, need no labels.
    """
    names = json_value("--class-names", class_names)
    if names is not None and not (isinstance(names, list) and all(isinstance(entry, str) for entry in names)):
        raise typer.BadParameter("must be a JSON list of texts", param_hint="--class-names")
    prepared = json_object("--preprocess", preprocess)
    pairs = metadata_of(metadata)
    with open_client(url, api_key) as client:
        body = client.push_probe(
            file,
            name=name or file.resolve().stem,
            class_names=names,
            preprocess=prepared,
            columns={role: name or None for role, name in (pair(entry, "--column") for entry in column or ())} or None,
            tokenizer=json_object("--tokenizer", tokenizer),
            max_length=max_length,
            metadata=pairs or None,
        )
    print_body(body, as_json, rendering.resource_text("probe", body))


@push.command("features")
def push_features(
    file: File,
    name: Name = None,
    metadata: Metadata = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload features, labels and head of a network that the service cannot build (safetensors)."""
    pairs = metadata_of(metadata)
    with open_client(url, api_key) as client:
        body = client.push_feature_set(file, name=name or stem(file), metadata=pairs or None)
    print_body(body, as_json, rendering.resource_text("feature set", body))


@commands.command()
def convert(
    file: FileOrFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", dir_okay=False, help="The safetensors file to write.")
    ],
    architecture: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="The network's description, to be embedded.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Where in the file the weights are, such as ema.state_dict. Default: found.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a PyTorch file (.pt, .pth, .ckpt, .bin) into safetensors, here, without running code of the file.

    A folder is one of torch.distributed.checkpoint, or a Hugging Face folder with pytorch_model.bin or its shards.
    """
    described = json_object("--architecture", architecture)
    if output.exists() and not overwrite:
        raise typer.BadParameter(f"{str(output)!r} is there already; --overwrite replaces it", param_hint="--output")
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

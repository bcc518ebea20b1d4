"""Refuse files and folders of known kinds that hold no network, with an error that names the kind."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from app.errors import InvalidFile

if TYPE_CHECKING:
    from app.files.tensorfile import TensorInfo

# By the first bytes of a file: its kind, and advice.
_FORMATS: Mapping[bytes, tuple[str, str]] = {
    b"GGUF": (
        "a GGUF file (llama.cpp)",
        "Its weights are quantised and named otherwise; send the safetensors folder that it was made from.",
    ),
    b"ggjt": ("a GGML file (llama.cpp)", "Send the safetensors folder that it was made from."),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, as Keras writes them", "Networks here are those of torch."),
}
_ADAPTER_CONFIG = "adapter_config.json"
# What every name in a file of PEFT begins with.
ADAPTER_PREFIX = "base_model.model."
# Parts of PEFT's names for an adapter's tensors.
_ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")
_ADAPTER_BESIDE = (".modules_to_save.", ".original_module.", ".base_layer.")


def refuse_foreign_file(path: Path) -> None:
    """Raise InvalidFile if a file's first bytes are those of a known format that is not a checkpoint."""
    with path.open("rb") as file:
        start = file.read(8)
    for mark, (what, advice) in _FORMATS.items():
        if start.startswith(mark):
            raise InvalidFile(f"The file is {what}, and not a checkpoint that this service takes. {advice}")


def refuse_foreign_folder(members: Iterable[PurePosixPath], adapter: Mapping[str, Any] | None) -> None:
    """Raise InvalidFile if an archive is a folder of a known kind that holds no network's weights.

    Args:
        members: paths of its files.
        adapter: the content of its adapter_config.json, if it exists.
    """
    names = {path.name for path in members}
    weights = [name for name in names if name.endswith(".safetensors")]
    if adapter is not None and all(name.startswith("adapter_") for name in weights):
        base = adapter.get("base_model_name_or_path")
        kind = adapter.get("peft_type")
        raise _adapter(kind if isinstance(kind, str) else "LoRA", base if isinstance(base, str) else None)
    quantised = sorted(name for name in names if name.endswith(".gguf"))
    if quantised and not weights:
        what, advice = _FORMATS[b"GGUF"]
        raise InvalidFile(f"The archive holds {what}, {quantised[0]!r}, and no safetensors file. {advice}")


def refuse_adapter(names: Collection[str]) -> None:
    """Raise InvalidFile if all of a file's tensors are those of an adapter, or PEFT's without what is adapted."""
    parts = [name for name in names if any(part in f"{name}." for part in _ADAPTER_PARTS)]
    beside = [name for name in names if any(part in f"{name}." for part in _ADAPTER_BESIDE)]
    alone = len({*parts, *beside}) == len(names)
    if parts and (alone or (all(name.startswith(ADAPTER_PREFIX) for name in names) and _lack_their_weights(names))):
        raise _adapter("LoRA", None)


def _lack_their_weights(names: Collection[str]) -> bool:
    """Return whether a module has low-rank tensors in the file, and its own weight is not there."""
    adapted = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    return any(f"{path}.weight" not in names and f"{path}.base_layer.weight" not in names for path in adapted)


def rank_of_adapter(tensors: "Mapping[str, TensorInfo]") -> int:
    """Return the largest rank of an adapter's low-rank tensors.

    Args:
        tensors: of its file.

    Raises:
        InvalidFile: the file is no low-rank adapter of PEFT.
    """
    ranks = [
        info.shape[0]
        for name, info in tensors.items()
        if name.startswith(ADAPTER_PREFIX) and name.endswith((".lora_A.weight", ".lora_embedding_A")) and info.shape
    ]
    if not ranks:
        raise InvalidFile(
            f"The spec has a base_id, and the file is no low-rank adapter as PEFT saves it: no tensor's name begins "
            f"with {ADAPTER_PREFIX!r} and ends with '.lora_A.weight'. A whole network has no base: leave base_id out."
        )
    return max(ranks)


def is_adapter_config(path: PurePosixPath) -> bool:
    """Return whether a member marks its folder as an adapter."""
    return path.name == _ADAPTER_CONFIG


def _adapter(kind: str, base: str | None) -> InvalidFile:
    of = f"of {base!r}" if base else "of another network"
    return InvalidFile(
        f"This is an adapter ({kind}, as PEFT saves it): it changes weights {of} and is no network by itself. Push "
        "that network first, and then the adapter with the network as its base: base_id in the spec, or interplay push "
        "checkpoint FOLDER --base NAME. Or merge the two where torch is, "
        "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUT), and send OUT.",
        adapter=kind,
        base=base,
    )

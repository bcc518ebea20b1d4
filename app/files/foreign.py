"""Refuse files and folders of known kinds that hold no network, with an error that names the kind."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import InvalidFile

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
    """Raise InvalidFile if all of a file's tensors are those of an adapter."""
    parts = [name for name in names if any(part in f"{name}." for part in _ADAPTER_PARTS)]
    beside = [name for name in names if any(part in f"{name}." for part in _ADAPTER_BESIDE)]
    if parts and len({*parts, *beside}) == len(names):
        raise _adapter("LoRA", None)


def is_adapter_config(path: PurePosixPath) -> bool:
    """Return whether a member marks its folder as an adapter."""
    return path.name == _ADAPTER_CONFIG


def _adapter(kind: str, base: str | None) -> InvalidFile:
    of = f"of {base!r}" if base else "of another network"
    return InvalidFile(
        f"This is an adapter ({kind}, as PEFT saves it): it changes weights {of} and is no network by itself. Merge "
        "the two where torch is, PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUT), and "
        "send OUT.",
        adapter=kind,
        base=base,
    )

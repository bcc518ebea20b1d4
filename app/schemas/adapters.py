"""An adapter as checkpoints and reports describe it: what of PEFT's configuration decides the merged weights."""

from typing import Literal

from pydantic import Field, FiniteFloat

from app.schemas.base import Strict

AdapterKind = Literal["lora", "rslora", "dora"]


class Adapter(Strict):
    """A low-rank adapter: `kind` and `rank` in short, then members of its adapter_config.json by PEFT's names."""

    kind: AdapterKind = Field(description="dora with `use_dora`, else rslora with `use_rslora`, else lora.")
    rank: int = Field(description="The largest rank of its modules, as their tensors have it.")
    r: int
    lora_alpha: FiniteFloat
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, FiniteFloat]
    target_modules: list[str] | None = Field(
        description="Ends of the adapted modules' names; null for a pattern, as the tensors say which they are."
    )
    partial: bool = Field(description="Whether exclude_modules or layers_to_transform leave some of these out.")
    modules_to_save: list[str]
    bias: Literal["none", "all", "lora_only"]

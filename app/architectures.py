"""Descriptions of networks, checked without torch: names, types and bounds.

The parameters mirror the builders in analysis/networks/builtin.py (a test compares the two). Widths are cheap to
describe and are bounded by what the file then holds; depth is bounded here, since a description of many layers costs
time before its shapes can be compared with the file (seen: 50,000 blocks, 62 s).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from app.errors import invalid_request

Width = Annotated[int, Field(ge=1, le=1_000_000)]
Norm = Literal["none", "batch", "layer"]


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MlpArgs(_Described):
    sizes: Annotated[list[Width], Field(min_length=2, max_length=200)]
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    norm: Norm = "none"


class CnnArgs(_Described):
    in_channels: Width = 3
    n_classes: Width
    channels: Annotated[list[Width], Field(min_length=1, max_length=50)] = [32, 64, 128]
    norm: Norm = "batch"


class ResnetArgs(_Described):
    depth: Literal[18, 34] = 18
    n_classes: Width
    in_channels: Width = 3
    width: Width = 64


class WideResnetArgs(_Described):
    depth: Annotated[int, Field(ge=10, le=604)] = 28
    widen_factor: Annotated[int, Field(ge=1, le=1000)] = 2
    n_classes: Width
    in_channels: Width = 3

    @model_validator(mode="after")
    def _whole_blocks(self) -> "WideResnetArgs":
        if (self.depth - 4) % 6:
            raise ValueError("depth must be 6k + 4 (10, 16, 22, 28, ...)")
        return self


class Mlp(_Described):
    family: Literal["builtin"]
    name: Literal["mlp"]
    args: MlpArgs


class Cnn(_Described):
    family: Literal["builtin"]
    name: Literal["cnn"]
    args: CnnArgs


class Resnet(_Described):
    family: Literal["builtin"]
    name: Literal["resnet"]
    args: ResnetArgs


class WideResnet(_Described):
    family: Literal["builtin"]
    name: Literal["wide_resnet"]
    args: WideResnetArgs


Architecture = Annotated[Mlp | Cnn | Resnet | WideResnet, Field(discriminator="name")]
_adapter: TypeAdapter[Mlp | Cnn | Resnet | WideResnet] = TypeAdapter(Architecture)


def check_architecture(description: Any) -> dict[str, Any]:
    """The description with its defaults filled in.

    Raises:
        InvalidRequest: what is unknown, missing or out of bounds, by its place in the description.
    """
    try:
        return _adapter.validate_python(description).model_dump(mode="json")
    except ValidationError as error:
        raise invalid_request("The architecture", error.errors(), prefix="architecture") from None

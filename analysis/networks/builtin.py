"""Built-in networks: multilayer perceptron, small convolutional network, ResNet and WideResNet for small images.

Names and defaults of the builders' arguments are mirrored in app/descriptions/architectures.py. The names of the
parameters are a contract with all stored checkpoints:

| name | parameters | head |
|---|---|---|
| mlp | `layers.{i}`, `norms.{i}`, `head` | `head` |
| cnn | `convs.{i}`, `norms.{i}`, `head` | `head` |
| resnet | torchvision's: `conv1`, `bn1`, `layer{1..4}.{j}.conv1` ..., `layer{k}.0.downsample.{0,1}`, `fc` | `fc` |
| wide_resnet | `conv1`, `block{1..3}.{j}.bn1`, `.conv1`, `.bn2`, `.conv2`, `.shortcut`, then `bn1`, `fc` | `fc` |

The normalisation "none" has no parameters. "layer" normalises over all features of a sample; between
convolutions, over channels and positions, with a scale and a shift for each channel (GroupNorm of one group).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import AnalysisError
from .building import take_one_tensor

Activation = Literal["relu", "gelu", "tanh"]
Norm = Literal["none", "batch", "layer"]

# Depth costs time before shapes can be compared with a file's; width costs nothing. The same bounds hold in app.
MAX_MLP_SIZES = 200
MAX_CNN_CHANNELS = 50
MAX_WIDE_RESNET_DEPTH = 604

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "tanh": torch.tanh,
}
_RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def create(description: Mapping[str, Any]) -> nn.Module:
    """Build a network from `{"name": ..., "args": {...}}`, with one of the builders below.

    Raises:
        AnalysisError: `invalid-architecture`; TypeError for an argument that the builder does not have.
    """
    name = description["name"]
    if name not in BUILDERS:
        raise AnalysisError("invalid-architecture", f"The name must be one of {', '.join(BUILDERS)}, not {name!r}.")
    return take_one_tensor(BUILDERS[name](**description["args"]))


def head(network: nn.Module, description: Mapping[str, Any]) -> str:
    """Return the name of the classification head."""
    return HEADS[description["name"]]


class Mlp(nn.Module):
    """Linear layers with a normalisation and an activation between them; inputs are flattened."""

    def __init__(self, sizes: Sequence[int], activation: str, norm: str) -> None:
        super().__init__()
        hidden = sizes[1:-1]
        self.n_inputs = sizes[0]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-2], hidden, strict=True))
        self.norms = nn.ModuleList(_NORMS_OF_FEATURES[norm](n) for n in hidden)
        self.head = nn.Linear(sizes[-2], sizes[-1])
        self.activation = _ACTIVATIONS[activation]

    def forward(self, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n classes"]:
        """Return logits; each sample is flattened."""
        x = inputs.flatten(1) if inputs.ndim > 1 else inputs
        if x.ndim != 2 or x.shape[1] != self.n_inputs:
            raise _refused(f"samples of {self.n_inputs} numbers", inputs)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        logits: Tensor = self.head(x)
        return logits


class Cnn(nn.Module):
    """3x3 convolution, normalisation, ReLU and 2x2 max pooling for each entry of channels, then the mean and a head."""

    def __init__(self, in_channels: int, n_classes: int, channels: Sequence[int], norm: str) -> None:
        super().__init__()
        before = (in_channels, *channels[:-1])
        self.in_channels = in_channels
        self.smallest_side = 2 ** len(channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(before, channels, strict=True))
        self.norms = nn.ModuleList(_NORMS_OF_CHANNELS[norm](n) for n in channels)
        self.head = nn.Linear(channels[-1], n_classes)

    def forward(self, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n classes"]:
        """Return the logits of images."""
        _check_images(inputs, self.in_channels, smallest_side=self.smallest_side)
        x = inputs
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.functional.max_pool2d(torch.relu(norm(conv(x))), 2)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016a)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Return the activated sum of both convolutions and the shortcut."""
        y = torch.relu(self.bn1(self.conv1(x)))
        shortcut: Tensor = self.downsample(x)
        return torch.relu(self.bn2(self.conv2(y)) + shortcut)


class Resnet(nn.Module):
    """ResNet with the stem for small images: a 3x3 convolution, no max pooling."""

    def __init__(self, blocks: Sequence[int], n_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(BasicBlock, blocks[0], width, width, stride=1)
        self.layer2 = _stage(BasicBlock, blocks[1], width, 2 * width, stride=2)
        self.layer3 = _stage(BasicBlock, blocks[2], 2 * width, 4 * width, stride=2)
        self.layer4 = _stage(BasicBlock, blocks[3], 4 * width, 8 * width, stride=2)
        self.fc = nn.Linear(8 * width, n_classes)
        _initialise_convolutions(self)

    def forward(self, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n classes"]:
        """Return the logits of images."""
        _check_images(inputs, self.in_channels)
        x = torch.relu(self.bn1(self.conv1(inputs)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class PreactivationBlock(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions; where widths differ the shortcut is a convolution."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Return the sum of both convolutions and the shortcut, without activation."""
        activated = torch.relu(self.bn1(x))
        y = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = y + shortcut
        return residual


class WideResnet(nn.Module):
    """WideResNet of Zagoruyko and Komodakis, without dropout."""

    def __init__(self, blocks: int, widen_factor: int, n_classes: int, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(PreactivationBlock, blocks, 16, widths[0], stride=1)
        self.block2 = _stage(PreactivationBlock, blocks, widths[0], widths[1], stride=2)
        self.block3 = _stage(PreactivationBlock, blocks, widths[1], widths[2], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], n_classes)
        _initialise_convolutions(self)

    def forward(self, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n classes"]:
        """Return the logits of images."""
        _check_images(inputs, self.in_channels)
        x = self.block3(self.block2(self.block1(self.conv1(inputs))))
        logits: Tensor = self.fc(torch.relu(self.bn1(x)).mean(dim=(2, 3)))
        return logits


def mlp(*, sizes: Sequence[int], activation: Activation = "relu", norm: Norm = "none") -> nn.Module:
    """Build a multilayer perceptron: linear, normalisation, activation for each hidden layer, then only the head.

    Args:
        sizes: numbers of inputs, of units of each hidden layer and of classes; 2 to 200 entries.
        activation: relu, gelu or tanh.
        norm: normalisation between a linear layer and its activation.

    Returns:
        A network that takes inputs of any shape (n, ...) with sizes[0] numbers a sample.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    _require(2 <= len(sizes) <= MAX_MLP_SIZES, f"sizes must have 2 to {MAX_MLP_SIZES} entries, not {len(sizes)}")
    _require_positive(sizes=sizes)
    _require(activation in _ACTIVATIONS, f"activation must be one of {', '.join(_ACTIVATIONS)}, not {activation!r}")
    _require(norm in _NORMS_OF_FEATURES, f"norm must be one of {', '.join(_NORMS_OF_FEATURES)}, not {norm!r}")
    return Mlp(sizes, activation, norm)


def cnn(
    *, in_channels: int = 3, n_classes: int, channels: Sequence[int] = (32, 64, 128), norm: Norm = "batch"
) -> nn.Module:
    """Build a plain CNN: 3x3 convolution, normalisation, ReLU, 2x2 max pooling; mean over positions; head.

    Args:
        in_channels: channels of the images.
        n_classes: rows of the head.
        channels: outputs of each convolution, 1 to 50; images must be at least 2^len(channels) on a side.
        norm: normalisation between a convolution and its ReLU.

    Returns:
        A network that takes images (n, in_channels, height, width).

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    _require(
        1 <= len(channels) <= MAX_CNN_CHANNELS,
        f"channels must have 1 to {MAX_CNN_CHANNELS} entries, not {len(channels)}",
    )
    _require_positive(in_channels=[in_channels], n_classes=[n_classes], channels=channels)
    _require(norm in _NORMS_OF_CHANNELS, f"norm must be one of {', '.join(_NORMS_OF_CHANNELS)}, not {norm!r}")
    return Cnn(in_channels, n_classes, channels, norm)


def resnet(*, depth: int = 18, n_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build a ResNet of basic blocks with the stem for small images (3x3 convolution, no max pooling).

    Args:
        depth: 18 or 34.
        n_classes: rows of the head.
        in_channels: channels of the images.
        width: channels of the first stage; each of the other three has twice as many as the one before.

    Returns:
        A network that takes images (n, in_channels, height, width).

    Raises:
        AnalysisError: `invalid-architecture`.

    Source: He, Zhang, Ren, Sun 2016, "Deep residual learning for image recognition", table 1.
    """
    _require(depth in _RESNET_BLOCKS, f"depth must be 18 or 34, not {depth!r}")
    _require_positive(n_classes=[n_classes], in_channels=[in_channels], width=[width])
    return Resnet(_RESNET_BLOCKS[depth], n_classes, in_channels, width)


def wide_resnet(*, depth: int = 28, widen_factor: int = 2, n_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a WideResNet: three stages of pre-activation blocks with 16, 32 and 64 times widen_factor channels.

    Args:
        depth: 6k + 4 with k blocks a stage, 10 to 604.
        widen_factor: 1 is a ResNet of the ordinary width.
        n_classes: rows of the head.
        in_channels: channels of the images.

    Returns:
        A network that takes images (n, in_channels, height, width).

    Raises:
        AnalysisError: `invalid-architecture`.

    Source: Zagoruyko, Komodakis 2016, "Wide residual networks", table 1.
    """
    _require_positive(depth=[depth], widen_factor=[widen_factor], n_classes=[n_classes], in_channels=[in_channels])
    _require(
        10 <= depth <= MAX_WIDE_RESNET_DEPTH and (depth - 4) % 6 == 0,
        f"depth must be 6k + 4 (10, 16, 22, 28, ... {MAX_WIDE_RESNET_DEPTH}), not {depth}",
    )
    return WideResnet((depth - 4) // 6, widen_factor, n_classes, in_channels)


def _without_norm(_: int) -> nn.Module:
    return nn.Identity()


def _one_group(n_channels: int) -> nn.Module:
    return nn.GroupNorm(1, n_channels)


_NORMS_OF_FEATURES: dict[str, Callable[[int], nn.Module]] = {
    "none": _without_norm,
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}
_NORMS_OF_CHANNELS: dict[str, Callable[[int], nn.Module]] = {
    "none": _without_norm,
    "batch": nn.BatchNorm2d,
    "layer": _one_group,
}

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "wide_resnet": wide_resnet,
}
HEADS = {"mlp": "head", "cnn": "head", "resnet": "fc", "wide_resnet": "fc"}


def _stage(
    block: type[BasicBlock] | type[PreactivationBlock], n_blocks: int, n_in: int, n_out: int, *, stride: int
) -> nn.Sequential:
    return nn.Sequential(block(n_in, n_out, stride), *(block(n_out, n_out, 1) for _ in range(n_blocks - 1)))


def _initialise_convolutions(network: nn.Module) -> None:
    for module in network.modules():
        # Tensors on meta need no values, and torch would load its decompositions for it: 1.3 s and 60 MB, once.
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AnalysisError("invalid-architecture", f"{otherwise}.")


def _require_positive(**arguments: Sequence[int]) -> None:
    for name, values in arguments.items():
        for value in values:
            # A bool is an int in Python; a width of True is a mistake.
            _require(type(value) is int and value >= 1, f"{name} must be whole numbers of at least 1, not {value!r}")


def _check_images(inputs: Float[Tensor, "..."], in_channels: int, *, smallest_side: int = 1) -> None:
    wanted = f"images of {in_channels} channels, at least {smallest_side} x {smallest_side}"
    if inputs.ndim != 4 or inputs.shape[1] != in_channels or min(inputs.shape[2:]) < smallest_side:
        raise _refused(wanted, inputs)


def _refused(wanted: str, inputs: Float[Tensor, "..."]) -> AnalysisError:
    shape = list(inputs.shape[1:])
    return AnalysisError("inputs-refused", f"The network takes {wanted}; a sample has the shape {shape}.", shape=shape)

"""The straight line between two checkpoints of one architecture: its points, and the statistics of their layers."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import AnalysisError
from ..networks.exported.network import GraphNorm, batch_bounds
from ..networks.loading import LoadedNetwork
from ..passes.precision import Precision, arithmetic
from ..probes.images import Images
from ..probes.inputs import Inputs, n_samples
from ..probes.probe import Probe

Normalisation = Literal["interpolate", "recalibrate"]
State = Mapping[str, Shaped[Tensor, "..."]]

# Parameters converted to float64 at a time: a measured tensor is never copied as a whole.
_CHUNK = 2**18


class Path:
    """theta(w) = (1 - w) theta_A + w theta_B, mixed in place into one network.

    Args:
        network: A; from here on the path moves it.
        other: tensors of B by name, as `state_dict` gives them, on the network's device.

    Raises:
        AnalysisError: `invalid-argument` where B has other names or shapes.

    Numerics: memory for three copies of the parameters: A, B and the mix. The mix is by torch.lerp, in the network's
        float32: a path from a network to itself is flat to the last bit, and at w = 0 and w = 1 every tensor is A's or
        B's own. Between them integer buffers are A's.

    Source: Frankle et al. 2020, "Linear mode connectivity and the lottery ticket hypothesis".
    """

    def __init__(self, network: LoadedNetwork, other: State) -> None:
        self.network = network
        self.mix = network.module.state_dict()
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (self.mix, other)]
        if shapes[0] != shapes[1]:
            differing = sorted(
                name for name in set(shapes[0]) | set(shapes[1]) if shapes[0].get(name) != shapes[1].get(name)
            )
            detail = f"The two ends differ in {len(differing)} names or shapes of tensors, first in {differing[0]!r}."
            raise AnalysisError("invalid-argument", detail, argument="other", differing=differing[:20])
        # A tensor with several names, such as tied embeddings, is mixed once.
        names: dict[int, str] = {}
        for name, tensor in network.module.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), name)
        self.mix = {name: self.mix[name] for name in names.values()}
        self.first = {name: tensor.clone() for name, tensor in self.mix.items()}
        self.second = {name: other[name] for name in names.values()}

    def move_to(self, w: float) -> LoadedNetwork:
        """Move the path's network to w, in place, and return it."""
        for name, target in self.mix.items():
            first, second = self.first[name], self.second[name]
            if w in (0.0, 1.0):
                target.copy_(second if w else first)
            elif target.is_floating_point():
                torch.lerp(first, second, w, out=target)
            else:
                target.copy_(first)
        self.network.weights_changed()
        return self.network

    def distances(self) -> tuple[float, float | None]:
        """Return Euclidean distance and cosine of the ends' parameters as vectors; the cosine is None for length 0."""
        dot = first = second = apart = 0.0
        for name, _ in self.network.module.named_parameters():
            pieces = (torch.split(end[name].flatten(), _CHUNK) for end in (self.first, self.second))
            for a, b in ((a.double(), b.double()) for a, b in zip(*pieces, strict=True)):
                dot += float(a @ b)
                first, second = first + float(a @ a), second + float(b @ b)
                apart += float((a - b).square().sum())
        length = (first * second) ** 0.5
        return apart**0.5, dot / length if length > 0 else None


def require_variances(network: LoadedNetwork, w: float) -> None:
    """Check that no mixed variance is below 0, as may happen beyond the ends: normalisation takes its root.

    Raises:
        AnalysisError: `invalid-argument` with the number of such variances, `n_negative`.
    """
    if 0 <= w <= 1:
        return
    variances = [b for name, b in network.module.named_buffers() if name.endswith("running_var")]
    negative = sum(int((variance < 0).sum()) for variance in variances)
    if negative:
        raise AnalysisError(
            "invalid-argument",
            f"Extrapolation makes {negative} of the network's running variances negative, so outputs are undefined. "
            "Use normalisation recalibrate, which recomputes them at each point, or points closer to the ends.",
            argument="extrapolate",
            n_negative=negative,
        )


def recalibrate(
    network: LoadedNetwork, probe: Probe, *, device: torch.device, batch_size: int, precision: Precision = "float32"
) -> int:
    """Recompute the running statistics of batch normalisation, by one pass over the probe's inputs.

    Args:
        network: changed in place; all but its normalisation layers stays in evaluation mode.
        probe: its inputs are passed, in a fixed random order.
        device: the network's device.
        batch_size: inputs at a time; 1 is raised to 2, as a single sample has no variance.
        precision: of the following evaluation, so that the statistics match its activations.

    Returns:
        The number of layers with running statistics; if it is 0, nothing is passed.

    Raises:
        AnalysisError: `invalid-probe` where the probe has a single sample.

    Numerics: every sample weighs the same: a batch of b samples enters with b over those seen so far. Variances are
        the batches' own, so smaller batches say less; a last batch of a single sample has none and is left out, as is
        one that is too small for an exported network. Statistics are float32, also those of activations in bfloat16.

    Source: Jordan et al. 2022, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair".
    """
    layers = [module for module in network.module.modules() if isinstance(module, _BatchNorm | GraphNorm)]
    layers = [layer for layer in layers if isinstance(layer, GraphNorm) or layer.track_running_stats]
    if not layers:
        return 0
    if len(probe.labels) < 2:
        raise AnalysisError("invalid-probe", "Recalibration needs at least two samples; the probe has one.")
    # A single sample has no variance, and a graph may need more: one that is repeated would count as several.
    least, most = batch_bounds(network.module)
    least = max(least, 2)
    momenta = [layer.momentum for layer in layers]
    seen = dict.fromkeys(layers, 0)
    n = 0

    def weigh(layer: _BatchNorm | GraphNorm, _: object) -> None:
        """Set the share of this batch among all samples that the layer has seen."""
        # Counted by layer: a layer that runs twice on a batch has seen it twice.
        seen[layer] += n
        layer.momentum = n / seen[layer]

    handles = [layer.register_forward_pre_hook(weigh) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        with torch.no_grad(), arithmetic(device, precision):
            for batch in _mixed(probe, max(min(batch_size, most or batch_size), least), device):
                if n == 0 or n_samples(batch) >= least:
                    n = n_samples(batch)
                    network.module(batch)
    finally:
        for layer, momentum, handle in zip(layers, momenta, handles, strict=True):
            handle.remove()
            layer.momentum = momentum
            layer.eval()
    return len(layers)


def _mixed(probe: Probe, batch_size: int, device: torch.device) -> Iterator[Inputs]:
    """Yield the probe's batches in a fixed random order: files often hold samples class by class, and the variance
    within batches of one class lacks that between classes. Images that are too large to be kept decoded come in the
    order of their files, which are read from beginning to end."""
    if isinstance(probe.inputs, Images):
        yield from probe.batches(batch_size, device=device)
        return
    order = torch.randperm(len(probe.labels), generator=torch.Generator().manual_seed(0)).to(probe.labels.device)
    for rows in torch.split(order, batch_size):
        yield from probe.take(rows).batches(batch_size, device=device)

"""Capture the inputs of a network's head in the caller's own process, as a feature set for the service.

For networks that the service cannot build. The pass, and the check that features and head give the logits, are those of
`extraction`; here the batches come from a loader of the training script, and so does the model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..errors import AnalysisError
from ..measures.entropy import check_finite
from ..measures.labels import check_labels
from ..networks.loading import LoadedNetwork
from ..passes.extraction import features_and_logits, watching
from ..passes.precision import arithmetic
from ..probes.feature_set import SPLITS
from ..probes.inputs import Inputs
from .checkpoint import write_feature_file
from .models import evaluating, unwrapped

# Keys of the labels in dictionaries from loaders.
_LABELS = ("labels", "label", "targets", "target")


def capture_features(
    model: nn.Module,
    head: str | nn.Module,
    loader: Iterable[Any] | Mapping[str, Iterable[Any]],
    path: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Pass a loader's batches through a model and keep the inputs of its head: a feature set.

    Args:
        model: in any mode; it runs in evaluation mode without gradients, and the modes of all its parts are restored
            at the end. A wrapper of DistributedDataParallel or torch.compile is taken off.
        head: the classification head, a linear module of the model or its name.
        loader: gives (inputs, labels), or dictionaries with `labels`, `label`, `targets` or `target` beside the model's
            own arguments. Or two loaders of this kind, as {"train": ..., "test": ...}.
        path: where to write the set, for `push_feature_set`. Default: it is not written.
        device: target of the batches. Default: the device of the model's parameters.

    Returns:
        `features` (n, d), `labels` (n,), `head` (c, d), `logits` (n, c), `head_bias` (c,) where the head has one, and
        `split` (n,) where loaders have names; on the processor.

    Raises:
        AnalysisError: `head-not-found` where the head does not run exactly once a batch, or features x head + bias are
            not the logits; `inputs-refused`, `invalid-feature-set`, `invalid-argument`, `non-finite-values`.

    Numerics: float32, as `extraction.extract_features`; a model whose logits are of a narrower type is held to that
        type's tolerance. Memory: 4 n (d + c) bytes, twice that while the set is assembled; on the device a batch.
    """
    plain = unwrapped(model)
    parameter = next(plain.parameters(), None)
    place = torch.device(device or ("cpu" if parameter is None else parameter.device))
    network = _network(plain, head)
    loaders: Mapping[str, Iterable[Any]] = loader if isinstance(loader, Mapping) else {"all": loader}
    if isinstance(loader, Mapping) and not (loader and set(loader) <= set(SPLITS)):
        raise AnalysisError(
            "invalid-argument", f"Loaders must be named train and test, not {', '.join(loader) or 'none'}."
        )
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with evaluating(plain), torch.no_grad(), arithmetic(place):
        for name, batches in loaders.items():
            for batch in batches:
                features, logits, labels = _of_batch(network, batch, place)
                parts.append((features, logits, labels, torch.full_like(labels, SPLITS.get(name, 0))))
    if not parts:
        raise AnalysisError("invalid-feature-set", "The loader gave no batch.")
    names = ("features", "logits", "labels", "split")
    tensors = {name: torch.cat([part[index] for part in parts]) for index, name in enumerate(names)}
    tensors["split"] = tensors["split"].to(torch.uint8)
    if not isinstance(loader, Mapping):
        del tensors["split"]
    tensors["head"] = network.weight.to("cpu", copy=True)
    if network.bias is not None:
        tensors["head_bias"] = network.bias.to("cpu", copy=True)
    _check(tensors)
    if path is not None:
        write_feature_file(tensors, Path(path))
    return tensors


class _Called(nn.Module):
    """Adapts a model to the calls of `extraction`: one argument in, a tensor of logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Inputs) -> Any:
        """Return the model's logits, which it may give as an attribute or an entry of its output."""
        output = self.model(batch) if isinstance(batch, Tensor) else self.model(**batch)
        if isinstance(output, Mapping):
            return output.get("logits")
        return getattr(output, "logits", output)


def _network(model: nn.Module, head: str | nn.Module) -> LoadedNetwork:
    modules = dict(model.named_modules())
    wanted = unwrapped(head) if isinstance(head, nn.Module) else head
    name = next((name for name, module in modules.items() if wanted is module or wanted == name), None)
    linear = None if name is None else modules[name]
    one_place = isinstance(linear, nn.Conv2d) and linear.kernel_size == (1, 1) and linear.groups == 1
    if name is None or not (isinstance(linear, nn.Linear) or one_place):
        candidates = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        asked = head if isinstance(head, str) else type(head).__name__
        raise AnalysisError(
            "head-not-found",
            f"The head must be a linear module of the model ({', '.join(candidates[:20])}), not {asked!r}.",
            candidates=candidates,
        )
    return LoadedNetwork(_Called(model), f"model.{name}" if name else "model")


def _of_batch(
    network: LoadedNetwork, batch: Any, device: torch.device
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"], Int64[Tensor, " n"]]:
    inputs, labels = _taken_apart(batch)
    on_device: Inputs = (
        inputs.to(device) if isinstance(inputs, Tensor) else {name: each.to(device) for name, each in inputs.items()}
    )
    with watching(network) as run:
        passed = run(on_device)
    # A model that is itself narrow, or multiplies in TF32, is held to the wider tolerance.
    wide = isinstance(passed.output, Tensor) and passed.output.dtype in (torch.float32, torch.float64)
    exact = wide and torch.get_float32_matmul_precision() == "highest"
    features, logits = features_and_logits(network, passed, "float32" if exact else "bfloat16", first=True)
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise AnalysisError(
            "invalid-feature-set",
            f"Labels must be whole numbers, one for each of {len(features)} samples, not {labels.dtype} of shape "
            f"{[*labels.shape]}.",
        )
    # Copies: a model may reuse one output tensor for every batch.
    return features.to("cpu", copy=True), logits.to("cpu", copy=True), labels.cpu().long()


def _taken_apart(batch: Any) -> tuple[Tensor | dict[str, Tensor], Tensor]:
    """Return inputs and labels of a batch."""
    match batch:
        case Mapping():
            found = [name for name in _LABELS if name in batch]
            if found:
                inputs = {str(name): each for name, each in batch.items() if name != found[0]}
                return inputs, torch.as_tensor(batch[found[0]])
        case [Tensor() as inputs, labels]:
            return inputs, torch.as_tensor(labels)
        case [Mapping() as inputs, labels]:
            return {str(name): each for name, each in inputs.items()}, torch.as_tensor(labels)
    what = f"a dictionary of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise AnalysisError(
        "invalid-feature-set",
        f"A batch must be (inputs, labels), or a dictionary with one of {', '.join(_LABELS)}, not {what}.",
    )


def _check(tensors: Mapping[str, Tensor]) -> None:
    for name in ("features", "logits", "head"):
        check_finite(name, tensors[name])
    check_labels(tensors["labels"], len(tensors["head"]), "invalid-feature-set")

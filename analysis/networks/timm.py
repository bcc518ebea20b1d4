"""Networks of timm, by their registered names; never pretrained, never from a hub or a file."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

from ..errors import AnalysisError
from .building import check_plain, name_of, refused, require_classes, take_one_tensor

#: Arguments that would fetch weights or files, choose a device, or make something other than a classifier.
FORBIDDEN = (
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "features_only", "kwargs_filter",
    "model_cfg", "no_jit", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_custom_load",
    "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable",
)  # fmt: skip


def names() -> list[str]:
    """Return the names that timm registers, including deprecated ones and those with tags of weights."""
    plain = {*timm.list_models(), *filter(timm.is_model, timm.models.get_deprecated_models())}
    return sorted(plain | set(timm.list_models(include_tags=True)))


def create(description: Mapping[str, Any]) -> nn.Module:
    """Build a network from `{"name": ..., "args": {...}}`: timm.create_model(name, pretrained=False, **args).

    Raises:
        AnalysisError: `invalid-architecture`; errors of timm itself, of any type.
    """
    name, args = description["name"], description["args"]
    # A name with a scheme (hf-hub:, local-dir:) would read from elsewhere; names of the registry have no scheme.
    if ":" in name or "/" in name or not timm.is_model(name):
        raise refused(f"timm {timm.__version__} has no network {name!r}")
    if forbidden := sorted(set(args) & set(FORBIDDEN)):
        raise refused(f"The arguments {', '.join(forbidden)} are not allowed: weights come from the checkpoint")
    check_plain(args)
    network: nn.Module = timm.create_model(name, pretrained=False, **args)
    require_classes(getattr(network, "num_classes", None))
    return take_one_tensor(network)


def data_config(network: nn.Module, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's own settings for a network's images: input_size, interpolation, mean, std, crop_pct, crop_mode.

    Args:
        network: as `create` made it.
        description: its arguments img_size and in_chans take precedence over the registered ones.
    """
    asked: dict[str, Any] = {name: description["args"].get(name) for name in ("img_size", "in_chans")}
    if isinstance(asked["img_size"], list):
        channels = asked["in_chans"] or 3
        asked = {"input_size": (channels, *asked["img_size"])}
    return dict(resolve_data_config(asked, model=network))


def head(network: nn.Module, description: Mapping[str, Any]) -> str | None:
    """Return the name of timm's classifier; None where it is not one module.

    Raises:
        AnalysisError: `head-not-found` for two classifiers, as in distilled networks, whose logits are their mean.
    """
    model: Any = network
    classifier = model.get_classifier()
    if isinstance(classifier, (tuple, list)):
        names = [name_of(network, module) for module in classifier]
        raise AnalysisError(
            "head-not-found",
            f"{description['name']} averages the logits of {len(names)} heads ({', '.join(map(str, names))}); a "
            "network must have one head.",
            candidates=names,
        )
    return name_of(network, classifier) if isinstance(classifier, nn.Module) else None

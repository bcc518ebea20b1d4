"""Which checkpoints belong on one path or in one series, as far as their descriptions tell without torch.

What two configurations write does not say whether they are of one network: dropout, ids of special tokens or a default
that one of them leaves out change nothing that an evaluation sees. Here only what is certain is refused, so that a
client hears of it at once; the worker compares the networks that it has built (`analysis/sweeps/sameness.py`) and has
the last word.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.descriptions.architectures import is_causal_lm
from app.descriptions.labels import own_class_names
from app.errors import ArchitecturesDiffer
from app.models import Checkpoint

Members = dict[str, Any]

# Members of a transformers config that its networks read where they have them, and that no default stands for when both
# configurations state them.
_DECISIVE = (
    "model_type", "architectures", "activation_function", "hidden_act", "hidden_size", "layer_norm_eps",
    "layer_norm_epsilon", "n_embd", "n_head", "n_layer", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip


def require_one_network(rows: Sequence[Checkpoint]) -> None:
    """Raise ArchitecturesDiffer where weights of these checkpoints are certain to be of different networks."""
    _require(rows, _network)


def require_comparable(rows: Sequence[Checkpoint]) -> None:
    """Raise ArchitecturesDiffer where numbers of these checkpoints are certain to be of different classes or kinds."""
    _require(rows, _classes)


def _require(rows: Sequence[Checkpoint], stated: Callable[[Checkpoint], Members]) -> None:
    """Of all that two rows state, both must state the same; what one leaves out decides nothing."""
    first, expected = rows[0], stated(rows[0])
    differing = []
    for row in rows[1:]:
        found = stated(row)
        differing += [
            {
                "checkpoint_id": row.id,
                "name": row.name,
                "member": member,
                "expected": expected[member],
                "found": found[member],
            }
            for member in sorted(expected.keys() & found.keys())
            if found[member] != expected[member]
        ]
    if differing:
        one = differing[0]
        raise ArchitecturesDiffer(
            f"{one['name']!r} ({one['checkpoint_id']}) has {json.dumps(one['found'])} for {one['member']} where "
            f"{first.name!r} ({first.id}) has {json.dumps(one['expected'])}; {len(differing)} differences in all.",
            differing=differing[:20],
        )


def _network(row: Checkpoint) -> Members:
    """What a checkpoint states of its network, by its place, and nothing that may mean the same in other words."""
    architecture = row.architecture
    members: Members = {"architecture.family": architecture["family"]}
    if row.head is not None:
        members["head"] = row.head
    match architecture:
        case {"family": "builtin", "name": name, "args": dict(args)}:
            # The API has filled the defaults in.
            members |= {"architecture.name": name, **{f"architecture.args.{key}": args[key] for key in args}}
        case {"family": "transformers", "config": dict(config)}:
            members |= {f"architecture.config.{key}": config[key] for key in _DECISIVE if key in config}
        case {"family": "torchvision" | "custom", "name": name}:
            members["architecture.name"] = name
    return members | _names(architecture)


def _classes(row: Checkpoint) -> Members:
    """What a checkpoint states of what it predicts."""
    architecture = row.architecture
    if is_causal_lm(architecture):
        return {"predicts": "tokens"}
    stated: Members = {"predicts": "classes"}
    match architecture:
        case {"args": {"n_classes": int(n)} | {"num_classes": int(n)} | {"sizes": [*_, int(n)]}}:
            stated["n_classes"] = n
        case {"config": {"id2label": dict(names)}}:
            stated["n_classes"] = len(names)
    return stated


def _names(architecture: Mapping[str, Any]) -> Members:
    """Names of classes, where they are more than LABEL_0, LABEL_1, ...; upper and lower case are one name."""
    names = own_class_names(architecture) or {}
    return {f"architecture.config.id2label.{number}": name.casefold() for number, name in names.items()}

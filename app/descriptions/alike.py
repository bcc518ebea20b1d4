"""Check, without torch, whether checkpoints' descriptions allow them on one path or in one series.

Two configurations that differ may be of one network: dropout, ids of special tokens or a default that one of them
leaves out change nothing that an evaluation sees. Only certain differences are refused here, so that a client gets the
error at once. The worker compares the networks that it has built (`analysis/sweeps/sameness.py`) and makes the final
decision.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.descriptions.architectures import is_causal_lm
from app.descriptions.labels import own_class_names
from app.errors import ArchitecturesDiffer
from app.models import Checkpoint

Members = dict[str, Any]

# Members of a transformers config that its networks use where they exist. If both configurations state one, no default
# replaces it.
_DECISIVE = (
    "model_type", "architectures", "activation_function", "hidden_act", "hidden_size", "layer_norm_eps",
    "layer_norm_epsilon", "n_embd", "n_head", "n_layer", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip


def require_one_network(rows: Sequence[Checkpoint]) -> None:
    """Raise ArchitecturesDiffer if weights of these checkpoints are certain to be of different networks."""
    _require(rows, _network)


def require_comparable(rows: Sequence[Checkpoint]) -> None:
    """Raise ArchitecturesDiffer if numbers of these checkpoints are certain to be of different classes or kinds."""
    _require(rows, _classes)


def _require(rows: Sequence[Checkpoint], stated: Callable[[Checkpoint], Members]) -> None:
    """Check that each row agrees with the first in all members that both state; skip the others."""
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
    """Return a checkpoint's decisive statements of its network, by path; leave out those with equivalent spellings."""
    architecture = row.architecture
    members: Members = {"architecture.family": architecture["family"]}
    if row.head is not None:
        members["head"] = row.head
    match architecture:
        case {"family": "builtin", "name": name, "args": dict(args)}:
            # The API has filled in the defaults.
            members |= {"architecture.name": name, **{f"architecture.args.{key}": args[key] for key in args}}
        case {"family": "transformers", "config": dict(config)}:
            members |= {f"architecture.config.{key}": config[key] for key in _DECISIVE if key in config}
        case {"family": "exported", "graph": graph}:
            members["architecture.graph"] = graph
        case {"family": "torchvision" | "custom", "name": name}:
            members["architecture.name"] = name
    return members | _names(architecture)


def _classes(row: Checkpoint) -> Members:
    """Return a checkpoint's statements of its predictions."""
    architecture = row.architecture
    if is_causal_lm(architecture):
        return {"predicts": "tokens"}
    stated: Members = {"predicts": "classes"}
    match architecture:
        case {"args": {"n_classes": int(n)} | {"num_classes": int(n)} | {"sizes": [*_, int(n)]}}:
            stated["n_classes"] = n
        case {"family": "exported", "logits": [*_, int(n)]}:
            stated["n_classes"] = n
        case {"config": {"id2label": dict(names)}}:
            stated["n_classes"] = len(names)
    return stated


def _names(architecture: Mapping[str, Any]) -> Members:
    """Return names of classes, if they are more than LABEL_0, LABEL_1, ...; upper and lower case are one name."""
    names = own_class_names(architecture) or {}
    return {f"architecture.config.id2label.{number}": name.casefold() for number, name in names.items()}

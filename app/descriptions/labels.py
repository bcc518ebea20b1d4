"""Match a checkpoint's classes with a probe's: labels in the order of its spec's names, matched by name, or tokens.

A probe's labels index its own class names; a checkpoint's head indexes those of its `id2label`. If both have names, the
names must match, or every accuracy would be of the wrong classes. They are compared in Unicode's composed form (NFC). A
causal language model predicts the tokens of the probe's sequences, which need no labels; every other network needs
them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import normalize

from app.descriptions.architectures import is_causal_lm
from app.errors import InvalidRequest, LabelsDiffer, ProbeUnsuitable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_LISTED = 20
_DEFAULT_NAME = re.compile(r"LABEL_\d+\Z")


@dataclass(frozen=True)
class LabelMap:
    """Mapping of a probe's labels to a checkpoint's.

    Attributes:
        matched: by "order" if one of the two has no names; by "name"; by "name_ignoring_case".
        numbers: for each class of the probe, its index in the checkpoint's head; None leaves the labels unchanged.
    """

    matched: Literal["order", "name", "name_ignoring_case"]
    numbers: list[int] | None


# Names in configurations for a network's number of positions; as in analysis/probes/texts.py.
_POSITIONS = ("max_position_embeddings", "n_positions")


def require_suitable(
    architecture: Mapping[str, Any], *, content: str, n_classes: int, input_shape: Sequence[int] | None
) -> None:
    """Raise ProbeUnsuitable if the stored rows show that this kind of network cannot be evaluated on the probe.

    Args:
        architecture: a description.
        content: of the probe, like the following arguments.
        n_classes: 0 without labels of whole samples.
        input_shape: of a sample of tensors.
    """
    if not is_causal_lm(architecture):
        if n_classes == 0:
            raise ProbeUnsuitable(
                "The probe has no labels of its samples: it is for causal language models (*ForCausalLM), which "
                "predict its tokens. A classifier needs a probe with labels."
            )
        return
    if content == "images" or (input_shape is not None and len(input_shape) != 1):
        held = "images" if content == "images" else f"tensors of the shape {list(input_shape or ())}"
        raise ProbeUnsuitable(
            f"A causal language model takes texts, or input_ids (N, T); the probe holds {held}.",
            content=content,
        )
    positions = [
        architecture["config"][name] for name in _POSITIONS if isinstance(architecture["config"].get(name), int)
    ]
    if input_shape is not None and positions and input_shape[0] > min(positions):
        raise ProbeUnsuitable(
            f"The probe's sequences have {input_shape[0]} tokens, padding included; the network has positions for "
            f"{min(positions)}.",
            n_tokens=input_shape[0],
            n_positions=min(positions),
        )


def match_labels(class_names: Sequence[str] | None, architecture: Mapping[str, Any]) -> LabelMap:
    """Match a probe's class names with those of a checkpoint's architecture.

    Args:
        class_names: of the probe, in the order of its labels.
        architecture: a description; transformers' may have `id2label` in its config. LABEL_0, LABEL_1, ... are ignored.

    Raises:
        LabelsDiffer: a name of the probe matches none, or several, of the checkpoint's; it contains both lists.
    """
    labels = own_class_names(architecture)
    if class_names is None or labels is None:
        return LabelMap("order", None)
    class_names = _composed(class_names)
    if list(class_names) == list(labels.values()) and list(labels) == list(range(len(labels))):
        return LabelMap("name", None)
    found = _places(class_names, labels)
    numbers = [places[0] for places in found if len(places) == 1]
    if len(set(numbers)) < len(class_names):
        missing = [name for name, places in zip(class_names, found, strict=True) if len(places) != 1]
        raise _differ(missing, class_names, list(labels.values()))
    by_name = set(class_names) <= set(labels.values())
    same = numbers == list(range(len(numbers)))
    return LabelMap("name" if by_name else "name_ignoring_case", None if same else numbers)


def named_labels(
    labels: "npt.NDArray[np.int64]", own: list[str] | None, given: list[str] | None
) -> "tuple[npt.NDArray[np.int64], list[str] | None]":
    """Return a file's labels in the order of its spec's names, or else of its own names, and these names.

    Raises:
        InvalidRequest: as `name_classes`.
    """
    if own is None or given is None:
        return labels, own or given
    numbers = name_classes(own, given)
    if numbers is None:
        return labels, given
    import numpy as np  # here: the API loads it with the first file that it inspects

    return np.array(numbers)[labels], given


def name_classes(own: Sequence[str], given: Sequence[str]) -> list[int] | None:
    """Number a file's own classes by the names that a spec gives: each by its name, in any order.

    If none of the names is the file's, they are new names for its classes, in their order.

    Returns:
        For each of the file's classes its index in `given`; None if the numbering is unchanged.

    Raises:
        InvalidRequest: some names are the file's and some are not, or there are more or fewer.
    """
    own, given = _composed(own), _composed(given)
    found = _places(own, dict(enumerate(given)))
    if own == given or (len(own) == len(given) and not any(found)):
        return None
    numbers = [places[0] for places in found if len(places) == 1]
    if len(set(numbers)) < len(own):
        raise InvalidRequest(
            f"class_names are {_quoted(given)}; the file's own are {_quoted(own)}. Give all of these, in the order "
            "that the labels should have, or another name for each, in this order, or leave class_names out."
        )
    return numbers


def _places(names: Sequence[str], labels: Mapping[int, str]) -> list[list[int]]:
    """Return for each name the numbers that have it, else those that have it when case is ignored."""
    exact: dict[str, list[int]] = {}
    folded: dict[str, list[int]] = {}
    for number, name in labels.items():
        exact.setdefault(name, []).append(number)
        folded.setdefault(_folded(name), []).append(number)
    return [exact.get(name) or folded.get(_folded(name)) or [] for name in names]


def _composed(names: Sequence[str]) -> list[str]:
    return [normalize("NFC", name) for name in names]


def _folded(name: str) -> str:
    # Case folding may decompose a composed letter.
    return normalize("NFC", name.casefold())


def own_class_names(architecture: Mapping[str, Any]) -> dict[int, str] | None:
    """Return names by their index in the head, in this order; None if they are missing, or the library's defaults."""
    match architecture.get("config"):
        case {"id2label": dict(given)} if given:
            pass
        case _:
            return None
    try:
        labels = {int(number): normalize("NFC", str(name)) for number, name in given.items()}
    except ValueError:
        return None
    if all(_DEFAULT_NAME.match(name) for name in labels.values()):
        return None
    return dict(sorted(labels.items()))


def _differ(missing: Sequence[str], class_names: Sequence[str], labels: Sequence[str]) -> LabelsDiffer:
    which = f"Of the probe's classes {', '.join(map(repr, missing[:5]))}" if missing else "Two of the probe's classes"
    return LabelsDiffer(
        f"{which} cannot be matched, each with one of the checkpoint's. The probe has {_quoted(class_names)}; the "
        f"checkpoint's id2label has {_quoted(labels)}. Give the probe the checkpoint's names as class_names, in "
        "the order of its own, or leave id2label out of the config, which takes the labels in their order.",
        unmatched=list(missing[:_LISTED]),
        class_names=list(class_names[:_LISTED]),
        id2label=list(labels[:_LISTED]),
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_LISTED])) + (
        f" and {len(names) - _LISTED} others" if len(names) > _LISTED else ""
    )

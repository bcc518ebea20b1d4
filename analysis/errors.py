"""One exception for faults of a checkpoint, a probe or an argument, with a kind.

Any other exception is a bug. The service turns an AnalysisError into the `problem` of the failed analysis, so
`detail` states the value received and the value expected, and `members` carry the facts for programs.

| kind | raised when |
|---|---|
| invalid-architecture | the description names no network that can be built |
| family-unavailable | the package of the description's family is not installed here |
| architectures-differ | networks that should be one function of their weights, or have the same classes, do not |
| checkpoint-mismatch | names or shapes of the file's tensors do not fit the architecture |
| head-not-found | the named head is not a linear module of the network, or does not give its logits |
| invalid-probe | inputs, labels or splits are missing or do not fit each other |
| invalid-feature-set | features, labels or head are missing or do not fit each other |
| non-finite-values | a tensor holds NaN or infinity |
| inputs-refused | the network cannot take inputs of the probe's shape, or writes into them |
| out-of-memory | one sample at a time is already too much |
| alignment-failed | permuting hidden units changed what the network computes |
| invalid-argument | an argument of a function of this package |
"""

from typing import Any, Literal, get_args

Kind = Literal[
    "invalid-architecture",
    "family-unavailable",
    "architectures-differ",
    "checkpoint-mismatch",
    "head-not-found",
    "invalid-probe",
    "invalid-feature-set",
    "non-finite-values",
    "inputs-refused",
    "out-of-memory",
    "alignment-failed",
    "invalid-argument",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TITLES: dict[Kind, str] = {
    "invalid-architecture": "The architecture cannot be built",
    "family-unavailable": "The worker lacks this family of networks",
    "architectures-differ": "The checkpoints have different architectures",
    "checkpoint-mismatch": "The checkpoint does not fit its architecture",
    "head-not-found": "The classification head was not found",
    "invalid-probe": "The probe is not valid",
    "invalid-feature-set": "The feature set is not valid",
    "non-finite-values": "A tensor holds NaN or infinity",
    "inputs-refused": "The network refuses inputs of this shape",
    "out-of-memory": "Memory ran out",
    "alignment-failed": "The networks cannot be aligned",
    "invalid-argument": "An argument is not valid",
}


class AnalysisError(Exception):
    """An expected failure of an analysis.

    Attributes:
        kind: one of the kinds in the module's docstring.
        title: the kind in words.
        detail: the value received and the value expected in this case.
        members: further facts as JSON values, such as lists of names.
    """

    def __init__(self, kind: Kind, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.kind = kind
        self.title = _TITLES[kind]
        self.detail = detail
        self.members = members

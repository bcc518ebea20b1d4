"""MIR and HDR of pairs, beside their optimum and their permutation baseline."""

from dataclasses import dataclass

from .collapse import Optimum
from .joint import Method
from .null import Null
from .spectrum import Entropies, hdr_of, mir_of

# A null counts as one single value where its standard deviation, or that of the information in nats, is below this:
# every permutation gives the same Gram matrices.
_DEGENERATE = 1e-12


@dataclass(frozen=True)
class Distance:
    """Absolute distances of MIR and HDR from their optimum."""

    mir: float | None
    hdr: float | None


@dataclass(frozen=True)
class Interplay:
    """MIR and HDR at one level and centring; an undefined value is None, with a reason under its name.

    `degenerate_samples` and `degenerate_classes` count samples and classes that were left out because their own vector
    (a class: its head row, or at class-mean level its mean) has no direction.
    """

    mir: float | None
    hdr: float | None
    mutual_information: float | None
    entropy_features: float | None
    entropy_head: float | None
    entropy_joint: float | None
    optimum: Optimum
    distance_to_optimum: Distance
    null: Null | None
    mir_z: float | None
    degenerate_samples: int
    degenerate_classes: int
    method: Method | None
    reasons: dict[str, str]


@dataclass(frozen=True)
class Degenerate:
    """Numbers of samples and of classes without a direction."""

    samples: int
    classes: int


def interplay(
    entropies: Entropies | None,
    null: Null | None,
    ideal: Optimum,
    degenerate: Degenerate,
    *,
    permuted: bool,
    opposite_rows: bool,
) -> Interplay:
    """Return MIR, HDR and what belongs to them, with a reason for each undefined value.

    Args:
        entropies: of the pairs; None where no pair is left.
        null: the permutation baseline; None where it was not requested or MIR is undefined.
        ideal: MIR and HDR at complete collapse.
        degenerate: numbers of samples and classes that are not among the pairs.
        permuted: whether the baseline was requested.
        opposite_rows: whether the head consists of two centred rows. They are opposite, so that H(K2) is 0 for any
            network, and HDR 1 wherever defined.
    """
    mir = hdr = None
    if entropies is not None:
        mir = mir_of(entropies.features, entropies.head, entropies.joint)
        hdr = hdr_of(entropies.features, entropies.head)
    z = None if entropies is None or null is None else _z(null, entropies)
    distance = Distance(_distance(mir, ideal.mir), _distance(hdr, ideal.hdr))
    undefined = "no_directions" if entropies is None else "zero_entropy"
    reasons: dict[str, str] = {}
    if ideal.mir is None:
        reasons.update({"optimum.mir": "zero_entropy", "optimum.hdr": "zero_entropy"})
    if entropies is None:
        names = ("mutual_information", "entropy_features", "entropy_head", "entropy_joint", "method")
        reasons.update(dict.fromkeys(names, undefined))
    for name, value in (("mir", mir), ("hdr", hdr)):
        if value is None:
            reasons[name] = undefined
    if opposite_rows and entropies is not None:
        reasons["mir"] = reasons["hdr"] = "two_classes"
    for name, gap in (("mir", distance.mir), ("hdr", distance.hdr)):
        if gap is None:
            reasons[f"distance_to_optimum.{name}"] = reasons.get(name, "zero_entropy")
    if null is None:
        reasons["null"] = reasons["mir_z"] = undefined if permuted else "not_requested"
    elif z is None:
        reasons["mir_z"] = "null_degenerate"
    return Interplay(
        mir=mir,
        hdr=hdr,
        mutual_information=entropies.information if entropies else None,
        entropy_features=entropies.features if entropies else None,
        entropy_head=entropies.head if entropies else None,
        entropy_joint=entropies.joint if entropies else None,
        optimum=ideal,
        distance_to_optimum=distance,
        null=null,
        mir_z=z,
        degenerate_samples=degenerate.samples,
        degenerate_classes=degenerate.classes,
        method=entropies.method if entropies else None,
        reasons=reasons,
    )


def _z(null: Null, entropies: Entropies) -> float | None:
    """Return the height of the observed MIR over its permutations in standard deviations; None where these are 0."""
    # The rounding error of the information is divided by the smaller entropy, which may be tiny.
    if null.std * min(entropies.features, entropies.head, 1.0) < _DEGENERATE:
        return None
    return (null.observed - null.mean) / null.std


def _distance(value: float | None, ideal: float | None) -> float | None:
    return None if value is None or ideal is None else abs(value - ideal)

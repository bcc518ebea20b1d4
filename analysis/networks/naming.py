"""Match the tensors of a file to those of a network, by the network's own names.

Training leaves wrappers before and within names, and tensors beside the weights. A prefix is a place of the file that
holds all of the network's tensors, with their shapes; tensors elsewhere are extra. Prefixes are not taken from a list:
a network that has parts named like wrappers, an optimizer or a copy keeps them.

Parts of wrappers in the middle of names come from a list, and count only if the network has no part of that name. Names
saved by earlier versions of a module become the current ones by the module's own loading hooks, and by its library's
table.
"""

import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AnalysisError
from .family import Family, OwnLoading
from .ties import Ties

# Names of the module within a wrapper in torch, Lightning, accelerate, DeepSpeed, Opacus and fairscale.
_WRAPPERS = frozenset(
    (
        "module", "_module", "_orig_mod", "_forward_module", "_original_module", "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module", "_fpw_module",
    )
)  # fmt: skip
# Usual places of weights: beside one of these, or beside bare names, averaged weights count as a copy.
_USUAL = frozenset((*_WRAPPERS, "model", "network", "net", "state_dict"))
_AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|shadow)(_|$)")
# In bare names: parts that only training has. Tensors that are not floating-point are not weights either.
_BESIDE = re.compile(
    r"(^|_)(optim(izers?)?|schedulers?|scaler|ema|swa|averaged?|shadow|criterions?|loss(es)?|metrics?|acc|accuracy"
    r"|auroc|f1|confmat)(_|$)",
    re.IGNORECASE,
)
# Limits of the search for prefixes: their depth, and their number; places with the most tensors come first.
_MAX_PREFIX_PARTS, _MAX_PLACES = 8, 1000

# The most names in one list of an error's members, which also give the true number; the most entries of ignored names.
_MAX_LISTED, _MAX_IGNORED = 20, 50

#: safetensors' names of the types that may fill a floating-point parameter.
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_INTEGER = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

#: Counts batches in training; evaluation never reads it, and averaged or converted checkpoints lose or change it.
BATCH_COUNTER = "num_batches_tracked"
_RUNNING_STATISTICS = ("running_mean", "running_var")

Same = Callable[[str, str], bool]


class Entry(NamedTuple):
    """Type and shape of a tensor in a file's header, in safetensors' terms."""

    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class Naming:
    """The file's names of a network's tensors, and the file's other tensors.

    Attributes:
        prefix: prefix of the network's own names, such as `module.`.
        infixes: for parts of wrappers within names, such as `_orig_mod.`, the number of names.
        ignored: number of tensors that are not the network's, by the beginning of their names, with * for a number.
            The rest of a long list is under `*`.
        untied: names of tensors that the configuration ties to others but that differ from them in the file; the
            library keeps them apart, and so do we.
        n_parameters: elements of the network's floating-point tensors in the file, without running statistics.
    """

    prefix: str = ""
    infixes: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    n_parameters: int = 0


def match_names(
    network: nn.Module,
    family: Family,
    header: Mapping[str, Entry],
    ties: Ties,
    *,
    prefix: str | None,
    same: Same,
    supplied: Mapping[str, Sequence[int]] | None = None,
) -> tuple[dict[str, str], Naming]:
    """Find a network's tensors in a file's header, before any of them is read.

    Args:
        network: on the meta device.
        family: of the network. Its `stored_names` turns names of a file into the network's, and its `leaves_out` tells
            which other tensors of a file its library would ignore.
        header: of the file.
        ties: of the network; a file may hold any of the names that share one tensor.
        prefix: prefix of the weights, if the caller gives one. Default: the only possible place.
        same: whether two tensors of the file, by name, are equal. It is called only for two candidates for the same
            tensor of the network.
        supplied: shapes of tensors that another file supplies, by the network's names: this one may lack those of them
            that the network has in this shape.

    Returns:
        The file's name of each of the network's tensors that it holds, by the network's own name; and the naming, with
        `untied` not yet filled in.

    Raises:
        AnalysisError: `checkpoint-mismatch` with the names that are missing, unexpected, misshaped or mistyped; or with
            a reason: `ambiguous`, where the weights can be in several places and differ, with these as `candidates`;
            `conversion`.
    """
    own, names = _Own(network, family, ties, supplied or {}), sorted(header)
    places = _places(header, own.n_required) if prefix is None else [prefix]
    candidates = sorted((own.candidate(place, names, header) for place in places), key=lambda candidate: candidate.rank)
    fitting = _different([candidate for candidate in candidates if candidate.fits], same)
    if len(fitting) > 1:
        raise _ambiguous([candidate.prefix for candidate in fitting])
    chosen = fitting[0] if fitting else candidates[0]
    if chosen.refusal is not None:
        raise chosen.refusal
    copies = {full for candidate in candidates if candidate.fits for full in candidate.stored.values()}
    beside = {full for full, name in chosen.others.items() if full in copies or own.is_beside(name, header[full])}
    if prefix is not None:
        # A given prefix implies that tensors in places that the network lacks are not weights.
        beside |= {full for full, name in chosen.others.items() if name is not None and not own.has_place(name)}
    chosen.faults["unexpected"] = sorted(set(chosen.others) - beside - {full for _, full in chosen.twice})
    if not chosen.fits:
        raise _mismatch(chosen, own, header)
    _require_one_of_each(chosen, copies, same)
    used = set(chosen.stored.values())
    return chosen.stored, Naming(
        prefix=chosen.prefix,
        infixes=dict(sorted(chosen.infixes.items())),
        ignored=_ignored([full for full in header if full not in used], used),
        n_parameters=sum(
            torch.Size(header[full].shape).numel()
            for full in used
            if header[full].dtype in FLOATING and not full.endswith(_RUNNING_STATISTICS)
        ),
    )


@dataclass
class _Candidate:
    """The match of the network's tensors under one prefix.

    Attributes:
        prefix: the prefix, which is taken off.
        stored: the file's name of each of the network's tensors found, by the network's own name.
        others: plain names of other tensors under the prefix, by the file's own; None if torch drops them in loading.
        twice: pairs of the file's names that would be one tensor; the first of each is in `stored`.
        infixes: parts of wrappers taken out of the names in `stored`, with the number of names that have each.
        n_taken: number of parts taken out in total.
        faults: mismatches by kind, as an error lists them.
        refusal: the library's own error for a tensor that it would merge or split.
    """

    prefix: str
    stored: dict[str, str] = field(default_factory=dict)
    others: dict[str, str | None] = field(default_factory=dict)
    twice: list[tuple[str, str]] = field(default_factory=list)
    infixes: Counter[str] = field(default_factory=Counter)
    n_taken: int = 0
    faults: dict[str, list[Any]] = field(default_factory=dict)
    refusal: AnalysisError | None = None

    @property
    def fits(self) -> bool:
        """Whether all of the network's tensors are there, with their shapes and types."""
        return self.refusal is None and not any(self.faults.values())

    @property
    def rank(self) -> tuple[int, ...]:
        """Sort key, best first: most of the network found, most names unchanged, least taken off."""
        n_exact = sum(full == self.prefix + name for name, full in self.stored.items())
        n_wrong = len(self.faults["misshaped"]) + len(self.faults["mistyped"])
        return n_wrong - len(self.stored), -n_exact, self.n_taken, len(self.prefix)


class _Own:
    """A network's own names, and the conversion of a file's names into them."""

    def __init__(self, network: nn.Module, family: Family, ties: Ties, supplied: Mapping[str, Sequence[int]]) -> None:
        self._ties = ties
        self._renaming = [
            (f"{path}." if path else "", module)
            for path, module in network.named_modules()
            if module._load_state_dict_pre_hooks
            or not type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        ]
        self.state: dict[str, Tensor] = network.state_dict()
        self._supplied = {
            name for name, shape in supplied.items() if name in self.state and [*self.state[name].shape] == [*shape]
        }
        parts = {part for name in self.state for part in name.split(".")}
        self._wrappers = _WRAPPERS - parts
        self._places = {name.split(".")[0] for name in self.state} | {name for name, _ in network.named_children()}
        self._rename: Callable[[str], str] = str
        self._leaves_out: Callable[[str], bool] = lambda _: False
        if isinstance(family, OwnLoading):
            self._rename, self._leaves_out = family.stored_names(network), family.leaves_out(network)
        self._computed = {name for name, _ in network.named_buffers()} - set(self.state)
        self.n_required = sum(not self._may_lack(name) and name not in ties.first for name in self.state)

    def has_place(self, name: str) -> bool:
        """Return whether the network has the top-level part of this tensor's name."""
        return name.split(".")[0] in self._places

    def is_beside(self, name: str | None, entry: Entry) -> bool:
        """Return whether a tensor that the network lacks can be ignored, as it is not a weight of a larger network."""
        if name is None or name in self._computed or self._leaves_out(name):
            return True
        if self.has_place(name):
            return False
        return entry.dtype in _INTEGER or _BESIDE.search(name.split(".")[0]) is not None

    def candidate(self, prefix: str, names: Sequence[str], header: Mapping[str, Entry]) -> _Candidate:
        """Match the network's tensors to those under a prefix; `names` are the file's, sorted."""
        found = _Candidate(prefix)
        behind = names[bisect_left(names, prefix) : bisect_left(names, prefix + chr(sys.maxunicode))]
        plain = {full: full[len(prefix) :] for full in behind}
        taken = {full: [part for part in name.split(".") if part in self._wrappers] for full, name in plain.items()}
        for full, wrappers in taken.items():
            if wrappers:
                plain[full] = ".".join(part for part in plain[full].split(".") if part not in self._wrappers)
        loaded = self._as_torch_loads(set(plain.values()))
        # The network's own names take precedence over names that are converted to them.
        for full in sorted(plain, key=lambda full: plain[full] not in self.state):
            name = loaded[plain[full]]
            if name is not None:
                try:
                    name = self._rename(name)
                except AnalysisError as refusal:
                    found.refusal = found.refusal or refusal
            if name not in self.state:
                found.others[full] = name
            elif name in found.stored:
                found.twice.append((found.stored[name], full))
                found.others[full] = name
            else:
                found.stored[name] = full
        for name in self._supplied & found.stored.keys():
            # Such as a head for other classes.
            if header[found.stored[name]].shape != list(self.state[name].shape):
                del found.stored[name]
        self._ties.fill(found.stored)
        # In the file's order, so that a report lists them alike in every process.
        for full in dict.fromkeys(found.stored.values()):
            found.infixes.update(f"{part}." for part in dict.fromkeys(taken[full]))
            found.n_taken += len(taken[full])
        found.faults = self._faults(found.stored, header)
        return found

    def _as_torch_loads(self, names: Iterable[str]) -> dict[str, str | None]:
        """Return names after torch's loading: modules rename tensors of their earlier versions, or drop them (None).

        For example weight normalisation, which was `weight_g` and `weight_v` before it was a parametrisation.
        """
        became: dict[str, str | None] = {name: name for name in names}
        for begin, module in self._renaming:
            # Scalars without memory stand for the tensors; their identity shows how each was renamed.
            tokens = {
                now: (torch.empty((), device="meta"), name)
                for name, now in became.items()
                if now is not None and now.startswith(begin)
            }
            state: dict[str, Any] = {now: token for now, (token, _) in tokens.items()}
            try:
                module._load_from_state_dict(state, begin, {}, False, [], [], [])
            except Exception:  # noqa: BLE001, S112  whatever a hook makes of scalars: then names are what they are
                continue
            now_of = {id(token): now for now, token in state.items()}
            became |= {name: now_of.get(id(token)) for token, name in tokens.values()}
        return became

    def _faults(self, stored: Mapping[str, str], header: Mapping[str, Entry]) -> dict[str, list[Any]]:
        missing = [name for name in self.state if name not in stored and not self._may_lack(name)]
        misshaped, mistyped = [], []
        for name, full in stored.items():
            tensor, (dtype, shape) = self.state[name], header[full]
            if shape != list(tensor.shape):
                misshaped.append({"name": name, "expected": list(tensor.shape), "found": shape})
            if dtype not in self._allowed(name, tensor):
                expected = str(tensor.dtype).removeprefix("torch.")
                mistyped.append({"name": name, "expected": expected, "found": dtype})
        return {"missing": missing, "unexpected": [], "misshaped": misshaped, "mistyped": mistyped}

    def _allowed(self, name: str, tensor: Tensor) -> tuple[str, ...]:
        if tensor.is_floating_point():
            return FLOATING
        return (*_INTEGER, *FLOATING) if self._optional(name) else _INTEGER

    def _may_lack(self, name: str) -> bool:
        """Return whether the file need not hold a tensor of the network."""
        return self._optional(name) or name in self._supplied

    def _optional(self, name: str) -> bool:
        return name.endswith(BATCH_COUNTER)


def _places(names: Collection[str], n_required: int) -> list[str]:
    """Return prefixes that may hold a good part of a network's n_required tensors; always includes no prefix."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1][:_MAX_PREFIX_PARTS]
        counts.update(".".join(parts[:n]) + "." for n in range(1, len(parts) + 1))
    likely = [place for place, count in counts.most_common() if 2 * count >= n_required]
    return ["", *likely[:_MAX_PLACES]]


def _different(fitting: list[_Candidate], same: Same) -> list[_Candidate]:
    """Return candidates with different tensors; prefer the plain weights to averaged copies of them."""
    kept: list[_Candidate] = []
    for candidate in fitting:
        used = set(candidate.stored.values())
        if not any(used.issubset(other.stored.values()) or _equal(candidate, other, same) for other in kept):
            kept.append(candidate)
    plain = [candidate for candidate in kept if not any(map(_AVERAGED.search, candidate.prefix.split(".")))]
    if len(plain) == 1 and _USUAL.issuperset(plain[0].prefix.split(".")[:-1]):
        return plain
    return kept


def _equal(one: _Candidate, other: _Candidate, same: Same) -> bool:
    pairs = {(one.stored[name], other.stored[name]) for name in one.stored.keys() & other.stored.keys()}
    return all(a == b or same(a, b) for a, b in pairs)


def _require_one_of_each(chosen: _Candidate, copies: Collection[str], same: Same) -> None:
    for full, other in chosen.twice:
        if other not in copies and not same(full, other):
            raise AnalysisError(
                "checkpoint-mismatch",
                f"The file's tensors {full!r} and {other!r} differ, but are the same tensor of the network.",
                reason="ambiguous",
                candidates=[full, other],
            )


def _ambiguous(prefixes: list[str]) -> AnalysisError:
    shown = ", ".join(repr(prefix) if prefix else "'' (no prefix)" for prefix in prefixes[:_MAX_LISTED])
    return AnalysisError(
        "checkpoint-mismatch",
        f"The file holds {len(prefixes)} complete sets of the network's tensors that differ, with prefixes {shown}. "
        "Push it again with the right one as its `prefix`.",
        reason="ambiguous",
        candidates=prefixes[:_MAX_LISTED],
    )


def _mismatch(chosen: _Candidate, own: _Own, header: Mapping[str, Entry]) -> AnalysisError:
    counts = ", ".join(f"{len(entries)} {what}" for what, entries in chosen.faults.items() if entries)
    behind = f" with the prefix {chosen.prefix!r}" if chosen.prefix else ""
    return AnalysisError(
        "checkpoint-mismatch",
        f"The architecture has {len(own.state)} tensors, the file {len(header)}{behind}; they do not match: {counts}.",
        **mismatch_members(chosen.faults),
    )


def mismatch_members(faults: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the members of an error that list mismatches by kind: the first of each, and their true numbers."""
    return {
        **{what: entries[:_MAX_LISTED] for what, entries in faults.items()},
        **{f"n_{what}": len(entries) for what, entries in faults.items()},
    }


def _ignored(left_out: Iterable[str], used: Iterable[str]) -> dict[str, int]:
    """Count ignored names by their shortest beginnings that no used name shares."""
    known = {beginning for name in used for beginning in _beginnings(name)}
    counts: Counter[str] = Counter()
    for name in left_out:
        beginning = next((one for one in _beginnings(name) if one not in known), name)
        first, *parts = beginning.split(".")
        counts[".".join([first, *("*" if part.isdecimal() else part for part in parts)])] += 1
    most = dict(sorted(counts.most_common(_MAX_IGNORED)))
    rest = counts.total() - sum(most.values())
    return {**most, "*": rest} if rest else most


def _beginnings(name: str) -> Iterator[str]:
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1]
        at = name.find(".", at + 1)

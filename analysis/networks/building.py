"""Build a network from an untrusted description: first without memory and bounded, then without initial weights.

A description of a few bytes can request a million layers. On the meta device their widths are free and their number is
not, so torch operations are counted and stopped at a limit. Work of the library before its first call of torch, such as
lists as long as the depth, is bounded by limits on the description's own numbers.
"""

import re
from collections.abc import Mapping, Sequence
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import AnalysisError

# The same bounds hold in app/descriptions/architectures.py, which a test compares.
MAX_NESTING = 8
MAX_LIST = 4096
MAX_DEPTH = 100_000
MAX_CLASSES = 100_000
# Members that count layers in one library or another: num_hidden_layers, n_layer, depths, num_blocks, layers, repeats.
DEPTH = re.compile(r"layer|depth|block|stage|repeat|expert", re.IGNORECASE)

# Most torch operations of a constructor: a fixed part, and a part for each tensor of the file. The most seen in 448
# networks of the three libraries: 22 operations a tensor, where each block computes tables of positions (MaxViT).
_FIXED_OPERATIONS, _OPERATIONS_A_TENSOR = 20_000, 100
# Most elements of a constant that a constructor makes on a real device, or that is not a parameter.
_MAX_CONSTANT = 2**26

_IN_PLACE = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "bernoulli_", "erfinv_", "zero_", "fill_", "mul_", "add_", "clamp_")
)


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Counts a constructor's torch operations, and stops it beyond a limit.

    Args:
        n_tensors: number of tensors of the file.

    Attributes:
        largest: elements of the largest tensor that was made, without memory or with it.

    Raises:
        AnalysisError: `invalid-architecture`, from within the constructor.
    """

    def __init__(self, n_tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self._n_tensors = n_tensors
        self._left = _FIXED_OPERATIONS + _OPERATIONS_A_TENSOR * n_tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._left -= 1
        if self._left < 0:
            raise AnalysisError(
                "invalid-architecture",
                f"The description asks for far more layers than the {self._n_tensors} tensors of the file.",
            )
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "meta":
            # A constant on a real device: made without memory first, to check its size.
            self._look_at(func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": False}))
        made = func(*args, **kwargs)
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made

    def check_largest(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a network that computes a tensor far larger than any of its weights, such as a mask of positions.

        Args:
            shapes: of the network's tensors, which are also the file's.

        Raises:
            AnalysisError: `invalid-architecture`.
        """
        if self.largest > max(_MAX_CONSTANT, *(prod(shape) for shape in shapes.values()), 0):
            raise AnalysisError(
                "invalid-architecture", f"The description asks for a constant of {self.largest} elements."
            )

    def _look_at(self, constant: Any) -> None:
        if isinstance(constant, Tensor) and constant.numel() > _MAX_CONSTANT:
            raise AnalysisError(
                "invalid-architecture", f"The description asks for a constant of {constant.numel()} elements."
            )


class WithoutInitialisation(TorchFunctionMode):
    """Skips the initialisation of parameters, which a file will replace. Buffers are computed as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A function of torch.nn.init arrives here as a whole, with its tensor by name.
        target = args[0] if args else kwargs.get("tensor")
        fills = getattr(func, "__name__", "") in _IN_PLACE or getattr(func, "__module__", "") == "torch.nn.init"
        if fills and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


class ConstantsOnCpu(TorchFunctionMode):
    """Makes sequences of numbers with values, although torch's default device has none.

    Some constructors compute their layers' sizes with tensors, as torchvision's RegNet does.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.arange, torch.linspace, torch.tensor) or "device" in kwargs:
            return func(*args, **kwargs)
        made = func(*args, **kwargs, device="cpu")
        # Computations from a sequence now cost memory, which may grow with the square of its length.
        if made.numel() > MAX_LIST:
            raise refused(f"The description asks for a constant of {made.numel()} elements")
        return made


def check_plain(value: Any, *, name: str = "", nesting: int = 0) -> None:
    """Refuse values that are not JSON, or would make a library build long lists.

    Args:
        value: a member of a description.
        name: of that member.
        nesting: objects and lists around it.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    if nesting > MAX_NESTING:
        raise refused(f"The description is nested deeper than {MAX_NESTING} levels")
    match value:
        case None | bool() | str():
            return
        case int() | float():
            if not isfinite(value) or abs(value) > 2**53:
                raise refused(f"{name} must be a finite number below 2^53, not {value}")
        case list() | tuple():
            if len(value) > MAX_LIST:
                raise refused(f"{name} has {len(value)} entries; at most {MAX_LIST} are allowed")
            for entry in value:
                check_plain(entry, name=name, nesting=nesting + 1)
        case dict():
            for key, entry in value.items():
                check_plain(entry, name=str(key), nesting=nesting + 1)
        case _:
            raise refused(f"{name} must be a JSON value, not a {type(value).__name__}")
    if DEPTH.search(name) and _sum(value) > MAX_DEPTH:
        raise refused(f"{name} asks for {_sum(value):g} layers; at most {MAX_DEPTH} are allowed")


def refused(reason: str) -> AnalysisError:
    """Return the error for a description that cannot be built."""
    return AnalysisError("invalid-architecture", f"{reason}.")


def require_classes(n_classes: Any) -> None:
    """Refuse a network that is not a classifier.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    if type(n_classes) is not int or not 2 <= n_classes <= MAX_CLASSES:
        what = "a single output is a regression" if n_classes == 1 else f"this one has {n_classes!r}"
        raise refused(f"A classifier must have 2 to {MAX_CLASSES} classes; {what}")


def take_one_tensor(network: nn.Module) -> nn.Module:
    """Let a network of images or vectors also take them by the name `pixel_values`.

    Raises:
        AnalysisError: `inputs-refused`, when it is called with other names.
    """

    def single(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Take the one tensor out of a mapping."""
        if not args or not isinstance(args[0], Mapping):
            return None
        if set(args[0]) != {"pixel_values"}:
            names = ", ".join(args[0])
            raise AnalysisError("inputs-refused", f"The network takes inputs or pixel_values; the probe has {names}.")
        return (args[0]["pixel_values"],)

    network.register_forward_pre_hook(single)
    return network


def name_of(network: nn.Module, module: nn.Module) -> str | None:
    """Return the name of a module within a network; None if it is not a part of it."""
    return next((name for name, found in network.named_modules() if found is module), None)


def last_linear(network: nn.Module) -> str | None:
    """Return the name of the last linear module, in the order of construction; None without one."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def _sum(value: Any) -> float | int:
    if isinstance(value, (list, tuple)):
        return sum(_sum(entry) for entry in value)
    return abs(value) if isinstance(value, (int, float)) else 0

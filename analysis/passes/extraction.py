"""One pass of a network over a probe: the inputs of its classification head, and its logits.

Features are the rows for which features @ head.T + bias are the logits. This is checked here for every sample: for a
network that changes its head's output, or has two heads, the measures would describe something else.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64, Integer, Shaped
from torch import Tensor, nn

from ..errors import AnalysisError
from ..measures.entropy import check_finite
from ..measures.labels import check_labels
from ..measures.predictions import Predictions, predictions_of
from ..networks.exported.network import GraphLinear, batch_bounds, filled_up
from ..networks.loading import LoadedNetwork
from ..probes.feature_set import FeatureSet
from ..probes.inputs import Inputs, each, each_input, n_samples
from ..probes.probe import Probe
from . import scratch
from .batching import first_batch_size
from .precision import Precision, arithmetic

Progress = Callable[[str, int, int], None]
"""Called with a phase (`features`, `spectra`, `null`, `metrics`), what is done and of how much."""

#: Frees memory that others than the pass hold, and returns whether there was any. It is called when memory runs out,
#: before a batch is made smaller, so that the size of a batch does not depend on what else is loaded.
reclaim: ContextVar[Callable[[], bool]] = ContextVar("reclaim", default=lambda: False)

# Tolerance of logits against those from features and head, as a share of the product of lengths: 84 roundings of
# float32. In bfloat16 weights and logits are rounded to 8 bits.
_SAME_LOGITS = {"float32": 1e-5, "bfloat16": 1e-2}
# This many samples of the first batch suffice to detect a hook that changes all of them.
_LOOKED_AT = 64


@dataclass(frozen=True)
class PassOptions:
    """How a probe is passed through a network.

    Attributes:
        device: of the pass.
        batch_size: samples at a time; None uses `batching.first_batch_size`.
        precision: of the forward pass.
        progress: called with phase `features` after every batch.
    """

    device: torch.device
    batch_size: int | None = None
    precision: Precision = "float32"
    progress: Progress | None = None


@dataclass(frozen=True)
class Passed:
    """The result of passing one batch.

    Attributes:
        batch: as the network took it.
        output: the network's.
        received: inputs of the head, for each token of each sample; most heads see one token.
        given: outputs of the head, before any further operation.
    """

    batch: Inputs
    output: Any
    received: Float[Tensor, "b t d"]
    given: Float[Tensor, "b t c"]


@runtime_checkable
class Collector(Protocol):
    """Collects results of a pass."""

    def take(self, rows: slice, passed: Passed) -> None:
        """Take one batch, with the rows of its samples in the probe."""


CollectorType = TypeVar("CollectorType", bound=Collector)


def extract_features(
    network: LoadedNetwork,
    probe: Probe,
    *,
    device: torch.device,
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"], int]:
    """Return the head's inputs for every sample of a probe, and the network's logits.

    Args:
        network: moved to the device and left in evaluation mode.
        probe: its inputs are passed in order.
        device: the device of the pass and of the result.
        batch_size: inputs at a time; None uses `batching.first_batch_size`.
        precision: of the forward pass; `bfloat16` runs it under torch.autocast.
        progress: called with phase `features` after every batch.

    Returns:
        Features, logits, both float32, and the batch size of the pass: it is halved, and the pass restarted, when
        memory runs out.

    Raises:
        AnalysisError: `inputs-refused` where the network fails on inputs of this shape or writes into them,
            `head-not-found` where the head does not run exactly once or does not give the logits, `non-finite-values`,
            `out-of-memory`, `invalid-probe`, `invalid-architecture` where the same inputs give other logits.

    Numerics: float32 as the network computes, without TF32; in evaluation mode. Under autocast every bfloat16 value of
        the network is kept as it is, a float32 number of 8 bits: a logit is then off by up to 1 part in 256 of itself,
        and logits closer than that may be equal, in which case the first counts as the largest. A head that runs on
        several tokens of a sample, as in some text networks, gives the logits at one of them; that token's features
        are taken. Features and head must give the logits to 1e-5 (bfloat16: 1e-2) of the product of their lengths.
    """
    samples, size = pass_over(
        network,
        probe,
        lambda: _Samples(network, len(probe.labels), device, precision),
        PassOptions(device, batch_size, precision, progress),
    )
    features, logits = samples.features, samples.logits
    # A linear head makes non-finite logits of non-finite features; `check_identity` covered any other head.
    if not math.isfinite(logits.sum().item()):
        check_finite("features", features)
        check_finite("logits", logits)
    return features, logits, size


def extract_predictions(
    network: LoadedNetwork,
    probe: Probe,
    *,
    device: torch.device,
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> tuple[FeatureSet, int]:
    """Return the head's inputs for every sample of a probe with the network's predictions, which take less than logits.

    Args:
        network: as of `extract_features`.
        probe: as of `extract_features`; its labels are those of the network's classes.
        device: as of `extract_features`.
        batch_size: as of `extract_features`.
        precision: as of `extract_features`.
        progress: as of `extract_features`.

    Returns:
        Features, labels, head and split with predictions, and the batch size of the pass. On the processor features of
        more than 256 MiB lie in a mapped file (`scratch.folder`).

    Raises:
        AnalysisError: as `extract_features`; `invalid-probe` for labels that are no classes.
    """
    check_labels(probe.labels, len(network.weight), "invalid-probe")
    samples, size = pass_over(
        network,
        probe,
        lambda: _Predicted(network, probe.labels, device, precision),
        PassOptions(device, batch_size, precision, progress),
    )
    found = samples.predictions()
    return FeatureSet(samples.features, probe.labels, network.weight, None, None, probe.split, found), size


def pass_over(
    network: LoadedNetwork,
    probe: Probe,
    begin: Callable[[], CollectorType],
    options: PassOptions,
) -> tuple[CollectorType, int]:
    """Pass every sample of a probe through a network, in order.

    Args:
        network: moved to the device and left in evaluation mode.
        probe: its inputs are passed.
        begin: makes the collector; called again when the pass restarts.
        options: of the pass.

    Returns:
        The collector, and the batch size of the pass: it is halved where memory runs out.

    Raises:
        AnalysisError: `invalid-probe` for no samples, `inputs-refused`, `head-not-found`, `out-of-memory`, and errors
            of the collector.
    """
    size = planned_batch_size(network, probe, options)
    least, _ = batch_bounds(network.module)
    while True:
        try:
            collector = begin()
            _pass(network, probe, size, options, collector)
            return collector, size
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # Outside the handler: the error's traceback holds the tensors of the batch.
        if not reclaim.get()():
            if size <= least:
                raise AnalysisError("out-of-memory", f"Memory ran out with {size} inputs at a time.", batch_size=size)
            size = max(size // 2, least)
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def planned_batch_size(network: LoadedNetwork, probe: Probe, options: PassOptions) -> int:
    """Return the batch size with which a pass begins: what is requested, or fits, within what the network takes.

    Args:
        network: moved to the device and left in evaluation mode.
        probe: what will be passed.
        options: of the pass.

    Raises:
        AnalysisError: `invalid-probe` for no samples; as `batching.first_batch_size`.
    """
    n = len(probe.labels)
    if n == 0:
        raise AnalysisError("invalid-probe", "The probe has no samples.")
    module = _ready(network.module, options.device)
    # Called in any case: it refuses a network that is random.
    fitting = first_batch_size(module, probe, device=options.device, precision=options.precision)
    least, most = batch_bounds(module)
    return max(min(options.batch_size or fitting, n, most or n), least)


@contextmanager
def watching(network: LoadedNetwork) -> Iterator[Callable[[Inputs], Passed]]:
    """Yield a function that passes a batch through the network and records inputs and outputs of its head.

    The function raises AnalysisError `inputs-refused` or `head-not-found`, as `extract_features`.
    """
    calls: list[tuple[Any, Any]] = []
    versions: list[int | None] = []
    copying = False

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> None:
        """Record one call of the head."""
        received = args[0] if args else kwargs["input"]
        versions.extend(_versions((received, given)))
        calls.append((received.clone(), given.clone()) if copying else (received, given))

    def once(batch: Inputs) -> Any:
        """Pass a batch and record the calls of the head."""
        calls.clear()
        versions.clear()
        return forward(network.module, batch)

    least, _ = batch_bounds(network.module)

    def run(batch: Inputs) -> Passed:
        """Pass a batch; a second time with copies where the network writes into the head's tensors."""
        nonlocal copying
        n = n_samples(batch)
        if n < least:
            passed = run(each(batch, lambda tensor: filled_up(tensor, least)))
            return Passed(batch, passed.output[:n], passed.received[:n], passed.given[:n])
        before = _versions(each_input(batch))
        output = once(batch)
        # The network may write into its head's inputs or outputs afterwards; if it does, copies are taken.
        if not copying and (None in versions or versions != _versions(tensor for call in calls for tensor in call)):
            if _versions(each_input(batch)) != before:
                raise _writes_into_inputs(batch)
            copying = True
            output = once(batch)
        return Passed(batch, output, *_head_call(calls, network, batch))

    handle = network.head.register_forward_hook(record, with_kwargs=True)
    try:
        yield run
    finally:
        handle.remove()


def features_and_logits(
    network: LoadedNetwork, passed: Passed, precision: Precision, *, first: bool
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b c"]]:
    """Return the head's input for each sample of a batch, and the logits, checked against each other.

    Args:
        network: the network of the pass.
        passed: by `watching`.
        precision: of the pass, or of a network that is itself narrow; it sets the tolerance of the logits.
        first: whether this is the first batch of a pass. Some samples are then also checked against the weight of a
            plain linear head, as a hook may have changed the weight or the output; where the logits are not the head's
            output, all samples are checked.

    Returns:
        Both in float32.

    Raises:
        AnalysisError: `head-not-found`, `non-finite-values`.
    """
    output, received, given = passed.output, passed.received, passed.given
    n, n_classes = n_samples(passed.batch), len(network.weight)
    if not isinstance(output, Tensor) or output.shape != (n, n_classes):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise not_the_head(network, f"The network's output is {shape} and not the {n_classes} logits of its head")
    if received.shape[1] == 1:
        features = received[:, 0].float()
    else:
        tokens = _tokens_of_logits(network, passed.batch, given, output)
        features = received[torch.arange(n, device=received.device), tokens].float()
    logits = output.float()
    if not gives_as_it_is(network, output, given[:, 0]):
        check_identity(network, features, logits, precision)
    elif first:
        check_identity(network, features[:_LOOKED_AT], logits[:_LOOKED_AT], precision)
    return features, logits


def gives_as_it_is(network: LoadedNetwork, output: Shaped[Tensor, "..."], given: Shaped[Tensor, "..."]) -> bool:
    """Return whether the logits are the unchanged output of a plain linear module, so that no check is needed."""
    plain = type(network.head) in (nn.Linear, GraphLinear)
    return plain and output.dtype == given.dtype and torch.equal(output, given)


def forward(module: nn.Module, batch: Inputs) -> Any:
    """Return the network's output; map its errors about the input's shape to `inputs-refused`."""
    try:
        return module(batch)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError) as error:
        if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _is_out_of_memory(error)):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
        raise AnalysisError(
            "inputs-refused",
            f"The network fails on inputs of shape {_shape(batch)}: {reason}",
            input_shape=_shape(batch),
        ) from error


def check_identity(
    network: LoadedNetwork, features: Float[Tensor, "n d"], logits: Float[Tensor, "n c"], precision: Precision
) -> None:
    """Check that features are finite, and that features and head give the logits.

    Raises:
        AnalysisError: `non-finite-values`; `head-not-found` with the largest difference.
    """
    check_finite("features", features)
    weight, bias = network.weight, network.bias
    expected = features @ weight.T
    lengths = torch.outer(features.norm(dim=1), weight.norm(dim=1))
    if bias is not None:
        expected, lengths = expected + bias, lengths + bias.abs()
    difference = (logits - expected).abs()
    # Non-finite logits are reported at the end of the pass.
    wrong = (difference > _SAME_LOGITS[precision] * lengths) & difference.isfinite()
    if bool(wrong.any()):
        largest = float(difference[wrong].max())
        raise not_the_head(
            network,
            f"The network's logits are up to {largest:.3g} from features x head + bias. It has a second head, or "
            "changes the output of its head",
            difference=largest,
        )


def not_the_head(network: LoadedNetwork, detail: str, **members: Any) -> AnalysisError:
    """Return the error for a named head that does not give the logits."""
    return AnalysisError("head-not-found", f"{detail} {network.head_name!r}.", head=network.head_name, **members)


def _ready(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device, and set it to evaluation mode."""
    # A path passes the same network at every point: setting the state again takes far longer than checking it.
    training = away = False
    for part in module.modules():
        training |= part.training
        away |= any(t is not None and t.device != device for t in (*part._parameters.values(), *part._buffers.values()))
    if away:
        module.to(device)
    if training:
        module.eval()
    return module


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The first text is from the processor's allocator, the second from that of pinned memory.
    told = ("not enough memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def _pass(network: LoadedNetwork, probe: Probe, size: int, options: PassOptions, collector: Collector) -> None:
    n = len(probe.labels)
    # Not inference mode: its tensors have no version counter, so writes into them go unnoticed.
    with watching(network) as run, torch.no_grad(), arithmetic(options.device, options.precision):
        done = 0
        for batch in probe.batches(size, device=options.device):
            before = _versions(each_input(batch))
            passed = run(batch)
            if _versions(each_input(batch)) != before:
                raise _writes_into_inputs(batch)
            rows = slice(done, done + n_samples(batch))
            collector.take(rows, passed)
            # Freed before the network computes the next batch.
            del passed
            done = rows.stop
            if options.progress:
                options.progress("features", done, n)


def _versions(tensors: Iterable[Any]) -> list[int | None]:
    """Return how often each tensor was written into; None where this is not counted."""
    return [t._version if isinstance(t, Tensor) and not t.is_inference() else None for t in tensors]


class _Samples:
    """Collects features and logits, one row a sample."""

    def __init__(self, network: LoadedNetwork, n: int, device: torch.device, precision: Precision) -> None:
        n_classes, n_features = network.weight.shape
        self.features = torch.empty(n, n_features, device=device)
        self.logits = torch.empty(n, n_classes, device=device)
        self._network, self._precision = network, precision

    def take(self, rows: slice, passed: Passed) -> None:
        """Take features and logits of one batch."""
        first = rows.start == 0
        found = features_and_logits(self._network, passed, self._precision, first=first)
        self.features[rows], self.logits[rows] = found


class _Predicted:
    """Collects features and predictions, one row a sample: 3 numbers in place of c logits."""

    def __init__(
        self, network: LoadedNetwork, labels: Integer[Tensor, " n"], device: torch.device, precision: Precision
    ) -> None:
        self.features = scratch.rows(len(labels), network.weight.shape[1], device)
        self._network, self._labels, self._precision = network, labels, precision
        self._found = Predictions.room(len(labels), device)
        self._wrong = torch.zeros((), dtype=torch.int64, device=device)

    def take(self, rows: slice, passed: Passed) -> None:
        """Take features of one batch, and the predictions that follow from its logits."""
        first = rows.start == 0
        self.features[rows], logits = features_and_logits(self._network, passed, self._precision, first=first)
        self._found.put(rows, predictions_of(logits, self._labels[rows].to(logits.device)))
        self._wrong += (~torch.isfinite(logits)).sum()

    def predictions(self) -> Predictions:
        """Return the predictions of all samples.

        Raises:
            AnalysisError: `non-finite-values` in features or logits.
        """
        check_finite("features", self.features)
        if wrong := int(self._wrong):
            n_logits = len(self._labels) * len(self._network.weight)
            detail = f"{wrong} of {n_logits} values of the logits are NaN or infinite."
            raise AnalysisError("non-finite-values", detail, tensor="logits")
        return self._found


def _head_call(
    calls: list[tuple[Any, Any]], network: LoadedNetwork, batch: Inputs
) -> tuple[Float[Tensor, "n t d"], Float[Tensor, "n t c"]]:
    """Return inputs and outputs of the head, for each token of each sample; most heads see one token."""
    if len(calls) != 1:
        raise not_the_head(network, f"It must run once for a batch, not {len(calls)} times: the head")
    n, (n_classes, n_features) = n_samples(batch), network.weight.shape
    received, given = calls[0]
    if isinstance(received, Tensor) and _is_convolution(network.head):
        received, given = received.movedim(1, -1), given.movedim(1, -1)
    fits = isinstance(received, Tensor) and received.shape[-1:] == (n_features,) and received.numel() > 0
    if not fits or received.numel() % (n * n_features):
        shape = list(received.shape[1:]) if isinstance(received, Tensor) else type(received).__name__
        raise AnalysisError(
            "inputs-refused",
            f"From inputs of shape {_shape(batch)} the head {network.head_name!r} receives {shape} for each "
            f"sample; expected [{n_features}].",
            input_shape=_shape(batch),
            head_input_shape=shape,
        )
    return received.reshape(n, -1, n_features), given.reshape(n, -1, n_classes)


def _is_convolution(head: nn.Module) -> bool:
    return isinstance(weight := head.weight, Tensor) and weight.ndim == 4


def _tokens_of_logits(
    network: LoadedNetwork, batch: Inputs, given: Float[Tensor, "n t c"], logits: Float[Tensor, "n c"]
) -> Int64[Tensor, " n"]:
    """Return for each sample the token of its logits: the one whose output of the head equals them to the bit."""
    check_finite("logits", logits)
    equal = (given == logits[:, None]).all(dim=2)
    if bool((equal.sum(dim=1) == 1).all()):
        return equal.int().argmax(dim=1)
    if bool(equal.any(dim=1).all()):
        # Equal outputs at several tokens, as with a head of zeros: ask the network which of them it takes.
        tokens = _asked_tokens(network, batch, given)
        if tokens is not None and bool(equal.gather(1, tokens[:, None]).all()):
            return tokens
    raise not_the_head(
        network, f"None of the {given.shape[1]} tokens of a sample gives the logits: it must be the last module,"
    )


def _asked_tokens(network: LoadedNetwork, batch: Inputs, given: Float[Tensor, "n t c"]) -> Int64[Tensor, " n"] | None:
    """Return the tokens that the network takes, by replacing the head's outputs with token numbers; None if unclear."""
    n_tokens = given.shape[1]
    numbers = torch.arange(n_tokens, device=given.device, dtype=given.dtype).view(1, -1, 1).expand_as(given)
    handle = network.head.register_forward_hook(lambda _, __, output: numbers.reshape(output.shape))
    try:
        output = forward(network.module, batch)
    finally:
        handle.remove()
    tokens = output[:, 0].round().long()
    known = bool((output == tokens[:, None]).all()) and bool(((tokens >= 0) & (tokens < n_tokens)).all())
    return tokens if known else None


def _writes_into_inputs(batch: Inputs) -> AnalysisError:
    return AnalysisError(
        "inputs-refused",
        f"The network writes into its inputs of shape {_shape(batch)}, which the next pass needs unchanged; it must "
        "work on a copy: x = x.clone().",
        input_shape=_shape(batch),
    )


def _shape(batch: Inputs) -> Any:
    """Return the shape of a sample, or of each of its tensors by name."""
    if isinstance(batch, Tensor):
        return list(batch.shape[1:])
    return {name: list(tensor.shape[1:]) for name, tensor in batch.items()}

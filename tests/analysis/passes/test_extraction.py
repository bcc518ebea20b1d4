"""The pass of a network over a probe: the features that its head receives, its logits, and faults on the way."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from analysis.errors import AnalysisError
from analysis.evaluation import (
    EvaluationOptions,
    capture,
    extract_features,
)
from analysis.measures.predictions import predictions_of
from analysis.passes import scratch
from analysis.passes.extraction import extract_predictions, reclaim
from tests.analysis.tiny import ARCHITECTURES, loaded, network_of, probe_of, small_network, small_probe

CPU = torch.device("cpu")


class _Narrow(nn.Module):
    """A network that runs out of memory above a number of inputs, as an allocator reports it."""

    def __init__(self, inner: nn.Module, limit: int, error: type[RuntimeError], message: str) -> None:
        super().__init__()
        self.inner, self.limit, self.error, self.message = inner, limit, error, message

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.limit:
            raise self.error(self.message)
        output: Tensor = self.inner(inputs)
        return output


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory."),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to ..."),
    ],
)
def test_the_batch_is_halved_until_it_fits(error: type[RuntimeError], message: str) -> None:
    """64 inputs, 32, 16; if one is too many the error is `out-of-memory`."""
    network, probe = small_network(), small_probe()
    module = _Narrow(network.module, 16, error, message)
    narrow = loaded(module, "inner.3")
    features, logits, size = extract_features(narrow, probe, device=CPU, batch_size=64)
    assert size == 16
    expected = extract_features(network, probe, device=CPU, batch_size=90)
    torch.testing.assert_close((features, logits), expected[:2])
    module.limit = 0
    with pytest.raises(AnalysisError) as caught:
        extract_features(narrow, probe, device=CPU)
    assert caught.value.kind == "out-of-memory"


def test_what_else_is_loaded_is_freed_before_a_batch_is_made_smaller() -> None:
    """A pass that finds room after others were freed keeps its batch size, and with it its last digits."""
    module = _Narrow(small_network().module, 16, torch.OutOfMemoryError, "CUDA out of memory.")
    freed: list[int] = []

    def free() -> bool:
        freed.append(module.limit)
        if len(freed) == 1:
            module.limit = 64
            return True
        return False

    token = reclaim.set(free)
    try:
        *_, size = extract_features(loaded(module, "inner.3"), small_probe(), device=CPU, batch_size=64)
        assert (size, freed) == (64, [16])
        module.limit = 20
        *_, size = extract_features(loaded(module, "inner.3"), small_probe(), device=CPU, batch_size=64)
        assert (size, freed) == (16, [16, 20, 20])
    finally:
        reclaim.reset(token)


class _Tokens(nn.Module):
    """Gives the mean of its head's outputs over three tokens, or runs no head."""

    def __init__(self, on_tokens: bool) -> None:
        super().__init__()
        self.head, self.on_tokens = nn.Linear(4, 3), on_tokens

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.reshape(-1, 3, 4)).mean(dim=1) if self.on_tokens else inputs[:, :3]


def test_inputs_that_do_not_fit_are_refused_with_their_shape() -> None:
    """A network of another width gives an error with the shape received."""
    with pytest.raises(AnalysisError) as caught:
        extract_features(small_network(n_inputs=11, n_classes=3), small_probe(n_classes=3), device=CPU)
    assert caught.value.kind == "inputs-refused"
    assert caught.value.members["input_shape"] == [12]


def test_a_head_that_does_not_run_is_not_found() -> None:
    """The head must run once, and one of several tokens must give the logits."""
    for on_tokens in (False, True):
        with pytest.raises(AnalysisError) as caught:
            extract_features(loaded(_Tokens(on_tokens), "head"), small_probe(n_classes=3), device=CPU)
        assert caught.value.kind == "head-not-found"
        assert caught.value.members["head"] == "head"


class _Writing(nn.Module):
    """Writes into the inputs or outputs of its head, or into its own inputs, after the head ran."""

    def __init__(self, into: str) -> None:
        super().__init__()
        self.body, self.head, self.into = nn.Linear(12, 4), nn.Linear(4, 5), into

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.inference_mode() if self.into == "received, in inference mode" else nullcontext():
            received = self.body(inputs)
            given: Tensor = self.head(received)
            logits: Tensor = given.clone()
            for name, tensor in (("received", received), ("given", given), ("inputs", inputs)):
                if name in self.into:
                    tensor.mul_(2)
        return given if self.into == "given, its own logits" else logits


@pytest.mark.parametrize("into", ["received", "given", "received, in inference mode"])
def test_features_are_what_the_head_received_when_it_received_it(into: str) -> None:
    """Later writes into the head's inputs or outputs do not change the features."""
    module, probe = _Writing(into), small_probe()
    expected = module.body(probe.inputs).detach()
    features, logits, _ = extract_features(loaded(module, "head"), probe, device=CPU, batch_size=40)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, module.head(expected))


def test_logits_that_were_written_into_are_not_those_of_the_head() -> None:
    """The network's logits are twice its head's output: features and head do not give them."""
    with pytest.raises(AnalysisError) as caught:
        extract_features(loaded(_Writing("given, its own logits"), "head"), small_probe(), device=CPU)
    assert caught.value.kind == "head-not-found"


@pytest.mark.parametrize("into", ["inputs", "inputs and received"])
def test_a_network_that_writes_into_its_inputs_is_refused(into: str) -> None:
    """The next pass, or the next network, would not get the probe."""
    with pytest.raises(AnalysisError, match=r"writes into its inputs.*x = x.clone\(\)") as caught:
        extract_features(loaded(_Writing(into), "head"), small_probe(), device=CPU)
    assert caught.value.kind == "inputs-refused"


REPARAMETRISED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hook": spectral_norm,
    "a mask": lambda head: cast(nn.Module, prune.random_unstructured(head, "weight", amount=0.5)),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("how", REPARAMETRISED)
def test_the_head_is_what_it_was_in_the_pass(how: str) -> None:
    """Its weight may be recomputed in each pass: the weight at loading does not count."""
    network, probe = small_network(), small_probe()
    before = network.weight.clone()
    REPARAMETRISED[how](cast(nn.Linear, network.head))
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.mul_(3)
    network.module.eval()
    data, _ = capture(network, probe, device=CPU, options=EvaluationOptions())
    assert network.bias is not None
    logits = data.features @ data.head.T + network.bias
    torch.testing.assert_close(data.network_predictions().loss, predictions_of(logits, data.labels).loss)
    assert not torch.allclose(data.head, before)


def test_a_hook_that_changes_what_the_head_gives_is_noticed() -> None:
    """The logits are the output of a linear head, but not its weight times the features."""
    network = small_network()
    network.head.register_forward_hook(lambda _, __, output: output / 4)
    with pytest.raises(AnalysisError) as caught:
        extract_features(network, small_probe(), device=CPU)
    assert caught.value.kind == "head-not-found"


@pytest.mark.parametrize("batch_size", [None, 40])
def test_a_network_that_is_random_is_refused(batch_size: int | None) -> None:
    """With dropout that ignores the mode no number would be reproducible."""
    network = small_network()
    network.module.register_module("1", _Dropping())
    with pytest.raises(AnalysisError, match="random in evaluation mode") as caught:
        extract_features(network, small_probe(), device=CPU, batch_size=batch_size)
    assert caught.value.kind == "invalid-architecture"


class _Dropping(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.dropout(inputs, 0.5)


def test_hooks_are_removed() -> None:
    """A pass leaves no hook behind."""
    network = small_network()
    extract_features(network, small_probe(), device=CPU)
    assert not network.module.get_submodule("3")._forward_hooks


def test_logits_alone_may_overflow_and_a_sum_alone_may() -> None:
    """Infinite logits of finite features are named; finite numbers whose sum is infinite are no error."""
    network, probe = small_network(), small_probe()
    state = network.module.state_dict()
    state["3.weight"].fill_(3e38)
    with pytest.raises(AnalysisError) as caught:
        extract_features(network, probe, device=CPU)
    assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", "logits")
    state["3.weight"].zero_()
    broken = dataclasses.replace(probe, inputs=torch.full((len(probe.labels), 12), math.inf))
    with pytest.raises(AnalysisError) as caught:
        extract_features(network, broken, device=CPU)
    assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", "features")
    state["3.bias"].fill_(3e38)
    logits = extract_features(network, probe, device=CPU)[1]
    assert bool((logits == torch.tensor(3e38)).all())
    assert math.isinf(float(logits.sum()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_under_autocast_features_are_what_the_head_receives(name: str) -> None:
    """They equal those of a plain loop under torch.autocast, in float32; close to float32's, not equal."""
    network, probe = network_of(name, 0), probe_of(name)
    received: list[Tensor] = []
    handle = network.module.get_submodule(network.head_name).register_forward_pre_hook(
        lambda _, args: received.append(args[0])
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network.module(probe.inputs)
    handle.remove()
    assert expected.dtype == torch.bfloat16
    features, logits, _ = extract_features(network, probe, device=CPU, batch_size=60, precision="bfloat16")
    assert (features.dtype, logits.dtype) == (torch.float32, torch.float32)
    assert torch.equal(features, received[0].float())
    assert torch.equal(logits, expected.float())
    wide, wide_logits, _ = extract_features(network, probe, device=CPU, batch_size=60)
    for narrow, exact in ((features, wide), (logits, wide_logits)):
        assert 0 < float((narrow - exact).norm()) < 0.05 * float(exact.norm())


def test_predictions_are_those_of_the_logits() -> None:
    """A pass that keeps no logits gives what follows from them, to the bit, whatever the size of a batch."""
    network, probe = small_network(), small_probe()
    features, logits, _ = extract_features(network, probe, device=CPU, batch_size=7)
    data, size = extract_predictions(network, probe, device=CPU, batch_size=7)
    expected = predictions_of(logits, probe.labels)
    found = data.network_predictions()
    assert size == 7
    assert torch.equal(data.features, features)
    for name in ("predicted", "confidence", "loss"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_pass_without_logits_names_what_is_not_finite() -> None:
    """As one that keeps them does; labels that are no classes are refused before the pass."""
    network, probe = small_network(), small_probe()
    with torch.no_grad():
        cast(nn.Linear, network.head).bias[1] = torch.inf
    errors = []
    for extract in (extract_features, extract_predictions):
        with pytest.raises(AnalysisError) as caught:
            extract(network, probe, device=CPU)
        errors.append((caught.value.kind, caught.value.detail, caught.value.members))
    assert errors[0] == errors[1]
    assert errors[0][2] == {"tensor": "logits"}
    other = dataclasses.replace(probe, labels=probe.labels + len(network.weight))
    with pytest.raises(AnalysisError, match="they must be 0 to"):
        extract_predictions(network, other, device=CPU)


def test_much_lies_in_a_file_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features beyond what memory should hold are the same; nothing is left in the folder, not even while they live."""
    network, probe = small_network(), small_probe()
    expected = extract_predictions(network, probe, device=CPU)[0].features
    monkeypatch.setattr(scratch, "_IN_MEMORY", 100)
    token = scratch.folder.set(tmp_path / "staging")
    try:
        found = extract_predictions(network, probe, device=CPU)[0].features
        assert torch.equal(found, expected)
        assert list((tmp_path / "staging").iterdir()) == []
        mapped = Path("/proc/self/maps").read_text()
        assert str(tmp_path / "staging") in mapped
        del found

        def full(*_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(AnalysisError, match="No space left on device") as caught:
            extract_predictions(network, probe, device=CPU)
        assert (caught.value.kind, caught.value.members["of"]) == ("out-of-memory", "host")
        assert list((tmp_path / "staging").iterdir()) == []
    finally:
        scratch.folder.reset(token)

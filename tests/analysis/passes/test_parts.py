"""Passes in parts: what they give together is what one pass gives, to the bit, wherever the parts are cut."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from analysis.networks.loading import LoadedNetwork, load_network
from analysis.passes import scratch
from analysis.passes.extraction import PassOptions, extract_predictions, planned_batch_size
from analysis.passes.parts import Joining, Span, cut, extract_part, n_rows, samples_of_parts, spans, whole
from analysis.passes.positions import extract_positions
from analysis.probes.feature_set import FeatureSet
from analysis.probes.probe import Probe
from analysis.probes.sequences import next_token_labels
from tests.analysis import models
from tests.analysis.tiny import loaded, network_of, probe_of

CPU = torch.device("cpu")


def _language(folder: Path) -> tuple[LoadedNetwork, Probe]:
    """Return a language model, and sequences of which the second part of four has only tokens of its own, or none."""
    saved = models.saved_language_model("GPT2", folder)
    network = load_network(saved.architecture, saved.path, head=None, device=CPU)
    batch = models.texts(22)
    batch["attention_mask"][4:8, 1:] = 0
    labels = next_token_labels(batch["input_ids"], batch["attention_mask"], n_vocabulary=50)
    return network, Probe(batch, labels, torch.arange(22) % 2, 50, None)


def _images(_: Path) -> tuple[LoadedNetwork, Probe]:
    return network_of("cnn", seed=0), probe_of("cnn", n=22)


def _joined(network: LoadedNetwork, probe: Probe, size: int, batch_size: int) -> FeatureSet:
    """Pass a probe in parts of `size` samples, each as if by another worker."""
    options, n = PassOptions(CPU, batch_size), len(probe.labels)
    parts = [extract_part(network, probe, span, options) for span in spans(n, size)]
    assert [found[1:] for found in parts] == [(span, batch_size) for span in spans(n, size)]
    assert [len(part.labels) for part, _, _ in parts] == [n_rows(probe, span) for span in spans(n, size)]
    return _together([part for part, _, _ in parts])


def _together(parts: list[FeatureSet]) -> FeatureSet:
    joining = Joining(sum(len(part.labels) for part in parts), parts[0].features.shape[1])
    for part in parts:
        joining.take(part)
    return joining.feature_set()


def _tensors(found: FeatureSet) -> dict[str, Tensor]:
    assert found.predictions is not None
    assert found.split is not None
    tensors = {**vars(found.predictions), "features": found.features, "labels": found.labels, "head": found.head}
    tokens = {} if found.vocabulary is None else {"tokens": found.vocabulary.tokens}
    return tensors | tokens | {"split": found.split}


def _assert_same(found: FeatureSet, expected: FeatureSet) -> None:
    one, other = _tensors(found), _tensors(expected)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("make", [_images, _language])
@pytest.mark.parametrize("size", [4, 8, 20, 24])
def test_parts_give_what_one_pass_gives(
    make: Callable[[Path], tuple[LoadedNetwork, Probe]], size: int, tmp_path: Path
) -> None:
    """22 samples, four at a time, in parts of one batch up to all, are the same numbers as in one pass."""
    network, probe = make(tmp_path)
    extract = extract_positions if network.predicts_tokens else extract_predictions
    expected, _ = extract(network, probe, device=CPU, batch_size=4)
    _assert_same(_joined(network, probe, size, 4), expected)


@pytest.mark.parametrize("make", [_images, _language])
def test_one_pass_is_cut_into_what_parts_give(
    make: Callable[[Path], tuple[LoadedNetwork, Probe]], tmp_path: Path
) -> None:
    """What one pass gave is cut, and put together again, without a difference; and so is a single part."""
    network, probe = make(tmp_path)
    extract = extract_positions if network.predicts_tokens else extract_predictions
    expected, _ = extract(network, probe, device=CPU, batch_size=4)
    rows = [n_rows(probe, span) for span in spans(22, 8)]
    parts = cut(expected, rows)
    for part, span in zip(parts, spans(22, 8), strict=True):
        passed, _, _ = extract_part(network, probe, span, PassOptions(CPU, 4))
        assert torch.equal(part.features, passed.features)
        assert torch.equal(part.head, passed.head)
    _assert_same(_together(parts), expected)
    (single,) = cut(expected, [sum(rows)])
    _assert_same(whole(single), expected)


def test_only_a_part_of_the_inputs_is_read() -> None:
    """A NaN in another part does no harm: nothing there is passed."""
    network, probe = network_of("mlp", seed=0), probe_of("mlp", n=20)
    assert isinstance(probe.inputs, Tensor)
    probe.inputs[12:] = torch.nan
    part, span, _ = extract_part(network, probe, Span(4, 12, 20), PassOptions(CPU, 4))
    assert (span, len(part.features)) == (Span(4, 12, 20), 8)


class _Narrow(nn.Module):
    """A network that runs out of memory above a number of inputs."""

    def __init__(self, inner: nn.Module, limit: int) -> None:
        super().__init__()
        self.inner, self.limit = inner, limit

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        output: Tensor = self.inner(inputs)
        return output


def test_a_part_ends_with_a_batch_where_memory_ran_out() -> None:
    """Of parts of 14 samples, 7 at a time, memory holds 3: the first ends after 12, and all go on with 3."""
    inner, probe = network_of("mlp", seed=0), probe_of("mlp", n=22)
    network = loaded(_Narrow(inner.module, 3), "inner.head")
    first, span, size = extract_part(network, probe, Span(0, 14, 22), PassOptions(CPU, 7))
    assert (span, size, len(first.features)) == (Span(0, 12, 22), 3, 12)
    second, _, _ = extract_part(network, probe, Span(12, 22, 22), PassOptions(CPU, size))
    expected, _ = extract_predictions(network, probe, device=CPU, batch_size=7)
    _assert_same(_together([first, second]), expected)


def test_much_is_put_together_in_a_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of more bytes than memory should hold are put together in a mapped file without a name."""
    network, probe = network_of("cnn", seed=0), probe_of("cnn", n=22)
    expected, _ = extract_predictions(network, probe, device=CPU, batch_size=4)
    monkeypatch.setattr(scratch, "_IN_MEMORY", 100)
    token = scratch.folder.set(tmp_path / "staging")
    try:
        found = _joined(network, probe, 8, 4)
        assert str(tmp_path / "staging") in Path("/proc/self/maps").read_text()
    finally:
        scratch.folder.reset(token)
    _assert_same(found, expected)
    assert list((tmp_path / "staging").iterdir()) == []


def test_parts_are_whole_batches() -> None:
    """A part has as many whole batches as fit, and one where none does; the batch is chosen for the whole probe."""
    assert [samples_of_parts(64, size) for size in (1, 16, 48, 64, 100)] == [64, 64, 48, 64, 100]
    assert spans(10, 4) == [Span(0, 4, 10), Span(4, 8, 10), Span(8, 10, 10)]
    network, probe = network_of("mlp", seed=0), probe_of("mlp", n=22)
    assert planned_batch_size(network, probe, PassOptions(CPU)) == 22
    assert planned_batch_size(network, probe, PassOptions(CPU, 5)) == 5

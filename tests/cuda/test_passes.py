"""Passes over a probe: batches that are sent ahead, features, memory that runs out, libraries' networks."""

import io
import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from analysis.errors import AnalysisError
from analysis.networks.loading import LoadedNetwork, load_network
from analysis.passes.extraction import extract_features
from analysis.passes.positions import extract_positions
from analysis.passes.precision import Precision
from analysis.probes.images import open_images
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe
from analysis.probes.sequences import labels_of_tokens
from tests.analysis import models
from tests.analysis.models import IMAGE_MODELS, LANGUAGE_MODELS, N_CLASSES, TEXT_MODELS, TIMM_MODELS, Saved
from tests.analysis.tiny import ARCHITECTURES, network_of, probe_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batches_that_are_sent_ahead_are_the_same(dtype: torch.dtype, device: torch.device) -> None:
    """Each batch is what it is on the processor, however long the one before is computed with."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (1000, 3, 64, 64), generator=generator, dtype=torch.uint8).to(dtype)
    probe = Probe(inputs, torch.arange(1000) % 2, None, 2, Preprocess(scale=1 / 255, mean=[0.1, 0.2, 0.3], std=0.5))
    busy = torch.randn(2048 if device.type == "cuda" else 64, 64, device=device)
    count = 0
    for here, there in zip(probe.batches(96, device=CPU), probe.batches(96, device=device), strict=True):
        # The copy of the next batch has time to overwrite this one, were it not kept from doing so.
        for _ in range(20):
            busy = torch.nn.functional.normalize(busy @ (busy.T @ busy))
        torch.testing.assert_close((there + 0 * busy[0, 0]).cpu(), here)
        count += len(here)
    assert count == 1000


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("key", ARCHITECTURES)
def test_features_are_those_of_the_processor(key: str, precision: Precision, device: torch.device) -> None:
    """In batches that are sent ahead, of inputs that lie there already, and under autocast; features stay there."""
    network, probe = network_of(key, 0), probe_of(key, 200)
    expected = extract_features(network, probe, device=CPU, batch_size=16, precision=precision)[:2]
    near = 1e-4 if precision == "float32" else 0.05
    for given in (probe, probe.prepared(device)):
        features, logits, _ = extract_features(network, given, device=device, batch_size=16, precision=precision)
        assert features.device == logits.device == device
        scale = float(expected[1].abs().max())
        torch.testing.assert_close((features.cpu(), logits.cpu()), expected, rtol=near, atol=near * max(scale, 1))


def test_two_passes_give_the_same_bits(device: torch.device) -> None:
    """Convolutions are deterministic and without TF32."""
    network, probe = network_of("resnet", 0), probe_of("resnet", 300)
    passes = [extract_features(network, probe, device=device, batch_size=64)[:2] for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*passes, strict=True))


def test_images_are_decoded_while_the_device_computes(device: torch.device) -> None:
    """Pictures of several sizes and formats, decoded in threads and sent ahead."""
    generator, files = np.random.default_rng(0), []
    for index in range(70):
        picture = Image.fromarray(generator.integers(0, 256, (20 + index % 7, 24, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, format=("PNG", "JPEG")[index % 2])
        files.append(buffer.getvalue())
    preprocess = Preprocess(resize=12, crop=[8, 8], colour="grey", scale=1 / 255)
    pictures = open_images(
        lambda rows: ((str(row), files[row]) for row in rows),
        range(len(files)),
        preprocess,
        most_pixels=10**6,
        threads=2,
    )
    probe = Probe(pictures, torch.arange(len(files)) % 5, None, 5, preprocess)
    network = network_of("cnn", 0)
    expected = extract_features(network, probe, device=CPU, batch_size=16)[:2]
    for given in (probe, probe.prepared(device)):
        found = extract_features(network, given, device=device, batch_size=16)[:2]
        torch.testing.assert_close(tuple(tensor.cpu() for tensor in found), expected, rtol=1e-4, atol=1e-4)


class _Greedy(torch.nn.Module):
    """Takes memory in proportion to its batch: 1 GiB a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = torch.empty(len(x), 2**28, device=x.device) if len(x) > 2 else x
        return self.head(x + 0 * taken[:, :1].isnan())  # type: ignore[no-any-return]


def test_a_batch_that_does_not_fit_is_halved(device: torch.device) -> None:
    """Until it fits, with the features of the whole, and the pass says which size it took."""
    if device.type != "cuda":
        pytest.skip("a processor's memory would be filled for real")
    network = LoadedNetwork(_Greedy().eval(), "head")
    total = torch.cuda.get_device_properties(device).total_memory
    n = 1 << (total // 2**30).bit_length()
    probe = Probe(torch.randn(n, 8), torch.arange(n) % 5, None, 5, None)
    features, _, size = extract_features(network, probe, device=device, batch_size=n)
    assert size < n
    assert size * 2**30 < total
    torch.testing.assert_close(features.cpu(), probe.inputs)


def test_what_never_fits_is_told(device: torch.device) -> None:
    """One sample too large for the device ends as `out-of-memory`, and the device can be used afterwards."""
    if device.type != "cuda":
        pytest.skip("a processor's memory would be filled for real")

    class Impossible(_Greedy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.empty(2**40, device=x.device)
            return self.head(x)  # type: ignore[no-any-return]

    probe = Probe(torch.randn(8, 8), torch.arange(8) % 5, None, 5, None)
    with pytest.raises(AnalysisError) as caught:
        extract_features(LoadedNetwork(Impossible().eval(), "head"), probe, device=device, batch_size=4)
    assert caught.value.kind == "out-of-memory"
    extract_features(network_of("mlp", 0), probe_of("mlp"), device=device)


LIBRARIES = [
    *(("transformers", name) for name in (*IMAGE_MODELS, *TEXT_MODELS)),
    *(("timm", name) for name in TIMM_MODELS),
]
# Where the processor is compared with itself a few show that these tests work.
EVERY = 1 if torch.cuda.is_available() or "DEVICE" in os.environ else 8


@pytest.mark.parametrize(("family", "name"), LIBRARIES[::EVERY])
def test_networks_of_libraries(family: str, name: str, tmp_path: Path, device: torch.device) -> None:
    """Loaded onto the device: logits are the library's own of the processor, features x head + bias the logits."""
    texts = family == "transformers" and name in TEXT_MODELS
    batch = models.texts(12) if texts else models.images(12, side=64 if family == "timm" else 32)
    saved = _saved(family, name, tmp_path)
    network = load_network(saved.architecture, saved.path, head=None, device=device)
    probe = Probe(batch, torch.arange(12) % N_CLASSES, None, N_CLASSES, None)
    features, logits, _ = extract_features(network, probe, device=device, batch_size=5)
    expected = saved.library(batch)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-4 * scale)
    product = features.double() @ network.weight.T.double()
    product = product if network.bias is None else product + network.bias.double()
    torch.testing.assert_close(product, logits.double(), rtol=0, atol=1e-4 * scale)


def _saved(family: str, name: str, folder: Path) -> Saved:
    if family == "timm":
        return models.saved_timm(name, TIMM_MODELS[name], folder)
    return models.saved_transformers(name, {**IMAGE_MODELS, **TEXT_MODELS}[name], folder)


@pytest.mark.parametrize("name", list(LANGUAGE_MODELS)[::EVERY])
def test_language_models(name: str, tmp_path: Path, device: torch.device) -> None:
    """Features, losses and predictions of every position."""
    saved, batch = models.saved_language_model(name, tmp_path), models.texts(9)
    probe = Probe(batch, labels_of_tokens(batch, None, n_vocabulary=50), None, 50, None)
    here, there = (
        extract_positions(
            load_network(saved.architecture, saved.path, head=None, device=where), probe, device=where, batch_size=4
        )[0]
        for where in (CPU, device)
    )
    assert here.predictions is not None
    assert there.predictions is not None
    torch.testing.assert_close(there.features.cpu(), here.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.predictions.loss.cpu(), here.predictions.loss, rtol=1e-4, atol=1e-4)
    assert torch.equal(there.predictions.predicted.cpu(), here.predictions.predicted)
    assert torch.equal(there.labels.cpu(), here.labels)

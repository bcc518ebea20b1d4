"""The batch size of a pass: the largest that its largest tensor allows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.networks.loading import build
from analysis.passes.batching import first_batch_size
from analysis.probes.images import Images
from analysis.probes.inputs import Inputs
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe
from tests.analysis.tiny import network_of, probe_of

CPU = torch.device("cpu")


class _Counting(nn.Module):
    """Calls a function, and counts the calls and their samples."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.seen = function, list[int]()

    def forward(self, batch: Inputs) -> Any:
        self.seen.append(len(next(iter(batch.values())) if isinstance(batch, dict) else batch))
        return self.function(batch)


def _probe(inputs: Inputs | Images, n: int) -> Probe:
    return Probe(inputs, torch.arange(n) % 2, None, 2, None)


def _size(module: nn.Module, probe: Probe) -> int:
    return first_batch_size(module.eval(), probe, device=CPU, precision="float32")


@pytest.mark.parametrize(
    ("floats", "expected"),
    [(1, 4096), (2_047, 4096), (2_048, 2048), (2**21, 2), (2**22, 1), (2**23, 1), (2**24, 1)],
)
def test_the_largest_tensor_stays_below_32_mib(floats: int, expected: int) -> None:
    """A block of 32 MiB is too large; the size is a power of two from 1 to 4,096."""
    assert _size(_Counting(lambda batch: batch.repeat(1, floats)[:, :1]), _probe(torch.zeros(3, 1), 3)) == expected


def test_what_lies_between_inputs_and_logits_counts() -> None:
    """Maps of a wide residual network are ten times as large as its images: 32 x 32 x 32 numbers each."""
    network = build(
        {"family": "builtin", "name": "wide_resnet", "args": {"depth": 10, "widen_factor": 2, "n_classes": 10}},
        device="cpu",
    )
    assert _size(network, _probe(torch.zeros(5, 3, 32, 32), 5)) == 128


def test_the_inputs_count_too() -> None:
    """Inputs that the network reduces at once still count, as float32."""
    images = torch.zeros(4, 3, 512, 512, dtype=torch.uint8)
    network = nn.Sequential(nn.AvgPool2d(256), nn.Flatten(), nn.Linear(12, 5))
    assert _size(network, _probe(images, 4)) == 8


def test_weights_do_not_count() -> None:
    """Nor do tensors computed from weights in each batch: 64 MiB here, against 32 KiB a sample."""
    weight = torch.zeros(2**13, 2**11)
    module = _Counting(lambda batch: batch @ (weight.T.contiguous() - weight.T.mean()))
    assert _size(module, _probe(torch.zeros(3, 2**11), 3)) == 512


def test_scores_of_tokens_count() -> None:
    """Ids take few bytes: the attention of 1,000 tokens is measured, with ids that exist."""

    def attend(batch: dict[str, Tensor]) -> Tensor:
        assert int(batch["input_ids"].min()) == 7
        ids = batch["input_ids"].float()
        return (ids[:, :, None] * ids[:, None]).softmax(-1)

    assert _size(_Counting(attend), _probe({"input_ids": torch.full((3, 1000), 7)}, 3)) == 8


def test_a_network_and_a_shape_are_looked_at_once() -> None:
    """It is measured once with one and with two samples; other inputs or another precision are measured again."""
    module = _Counting(lambda batch: batch)
    for _ in range(2):
        _size(module, _probe(torch.zeros(3, 4), 3))
    _size(module, _probe(torch.ones(90, 4), 90))
    assert module.seen == [1, 2, 2]
    _size(module, _probe(torch.zeros(3, 5), 3))
    assert module.seen == [1, 2, 2] * 2
    first_batch_size(module, _probe(torch.zeros(3, 5), 3), device=CPU, precision="bfloat16")
    assert module.seen == [1, 2, 2] * 3


def test_one_sample_is_enough() -> None:
    """A probe may hold a single sample."""
    module = _Counting(lambda batch: batch)
    assert _size(module, _probe(torch.zeros(1, 4), 1)) == 4096
    assert module.seen == [1, 2, 2]


def test_images_in_files_are_not_opened_for_it() -> None:
    """Black images of their size, preprocessed like them, stand for them."""

    def read(rows: Any) -> Any:
        raise AssertionError("nothing is to be read")

    preprocess = Preprocess(scale=1.0, mean=[0.5] * 3, std=[0.5] * 3)
    images = Images(read, range(4), preprocess, 10**6, (4, 3, 512, 512), 1)
    seen: list[Tensor] = []

    def keep(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.mean(dim=(2, 3))

    probe = Probe(images, torch.zeros(4, dtype=torch.int64), None, 2, preprocess)
    assert _size(_Counting(keep), probe) == 8
    assert [tuple(batch.shape) for batch in seen] == [(n, 3, 512, 512) for n in (1, 2, 2)]
    assert all(bool((batch == -1).all()) for batch in seen)


def test_a_network_that_fails_is_the_passes_to_tell() -> None:
    """If a network fails on so few samples, only its inputs count; the pass reports the failure."""

    def refuse(batch: Tensor) -> Tensor:
        raise ValueError("at least three samples")

    assert _size(_Counting(refuse), _probe(torch.zeros(3, 2**20), 3)) == 4


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_looking_leaves_a_network_as_it_was(name: str) -> None:
    """All tensors stay bit for bit, including running statistics."""
    network, probe = network_of(name, 0), probe_of(name)
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    _size(network.module, probe)
    after = network.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)

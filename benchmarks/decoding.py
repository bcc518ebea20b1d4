"""Images: decoding alone, and a pass with decoding beside the bare loop over tensors that are already in memory."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from analysis.networks.loading import LoadedNetwork, build
from analysis.passes.extraction import extract_features
from analysis.probes.images import Images, open_images
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe

Row = dict[str, object]

# The usual form of the images in ImageNet's validation set.
_WIDTH, _HEIGHT, _N = 500, 375, 512
_IMAGENET = Preprocess(
    resize=256, crop=[224, 224], colour="rgb", scale=1 / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
)
_BATCH_SIZE = 16


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Measure images per second: decoding by threads, and passes against their two parts.

    Args:
        device: where the network runs.

    Returns:
        A row for each number of threads and each network: the measurement, its target, and whether it is reached.
    """
    device = torch.device(device)
    files = _files()
    alone = {threads: _rate(partial(_decode, files, threads)) for threads in (1, 2, 4)}
    found: list[Row] = [
        {
            "case": f"decoding alone, {threads} threads, {_WIDTH} x {_HEIGHT} JPEG to 224 x 224",
            "images_a_second": alone[threads],
            "times_one_thread": alone[threads] / alone[1],
            "must": "what was seen; no threshold",
            "reached": True,
        }
        for threads in alone
    ]
    networks = {
        "a small CNN on this device": _cnn(device),
        "a network elsewhere, as fast as decoding": _elsewhere(_BATCH_SIZE / alone[2], device),
        "a network elsewhere, half as fast": _elsewhere(2 * _BATCH_SIZE / alone[2], device),
    }
    return found + [_pass(name, network, files, device) for name, network in networks.items()]


def _pass(name: str, network: LoadedNetwork, files: Sequence[bytes], device: torch.device) -> Row:
    images = _open(files, 2)
    probe = Probe(images, torch.arange(_N) % 10, None, 10, _IMAGENET)
    in_memory = list(probe.batches(_BATCH_SIZE, device=device))

    def whole() -> None:
        extract_features(network, probe, device=device, batch_size=_BATCH_SIZE)

    # In turns, so that other load on the machine affects all of them.
    rounds = [
        (_rate(whole, device), _rate(lambda: _bare(network.module, in_memory), device), _rate(lambda: _drain(images)))
        for _ in range(3)
    ]
    both, bare, alone = (max(rates) for rates in zip(*rounds, strict=True))
    # On one processor the two share cores: no more can be required there than the sum of both, with one core each.
    possible = min(bare, alone)
    return {
        "case": f"pass over {_N} JPEG, {name}",
        "against": "the slower of a bare loop over the same tensors in memory and of decoding alone with 2 threads",
        "images_a_second": both,
        "bare_loop_images_a_second": bare,
        "decoding_images_a_second": alone,
        "share_of_the_slower": both / possible,
        "must": "at least 0.85 of the slower; on the processor itself, which both share, what was seen",
        "reached": ("elsewhere" not in name and device.type == "cpu") or both >= 0.85 * possible,
    }


def _files() -> list[bytes]:
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    files = []
    for number in range(48):
        waves = 127 + 60 * np.sin(x[..., None] / (9 + number % 7) + np.arange(3)) + 40 * np.cos(y[..., None] / 23)
        noise = generator.normal(scale=12, size=(_HEIGHT, _WIDTH, 1))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return [files[number % len(files)] for number in range(_N)]


def _open(files: Sequence[bytes], threads: int) -> Images:
    def read(rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        return (("", files[row]) for row in rows)

    return open_images(read, range(len(files)), _IMAGENET, most_pixels=10**7, threads=threads)


def _decode(files: Sequence[bytes], threads: int) -> None:
    _drain(_open(files, threads))


def _drain(images: Images) -> None:
    for _ in images.batches(_BATCH_SIZE):
        pass


def _cnn(device: torch.device) -> LoadedNetwork:
    architecture = {"family": "builtin", "name": "cnn", "args": {"channels": [8, 16, 16], "n_classes": 10}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build(architecture, device=device).eval().requires_grad_(False)
    return LoadedNetwork(module, "head")


class _Elsewhere(nn.Module):
    """Sleep for the network's time without using the processor, as if the network ran on an accelerator."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.fc = nn.Linear(3, 10)

    def forward(self, batch: Tensor) -> Tensor:
        time.sleep(self.seconds * len(batch) / _BATCH_SIZE)
        logits: Tensor = self.fc(batch[:, :, 0, 0])
        return logits


def _elsewhere(seconds: float, device: torch.device) -> LoadedNetwork:
    module = _Elsewhere(seconds).to(device).eval().requires_grad_(False)
    return LoadedNetwork(module, "fc")


def _bare(module: nn.Module, batches: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        for batch in batches:
            module(batch)


def _rate(run: Callable[[], object], device: torch.device | None = None) -> float:
    """Return images per second."""
    start = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return _N / (time.perf_counter() - start)

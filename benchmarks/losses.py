"""Time MIR and HDR as a loss beside a training step: batch 256, d = 128, ten classes, a WRN-28-2 on 32 x 32 images.

`python -m benchmarks.losses` prints the rows. Both sides run in one process, on the same threads and the same device,
in turns, so that their ratio is independent of other load on the machine.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from analysis.measures.losses import InterplayLoss
from analysis.networks.loading import build

BATCH, N_CLASSES = 256, 10
WIDE_RESNET = {
    "family": "builtin",
    "name": "wide_resnet",
    "args": {"depth": 28, "widen_factor": 2, "n_classes": N_CLASSES, "in_channels": 3},
}
# The loss takes milliseconds and the network seconds: more repeats cost little and steady the median.
STEPS, LOSSES_A_STEP = 3, 5
LARGEST_SHARE = 0.25
# Several hundred small kernels and three eigenproblems of 128 x 128, each with a wait: on a GPU a time, not a share.
MOST_SECONDS_ON_GPU = 0.02


def rows(device: torch.device | str = "cpu") -> list[dict[str, object]]:
    """Time forward and backward of `InterplayLoss` against a step of the network that it is added to.

    Args:
        device: where both run.

    Returns:
        One row: medians in seconds, their ratio, its upper bound, and whether it is kept.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(WIDE_RESNET, device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    inputs = torch.randn(BATCH, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(N_CLASSES, (BATCH,), generator=generator).to(device)
    head = network.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    received: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: received.append(arguments[0].detach()))
    loss = InterplayLoss(0.1, 0.1)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(network(inputs), labels))
        optimizer.step()

    def interplay() -> None:
        features = received[-1].clone().requires_grad_()
        torch.autograd.backward(loss(features, head.weight, labels))

    step_seconds, loss_seconds = [], []
    for _ in range(STEPS + 1):
        step_seconds.append(_seconds(step, device))
        loss_seconds.append(statistics.median(_seconds(interplay, device) for _ in range(LOSSES_A_STEP)))
    hook.remove()
    # The first round warms up.
    of_step, of_loss = statistics.median(step_seconds[1:]), statistics.median(loss_seconds[1:])
    on_gpu = device.type == "cuda"
    return [
        {
            "case": f"InterplayLoss forward and backward, batch {BATCH}, d={received[-1].shape[1]}, C={N_CLASSES}",
            "against": "step of WRN-28-2 on 32x32 inputs",
            "loss_seconds": of_loss,
            "step_seconds": of_step,
            "share": of_loss / of_step,
            "must": f"under {MOST_SECONDS_ON_GPU} s" if on_gpu else f"a share under {LARGEST_SHARE}",
            "reached": of_loss < MOST_SECONDS_ON_GPU if on_gpu else of_loss / of_step < LARGEST_SHARE,
        }
    ]


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row, indent=2))

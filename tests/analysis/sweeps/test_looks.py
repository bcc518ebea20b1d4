"""A look along a path: its losses on a part of a probe, with and without recalibration."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import LoadedNetwork
from analysis.probes.images import Images
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe
from analysis.sweeps.grids import barrier, peaks
from analysis.sweeps.looks import look
from analysis.sweeps.paths import Path, recalibrate
from tests.analysis.tiny import network_of, probe_of
from tests.campaigns import campaign

CPU = torch.device("cpu")
OPTIONS = EvaluationOptions(null_permutations=0)


def _bump(at: float, width: float) -> Path:
    """Return a path on which two hidden units, different only in their bias, make a bump of the first class's logit."""
    torch.manual_seed(0)
    ends: list[nn.Sequential] = []
    for w in (0.0, 1.0):
        below, above = nn.Linear(6, 8), nn.Linear(8, 3)
        module = nn.Sequential(below, nn.Tanh(), above)
        with torch.no_grad():
            if ends:
                module.load_state_dict(ends[0].state_dict())
            below.weight[:2] = 0
            below.bias[:2] = torch.tensor([w - at + width, w - at - width]) / width
            above.weight[:, :2] = torch.tensor([[6.0, -6.0], [0.0, 0.0], [0.0, 0.0]])
        ends.append(module.eval().requires_grad_(False))
    return Path(LoadedNetwork(ends[0], "2"), ends[1].state_dict())


def _probe(n: int) -> Probe:
    generator = torch.Generator().manual_seed(0)
    return Probe(torch.randn(n, 6, generator=generator), torch.arange(n) % 3, None, 3, None)


def _looked(path: Path, probe: Probe, batch_size: int, recalibrating: bool = False) -> tuple[dict[float, float], int]:
    found = look(path, probe, device=CPU, options=replace(OPTIONS, batch_size=batch_size), recalibrating=recalibrating)
    return found.losses, found.n_samples


def test_a_look_at_all_samples_has_the_losses_of_evaluations() -> None:
    """It shows a bump of width 0.004 that 17 points, and 65, miss."""
    path, probe = _bump(0.9766, 0.004), _probe(60)
    losses, n_samples = _looked(path, probe, 60)
    assert n_samples == 60
    [peak] = peaks(losses)
    assert peak == pytest.approx(0.9766, abs=1e-3)
    for w in (0.0, peak, 0.25, 1.0):
        own = evaluate_network(path.move_to(w), probe, device=CPU, options=OPTIONS).splits["all"].loss
        assert losses[w] == pytest.approx(own, rel=1e-6)
    coarse = {w: loss for w, loss in losses.items() if w * 64 == int(w * 64)}
    ws = sorted(losses)
    assert barrier(ws, [losses[w] for w in ws]).value > 1
    assert barrier(sorted(coarse), [coarse[w] for w in sorted(coarse)]).value < 0.01


@pytest.mark.parametrize(
    ("n", "batch_size", "looked_at"),
    campaign([(1000, 32, 62), (100, 16, 32), (600, 2048, 512)], often=[(100, 16, 32)]),
)
def test_a_look_takes_a_part_of_a_large_probe(n: int, batch_size: int, looked_at: int) -> None:
    """A batch, or a sixteenth of it, with classes in proportion, so that the peak is that of all samples."""
    seen: list[tuple[int, int]] = []
    found = look(
        _bump(0.3, 0.02),
        _probe(n),
        device=CPU,
        options=replace(OPTIONS, batch_size=batch_size),
        recalibrating=False,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.n_samples == looked_at
    assert peaks(found.losses)[0] == pytest.approx(0.3, abs=0.01)
    assert [done for done, _ in seen] == list(range(1, len(found.losses) + 1))
    assert all(257 <= total <= 290 and done <= total for done, total in seen)


def test_a_look_that_recalibrates_sees_what_the_points_will() -> None:
    """Between the ends with recomputed statistics, at the ends with their own."""
    probe = probe_of("mlp")
    found = [
        _looked(Path(network_of("mlp", 0), network_of("mlp", 1).module.state_dict()), probe, 60, recalibrating)[0]
        for recalibrating in (True, False)
    ]
    for w in (0.0, 1.0):
        assert found[0][w] == found[1][w]
    path = Path(network_of("mlp", 0), network_of("mlp", 1).module.state_dict())
    network = path.move_to(0.5)
    recalibrate(network, probe, device=CPU, batch_size=60)
    assert found[0][0.5] == evaluate_network(network, probe, device=CPU, options=OPTIONS).splits["all"].loss
    assert found[0][0.5] != found[1][0.5]


def test_what_a_pass_fails_of_names_its_place() -> None:
    """The network overflows between its ends."""
    path = _bump(0.5, 0.1)
    path.second["2.bias"] = path.second["2.bias"] + 3e38
    path.first["2.bias"] = path.first["2.bias"] + 3e38
    path.first["2.weight"], path.second["2.weight"] = (state["2.weight"] * 1e37 for state in (path.first, path.second))
    with pytest.raises(AnalysisError, match="Loss at w = 0"):
        _looked(path, _probe(60), 60)


def test_images_in_files_are_taken_by_place() -> None:
    """Only the files of the drawn rows are read."""
    images = Images(lambda rows: iter(()), [3, 5, 8, 9], Preprocess(), 100, (4, 1, 2, 2), 1)
    taken = Probe(images, torch.arange(4) % 2, None, 2, None).take(torch.tensor([1, 3]))
    assert isinstance(taken.inputs, Images)
    assert (taken.inputs.rows, taken.inputs.shape, taken.labels.tolist()) == ([5, 9], (2, 1, 2, 2), [1, 1])

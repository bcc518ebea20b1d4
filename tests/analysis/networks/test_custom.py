"""Networks of the operator's own packages, found by their declarations without an import."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import available_families, build, load_network
from analysis.probes.probe import Probe

CODE = """
import torch

class Scaled(torch.nn.Module):
    def __init__(self, width, scale=1.0):
        super().__init__()
        self.body = torch.nn.Linear(4, width)
        self.head = torch.nn.Linear(width, 3)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, inputs):
        return self.head(torch.relu(self.body(inputs))) * self.scale

def no_network(**args):
    return args
"""
ENTRY_POINTS = """
[interplay.networks]
scaled = our_networks:Scaled
odd = our_networks:no_network
gone = our_networks:Missing
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a package as pip would, on the path of this test alone."""
    site = tmp_path / "site"
    (info := site / "our_networks-1.0.dist-info").mkdir(parents=True)
    (site / "our_networks.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-networks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(site)
    yield site
    sys.modules.pop("our_networks", None)


def described(name: str = "scaled", **args: object) -> dict[str, object]:
    """Return the description of a network of that package."""
    return {"family": "custom", "name": name, "args": args}


def test_a_declared_network_is_built_and_evaluated(package: Path, tmp_path: Path) -> None:
    """Weights come from a file, a buffer without a file from its constructor; the last linear module is the head."""
    assert "custom" in available_families()
    assert "our_networks" not in sys.modules
    torch.manual_seed(0)
    state = build(described(width=8), device="cpu").state_dict()
    save_file(state, path := tmp_path / "net.safetensors")
    network = load_network(described(width=8), path, head=None, device="cpu")
    assert network.head_name == "head"
    probe = Probe(torch.randn(30, 4), torch.arange(30) % 3, None, 3, None)
    options = EvaluationOptions(null_permutations=0)
    found = evaluate_network(network, probe, device=torch.device("cpu"), options=options).splits["all"]
    assert found.interplay["sample"]["none"].mir is not None


def test_logits_that_are_not_the_heads_are_noticed(package: Path, tmp_path: Path) -> None:
    """If the operator's code changes the head's output, the evaluation is refused."""
    state = build(described(width=8), device="cpu").state_dict()
    save_file(state, path := tmp_path / "net.safetensors")
    network = load_network(described(width=8, scale=2.0), path, head=None, device="cpu")
    probe = Probe(torch.randn(30, 4), torch.arange(30) % 3, None, 3, None)
    with pytest.raises(AnalysisError) as caught:
        evaluate_network(network, probe, device=torch.device("cpu"))
    assert caught.value.kind == "head-not-found"


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (described("unknown"), "gone, odd, scaled"),
        (described("odd"), "returns dict, not a torch.nn.Module"),
        (described("gone"), "Missing"),
        (described(depth=3), "unexpected keyword argument 'depth'"),
        (described(width=-1), "negative"),
    ],
)
def test_what_cannot_be_built_is_the_descriptions_fault(
    package: Path, description: dict[str, object], words: str
) -> None:
    """An unknown name lists the known ones; errors of the operator's code are passed on in their words."""
    with pytest.raises(AnalysisError, match=words) as caught:
        build(description)
    assert caught.value.kind == "invalid-architecture"


def test_without_packages_there_is_no_such_family() -> None:
    """A description of the family says that nothing is declared."""
    assert "custom" not in available_families()
    with pytest.raises(AnalysisError, match="it has none"):
        build(described())

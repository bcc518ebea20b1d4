"""Functions for training scripts: models become checkpoint files and feature sets that the service accepts."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from analysis.networks.loading import build
from interplay import AnalysisError, Client, ConversionError, capture_features, save_checkpoint
from tests.conftest import MLP
from tests.services import Service

NORMED = {**MLP, "args": {"sizes": [64, 32, 10], "activation": "relu", "norm": "batch"}}


def network(architecture: dict[str, Any] = MLP) -> nn.Module:
    """Return a network of the description with random weights from its own generator."""
    made, generator = build(architecture, device="cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.train()


@pytest.fixture
def trained(mlp_checkpoint_file: Path) -> nn.Module:
    """Return the small network of the tests, in training mode."""
    made = build(MLP, device="cpu")
    made.load_state_dict(load_file(mlp_checkpoint_file))
    return made.train()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as opened:
        yield opened


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["bare", "DataParallel", "compiled", "both", "a compiled part"])
def test_wrappers_are_taken_off(tmp_path: Path, wrap: str) -> None:
    """With any wrapper the file has the network's own names and values, and its description."""
    model = network(NORMED)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if wrap in ("DataParallel", "both"):
        model = nn.DataParallel(model)
    if wrap in ("compiled", "both"):
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    if wrap == "a compiled part":
        model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment,arg-type]
    path = save_checkpoint(model, tmp_path / "net.safetensors", NORMED)
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads(metadata(path)["architecture"]) == NORMED
    assert model.training
    assert [*tmp_path.iterdir()] == [path]


def test_saved_checkpoint_is_what_the_service_takes(
    service: Service, client: Client, trained: nn.Module, tmp_path: Path, mlp_checkpoint_file: Path,
    digits_probe_file: Path,
) -> None:  # fmt: skip
    """A saved model and the same weights in another file give the same report."""
    probe = client.push_probe(digits_probe_file, name="digits", preprocess={"scale": 1 / 16})["id"]
    saved = save_checkpoint(nn.DataParallel(trained), tmp_path / "net.safetensors", MLP)
    reports = []
    for file in (saved, mlp_checkpoint_file):
        checkpoint = client.push_checkpoint(file, name="net")
        ended = client.wait(client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe)["id"])
        reports.append(client.get_report(ended["report_id"], "evaluation"))
    assert reports[0]["splits"] == reports[1]["splits"]


class Tied(nn.Module):
    """A network with two names for one tensor, and a third for a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.body.weight
        self.register_buffer("part", self.body.weight.detach()[:2].T)


def test_shared_memory_is_written_out(tmp_path: Path) -> None:
    """Tied weights and views are whole tensors in the file, each under its name."""
    model = Tied()
    found = load_file(save_checkpoint(model, tmp_path / "tied.safetensors"))
    assert found.keys() == {"body.weight", "head.weight", "part"}
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_model_of_transformers_brings_its_description(tmp_path: Path) -> None:
    """Without a description the model's own configuration is written to the file, after a check."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    path = save_checkpoint(ViTForImageClassification(config), tmp_path / "vit.safetensors")
    described = json.loads(metadata(path)["architecture"])
    assert described["family"] == "transformers"
    assert described["config"]["architectures"] == ["ViTForImageClassification"]
    assert described["config"]["hidden_size"] == 16


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"step": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def sparse() -> nn.Module:
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.eye(3).to_sparse())
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (WithExtra(3, 3), "_extra_state' of the model's state is a dict"),
        (nn.Linear(3, 3, device="meta"), "'weight' is on the meta device"),
        (sparse(), "'mask' is sparse or quantised"),
    ],
    ids=["no tensor", "meta", "sparse"],
)
def test_what_cannot_be_stored_is_said(tmp_path: Path, model: nn.Module, said: str) -> None:
    """A value without a plain form is named, and no file is left."""
    with pytest.raises(ConversionError, match=said):
        save_checkpoint(model, tmp_path / "net.safetensors")
    assert not [*tmp_path.iterdir()]


def test_checkpoint_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    """A description of another network, or weights that are not finite, fail as they would in a worker."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"what was there")
    other = {**MLP, "args": {**MLP["args"], "sizes": [64, 33, 10]}}  # type: ignore[dict-item]
    for model, description, kind in (
        (network(), other, "checkpoint-mismatch"),
        (network(), {"family": "builtin", "name": "nothing", "args": {}}, "invalid-architecture"),
    ):
        with pytest.raises(AnalysisError) as caught:
            save_checkpoint(model, path, description)
        assert caught.value.kind == kind
    broken = network()
    next(broken.parameters()).data[0, 0] = float("nan")
    with pytest.raises(AnalysisError, match="NaN"):
        save_checkpoint(broken, path, MLP)
    assert path.read_bytes() == b"what was there"
    assert [*tmp_path.iterdir()] == [path]
    save_checkpoint(network(), path, other, check=False)
    assert json.loads(metadata(path)["architecture"]) == other


# --- features -------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(digits_probe_file: Path) -> dict[str, Tensor]:
    """Return inputs in the network's form, labels and split."""
    tensors = load_file(digits_probe_file)
    return {**tensors, "inputs": tensors["inputs"] / 16}


def test_captured_features_give_the_same_numbers(
    client: Client, trained: nn.Module, digits: dict[str, Tensor], tmp_path: Path, digits_probe_file: Path,
    mlp_checkpoint_file: Path,
) -> None:  # fmt: skip
    """Captured features and the service's own give the same measures for the same network."""
    loaders = {
        name: DataLoader(TensorDataset(digits["inputs"][of], digits["labels"][of]), batch_size=100, shuffle=True)
        for name, of in (("train", digits["split"] == 0), ("test", digits["split"] == 1))
    }
    path = tmp_path / "features.safetensors"
    captured = capture_features(trained, "head", loaders, path)
    assert captured.keys() == load_file(path).keys()
    assert trained.training
    feature_set = client.push_feature_set(path, name="mine")
    assert feature_set["splits"] == {"train": 1437, "test": 360}
    mine = client.wait(client.create_analysis(feature_set_id=feature_set["id"])["id"])
    checkpoint = client.push_checkpoint(mlp_checkpoint_file, name="net")["id"]
    probe = client.push_probe(digits_probe_file, name="digits", preprocess={"scale": 1 / 16})["id"]
    theirs = client.wait(client.create_analysis(checkpoint_id=checkpoint, probe_id=probe)["id"])
    found, expected = (client.get_report(ended["report_id"], "evaluation")["splits"] for ended in (mine, theirs))
    assert found.keys() == expected.keys() == {"all", "train", "test"}
    for name, split in found.items():
        other = expected[name]
        assert split["accuracy"] == other["accuracy"]
        assert split["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert split["collapse"]["nc1"] == pytest.approx(other["collapse"]["nc1"], rel=1e-4)
        ours, same = (each["interplay"]["sample"]["global"] for each in (split, other))
        assert ours["mir"] == pytest.approx(same["mir"], abs=1e-6)
        assert ours["hdr"] == pytest.approx(same["hdr"], abs=1e-6)


class Noisy(nn.Module):
    """A network with dropout, a frozen normalisation layer and keyword arguments, all of which a pass must preserve."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8).eval()
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.dropout(self.norm(values)))}


@pytest.mark.parametrize("form", ["pairs", "named pairs", "dictionaries", "other labels"])
def test_batches_of_every_form(form: str) -> None:
    """Pairs and dictionaries give the same features; modes, statistics and gradients do not change."""
    values, labels = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 3
    batches: list[Any] = []
    for x, y in zip(torch.split(values, 20), torch.split(labels, 20), strict=True):
        batch: Any = {
            "pairs": (x, y),
            "named pairs": [{"values": x}, y.tolist()],
            "dictionaries": {"values": x, "labels": y},
            "other labels": {"target": y.int(), "values": x},
        }[form]
        batches.append(batch)
    model = Noisy()
    model.train()
    model.norm.eval()
    model.norm.get_buffer("running_mean").add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture_features(model, model.head, batches)
    assert "split" not in captured
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(captured["labels"], labels)
    expected = captured["features"] @ captured["head"].T + captured["head_bias"]
    torch.testing.assert_close(captured["logits"], expected)
    torch.testing.assert_close(captured["features"], model.norm(values))


def test_convolution_as_head_and_compiled_model() -> None:
    """A 1x1 convolution works as a head, and a compiled model as the original one."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1, bias=False), nn.Flatten())
    x, y = torch.randn(7, 4, 5, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(7, dtype=torch.int64)
    captured = capture_features(torch.compile(model, backend="eager"), "1", [(x, y)])  # type: ignore[arg-type]
    assert captured["head"].shape == (3, 4)
    assert "head_bias" not in captured
    torch.testing.assert_close(captured["features"] @ captured["head"].T, captured["logits"])


class Reusing(nn.Module):
    """A network that reuses one tensor for every input of its head and centres its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scaled", torch.empty(5, 8), persistent=False)
        self.head = nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.mul(values.sub_(1), 2, out=self.get_buffer("scaled")))
        return logits


def test_a_model_that_works_in_place() -> None:
    """Features of each batch are separate, however the model reuses memory."""
    values, labels = torch.randn(20, 8, generator=torch.Generator().manual_seed(2)), torch.arange(20) % 3
    expected = (values - 1) * 2
    batches = list(zip(torch.split(values, 5), torch.split(labels, 5), strict=True))
    assert torch.equal(capture_features(Reusing(), "head", batches)["features"], expected)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        return torch.add(self.a(values), self.b(values)) / 2


BATCH = (torch.zeros(4, 8), torch.tensor([0, 1, 2, 0]))
REFUSED: dict[str, tuple[nn.Module, Any, Any, str]] = {
    "no such head": (Noisy(), "classifier", [BATCH], "head-not-found"),
    "a head of another model": (Noisy(), nn.Linear(8, 3), [BATCH], "head-not-found"),
    "a head that is not linear": (Noisy(), "norm", [BATCH], "head-not-found"),
    "half of the logits": (TwoHeads(), "a", [(torch.ones(4, 8), BATCH[1])], "head-not-found"),
    "no batches": (Noisy(), "head", [], "invalid-feature-set"),
    "batches without labels": (Noisy(), "head", [torch.zeros(4, 8)], "invalid-feature-set"),
    "a dictionary without labels": (Noisy(), "head", [{"values": torch.zeros(4, 8)}], "invalid-feature-set"),
    "labels that are not whole": (Noisy(), "head", [(BATCH[0], torch.rand(4))], "invalid-feature-set"),
    "one-hot labels": (Noisy(), "head", [(BATCH[0], torch.eye(4, 3).long())], "invalid-feature-set"),
    "labels out of range": (Noisy(), "head", [(BATCH[0], torch.tensor([0, 1, 2, 3]))], "invalid-feature-set"),
    "inputs of another shape": (Noisy(), "head", [(torch.zeros(4, 9), BATCH[1])], "inputs-refused"),
    "inputs that are no numbers": (Noisy(), "head", [(BATCH[0] / 0, BATCH[1])], "non-finite-values"),
    "another split": (Noisy(), "head", {"validation": [BATCH]}, "invalid-argument"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_said(tmp_path: Path, case: str) -> None:
    """A wrong head, batch or labels raise an error of their kind; nothing is written, and modes are restored."""
    model, head, loader, kind = REFUSED[case]
    model.train()
    with pytest.raises(AnalysisError) as caught:
        capture_features(model, head, loader, tmp_path / "features.safetensors")
    assert caught.value.kind == kind, caught.value
    assert model.training
    assert not [*tmp_path.iterdir()]


def test_missing_packages_are_named() -> None:
    """Without torch a name says what it needs when it is used, not before."""
    script = """if True:
        import sys
        sys.modules["torch"] = None
        import interplay
        try:
            interplay.save_checkpoint
        except ModuleNotFoundError as error:
            print(error)
    """
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "interplay.save_checkpoint needs torch" in ran.stdout
    assert "interplay[train]" in ran.stdout

"""Networks of transformers, timm and torchvision: each compared with its library's own forward pass."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.networks.loading import LoadedNetwork, build, load_network
from analysis.passes.extraction import extract_features
from analysis.probes.inputs import Inputs
from analysis.probes.probe import Probe
from analysis.sweeps.alignment import aligned
from analysis.sweeps.paths import Path as NetworkPath
from tests.analysis import models
from tests.analysis.models import (
    IMAGE_MODELS,
    N_CLASSES,
    TEXT_MODELS,
    TIMM_MODELS,
    TORCHVISION_MODELS,
    N,
    Saved,
    labelled,
)
from tests.analysis.tiny import error_of
from tests.campaigns import campaign

CPU = torch.device("cpu")


def _loaded(saved: Saved, head: str | None = None) -> LoadedNetwork:
    return load_network(saved.architecture, saved.path, head=head, device=CPU)


def _check_against_library(saved: Saved, batch: dict[str, Tensor]) -> LoadedNetwork:
    """Check that logits are the library's, and features x head + bias the logits, both to 1e-5 of their size."""
    network = _loaded(saved)
    features, logits, _ = extract_features(network, labelled(batch), device=CPU, batch_size=3)
    expected = saved.library(batch)
    scale = max(1.0, float(expected.abs().max()))
    assert expected.shape == (N, N_CLASSES)
    assert float(expected.std(dim=0).min()) > 1e-4 * scale, "samples that all look alike would prove nothing"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
    product = features.double() @ network.weight.T.double()
    product = product if network.bias is None else product + network.bias.double()
    torch.testing.assert_close(product, expected.double(), rtol=0, atol=1e-5 * scale)
    return network


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_classifiers_of_transformers(name: str, tmp_path: Path) -> None:
    """Saved by the library, loaded here and by the library: the same logits, from the features and the head."""
    saved = models.saved_transformers(name, IMAGE_MODELS[name], tmp_path)
    network = _check_against_library(saved, models.images(N))
    heads = {"ResNet": "classifier.1", "Levit": "classifier.linear"}
    assert network.head_name == heads.get(name, "classifier")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_classifiers_of_transformers(name: str, tmp_path: Path) -> None:
    """With padding and a mask, also if the head runs on every token and the logits are those of one."""
    saved = models.saved_transformers(name, TEXT_MODELS[name], tmp_path)
    network = _check_against_library(saved, models.texts(N))
    heads = {
        "Roberta": "classifier.out_proj",
        "GPT2": "score",
        "Llama": "score",
        "Bart": "classification_head.out_proj",
    }
    assert network.head_name == heads.get(name, "classifier")


@pytest.mark.parametrize("name", campaign(TIMM_MODELS, often=[*TIMM_MODELS][::2]))
def test_networks_of_timm(name: str, tmp_path: Path) -> None:
    """The head is timm's classifier, which may be a 1x1 convolution."""
    saved = models.saved_timm(name, TIMM_MODELS[name], tmp_path)
    network = _check_against_library(saved, models.images(N, 64))
    assert network.module.get_submodule(network.head_name) is getattr(network.module, "get_classifier")()  # noqa: B009


@pytest.mark.parametrize("name", campaign(TORCHVISION_MODELS, often=[*TORCHVISION_MODELS][::2]))
def test_networks_of_torchvision(name: str, tmp_path: Path) -> None:
    """The head is the last linear module."""
    _check_against_library(models.saved_torchvision(name, TORCHVISION_MODELS[name], tmp_path), models.images(N, 64))


def test_a_trained_classifier_keeps_its_accuracy(tmp_path: Path) -> None:
    """BERT learns the first of four tokens of a text; features and head classify as the library does."""
    batch = models.texts(64)
    labels = torch.arange(64) % N_CLASSES
    batch["input_ids"][:, 0] = 10 + labels

    def train(model: Any) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()

    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path, change=train)
    probe = Probe(batch, labels, None, N_CLASSES, None)
    features, logits, _ = extract_features(_loaded(saved), probe, device=CPU)
    torch.testing.assert_close(logits, saved.library(batch), rtol=0, atol=1e-5)
    assert float((logits.argmax(dim=1) == labels).float().mean()) == 1.0
    assert features.shape == (64, 16)


def test_a_single_tensor_of_inputs_is_enough(tmp_path: Path) -> None:
    """`inputs` are the images, or the ids, even as float32; ids must be whole numbers."""
    for name, key, batch in (("ViT", "pixel_values", models.images(N)), ("Bert", "input_ids", models.texts(N))):
        config = {**IMAGE_MODELS, **TEXT_MODELS}[name]
        saved = models.saved_transformers(name, config, tmp_path / name)
        network = _loaded(saved)
        _, logits, _ = extract_features(network, labelled(batch[key]), device=CPU)
        torch.testing.assert_close(logits, saved.library({key: batch[key]}), rtol=0, atol=1e-5)
    error = error_of(lambda: extract_features(network, labelled(torch.full((N, 5), 2.5)), device=CPU))
    assert error.kind == "inputs-refused"


def test_equal_outputs_at_several_tokens_are_told_apart(tmp_path: Path) -> None:
    """A head of zeros gives every token the same logits; the features are still those of the last real token."""

    def zero_head(model: Any) -> None:
        with torch.no_grad():
            model.score.weight.zero_()

    batch = models.texts(N)
    plain = models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], tmp_path / "plain")
    zeroed = models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], tmp_path / "zeroed", change=zero_head)
    expected, _, _ = extract_features(_loaded(plain), labelled(batch), device=CPU)
    found, logits, _ = extract_features(_loaded(zeroed), labelled(batch), device=CPU)
    assert not bool(logits.any())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_networks_with_two_heads_are_refused(tmp_path: Path) -> None:
    """Distilled networks give the mean of two heads, which is neither's; another named head is refused too."""
    saved = models.saved_timm("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}, tmp_path)
    error = error_of(lambda: _loaded(saved))
    assert (error.kind, error.members["candidates"]) == ("head-not-found", ["head", "head_dist"])
    network = _loaded(saved, head="head")
    error = error_of(lambda: extract_features(network, labelled(models.images(N, 64)), device=CPU))
    assert error.kind == "head-not-found"
    assert error.members["difference"] > 1e-3
    config = {**IMAGE_MODELS["DeiT"], "architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit"}
    teacher = build({"family": "transformers", "config": {**config, "num_labels": 4}}, device=CPU)
    models.at_random(teacher)
    save_file(teacher.state_dict(), tmp_path / "teacher")
    description = {"family": "transformers", "config": {**config, "num_labels": 4}}
    network = load_network(description, tmp_path / "teacher", head=None, device=CPU)
    error = error_of(lambda: extract_features(network, labelled(models.images(N)), device=CPU))
    assert (error.kind, error.members["head"]) == ("head-not-found", "distillation_classifier")


def test_another_linear_module_is_not_the_head(tmp_path: Path) -> None:
    """A module that exists but does not give the logits is detected on the data."""
    saved = models.saved_torchvision("mobilenet_v3_small", {}, tmp_path)
    for head in ("classifier.0", "features.1.block.1.fc1"):
        call = partial(extract_features, _loaded(saved, head=head), labelled(models.images(N, 64)), device=CPU)
        error = error_of(call)
        assert error.kind == "head-not-found"
    description = {"family": "torchvision", "name": "squeezenet1_1", "args": {"num_classes": 4}}
    squeezenet = build(description, device=CPU)
    save_file(squeezenet.state_dict(), tmp_path / "squeezenet")
    error = error_of(lambda: load_network(description, tmp_path / "squeezenet", head=None, device=CPU))
    assert error.kind == "head-not-found"


def test_shared_tensors_may_be_stored_once_or_alike(tmp_path: Path) -> None:
    """BART's table of embeddings has three names: a file may hold any of them, or all."""
    saved = models.saved_transformers("Bart", TEXT_MODELS["Bart"], tmp_path / "saved")
    tensors = load_file(saved.path)
    names = [f"model.{part}.weight" for part in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    [stored] = [name for name in names if name in tensors]
    table = tensors.pop(stored)
    batch = models.texts(N)
    for number, kept in enumerate(([names[0]], [names[2]], names)):
        path = tmp_path / str(number)
        save_file({**tensors, **{name: table.clone() for name in kept}}, path)
        network = load_network(saved.architecture, path, head=None, device=CPU)
        _, logits, _ = extract_features(network, labelled(batch), device=CPU)
        torch.testing.assert_close(logits, saved.library(batch), rtol=0, atol=1e-5)
        assert len({id(network.module.get_parameter(name)) for name in names}) == 1


def test_constants_of_earlier_versions_are_passed_over(tmp_path: Path) -> None:
    """Old BERT files hold position_ids, and LayerNorm's gamma and beta; unknown tensors are listed."""
    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path / "saved")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(saved.path).items()
    }
    assert any(name.endswith("gamma") for name in tensors)
    save_file({**tensors, "bert.embeddings.position_ids": torch.arange(20)[None]}, tmp_path / "old")
    network = load_network(saved.architecture, tmp_path / "old", head=None, device=CPU)
    batch = models.texts(N)
    _, logits, _ = extract_features(network, labelled(batch), device=CPU)
    torch.testing.assert_close(logits, saved.library(batch), rtol=0, atol=1e-5)
    assert network.naming.ignored == {"bert.embeddings.position_ids": 1}
    save_file({**tensors, "bert.extra": torch.zeros(1)}, tmp_path / "more")
    network = load_network(saved.architecture, tmp_path / "more", head=None, device=CPU)
    assert network.naming.ignored == {"bert.extra": 1}


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.full((N, 5), 50)},
        {"input_ids": torch.full((N, 5), -1)},
        {"input_ids": torch.full((N, 21), 3)},
        {"input_ids": torch.full((N, 5), 3), "token_type_ids": torch.full((N, 5), 2)},
        {"pixel_values": torch.zeros(N, 3, 8, 8)},
        torch.zeros(N, 3, 8, 8),
    ],
)
def test_inputs_that_a_text_network_cannot_take_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    """Ids beyond the embedding, texts beyond its positions, unknown types of tokens, images."""
    network = _loaded(models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path))
    assert error_of(lambda: extract_features(network, labelled(inputs), device=CPU)).kind == "inputs-refused"


def test_names_that_a_network_does_not_take_are_told(tmp_path: Path) -> None:
    """DistilBERT has no token types; networks for images take only images."""
    network = _loaded(models.saved_transformers("DistilBert", TEXT_MODELS["DistilBert"], tmp_path))
    batch = {**models.texts(N), "token_type_ids": torch.zeros(N, 10, dtype=torch.int64)}
    error = error_of(lambda: extract_features(network, labelled(batch), device=CPU))
    assert error.members["unknown"] == ["token_type_ids"]
    network = _loaded(models.saved_timm("resnet18", {}, tmp_path))
    assert error_of(lambda: extract_features(network, labelled(models.texts(N)), device=CPU)).kind == "inputs-refused"


def test_a_path_between_two_text_classifiers_is_aligned(tmp_path: Path) -> None:
    """Weight matching traces a network with several input tensors, and keeps its function."""
    first, second = (
        _loaded(models.saved_transformers("Bert", {**TEXT_MODELS["Bert"], "pad_token_id": pad}, tmp_path / str(pad)))
        for pad in (0, 1)
    )
    batch = models.texts(N)
    ends = [extract_features(network, labelled(batch), device=CPU)[1] for network in (first, second)]
    generator = torch.Generator().manual_seed(0)
    state, alignment, change = aligned(first.module, second.module, batch, generator=generator)
    assert alignment.permutations
    assert change < 1e-5
    path = NetworkPath(first, state)
    for w, expected in zip((0.0, 1.0), ends, strict=True):
        _, logits, _ = extract_features(path.move_to(w), labelled(batch), device=CPU)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Levit", "Beit"])
@pytest.mark.parametrize("align", [False, True])
def test_what_a_network_keeps_of_its_weights_moves_with_them(tmp_path: Path, name: str, align: bool) -> None:
    """Attention that caches its biases in evaluation mode recomputes them at each point, and after tracing."""
    batch = models.images(N, 32)
    first, second = (_loaded(_saved_image_model(name, tmp_path / str(seed), seed)) for seed in range(2))
    ends = [extract_features(network, labelled(batch), device=CPU)[1] for network in (first, second)]
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    state = second.module.state_dict()
    if align:
        state, _, _ = aligned(first.module, second.module, batch, generator=torch.Generator().manual_seed(0))
    path = NetworkPath(first, state)
    for w, expected in ((0.0, ends[0]), (1.0, ends[1]), (0.0, ends[0])):
        _, logits, _ = extract_features(path.move_to(w), labelled(batch), device=CPU)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 if align else 0)


def _saved_image_model(name: str, folder: Path, seed: int) -> Saved:
    def change(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)

    return models.saved_transformers(name, IMAGE_MODELS[name], folder, change=change)


def test_a_text_network_without_padding_takes_one_text_at_a_time(tmp_path: Path) -> None:
    """GPT-2 cannot find the ends of texts in a batch without a padding token; the library's error says so."""
    saved = models.saved_transformers("GPT2", {**TEXT_MODELS["GPT2"], "pad_token_id": None}, tmp_path)
    network, ids = _loaded(saved), models.texts(N)["input_ids"]
    error = error_of(lambda: extract_features(network, labelled({"input_ids": ids}), device=CPU, batch_size=3))
    assert error.kind == "inputs-refused"
    assert "padding token" in error.detail
    _, logits, _ = extract_features(network, labelled({"input_ids": ids}), device=CPU, batch_size=1)
    expected = torch.cat([saved.library({"input_ids": one[None]}) for one in ids])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

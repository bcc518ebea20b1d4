"""Networks of transformers, timm and torchvision: each compared with its library's own forward pass."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.errors import AnalysisError
from analysis.networks.building import Bounded
from analysis.networks.loading import FAMILIES, LoadedNetwork, available_families, build, load_network
from analysis.passes.extraction import extract_features
from analysis.probes.inputs import Inputs
from analysis.probes.probe import Probe
from analysis.sweeps.alignment import aligned
from analysis.sweeps.paths import Path as NetworkPath
from tests.analysis import models
from tests.analysis.models import IMAGE_MODELS, N_CLASSES, TEXT_MODELS, TIMM_MODELS, TORCHVISION_MODELS, Saved
from tests.services import OPERATORS

CPU = torch.device("cpu")
N = 7


def _probe(inputs: Inputs, n: int = N) -> Probe:
    return Probe(inputs, torch.arange(n) % N_CLASSES, None, N_CLASSES, None)


def _loaded(saved: Saved, head: str | None = None) -> LoadedNetwork:
    return load_network(saved.architecture, saved.path, head=head, device=CPU)


def _error(call: Callable[[], Any]) -> AnalysisError:
    with pytest.raises(AnalysisError) as caught:
        call()
    return caught.value


def _check_against_library(saved: Saved, batch: dict[str, Tensor]) -> LoadedNetwork:
    """Logits are the library's; features x head + bias are the logits. Both to 1e-5 of their size."""
    network = _loaded(saved)
    features, logits, _ = extract_features(network, _probe(batch), device=CPU, batch_size=3)
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
    """Saved by the library, loaded by us and by the library: the same logits, from the features and the head."""
    saved = models.saved_transformers(name, IMAGE_MODELS[name], tmp_path)
    network = _check_against_library(saved, models.images(N))
    heads = {"ResNet": "classifier.1", "Levit": "classifier.linear"}
    assert network.head_name == heads.get(name, "classifier")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_classifiers_of_transformers(name: str, tmp_path: Path) -> None:
    """With padding and a mask, also where the head sees every token and the logits are one token's."""
    saved = models.saved_transformers(name, TEXT_MODELS[name], tmp_path)
    network = _check_against_library(saved, models.texts(N))
    heads = {
        "Roberta": "classifier.out_proj",
        "GPT2": "score",
        "Llama": "score",
        "Bart": "classification_head.out_proj",
    }
    assert network.head_name == heads.get(name, "classifier")


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_networks_of_timm(name: str, tmp_path: Path) -> None:
    """The head is what timm calls the classifier, a 1x1 convolution too."""
    saved = models.saved_timm(name, TIMM_MODELS[name], tmp_path)
    network = _check_against_library(saved, models.images(N, 64))
    assert network.module.get_submodule(network.head_name) is getattr(network.module, "get_classifier")()  # noqa: B009


@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_networks_of_torchvision(name: str, tmp_path: Path) -> None:
    """The head is the last linear module."""
    _check_against_library(models.saved_torchvision(name, TORCHVISION_MODELS[name], tmp_path), models.images(N, 64))


def test_a_trained_classifier_keeps_its_accuracy(tmp_path: Path) -> None:
    """BERT learns which of four tokens a text begins with; features and head tell it as the library does."""
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
    """`inputs` are the images, or the ids, even as float32; ids that are no whole numbers are refused."""
    for name, key, batch in (("ViT", "pixel_values", models.images(N)), ("Bert", "input_ids", models.texts(N))):
        config = {**IMAGE_MODELS, **TEXT_MODELS}[name]
        saved = models.saved_transformers(name, config, tmp_path / name)
        network = _loaded(saved)
        _, logits, _ = extract_features(network, _probe(batch[key]), device=CPU)
        torch.testing.assert_close(logits, saved.library({key: batch[key]}), rtol=0, atol=1e-5)
    error = _error(lambda: extract_features(network, _probe(torch.full((N, 5), 2.5)), device=CPU))
    assert error.kind == "inputs-refused"


def test_equal_outputs_at_several_tokens_are_told_apart(tmp_path: Path) -> None:
    """A head of zeros gives every token the same logits; the features are still those of the last real token."""

    def zero_head(model: Any) -> None:
        with torch.no_grad():
            model.score.weight.zero_()

    batch = models.texts(N)
    plain = models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], tmp_path / "plain")
    zeroed = models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], tmp_path / "zeroed", change=zero_head)
    expected, _, _ = extract_features(_loaded(plain), _probe(batch), device=CPU)
    found, logits, _ = extract_features(_loaded(zeroed), _probe(batch), device=CPU)
    assert not bool(logits.any())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_networks_with_two_heads_are_refused(tmp_path: Path) -> None:
    """Distilled networks give the mean of two heads, which is neither's; so does a head named beside the true one."""
    saved = models.saved_timm("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}, tmp_path)
    error = _error(lambda: _loaded(saved))
    assert (error.kind, error.members["candidates"]) == ("head-not-found", ["head", "head_dist"])
    network = _loaded(saved, head="head")
    error = _error(lambda: extract_features(network, _probe(models.images(N, 64)), device=CPU))
    assert error.kind == "head-not-found"
    assert error.members["difference"] > 1e-3
    config = {**IMAGE_MODELS["DeiT"], "architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit"}
    teacher = build({"family": "transformers", "config": {**config, "num_labels": 4}}, device=CPU)
    models.at_random(teacher)
    save_file(teacher.state_dict(), tmp_path / "teacher")
    description = {"family": "transformers", "config": {**config, "num_labels": 4}}
    network = load_network(description, tmp_path / "teacher", head=None, device=CPU)
    error = _error(lambda: extract_features(network, _probe(models.images(N)), device=CPU))
    assert (error.kind, error.members["head"]) == ("head-not-found", "distillation_classifier")


def test_another_linear_module_is_not_the_head(tmp_path: Path) -> None:
    """A module that exists and does not give the logits is found out on the data."""
    saved = models.saved_torchvision("mobilenet_v3_small", {}, tmp_path)
    for head in ("classifier.0", "features.1.block.1.fc1"):
        call = partial(extract_features, _loaded(saved, head=head), _probe(models.images(N, 64)), device=CPU)
        error = _error(call)
        assert error.kind == "head-not-found"
    description = {"family": "torchvision", "name": "squeezenet1_1", "args": {"num_classes": 4}}
    squeezenet = build(description, device=CPU)
    save_file(squeezenet.state_dict(), tmp_path / "squeezenet")
    error = _error(lambda: load_network(description, tmp_path / "squeezenet", head=None, device=CPU))
    assert error.kind == "head-not-found"


def test_shared_tensors_may_be_stored_once_or_alike(tmp_path: Path) -> None:
    """BART's one table of embeddings has three names: any one will do, and so do all of them."""
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
        _, logits, _ = extract_features(network, _probe(batch), device=CPU)
        torch.testing.assert_close(logits, saved.library(batch), rtol=0, atol=1e-5)
        assert len({id(network.module.get_parameter(name)) for name in names}) == 1


def test_constants_of_earlier_versions_are_passed_over(tmp_path: Path) -> None:
    """Old BERT files hold position_ids, and LayerNorm's gamma and beta; what the library does not know is listed."""
    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path / "saved")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(saved.path).items()
    }
    assert any(name.endswith("gamma") for name in tensors)
    save_file({**tensors, "bert.embeddings.position_ids": torch.arange(20)[None]}, tmp_path / "old")
    network = load_network(saved.architecture, tmp_path / "old", head=None, device=CPU)
    batch = models.texts(N)
    _, logits, _ = extract_features(network, _probe(batch), device=CPU)
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
    assert _error(lambda: extract_features(network, _probe(inputs), device=CPU)).kind == "inputs-refused"


def test_names_that_a_network_does_not_take_are_told(tmp_path: Path) -> None:
    """DistilBERT has no token types; networks for images take images alone."""
    network = _loaded(models.saved_transformers("DistilBert", TEXT_MODELS["DistilBert"], tmp_path))
    batch = {**models.texts(N), "token_type_ids": torch.zeros(N, 10, dtype=torch.int64)}
    error = _error(lambda: extract_features(network, _probe(batch), device=CPU))
    assert error.members["unknown"] == ["token_type_ids"]
    network = _loaded(models.saved_timm("resnet18", {}, tmp_path))
    assert _error(lambda: extract_features(network, _probe(models.texts(N)), device=CPU)).kind == "inputs-refused"


def test_a_path_between_two_text_classifiers_is_aligned(tmp_path: Path) -> None:
    """Weight matching traces a network that takes several tensors, and changes none of what it computes."""
    first, second = (
        _loaded(models.saved_transformers("Bert", {**TEXT_MODELS["Bert"], "pad_token_id": pad}, tmp_path / str(pad)))
        for pad in (0, 1)
    )
    batch = models.texts(N)
    ends = [extract_features(network, _probe(batch), device=CPU)[1] for network in (first, second)]
    generator = torch.Generator().manual_seed(0)
    state, alignment, change = aligned(first.module, second.module, batch, generator=generator)
    assert alignment.permutations
    assert change < 1e-5
    path = NetworkPath(first, state)
    for w, expected in zip((0.0, 1.0), ends, strict=True):
        _, logits, _ = extract_features(path.move_to(w), _probe(batch), device=CPU)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Levit", "Beit"])
@pytest.mark.parametrize("align", [False, True])
def test_what_a_network_keeps_of_its_weights_moves_with_them(tmp_path: Path, name: str, align: bool) -> None:
    """Attention that makes its biases once in evaluation mode makes them anew at each point, and after a tracing."""
    batch = models.images(N, 32)
    first, second = (_loaded(_saved_image_model(name, tmp_path / str(seed), seed)) for seed in range(2))
    ends = [extract_features(network, _probe(batch), device=CPU)[1] for network in (first, second)]
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    state = second.module.state_dict()
    if align:
        state, _, _ = aligned(first.module, second.module, batch, generator=torch.Generator().manual_seed(0))
    path = NetworkPath(first, state)
    for w, expected in ((0.0, ends[0]), (1.0, ends[1]), (0.0, ends[0])):
        _, logits, _ = extract_features(path.move_to(w), _probe(batch), device=CPU)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 if align else 0)


def _saved_image_model(name: str, folder: Path, seed: int) -> Saved:
    def change(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)

    return models.saved_transformers(name, IMAGE_MODELS[name], folder, change=change)


def test_a_text_network_without_padding_takes_one_text_at_a_time(tmp_path: Path) -> None:
    """GPT-2 cannot tell where texts of a batch end without a padding token; the library's words say so."""
    saved = models.saved_transformers("GPT2", {**TEXT_MODELS["GPT2"], "pad_token_id": None}, tmp_path)
    network, ids = _loaded(saved), models.texts(N)["input_ids"]
    error = _error(lambda: extract_features(network, _probe({"input_ids": ids}), device=CPU, batch_size=3))
    assert error.kind == "inputs-refused"
    assert "padding token" in error.detail
    _, logits, _ = extract_features(network, _probe({"input_ids": ids}), device=CPU, batch_size=1)
    expected = torch.cat([saved.library({"input_ids": one[None]}) for one in ids])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def _transformers(**config: Any) -> dict[str, Any]:
    bert = {**TEXT_MODELS["Bert"], "model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    return {"family": "transformers", "config": {**bert, **config}}


def _swin(**config: Any) -> dict[str, Any]:
    swin = {**IMAGE_MODELS["Swin"], "model_type": "swin", "architectures": ["SwinForImageClassification"]}
    return {"family": "transformers", "config": {**swin, **config}}


def _by_name(family: str, name: str, **args: Any) -> dict[str, Any]:
    return {"family": family, "name": name, "args": args}


REFUSED: dict[str, dict[str, Any]] = {
    "code of its own": _transformers(auto_map={"AutoModel": "modeling.Model"}),
    "quantised": _transformers(quantization_config={"bits": 4}),
    "one output": _transformers(num_labels=1),
    "regression": _transformers(num_labels=3, problem_type="regression"),
    "no class": _transformers(architectures=None),
    "class of another task": _transformers(architectures=["BertForMaskedLM"]),
    "class of another model": _transformers(architectures=["ViTForImageClassification"]),
    "two classes": _transformers(architectures=["BertForSequenceClassification"] * 2),
    "unknown model": _transformers(model_type="os"),
    "model that fetches by name": {
        "family": "transformers",
        "config": {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]},
    },
    "a million layers": _transformers(num_hidden_layers=10**6),
    "a hundred thousand layers": _transformers(num_hidden_layers=10**5),
    "a list of depths": _swin(depths=[5000, 5000]),
    "a billion classes": _transformers(num_labels=10**9),
    "heads that do not divide": _transformers(num_attention_heads=7),
    "a type of another kind": _transformers(hidden_size="16"),
    "not finite": _transformers(layer_norm_eps=float("inf")),
    "nested": _transformers(task_specific_params=json.loads("[" * 20 + "]" * 20)),
    "sizes that overflow": _transformers(hidden_size=2**40),
    "hub": _by_name("timm", "hf-hub:timm/resnet18"),
    "folder": _by_name("timm", "local-dir:/tmp"),
    "unknown name": _by_name("timm", "resnet9999"),
    "weights of timm": _by_name("timm", "resnet18", pretrained=True),
    "a file": _by_name("timm", "resnet18", checkpoint_path="/etc/passwd"),
    "a configuration": _by_name("timm", "resnet18", pretrained_cfg={"url": "http://localhost"}),
    "one class of timm": _by_name("timm", "resnet18", num_classes=1),
    "features of timm": _by_name("timm", "resnet18", features_only=True),
    "layers of timm": _by_name("timm", "vit_tiny_patch16_224", depth=10**5),
    "unknown argument": _by_name("timm", "resnet18", colour="red"),
    "weights of torchvision": _by_name("torchvision", "resnet18", weights="DEFAULT"),
    "a detector": _by_name("torchvision", "fasterrcnn_resnet50_fpn"),
    "a module's name": _by_name("torchvision", "__init__"),
    "wrong argument": _by_name("torchvision", "vgg11", dropout="much"),
    "config of timm": {"family": "timm", "config": {}},
    "name of transformers": _by_name("transformers", "bert"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_descriptions_are_refused_in_seconds(case: str, tmp_path: Path) -> None:
    """What points outside, is no classifier, or asks for depth beyond the file, is refused without being built."""
    path = tmp_path / "checkpoint"
    save_file({"weight": torch.zeros(2)}, path)
    started = time.perf_counter()
    error = _error(lambda: load_network(REFUSED[case], path, head=None, device=CPU))
    assert error.kind == "invalid-architecture"
    assert time.perf_counter() - started < 20, (
        "thousands of layers take 2 to 4 s until they are stopped, a million weeks"
    )


@pytest.mark.parametrize(
    "description",
    [
        _transformers(vocab_size=10**12, hidden_size=2**20),
        _transformers(max_position_embeddings=10**11),
        _by_name("timm", "vit_tiny_patch16_224", img_size=10**8),
        _by_name("torchvision", "vit_b_16", image_size=16 * 10**5),
    ],
)
def test_widths_without_end_cost_nothing(description: dict[str, Any], tmp_path: Path) -> None:
    """Networks of 10^12 parameters are compared with the file's header, and fit it not."""
    path = tmp_path / "checkpoint"
    save_file({"weight": torch.zeros(2)}, path)
    assert _error(lambda: load_network(description, path, head=None, device=CPU)).kind == "checkpoint-mismatch"


def test_a_constant_beyond_all_weights_is_not_computed(tmp_path: Path) -> None:
    """Windows of 200 x 200 have a table of 159,201 rows, which a file may have, and 1.6 thousand million pairs."""
    description = _swin(image_size=1600, window_size=200, num_labels=N_CLASSES)
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in build(description).state_dict().items()}
    save_file(tensors, tmp_path / "checkpoint")
    error = _error(lambda: load_network(description, tmp_path / "checkpoint", head=None, device=CPU))
    assert error.kind == "invalid-architecture"
    assert "a constant of 3200000000 elements" in error.detail


def test_a_constant_on_a_real_device_is_looked_at_first() -> None:
    """A constructor that asks for 8 TB of memory on the processor is stopped before it gets any."""
    with Bounded(1), torch.device("meta"):
        assert torch.zeros(2**40).is_meta
        error = _error(lambda: torch.zeros(2**40, device="cpu"))
    assert error.kind == "invalid-architecture"


SECOND_BUILD = """
import resource
from analysis.networks.loading import _create
from analysis.networks.building import WithoutInitialisation
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 4}
_create({"family": "transformers", "config": {**config, "hidden_size": 12}}, "cpu")
before = peak()
with WithoutInitialisation():
    network = _create({"family": "transformers", "config": config}, "cpu")
print(sum(parameter.numel() for parameter in network.parameters()), (peak() - before) / 1024)
print(network.bert.embeddings.position_ids.sum().item())
"""


def test_parameters_that_a_file_will_replace_take_no_memory() -> None:
    """BERT base, of 438 MB, is built within a few, and its table of positions is there."""
    sizes, positions = _printed(SECOND_BUILD, PYTHONPATH=str(OPERATORS))
    n_parameters, grown_mib = (float(word) for word in sizes.split())
    assert n_parameters > 109e6
    assert grown_mib < 60
    assert int(positions) == 511 * 512 // 2


def test_a_network_is_as_initialised_by_its_library() -> None:
    """Built on a real device, it has the library's initial weights, and the same for the same seed."""
    description = _by_name("timm", "resnet18", num_classes=N_CLASSES)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(build(description, device=CPU).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert float(found[0]["layer1.0.bn1.weight"].min()) == 1.0
    assert 0.01 < float(found[0]["conv1.weight"].std()) < 1.0


def test_what_is_left_out_changes_nothing(tmp_path: Path) -> None:
    """Types, implementations and paths of a configuration do not matter: the network computes in float32."""
    saved = models.saved_transformers("Llama", TEXT_MODELS["Llama"], tmp_path)
    more = {
        "_name_or_path": "somebody/else", "dtype": "float16", "torch_dtype": "bfloat16", "use_cache": True,
        "attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel", "return_dict": False,
        "output_hidden_states": True, "gradient_checkpointing": True,
    }  # fmt: skip
    described = {"family": "transformers", "config": {**saved.architecture["config"], **more}}
    network = load_network(described, saved.path, head=None, device=CPU)
    tensors = [*network.module.parameters(), *network.module.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    batch = models.texts(N)
    _, logits, _ = extract_features(network, _probe(batch), device=CPU)
    torch.testing.assert_close(logits, saved.library(batch), rtol=0, atol=1e-5)


IMPORTED = """
import sys
from analysis.networks.loading import available_families, build
families = available_families()
build({"family": "builtin", "name": "mlp", "args": {"sizes": [4, 2]}})
print(families, sorted({"transformers", "timm", "torchvision"} & set(sys.modules)))
"""
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ("timm", "torchvision") else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from analysis.errors import AnalysisError
from analysis.networks.loading import available_families, build
print(available_families())
try:
    build({"family": "timm", "name": "resnet18", "args": {}})
except AnalysisError as error:
    print(error.kind, error.members, error.detail)
"""


def _printed(program: str, **more: str) -> list[str]:
    """What a Python process prints, with more in its environment."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **more}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_libraries_are_imported_when_they_are_needed() -> None:
    """What is installed is known, and a built-in network built, without importing one of them."""
    # No package here declares networks of its own; tests/analysis/networks/test_custom.py has one that does.
    installed = [name for name in FAMILIES if name != "custom"]
    assert _printed(IMPORTED) == [f"{installed} []"]
    assert available_families() == installed


def test_a_family_that_is_missing_names_its_extra() -> None:
    """Without the package the family is not announced, and a network of it is refused with what to install."""
    families, refused = _printed(WITHOUT)
    assert families == "['builtin', 'transformers']"
    assert refused.startswith("family-unavailable {'family': 'timm', 'extra': 'timm', ")
    assert "pip install 'interplay-server[timm]'" in refused


def test_a_package_that_does_not_import_says_why() -> None:
    """torchvision beside a torch that is not its own fails with torch's words, in place of a bug's."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, as PyPI's torchvision wants")
    program = WITHOUT.replace('in ("timm", "torchvision")', "in ()").replace('"timm"', '"torchvision"')
    _, refused = _printed(program)
    assert refused.startswith("family-unavailable {'family': 'torchvision', 'extra': 'torchvision', ")
    assert "torchvision::nms does not exist" in refused


def test_app_refuses_what_the_builders_refuse() -> None:
    """The bounds and the forbidden members that app checks without torch are those of the families."""
    from app.descriptions import architectures
    from app.schemas.base import MAX_CLASSES

    building, timm, torchvision, transformers = (
        importlib.import_module(f"analysis.networks.{name}")
        for name in ("building", "timm", "torchvision", "transformers")
    )
    for bound in ("MAX_NESTING", "MAX_LIST", "MAX_DEPTH", "DEPTH"):
        assert getattr(architectures, bound) == getattr(building, bound)
    assert MAX_CLASSES == building.MAX_CLASSES
    assert architectures.FORBIDDEN_IN_TIMM == timm.FORBIDDEN
    assert architectures.FORBIDDEN_IN_TORCHVISION == torchvision.FORBIDDEN
    assert architectures.FORBIDDEN_IN_CONFIGS == transformers.FORBIDDEN
    assert {*architectures.LEFT_OUT_OF_CONFIGS, "architectures", "model_type"} == transformers._LEFT_OUT

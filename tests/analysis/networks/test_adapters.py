"""Adapters put on networks: PEFT's own merged logits, digits that depend on no order, and files that do not fit."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis.errors import AnalysisError
from analysis.networks.adapters import PREFIX, Adapter, Parts, match_adapter, supplied_shapes
from analysis.networks.adapting import Adaptable
from analysis.networks.loading import build, header_of, load_network
from analysis.networks.naming import Entry
from tests.analysis import models
from tests.analysis.adapters import SavedAdapter, adapter_of, saved_adapter
from tests.analysis.models import IMAGE_MODELS, LANGUAGE_MODELS, TEXT_MODELS, N, Saved
from tests.campaigns import campaign

CNN = {"family": "builtin", "name": "cnn", "args": {"n_classes": 4, "channels": [6, 8], "norm": "batch"}}

Case = tuple[Callable[[Path], Saved], dict[str, Tensor]]


def _builtin(folder: Path) -> Saved:
    """Return our own network of convolutions, batch normalisation and a linear head."""
    network = build(CNN, device="cpu")
    models.at_random(network)
    save_file(network.state_dict(), folder / "cnn.safetensors")
    return Saved(CNN, folder / "cnn.safetensors", torch.no_grad()(lambda batch: network(batch["pixel_values"])))


NETWORKS: dict[str, Case] = {
    "BERT": (lambda folder: models.saved_transformers("Bert", TEXT_MODELS["Bert"], folder), models.texts(N)),
    "RoBERTa": (lambda folder: models.saved_transformers("Roberta", TEXT_MODELS["Roberta"], folder), models.texts(N)),
    "GPT-2 with classes": (
        lambda folder: models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], folder), models.texts(N),
    ),
    "GPT-2": (lambda folder: models.saved_language_model("GPT2", folder), models.texts(N)),
    "Llama": (lambda folder: models.saved_language_model("Llama", folder), models.texts(N)),
    "ViT": (lambda folder: models.saved_transformers("ViT", IMAGE_MODELS["ViT"], folder), models.images(N)),
    "ResNet of timm": (lambda folder: models.saved_timm("resnet18", {}, folder), models.images(N, 64)),
    "builtin": (_builtin, models.images(N)),
}  # fmt: skip
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("BERT", {"target_modules": ["query", "value"], "r": 3}),
    ("BERT", {"target_modules": ["query", "dense"], "r": 4, "use_rslora": True, "task": "SEQ_CLS"}),
    ("BERT", {"target_modules": ["query", "word_embeddings"], "r": 3, "use_dora": True, "bias": "lora_only"}),
    ("BERT", {"target_modules": ["key"], "r": 2, "bias": "all", "modules_to_save": ["classifier"]}),
    ("BERT", {"target_modules": r".*layer\.1\..*query", "r": 5, "lora_alpha": 7}),
    ("BERT", {"target_modules": ["query"], "layers_to_transform": [1], "r": 2}),
    ("BERT", {"target_modules": ["query", "key"], "exclude_modules": ["0.attention.self.key"], "r": 2}),
    (
        "BERT",
        {
            "target_modules": ["query", "key", "value"],
            "r": 4,
            "rank_pattern": {"0.attention.self.query": 3, "query": 5, "^bert.encoder.layer.1.attention.self.key": 2},
            "alpha_pattern": {"key": 3, r"layer\.0\.attention\.self\.value$": 11},
        },
    ),
    ("RoBERTa", {"target_modules": ["query"], "r": 2, "modules_to_save": ["classifier"], "use_rslora": True}),
    ("GPT-2", {"target_modules": ["c_attn", "c_proj"], "r": 3}),
    ("GPT-2", {"target_modules": ["c_attn", "c_fc", "wpe"], "r": 3, "use_dora": True, "fan_in_fan_out": True}),
    ("Llama", {"target_modules": "all-linear", "r": 3}),
    ("Llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 2, "use_dora": True}),
    ("Llama", {"target_modules": ["v_proj"], "r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("ViT", {"target_modules": ["q_proj", "v_proj", "projection"], "r": 3, "modules_to_save": ["classifier"]}),
    ("ViT", {"target_modules": ["fc1", "projection"], "r": 3, "use_dora": True, "use_rslora": True}),
    ("ResNet of timm", {"target_modules": ["conv1", "downsample.0", "fc"], "r": 3}),
    ("ResNet of timm", {"target_modules": ["conv2", "fc"], "r": 3, "use_dora": True, "modules_to_save": ["bn1"]}),
    ("builtin", {"target_modules": r"convs\.\d|head", "r": 2, "use_rslora": True}),
    ("builtin", {"target_modules": ["convs.1", "head"], "r": 2, "use_dora": True, "modules_to_save": ["norms.0"]}),
]


@pytest.mark.parametrize(("name", "config"), campaign(ADAPTERS, often=ADAPTERS[::2]))
def test_logits_are_those_that_peft_merges(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    """The logits are those of PEFT's merged network, and of its network with the adapter beside it, to 1e-5."""
    saved, batch = _saved(name, tmp_path)
    adapter = saved_adapter(saved, tmp_path / "adapter", **config)
    with torch.no_grad():
        ours = _put_on(saved, adapter)(batch)
    expected, before = adapter.merged(batch), saved.library(batch)
    scale = max(1.0, float(expected.abs().max()))
    assert float((expected - before).abs().max()) > 1e-2 * scale, "an adapter that changes nothing would prove nothing"
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(ours, adapter.beside(batch), rtol=0, atol=1e-5 * scale)


def _saved(name: str, folder: Path) -> tuple[Saved, dict[str, Tensor]]:
    make, batch = NETWORKS[name]
    (folder / "base").mkdir()
    return make(folder / "base"), batch


def _put_on(saved: Saved, adapter: SavedAdapter) -> nn.Module:
    return _adaptable(saved).put_on(adapter_of(adapter.config), adapter.path, saved.path).module


def _adaptable(saved: Saved) -> Adaptable:
    return Adaptable(load_network(saved.architecture, saved.path, head=None, device="cpu"), saved.architecture)


def test_digits_depend_on_no_earlier_adapter(tmp_path: Path) -> None:
    """Each adapter gives the same bits whatever was on the network before, also one that failed, and so does none."""
    saved, _ = _saved("BERT", tmp_path)
    first = saved_adapter(saved, tmp_path / "first", target_modules=["query", "dense"], r=3, use_dora=True)
    second = saved_adapter(saved, tmp_path / "second", seed=1, target_modules=["key", "dense"], r=2, task="SEQ_CLS")
    broken = load_file(second.path)
    broken[f"{PREFIX}classifier.weight"][0, 0] = torch.nan
    save_file(broken, tmp_path / "broken.safetensors")
    alone = [{name: t.clone() for name, t in _put_on(saved, one).state_dict().items()} for one in (first, second)]
    base = load_file(saved.path)
    network = load_network(saved.architecture, saved.path, head=None, device="cpu")
    places = {name: tensor.data_ptr() for name, tensor in network.module.state_dict().items()}
    adaptable = Adaptable(network, saved.architecture)
    for one, expected in zip((first, second, second, first), (0, 1, 1, 0), strict=True):
        found = adaptable.put_on(adapter_of(one.config), one.path, saved.path)
        _require_equal(found.module.state_dict(), alone[expected])
        with pytest.raises(AnalysisError, match=r"'classifier.weight' holds NaN") as caught:
            adaptable.put_on(adapter_of(second.config), tmp_path / "broken.safetensors", saved.path)
        assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", "classifier.weight")
    _require_equal(adaptable.take_off(saved.path).module.state_dict(), base)
    # In place: there is no second copy of any tensor.
    assert {name: tensor.data_ptr() for name, tensor in network.module.state_dict().items()} == places


def test_half_precision_is_merged_in_float32(tmp_path: Path) -> None:
    """An adapter and a base in bfloat16 give what float64 gives of the same numbers, to float32's rounding."""
    saved, _ = _saved("BERT", tmp_path)
    adapter = saved_adapter(saved, tmp_path / "adapter", target_modules=["query"], r=3, use_dora=True)
    for path in (saved.path, adapter.path):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    base = {name: tensor.double() for name, tensor in load_file(saved.path).items()}
    parts = {name: tensor.double() for name, tensor in load_file(adapter.path).items()}
    merged = _put_on(saved, adapter).state_dict()
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.attention.self.query"
        a, b, magnitude = (parts[f"{PREFIX}{name}.lora_{end}"] for end in ("A.weight", "B.weight", "magnitude_vector"))
        changed = base[f"{name}.weight"] + 8 / 3 * b @ a
        expected = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        assert merged[f"{name}.weight"].dtype == torch.float32
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)


def test_names_of_an_earlier_version_of_the_library(tmp_path: Path) -> None:
    """An adapter that was trained when the library called the modules otherwise is the same adapter."""
    saved, batch = _saved("ViT", tmp_path)
    adapter = saved_adapter(saved, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    former = {
        name.replace("vit.layers.", "vit.encoder.layer.").replace(".q_proj.", ".attention.query."): tensor
        for name, tensor in load_file(adapter.path).items()
    }
    assert former.keys() != load_file(adapter.path).keys()
    save_file(former, tmp_path / "former.safetensors")
    config = adapter_of({**adapter.config, "target_modules": ["query"]})
    network = _adaptable(saved).put_on(config, tmp_path / "former.safetensors", saved.path)
    with torch.no_grad():
        torch.testing.assert_close(network.module(batch), adapter.merged(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["none", "of other classes"])
def test_a_head_that_only_the_adapter_has(head: str, tmp_path: Path) -> None:
    """A base may lack what each of its adapters holds whole, or have it in another shape; alone it is no network."""
    saved, batch = _saved("GPT-2 with classes", tmp_path)
    adapter = saved_adapter(saved, tmp_path / "adapter", target_modules=["c_attn"], r=2, task="SEQ_CLS")
    file, body = load_file(saved.path), tmp_path / "body.safetensors"
    whole = sum(tensor.numel() for tensor in file.values())
    file |= {"score.weight": torch.ones(2, 16)}
    save_file({name: tensor for name, tensor in file.items() if head != "none" or name != "score.weight"}, body)
    with safe_open(adapter.path, framework="pt") as opened:
        supplied = supplied_shapes(header_of(opened))
    assert supplied == {"score.weight": [4, 16]}
    loaded = load_network(saved.architecture, body, head=None, device="cpu", supplied=supplied)
    adaptable = Adaptable(loaded, saved.architecture)
    network = adaptable.put_on(adapter_of(adapter.config), adapter.path, body)
    with torch.no_grad():
        torch.testing.assert_close(network.module(batch), adapter.merged(batch), rtol=0, atol=1e-5)
    assert network.naming.n_parameters == whole
    without = {name: tensor for name, tensor in load_file(adapter.path).items() if not name.endswith("score.weight")}
    save_file(without, tmp_path / "without.safetensors")
    config = adapter_of({**adapter.config, "modules_to_save": None})
    acts: list[Callable[[], Any]] = [
        lambda: adaptable.put_on(config, tmp_path / "without.safetensors", body),
        lambda: adaptable.take_off(body),
        lambda: load_network(saved.architecture, body, head=None, device="cpu"),
        # In another shape than the network's nothing is supplied: no description allocates more than files hold.
        lambda: load_network(saved.architecture, body, head=None, device="cpu", supplied={"score.weight": [4, 15]}),
    ]
    for act in acts:
        with pytest.raises(AnalysisError) as caught:
            act()
        assert caught.value.kind == "checkpoint-mismatch"
        assert head != "none" or caught.value.members["missing"] in (["score.weight"], [f"{PREFIX}score.weight"])


Tensors = dict[str, Tensor]
QUERY = f"{PREFIX}bert.encoder.layer.0.attention.self.query"
CHANGES: dict[str, tuple[Callable[[Tensors], Any], str, Any]] = {
    "no B": (lambda file: file.pop(f"{QUERY}.lora_B.weight"), "missing", f"{QUERY}.lora_B.weight"),
    "no magnitudes": (
        lambda file: file.pop(f"{QUERY}.lora_magnitude_vector"), "missing", f"{QUERY}.lora_magnitude_vector",
    ),
    "a module less": (
        lambda file: [file.pop(f"{QUERY}.lora_{end}") for end in ("A.weight", "B.weight", "magnitude_vector")],
        "missing",
        f"{QUERY}.lora_A.weight",
    ),
    "no module to save": (
        lambda file: file.pop(f"{PREFIX}classifier.bias"), "missing", f"{PREFIX}classifier.bias",
    ),
    "no bias": (lambda file: file.pop(f"{QUERY}.base_layer.bias"), "missing", f"{QUERY}.base_layer.bias"),
    "an unknown module": (
        lambda file: file.update({f"{PREFIX}bert.decoder.lora_A.weight": torch.zeros(3, 16)}),
        "unexpected",
        f"{PREFIX}bert.decoder.lora_A.weight",
    ),
    "an unknown tensor": (lambda file: file.update({f"{PREFIX}x": torch.zeros(1)}), "unexpected", f"{PREFIX}x"),
    "no prefix": (lambda file: file.update({"classifier.bias": torch.zeros(4)}), "unexpected", "classifier.bias"),
    "a part of an embedding": (
        lambda file: file.update({f"{QUERY}.lora_embedding_A": torch.zeros(3, 16)}),
        "unexpected",
        f"{QUERY}.lora_embedding_A",
    ),
    "another rank": (
        lambda file: file.update({f"{QUERY}.lora_A.weight": torch.zeros(4, 16)}),
        "misshaped",
        {"name": f"{QUERY}.lora_A.weight", "expected": [3, 16], "found": [4, 16]},
    ),
    "another width": (
        lambda file: file.update({f"{QUERY}.lora_B.weight": torch.zeros(15, 3)}),
        "misshaped",
        {"name": f"{QUERY}.lora_B.weight", "expected": [16, 3], "found": [15, 3]},
    ),
    "another number of classes": (
        lambda file: file.update({f"{PREFIX}classifier.weight": torch.zeros(5, 16)}),
        "misshaped",
        {"name": f"{PREFIX}classifier.weight", "expected": [4, 16], "found": [5, 16]},
    ),
    "whole numbers": (
        lambda file: file.update({f"{QUERY}.lora_A.weight": torch.zeros(3, 16, dtype=torch.int64)}),
        "mistyped",
        {"name": f"{QUERY}.lora_A.weight", "expected": "float32", "found": "I64"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_does_not_fit_is_refused_with_its_names(what: str, tmp_path: Path) -> None:
    """Tensors that are missing, unexpected, of another shape or type have the file's names; nothing has changed."""
    saved, _ = _saved("BERT", tmp_path)
    settings: dict[str, Any] = {"target_modules": ["query"], "r": 3, "use_dora": True, "bias": "lora_only"}
    adapter = saved_adapter(saved, tmp_path / "adapter", task="SEQ_CLS", **settings)
    change, kind, expected = CHANGES[what]
    file = load_file(adapter.path)
    change(file)
    save_file(file, tmp_path / "changed.safetensors")
    adaptable = _adaptable(saved)
    with pytest.raises(AnalysisError) as caught:
        adaptable.put_on(adapter_of(adapter.config), tmp_path / "changed.safetensors", saved.path)
    assert caught.value.kind == "checkpoint-mismatch"
    members = caught.value.members
    assert (members[kind], members[f"n_{kind}"]) == ([expected], 1)
    assert sum(members[f"n_{other}"] for other in ("missing", "unexpected", "misshaped", "mistyped")) == 1
    _require_equal(adaptable.take_off(saved.path).module.state_dict(), load_file(saved.path))


def test_targets_that_are_listed_are_the_modules_of_the_file(tmp_path: Path) -> None:
    """Tensors of a module that the configuration does not name, which PEFT would pass over, are refused."""
    saved, _ = _saved("BERT", tmp_path)
    adapter = saved_adapter(saved, tmp_path / "adapter", target_modules=["query", "key"], r=3)
    adaptable, config = _adaptable(saved), adapter_of({**adapter.config, "target_modules": ["query"]})
    with pytest.raises(AnalysisError) as caught:
        adaptable.put_on(config, adapter.path, saved.path)
    layers = [f"{PREFIX}bert.encoder.layer.{layer}.attention.self.key" for layer in range(2)]
    assert caught.value.members["unexpected"] == layers


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["wte"], "r": 2},
        {"target_modules": ["c_attn", "lm_head"], "r": 2, "use_dora": True},
        {"target_modules": ["c_attn"], "r": 2, "modules_to_save": ["wte"]},
    ],
)
def test_a_tensor_with_two_uses_is_not_changed(config: dict[str, Any], tmp_path: Path) -> None:
    """PEFT trains one use of tied embeddings and merges into both, so an adapter of them is refused by their names."""
    saved, _ = _saved("GPT-2", tmp_path)
    adapter = saved_adapter(saved, tmp_path / "adapter", **config)
    with pytest.raises(AnalysisError, match="two answers") as caught:
        _put_on(saved, adapter)
    assert caught.value.kind == "checkpoint-mismatch"
    assert caught.value.members == {"reason": "tied", "tensors": ["transformer.wte.weight", "lm_head.weight"]}


def test_tied_biases_that_are_saved_alike_are_taken(tmp_path: Path) -> None:
    """With all biases in the file, those that the network ties are there under each name, and alike."""
    class_name, config = LANGUAGE_MODELS["Bert"]
    (tmp_path / "base").mkdir()
    saved = models.saved_language_model("Bert", tmp_path / "base")
    assert (class_name, config["is_decoder"]) == ("BertLMHeadModel", True)
    adapter = saved_adapter(saved, tmp_path / "adapter", target_modules=["query"], r=2, bias="all")
    batch = models.texts(N)
    with torch.no_grad():
        torch.testing.assert_close(_put_on(saved, adapter)(batch), adapter.merged(batch), rtol=0, atol=1e-5)


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.reparametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("grouped", "a convolution in groups"),
        ("attention", "a MultiheadAttention"),
        ("attention.out_proj", "a NonDynamicallyQuantizableLinear"),
        ("reparametrised", "a ParametrizedLinear"),
        ("norm", "a LayerNorm"),
    ],
)
def test_modules_that_cannot_be_merged_are_refused_by_name(module: str, what: str) -> None:
    """An adapter of a module whose merged weight would be another function is refused with its name and kind."""
    network = _Parts()
    parts = Parts(network.state_dict(), dict(network.named_modules()), str)
    header = {f"{PREFIX}{module}.lora_{part}.weight": Entry("F32", [4, 4]) for part in "AB"}
    with pytest.raises(AnalysisError, match=what) as caught:
        match_adapter(Adapter(r=4, alpha=8.0), header, parts)
    assert caught.value.members == {"reason": "adapted-module", "module": module}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, 8),
        ({"q": 2}, 2),
        ({"attn.q": 3, "q": 2}, 3),
        ({"q": 2, "attn.q": 3}, 2),
        ({"ttn.q": 3}, 8),
        ({"^layers.1.attn.q": 4, "q": 2}, 4),
        ({"^attn.q": 4}, 8),
        ({"layers.1.attn": 4}, 8),
    ],
)
def test_patterns_are_matched_as_peft_matches_them(pattern: Mapping[str, int], expected: int) -> None:
    """Of the keys that are a module's name or its end after a dot the first counts, as in PEFT's own function."""
    from peft.utils.other import get_pattern_key

    name = "layers.1.attn.q"
    adapter = Adapter(r=8, alpha=6.0, rslora=True, rank_pattern=pattern)
    assert adapter.rank(name) == pattern.get(get_pattern_key(pattern, name), 8) == expected
    assert adapter.scale(name) == 6 / math.sqrt(expected)
    alphas = {key: float(value) for key, value in pattern.items()}
    assert Adapter(r=8, alpha=8.0, alpha_pattern=alphas).scale(name) == expected / 8


def test_a_hundred_thousand_patterns_cost_nothing() -> None:
    """Patterns are looked up by name, so that a file full of them is as fast as one without."""
    pattern = {f"layers.{number}.q": 2 for number in range(100_000)}
    adapter = Adapter(r=8, alpha=6.0, rank_pattern=pattern, targets=list(pattern), saved=["x"] * 100)
    network = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(1, 1)}) for _ in range(2000))})
    parts = Parts(network.state_dict(), dict(network.named_modules()), str)
    header = {
        f"{PREFIX}layers.{number}.q.lora_{part}.weight": Entry("F32", [2, 1] if part == "A" else [1, 2])
        for number in range(2000)
        for part in "AB"
    }
    changes, _ = match_adapter(adapter, header, parts)
    assert len(changes) == 2000


def _require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name

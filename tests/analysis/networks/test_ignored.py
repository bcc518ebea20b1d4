"""Names as the library of transformers treats them: tensors that it ignores, and tied tensors that differ."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.networks.loading import LoadedNetwork, load_network
from analysis.networks.ties import untie
from tests.analysis import models
from tests.analysis.models import TEXT_MODELS, Saved
from tests.analysis.networks.test_naming import State, behind, refused

CPU = torch.device("cpu")


def _loaded(saved: Saved, path: Path | None = None, prefix: str | None = None) -> LoadedNetwork:
    return load_network(saved.architecture, path or saved.path, head=None, device=CPU, prefix=prefix)


def _logits(network: LoadedNetwork) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network.module(models.texts(5))
    return logits


def _of_the_library(saved: Saved, state: State, folder: Path) -> tuple[LoadedNetwork, Tensor]:
    """Return the network from these tensors, and the logits of `from_pretrained` with them."""
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(saved.architecture["config"]))
    cls = getattr(transformers, saved.architecture["config"]["architectures"][0])
    library = cls.from_pretrained(folder).eval()
    with torch.no_grad():
        return _loaded(saved, path), library(**models.texts(5)).logits


@pytest.mark.parametrize(
    ("name", "more", "ignored"),
    [
        (
            "GPT2",
            {f"transformer.h.{n}.attn.{buffer}": torch.ones(1, 1, 20, 20) for n in range(2)
             for buffer in ("bias", "masked_bias")},
            {"transformer.h.*.attn.bias": 2, "transformer.h.*.attn.masked_bias": 2},
        ),
        (
            "GPTNeo",
            {f"transformer.h.{n}.attn.attention.{buffer}": torch.ones(1, 1, 20, 20) for n in range(2)
             for buffer in ("bias", "masked_bias")},
            {"transformer.h.*.attn.attention.bias": 2, "transformer.h.*.attn.attention.masked_bias": 2},
        ),
        (
            "GPTJ",
            {f"transformer.h.{n}.attn.{buffer}": torch.ones(1, 1, 20, 20) for n in range(2)
             for buffer in ("bias", "masked_bias")},
            {"transformer.h.*.attn.bias": 2, "transformer.h.*.attn.masked_bias": 2},
        ),
        (
            "GPTNeoX",
            {f"gpt_neox.layers.{n}.attention.{buffer}": torch.ones(2) for n in range(2)
             for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq")},
            {
                "gpt_neox.layers.*.attention.bias": 2,
                "gpt_neox.layers.*.attention.masked_bias": 2,
                "gpt_neox.layers.*.attention.rotary_emb.": 2,
            },
        ),
        ("Bert", {"bert.pooler.dense.weight": torch.ones(16, 16), "cls.seq_relationship.weight": torch.ones(2, 16)},
         {"bert.pooler.": 1, "cls.seq_relationship.": 1}),
        ("Llama", {"score.weight": torch.ones(2, 16), "v_head.summary.bias": torch.ones(1)},
         {"score.": 1, "v_head.": 1}),
    ],
)  # fmt: skip
def test_what_from_pretrained_passes_over_is_left_out(
    name: str, more: State, ignored: dict[str, int], tmp_path: Path
) -> None:
    """Buffers of earlier versions and heads of other tasks are listed; the logits are the library's."""
    saved = models.saved_language_model(name, tmp_path / "saved")
    network, expected = _of_the_library(saved, {**load_file(saved.path), **more}, tmp_path / "more")
    torch.testing.assert_close(_logits(network), expected, rtol=0, atol=1e-5)
    assert network.naming.ignored == ignored
    wrapped = behind("model.", {**load_file(saved.path), **more})
    save_file({name: tensor.clone() for name, tensor in wrapped.items()}, tmp_path / "wrapped")
    network = _loaded(saved, tmp_path / "wrapped")
    torch.testing.assert_close(_logits(network), expected, rtol=0, atol=1e-5)
    assert network.naming.prefix == "model."


def test_a_language_models_head_is_left_out_of_a_classifier(tmp_path: Path) -> None:
    """BERT's masked language model in the file of a classifier, as from training on both."""
    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path / "saved")
    more = {"cls.predictions.bias": torch.ones(50), "cls.predictions.transform.dense.weight": torch.ones(16, 16)}
    network, expected = _of_the_library(saved, {**load_file(saved.path), **more}, tmp_path / "more")
    torch.testing.assert_close(_logits(network), expected, rtol=0, atol=1e-5)
    assert network.naming.ignored == {"cls.": 2}


@pytest.mark.parametrize("extra", ["lora_A.default.weight", "weight_scale_inv", "weight.absmax"])
def test_what_changes_a_layer_is_not_left_out(extra: str, tmp_path: Path) -> None:
    """Unmerged adapters and scales of quantised weights mean that the network computes something else."""
    saved = models.saved_language_model("Llama", tmp_path)
    layer = "model.layers.0.self_attn.q_proj"
    save_file({**load_file(saved.path), f"{layer}.{extra}": torch.ones(2, 16)}, tmp_path / "more")
    error = refused(lambda: _loaded(saved, tmp_path / "more"))
    assert error.members["unexpected"] == [f"{layer}.{extra}"]


@pytest.mark.parametrize("name", ["Llama, tied", "GPT2", "Qwen2", "OPT"])
def test_tied_tensors_that_differ_stay_apart_as_in_the_library(name: str, tmp_path: Path) -> None:
    """If both are in the file and differ, the logits are the library's and the name is listed; equal ones are tied."""
    saved = models.saved_language_model(name, tmp_path / "saved")
    tied = _loaded(saved)
    other = torch.randn(tied.weight.shape, generator=torch.Generator().manual_seed(5))
    network, expected = _of_the_library(saved, {**load_file(saved.path), "lm_head.weight": other}, tmp_path / "differ")
    torch.testing.assert_close(_logits(network), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(_logits(tied), expected, atol=1e-3)
    assert network.naming.untied == ["lm_head.weight"]
    assert torch.equal(network.weight, other)
    network, expected = _of_the_library(
        saved, {**load_file(saved.path), "lm_head.weight": tied.weight}, tmp_path / "equal"
    )
    torch.testing.assert_close(_logits(network), expected, rtol=0, atol=1e-5)
    assert network.naming.untied == []
    assert network.naming.n_parameters == tied.naming.n_parameters + tied.weight.numel()
    parameters = [parameter for parameter in network.module.parameters() if parameter.shape == other.shape]
    assert len(parameters) == 1


@pytest.mark.parametrize("differing", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_three_names_of_one_table_are_tied_as_in_the_library(differing: tuple[int, ...], tmp_path: Path) -> None:
    """BART has its own order in which the library ties the differing ones of three names."""
    saved = models.saved_transformers("Bart", TEXT_MODELS["Bart"], tmp_path / "saved")
    names = [f"model.{part}.weight" for part in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    tensors = load_file(saved.path)
    [stored] = [name for name in names if name in tensors]
    table = tensors.pop(stored)
    state = {**tensors, **{names[n]: table * (1 + n) for n in differing}}
    network, expected = _of_the_library(saved, state, tmp_path / "differ")
    torch.testing.assert_close(_logits(network), expected, rtol=0, atol=1e-5)
    assert len(network.naming.untied) == len(differing) - 1


def test_a_network_is_untied_without_a_change(tmp_path: Path) -> None:
    """The head gets its own tensor, equal to the embedding's, as the other end of a path may need."""
    saved = models.saved_language_model("GPT2", tmp_path)
    network = _loaded(saved)
    before = _logits(network)
    untie(network.module, ["lm_head.weight"])
    assert torch.equal(_logits(network), before)
    module: Any = network.module
    assert module.lm_head.weight is not module.transformer.wte.weight

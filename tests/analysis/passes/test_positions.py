"""Causal language models: features, labels and predictions of positions, against their library's own forward pass."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import LoadedNetwork, load_network
from analysis.networks.transformers import CAUSAL_LM
from analysis.passes.positions import extract_positions
from analysis.probes import texts
from analysis.probes.probe import Probe
from analysis.probes.sequences import IGNORED, labels_of_tokens, next_token_labels
from analysis.sweeps.alignment import aligned
from analysis.sweeps.paths import Path as NetworkPath
from analysis.sweeps.pruning import Pruning
from app.descriptions import architectures, labels
from tests.analysis import models, reference
from tests.analysis.models import LANGUAGE_MODELS, Saved

CPU = torch.device("cpu")
N, VOCABULARY = 9, 50


def _loaded(saved: Saved) -> LoadedNetwork:
    return load_network(saved.architecture, saved.path, head=None, device=CPU)


def _probe(batch: dict[str, Tensor], given: Tensor | None = None, split: Tensor | None = None) -> Probe:
    return Probe(batch, labels_of_tokens(batch, given, n_vocabulary=VOCABULARY), split, VOCABULARY, None)


def _error(call: Callable[[], Any]) -> AnalysisError:
    with pytest.raises(AnalysisError) as caught:
        call()
    return caught.value


def _expected(saved: Saved, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the library's logits at each position with a next token, and that token, in order."""
    logits, ids, mask = saved.library(batch), batch["input_ids"], batch["attention_mask"]
    rows = [(n, t) for n in range(len(ids)) for t in range(ids.shape[1] - 1) if mask[n, t] and mask[n, t + 1]]
    return torch.stack([logits[n, t] for n, t in rows]), torch.tensor([int(ids[n, t + 1]) for n, t in rows])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_positions_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    """Features x output embedding + bias are the library's logits; loss, prediction and confidence follow."""
    saved, batch = models.saved_language_model(name, tmp_path), models.texts(N)
    network = _loaded(saved)
    assert network.predicts_tokens
    assert network.weight.shape[0] == VOCABULARY
    found, size = extract_positions(network, _probe(batch), device=CPU, batch_size=4)
    logits, targets = _expected(saved, batch)
    assert size == 4
    assert found.vocabulary is not None
    assert found.predictions is not None
    tokens = found.vocabulary.tokens
    assert (found.vocabulary.size, tokens.tolist()) == (VOCABULARY, sorted(set(targets.tolist())))
    assert torch.equal(tokens[found.labels], targets)
    assert torch.equal(found.head, network.weight[tokens])
    scale = float(logits.abs().max())
    product = found.features.double() @ network.weight.T.double()
    product = product if network.bias is None else product + network.bias.double()
    torch.testing.assert_close(product, logits.double(), rtol=0, atol=1e-5 * scale)
    assert float(logits.std(dim=0).min()) > 1e-4 * scale, "positions that all look alike would prove nothing"
    losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(found.predictions.loss, losses, rtol=1e-4, atol=1e-5)
    predicted = [int(token) for token in logits.argmax(dim=1)]
    ours = [-1 if place < 0 else int(tokens[place]) for place in found.predictions.predicted.tolist()]
    assert ours == [token if token in tokens else -1 for token in predicted]
    assert -1 in ours, "the network should predict a token that is no class, too"
    confidence = logits.double().softmax(dim=1).max(dim=1).values
    torch.testing.assert_close(found.predictions.confidence, confidence, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_the_loss_is_the_librarys(name: str, tmp_path: Path) -> None:
    """It is `outputs.loss` of the whole batch, with -100 for padding and other positions without a label."""
    saved, batch = models.saved_language_model(name, tmp_path), models.texts(N)
    class_name, _ = LANGUAGE_MODELS[name]
    library = getattr(transformers, class_name).from_pretrained(tmp_path).eval()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    partial = labels.clone()
    partial[:, :3] = IGNORED
    network = _loaded(saved)
    for given, theirs in ((None, labels), (partial, partial)):
        with torch.no_grad():
            loss = float(library(**batch, labels=theirs).loss)
        found = evaluate_network(network, _probe(batch, given), device=CPU, options=EvaluationOptions(0))
        assert found.splits["all"].loss == pytest.approx(loss, rel=1e-5)
        assert found.splits["all"].n_samples == int((theirs[:, 1:] != IGNORED).sum())


def test_the_measures_are_those_of_the_tokens_that_occur(tmp_path: Path) -> None:
    """MIR, HDR and collapse of all positions the naive way, with the head restricted to the classes; by split too."""
    saved, batch = models.saved_language_model("GPT2", tmp_path), models.texts(N)
    batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 12 + 4, models.PAD)
    split = torch.arange(N) % 2
    network, probe = _loaded(saved), _probe(batch, split=split)
    found, _ = extract_positions(network, probe, device=CPU)
    evaluation = evaluate_network(network, probe, device=CPU, options=EvaluationOptions(tolerance=0.0))
    logits, targets = _expected(saved, batch)
    assert (evaluation.n_classes, evaluation.n_features) == (VOCABULARY, 16)
    assert found.vocabulary is not None
    assert found.split is not None
    tokens = found.vocabulary.tokens
    for name, rows in (
        ("all", torch.ones(len(targets)).bool()),
        ("train", found.split == 0),
        ("test", found.split == 1),
    ):
        measured = evaluation.splits[name]
        features, labels, head = found.features[rows].double().numpy(), found.labels[rows].numpy(), found.head.numpy()
        assert measured.class_counts == [int((targets[rows] == token).sum()) for token in tokens]
        assert measured.collapse.absent_classes == VOCABULARY - len(set(labels.tolist()))
        for level, centrings in measured.interplay.items():
            for centring, values in centrings.items():
                expected = reference.interplay(features, labels, head.astype("float64"), level, centring)
                assert values.mir == pytest.approx(expected.mir, abs=1e-8)
                assert values.hdr == pytest.approx(expected.hdr, abs=1e-8)
        predicted = torch.searchsorted(tokens, logits[rows].argmax(dim=1)).clamp(max=len(tokens) - 1)
        predicted = torch.where(tokens[predicted] == logits[rows].argmax(dim=1), predicted, -1)
        collapse = reference.collapse(features, labels, head.astype("float64"), predicted.numpy())
        for measure, value in collapse.items():
            assert getattr(measured.collapse, measure) == pytest.approx(value, rel=1e-5)
        assert measured.accuracy == pytest.approx(float((logits[rows].argmax(dim=1) == targets[rows]).double().mean()))


def test_padding_may_stand_on_the_left(tmp_path: Path) -> None:
    """A position counts if it and the next one are tokens, for padding on either side."""
    saved = models.saved_language_model("Llama", tmp_path)
    batch = models.texts(N)
    turned = {key: tensor.flip(1) for key, tensor in batch.items()}
    found, _ = extract_positions(_loaded(saved), _probe(turned), device=CPU)
    assert found.vocabulary is not None
    _, targets = _expected(saved, turned)
    assert torch.equal(found.vocabulary.tokens[found.labels], targets)
    labels = next_token_labels(torch.tensor([[0, 7, 8, 6]]), torch.tensor([[0, 1, 1, 1]]), n_vocabulary=9)
    assert labels.tolist() == [[IGNORED, 8, 6, IGNORED]]


def test_a_tied_embedding_is_one_tensor(tmp_path: Path) -> None:
    """The file of `save_pretrained` lacks it; a path mixes it once, with B at its end; a pruned head prunes it."""
    first = models.saved_language_model("GPT2", tmp_path / "first")
    second = models.saved_language_model("GPT2", tmp_path / "second", change=_doubled)
    assert "lm_head.weight" not in load_file(first.path)
    network, batch = _loaded(first), models.texts(N)
    path = NetworkPath(network, _loaded(second).module.state_dict())
    assert sum(name.endswith(("wte.weight", "lm_head.weight")) for name in path.mix) == 1
    length, _ = path.distances()
    ends = [torch.cat([tensor.flatten() for tensor in load_file(saved.path).values()]) for saved in (first, second)]
    assert length == pytest.approx(float((ends[0] - ends[1]).norm()), rel=1e-5)
    for w, saved in ((0.0, first), (1.0, second)):
        found, _ = extract_positions(path.move_to(w), _probe(batch), device=CPU)
        assert found.predictions is not None
        logits, targets = _expected(saved, batch)
        losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
        torch.testing.assert_close(found.predictions.loss, losses, rtol=1e-4, atol=1e-5)
    pruning = Pruning(_loaded(first), "layerwise", include_head=True)
    module: Any = pruning.network.module
    # Two layers, each of four linear modules of GPT-2's own kind, and the head.
    assert len(pruning.weights) == 9
    pruning.prune_to(0.5)
    assert int((module.transformer.wte.weight == 0).sum()) == module.lm_head.weight.numel() // 2
    assert len(Pruning(_loaded(first), "global").weights) == 8


def _doubled(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "OPT"])
def test_alignment_undoes_a_permutation_or_leaves_it(name: str, tmp_path: Path) -> None:
    """Two language models are aligned without a change of their logits, including tied embeddings."""
    saved = models.saved_language_model(name, tmp_path)
    first, second = _loaded(saved), _loaded(saved)
    with torch.no_grad():
        for parameter in second.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.01)
    batch = next(_probe(models.texts(N)).batches(4, device=CPU))
    _, alignment, change = aligned(first.module, second.module, batch, generator=torch.Generator().manual_seed(0))
    assert len(alignment.permutations) > 0
    assert change < 1e-4


def test_a_network_that_sees_what_comes_is_refused(tmp_path: Path) -> None:
    """The logits of an encoder with a language model's head change with later tokens."""
    name, config = LANGUAGE_MODELS["Bert"]
    cls: Any = getattr(transformers, name)
    model = cls(cls.config_class(**{**config, "is_decoder": False}))
    models.at_random(model)
    model.save_pretrained(tmp_path)
    saved = models.saved_language_model("Bert", tmp_path / "causal")
    description = {"family": "transformers", "config": {**saved.architecture["config"], "is_decoder": False}}
    network = load_network(description, tmp_path / "model.safetensors", head=None, device=CPU)
    error = _error(lambda: extract_positions(network, _probe(models.texts(N)), device=CPU))
    assert error.kind == "invalid-architecture"
    assert "is_decoder" in error.detail


def test_logits_that_are_not_the_heads_are_refused(tmp_path: Path) -> None:
    """A network that caps its logits has no features in this sense; the error gives the difference."""
    cls: Any = transformers.Gemma2ForCausalLM
    config = {**models.TEXT_MODELS["Llama"], "head_dim": 8, "final_logit_softcapping": 1.0}
    model = cls(cls.config_class(**config))
    models.at_random(model)
    model.save_pretrained(tmp_path)
    saved = models.saved_language_model("Llama", tmp_path / "llama")
    theirs = model.config.to_diff_dict()
    description = {
        "family": "transformers",
        "config": {**saved.architecture["config"], **theirs, "architectures": ["Gemma2ForCausalLM"]},
    }
    network = load_network(description, tmp_path / "model.safetensors", head=None, device=CPU)
    error = _error(lambda: extract_positions(network, _probe(models.texts(N)), device=CPU))
    assert error.kind == "head-not-found"
    assert error.members["difference"] > 0.01


def test_what_is_no_sequence_for_the_network_is_refused(tmp_path: Path) -> None:
    """More tokens than positions, ids beyond the embedding, one token, one next token, labels out of range."""
    network = _loaded(models.saved_language_model("Llama", tmp_path))
    long = torch.arange(42).view(2, 21) % 40 + 4
    error = _error(lambda: extract_positions(network, _probe({"input_ids": long}), device=CPU))
    assert (error.kind, error.members["n_tokens"], error.members["n_positions"]) == ("inputs-refused", 21, 20)
    beyond = torch.tensor([[70, 4, 5], [4, 5, 6]])
    error = _error(lambda: extract_positions(network, _probe({"input_ids": beyond}), device=CPU))
    assert (error.kind, error.members["rows"]) == ("inputs-refused", 50)
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    for batch, given, words in (
        ({"input_ids": ids[:, :1]}, None, "has a next token"),
        ({"input_ids": ids, "attention_mask": torch.eye(2, 3).long()}, None, "has a next token"),
        ({"input_ids": torch.full((3, 4), 7)}, None, "followed by the token 7"),
        ({"input_ids": ids * 8}, None, "run from 40 to 72"),
        ({"input_ids": ids}, ids - 8, "run from -3 to 1"),
        ({"input_ids": ids}, ids[:, :2], "labels of tokens"),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, None, "takes input_ids"),
    ):
        error = _error(partial(_probe, batch, given))
        assert error.kind == "invalid-probe"
        assert words in error.detail
    nothing = Probe({"input_ids": ids}, torch.full((2, 3), IGNORED), None, VOCABULARY, None)
    assert _error(lambda: extract_positions(network, nothing, device=CPU)).kind == "invalid-probe"


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected results are discarded, and collected again."""
    network, batch = _loaded(models.saved_language_model("GPT2", tmp_path)), models.texts(N)
    whole, _ = extract_positions(network, _probe(batch), device=CPU)
    forward = network.module.forward

    def small(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("not enough memory")
        return forward(**inputs)

    monkeypatch.setattr(network.module, "forward", small)
    found, size = extract_positions(network, _probe(batch), device=CPU, batch_size=8)
    assert size == 2
    torch.testing.assert_close(found.features, whole.features)


def test_bfloat16_is_the_same_but_for_rounding(tmp_path: Path) -> None:
    """The forward pass runs under autocast; the checks have its tolerance."""
    network, batch = _loaded(models.saved_language_model("Llama", tmp_path)), models.texts(N)
    wide, narrow = (
        evaluate_network(network, _probe(batch), device=CPU, options=EvaluationOptions(0, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert narrow.splits["all"].loss != wide.splits["all"].loss
    assert narrow.splits["all"].loss == pytest.approx(wide.splits["all"].loss, rel=0.05)


def test_the_service_tells_language_models_by_the_same_names() -> None:
    """Without torch, from the description."""
    assert architectures.CAUSAL_LM.pattern == CAUSAL_LM.pattern
    assert labels._POSITIONS == texts._POSITIONS
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        config = {"model_type": "any", "architectures": [name]}
        assert architectures.is_causal_lm({"family": "transformers", "config": config})
    for name in ("GPT2ForSequenceClassification", "Gemma3ForConditionalGeneration"):
        config = {"model_type": "any", "architectures": [name]}
        assert not architectures.is_causal_lm({"family": "transformers", "config": config})
    assert not architectures.is_causal_lm({"family": "timm", "name": "resnet18", "args": {}})

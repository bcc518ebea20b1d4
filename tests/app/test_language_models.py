"""Causal language models over HTTP, analysed by a real worker: each position with a next token is a sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.analysis import models
from tests.analysis.models import LANGUAGE_MODELS, PAD, TEXT_MODELS, Saved
from tests.app.api.test_uploads import problem
from tests.app.test_text_probes import TEXTS, tokenizer
from tests.datafiles import parquet
from tests.services import Service

N, VOCABULARY = 24, 50
SPLIT = torch.arange(N) % 2
FAST = {"null_permutations": 0}


def _posted(service: Service, collection: str, spec: dict[str, Any], file: bytes | Path) -> dict[str, Any]:
    response = service.post(f"/v1/{collection}", {"name": "language", **spec}, file)
    assert response.status_code == 201, response.text
    return dict(response.json())


def _checkpoint(service: Service, saved: Saved, **spec: Any) -> dict[str, Any]:
    return _posted(service, "checkpoints", {"architecture": saved.architecture, **spec}, saved.path)


def _tensors(service: Service, **tensors: Tensor) -> dict[str, Any]:
    return _posted(service, "probes", {}, save(tensors))


def _ended(service: Service, checkpoint: dict[str, Any], probe: dict[str, Any], **options: Any) -> dict[str, Any]:
    options = {**FAST, **options}
    return service.wait(service.analyze(checkpoint_id=checkpoint["id"], probe_id=probe["id"], options=options)["id"])


def _report(service: Service, checkpoint: dict[str, Any], probe: dict[str, Any], **options: Any) -> dict[str, Any]:
    return service.report(_ended(service, checkpoint, probe, **options))


def _asked(service: Service, checkpoint: dict[str, Any], probe: dict[str, Any]) -> Any:
    body = {"kind": "evaluation", "checkpoint_id": checkpoint["id"], "probe_id": probe["id"], "options": FAST}
    return service.client.post("/v1/analyses", json=body)


def _expected(saved: Saved, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Return loss, accuracy and tokens by the library's own forward pass."""
    logits, mask = saved.library(batch), batch["attention_mask"].bool()
    kept, following = mask[:, :-1] & mask[:, 1:], batch["input_ids"][:, 1:]
    chosen, targets = logits[:, :-1][kept].double(), following[kept]
    return {
        "loss": float(torch.nn.functional.cross_entropy(chosen, targets)),
        "accuracy": float((chosen.argmax(dim=1) == targets).double().mean()),
        "n": len(targets),
        "token_ids": sorted(set(targets.tolist())),
        "counts": torch.unique(targets, return_counts=True)[1].tolist(),
    }


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_tensors_without_labels(service: Service, tmp_path: Path, name: str) -> None:
    """Input ids and mask are enough; numbers are the library's; the report gives the vocabulary and the used part."""
    saved, batch = models.saved_language_model(name, tmp_path), models.texts(N)
    probe = _tensors(service, **batch, split=SPLIT)
    assert (probe["n_classes"], probe["class_counts"], probe["input_shape"]) == (0, [], [10])
    report = _report(service, _checkpoint(service, saved), probe)
    expected, measured, about = _expected(saved, batch), report["splits"]["all"], report["probe"]["next_tokens"]
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert measured["accuracy"] == pytest.approx(expected["accuracy"])
    assert (measured["n_samples"], measured["class_counts"]) == (expected["n"], expected["counts"])
    assert report["subject"]["n_classes"] == about["n_vocabulary"] == VOCABULARY
    assert about["token_ids"] == expected["token_ids"]
    assert measured["collapse"]["absent_classes"] == VOCABULARY - len(expected["token_ids"])
    assert about["n_positions"] == {key: split["n_samples"] for key, split in report["splits"].items()}
    assert about["n_sequences"] == {"all": N, "train": N // 2, "test": N // 2}
    assert (about["ignored_labels"], report["probe"]["label_map"]) == (False, None)
    assert measured["interplay"]["sample"]["global"]["mir"] is not None


def test_labels_of_tokens_leave_positions_out(service: Service, tmp_path: Path) -> None:
    """Labels follow the convention of transformers, -100 for positions to leave out; features are cached."""
    saved, batch = models.saved_language_model("Llama, tied", tmp_path), models.texts(N)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    checkpoint, probe = _checkpoint(service, saved), _tensors(service, **batch, labels=labels)
    first = _report(service, checkpoint, probe)
    logits = saved.library(batch)[:, :-1].flatten(0, 1).double()
    loss = float(torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100))
    assert first["splits"]["all"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["splits"]["all"]["n_samples"] == int((labels[:, 1:] != -100).sum())
    about = first["probe"]["next_tokens"]
    assert about["n_sequences"]["all"] == int((labels[:, 1:] != -100).any(dim=1).sum()) < N
    again = _report(service, checkpoint, probe, tolerance=1e-3)
    assert (first["provenance"]["features_reused"], again["provenance"]["features_reused"]) == (False, True)
    assert (again["splits"]["all"]["loss"], again["probe"]) == (first["splits"]["all"]["loss"], first["probe"])
    assert again["splits"]["all"]["collapse"] == first["splits"]["all"]["collapse"]
    assert again["subject"] == first["subject"]


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_texts_without_labels(service: Service, tmp_path: Path, format: str) -> None:
    """A column of texts alone is tokenised by the probe's tokenizer or the checkpoint's."""
    content = {
        "csv": "\n".join(["text", *TEXTS]).encode(),
        "jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS).encode(),
        "parquet": parquet({"text": TEXTS}),
    }[format]
    saved = models.saved_language_model("GPT2", tmp_path)
    brings, spec = ({}, {"tokenizer": tokenizer()}) if format == "csv" else ({"tokenizer": tokenizer()}, {})
    probe = _posted(service, "probes", spec, content)
    assert (probe["format"], probe["n_samples"], probe["n_classes"]) == (format, len(TEXTS), 0)
    assert probe["columns"] == {"text": "text", "label": None}
    report = _report(service, _checkpoint(service, saved, **brings), probe)
    batch = _tokenised(TEXTS)
    assert report["splits"]["all"]["loss"] == pytest.approx(_expected(saved, batch)["loss"], rel=1e-5)
    assert report["probe"]["next_tokens"]["token_ids"] == _expected(saved, batch)["token_ids"]
    assert report["probe"]["tokenizer"]["source"] == ("probe" if format == "csv" else "checkpoint")


def _tokenised(texts: list[str]) -> dict[str, Tensor]:
    """Tokenise as the tokenizer of these tests does: <s>, words, </s>, padding."""
    rows = [[0, *(4 + int(word[1:]) for word in text.split()), 2] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_a_network_without_padding(service: Service, tmp_path: Path) -> None:
    """Without a padding token in network and tokenizer, as in GPT-2, texts of any length go in a batch."""
    saved = models.saved_language_model("GPT2", tmp_path)
    config = {key: value for key, value in saved.architecture["config"].items() if key != "pad_token_id"}
    definition = tokenizer()
    definition["model"]["vocab"]["w40"] = definition["model"]["vocab"].pop("<pad>")
    bare = Saved({"family": "transformers", "config": config}, saved.path, saved.library)
    probe = _posted(service, "probes", {"tokenizer": definition}, parquet({"text": TEXTS}))
    report = _report(service, _checkpoint(service, bare), probe)
    assert report["splits"]["all"]["loss"] == pytest.approx(_expected(saved, _tokenised(TEXTS))["loss"], rel=1e-5)
    assert report["probe"]["tokenizer"]["pad_id"] == 0
    assert report["provenance"]["batch_size"] == len(TEXTS)


def test_labels_of_whole_texts_take_no_part(service: Service, tmp_path: Path) -> None:
    """A probe for classifiers works for a language model too, with or without id2label, and the report says so."""
    saved = models.saved_language_model("GPT2", tmp_path)
    named = Saved(
        {"family": "transformers", "config": {**saved.architecture["config"], "id2label": {"0": "other"}}},
        saved.path,
        saved.library,
    )
    content = parquet({"text": TEXTS, "label": ["calm", "wild"] * 12})
    probe = _posted(service, "probes", {"tokenizer": tokenizer()}, content)
    report = _report(service, _checkpoint(service, named), probe)
    page = service.client.get(f"/reports/{report['id']}")
    assert f"token {report['probe']['next_tokens']['token_ids'][0]}" in page.text
    assert service.client.get(f"/v1/reports/{report['id']}/charts/confusion.svg").status_code == 200
    assert report["splits"]["all"]["loss"] == pytest.approx(_expected(saved, _tokenised(TEXTS))["loss"], rel=1e-5)
    assert report["probe"]["next_tokens"]["ignored_labels"] is True
    tensors = _tensors(service, **models.texts(N), labels=torch.arange(N) % 4)
    assert _report(service, _checkpoint(service, saved), tensors)["probe"]["next_tokens"]["ignored_labels"] is True


def test_a_part_of_the_sequences(service: Service, tmp_path: Path) -> None:
    """Sequences are drawn, from each split in proportion; the same seed draws the same, of tensors and texts alike."""
    saved = models.saved_language_model("GPT2", tmp_path)
    checkpoint, tensors = _checkpoint(service, saved), _tensors(service, **models.texts(N), split=SPLIT)
    texts = _posted(service, "probes", {"tokenizer": tokenizer()}, parquet({"text": TEXTS, "split": SPLIT.tolist()}))
    for probe in (tensors, texts):
        reports = [_report(service, checkpoint, probe, samples=8, seed=seed, tolerance=0.01) for seed in (1, 1, 2)]
        assert reports[0]["probe"]["samples"] == {"used": 8, "of": N, "seed": 1}
        assert reports[0]["probe"]["next_tokens"]["n_sequences"] == {"all": 8, "train": 4, "test": 4}
        losses = [report["splits"]["all"]["loss"] for report in reports]
        assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_what_varies(service: Service, tmp_path: Path) -> None:
    """A path, aligned or not, a pruning and a series work for networks with tied embeddings."""
    first = models.saved_language_model("GPT2", tmp_path / "0")
    second = models.saved_language_model("GPT2", tmp_path / "1", change=_changed)
    ids = [_checkpoint(service, saved)["id"] for saved in (first, second)]
    batch = models.texts(N)
    probe_id = _tensors(service, **batch)["id"]
    ends = [_expected(saved, batch)["loss"] for saved in (first, second)]
    path = {"kind": "path", "checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1]}
    series = {"kind": "series", "checkpoint_ids": ids, "axis": {"name": "step", "values": [0, 1]}}
    pruning = {"kind": "pruning", "checkpoint_id": ids[0]}
    sparsities = {"sparsities": [0.0, 0.5], "include_head": True}
    for body, options, losses in (
        (path, {"grid": {"points": 3}}, [ends[0], None, ends[1]]),
        (path, {"grid": {"points": 2}, "alignment": "weight_matching"}, ends),
        (series, {}, ends),
        (pruning, sparsities, [ends[0], None]),
    ):
        answer = service.client.post(
            "/v1/analyses", json={**body, "probe_id": probe_id, "options": {**FAST, **options}}
        )
        assert answer.status_code == 202, answer.text
        report = service.report(service.wait(answer.json()["id"]))
        found = [point["splits"]["all"]["loss"] for point in report["points"]]
        for value, loss in zip(found, losses, strict=True):
            assert loss is None or value == pytest.approx(loss, rel=1e-4)
        assert report["probe"]["next_tokens"]["n_vocabulary"] == VOCABULARY


@pytest.mark.parametrize("interval", ["delta", "bootstrap"])
def test_two_language_models_are_compared(service: Service, tmp_path: Path, interval: str) -> None:
    """Each side equals the library's results, and differences have standard errors."""
    first = models.saved_language_model("GPT2", tmp_path / "0")
    second = models.saved_language_model("GPT2", tmp_path / "1", change=_changed)
    ids = [_checkpoint(service, saved)["id"] for saved in (first, second)]
    batch = models.texts(N)
    probe_id = _tensors(service, **batch)["id"]
    request = {"kind": "comparison", "checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "probe_id": probe_id}
    options = {**FAST, "interval": interval, "resamples": 20}
    report = service.report(service.wait(service.analyze(**request, options=options)["id"]))
    split = report["splits"]["all"]
    for side, saved in (("a", first), ("b", second)):
        expected = _expected(saved, batch)
        assert split[side]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert split[side]["n_samples"] == expected["n"]
        assert split["differences"]["accuracy"][side] == pytest.approx(expected["accuracy"])
    assert split["differences"]["loss"]["standard_error"] > 0
    counts = split["predictions"]
    assert sum(counts[name] for name in counts if name.endswith("correct")) == split["a"]["n_samples"]
    assert counts["both_correct"] / split["a"]["n_samples"] <= counts["agreement"] <= 1
    assert report["probe"]["next_tokens"] == report["probe_b"]["next_tokens"]


def test_other_classes_are_not_compared(service: Service, tmp_path: Path) -> None:
    """A language model and a classifier are not compared: their samples differ."""
    language = _checkpoint(service, models.saved_language_model("GPT2", tmp_path / "language"))
    classifier = _checkpoint(service, models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], tmp_path / "classifier"))
    probe = _tensors(service, **models.texts(N), labels=torch.arange(N) % 4)
    ids = {"checkpoint_a_id": language["id"], "checkpoint_b_id": classifier["id"], "probe_id": probe["id"]}
    ended = service.wait(service.analyze(kind="comparison", **ids, options={**FAST, "batch_size": 1})["id"])
    assert ended["status"] == "failed"
    assert "same samples" in ended["problem"]["detail"]


def _changed(model: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_probes_that_do_not_suit_are_refused_when_asked_for(service: Service, tmp_path: Path) -> None:
    """A classifier without labels, and images or too many tokens for a language model, are refused before queueing."""
    language = _checkpoint(service, models.saved_language_model("Llama", tmp_path / "language"))
    classifier = _checkpoint(service, models.saved_transformers("GPT2", TEXT_MODELS["GPT2"], tmp_path / "classifier"))
    ids = _tensors(service, **models.texts(N))
    texts = _posted(service, "probes", {"tokenizer": tokenizer()}, parquet({"text": TEXTS}))
    for probe in (ids, texts):
        assert (
            "needs a probe with labels"
            in problem(_asked(service, classifier, probe), 422, "probe-unsuitable")["detail"]
        )
    images = _tensors(service, **models.images(N), labels=torch.arange(N) % 4)
    detail = problem(_asked(service, language, images), 422, "probe-unsuitable")["detail"]
    assert "[3, 32, 32]" in detail
    long = _tensors(service, input_ids=torch.arange(N * 21).view(N, 21) % 40)
    told = problem(_asked(service, language, long), 422, "probe-unsuitable")
    assert (told["n_tokens"], told["n_positions"]) == (21, 20)


@pytest.mark.slow
def test_what_only_the_worker_sees_fails_with_words(service: Service, tmp_path: Path) -> None:
    """Ids or labels out of the vocabulary, too long texts, texts of one token and plain inputs fail with a reason."""
    checkpoint = _checkpoint(service, models.saved_language_model("Llama", tmp_path))
    ids = torch.arange(N * 5).view(N, 5)
    word = tokenizer()
    word["post_processor"] = None
    for probe, kind, words in (
        (_tensors(service, input_ids=ids), "invalid-probe", "must be 0 to 49"),
        (_tensors(service, input_ids=ids % 50, labels=ids), "invalid-probe", "must be 0 to 49"),
        (_tensors(service, input_ids=ids % 50, labels=torch.full((N, 5), -100)), "invalid-probe", "has a next token"),
        (_tensors(service, inputs=ids % 50, labels=torch.arange(N) % 4), "invalid-probe", "takes input_ids"),
        (
            _posted(
                service, "probes", {"tokenizer": tokenizer(), "max_length": 30}, parquet({"text": ["w1 " * 30] * 3})
            ),
            "inputs-refused",
            "positions for 20",
        ),
        (
            _posted(service, "probes", {"tokenizer": word}, parquet({"text": ["w1", "w2"]})),
            "invalid-probe",
            "has a next token",
        ),
    ):
        ended = _ended(service, checkpoint, probe)
        assert ended["status"] == "failed", ended
        assert ended["problem"]["type"] == f"urn:interplay:problem:{kind}"
        assert words in ended["problem"]["detail"]


@pytest.mark.parametrize(
    ("tensors", "spec", "kind", "word"),
    [
        ({"input_ids": torch.ones(4, 1, dtype=torch.int64)}, {}, "invalid-file", "next one"),
        ({"input_ids": torch.ones(4, 3, 3, dtype=torch.int64)}, {}, "invalid-file", "(N, T)"),
        ({"inputs": torch.zeros(4, 3)}, {}, "invalid-file", "'labels'"),
        ({"pixel_values": torch.zeros(4, 3, 4, 4)}, {}, "invalid-file", "'labels'"),
        ({**models.texts(4), "labels": torch.zeros(4, 9, dtype=torch.int64)}, {}, "invalid-file", "'labels'"),
        ({**models.texts(4), "labels": torch.zeros(4, 10)}, {}, "invalid-file", "F32"),
        (models.texts(4), {"class_names": ["a", "b"]}, "invalid-request", "class_names"),
    ],
)
def test_uploads_that_cannot_have_next_tokens_are_refused(
    service: Service, tensors: dict[str, Tensor], spec: dict[str, Any], kind: str, word: str
) -> None:
    """A single token, other dimensions, inputs that need labels, labels of another shape or type, names are refused."""
    answer = service.post("/v1/probes", {"name": "a", **spec}, save(tensors))
    assert word in problem(answer, 422, kind)["detail"]


def test_class_names_of_texts_without_labels_are_refused(service: Service) -> None:
    """Class names of texts without labels are refused: they name nothing."""
    answer = service.post("/v1/probes", {"name": "a", "class_names": ["a", "b"]}, parquet({"text": TEXTS}))
    problem(answer, 422, "invalid-request")


def _llama(service: Service, seed: int, **changed: Any) -> dict[str, Any]:
    """Return a small Llama with these changes to its config; None removes a member."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    network = transformers.LlamaForCausalLM(config)
    described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], **changed}
    architecture = {
        "family": "transformers",
        "config": {name: value for name, value in described.items() if value is not None or name not in changed},
    }
    return _posted(service, "checkpoints", {"architecture": architecture}, save(network.state_dict()))


def test_a_path_needs_one_network_and_not_one_config(service: Service) -> None:
    """Configs may differ without effect on an evaluation; others are refused by name, at once or by the worker."""
    probe = _tensors(service, input_ids=torch.randint(3, 40, (12, 10), generator=torch.Generator().manual_seed(0)))
    first = _llama(service, 0)

    def asked(other: dict[str, Any]) -> Any:
        body = {"kind": "path", "checkpoint_a_id": first["id"], "checkpoint_b_id": other["id"], "probe_id": probe["id"]}
        return service.client.post("/v1/analyses", json={**body, "options": {**FAST, "grid": {"values": [0.5]}}})

    unseen = _llama(
        service, 1, attention_dropout=0.1, eos_token_id=6, initializer_range=0.01, max_position_embeddings=64,
        task_specific_params={"a": 1}, rms_norm_eps=None,
    )  # fmt: skip
    report = service.report(service.wait(asked(unseen).json()["id"]))
    assert [point["w"] for point in report["points"]] == [0, 0.5, 1]
    refused = problem(asked(_llama(service, 1, rms_norm_eps=1e-5)), 422, "architectures-differ")
    assert [one["member"] for one in refused["differing"]] == ["architecture.config.rms_norm_eps"]
    # From the two descriptions alone a different network is not certain; the built networks decide.
    other = _llama(service, 1, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attention_dropout=0.1)
    failed = service.wait(asked(other).json()["id"])["problem"]
    assert failed["type"].endswith(":architectures-differ")
    [one] = failed["differing"]
    assert (one["checkpoint_id"], one["member"]) == (
        other["id"],
        "architecture.config.rope_parameters.rope_theta",
    )
    assert "rope_theta is 500.0" in failed["detail"]

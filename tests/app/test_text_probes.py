"""Probes of texts over HTTP, tokenised by a real worker: network inputs equal those of the network's own library."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.analysis import models
from tests.analysis.models import N_CLASSES, PAD, TEXT_MODELS, Saved
from tests.app.api.test_uploads import blobs, problem
from tests.datafiles import parquet
from tests.services import Service, until

WORDS = [f"w{number}" for number in range(40)]
TEXTS = [" ".join(WORDS[(7 * i + j * j) % 40] for j in range(1 + i % 9)) for i in range(24)]
NAMES = ["calm", "glad", "sad", "wild"]
LABELS = [i % N_CLASSES for i in range(24)]


def tokenizer(extra: int = 0) -> dict[str, Any]:
    """Return a tokenizer.json of 43 words and as many extra ones as requested, which are the last of the vocabulary."""
    vocabulary = {"<s>": 0, "<pad>": PAD, "</s>": 2, "<unk>": 3}
    vocabulary |= {word: 4 + number for number, word in enumerate(WORDS)}
    vocabulary |= {f"x{number}": 44 + number for number in range(extra)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return dict(json.loads(tokenizer.to_str()))


def _csv(texts: list[str] = TEXTS, labels: list[Any] | None = None) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["sentence", "label"], *zip(texts, labels or LABELS, strict=True)])
    return buffer.getvalue().encode()


def _posted(service: Service, collection: str, spec: dict[str, Any], file: bytes | Path) -> dict[str, Any]:
    response = service.post(f"/v1/{collection}", {"name": "texts", **spec}, file)
    assert response.status_code == 201, response.text
    return dict(response.json())


def _ended(service: Service, saved: Saved, probe: dict[str, Any], **spec: Any) -> dict[str, Any]:
    checkpoint = _posted(service, "checkpoints", {"architecture": saved.architecture, **spec}, saved.path)
    options = {"null_permutations": 0}
    analysis = service.analyze(checkpoint_id=checkpoint["id"], probe_id=probe["id"], options=options)
    return service.wait(analysis["id"])


def _loss(saved: Saved, max_length: int) -> float:
    """Return the loss of the library's own pipeline."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer())), pad_token="<pad>", unk_token="<unk>"
    )
    batch = fast(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    logits = saved.library({name: batch[name] for name in ("input_ids", "attention_mask")})
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)))


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_texts_of_csv_with_the_probes_tokenizer(service: Service, tmp_path: Path, name: str) -> None:
    """The loss is that of the library's tokenizer and model, padding and mask included."""
    saved = models.saved_transformers(name, TEXT_MODELS[name], tmp_path)
    probe = _posted(service, "probes", {"tokenizer": tokenizer()}, _csv())
    assert (probe["format"], probe["content"], probe["class_counts"]) == ("csv", "texts", [6] * N_CLASSES)
    report = service.report(_ended(service, saved, probe))
    assert report["splits"]["all"]["loss"] == pytest.approx(_loss(saved, 20), abs=1e-6)
    assert report["probe"]["tokenizer"] == {
        "sha256": probe["tokenizer_sha256"],
        "source": "probe",
        "max_length": 20,
        "pad_id": PAD,
        "n_truncated": 0,
    }


def test_texts_of_parquet_with_the_checkpoints_tokenizer(service: Service, tmp_path: Path) -> None:
    """The checkpoint's tokenizer is used if the probe has none; the probe's length cuts texts; names are matched."""
    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path)
    order = [2, 0, 3, 1]
    config = {**saved.architecture["config"], "id2label": {str(order[i]): NAMES[i] for i in range(N_CLASSES)}}
    named = Saved({"family": "transformers", "config": config}, saved.path, saved.library)
    labels = [NAMES[order.index(label)] for label in LABELS]
    probe = _posted(service, "probes", {"max_length": 6}, parquet({"text": TEXTS, "label": labels}))
    report = service.report(_ended(service, named, probe, tokenizer=tokenizer()))
    assert report["splits"]["all"]["loss"] == pytest.approx(_loss(saved, 6), abs=1e-6)
    assert report["probe"]["label_map"] == {"matched": "name", "reordered": True}
    used = report["probe"]["tokenizer"]
    assert (used["source"], used["max_length"], used["n_truncated"]) == (
        "checkpoint",
        6,
        sum(len(text.split()) > 4 for text in TEXTS),
    )


def test_class_names_give_the_order_or_other_words(service: Service, tmp_path: Path) -> None:
    """A file's names are sorted; a spec gives the order for a network without names, other words for one with them."""
    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path)
    order = ["wild", "calm", "sad", "glad"]
    file = parquet({"text": TEXTS[:-4], "label": [order[label] for label in LABELS[:-4]]})
    ordered = _posted(service, "probes", {"tokenizer": tokenizer(), "class_names": order}, file)
    plain = _posted(service, "probes", {"tokenizer": tokenizer()}, parquet({"text": TEXTS[:-4], "label": LABELS[:-4]}))
    assert (ordered["class_names"], ordered["class_counts"]) == (order, plain["class_counts"])
    reports = [service.report(_ended(service, saved, probe)) for probe in (ordered, plain)]
    assert reports[0]["splits"] == reports[1]["splits"]
    words = [f"very {name}" for name in sorted(order)]
    config = {**saved.architecture["config"], "id2label": {str(i): f"very {name}" for i, name in enumerate(order)}}
    named = Saved({"family": "transformers", "config": config}, saved.path, saved.library)
    renamed = _posted(service, "probes", {"tokenizer": tokenizer(), "class_names": words}, file)
    report = service.report(_ended(service, named, renamed))
    assert report["splits"] == reports[1]["splits"]
    assert report["probe"]["label_map"] == {"matched": "name", "reordered": True}


def _failure(service: Service, saved: Saved, probe: dict[str, Any]) -> dict[str, Any]:
    ended = _ended(service, saved, probe)
    assert ended["status"] == "failed", ended
    return dict(ended["problem"])


def test_texts_that_cannot_be_tokenised_fail(service: Service, tmp_path: Path) -> None:
    """A missing or invalid tokenizer, or ids beyond the embedding (with both numbers), fail the analysis."""
    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path)
    bare = _failure(service, saved, _posted(service, "probes", {}, _csv()))
    assert bare["type"].endswith("invalid-probe")
    assert "tokenizer" in bare["detail"]
    broken = _posted(service, "probes", {"tokenizer": {"model": {"type": "Nonsense"}}}, _csv())
    assert _failure(service, saved, broken)["detail"].startswith("The tokenizer cannot be used")
    beyond = _posted(service, "probes", {"tokenizer": tokenizer(20)}, _csv([*TEXTS[:-1], "w1 x15"]))
    failed = _failure(service, saved, beyond)
    assert failed["type"].endswith("inputs-refused")
    assert failed["rows"] == 50
    assert "59" in failed["detail"]


def test_bad_specs_of_texts_are_refused(service: Service, mlp_checkpoint_file: Path) -> None:
    """A preprocess, a tokenizer without a model or over its size limit, and a spec too large without it are refused."""
    for spec, status, kind in (
        ({"preprocess": {"scale": 2}}, 422, "invalid-request"),
        ({"tokenizer": {"version": "1.0"}}, 422, "invalid-request"),
        ({"tokenizer": {"model": {"vocab": "x" * (33 * 2**20)}}}, 413, "too-large"),
        ({"class_names": ["x" * 200] * 6000, "metadata": {"a": "tokenizer"}}, 413, "too-large"),
    ):
        problem(service.post("/v1/probes", {"name": "a", **spec}, _csv()), status, kind)
    missing = problem(service.post("/v1/probes", {"name": "a"}, b"text,klass\na,b\n"), 422, "invalid-file")
    assert missing["columns"] == ["text", "klass"]
    last = problem(service.post("/v1/probes", {"name": "a"}, b"text,label\na,x\nb,\n"), 422, "invalid-file")
    assert (last["row"], "Row 1" in last["detail"]) == (1, True)


def test_tokenizers_are_blobs_that_probes_and_checkpoints_share(service: Service, tmp_path: Path) -> None:
    """Two rows share one tokenizer file; it goes with the last of them."""
    saved = models.saved_transformers("Bert", TEXT_MODELS["Bert"], tmp_path)
    before = blobs(service)
    definition = tokenizer(7)
    probe = _posted(service, "probes", {"tokenizer": definition}, _csv([*TEXTS[:-1], "w1 w2"]))
    checkpoint = _posted(
        service, "checkpoints", {"architecture": saved.architecture, "tokenizer": definition}, saved.path
    )
    assert probe["tokenizer_sha256"] == checkpoint["tokenizer_sha256"]
    added = {path.name for path in blobs(service) - before}
    assert probe["tokenizer_sha256"] in added
    service.client.delete(f"/v1/probes/{probe['id']}")
    assert probe["tokenizer_sha256"] in {path.name for path in blobs(service)}
    service.client.delete(f"/v1/checkpoints/{checkpoint['id']}")
    assert until(lambda: blobs(service) <= before)

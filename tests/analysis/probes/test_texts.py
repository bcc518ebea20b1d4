"""Texts to tokens: padding, truncation and their sources."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from analysis.errors import AnalysisError
from analysis.probes.texts import tokenise

TEXTS = ["a b c", "b", "c a"]


def _definition(
    padding: dict[str, Any] | None = None, pad_token: str | None = "[PAD]", max_length: int | None = None
) -> str:
    vocabulary = {word: number for number, word in enumerate([pad_token or "zero", "[UNK]", "a", "b", "c"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if padding is not None:
        tokenizer.enable_padding(**padding)
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    return str(tokenizer.to_str())


def _framed(max_length: int | None = None, special_tokens: Sequence[str] = ("[CLS]", "[SEP]")) -> str:
    """Return a tokenizer that adds two tokens to each text, with or without ids for them."""
    definition = json.loads(_definition(max_length=max_length))
    frame = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [frame[0], {"Sequence": {"id": "A", "type_id": 0}}, frame[1]],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [1], "tokens": [name]} for name in special_tokens},
    }
    return json.dumps(definition)


def test_ids_mask_and_padding() -> None:
    """Padded on the right to the longest text; the mask is 1 for tokens."""
    tokens = tokenise(TEXTS, _definition())
    assert tokens.input_ids.tolist() == [[2, 3, 4], [3, 0, 0], [4, 2, 0]]
    assert tokens.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert (tokens.max_length, tokens.pad_id, tokens.n_truncated) == (512, 0, 0)


def test_padding_on_the_left() -> None:
    """If the tokenizer says so, with its own id."""
    tokens = tokenise(TEXTS, _definition({"direction": "left", "pad_id": 1}))
    assert tokens.input_ids.tolist() == [[2, 3, 4], [1, 1, 3], [1, 4, 2]]
    assert tokens.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("asked", "truncation", "config", "expected"),
    [
        (2, 1, {"max_position_embeddings": 1}, 2),
        (None, 1, {"max_position_embeddings": 2}, 1),
        (None, None, {"max_position_embeddings": 2}, 2),
        (None, None, {"n_positions": 2}, 2),
        (None, None, {"max_position_embeddings": 10_000}, 512),
    ],
)
def test_who_says_how_much_is_kept(
    asked: int | None, truncation: int | None, config: dict[str, int], expected: int
) -> None:
    """The probe, then the tokenizer, then the network's positions, at most 512."""
    tokens = tokenise(TEXTS, _definition(max_length=truncation), max_length=asked, config=config)
    assert tokens.max_length == expected
    assert tokens.input_ids.shape[1] == min(expected, 3)
    assert tokens.n_truncated == sum(len(text.split()) > expected for text in TEXTS)


def test_the_networks_padding_comes_first() -> None:
    """A network that searches its last token searches its own padding."""
    tokens = tokenise(TEXTS, _definition({"pad_id": 1}), config={"pad_token_id": 4})
    assert (tokens.pad_id, tokens.input_ids[1].tolist()) == (4, [3, 4, 4])


def test_texts_of_one_length_need_no_padding() -> None:
    """A padding token may be missing if nothing is padded."""
    tokens = tokenise(["a b", "c c"], _definition(pad_token=None))
    assert tokens.pad_id is None
    assert torch.equal(tokens.attention_mask, torch.ones(2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("texts", "definition", "word"),
    [
        (TEXTS, _framed(max_length=2), "At most 2 tokens of a text are kept, and 2 special"),
        (TEXTS, _framed(special_tokens=()), "cannot be used"),
        (TEXTS, _definition(pad_token=None), "pads them"),
        (TEXTS, json.dumps({"model": {"type": "WordLevel"}}), "cannot be used"),
        (TEXTS, "{", "cannot be used"),
        (["a", "  "], _definition(), "number 1"),
        ([], _definition(), "no texts"),
    ],
)
def test_what_cannot_be_tokenised(texts: list[str], definition: str, word: str) -> None:
    """No padding, no tokenizer, one that panics, a text without tokens or without room, no texts."""
    with pytest.raises(AnalysisError) as raised:
        tokenise(texts, definition)
    assert raised.value.kind == "invalid-probe"
    assert word in raised.value.detail


def test_any_padding_where_nobody_sees_it() -> None:
    """Without a padding token 0 pads, on request; a known token comes first, and -1 counts as none."""
    definition = _definition(pad_token=None)
    assert tokenise(TEXTS, definition, any_padding=True).pad_id == 0
    assert tokenise(TEXTS, definition, config={"pad_token_id": -1}, any_padding=True).pad_id == 0
    assert tokenise(TEXTS, definition, config={"pad_token_id": 4}, any_padding=True).pad_id == 4

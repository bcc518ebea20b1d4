"""Texts as input of a text network: token ids, and a mask that excludes padding."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int32, UInt8
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import AnalysisError

#: Tokens kept of a text where neither the probe nor the tokenizer nor the network sets a length.
DEFAULT_MAX_LENGTH = 512

# Usual names of the padding token, for tokenizers whose file does not name it.
_PADDING_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<PAD>")
# Names of the number of positions in networks' configurations.
_POSITIONS = ("max_position_embeddings", "n_positions")
_TEXTS_AT_A_TIME = 1024
# Most tokens held in memory, padding included; id and mask take five bytes each.
_MOST_TOKENS = 2**31


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, padded to the longest of them.

    Attributes:
        input_ids: of the tokens, and of padding.
        attention_mask: 1 for tokens, 0 for padding.
        max_length: the most tokens kept of a text.
        pad_id: None where nothing had to be padded.
        n_truncated: number of texts that were truncated.
    """

    input_ids: Int32[Tensor, "n t"]
    attention_mask: UInt8[Tensor, "n t"]
    max_length: int
    pad_id: int | None
    n_truncated: int


def tokenise(
    texts: Iterable[str],
    definition: str,
    *,
    max_length: int | None = None,
    config: Mapping[str, Any] | None = None,
    any_padding: bool = False,
) -> Tokens:
    """Tokenise texts with the special tokens that the tokenizer adds, truncated and padded on one side.

    Args:
        texts: in order, at least one.
        definition: content of a tokenizer.json.
        max_length: most tokens kept of a text. Default: the tokenizer's own limit, else 512 or the network's
            positions, whichever is less.
        config: of the network; its `pad_token_id` comes first, then the tokenizer's padding, then the usual names.
        any_padding: whether token 0 may pad where no padding token is known, as for causal language models, many of
            which have none: masked positions are not samples, and no sample sees them.

    Returns:
        Ids and masks; padding is on the right unless the tokenizer says left.

    Raises:
        AnalysisError: `invalid-probe` where the tokenizer cannot be built or refuses a text, where texts differ in
            length and no padding token is known, or where they have more than 2^31 tokens.
    """
    config = config or {}
    try:
        tokenizer = Tokenizer.from_str(definition)
        padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
        tokenizer.no_padding()
        length = max_length or truncation.get("max_length") or _default_length(config)
        added = tokenizer.num_special_tokens_to_add(is_pair=False)
        if length <= added:
            raise AnalysisError(
                "invalid-probe",
                f"At most {length} tokens of a text are kept, and {added} special tokens added: nothing is left of it.",
            )
        tokenizer.enable_truncation(length, direction=truncation.get("direction", "right"))
        ids, n_truncated = _encode(tokenizer, texts)
    except AnalysisError:
        raise
    except BaseException as error:
        # The library raises plain Exception, and for a panic a BaseException that is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise AnalysisError("invalid-probe", f"The tokenizer cannot be used: {reason}.") from error
    shortest, longest = min(map(len, ids)), max(map(len, ids))
    if len(ids) * longest > _MOST_TOKENS:
        raise AnalysisError(
            "invalid-probe",
            f"{len(ids)} texts padded to {longest} tokens do not fit the limit of {_MOST_TOKENS} tokens; "
            "options.samples takes fewer texts.",
        )
    pad_id = _pad_id(tokenizer, padding, config, any_padding) if shortest < longest else None
    return Tokens(*_padded(ids, longest, pad_id or 0, padding.get("direction")), length, pad_id, n_truncated)


def _padded(
    ids: Sequence[npt.NDArray[np.int32]], longest: int, pad_id: int, direction: str | None
) -> tuple[Int32[Tensor, "n t"], UInt8[Tensor, "n t"]]:
    """Return ids and mask of texts, padded to the length `longest`, on the right unless `direction` is "left"."""
    input_ids = np.full((len(ids), longest), pad_id, np.int32)
    attention_mask = np.zeros((len(ids), longest), np.uint8)
    for row, tokens in enumerate(ids):
        place = slice(longest - len(tokens), longest) if direction == "left" else slice(0, len(tokens))
        input_ids[row, place], attention_mask[row, place] = tokens, 1
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[list[npt.NDArray[np.int32]], int]:
    ids: list[npt.NDArray[np.int32]] = []
    n_truncated, remaining = 0, iter(texts)
    while chunk := list(islice(remaining, _TEXTS_AT_A_TIME)):
        for encoding in tokenizer.encode_batch(chunk):
            if not encoding.ids:
                raise AnalysisError("invalid-probe", f"The tokenizer returns no token for text number {len(ids)}.")
            n_truncated += bool(encoding.overflowing)
            ids.append(np.array(encoding.ids, np.int32))
    if not ids:
        raise AnalysisError("invalid-probe", "There are no texts.")
    return ids, n_truncated


def _default_length(config: Mapping[str, Any]) -> int:
    positions: list[int] = [config[name] for name in _POSITIONS if isinstance(config.get(name), int)]
    return min([DEFAULT_MAX_LENGTH, *positions])


def _pad_id(tokenizer: Tokenizer, padding: Mapping[str, Any], config: Mapping[str, Any], any_padding: bool) -> int:
    # Some configurations use -1 for no padding token.
    if isinstance(config.get("pad_token_id"), int) and config["pad_token_id"] >= 0:
        return int(config["pad_token_id"])
    if "pad_id" in padding:
        return int(padding["pad_id"])
    for token in _PADDING_TOKENS:
        if (number := tokenizer.token_to_id(token)) is not None:
            return int(number)
    if any_padding:
        return 0
    raise AnalysisError(
        "invalid-probe",
        "Texts differ in length, and neither the network's config (pad_token_id) nor the tokenizer (padding, or a "
        f"token named {', '.join(_PADDING_TOKENS)}) defines the token that pads them.",
    )

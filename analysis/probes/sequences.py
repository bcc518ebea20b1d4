"""Labels of sequences of tokens for a causal language model: at each position the token that follows."""

from collections.abc import Mapping

import torch
from jaxtyping import Int32, Integer, Shaped
from torch import Tensor

from ..errors import AnalysisError

#: The label of a position that is not a sample, as in transformers.
IGNORED = -100


def labels_of_tokens(
    inputs: Mapping[str, Shaped[Tensor, "..."]], given: Shaped[Tensor, "..."] | None, *, n_vocabulary: int
) -> Int32[Tensor, "n t"]:
    """Return `next_token_labels` of a probe's tensors.

    Args:
        inputs: by name, including `input_ids` (n, t).
        given: the file's labels; (n, t), or (n,) of whole sequences, which are ignored.
        n_vocabulary: number of tokens of the network.

    Raises:
        AnalysisError: `invalid-probe` for other inputs, for labels of another shape, and as `next_token_labels`.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2:
        held = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise AnalysisError("invalid-probe", f"A causal language model takes input_ids (N, T); the probe has {held}.")
    if given is not None and given.ndim == 1:
        given = None
    if given is not None and (given.shape != ids.shape or given.is_floating_point()):
        raise AnalysisError(
            "invalid-probe",
            f"labels of tokens must be integers {list(ids.shape)} as input_ids, not {given.dtype} {list(given.shape)}.",
        )
    return next_token_labels(ids, inputs.get("attention_mask"), given, n_vocabulary=n_vocabulary)


def next_token_labels(
    input_ids: Integer[Tensor, "n t"],
    attention_mask: Shaped[Tensor, "n t"] | None,
    given: Integer[Tensor, "n t"] | None = None,
    *,
    n_vocabulary: int,
) -> Int32[Tensor, "n t"]:
    """Return for each position the token that follows it, or IGNORED where none follows.

    Args:
        input_ids: sequences.
        attention_mask: 0 for padding; a padded position, or one followed by padding, has no next token.
        given: labels in the convention of transformers, each at the position of its own token; a position followed by
            IGNORED is not a sample. Default: the tokens themselves.
        n_vocabulary: number of tokens of the network.

    Raises:
        AnalysisError: `invalid-probe` where labels are out of the vocabulary, no position has a next token, or all
            positions have the same.

    >>> next_token_labels(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]]), n_vocabulary=8)
    tensor([[   6,    7, -100, -100]], dtype=torch.int32)
    """
    following = (input_ids if given is None else given)[:, 1:]
    real = torch.ones(input_ids.shape, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    kept = real[:, :-1] & real[:, 1:] & (following != IGNORED)
    tokens = following[kept]
    if len(tokens) == 0:
        raise AnalysisError(
            "invalid-probe",
            f"No position of the {len(input_ids)} sequences has a next token: each has one token, only padding after, "
            "or no label.",
        )
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= n_vocabulary:
        raise AnalysisError(
            "invalid-probe",
            f"The tokens to predict run from {lowest} to {highest}; with the network's vocabulary of {n_vocabulary} "
            f"they must be 0 to {n_vocabulary - 1}, or {IGNORED} in labels for positions without a prediction.",
            n_vocabulary=n_vocabulary,
            lowest_label=lowest,
            highest_label=highest,
        )
    if lowest == highest:
        raise AnalysisError(
            "invalid-probe",
            f"All {len(tokens)} positions are followed by the token {lowest}; there must be at least two classes.",
        )
    labels = torch.full(input_ids.shape, IGNORED, dtype=torch.int32)
    labels[:, :-1][kept] = tokens.int()
    return labels

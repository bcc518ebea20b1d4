"""One pass of a causal language model over sequences: each position that has a next token is a sample.

Its feature is the input of the output embedding there, its label the token that follows. Logits of all positions over
a whole vocabulary are never held: for each batch only the predictions are kept, and features x head + bias are checked
against the logits before these are freed.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from ..errors import AnalysisError
from ..measures.entropy import check_finite
from ..measures.predictions import Predictions, predictions_of, rows_at_a_time
from ..networks.loading import LoadedNetwork
from ..probes.feature_set import FeatureSet, Vocabulary
from ..probes.inputs import Inputs
from ..probes.probe import Probe
from ..probes.sequences import IGNORED
from . import scratch
from .extraction import (
    Passed,
    PassOptions,
    Progress,
    check_identity,
    forward,
    gives_as_it_is,
    not_the_head,
    pass_over,
)
from .precision import Precision

# Tolerance, as a share of the largest logit, for logits of one position in two passes that differ only in later tokens.
_SAME_PAST = {"float32": 1e-4, "bfloat16": 2e-2}


def extract_positions(
    network: LoadedNetwork,
    probe: Probe,
    *,
    device: torch.device,
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> tuple[FeatureSet, int]:
    """Return the output embedding's inputs at every position with a next token, and the network's predictions there.

    Args:
        network: a causal language model; moved to the device and left in evaluation mode.
        probe: sequences whose labels are those of `sequences.next_token_labels`.
        device: the device of the pass and of the result.
        batch_size: sequences at a time; None uses `batching.first_batch_size`.
        precision: of the forward pass; `bfloat16` runs it under torch.autocast.
        progress: called with phase `features` after every batch.

    Returns:
        Features, labels, head and split of the positions, in order, with the network's predictions; and the batch size
        of the pass. Classes are the tokens that occur as labels, and the head is restricted to them; predictions,
        loss and confidence are over the whole vocabulary.

    Raises:
        AnalysisError: as `extraction.extract_features`; `invalid-architecture` where a position's logits change with
            the tokens after it.

    Numerics: as `extraction.extract_features`, including the check of features and head. Memory for features of n x d
        and, beside the network, the logits of a batch; of these a few float64 numbers a position are kept.
    """
    if not bool((probe.labels != IGNORED).any()):
        raise AnalysisError("invalid-probe", "No position of these sequences has a next token.")
    found, size = extract_tokens(network, probe, PassOptions(device, batch_size, precision, progress))
    assert found.predictions is not None
    assert found.vocabulary is not None
    predicted = places_of(found.predictions.predicted, found.vocabulary.tokens)
    return replace(found, predictions=replace(found.predictions, predicted=predicted)), size


def extract_tokens(network: LoadedNetwork, probe: Probe, options: PassOptions) -> tuple[FeatureSet, int]:
    """Return what `extract_positions` returns, with predicted tokens by their ids.

    So sequences that are passed in parts can be put together: the ids mean the same in each part, the classes do not. A
    part may be without any position that has a next token.
    """
    collected, size = pass_over(
        network, probe, lambda: _Collected(network, probe.labels, options.device, options.precision), options
    )
    check_finite("features", collected.features)
    check_finite("logits", collected.predictions.loss)
    sequences, places = (probe.labels != IGNORED).nonzero().unbind(1)
    tokens, labels = torch.unique(probe.labels[sequences, places].long(), return_inverse=True)
    tokens, labels = tokens.to(options.device), labels.to(options.device)
    split = None if probe.split is None else probe.split[sequences]
    head, vocabulary = network.weight[tokens], Vocabulary(tokens, len(network.weight))
    return FeatureSet(collected.features, labels, head, None, None, split, collected.predictions, vocabulary), size


def places_of(predicted: Int64[Tensor, " n"], tokens: Int64[Tensor, " c"]) -> Int64[Tensor, " n"]:
    """Return each predicted token's index among the classes, which are tokens in rising order; -1 for any other."""
    places = torch.searchsorted(tokens, predicted).clamp(max=len(tokens) - 1)
    return torch.where(tokens[places] == predicted, places, -1)


class _Collected:
    """Collects features and predictions, one row for each position with a label."""

    def __init__(
        self, network: LoadedNetwork, labels: Int32[Tensor, "n t"], device: torch.device, precision: Precision
    ) -> None:
        n = int((labels != IGNORED).sum())
        self.features = scratch.rows(n, network.weight.shape[1], device)
        self.predictions = Predictions.room(n, device)
        self._network, self._labels, self._precision = network, labels, precision
        self._done, self._looked_back = 0, False

    def take(self, rows: slice, passed: Passed) -> None:
        """Take the positions with labels of one batch."""
        output, received, given = passed.output, passed.received, passed.given
        network, n_vocabulary = self._network, len(self._network.weight)
        labels = self._labels[rows].to(received.device)
        shape = (*labels.shape, n_vocabulary)
        if not isinstance(output, Tensor) or output.shape != shape or given.shape != shape:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            detail = f"The network's output is {found} and not {list(shape)}, logits at each token, of its head"
            raise not_the_head(network, detail)
        kept = labels != IGNORED
        first = not self._looked_back and bool(kept.any())
        if first:
            _check_causal(network, passed.batch, output, kept, self._precision)
            self._looked_back = True
        untouched = not first and gives_as_it_is(network, output, given)
        places = kept.flatten().nonzero()[:, 0]
        for part in torch.split(places, rows_at_a_time(n_vocabulary)):
            features, logits = received.flatten(0, 1)[part].float(), output.flatten(0, 1)[part].float()
            if not untouched:
                check_identity(network, features, logits, self._precision)
            kept_rows = slice(self._done, self._done + len(part))
            self.features[kept_rows] = features
            self.predictions.put(kept_rows, predictions_of(logits, labels.flatten()[part]))
            self._done = kept_rows.stop


def _check_causal(
    network: LoadedNetwork,
    batch: Inputs,
    output: Float[Tensor, "b t c"],
    kept: Bool[Tensor, "b t"],
    precision: Precision,
) -> None:
    """Check that another last token does not change the logits before it.

    Raises:
        AnalysisError: `invalid-architecture`, as the measures would not be of predictions.
    """
    assert not isinstance(batch, Tensor), "the probe's labels are of its input_ids"
    row = int(kept.sum(dim=1).argmax())
    places = kept[row].nonzero()[:, 0]
    last = int(places[-1]) + 1
    changed = {name: tensor[row : row + 1].clone() for name, tensor in batch.items()}
    # Another id that is certain to be in the vocabulary.
    token = int(changed["input_ids"][0, last])
    changed["input_ids"][0, last] = token - 1 if token else 1
    before, after = output[row, places].float(), forward(network.module, changed)[0, places].float()
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if difference > _SAME_PAST[precision] * largest:
        raise AnalysisError(
            "invalid-architecture",
            f"The network is no causal language model: another token at position {last} changes the logits before it "
            f"by {difference:.3g}. The config of an encoder may need is_decoder: true.",
            difference=difference,
        )

"""Passes over consecutive parts of a probe, and one feature set put together from what they gave.

A part begins at a multiple of the batch size, so its batches are those of a pass over the whole probe, and the feature
set is the same to the bit. In a part, a language model's predicted tokens are ids, since its classes are only the
tokens that occur in it. A classifier's head comes with the first part alone: it may be larger than a part's features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..measures.predictions import Predictions
from ..networks.loading import LoadedNetwork
from ..probes.feature_set import FeatureSet, Vocabulary
from ..probes.probe import Probe
from ..probes.sequences import IGNORED
from . import scratch
from .extraction import PassOptions, extract_predictions
from .positions import extract_tokens, places_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Span:
    """Consecutive samples of a probe.

    Attributes:
        start: the first.
        stop: the first that follows.
        of: samples of the whole probe.
    """

    start: int
    stop: int
    of: int


def samples_of_parts(at_most: int, batch_size: int) -> int:
    """Return the samples of each part but the last: whole batches, `at_most` so many samples or else one batch."""
    return max(at_most // batch_size, 1) * batch_size


def spans(n: int, size: int) -> list[Span]:
    """Return consecutive parts of n samples with `size` samples each; the last may have fewer."""
    return [Span(start, min(start + size, n), n) for start in range(0, n, size)]


def extract_part(
    network: LoadedNetwork, probe: Probe, span: Span, options: PassOptions
) -> tuple[FeatureSet, Span, int]:
    """Pass a part of a probe through a network.

    Args:
        network: moved to the device and left in evaluation mode.
        probe: the whole probe; its inputs of other parts are not read.
        span: the part, which begins at a multiple of the batch size.
        options: with the batch size of the whole pass, at most that of `extraction.planned_batch_size`.

    Returns:
        What is known of the part's samples, or positions; the part that was passed, which ends at a multiple of the
        batch size or with the probe; and the batch size, which is less than requested only where memory ran out.

    Raises:
        AnalysisError: as `extraction.extract_predictions` and `positions.extract_positions`.
    """
    assert options.batch_size is not None, "all parts are passed with the batch size of the first"
    part = probe.part(span.start, span.stop)
    if network.predicts_tokens:
        found, size = extract_tokens(network, part, options)
    else:
        found, size = extract_predictions(network, part, **vars(options))
    if size >= min(options.batch_size, span.stop - span.start):
        size = options.batch_size
    surplus = (span.stop - span.start) % size if span.stop < span.of else 0
    if surplus:
        # Memory ran out, and the part is no multiple of the batch size that was left.
        span = replace(span, stop=span.stop - surplus)
        found = found.take(slice(0, n_rows(probe, span)))
    return _of_part(found, first=span.start == 0), span, size


def n_rows(probe: Probe, span: Span) -> int:
    """Return the rows of features that a part has: its samples, of sequences the positions that have a next token."""
    labels = probe.labels[span.start : span.stop]
    return len(labels) if labels.ndim == 1 else int((labels != IGNORED).sum())


def cut(whole: FeatureSet, rows: Sequence[int]) -> list[FeatureSet]:
    """Return a feature set as parts with so many rows each, as `extract_part` gives them."""
    parts, start = [], 0
    vocabulary, predictions = whole.vocabulary, whole.predictions
    if vocabulary is not None and predictions is not None:
        known = predictions.predicted >= 0
        ids = torch.where(known, vocabulary.tokens[predictions.predicted.clamp(min=0)], -1)
        whole = replace(whole, predictions=replace(predictions, predicted=ids))
    for n in rows:
        parts.append(_of_part(whole.take(slice(start, start + n)), first=start == 0))
        start += n
    return parts


def whole(part: FeatureSet) -> FeatureSet:
    """Return the feature set of one part, which is all of a probe."""
    if part.vocabulary is None or part.predictions is None:
        return part
    predicted = places_of(part.predictions.predicted, part.vocabulary.tokens)
    return replace(part, predictions=replace(part.predictions, predicted=predicted))


class Joining:
    """Puts the parts of a feature set together, in their order; on the processor, in a mapped file if it is much.

    Args:
        n: rows of all parts.
        n_features: numbers in a row.

    Raises:
        AnalysisError: `out-of-memory` where the folder of mapped files has no room.
    """

    def __init__(self, n: int, n_features: int) -> None:
        self._features = scratch.rows(n, n_features, _CPU)
        self._labels = torch.empty(n, dtype=torch.int64)
        self._predictions = Predictions.room(n, _CPU)
        self._split: Int64[Tensor, " n"] | None = None
        self._vocabulary: Vocabulary | None = None
        self._head: Float[Tensor, "c d"] = torch.empty(0, n_features)
        self._done = 0

    def take(self, part: FeatureSet) -> None:
        """Take the next part."""
        part = part.to(_CPU)
        rows = slice(self._done, self._done + len(part.labels))
        assert part.predictions is not None, "a pass keeps predictions"
        self._features[rows] = part.features
        self._predictions.put(rows, part.predictions)
        if part.split is not None:
            if self._split is None:
                self._split = torch.empty(len(self._labels), dtype=torch.int64)
            self._split[rows] = part.split
        if part.vocabulary is None:
            self._labels[rows] = part.labels
            self._head = part.head if rows.start == 0 else self._head
        else:
            vocabulary = replace(part.vocabulary, tokens=part.vocabulary.tokens.to(_CPU))
            self._labels[rows] = vocabulary.tokens[part.labels]
            self._add_tokens(vocabulary, part.head)
        self._done = rows.stop

    def feature_set(self) -> FeatureSet:
        """Return the feature set of all parts."""
        assert self._done == len(self._labels), "a part is missing"
        labels, vocabulary = self._labels, self._vocabulary
        if vocabulary is not None:
            labels = torch.searchsorted(vocabulary.tokens, labels)
        joined = FeatureSet(self._features, labels, self._head, None, None, self._split, self._predictions, vocabulary)
        return whole(joined)

    def _add_tokens(self, vocabulary: Vocabulary, head: Float[Tensor, "c d"]) -> None:
        before, added = self._vocabulary, vocabulary.tokens
        tokens = added if before is None else torch.unique(torch.cat([before.tokens, added]))
        if before is not None and len(tokens) == len(before.tokens):
            return
        rows = head.new_empty(len(tokens), head.shape[1])
        if before is not None:
            rows[torch.searchsorted(tokens, before.tokens)] = self._head
        rows[torch.searchsorted(tokens, added)] = head
        self._vocabulary, self._head = Vocabulary(tokens, vocabulary.size), rows


def _of_part(found: FeatureSet, *, first: bool) -> FeatureSet:
    """Return rows with the tokens that occur in them, or with a classifier's head in the first part alone."""
    if found.vocabulary is None:
        return found if first else replace(found, head=found.head[:0])
    occurring, labels = torch.unique(found.labels, return_inverse=True)
    vocabulary = replace(found.vocabulary, tokens=found.vocabulary.tokens[occurring])
    return replace(found, labels=labels, head=found.head[occurring], vocabulary=vocabulary)

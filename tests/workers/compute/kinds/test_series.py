"""Conditions that the points of a series must share."""

import pytest

from analysis.errors import AnalysisError
from app.schemas import Preprocess
from app.schemas.reports import NextTokens, Tokenizer
from tests.workers.examples import ABOUT, known
from workers.compute.kinds.series import require_comparable
from workers.tasks import Known


def _point(
    n_classes: int = 10,
    *,
    n_features: int = 5,
    tokenizer: Tokenizer | None = None,
    n_vocabulary: int | None = None,
    preprocess: Preprocess | None = None,
) -> Known:
    tokens = None
    if n_vocabulary is not None:
        tokens = NextTokens(
            ignored_labels=False, n_sequences={}, n_positions={}, n_vocabulary=n_vocabulary, token_ids=[]
        )
    about = {"tokenizer": tokenizer, "next_tokens": tokens, "preprocess": preprocess}
    return known(n_classes, n_features, ABOUT.model_copy(update=about))


def _tokenizer(sha256: str, max_length: int, n_truncated: int, pad_id: int = 0) -> Tokenizer:
    return Tokenizer(sha256=sha256, source="probe", max_length=max_length, pad_id=pad_id, n_truncated=n_truncated)


@pytest.mark.parametrize(
    "points",
    [
        [_point()],
        [_point(), _point()],
        [_point(), _point(n_features=7)],
        [_point(50_257, n_vocabulary=50_257), _point(50_304, n_vocabulary=50_304)],
        [_point(tokenizer=_tokenizer("a", 64, 0, pad_id=1)), _point(tokenizer=_tokenizer("a", 128, 0))],
        [known(10, probe=None), known(10, probe=None)],
    ],
)
def test_points_of_the_same_classes_and_inputs_are_compared(points: list[Known]) -> None:
    """Points may differ in width, in vocabulary around the same tokens, in lengths that truncate nothing, in age."""
    require_comparable(points)


@pytest.mark.parametrize(
    ("point", "kind", "word"),
    [
        (_point(12), "architectures-differ", "12 classes where the first checkpoint has 10"),
        (_point(preprocess=Preprocess(resize=8)), "invalid-probe", "preprocessing"),
        (_point(tokenizer=_tokenizer("b", 64, 0)), "invalid-probe", "tokenizer"),
        (_point(tokenizer=_tokenizer("a", 32, 5)), "invalid-probe", "tokenizer"),
    ],
)
def test_points_of_others_are_refused(point: Known, kind: str, word: str) -> None:
    """A series refuses a last point of other classes or inputs, whatever points lie between."""
    first = _point(tokenizer=_tokenizer("a", 64, 0)) if word == "tokenizer" else _point()
    with pytest.raises(AnalysisError, match=word) as caught:
        require_comparable([first, first, point])
    assert caught.value.kind == kind

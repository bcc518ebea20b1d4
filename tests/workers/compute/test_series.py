"""What the points of a series must share."""

from typing import Any

import pytest

from analysis.errors import AnalysisError
from workers.compute.series import require_comparable


def _point(n_classes: int = 10, **probe: Any) -> dict[str, Any]:
    return {"n_classes": n_classes, "n_features": 5, "probe": {"preprocess": None, "tokenizer": None, **probe}}


def _tokenizer(sha256: str, max_length: int, n_truncated: int, pad_id: int = 0) -> dict[str, Any]:
    return {"sha256": sha256, "max_length": max_length, "n_truncated": n_truncated, "pad_id": pad_id, "source": "probe"}


@pytest.mark.parametrize(
    "points",
    [
        [_point()],
        [_point(), _point()],
        [_point(), {**_point(), "n_features": 7}],
        [_point(50_257, next_tokens={"n_vocabulary": 50_257}), _point(50_304, next_tokens={"n_vocabulary": 50_304})],
        [_point(tokenizer=_tokenizer("a", 64, 0, pad_id=1)), _point(tokenizer=_tokenizer("a", 128, 0))],
        [{"n_classes": 10}, {"n_classes": 10}],
    ],
)
def test_points_of_the_same_classes_and_inputs_are_compared(points: list[dict[str, Any]]) -> None:
    """Other widths, other vocabularies around the same tokens, lengths that cut nothing off; reports of long ago."""
    require_comparable(points)


@pytest.mark.parametrize(
    ("point", "kind", "word"),
    [
        (_point(12), "architectures-differ", "12 classes where the first checkpoint has 10"),
        (_point(preprocess={"resize": 8}), "invalid-probe", "preprocessing"),
        (_point(tokenizer=_tokenizer("b", 64, 0)), "invalid-probe", "tokenizer"),
        (_point(tokenizer=_tokenizer("a", 32, 5)), "invalid-probe", "tokenizer"),
    ],
)
def test_points_of_others_are_refused(point: dict[str, Any], kind: str, word: str) -> None:
    """By the last point, whatever lies between."""
    first = _point(tokenizer=_tokenizer("a", 64, 0)) if word == "tokenizer" else _point()
    with pytest.raises(AnalysisError, match=word) as caught:
        require_comparable([first, first, point])
    assert caught.value.kind == kind

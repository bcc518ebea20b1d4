"""Class names of a probe and of a checkpoint."""

from typing import Any

import pytest

from app.descriptions.labels import LabelMap, match_labels, name_classes
from app.errors import InvalidRequest, LabelsDiffer


def _of(*names: str) -> dict[str, Any]:
    return {"family": "transformers", "config": {"id2label": {str(i): name for i, name in enumerate(names)}}}


@pytest.mark.parametrize(
    ("class_names", "architecture", "expected"),
    [
        (["cat", "dog"], _of("cat", "dog"), LabelMap("name", None)),
        (["cat", "dog"], _of("dog", "cat"), LabelMap("name", [1, 0])),
        (["cat", "dog"], _of("Dog", "cat"), LabelMap("name_ignoring_case", [1, 0])),
        (["cat", "dog"], _of("Cat", "DOG"), LabelMap("name_ignoring_case", None)),
        (["cat", "dog"], _of("ant", "cat", "bee", "dog"), LabelMap("name", [1, 3])),
        (["cat", "dog"], _of("cat", "dog", "ant"), LabelMap("name", None)),
        # Exact matches take precedence over those that differ in case.
        (["cat", "Cat"], _of("Cat", "cat"), LabelMap("name", [1, 0])),
        # ImageNet has two classes named crane; the same list still matches itself.
        (["crane", "dog", "crane"], _of("crane", "dog", "crane"), LabelMap("name", None)),
        (["cat", "dog"], _of("LABEL_0", "LABEL_1"), LabelMap("order", None)),
        (["cat", "dog"], {"family": "timm", "name": "a", "args": {}}, LabelMap("order", None)),
        (["cat", "dog"], {"family": "transformers", "config": {}}, LabelMap("order", None)),
        (None, _of("cat", "dog"), LabelMap("order", None)),
    ],
)
def test_names_are_matched(class_names: list[str] | None, architecture: dict[str, Any], expected: LabelMap) -> None:
    """Names match exactly, then ignoring case; if one side has no names, in their order."""
    assert match_labels(class_names, architecture) == expected


@pytest.mark.parametrize(
    ("class_names", "names", "unmatched"),
    [
        (["cat", "fox"], ["cat", "dog"], ["fox"]),
        (["cat", "dog", "fox"], ["cat", "dog"], ["fox"]),
        (["crane", "dog"], ["crane", "dog", "crane"], ["crane"]),
        (["CAT", "dog"], ["cat", "Cat", "dog"], ["CAT"]),
        (["cat", "CAT"], ["cat", "dog"], []),
    ],
)
def test_names_that_do_not_meet(class_names: list[str], names: list[str], unmatched: list[str]) -> None:
    """Names that are unknown, duplicated or ambiguous are refused, and both lists are shown."""
    with pytest.raises(LabelsDiffer) as raised:
        match_labels(class_names, _of(*names))
    assert raised.value.members == {"unmatched": unmatched, "class_names": class_names, "id2label": names}


def test_long_lists_are_cut_off() -> None:
    """A problem lists twenty names of each side."""
    with pytest.raises(LabelsDiffer) as raised:
        match_labels([f"a{i}" for i in range(1000)], _of(*(f"b{i}" for i in range(1000))))
    assert len(raised.value.members["id2label"]) == 20
    assert "980 others" in raised.value.detail
    assert len(raised.value.detail) < 1500


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (["cat", "dog"], ["cat", "dog"], None),
        (["cat", "dog"], ["dog", "cat"], [1, 0]),
        (["cat", "dog"], ["Dog", "Cat"], [1, 0]),
        (["cat", "dog"], ["ant", "cat", "dog"], [1, 2]),
        # Other words for the same classes; two of them may be equal.
        (["n01", "n02"], ["crane", "dog"], None),
        (["n01", "n02"], ["crane", "crane"], None),
    ],
)
def test_a_spec_names_the_classes_of_a_file(own: list[str], given: list[str], expected: list[int] | None) -> None:
    """A spec gives a file's class names in any order, or other names in the file's order."""
    assert name_classes(own, given) == expected


@pytest.mark.parametrize(
    "given", [["cat", "fox"], ["fox", "cow", "hen"], ["fox"], ["cat", "CAT"], ["dog", "dog", "cat"]]
)
def test_names_that_may_be_meant_either_way(given: list[str]) -> None:
    """Names that only partly match the file's, more, fewer or duplicated ones are refused, and both lists are shown."""
    with pytest.raises(InvalidRequest, match="the file's own are 'cat', 'dog'"):
        name_classes(["cat", "dog"], given)

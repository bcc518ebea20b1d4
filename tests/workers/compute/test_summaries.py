"""What points are put together to: what is within rounding of a bound, and why something is not defined."""

from typing import Any

import pytest

from workers.compute.summaries import REPORTS

Body = dict[str, Any]


def _split(accuracy: float, distance: float | None) -> Body:
    measured = {"mir": 0.9, "hdr": 0.1, "distance_to_optimum": {"mir": distance, "hdr": distance}}
    return {"loss": 1.0, "accuracy": accuracy, "interplay": {"sample": {"global": measured}}}


def _report(kind: str, place: str, points: dict[float, Body], known: Body, **task: Any) -> Body:
    about = {"head": "head", "n_features": 2, "n_classes": 2, **known}
    entries = [{"known": {**about, place: x}, "point": {place: x, "splits": splits}} for x, splits in points.items()]
    return REPORTS[kind]({"points": entries, "subjects": [{"name": "a"}, {"name": "b"}], **task})


def _path(accuracies: dict[float, float], cosine: float | None = 0.5) -> Body:
    known = {"recalibrated_layers": None, "l2_distance": 1.0, "cosine": cosine, "alignment": None}
    points = {w: {"all": _split(accuracy, 0.1)} for w, accuracy in accuracies.items()}
    summary: Body = _report("path", "w", points, known)["summary"]
    return summary


@pytest.mark.parametrize("n", [50, 100, 200, 500, 1_000, 10_000])
def test_an_error_barrier_of_two_in_a_hundred_is_connected(n: int) -> None:
    """At most 0.02, however the subtractions round; one sample more is not."""
    for wrong in range(0, n - n // 50, max(n // 50, 1)):
        for more, connected in ((n // 50, True), (n // 50 + 1, False)):
            ends, middle = 1 - wrong / n, 1 - (wrong + more) / n
            assert _path({0.0: ends, 0.5: middle, 1.0: ends})["splits"]["all"]["connected"] is connected


def test_what_a_path_has_not_has_a_reason() -> None:
    """Without a point at 1/2 no midpoint, without length no angle."""
    summary = _path({0.0: 1.0, 1.0: 1.0}, cosine=None)
    assert summary["reasons"] == {"cosine": "zero_length"}
    assert summary["splits"]["all"]["reasons"] == {
        "loss_forms.midpoint": "no_midpoint",
        "error_forms.midpoint": "no_midpoint",
    }
    summary = _path({0.0: 1.0, 0.5: 0.9, 1.0: 1.0})
    assert (summary["reasons"], summary["splits"]["all"]["reasons"]) == ({}, {})


def test_what_a_series_has_not_has_a_reason() -> None:
    """A distance that some point has not, an accuracy that none reaches."""
    points = {
        x: {"train": _split(train, distance), "test": _split(0.5, 0.1)}
        for x, train, distance in ((1.0, 0.5, 0.1), (2.0, 1.0, None))
    }
    axis = {"name": "epoch", "values": [1.0, 2.0]}
    summary = _report("series", "x", points, {}, axis=axis)["summary"]
    assert summary["generalisation"]["train_at"] == 2.0
    assert summary["generalisation"]["reasons"] == {"test_at": "not_reached", "delay": "not_reached"}
    reasons = summary["splits"]["train"]["reasons"]
    assert (reasons["mir_distance"], reasons["hdr_distance"]) == ("undefined_points", "undefined_points")
    assert "mir_distance" not in summary["splits"]["test"]["reasons"]

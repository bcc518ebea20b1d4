"""Reports of points: values within rounding of a bound, and reasons for undefined values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from app.schemas.reports import PathSummary, SeriesSummary
from app.settings import Settings
from app.storage import Storage
from tests.workers.examples import FILES, path_answer, path_task, series_answer, series_task, split
from workers.compute import kinds
from workers.compute.context import Context, Held
from workers.compute.features import FeatureCache
from workers.tasks import Answer, PointsTask, report_step


@pytest.fixture
def context(tmp_path: Path) -> Context:
    cache = FeatureCache(Storage(Settings(data_dir=tmp_path)), 0)
    provenance = {"device": "cpu"}
    return Context(FILES, torch.device("cpu"), cache, Held(0), dict(provenance), lambda phase, done, total: None)


def _path(context: Context, accuracies: dict[float, float], cosine: float | None = 0.5) -> PathSummary:
    answers = [path_answer(w, {"all": split(accuracy)}, cosine=cosine) for w, accuracy in accuracies.items()]
    return PathSummary.model_validate(_body(context, path_task(), answers)["summary"])


def _body(context: Context, task: PointsTask, answers: Sequence[Answer]) -> dict[str, Any]:
    return dict(kinds.compute(report_step(task, answers), context))


@pytest.mark.parametrize("n", [50, 100, 200, 500, 1_000, 10_000])
def test_an_error_barrier_of_two_in_a_hundred_is_connected(context: Context, n: int) -> None:
    """An error barrier of at most 0.02 is connected, however the subtractions round; one sample more is not."""
    for wrong in range(0, n - n // 50, max(n // 50, 1)):
        for more, connected in ((n // 50, True), (n // 50 + 1, False)):
            ends, middle = 1 - wrong / n, 1 - (wrong + more) / n
            summary = _path(context, {0.0: ends, 0.5: middle, 1.0: ends})
            assert summary.splits["all"].connected is connected


def test_missing_members_of_a_path_have_a_reason(context: Context) -> None:
    """Missing members of a path have a reason: no midpoint without a point at 1/2, no angle without length."""
    summary = _path(context, {0.0: 1.0, 1.0: 1.0}, cosine=None)
    assert summary.reasons == {"cosine": "zero_length"}
    assert summary.splits["all"].reasons == {
        "loss_forms.midpoint": "no_midpoint",
        "error_forms.midpoint": "no_midpoint",
    }
    summary = _path(context, {0.0: 1.0, 0.5: 0.9, 1.0: 1.0})
    assert (summary.reasons, summary.splits["all"].reasons) == ({}, {})


def test_points_of_a_path_are_in_the_order_of_w(context: Context) -> None:
    """Points of a path are in the order of w, though ends are computed first; timings are the sums over all points."""
    body = _body(context, path_task(), [path_answer(w, {"all": split(1.0)}) for w in (0.0, 1.0, 0.5)])
    assert [point["w"] for point in body["points"]] == [0.0, 0.5, 1.0]
    assert body["timings_seconds"] == {"features": 1.5}


def test_missing_members_of_a_series_have_a_reason(context: Context) -> None:
    """Missing members of a series have a reason: a distance that a point lacks, an accuracy that no point reaches."""
    answers = [
        series_answer(x, {"train": split(train, distance), "test": split(0.5)})
        for x, train, distance in ((1.0, 0.5, 0.1), (2.0, 1.0, None))
    ]
    summary = SeriesSummary.model_validate(_body(context, series_task(1.0, 2.0), answers)["summary"])
    assert summary.generalisation is not None
    assert summary.generalisation.train_at == 2.0
    assert summary.generalisation.reasons == {"test_at": "not_reached", "delay": "not_reached"}
    reasons = summary.splits["train"].reasons
    assert (reasons["mir_distance"], reasons["hdr_distance"]) == ("undefined_points", "undefined_points")
    assert "mir_distance" not in summary.splits["test"].reasons

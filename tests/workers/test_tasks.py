"""Tasks and answers as they are passed between processes."""

import json

import pytest
from pydantic import ValidationError

from tests.workers.examples import (
    FILES,
    Splits,
    path_answer,
    path_task,
    pruning_answer,
    pruning_task,
    series_answer,
    series_task,
    split,
)
from workers.tasks import Answer, PointsTask, Work, answer_of, point_step, report_step

SPLITS: Splits = {"all": split(0.5)}
CASES: list[tuple[PointsTask, list[Answer]]] = [
    (path_task(), [path_answer(0.0, SPLITS), path_answer(1.0, SPLITS)]),
    (pruning_task(), [pruning_answer(0.0, SPLITS), pruning_answer(0.5, SPLITS)]),
    (series_task(1.0, 2.0), [series_answer(1.0, SPLITS), series_answer(2.0, SPLITS)]),
]


@pytest.mark.parametrize(("task", "answers"), CASES, ids=["path", "pruning", "series"])
def test_steps_and_answers_arrive_as_they_were_sent(task: PointsTask, answers: list[Answer]) -> None:
    """Steps and answers arrive unchanged, for each kind with points: the first point, the next and the report."""
    first = point_step(task, number=0, place=0.0, first=None)
    second = point_step(task, number=1, place=1.0, first=answers[0].known)
    for step in (first, second, report_step(task, answers)):
        work = Work(step=step, files=FILES)
        assert Work.model_validate_json(work.model_dump_json(by_alias=True)) == work
    for answer in answers:
        assert answer_of(task, json.loads(answer.model_dump_json(by_alias=True))) == answer


def test_a_point_of_another_version_is_read() -> None:
    """An analysis goes on after an upgrade: missing members of a point get defaults, unknown ones are dropped."""
    [task, [answer, _]] = CASES[0]
    body = answer.model_dump(mode="json", by_alias=True)
    for name in ("look", "ends", "probe", "untied"):
        del body["known"][name]
    body["known"]["gone"] = 1
    assert answer_of(task, body).known.probe is None


@pytest.mark.parametrize("broken", [{"loss": float("nan")}, {"w": None}])
def test_a_broken_answer_is_refused(broken: dict[str, float | None]) -> None:
    """An answer with a number that JSON cannot hold, or without a required number, is refused."""
    [task, [answer, _]] = CASES[0]
    body = answer.model_dump(mode="json", by_alias=True)
    body["known"] |= broken
    with pytest.raises(ValidationError):
        answer_of(task, body)

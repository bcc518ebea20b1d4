"""Shards of an evaluation, in the process that computes: what workers pass to each other, lose and find again."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.files.datafile import Limits
from app.schemas import ComparisonOptions, EvaluationOptions
from app.settings import Settings
from app.storage import Storage
from tests.conftest import MLP
from tests.workers.examples import PROBE, checkpoint
from workers.compute.features import FeatureCache
from workers.compute.runner import Runner
from workers.tasks import (
    Answer,
    ComparisonReportTask,
    EvaluationTask,
    Files,
    Json,
    ShardAnswer,
    ShardedReportTask,
    ShardedTask,
    ShardTask,
    SideTask,
    Step,
    Work,
    answer_of,
    point_step,
    report_step,
)

N = 1797
BUDGET = 10**8


@dataclass
class World:
    """A checkpoint, a probe, and a storage that workers share."""

    storage: Storage
    files: Files
    common: dict[str, Any]

    def runner(self, max_bytes: int = BUDGET) -> Runner:
        """Return the compute process of another worker."""
        return Runner(torch.device("cpu"), FeatureCache(self.storage, max_bytes), 0)

    def run(self, runner: Runner, step: Step) -> Json:
        body, refusal = runner.run(Work(step=step, files=self.files), lambda phase, done, total: None)
        assert body is not None, refusal
        return body

    def fail(self, runner: Runner, step: Step) -> Json:
        body, refusal = runner.run(Work(step=step, files=self.files), lambda phase, done, total: None)
        assert body is None
        assert refusal is not None
        return refusal

    def sharded(self, at_most: int, **options: Any) -> ShardedTask:
        given = EvaluationOptions(null_permutations=2, batch_size=16, **options)
        return ShardedTask(**{**self.common, "options": given, "shard_samples": at_most})

    def whole(self, **options: Any) -> EvaluationTask:
        given = EvaluationOptions(null_permutations=2, batch_size=16, **options)
        return EvaluationTask(**{**self.common, "options": given})

    def shards(self, task: ShardedTask, *runners: Runner) -> list[Answer]:
        """Compute all shards, the workers in turn."""
        answers: list[Answer] = []
        while places := task.further(answers):
            for place in places:
                step = point_step(task, number=len(answers), place=place, first=answers[0].known if answers else None)
                answers.append(answer_of(task, self.run(runners[len(answers) % len(runners)], step)))
        return answers

    def report(self, task: ShardedTask, answers: list[Answer], runner: Runner) -> Json:
        return self.run(runner, report_step(task, answers))

    def folder(self) -> Path:
        return Path(self.storage.store.prefix) / "features"  # type: ignore[union-attr, arg-type]

    def names(self) -> list[str]:
        """Return the names of the files of features."""
        return sorted(file.name for file in self.storage.list_features())


@pytest.fixture
def world(tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path) -> World:
    torch.set_num_threads(1)
    labels = load_file(digits_probe_file)["labels"]
    row = checkpoint("net").model_copy(update={"architecture": MLP, "sha256": "a" * 64})
    counts = torch.bincount(labels).tolist()
    about = {"sha256": "b" * 64, "n_samples": N, "n_classes": 10, "class_counts": counts, "input_shape": [64]}
    settings = Settings(data_dir=tmp_path / "data")
    paths = {"a" * 64: mlp_checkpoint_file, "b" * 64: digits_probe_file}
    return World(
        Storage(settings),
        Files(paths=paths, dataset=Limits.of(settings), image_pixels=1),
        {"analysis_id": "x", "checkpoints": (row,), "probe": PROBE.model_copy(update=about)},
    )


def comparable(body: Json) -> dict[str, Any]:
    """Return a report's body without what depends on the time, or on what was computed before."""
    provenance: Any = body["provenance"]
    return {
        **{name: value for name, value in body.items() if name != "timings_seconds"},
        "provenance": {
            name: value for name, value in provenance.items() if name not in ("features_reused", "computed_on")
        },
    }


def expected(world: World, **options: Any) -> dict[str, Any]:
    """Return the report of one piece."""
    return comparable(world.run(world.runner(0), world.whole(**options)))


@pytest.mark.parametrize("options", [{}, {"samples": 1000, "seed": 3}, {"precision": "bfloat16"}])
def test_a_report_does_not_depend_on_its_shards(world: World, options: dict[str, Any]) -> None:
    """In one piece, in 2 shards or 28, by one worker or three, with samples and in bfloat16: the same report."""
    known = expected(world, **options)
    for at_most, count in ((900, 1), (64, 3)):
        task, workers = world.sharded(at_most, **options), [world.runner(0) for _ in range(count)]
        answers = world.shards(task, *workers)
        assert len(answers) == -(-options.get("samples", N) // (at_most // 16 * 16))
        assert comparable(world.report(task, answers, workers[-1])) == known


def test_a_second_evaluation_finds_the_shards(world: World) -> None:
    """Kept shards are found by later evaluations, whose options of the mathematics differ, and by a comparison."""
    task, runner = world.sharded(600), world.runner()
    world.report(task, world.shards(task, runner), runner)
    assert [name.partition(".")[2] for name in world.names()] == ["", "1184", "1776", "592"], "37 batches"
    again = world.sharded(600, seed=5, tolerance=1e-3)
    answers = world.shards(again, world.runner())
    assert [answer.reused for answer in answers if isinstance(answer, ShardAnswer)] == [True] * 4
    report: Any = world.report(again, answers, world.runner())
    assert report["provenance"]["features_reused"] is True
    assert comparable(report) == expected(world, seed=5, tolerance=1e-3)
    given = ComparisonOptions(null_permutations=0, batch_size=16, resamples=10)
    both = {**world.common, "checkpoints": world.common["checkpoints"] * 2, "options": given, "shard_samples": 600}
    compared: Any = world.run(world.runner(), ComparisonReportTask(**both, points=()))
    assert compared["provenance"]["features_reused"] is True
    assert compared["splits"]["all"]["a"]["loss"] == report["splits"]["all"]["loss"]


def test_a_comparison_keeps_what_evaluations_find(world: World) -> None:
    """A side of a comparison is one pass, whose features are kept in the files that shards would have."""
    given = ComparisonOptions(null_permutations=0, batch_size=16)
    both = {**world.common, "checkpoints": world.common["checkpoints"] * 2, "options": given, "shard_samples": 600}
    world.run(world.runner(), SideTask(**both, number=0, place=0.0))
    assert len(world.names()) == 4
    task = world.sharded(600)
    answers = world.shards(task, world.runner())
    assert [answer.reused for answer in answers if isinstance(answer, ShardAnswer)] == [True] * 4
    assert comparable(world.report(task, answers, world.runner())) == expected(world)


def _gone(path: Path) -> None:
    path.unlink()


def _turned(path: Path) -> None:
    """Flip one bit of a tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("max_bytes", [0, BUDGET])
@pytest.mark.parametrize("lose", [_gone, _turned])
def test_what_is_lost_is_computed_again(world: World, lose: Callable[[Path], None], max_bytes: int) -> None:
    """A first and a later shard that are gone or damaged when the report is made are passed again."""
    task, runner = world.sharded(600), world.runner(max_bytes)
    answers = world.shards(task, runner)
    for name in world.names()[:2]:
        lose(world.folder() / name)
    assert comparable(world.report(task, answers, world.runner(max_bytes))) == expected(world)


def test_another_cut_in_its_place_is_not_taken(world: World) -> None:
    """A file that another analysis has put in a shard's place is told by what it says of itself."""
    task, runner = world.sharded(600), world.runner()
    answers = world.shards(task, runner)
    first, second = world.names()[0], world.names()[1]
    (world.folder() / first).write_bytes((world.folder() / second).read_bytes())
    assert comparable(world.report(task, answers, runner)) == expected(world)


def test_a_large_entry_evicts_nothing(world: World) -> None:
    """Where a whole pass is more than half of the limit, others stay, and its shards are there for its report."""
    small = world.sharded(600, samples=1200)
    world.shards(small, world.runner())
    before = world.names()
    size_bytes = sum(file.size_bytes for file in world.storage.list_features())
    runner, task = world.runner(size_bytes + 10**5), world.sharded(600)
    answers = world.shards(task, runner)
    assert set(before) < set(world.names())
    assert comparable(world.report(task, answers, runner)) == expected(world)


def test_whole_entries_go_the_oldest_first(world: World) -> None:
    """What has no room evicts the oldest pass with all its shards."""
    passes = [world.sharded(600, samples=1200, seed=seed) for seed in range(3)]
    world.shards(passes[0], world.runner())
    n_bytes, oldest = sum(file.size_bytes for file in world.storage.list_features()), set(world.names())
    time.sleep(0.02)
    world.shards(passes[1], world.runner())
    world.shards(passes[2], world.runner(int(2.5 * n_bytes)))
    assert oldest.isdisjoint(world.names())
    assert len(world.names()) == 2 * len(oldest)


def test_unlike_workers_are_told_shard_by_shard(world: World) -> None:
    """Shards of workers with other numbers of threads make one report, which says what computed each."""
    task, one, other = world.sharded(600), world.runner(), world.runner()
    answers: list[Answer] = []
    for number, place in enumerate((0.0, 592.0, 1184.0, 1776.0)):
        torch.set_num_threads(1 + number % 2)
        first = answers[0].known if answers else None
        step = point_step(task, number=number, place=place, first=first)
        answers.append(answer_of(task, world.run((one, other)[number % 2], step)))
    torch.set_num_threads(1)
    assert len({name.partition(".")[0] for name in world.names()}) == 2
    report: Any = world.report(task, answers, one)
    assert [on["threads"] for on in report["provenance"]["computed_on"]] == [1, 2, 1, 2]


def test_only_rows_of_the_shard_are_read(world: World, tmp_path: Path, digits_probe_file: Path) -> None:
    """A NaN is told by its row, by the shard that has it; shards before it are passed."""
    tensors = load_file(digits_probe_file)
    tensors["inputs"][700, 3] = torch.nan
    save_file(tensors, tmp_path / "probe")
    world.files = world.files.model_copy(update={"paths": {**world.files.paths, "b" * 64: tmp_path / "probe"}})
    task, runner = world.sharded(600), world.runner()
    first = answer_of(task, world.run(runner, point_step(task, number=0, place=0.0, first=None)))
    refusal = world.fail(runner, point_step(task, number=1, place=592.0, first=first.known))
    assert (refusal["type"], refusal["row"]) == ("urn:interplay:problem:non-finite-values", 700)
    whole = world.fail(runner, world.whole())
    assert whole == refusal


def test_a_report_without_shards_computes_all(world: World) -> None:
    """A report that a worker of an earlier version has planned, which knows no shards, has no answers."""
    task = world.sharded(600)
    assert comparable(world.run(world.runner(), report_step(task, []))) == expected(world)


def test_labels_are_checked_as_in_one_piece(world: World, tmp_path: Path, digits_probe_file: Path) -> None:
    """Labels that the network has no class for are told of all samples, whichever shards they are in."""
    tensors = load_file(digits_probe_file)
    tensors["labels"] = torch.from_numpy(np.where(np.arange(N) == 1500, 12, tensors["labels"].numpy()))
    save_file(tensors, tmp_path / "probe")
    world.files = world.files.model_copy(update={"paths": {**world.files.paths, "b" * 64: tmp_path / "probe"}})
    world.common["probe"] = world.common["probe"].model_copy(update={"n_classes": 13})
    task = world.sharded(600)
    refusal = world.fail(world.runner(), ShardTask(**dict(task), number=0, place=0.0))
    assert refusal == world.fail(world.runner(), world.whole())
    assert isinstance(report_step(task, []), ShardedReportTask)

"""Analyses that need more device memory than some workers have: who computes them, and how they fail."""

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from dbos import DBOSClient

from app import queue
from app.database import read, write
from app.models import Analysis, AnalysisCheckpoint, Point, Turn, Worker, now
from tests import services
from tests.services import Service, until
from tests.workers.test_turns import open_turns, sweep
from workers import attempts, turns
from workers.demand import Demand
from workers.locks import Line
from workers.tasks import EvaluationTask, Json, Result
from workers.turns import Begun

# What a worker tells of one input at a time.
RAN_OUT: Json = {
    "type": "urn:interplay:problem:out-of-memory",
    "title": "Memory ran out",
    "detail": "Memory ran out with 1 inputs at a time.",
    "batch_size": 1,
}
SMALL, MIDDLE, LARGE = 1000, 4000, 16_000


@pytest.fixture
def engine(engine_with_tables: sa.Engine) -> sa.Engine:
    """Return an engine on a database with three living workers, which are named after their memory."""
    with write(engine_with_tables) as session:
        for name, memory in (("small", SMALL), ("middle", MIDDLE), ("large", LARGE)):
            session.add(
                Worker(
                    id=name,
                    host="h",
                    pid=1,
                    memory_bytes=memory,
                    started_at=now() - timedelta(hours=1),
                    heartbeat_at=now(),
                )
            )
    return engine_with_tables


@pytest.fixture
def client(queue_client: DBOSClient) -> DBOSClient:
    return queue_client


def evaluation(engine: sa.Engine, client: DBOSClient, *, n_parameters: int) -> str:
    """Queue an evaluation of a network of so many parameters; return its id."""
    other = sweep(engine, client, n_parameters=n_parameters)
    with write(engine) as session:
        of_sweep = session.get_one(Analysis, other)
        row = Analysis(
            kind="evaluation",
            name="c",
            options={},
            request_sha256="0" * 64,
            probe_id=of_sweep.probe_id,
            checkpoints=[AnalysisCheckpoint(position=0, checkpoint_id=of_sweep.checkpoints[0].checkpoint_id)],
        )
        session.add(row)
        session.flush()
        queue.enqueue_analysis(client, session, row)
        return row.id


def end_workers(engine: sa.Engine, *names: str, ago: timedelta = timedelta(0)) -> None:
    with write(engine) as session:
        session.execute(sa.update(Worker).where(Worker.id.in_(names)).values(ended_at=now() - ago))


def queues_of(engine: sa.Engine, client: DBOSClient, ids: list[str]) -> list[str | None]:
    """Return the queues on which turns wait."""
    runs = {run.workflow_id: run.queue_name for run in client.list_workflows(workflow_ids=ids)}
    return [runs[id_] for id_ in ids]


def status(engine: sa.Engine, analysis_id: str) -> str:
    with read(engine) as session:
        query = sa.select(queue.status_of(engine.dialect.name, Analysis)).where(Analysis.id == analysis_id)
        return session.scalars(query).one()


def row(engine: sa.Engine, analysis_id: str) -> Analysis:
    with read(engine) as session:
        return session.get_one(Analysis, analysis_id)


def ran_out(memory_bytes: int) -> Result:
    """Return the result of a step for which a worker of so much memory was too small."""
    return Result(outcome="failed", problem=RAN_OUT, too_little_bytes=memory_bytes)


def heal(engine: sa.Engine, client: DBOSClient, id_: str) -> bool:
    return turns.heal(engine, client, "small", id_, memory_patience_seconds=60)


def finish_whole(engine: sa.Engine, client: DBOSClient, worker: str, id_: str, result: Result) -> bool:
    return attempts.finish(engine, client, worker, id_, result, memory_patience_seconds=60)


def finish(engine: sa.Engine, client: DBOSClient, worker: str, begun: Begun, number: int, result: Result) -> None:
    turns.finish(engine, client, worker, begun.task, number, result, memory_patience_seconds=60)


def begin_whole(engine: sa.Engine, client: DBOSClient, worker: str, id_: str) -> Any:
    return attempts.begin(engine, client, worker, id_, 3)


def test_an_evaluation_goes_to_a_worker_that_has_enough(engine: sa.Engine, client: DBOSClient) -> None:
    """Its weights are 12,000 bytes: the worker that takes it first plans it for the one that has as much."""
    id_ = evaluation(engine, client, n_parameters=3000)
    assert begin_whole(engine, client, "middle", id_) is None
    assert status(engine, id_) == "queued"
    assert (row(engine, id_).attempts, row(engine, id_).needs_bytes) == (0, 12_000)
    # The run is repeated if its worker dies now: it has nothing to do.
    assert begin_whole(engine, client, "large", id_) is None
    assert heal(engine, client, id_) is False
    (turn,) = open_turns(engine, id_)
    assert queues_of(engine, client, [turn]) == [queue.sized(LARGE)]
    begun = turns.begin(engine, client, "large", turn)
    assert begun is not None
    claimed = turns.claim(engine, "large", turn, begun.task, max_attempts=3, first=None)
    assert claimed is not None
    assert isinstance(claimed.step, EvaluationTask)
    assert status(engine, id_) == "running"
    finish(engine, client, "large", begun, claimed.number, Result(outcome="failed", problem={"type": "x"}))
    assert status(engine, id_) == "failed"
    assert (row(engine, id_).attempts, row(engine, id_).problem) == (1, {"type": "x"})
    assert open_turns(engine, id_) == []
    assert heal(engine, client, id_) is True


def test_an_evaluation_that_ran_out_of_memory_goes_to_a_larger_worker(engine: sa.Engine, client: DBOSClient) -> None:
    """What the estimate did not say is learnt: it goes to the next larger workers, and fails on the largest."""
    id_ = evaluation(engine, client, n_parameters=1)
    assert begin_whole(engine, client, "small", id_) is not None
    assert finish_whole(engine, client, "small", id_, ran_out(SMALL)) is False
    assert heal(engine, client, id_) is False
    for worker, memory in (("middle", MIDDLE), ("large", LARGE)):
        (turn,) = open_turns(engine, id_)
        assert queue.sized(memory) in (queue.sized(MIDDLE), *queues_of(engine, client, [turn]))
        begun = turns.begin(engine, client, worker, turn)
        assert begun is not None
        claimed = turns.claim(engine, worker, turn, begun.task, max_attempts=3, first=None)
        assert claimed is not None
        finish(engine, client, worker, begun, claimed.number, ran_out(memory))
        assert turns.claim(engine, worker, turn, begun.task, max_attempts=3, first=None) is None
        turns.end(engine, client, worker, turn)
    problem = row(engine, id_).problem
    assert problem is not None
    assert (problem["needs_bytes"], problem["largest_bytes"], problem["batch_size"]) == (LARGE + 1, LARGE, 1)
    assert problem["detail"] == (
        "Memory ran out with 1 inputs at a time. It needs at least 15.6 KiB of device memory; the largest worker has "
        "15.6 KiB."
    )
    assert problem["type"] == RAN_OUT["type"]


def test_without_a_larger_worker_the_first_failure_ends_it(engine: sa.Engine, client: DBOSClient) -> None:
    """Alike workers do not try one after the other what has been too much for one of them."""
    id_ = evaluation(engine, client, n_parameters=1)
    assert begin_whole(engine, client, "large", id_) is not None
    assert finish_whole(engine, client, "large", id_, ran_out(LARGE)) is True
    assert status(engine, id_) == "failed"
    problem = row(engine, id_).problem
    assert problem is not None
    assert problem["largest_bytes"] == LARGE


@pytest.mark.parametrize("planned", [False, True])
def test_what_no_worker_can_take_fails_with_both_figures(engine: sa.Engine, client: DBOSClient, planned: bool) -> None:
    """It fails at once where no worker has enough; one that ended a moment ago may come back and is waited for."""
    if planned:
        id_ = sweep(engine, client, n_parameters=1500)  # twice 6,000 bytes
        assert turns.begin(engine, client, "small", f"{id_}.0") is None
    else:
        id_ = evaluation(engine, client, n_parameters=3000)
        assert begin_whole(engine, client, "small", id_) is None
    end_workers(engine, "large", ago=timedelta(seconds=30))
    assert heal(engine, client, id_) is False
    assert open_turns(engine, id_) == []
    end_workers(engine, "large", ago=timedelta(seconds=90))
    assert heal(engine, client, id_) is True
    problem = row(engine, id_).problem
    assert problem is not None
    assert (problem["needs_bytes"], problem["largest_bytes"]) == (12_000, MIDDLE)
    assert problem["detail"] == "It needs at least 11.7 KiB of device memory; the largest worker has 3.9 KiB."
    assert problem["title"] == "Memory ran out"


def test_points_wait_for_workers_that_have_enough(engine: sa.Engine, client: DBOSClient) -> None:
    """A point for which memory ran out, and all after it, are computed by larger workers; finished ones are kept."""
    id_ = sweep(engine, client, n_parameters=1)
    begun = turns.begin(engine, client, "small", f"{id_}.0")
    assert begun is not None
    claimed = turns.claim(engine, "small", f"{id_}.0", begun.task, max_attempts=3, first=None)
    assert claimed is not None
    finish(engine, client, "small", begun, claimed.number, ran_out(SMALL))
    assert turns.claim(engine, "small", f"{id_}.0", begun.task, max_attempts=3, first=None) is None
    turns.end(engine, client, "small", f"{id_}.0")
    # One had been queued for anybody before: whoever is too small passes it on.
    turn, *_ = open_turns(engine, id_)
    assert queues_of(engine, client, [turn]) == [queue.QUEUE]
    assert turns.begin(engine, client, "small", turn) is None
    large = open_turns(engine, id_)
    assert len(large) == 2
    assert set(queues_of(engine, client, large)) <= {queue.sized(MIDDLE), queue.sized(LARGE)}
    again = turns.begin(engine, client, "large", large[0])
    assert again is not None
    point = turns.claim(engine, "large", large[0], again.task, max_attempts=3, first=None)
    assert point is not None
    assert point.number == 0


def test_turns_leave_the_queue_of_a_worker_that_is_gone(engine: sa.Engine, client: DBOSClient) -> None:
    """A turn that waits for workers of one memory goes to others once none of them lives."""
    id_ = evaluation(engine, client, n_parameters=500)
    assert begin_whole(engine, client, "small", id_) is None
    assert heal(engine, client, id_) is False
    (turn,) = open_turns(engine, id_)
    (before,) = queues_of(engine, client, [turn])
    name, other = ("middle", LARGE) if before == queue.sized(MIDDLE) else ("large", MIDDLE)
    end_workers(engine, name)
    assert heal(engine, client, id_) is False
    (moved,) = open_turns(engine, id_)
    assert moved != turn
    assert queues_of(engine, client, [moved]) == [queue.sized(other)]


def test_a_cancelled_one_ends(engine: sa.Engine, client: DBOSClient) -> None:
    """One that waits for a larger worker can be cancelled, and its turn then finds nothing to do."""
    id_ = evaluation(engine, client, n_parameters=3000)
    assert begin_whole(engine, client, "small", id_) is None
    heal(engine, client, id_)
    (turn,) = open_turns(engine, id_)
    with write(engine) as session:
        queue.cancel(session, engine.dialect.name, session.get_one(Analysis, id_))
    assert status(engine, id_) == "cancelled"
    assert turns.begin(engine, client, "large", turn) is None


def test_a_run_that_ended_is_not_taken_for_lost(engine: sa.Engine, client: DBOSClient) -> None:
    """The first run of an evaluation ends where its plan goes on; once that has ended too, the evaluation is lost."""
    id_ = evaluation(engine, client, n_parameters=3000)
    assert begin_whole(engine, client, "small", id_) is None
    with read(engine) as session:
        ended = sa.select(queue.has_ended(engine.dialect.name, Analysis)).where(Analysis.id == id_)
        client.cancel_workflow(id_)
        assert not session.scalar(ended)
    client.cancel_workflow(f"{id_}.plan")
    with read(engine) as session:
        assert session.scalar(ended)


def test_a_result_is_of_the_worker_that_computed_it(engine: sa.Engine, client: DBOSClient) -> None:
    """A worker that dies before it records how it ended leaves that to a larger one, which has not tried it."""
    id_ = evaluation(engine, client, n_parameters=1)
    assert begin_whole(engine, client, "middle", id_) is not None
    assert finish_whole(engine, client, "large", id_, ran_out(MIDDLE)) is False
    assert row(engine, id_).needs_bytes == MIDDLE + 1
    (turn,) = open_turns(engine, id_)
    assert queues_of(engine, client, [turn]) == [queue.sized(LARGE)]


def test_what_needs_more_is_spread_over_workers(engine: sa.Engine, client: DBOSClient) -> None:
    """Of two workers of 4,000 bytes and three of 16,000 each gets two of ten evaluations that both can take."""
    with write(engine) as session:
        for name, memory in (("middle 2", MIDDLE), ("large 2", LARGE), ("large 3", LARGE)):
            about = {"host": "h", "pid": 1, "started_at": now(), "heartbeat_at": now()}
            session.add(Worker(id=name, memory_bytes=memory, **about))
    waiting = []
    for _ in range(10):
        id_ = evaluation(engine, client, n_parameters=500)
        assert begin_whole(engine, client, "small", id_) is None
        waiting += open_turns(engine, id_)
    found = queues_of(engine, client, waiting)
    assert [found.count(queue.sized(memory)) for memory in (MIDDLE, LARGE)] == [4, 6]


def test_a_fleet_that_starts_is_waited_for(engine: sa.Engine, client: DBOSClient) -> None:
    """As at an upgrade: while no worker has lived for a minute, a larger one may be about to start."""
    end_workers(engine, "large", "middle", ago=timedelta(hours=1))
    with write(engine) as session:
        session.execute(sa.update(Worker).where(Worker.id == "small").values(started_at=now() - timedelta(seconds=50)))
    id_, ran = evaluation(engine, client, n_parameters=3000), evaluation(engine, client, n_parameters=1)
    assert begin_whole(engine, client, "small", id_) is None
    assert heal(engine, client, id_) is False
    assert begin_whole(engine, client, "small", ran) is not None
    assert finish_whole(engine, client, "small", ran, ran_out(SMALL)) is False
    with write(engine) as session:
        session.execute(sa.update(Worker).where(Worker.id == "small").values(started_at=now() - timedelta(seconds=70)))
    for one in (id_, ran):
        assert heal(engine, client, one) is True
        assert status(engine, one) == "failed"


def test_the_failure_of_a_point_is_told_before_that_of_the_fleet(engine: sa.Engine, client: DBOSClient) -> None:
    """A point for which no worker is large enough ends the analysis when those before it are done, with its number."""
    id_ = sweep(engine, client, n_parameters=1)
    end_workers(engine, "middle", "large", ago=timedelta(hours=1))
    begun = turns.begin(engine, client, "small", f"{id_}.0")
    assert begun is not None
    numbers = []
    for _ in range(2):
        claimed = turns.claim(engine, "small", f"{id_}.0", begun.task, max_attempts=3, first=None)
        assert claimed is not None
        numbers.append(claimed.number)
        with write(engine) as session:
            session.execute(sa.update(Point).where(Point.number == claimed.number).values(turn_id="another"))
    finish(engine, client, "small", begun, numbers[1], ran_out(SMALL))
    assert heal(engine, client, id_) is False
    done = Result(outcome="failed", problem={"type": "of an earlier point"})
    finish(engine, client, "small", begun, numbers[0], done)
    assert row(engine, id_).problem == {"type": "of an earlier point"}


def test_a_small_worker_stays_though_larger_ones_are_waited_for(engine: sa.Engine, client: DBOSClient) -> None:
    """Its turn is not over because of a turn that it could not take."""
    other = evaluation(engine, client, n_parameters=500)
    assert begin_whole(engine, client, "small", other) is None
    client.cancel_workflow(other)  # its first run, which has ended
    id_ = sweep(engine, client, n_parameters=1)
    assert turns.begin(engine, client, "small", f"{id_}.0") is not None
    with write(engine) as session:
        session.execute(sa.update(Turn).where(Turn.analysis_id.not_in([other, id_])).values(ended_at=now()))
    used = {"used_seconds": 3600.0, "waited_seconds": 0.0}
    assert not turns.lets_others(engine, "small", id_, **used)
    assert turns.lets_others(engine, "middle", id_, **used)


def test_a_worker_claims_from_one_queue_at_a_time(engine: sa.Engine, client: DBOSClient, line: Line) -> None:
    """Nothing while it computes; where both queues have work they take turns, and one alone does not wait."""
    large = queue.sized(SMALL)
    busy = False
    ages = {queue.QUEUE: 0.0, large: 0.0}
    demand = Demand(line, engine.dialect.name, ages, [queue.QUEUE, large], lambda: busy)
    assert not demand.is_for(queue.QUEUE)
    evaluation(engine, client, n_parameters=1)
    assert demand.is_for(queue.QUEUE)
    assert demand.is_for(queue.QUEUE)
    with write(engine) as session:
        queue.enqueue(client, session, "sized", queue=large)
    # The other thread may still be claiming; then it is this queue's turn.
    assert not demand.is_for(large)
    assert not demand.is_for(queue.QUEUE)
    until(lambda: demand.is_for(large), seconds=10)
    busy = True
    assert not demand.is_for(queue.QUEUE)
    assert not demand.is_for(large)
    busy = False
    until(lambda: demand.is_for(queue.QUEUE), seconds=10)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service whose worker may use a thousand bytes; tests add a larger one."""
    data_dir = tmp_path_factory.mktemp("mixed") / "data"
    with services.running(
        data_dir, device_memory_bytes="1000", memory_patience_seconds="0", queue_polling_seconds="0.1"
    ) as service:
        yield service


def test_a_mixed_fleet(mixed: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Alone, a small worker fails a network of 10 kB at once; beside a large one it passes it on."""
    service = mixed
    checkpoint = service.post("/v1/checkpoints", {"name": "net"}, mlp_checkpoint_file).json()
    probe = service.post("/v1/probes", {"name": "digits"}, digits_probe_file).json()
    ids = {"checkpoint_id": checkpoint["id"], "probe_id": probe["id"]}
    options = {"null_permutations": 0}
    sweep_ = {"kind": "pruning", **ids, "options": {**options, "sparsities": [0.0, 0.5, 0.9]}}
    weights = 4 * checkpoint["n_parameters"]
    for body, needs in (({**ids, "options": options}, weights), (sweep_, 2 * weights)):
        failed = service.wait(service.analyze(**body)["id"], seconds=30)
        assert failed["status"] == "failed"
        assert failed["attempts"] == 0
        assert (failed["problem"]["needs_bytes"], failed["problem"]["largest_bytes"]) == (needs, 1000)
    with services.worker(service, device_memory_bytes=str(2**30)):
        told = until(partial(_memories, service, 2))
        assert sorted(told) == [1000, 2**30]
        for body in ({**ids, "options": options}, sweep_):
            done = service.wait(service.analyze(**body)["id"], seconds=60)
            assert done["status"] == "succeeded", done
            assert done["attempts"] == 1


def _memories(service: Service, count: int) -> list[int] | None:
    workers = service.client.get("/v1/version").json()["workers"]
    return [worker["memory_bytes"] for worker in workers] if len(workers) == count else None

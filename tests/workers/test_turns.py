"""Points and turns in the database, on both: who may take what, and what a lost turn leaves."""

import json
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dbos import DBOSClient
from sqlalchemy.orm import Session

from app import queue
from app.database import read, write
from app.models import Analysis, AnalysisCheckpoint, Blob, Checkpoint, Point, Probe, Turn, Worker, now
from app.settings import Settings
from app.storage import Storage
from tests.workers.examples import known, split
from workers import plans, turns
from workers.attempts import TakenOver
from workers.child import ComputeChild
from workers.steps import Host
from workers.tasks import Json, Known, PruningAnswer, PruningPointTask, PruningReportTask, PruningTask, Result
from workers.turns import Fleet

SPARSITIES = [0.0, 0.2, 0.4, 0.6, 0.8]


@pytest.fixture
def engine(engine_with_tables: sa.Engine) -> sa.Engine:
    """Return an engine on a database with all tables and two living workers, `w0` and `w1`."""
    with write(engine_with_tables) as session:
        for name in ("w0", "w1"):
            session.add(Worker(id=name, host="h", pid=1, started_at=now(), heartbeat_at=now()))
    return engine_with_tables


@pytest.fixture
def client(queue_client: DBOSClient) -> DBOSClient:
    return queue_client


def sweep(engine: sa.Engine, client: DBOSClient, *, n_parameters: int = 1) -> str:
    """Queue a pruning sweep of five sparsities, of a network of so many parameters; return its id."""
    with write(engine) as session:
        sha256 = uuid4().hex * 2
        session.add(Blob(sha256=sha256, size_bytes=1))
        session.flush()
        checkpoint = Checkpoint(
            name="c", sha256=sha256, size_bytes=1, n_parameters=n_parameters, metadata_={}, prefix="", ignored={},
            architecture={"family": "builtin", "name": "mlp", "args": {}},
        )  # fmt: skip
        probe = Probe(
            name="p", sha256=sha256, size_bytes=1, format="npz", content="tensors", n_samples=4, n_classes=2,
            class_counts=[2, 2], splits={}, metadata_={},
        )  # fmt: skip
        session.add_all([checkpoint, probe])
        session.flush()
        row = Analysis(
            kind="pruning",
            name="c",
            options={"sparsities": SPARSITIES},
            request_sha256="0" * 64,
            probe_id=probe.id,
            checkpoints=[AnalysisCheckpoint(position=0, checkpoint_id=checkpoint.id)],
        )
        session.add(row)
        session.flush()
        queue.enqueue_analysis(client, session, row)
        return row.id


def open_turns(engine: sa.Engine, analysis_id: str) -> list[str]:
    """Return the turns of an analysis that have not ended, in their order."""
    with read(engine) as session:
        query = sa.select(Turn.id).where(Turn.analysis_id == analysis_id, Turn.ended_at.is_(None))
        return sorted(session.scalars(query))


def begun(engine: sa.Engine, client: DBOSClient, turn: str, worker: str = "w0") -> PruningTask:
    """Begin a turn; return its task."""
    found = turns.begin(engine, client, worker, turn)
    assert found is not None
    assert isinstance(found.task, PruningTask)
    return found.task


def claimed(engine: sa.Engine, task: PruningTask, turn: str, worker: str = "w0") -> int:
    """Take the next point; return its number."""
    return taken(engine, task, turn, worker).number


def taken(
    engine: sa.Engine, task: PruningTask, turn: str, worker: str = "w0", *, first: Known | None = None
) -> PruningPointTask:
    """Take the next point; return its step."""
    found = turns.claim(engine, worker, turn, task, max_attempts=3, first=first)
    assert found is not None
    assert isinstance(found.step, PruningPointTask)
    assert found.step.number == found.number
    return found.step


def answer(sparsity: float) -> Json:
    """Return an answer for a sparsity, as the compute process gives it."""
    members = {**dict(known()), "n_prunable": 2}
    point = {"sparsity": sparsity, "n_pruned": 0, "splits": {"all": split(0.5)}}
    found = PruningAnswer.model_validate({"known": members, "point": point, "timings_seconds": {}})
    return dict(found.model_dump(mode="json", by_alias=True))


def finished(engine: sa.Engine, client: DBOSClient, task: PruningTask, number: int, worker: str = "w0") -> None:
    """Finish a point as computed."""
    result = Result(outcome="succeeded", body=answer(SPARSITIES[number]))
    turns.finish(engine, client, worker, task, number, result, memory_patience_seconds=60)


def row_of(session: Session, analysis_id: str) -> Analysis:
    return session.get_one(Analysis, analysis_id)


def test_rounds_follow_each_other(engine: sa.Engine, client: DBOSClient) -> None:
    """The first round has two points, the next has all others and a turn for each worker, and the report comes last."""
    id_ = sweep(engine, client)
    first, second = f"{id_}.0", f"{id_}.1"
    assert open_turns(engine, id_) == [first]
    task = begun(engine, client, first)
    assert open_turns(engine, id_) == [first, second]
    assert turns.begin(engine, client, "w1", second) is not None
    assert [claimed(engine, task, first), claimed(engine, task, second, "w1")] == [0, 1]
    assert claimed(engine, task, first) == 0
    finished(engine, client, task, 1, "w1")
    assert turns.claim(engine, "w1", second, task, max_attempts=3, first=None) is None
    turns.end(engine, client, "w1", second)
    finished(engine, client, task, 0)
    assert open_turns(engine, id_) == [first, f"{id_}.2"]
    for number in (2, 3, 4):
        # The points of the first round have no such facts, whether or not the first was finished before them.
        step = taken(engine, task, first)
        assert step.number == number
        assert step.first is not None
        finished(engine, client, task, number)
    report = turns.claim(engine, "w0", first, task, max_attempts=3, first=None)
    assert report is not None
    assert isinstance(report.step, PruningReportTask)
    assert [point.point.sparsity for point in report.step.points] == SPARSITIES
    with read(engine) as session:
        assert (row_of(session, id_).progress_done, row_of(session, id_).progress_total) == (5, 5)


def test_a_point_is_finished_once(engine: sa.Engine, client: DBOSClient) -> None:
    """A second answer for a point, from a worker that was thought dead, changes nothing."""
    id_ = sweep(engine, client)
    task = begun(engine, client, f"{id_}.0")
    claimed(engine, task, f"{id_}.0")
    finished(engine, client, task, 0)
    turns.finish(
        engine, client, "w1", task, 0, Result(outcome="failed", problem={"type": "late"}), memory_patience_seconds=60
    )
    with read(engine) as session:
        point = session.get_one(Point, (id_, 0))
        assert point.problem is None
        assert json.loads(point.answer or "")["point"]["sparsity"] == 0.0


def test_a_worker_that_was_taken_for_dead_writes_nothing(engine: sa.Engine, client: DBOSClient) -> None:
    """Whatever a worker wants to write after others have taken its work over is refused, and its progress ends it."""
    id_ = sweep(engine, client)
    turn = f"{id_}.0"
    task = begun(engine, client, turn)
    claimed(engine, task, turn)
    with write(engine) as session:
        session.execute(sa.update(Worker).where(Worker.id == "w0").values(ended_at=now()))
    assert turns.note(engine, "w0", id_, None)
    for call in (
        lambda: claimed(engine, task, turn),
        lambda: finished(engine, client, task, 0),
        lambda: turns.end(engine, client, "w0", turn),
        lambda: turns.begin(engine, client, "w0", turn),
    ):
        with pytest.raises(TakenOver):
            call()
    # Its turn goes on elsewhere, with the point that it had taken.
    assert claimed(engine, task, turn, "w1") == 0


def test_a_lost_turn_leaves_its_points_to_others(engine: sa.Engine, client: DBOSClient) -> None:
    """A turn that ended in the queue without saying so is closed, and its point waits again."""
    id_ = sweep(engine, client)
    first, second = f"{id_}.0", f"{id_}.1"
    task = begun(engine, client, first)
    assert claimed(engine, task, first) == 0
    client.cancel_workflow(first)
    assert not turns.heal(engine, client, "w0", id_, memory_patience_seconds=60)
    assert open_turns(engine, id_) == [second, f"{id_}.2"]
    assert claimed(engine, task, second, "w1") == 0
    with read(engine) as session:
        assert session.get_one(Point, (id_, 0)).attempts == 2


def test_an_analysis_without_any_turn_gets_one(engine: sa.Engine, client: DBOSClient) -> None:
    """A plan whose first turn was lost before it began makes another."""
    id_ = sweep(engine, client)
    client.cancel_workflow(f"{id_}.0")
    assert not turns.heal(engine, client, "w0", id_, memory_patience_seconds=60)
    assert open_turns(engine, id_) == [f"{id_}.1"]


def test_a_point_that_kills_its_workers_is_given_up(engine: sa.Engine, client: DBOSClient) -> None:
    """After as many attempts at one point as are allowed the analysis fails, and says at which point."""
    id_ = sweep(engine, client)
    turn = f"{id_}.0"
    task = begun(engine, client, turn)
    assert [claimed(engine, task, turn) for _ in range(3)] == [0, 0, 0]
    assert turns.claim(engine, "w0", turn, task, max_attempts=3, first=None) is None
    with read(engine) as session:
        row = row_of(session, id_)
        assert (row.outcome, row.attempts) == ("failed", 3)
        assert row.problem is not None
        assert (row.problem["type"], row.problem["point"]) == ("urn:interplay:problem:too-many-attempts", 1)


def test_a_wish_to_cancel_ends_an_analysis_wherever_it_is_seen(engine: sa.Engine, client: DBOSClient) -> None:
    """A turn that begins, a turn that takes a point, and a plan each end an analysis that was cancelled."""
    for see in ("begin", "claim", "heal"):
        id_ = sweep(engine, client)
        turn = f"{id_}.0"
        task = begun(engine, client, turn) if see != "begin" else None
        with write(engine) as session:
            row_of(session, id_).cancel_requested_at = now()
        if see == "begin":
            assert turns.begin(engine, client, "w0", turn) is None
        elif see == "claim":
            assert task is not None
            assert turns.claim(engine, "w0", turn, task, max_attempts=3, first=None) is None
        else:
            assert turns.heal(engine, client, "w0", id_, memory_patience_seconds=60)
        with read(engine) as session:
            assert row_of(session, id_).outcome == "cancelled"


def test_a_point_of_the_first_round_never_knows_the_first(engine: sa.Engine, client: DBOSClient) -> None:
    """One worker gives the second point what two workers give it, though the first is finished when it begins."""
    id_ = sweep(engine, client)
    turn = f"{id_}.0"
    task = begun(engine, client, turn)
    assert claimed(engine, task, turn) == 0
    finished(engine, client, task, 0)
    step = taken(engine, task, turn, first=known())
    assert (step.number, step.first) == (1, None)


def test_the_failure_with_the_lowest_number_is_told(engine: sa.Engine, client: DBOSClient) -> None:
    """A point before a failed one is finished, or begun again, before the analysis ends; none after it is begun."""
    id_ = sweep(engine, client)
    first, second = f"{id_}.0", f"{id_}.1"
    task = begun(engine, client, first)
    begun(engine, client, second, "w1")
    for number in (0, 1):
        claimed(engine, task, first)
        finished(engine, client, task, number)
    assert [claimed(engine, task, first), claimed(engine, task, second, "w1")] == [2, 3]
    turns.finish(
        engine, client, "w1", task, 3, Result(outcome="failed", problem={"type": "later"}), memory_patience_seconds=60
    )
    assert turns.claim(engine, "w1", second, task, max_attempts=3, first=None) is None
    # The turn that has the earlier point is lost; another takes it, and it fails too.
    client.cancel_workflow(first)
    assert not turns.heal(engine, client, "w1", id_, memory_patience_seconds=60)
    assert claimed(engine, task, second, "w1") == 2
    turns.finish(
        engine, client, "w1", task, 2, Result(outcome="failed", problem={"type": "earlier"}), memory_patience_seconds=60
    )
    with read(engine) as session:
        row = row_of(session, id_)
        assert (row.outcome, row.problem) == ("failed", {"type": "earlier"})
    assert open_turns(engine, id_) == []


def test_a_point_before_a_failed_one_is_not_left_behind(engine: sa.Engine, client: DBOSClient) -> None:
    """Where the turn of an earlier point is lost after a later one failed, another turn computes it."""
    id_ = sweep(engine, client)
    first, second = f"{id_}.0", f"{id_}.1"
    task = begun(engine, client, first)
    begun(engine, client, second, "w1")
    assert [claimed(engine, task, first), claimed(engine, task, second, "w1")] == [0, 1]
    turns.finish(
        engine, client, "w1", task, 1, Result(outcome="failed", problem={"type": "later"}), memory_patience_seconds=60
    )
    turns.end(engine, client, "w1", second)
    assert open_turns(engine, id_) == [first]
    turns.end(engine, client, "w0", first)
    [third] = open_turns(engine, id_)
    assert claimed(engine, begun(engine, client, third), third) == 0
    finished(engine, client, task, 0)
    with read(engine) as session:
        assert row_of(session, id_).problem == {"type": "later"}


def test_an_ended_analysis_gets_no_turns(engine: sa.Engine, client: DBOSClient) -> None:
    """Points that are under way when an earlier one fails make no further turns."""
    id_ = sweep(engine, client)
    first, second = f"{id_}.0", f"{id_}.1"
    task = begun(engine, client, first)
    begun(engine, client, second, "w1")
    assert [claimed(engine, task, first), claimed(engine, task, second, "w1")] == [0, 1]
    turns.finish(
        engine, client, "w0", task, 0, Result(outcome="failed", problem={"type": "first"}), memory_patience_seconds=60
    )
    assert turns.note(engine, "w1", id_, None)
    finished(engine, client, task, 1, "w1")
    turns.end(engine, client, "w1", second)
    assert open_turns(engine, id_) == []
    with read(engine) as session:
        assert row_of(session, id_).problem == {"type": "first"}
        assert session.scalar(sa.select(sa.func.count()).where(Turn.analysis_id == id_)) == 2


def test_a_turn_that_ends_in_the_middle_leaves_its_point(engine: sa.Engine, client: DBOSClient) -> None:
    """A turn that ends without finishing its point leaves it to others at once, and takes nothing more itself."""
    id_ = sweep(engine, client)
    first, second = f"{id_}.0", f"{id_}.1"
    task = begun(engine, client, first)
    assert claimed(engine, task, first) == 0
    turns.end(engine, client, "w0", first)
    assert turns.claim(engine, "w0", first, task, max_attempts=3, first=None) is None
    assert claimed(engine, task, second, "w1") == 0
    assert open_turns(engine, id_) == [second, f"{id_}.2"]


def test_a_fault_of_the_service_ends_the_analysis(engine: sa.Engine, client: DBOSClient, tmp_path: Path) -> None:
    """An answer that cannot be read, as of another version, fails the analysis; it does not come back for ever."""
    id_ = sweep(engine, client)
    turn = f"{id_}.0"
    task = begun(engine, client, turn)
    for number in (0, 1):
        claimed(engine, task, turn)
        finished(engine, client, task, number)
    with write(engine) as session:
        session.execute(sa.update(Point).where(Point.number == 0).values(answer='{"of": "another version"}'))
    settings = Settings(data_dir=tmp_path)
    host = Host("w0", settings, engine, client, Storage(settings), ComputeChild(settings), set())
    plans.take(host, turn)
    with read(engine) as session:
        row = row_of(session, id_)
        assert row.outcome == "failed"
        assert row.problem is not None
        assert row.problem["type"] == "urn:interplay:problem:internal-error"
        assert "ValidationError" in row.problem["detail"]
    assert open_turns(engine, id_) == []


def test_a_turn_lets_others_in_their_turn(engine: sa.Engine, client: DBOSClient) -> None:
    """An evaluation is let at once, a backlog of them in equal shares, another sweep after ten seconds."""
    id_ = sweep(engine, client)
    begun(engine, client, f"{id_}.0")
    begun(engine, client, f"{id_}.1", "w1")

    def lets(used_seconds: float, waited_seconds: float = 0.0) -> bool:
        return turns.lets_others(engine, "w0", id_, used_seconds=used_seconds, waited_seconds=waited_seconds)

    assert not lets(1000.0)
    other = sweep(engine, client)
    # It has two of two workers, and its share is one.
    assert lets(0.1)
    turns.end(engine, client, "w1", f"{id_}.1")
    assert not lets(9.0)
    assert lets(11.0)
    assert not lets(11.0, waited_seconds=20.0)
    begun(engine, client, f"{other}.0", "w1")
    assert not lets(1000.0)
    with write(engine) as session:
        queue.enqueue(client, session, str(uuid4()))
    assert lets(0.1, waited_seconds=20.0)
    with write(engine) as session:
        for _ in range(5):
            queue.enqueue(client, session, str(uuid4()))
    assert not lets(0.1, waited_seconds=20.0)
    assert lets(21.0, waited_seconds=20.0)
    assert lets(61.0, waited_seconds=36_000.0)


@pytest.mark.parametrize(
    ("fleet", "own", "most"),
    [
        (Fleet(workers=1, analyses=1, turns=1), 1, 1),
        (Fleet(workers=8, analyses=1, turns=1), 1, 8),
        (Fleet(workers=8, analyses=2, turns=8), 4, 4),
        # The other needs one worker only, and seven are left.
        (Fleet(workers=8, analyses=2, turns=5), 4, 7),
        (Fleet(workers=2, analyses=5, turns=5), 1, 1),
        (Fleet(workers=0, analyses=0, turns=0), 0, 1),
    ],
)
def test_workers_are_shared_between_analyses(fleet: Fleet, own: int, most: int) -> None:
    """An analysis has its share of the workers, those that nobody uses, and one turn at least."""
    assert fleet.most_turns(own) == most


def test_runs_of_the_version_before_are_adopted(engine: sa.Engine, client: DBOSClient) -> None:
    """A sweep that was queued by the earlier version, as one run, is planned by this one; an evaluation waits on."""
    id_ = sweep(engine, client)
    table = "workflow_status" if engine.dialect.name == "sqlite" else "dbos.workflow_status"
    evaluation = str(uuid4())
    with write(engine) as session:
        queue.enqueue(client, session, evaluation)
        session.execute(sa.delete(Turn))
    client.delete_workflows([f"{id_}.0"])
    with write(engine) as session:
        earlier = {"name": queue.WORKFLOW, "queue_name": queue.QUEUE, "application_version": "engine-1"}
        members = ", ".join(f"{name} = :{name}" for name in earlier)
        session.execute(sa.text(f"UPDATE {table} SET {members}"), earlier)
    queue.migrate(engine)
    runs = {run.workflow_id: (run.name, run.queue_name, run.app_version) for run in client.list_workflows()}
    assert runs == {
        id_: (queue.PLAN_WORKFLOW, queue.PLANS, queue.VERSION),
        evaluation: (queue.WORKFLOW, queue.QUEUE, queue.VERSION),
    }
    assert not turns.heal(engine, client, "w0", id_, memory_patience_seconds=60)
    assert open_turns(engine, id_) == [f"{id_}.0"]


def test_points_of_old_analyses_are_forgotten(engine: sa.Engine, client: DBOSClient) -> None:
    """Points and turns go a day after the end of their analysis."""
    old, recent = sweep(engine, client), sweep(engine, client)
    for id_, age in ((old, 2), (recent, 0)):
        begun(engine, client, f"{id_}.0")
        with write(engine) as session:
            row = row_of(session, id_)
            row.outcome, row.finished_at = "cancelled", now() - timedelta(days=age)
    with write(engine) as session:
        turns.clean(session, now() - timedelta(days=1))
        assert set(session.scalars(sa.select(Point.analysis_id))) == {recent}
        assert set(session.scalars(sa.select(Turn.analysis_id))) == {recent}

"""The points of planned analyses in the database: planned, taken in turns, finished, and made into a report.

A planned analysis goes in rounds. The points of a round need nothing of each other; all rounds but the first need the
facts of the first point. The transaction that finishes a round plans the next one, or the report. Workers take points
in turns: a turn is a run of the queue for one analysis, in which a worker computes one point after the other. There are
as many turns as workers can use, and each transaction here that makes or frees work sees to that.

Every function is one transaction that locks the analysis's row first, so that workers see each other's points whole.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from dbos import DBOSClient
from sqlalchemy.orm import Session

from app import queue, shards
from app.database import clock, read, write
from app.errors import problem
from app.models import Analysis, Point, Turn, Worker, now
from app.storage import Storage
from workers import attempts, memory
from workers.tasks import (
    Answer,
    Known,
    PlannedTask,
    PointStep,
    Progress,
    ReportStep,
    Result,
    TurnTask,
    WholeStep,
    answer_of,
    next_places,
    point_step,
    report_step,
)

logger = logging.getLogger("interplay")

# Shortest time that a worker stays with a planned analysis while others wait.
_QUANTUM_SECONDS = 10.0
# Longest time that a turn stays because it has waited as long: workers may have been away for hours.
_MOST_CREDIT_SECONDS = 60.0


@dataclass(frozen=True)
class Fleet:
    """What decides how many turns an analysis has.

    Attributes:
        workers: living workers, or those of them that have enough memory for an analysis.
        analyses: planned analyses that have turns and share these workers.
        turns: their turns, waiting and under way.
    """

    workers: int
    analyses: int
    turns: int

    @classmethod
    def now(cls, session: Session, workers: int, which: sa.ColumnElement[bool]) -> "Fleet":
        """Return the fleet of so many workers, shared by those of the planned analyses for which `which` holds."""
        shared = sa.select(sa.func.count(Turn.analysis_id.distinct()), sa.func.count()).join(
            Analysis, Analysis.id == Turn.analysis_id
        )
        analyses, turns = session.execute(shared.where(Turn.ended_at.is_(None), which)).one()
        return cls(workers, analyses, turns)

    @property
    def share(self) -> int:
        """An analysis's share of the workers, if they are shared alike."""
        return max(-(-self.workers // max(self.analyses, 1)), 1)

    def most_turns(self, own_turns: int) -> int:
        """Return how many turns an analysis may have: its share of the workers, and those that nobody else uses."""
        return max(self.share, own_turns + self.workers - self.turns)


@dataclass(frozen=True)
class Claimed:
    """A step that a turn has taken.

    Attributes:
        number: of the point; the report's follows those of all points.
        step: what is to be computed.
    """

    number: int
    step: PointStep | ReportStep | WholeStep


@dataclass(frozen=True)
class Begun:
    """A turn that has begun: its task, and the seconds that it waited for a worker."""

    task: TurnTask
    waited_seconds: float


def begin(engine: sa.Engine, client: DBOSClient, worker_id: str, turn_id: str) -> Begun | None:
    """Begin a turn, and plan the analysis if nobody has; None if there is nothing to do here.

    A worker with too little memory does nothing but queue turns for those that have enough.
    """
    with write(engine) as session:
        turn = session.get(Turn, turn_id)
        if turn is None or turn.ended_at is not None:
            return None
        row = _going_on(session, worker_id, turn.analysis_id)
        moment = clock(session)
        if row is None:
            turn.ended_at = moment
            return None
        task = attempts.task_of(session, row)
        needs = max(task.needs_bytes, row.needs_bytes or 0)
        if needs > memory.of_worker(session, worker_id):
            row.needs_bytes, turn.ended_at = needs, moment
            session.flush()
            supply(session, client, row)
            return None
        turn.began_at = turn.began_at or moment
        planned = sa.exists().where(Point.analysis_id == row.id)
        if not session.scalar(sa.select(planned)):
            _plan_further(session, row, task)
            supply(session, client, row)
        return Begun(task, (turn.began_at - turn.created_at).total_seconds())


def claim(
    engine: sa.Engine, worker_id: str, turn_id: str, task: TurnTask, *, max_attempts: int, first: Known | None
) -> Claimed | None:
    """Take the next point for a turn, or the report, and count an attempt at it.

    Args:
        engine: of the database.
        worker_id: the worker.
        turn_id: the turn; a point that it took and did not finish comes first.
        task: the analysis's task.
        max_attempts: most attempts at a point; after them the analysis fails.
        first: facts of the first point, if the turn knows them.

    Returns:
        The step; None if no point waits, the analysis has ended, or the worker has too little memory.
    """
    with write(engine) as session:
        row = _going_on(session, worker_id, task.analysis_id)
        # A turn that was closed meanwhile, as one of a worker that was thought dead, takes nothing more.
        if row is None or session.get_one(Turn, turn_id).ended_at is not None:
            return None
        if (row.needs_bytes or 0) > memory.of_worker(session, worker_id):
            return None
        point = session.scalar(
            sa.select(Point)
            .where(
                Point.analysis_id == row.id,
                Point.finished_at.is_(None),
                sa.or_(Point.turn_id.is_(None), Point.turn_id == turn_id),
            )
            .order_by(Point.turn_id.is_(None), Point.number)
            .limit(1)
        )
        if point is None:
            return None
        if point.attempts >= max_attempts:
            what = f"point {point.number + 1}"
            if point.place is None:
                what = "the report" if isinstance(task, PlannedTask) else "the analysis"
            detail = f"Its worker died in each of {point.attempts} attempts at {what}; it is not tried again."
            body = problem(
                "too-many-attempts",
                "The analysis was given up",
                detail,
                attempts=point.attempts,
                point=point.number + 1,
            )
            _end(session, row, Result(outcome="failed", problem=body))
            return None
        point.turn_id, point.attempts = turn_id, point.attempts + 1
        row.attempts, row.started_at = max(row.attempts, point.attempts), row.started_at or now()
        row.progress_phase = "report" if point.place is None else "point"
        _count(session, row)
        if point.place is None:
            return Claimed(point.number, report_step(task, _answers(session, task)))
        assert isinstance(task, PlannedTask)
        if point.number < task.n_first:
            first = None
        elif first is None:
            first = next((answer.known for answer in _answers(session, task, Point.number == 0)), None)
        return Claimed(point.number, point_step(task, number=point.number, place=point.place, first=first))


def note(engine: sa.Engine, worker_id: str, analysis_id: str, progress: Progress | None) -> bool:
    """Store progress within a point, if any; return whether the turn is to stop: the analysis ends, or this worker.

    Progress without a total is a phase alone; points stay counted.
    """
    alive = sa.exists().where(Worker.id == worker_id, Worker.ended_at.is_(None))
    going_on = sa.and_(
        Analysis.id == analysis_id, Analysis.outcome.is_(None), Analysis.cancel_requested_at.is_(None), alive
    )
    with engine.begin() as connection:
        if progress is None:
            return connection.scalar(sa.select(sa.literal(1)).where(going_on)) is None
        values: dict[str, int] = {}
        if progress.total:
            values = {"progress_done": progress.done, "progress_total": progress.total}
        told = sa.update(Analysis).where(going_on)
        return not connection.execute(told.values(progress_phase=progress.phase, **values)).rowcount


def finish(
    engine: sa.Engine,
    client: DBOSClient,
    worker_id: str,
    task: TurnTask,
    number: int,
    result: Result,
    *,
    memory_patience_seconds: float,
) -> None:
    """Record how a point ended, once; plan the next round, or end the analysis, if it was the last that was missing.

    A point for which its worker's memory was too little waits again, for workers that have more.
    """
    with write(engine) as session:
        row = _going_on(session, worker_id, task.analysis_id)
        if row is None:
            return
        point = session.get_one(Point, (row.id, number))
        if point.finished_at is not None:
            return
        needs = memory.needed(result)
        if needs is not None:
            memories = memory.Memories.now(session, memory_patience_seconds)
            if memories.may_have(needs):
                row.needs_bytes = max(needs, row.needs_bytes or 0)
                point.turn_id, point.attempts = None, point.attempts - 1
                return
            result = memory.too_little(needs, memories.largest, result.problem)
        if result.outcome == "cancelled":
            _end(session, row, result)
        elif point.place is None:
            point.finished_at = now()
            _end(session, row, result)
        else:
            point.finished_at, point.problem = now(), result.problem
            point.answer = None if result.body is None else json.dumps(result.body)
            session.flush()
            _count(session, row)
            _plan_further(session, row, task)
            supply(session, client, row)


def end(engine: sa.Engine, client: DBOSClient, worker_id: str, turn_id: str) -> None:
    """End a turn; what it leaves goes to further turns."""
    with write(engine) as session:
        analysis_id = _analysis_of(turn_id)
        row = _going_on(session, worker_id, analysis_id)
        _close(session, [turn_id])
        if row is not None:
            _after_failure(session, row)
            supply(session, client, row)


def give_up(engine: sa.Engine, worker_id: str, turn_id: str, fault: Result) -> None:
    """End the analysis of a turn that met a fault of the service."""
    with write(engine) as session:
        row = _going_on(session, worker_id, _analysis_of(turn_id))
        if row is not None:
            _end(session, row, fault)


def supply(session: Session, client: DBOSClient, row: Analysis) -> None:
    """Queue turns, so that a locked analysis has as many as it can use, unless it has ended meanwhile."""
    if row.outcome is not None:
        return
    queues: list[str] = []
    if row.needs_bytes is None:
        fleet = Fleet.now(session, _living(session), sa.true())
    else:
        queues = memory.living(session, row.needs_bytes)
        if not queues:
            return
        # Turns that any worker may take make room for these when their time is over.
        fleet = Fleet.now(session, len(queues), Analysis.needs_bytes.is_not(None))
    points, finished = session.execute(
        sa.select(sa.func.count(), sa.func.count(Point.finished_at)).where(Point.analysis_id == row.id)
    ).one()
    own = session.scalar(sa.select(sa.func.count()).where(Turn.analysis_id == row.id, Turn.ended_at.is_(None)))
    assert own is not None
    # The first turn plans the points.
    usable = points - finished if points else 1
    count = max(min(usable, fleet.most_turns(own)) - own, 0)
    where = memory.least_taken(session, queues, count) if queues else [queue.QUEUE] * count
    queue.enqueue_turns(client, session, row.id, where)


def heal(
    engine: sa.Engine, client: DBOSClient, worker_id: str, analysis_id: str, *, memory_patience_seconds: float
) -> bool:
    """Free points of turns that were lost, queue turns for workers that came; return whether the analysis has ended.

    It ends here if it is to be cancelled, and if it needs more memory than any worker has.
    """
    with write(engine) as session:
        row = _going_on(session, worker_id, analysis_id)
        if row is None:
            return True
        ended = queue.has_status(engine.dialect.name, Turn.id.expression, *queue.ENDED)
        lost = list(
            session.scalars(sa.select(Turn.id).where(Turn.analysis_id == analysis_id, Turn.ended_at.is_(None), ended))
        )
        stray: list[str] = []
        if row.needs_bytes is not None:
            memories = memory.Memories.now(session, memory_patience_seconds)
            if not memories.may_have(row.needs_bytes) and not _after_failure(session, row):
                _end(session, row, memory.too_little(row.needs_bytes, memories.largest))
                return True
            stray = queue.waiting_for_nobody(session, analysis_id, memory.living(session, row.needs_bytes))
        if lost:
            logger.warning("turns ended without saying so: %s", ", ".join(lost))
        if lost or stray:
            _close(session, [*lost, *stray])
            _after_failure(session, row)
        supply(session, client, row)
        return row.outcome is not None


def lets_others(
    engine: sa.Engine, worker_id: str, analysis_id: str, *, used_seconds: float, waited_seconds: float
) -> bool:
    """Return whether a turn should end between two points, because others wait for a worker.

    An analysis of one step is let before the next point; where more of them wait than there are workers, a turn goes
    on for as long as it has waited itself, a minute at most. Other planned analyses are let where this one has more
    than its share of the workers, and else every ten seconds, since a worker must load what they need.
    """
    with read(engine) as session:
        # What needs more memory than this worker has would not be let by it.
        takes = sa.func.coalesce(Analysis.needs_bytes, 0) <= memory.of_worker(session, worker_id)
        fleet, waited_seconds = Fleet.now(session, _living(session), takes), min(waited_seconds, _MOST_CREDIT_SECONDS)
        whole = queue.count_waiting(session, most=fleet.workers + 1)
        if whole and (whole <= fleet.workers or used_seconds >= waited_seconds):
            return True
        waiting = sa.exists().where(
            Turn.analysis_id != analysis_id,
            Turn.began_at.is_(None),
            Turn.ended_at.is_(None),
            Analysis.id == Turn.analysis_id,
            takes,
        )
        if not session.scalar(sa.select(waiting)):
            return False
        own = sa.select(sa.func.count()).where(
            Turn.analysis_id == analysis_id, Turn.began_at.is_not(None), Turn.ended_at.is_(None)
        )
        has_too_many = (session.scalar(own) or 0) > fleet.share
        return has_too_many or used_seconds >= max(_QUANTUM_SECONDS, waited_seconds)


def _living(session: Session) -> int:
    """Return the number of living workers."""
    return session.scalar(sa.select(sa.func.count()).where(Worker.ended_at.is_(None))) or 0


def _going_on(session: Session, worker_id: str, analysis_id: str) -> Analysis | None:
    """Return an analysis, locked, unless it has ended; end it if that was asked for.

    Raises:
        TakenOver: others have taken this worker for dead.
    """
    row = session.get(Analysis, analysis_id, with_for_update=True, populate_existing=True)
    attempts.require_alive(session, worker_id)
    if row is None or row.outcome is not None:
        return None
    if row.cancel_requested_at is not None:
        _end(session, row, Result(outcome="cancelled"))
        return None
    return row


def _plan_further(session: Session, row: Analysis, task: TurnTask) -> None:
    """Plan the points of the next round, or the report, once all of the last round are finished."""
    if _after_failure(session, row):
        return
    unfinished = sa.select(Point.number).where(Point.analysis_id == row.id, Point.finished_at.is_(None))
    if session.scalar(unfinished.limit(1)) is not None:
        return
    answers = _answers(session, task)
    places: Sequence[float | None] = next_places(task, answers) or [None]
    for number, place in enumerate(places, start=len(answers)):
        session.add(Point(analysis_id=row.id, number=number, place=place))
    session.flush()


def _after_failure(session: Session, row: Analysis) -> bool:
    """Return whether a point has failed; if so nothing beyond it is begun, and with all before it the analysis ends.

    The failure that is told is that of the point with the lowest number, however many workers there are: points are
    begun in the order of their numbers, so those before it are under way, or done, or wait again.
    """
    of_this = Point.analysis_id == row.id
    failed = sa.select(Point).where(of_this, Point.problem.is_not(None)).order_by(Point.number).limit(1)
    point = session.scalar(failed)
    if point is None:
        return False
    unfinished = sa.select(Point.number).where(of_this, Point.finished_at.is_(None), Point.number < point.number)
    if session.scalar(unfinished.limit(1)) is None:
        _end(session, row, Result(outcome="failed", problem=point.problem))
    beyond = sa.delete(Point).where(of_this, Point.number > point.number)
    session.execute(beyond.where(Point.finished_at.is_(None), Point.turn_id.is_(None)))
    return True


def _close(session: Session, turn_ids: Sequence[str]) -> None:
    """End turns; points that they took and did not finish wait again."""
    still = sa.update(Turn).where(Turn.id.in_(turn_ids), Turn.ended_at.is_(None))
    session.execute(still.values(ended_at=clock(session)))
    held = sa.update(Point).where(Point.analysis_id == _analysis_of(turn_ids[0]), Point.finished_at.is_(None))
    session.execute(held.where(Point.turn_id.in_(turn_ids)).values(turn_id=None))


def _analysis_of(turn_id: str) -> str:
    return turn_id.rpartition(".")[0]


def _answers(session: Session, task: TurnTask, *which: sa.ColumnElement[bool]) -> list[Answer]:
    """Return the answers for points, in the order of their numbers."""
    if not isinstance(task, PlannedTask):
        return []
    query = sa.select(Point.answer).where(Point.analysis_id == task.analysis_id, Point.answer.is_not(None), *which)
    return [answer_of(task, json.loads(text)) for text in session.scalars(query.order_by(Point.number)) if text]


def _count(session: Session, row: Analysis) -> None:
    """Count the points of an analysis as its progress."""
    session.flush()
    done, total = session.execute(
        sa.select(sa.func.count(Point.finished_at), sa.func.count()).where(
            Point.analysis_id == row.id, Point.place.is_not(None)
        )
    ).one()
    row.progress_done, row.progress_total = done, total


def _end(session: Session, row: Analysis, result: Result) -> None:
    """Record the outcome, close all turns, and forget the answers, which the report has."""
    attempts.record(session, row, result)
    session.execute(sa.update(Point).where(Point.analysis_id == row.id).values(answer=None))


def tidy(engine: sa.Engine, storage: Storage, analysis_id: str) -> None:
    """Delete features that shards of an analysis, which has ended, have left beyond what is kept for others.

    Raises:
        StorageUnavailable: the storage does not answer.
    """
    with read(engine) as session:
        row = session.get(Analysis, analysis_id)
        if row is None or row.shard_samples is None:
            return
    shards.tidy(engine, storage)


def clean(session: Session, before: datetime) -> None:
    """Forget points and turns of analyses that ended before an instant."""
    old = sa.select(Analysis.id).where(Analysis.finished_at < before)
    for model in (Point, Turn):
        session.execute(sa.delete(model).where(model.analysis_id.in_(old)))

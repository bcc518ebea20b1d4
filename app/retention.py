"""What goes by its age: analyses with their reports, and files that nothing uses any more.

The settings `INTERPLAY_KEEP_...` become conditions of SQL, once, at one instant of the database's clock. The dry run
and the real one ask the same questions in the same order, page by page. The real one locks the rows of a page, asks
again whether they go, since a baseline or a new analysis may have come meanwhile, and deletes them: one page a
transaction, with a pause after each. A kill between two transactions leaves what the sweeps of `resources` and `queue`
take.
"""

import fcntl
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from app import deletion, queue, resources
from app.database import clock, read, write
from app.models import (
    Analysis,
    AnalysisCheckpoint,
    Baseline,
    Blob,
    Checkpoint,
    FeatureSet,
    MetadataEntry,
    Probe,
    Report,
)
from app.plain import plain
from app.settings import Settings
from app.storage import Storage

logger = logging.getLogger(__name__)

What = Literal["analysis", "checkpoint", "probe", "feature set"]
#: What goes, in words, with its plural.
NOUNS: dict[What, str] = {
    "analysis": "analyses",
    "checkpoint": "checkpoints",
    "probe": "probes",
    "feature set": "feature sets",
}
_DAYS, _FAILED_DAYS, _FILES_DAYS = (f"INTERPLAY_KEEP_{name}DAYS" for name in ("", "FAILED_", "FILES_"))
# Rows of a transaction. 50 analyses of 300 metrics each held up SQLite's other writers for 1.7 s at the worst, on a
# machine with three times as much to do as it has cores; on PostgreSQL, where they wait for rows alone, it was 0.1 s.
_PAGE = 20
# An arbitrary fixed number that nothing else on the same database uses.
_ADVISORY_LOCK = 0x696E7465726B6570
_PATIENCE_SECONDS = 1.0
_DAY = timedelta(days=1)

Entity = Any


@dataclass(frozen=True)
class Item:
    """A row that goes.

    Attributes:
        what: its noun.
        id: its id.
        name: its name; of an analysis that of its subject.
        report_id: of an analysis that has a report.
        days: its age.
        size_bytes: of the report; of a resource that of the files that go with it, as nothing else has them.
        reason: a sentence.
    """

    what: What
    id: str
    name: str
    report_id: str | None
    days: float
    size_bytes: int
    reason: str


@dataclass(frozen=True)
class Kept:
    """What is old enough to go, and stays because baselines need it.

    Attributes:
        baselines: their names.
        counts: rows by their noun.
        size_bytes: of their reports and files.
    """

    baselines: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0


class Rules:
    """The settings as conditions on rows.

    Args:
        settings: of the service.
        moment: now, in the database's time.
        dialect: of the database.
    """

    def __init__(self, settings: Settings, moment: datetime, dialect: str) -> None:
        self.moment = moment
        self.days = settings.keep_days
        self.failed_days = settings.keep_days if settings.keep_failed_days is None else settings.keep_failed_days
        self.files_days = settings.keep_files_days
        self._stays_with, self._goes_with = settings.keeps_if, settings.keeps_unless
        self._dialect = dialect
        self._failed_setting = _DAYS if settings.keep_failed_days is None else _FAILED_DAYS

    def analysis(self, *, heed: bool = True) -> sa.ColumnElement[bool]:
        """Return SQL that is true for an analysis that goes; without `heed` as if there were no baselines."""
        outcome, finished = Analysis.outcome, Analysis.finished_at
        goes: list[sa.ColumnElement[bool]] = []
        if self.days is not None:
            goes.append(sa.and_(outcome == "succeeded", finished < self.moment - self.days * _DAY))
        if self.failed_days is not None:
            goes.append(sa.and_(outcome != "succeeded", finished < self.moment - self.failed_days * _DAY))
        conditions = [sa.or_(sa.false(), *goes), *self._metadata(Analysis)]
        if heed:
            conditions.append(~deletion.is_of_baseline())
        return sa.and_(*conditions)

    def resource(self, entity: Entity, *, heed: bool = True) -> sa.ColumnElement[bool]:
        """Return SQL that is true for a checkpoint, probe or feature set that goes: no analysis that stays uses it."""
        if self.files_days is None:
            return sa.false()
        conditions = [
            entity.created_at < self.moment - self.files_days * _DAY,
            *self._metadata(entity),
            ~sa.exists().where(_uses(entity), _not(self.analysis(heed=heed))),
        ]
        if entity is Checkpoint:
            adapter = aliased(Checkpoint)
            stays = _not(self.resource(adapter, heed=heed))
            conditions.append(~sa.exists().where(adapter.base_id == Checkpoint.id, stays))
        return sa.and_(*conditions)

    def _metadata(self, entity: Entity) -> list[sa.ColumnElement[bool]]:
        conditions = []
        if self._stays_with:
            conditions.append(~self._has(entity, self._stays_with))
        if self._goes_with:
            conditions.append(self._has(entity, self._goes_with))
        return conditions

    def _has(self, entity: Entity, pairs: Sequence[tuple[str, str]]) -> sa.ColumnElement[bool]:
        """Return SQL that is true for a row that has one of these metadata."""
        found = []
        for owner in _owners(entity):
            entry = aliased(MetadataEntry)
            is_one = sa.or_(
                *(sa.and_(entry.key == key, _like(entry.value, pattern, self._dialect)) for key, pattern in pairs)
            )
            found.append(sa.exists().where(owner(entry.resource_id), is_one).correlate(entity))
        return sa.or_(*found)

    def why_analysis(self, outcome: str | None) -> str:
        """Return why an analysis goes."""
        days, setting = self.days, _DAYS
        if outcome != "succeeded":
            days, setting = self.failed_days, self._failed_setting
        return f"{outcome} more than {days:g} days ago ({setting})"

    def why_resource(self) -> str:
        """Return why a checkpoint, probe or feature set goes."""
        return f"came more than {self.files_days:g} days ago, and no analysis that stays uses it ({_FILES_DAYS})"


def _like(column: Any, pattern: str, dialect: str) -> sa.ColumnElement[bool]:
    """Return SQL that is true where text is as a pattern, in which * is any text. Both databases heed the case."""
    if "*" not in pattern:
        return sa.and_(column == pattern)
    if dialect == "sqlite":
        literal = pattern.replace("[", "[[]").replace("?", "[?]")
        return sa.and_(column.op("GLOB")(literal))
    literal = pattern.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_").replace("*", "%")
    return sa.and_(column.like(literal, escape="\\"))


def _owners(entity: Entity) -> list[Callable[[Any], sa.ColumnElement[bool]]]:
    """Return for each sort of owner what makes SQL that is true where metadata are of a row.

    Those of an analysis are of what it looks at, and of its report, which keeps them of subjects that are gone. Each is
    found by a key, row by row: sets of all that has such metadata were too much for PostgreSQL beside 40,000 analyses.
    """
    if entity is not Analysis:
        return [lambda id_: sa.and_(id_ == entity.id)]
    places, report = aliased(AnalysisCheckpoint), aliased(Report)
    return [
        lambda id_: sa.and_(id_ == Analysis.probe_id),
        lambda id_: sa.and_(id_ == Analysis.feature_set_id),
        lambda id_: sa.and_(id_ == places.checkpoint_id, places.analysis_id == Analysis.id),
        lambda id_: sa.and_(id_ == report.id, report.analysis_id == Analysis.id),
    ]


def _uses(entity: Entity) -> sa.ColumnElement[bool]:
    """Return SQL that is true where an analysis uses a checkpoint, probe or feature set."""
    match sa.inspect(entity).mapper.class_.__name__:
        case "Probe":
            return sa.and_(Analysis.probe_id == entity.id)
        case "FeatureSet":
            return sa.and_(Analysis.feature_set_id == entity.id)
    return sa.and_(AnalysisCheckpoint.checkpoint_id == entity.id, Analysis.id == AnalysisCheckpoint.analysis_id)


def _not(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Return SQL that is true where a condition is false or, as columns may be null, neither."""
    return sa.not_(sa.func.coalesce(condition, sa.false()))


@dataclass(frozen=True)
class _Step:
    """One of the tables that are gone through, in an order in which nothing needs what went before.

    Attributes:
        what: the noun of its rows.
        model: its rows.
        age: the column that says since when.
        of_adapters: of checkpoints, whether the adapters go, or all others.
    """

    what: What
    model: Any
    age: Any
    of_adapters: bool | None = None

    def goes(self, rules: Rules, *, heed: bool = True) -> sa.ColumnElement[bool]:
        if self.model is Analysis:
            return rules.analysis(heed=heed)
        goes = rules.resource(self.model, heed=heed)
        if self.of_adapters is None:
            return goes
        return sa.and_(goes, Checkpoint.base_id.is_not(None) if self.of_adapters else Checkpoint.base_id.is_(None))


_STEPS = (
    _Step("analysis", Analysis, Analysis.finished_at),
    _Step("checkpoint", Checkpoint, Checkpoint.created_at, of_adapters=True),
    _Step("checkpoint", Checkpoint, Checkpoint.created_at, of_adapters=False),
    _Step("probe", Probe, Probe.created_at),
    _Step("feature set", FeatureSet, FeatureSet.created_at),
)


def is_set(settings: Settings) -> bool:
    """Return whether anything goes by its age."""
    return (settings.keep_days, settings.keep_failed_days, settings.keep_files_days) != (None, None, None)


def would_go(engine: sa.Engine, settings: Settings) -> Iterator[Item]:
    """Yield what goes, and change nothing."""
    rules, freed = _rules(engine, settings), _Freed()
    for step in _STEPS:
        after: tuple[Any, str] | None = None
        while True:
            with read(engine) as session:
                page = session.execute(_page(step, rules, after)).all()
                items = _items(session, step, rules, [id_ for id_, _ in page], freed)
            yield from items
            if len(page) < _PAGE:
                break
            after = page[-1][1], page[-1][0]


def remove(engine: sa.Engine, client: queue.LateClient, storage: Storage, settings: Settings) -> Iterator[Item]:
    """Delete what goes; yield each once it has gone. The caller holds `alone`.

    Raises:
        StorageUnavailable: files that are left go with the next sweep; so does all that was not come to.
    """
    rules, freed = _rules(engine, settings), _Freed()
    for step in _STEPS:
        after: tuple[Any, str] | None = None
        while True:
            began = time.monotonic()
            page, items = _remove_page(engine, client, storage, step, rules, after, freed)
            for item in items:
                logger.info("the %s %s has gone: it %s", item.what, item.id, item.reason)
            yield from items
            if len(page) < _PAGE:
                break
            after = page[-1][1], page[-1][0]
            # Others get the database for as long as this had it: SQLite's writers do not queue up.
            time.sleep(time.monotonic() - began)
    if rules.files_days is not None:
        resources.sweep_features(engine, storage)


def kept(engine: sa.Engine, settings: Settings) -> Kept:
    """Return what would go if it were not for baselines."""
    rules, counts, total = _rules(engine, settings), Counter[str](), 0
    with read(engine) as session:
        for step in _STEPS:
            held = sa.and_(step.goes(rules, heed=False), _not(step.goes(rules)))
            if step.model is Analysis:
                size = sa.select(sa.func.count(), sa.func.sum(_bytes(engine.dialect.name))).select_from(Analysis)
                size = size.outerjoin(Report, Report.analysis_id == Analysis.id)
            else:
                size = sa.select(sa.func.count(), sa.func.sum(step.model.size_bytes)).select_from(step.model)
            n_rows, n_bytes = session.execute(size.where(held)).one()
            counts[step.what] += n_rows
            total += n_bytes or 0
        old = sa.select(Analysis.id).where(rules.analysis(heed=False))
        names = sa.select(Baseline.name).join(Report, Baseline.report_id == Report.id)
        baselines = list(session.scalars(names.where(Report.analysis_id.in_(old)).order_by(Baseline.name)))
    return Kept(baselines, {what: n_rows for what, n_rows in counts.items() if n_rows}, total)


@contextmanager
def alone(engine: sa.Engine, settings: Settings, *, wait: bool = False) -> Iterator[bool]:
    """Yield whether no other process of the service removes what goes; with `wait` once none does."""
    if engine.dialect.name == "sqlite":
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(settings.data_dir / "retention.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not (free := _lock_file(descriptor)) and wait:
                time.sleep(_PATIENCE_SECONDS)
            yield free
        finally:
            os.close(descriptor)
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        take = sa.select(sa.func.pg_try_advisory_lock(_ADVISORY_LOCK))
        while not (free := bool(connection.scalar(take))) and wait:
            time.sleep(_PATIENCE_SECONDS)
        try:
            yield free
        finally:
            if free and not connection.invalidated:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_ADVISORY_LOCK)))


def _lock_file(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def as_json(items: Sequence[Item], held: Kept, *, dry_run: bool) -> dict[str, Any]:
    """Return what went, or would go, and what baselines keep, as `--json` prints it."""
    counts = Counter(item.what for item in items)
    return {
        "dry_run": dry_run,
        "items": [asdict(item) for item in items],
        "counts": {what: counts[what] for what in NOUNS},
        "size_bytes": sum(item.size_bytes for item in items),
        "kept_for_baselines": asdict(held),
    }


def _rules(engine: sa.Engine, settings: Settings) -> Rules:
    with read(engine) as session:
        return Rules(settings, clock(session), engine.dialect.name)


def _page(step: _Step, rules: Rules, after: tuple[Any, str] | None) -> sa.Select[Any]:
    """Select ids and ages of the next rows that go, the oldest first."""
    query = sa.select(step.model.id, step.age).where(step.goes(rules))
    if after is not None:
        last = sa.tuple_(sa.literal(after[0], step.age.type), sa.literal(after[1]))
        query = query.where(sa.tuple_(step.age, step.model.id) > last)
    return query.order_by(step.age, step.model.id).limit(_PAGE)


def _remove_page(
    engine: sa.Engine,
    client: queue.LateClient,
    storage: Storage,
    step: _Step,
    rules: Rules,
    after: tuple[Any, str] | None,
    freed: "_Freed",
) -> tuple[Sequence[Any], list[Item]]:
    """Delete the next rows that go; return the page and what of it has gone."""
    if step.model is not Analysis:
        # Checked before anything is locked: an unavailable storage must not block writers to the database.
        storage.has("0" * 64)
    runs, hashes = list[str](), dict[str, None]()
    with write(engine) as session:
        # Rows that others hold stay for the next time: a new analysis of them is being made.
        page = session.execute(_page(step, rules, after).with_for_update(of=step.model, skip_locked=True)).all()
        ids = [id_ for id_, _ in page]
        if step.model is Analysis:
            # Whoever moves a baseline to one of these holds its report until the move has committed.
            session.execute(sa.select(Report.id).where(Report.analysis_id.in_(ids)).with_for_update())
        # A statement of its own sees what has been committed before the rows were locked.
        ids = list(session.scalars(sa.select(step.model.id).where(step.model.id.in_(ids), step.goes(rules))))
        items = _items(session, step, rules, ids, freed)
        if step.model is Analysis:
            runs = deletion.remove_analyses(session, ids)
        else:
            for row in session.scalars(sa.select(step.model).where(step.model.id.in_(ids))).all():
                hashes |= dict.fromkeys(resources.hashes_of(row))
                resources.remove(session, row)
    queue.forget(client, engine, runs)
    for sha256 in hashes:
        resources.release(engine, storage, sha256)
    return page, items


def _items(session: Session, step: _Step, rules: Rules, ids: Sequence[str], freed: "_Freed") -> list[Item]:
    """Return what is said of rows that go, in the order of their ages."""
    order = step.age, step.model.id
    if step.model is Analysis:
        columns = (Analysis.id, Analysis.name, Analysis.outcome, Analysis.finished_at, Report.id)
        query = sa.select(*columns, _bytes(session.get_bind().dialect.name)).outerjoin(
            Report, Report.analysis_id == Analysis.id
        )
        return [
            Item("analysis", id_, name, report_id, _days(rules, at), n_bytes or 0, rules.why_analysis(outcome))
            for id_, name, outcome, at, report_id, n_bytes in session.execute(
                query.where(Analysis.id.in_(ids)).order_by(*order)
            )
        ]
    rows = session.scalars(sa.select(step.model).where(step.model.id.in_(ids)).order_by(*order)).all()
    return [
        Item(
            step.what,
            row.id,
            row.name,
            None,
            _days(rules, row.created_at),
            freed.by(session, row),
            rules.why_resource(),
        )
        for row in rows
    ]


def _bytes(dialect: str) -> sa.ColumnElement[int]:
    """Return SQL of the size of a report's text."""
    if dialect == "sqlite":
        return sa.func.length(sa.cast(Report.content, sa.LargeBinary))
    return sa.func.octet_length(Report.content)


def _days(rules: Rules, since: datetime | None) -> float:
    assert since is not None, "what goes has an age"
    return round((rules.moment - since) / _DAY, 2)


class _Freed:
    """Counts the files that go: one that several resources have goes with the last of them."""

    def __init__(self) -> None:
        self._owners: dict[str, int] = {}

    def by(self, session: Session, row: resources.Owner) -> int:
        """Return the bytes that go with a resource, after all those that were asked for before."""
        n_bytes = 0
        for sha256 in resources.hashes_of(row):
            if sha256 not in self._owners:
                uses = (
                    sa.select(sa.func.count()).where(column == sha256).scalar_subquery() for column in resources.USES
                )
                self._owners[sha256] = session.scalar(sa.select(sum(uses, start=sa.literal(0)))) or 0
            self._owners[sha256] -= 1
            if not self._owners[sha256]:
                n_bytes += session.scalar(sa.select(Blob.size_bytes).where(Blob.sha256 == sha256)) or 0
        return n_bytes


def text_of(items: Sequence[Item], held: Kept, *, dry_run: bool) -> Iterator[str]:
    """Yield lines for people: each row that went, or would go, then their numbers, then what baselines keep."""
    for item in items:
        report = "" if item.report_id is None else f", report {item.report_id}"
        size = f"{item.size_bytes:,} bytes"
        yield f"{item.what} {item.id} ({plain(item.name)}{report}), {item.days:g} days, {size}: {item.reason}"
    verb = "would go" if dry_run else "went"
    total = sum(item.size_bytes for item in items)
    yield f"{_counted(Counter(item.what for item in items))} {verb}: {total:,} bytes."
    if held.counts:
        names = ", ".join(held.baselines)
        yield f"Kept for baselines ({names}): {_counted(held.counts)}, {held.size_bytes:,} bytes."


def _counted(counts: Mapping[str, int]) -> str:
    """Return numbers with their nouns."""
    found = [
        f"{counts[what]} {what if counts[what] == 1 else plural}" for what, plural in NOUNS.items() if counts.get(what)
    ]
    return ", ".join(found) or "Nothing"

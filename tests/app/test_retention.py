"""What goes by its age, on both databases: the dry run, the real one, and a naive reference say the same."""

import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import sqlalchemy as sa

import migrations
from app import analyses, queue, resources, retention, verification
from app.database import clock, make_engine, read, write
from app.errors import NotFound
from app.gates import baselines
from app.models import (
    Analysis,
    AnalysisCheckpoint,
    Baseline,
    Blob,
    Checkpoint,
    FeatureSet,
    MetadataEntry,
    Point,
    Probe,
    Report,
    ReportMetric,
    Turn,
)
from app.schemas import BaselinePut, EvaluationRequest
from app.settings import Settings, load_settings
from app.storage import Storage, StorageUnavailable
from tests.campaigns import DATABASES, campaign
from tests.services import running, until

MODELS: dict[str, Any] = {"checkpoint": Checkpoint, "probe": Probe, "feature set": FeatureSet}


@dataclass
class Made:
    """A row as it was made, for the reference.

    Attributes:
        what: its noun.
        id: its id.
        days: its age; None for an analysis that goes on.
        metadata: of a resource; of an analysis what its report has kept.
        uses: of an analysis its subjects.
        outcome: of an analysis.
        base: of an adapter.
        files: the sha256 of its blobs.
    """

    what: str
    id: str
    days: float | None
    metadata: dict[str, str] = field(default_factory=dict)
    uses: list[str] = field(default_factory=list)
    outcome: str | None = None
    base: str | None = None
    files: list[str] = field(default_factory=list)


class World:
    """A database and a storage that tests fill with rows of any age."""

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self.engine, self.settings, self.storage = engine, settings, Storage(settings)
        self.client = queue.LateClient(engine)
        self.made: dict[str, Made] = {}
        self.baselines: dict[str, str] = {}
        self._stored: dict[bytes, str] = {}

    def keeping(self, **settings: Any) -> Settings:
        return self.settings.model_copy(update=settings)

    def blob(self, content: bytes) -> str:
        """Store a file once; it must not have gone since."""
        if content in self._stored:
            return self._stored[content]
        with self.storage.stage() as staged:
            staged.write(content)
            self.storage.put(staged)
        with write(self.engine) as session:
            session.add(Blob(sha256=staged.sha256, size_bytes=len(content)))
        return self._stored.setdefault(content, staged.sha256)

    def resource(
        self, what: str = "feature set", days: float = 0.0, *, content: bytes | None = None, base: str | None = None,
        tokenizer: bytes | None = None, metadata: Mapping[str, str] | None = None,
    ) -> str:  # fmt: skip
        """Add a checkpoint, a probe or a feature set that came so many days ago."""
        content, given = content or uuid4().bytes, dict(metadata or {})
        files = [self.blob(part) for part in (content, tokenizer) if part is not None]
        row: dict[str, Any] = {
            "name": f"{what} {len(self.made)}", "sha256": files[0], "size_bytes": len(content), "metadata_": given,
        }  # fmt: skip
        if what == "checkpoint":
            row |= {"n_parameters": 1, "architecture": {"family": "builtin"}, "base_id": base}
        else:
            row |= {"n_samples": 1, "n_classes": 1, "class_counts": [1], "splits": {}}
            row |= {"format": "npz"} if what == "probe" else {"n_features": 1}
        if tokenizer is not None:
            row["tokenizer_sha256"] = files[1]
        with write(self.engine) as session:
            made = MODELS[what](created_at=clock(session) - timedelta(days=days), **row)
            session.add(made)
            session.flush()
            session.add_all(MetadataEntry.entries(made.id, given))
        self.made[made.id] = Made(what, made.id, days, given, base=base, files=files)
        return str(made.id)

    def analysis(
        self, days: float | None, *uses: str, outcome: str | None = "succeeded", report: bool = True, **metadata: str
    ) -> str:
        """Add an analysis that ended so many days ago, with its run in the queue, points, turns and a report."""
        kinds = {self.made[id_].what if id_ in self.made else "checkpoint": id_ for id_ in uses}
        with write(self.engine) as session:
            row = Analysis(
                kind="pruning", name="é <x>", options={}, request_sha256="0" * 64, outcome=outcome,
                finished_at=None if days is None else clock(session) - timedelta(days=days),
                probe_id=kinds.get("probe"), feature_set_id=kinds.get("feature set"),
            )  # fmt: skip
            session.add(row)
            session.flush()
            of_network = [id_ for id_ in uses if id_ not in self.made or self.made[id_].what == "checkpoint"]
            session.add_all(
                AnalysisCheckpoint(analysis_id=row.id, position=position, checkpoint_id=id_)
                for position, id_ in enumerate(of_network)
            )
            queue.enqueue_analysis(self.client.get(), session, row)
            session.add(Point(analysis_id=row.id, number=0, place=0.5))
            if outcome is not None:
                queue.close_turns(session, row.id)
            if report and outcome == "succeeded":
                made = Report(
                    analysis_id=row.id, kind="pruning", name=row.name, probe_id=row.probe_id,
                    feature_set_id=row.feature_set_id, sha256="0" * 64, content='{"é": 1}',
                )  # fmt: skip
                session.add(made)
                session.flush()
                session.add(ReportMetric(report_id=made.id, path="a", value=1.0))
                session.add_all(MetadataEntry.entries(made.id, metadata))
        self.made[row.id] = Made("analysis", row.id, days, metadata, list(uses), outcome)
        return row.id

    def report_of(self, analysis_id: str) -> str:
        with read(self.engine) as session:
            return session.scalars(sa.select(Report.id).where(Report.analysis_id == analysis_id)).one()

    def baseline(self, analysis_id: str) -> str:
        name = f"base-{uuid4().hex[:8]}"
        baselines.put(self.engine, name, BaselinePut(report_id=self.report_of(analysis_id)))
        self.baselines[name] = analysis_id
        return name

    def remove(self, settings: Settings) -> list[retention.Item]:
        return list(retention.remove(self.engine, self.client, self.storage, settings))

    def would_go(self, settings: Settings) -> list[retention.Item]:
        return list(retention.would_go(self.engine, settings))

    def ids(self) -> set[str]:
        """Return the ids of all rows that are there."""
        with read(self.engine) as session:
            return {id_ for model in (Analysis, *MODELS.values()) for id_ in session.scalars(sa.select(model.id))}

    def files(self) -> set[str]:
        """Return the sha256 of all stored files."""
        return set(self.storage.blobs_older_than(-3600))

    def check(self) -> None:
        """Check that rows and files fit each other, and that what is gone is named nowhere."""
        left = self.ids()
        wanted = {sha256 for id_ in left for sha256 in self.made[id_].files}
        with read(self.engine) as session:
            assert set(session.scalars(sa.select(Blob.sha256))) == wanted == self.files()
            for model in (Turn, Point, AnalysisCheckpoint, Report):
                assert set(session.scalars(sa.select(model.analysis_id))) <= left
            reports = set(session.scalars(sa.select(Report.id)))
            assert set(session.scalars(sa.select(MetadataEntry.resource_id))) <= left | reports
            assert set(session.scalars(sa.select(ReportMetric.report_id))) <= reports
        assert {run_id[:36] for run_id in self.runs()} <= left
        assert verification.verify(self.engine, self.storage, set_aside=False) == 0

    def runs(self) -> set[str]:
        """Return the ids of the queue's runs."""
        schema = None if self.engine.dialect.name == "sqlite" else "dbos"
        table = sa.table("workflow_status", sa.column("workflow_uuid"), schema=schema)
        with self.engine.connect() as connection:
            return set(connection.scalars(sa.select(table.c.workflow_uuid)))


@pytest.fixture
def world(engine_with_tables: sa.Engine, empty_database: Settings) -> Iterator[World]:
    made = World(engine_with_tables, empty_database)
    yield made
    made.client.destroy()


def matches(metadata: Mapping[str, str], pairs: str) -> bool:
    """Return whether metadata have one of the pairs, the naive way."""
    for pair in filter(None, pairs.split(",")):
        key, _, pattern = pair.strip().partition("=")
        wanted = ".*".join(map(re.escape, pattern.split("*")))
        if key in metadata and re.fullmatch(wanted, metadata[key], re.DOTALL):
            return True
    return False


def reference(world: World, settings: Settings, *, heed: bool = True) -> set[str]:
    """Return the ids of what goes, row by row as docs/operations.md says it."""
    made = world.made

    def may(metadata: list[dict[str, str]]) -> bool:
        if any(matches(one, settings.keep_if) for one in metadata):
            return False
        return not settings.keep_unless or any(matches(one, settings.keep_unless) for one in metadata)

    gone: set[str] = set()
    for row in made.values():
        if row.what != "analysis" or row.outcome is None or (heed and row.id in world.baselines.values()):
            continue
        days = settings.keep_days
        if row.outcome != "succeeded" and settings.keep_failed_days is not None:
            days = settings.keep_failed_days
        subjects = [made[id_].metadata for id_ in row.uses if id_ in made]
        if days is not None and row.days is not None and row.days > days and may([row.metadata, *subjects]):
            gone.add(row.id)
    used = {id_ for row in made.values() if row.what == "analysis" and row.id not in gone for id_ in row.uses}
    if settings.keep_files_days is None:
        return gone
    old = {
        row.id
        for row in made.values()
        if row.what != "analysis" and row.days is not None and row.days > settings.keep_files_days
        if may([row.metadata]) and row.id not in used
    }
    bases = {row.base for row in made.values() if row.base is not None and row.id not in old}
    return gone | (old - bases)


def fill(world: World, seed: int) -> None:
    """Add some 60 rows of every sort, of many ages and metadata, which share files, subjects and bases."""
    draw = random.Random(seed)
    contents = [uuid4().bytes for _ in range(12)]

    def days() -> float:
        return draw.choice([0.5, 1.5, 2.5, 5.5, 40.5])

    def metadata() -> dict[str, str]:
        entries = {"branch": draw.choice(["main", "pr-1", "pr-2"]), "release": draw.choice(["true", "false"])}
        return {key: value for key, value in entries.items() if draw.random() < 0.6}

    def resource(what: str, **given: Any) -> str:
        return world.resource(what, days(), content=draw.choice(contents), metadata=metadata(), **given)

    networks = [resource("checkpoint") for _ in range(8)]
    networks += [resource("checkpoint", base=draw.choice(networks[:8]), tokenizer=contents[0]) for _ in range(5)]
    probes = [resource("probe", tokenizer=draw.choice(contents)) for _ in range(4)]
    sets = [resource("feature set") for _ in range(5)]
    for _ in range(30):
        outcome = draw.choice(["succeeded", "succeeded", "succeeded", "failed", "cancelled", None])
        uses = [draw.choice(sets)] if draw.random() < 0.3 else [draw.choice(networks), draw.choice(probes)]
        if draw.random() < 0.1:
            uses = [str(uuid4())]  # deleted since
        has_report = outcome == "succeeded" and draw.random() < 0.9
        kept = metadata() if has_report else {}
        world.analysis(None if outcome is None else days(), *uses, outcome=outcome, report=has_report, **kept)
        if has_report and draw.random() < 0.25:
            world.baseline([*world.made][-1])


RULES: list[dict[str, Any]] = [
    {"keep_days": 2, "keep_files_days": 1},
    {"keep_days": 5, "keep_failed_days": 0, "keep_files_days": 0, "keep_if": "release=true"},
    {"keep_days": 1, "keep_files_days": 2, "keep_unless": "branch=pr-*"},
    {"keep_failed_days": 1, "keep_files_days": 1, "keep_if": "release=true, branch=main", "keep_unless": "branch=*"},
    {"keep_files_days": 0},
    {"keep_days": 0},
]


@pytest.mark.parametrize("number", campaign(range(len(RULES)), often=[1, 2]))
def test_the_dry_run_says_what_goes(world: World, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference, dry run and removal agree in what goes, in its order and its bytes; then nothing is left to go."""
    monkeypatch.setattr("app.retention._PAGE", 4)
    fill(world, number)
    settings = world.keeping(**RULES[number])
    before, bytes_before = world.ids(), sum(path.stat().st_size for path in _stored(world))
    expected, unheeded = reference(world, settings), reference(world, settings, heed=False)
    held = retention.kept(world.engine, settings)
    listed = world.would_go(settings)
    assert world.ids() == before
    gone = world.remove(settings)
    assert [item.id for item in gone] == [item.id for item in listed]
    assert {item.id for item in gone} == expected
    assert [(item.what, item.size_bytes, item.reason) for item in gone] == [
        (item.what, item.size_bytes, item.reason) for item in listed
    ]
    assert world.ids() == before - expected
    freed = bytes_before - sum(path.stat().st_size for path in _stored(world))
    assert sum(item.size_bytes for item in gone if item.what != "analysis") == freed
    assert sum(item.size_bytes for item in gone if item.what == "analysis") == 9 * sum(
        item.report_id is not None for item in gone
    )
    assert sum(held.counts.values()) == len(unheeded - expected)
    assert set(held.baselines) == {name for name, id_ in world.baselines.items() if id_ in unheeded}
    world.check()
    assert world.would_go(settings) == world.remove(settings) == []


def _stored(world: World) -> list[Path]:
    return [path for path in (world.settings.data_dir / "blobs").glob("??/*") if path.is_file()]


PATTERNS = ["pr-*", "PR-1", "*", "", "a[b]?", "a[b]*", "50%*", "a_c", "a_*", "*é", "back\\*", "a*c*e", "x'y"]


def test_patterns(world: World) -> None:
    """Only * is special, and the case of letters counts."""
    values = ["pr-1", "PR-1", "Pr-", "", "a[b]?", "a[b]c", "ab?", "50%", "50x", "a_c", "abc", "café", "back\\slash"]
    values += ["abcde", "x'y", "1", "two\nlines"]
    ids = {world.resource(days=1, content=b"x", metadata={"branch": value}): value for value in values}
    for pattern in PATTERNS:
        items = world.would_go(world.keeping(keep_files_days=0, keep_unless=f"branch={pattern}"))
        wanted = {value for value in values if matches({"b": value}, f"b={pattern}")}
        assert {ids[item.id] for item in items} == wanted, pattern


def test_a_baseline_keeps_what_it_needs(world: World) -> None:
    """Report, analysis, adapter, base and probe stay until the baseline moves; then all go."""
    base = world.resource("checkpoint", 10)
    adapter, probe = world.resource("checkpoint", 10, base=base), world.resource("probe", 10)
    old, new = world.analysis(9, adapter, probe), world.analysis(0)
    name = world.baseline(old)
    settings = world.keeping(keep_days=5, keep_files_days=5)
    assert world.remove(settings) == []
    held = retention.kept(world.engine, settings)
    assert (held.baselines, held.counts) == ([name], {"analysis": 1, "checkpoint": 2, "probe": 1})
    assert held.size_bytes == 9 + 3 * 16
    baselines.put(world.engine, name, BaselinePut(report_id=world.report_of(new)))
    assert [item.id for item in world.remove(settings)] == [old, adapter, base, probe]
    world.check()
    assert baselines.get(world.engine, name).report_id == world.report_of(new)


def test_an_analysis_that_is_queued_meanwhile(world: World) -> None:
    """While many clients queue analyses of what is old, each that was taken finds its feature set."""
    ids = [world.resource(days=1) for _ in range(60)]
    settings = world.keeping(keep_files_days=0)
    go = threading.Barrier(5)

    def ask(part: list[str]) -> list[str]:
        go.wait(30)
        taken = []
        for id_ in part:
            with suppress(NotFound):
                request = EvaluationRequest(kind="evaluation", feature_set_id=id_)
                taken.append(analyses.create(world.engine, world.client, request, None).id)
        return taken

    def remove() -> list[retention.Item]:
        go.wait(30)
        return world.remove(settings)

    with ThreadPoolExecutor(5) as pool:
        asking = [pool.submit(ask, ids[start::4]) for start in range(4)]
        removing = pool.submit(remove)
        taken = [id_ for asked in asking for id_ in asked.result(60)]
        gone = {item.id for item in removing.result(60)}
    left = world.ids()
    with read(world.engine) as session:
        used = set(session.scalars(sa.select(Analysis.feature_set_id).where(Analysis.id.in_(taken))))
    assert used <= left
    assert gone == set(ids) - left
    assert len(taken) == len(used)
    assert set(ids) - used - left == gone


def test_what_another_transaction_holds_stays_for_now(world: World) -> None:
    """Rows that a client is about to use are passed over on PostgreSQL; on SQLite the removal waits for its use."""
    held, free = world.resource(days=2), world.resource(days=1)
    settings = world.keeping(keep_files_days=0)
    with ThreadPoolExecutor(1) as pool:
        with write(world.engine) as session:
            resources.get(session, FeatureSet, held, lock="share")
            removing = pool.submit(world.remove, settings)
            if world.engine.dialect.name == "postgresql":
                assert [item.id for item in removing.result(30)] == [free]
            session.add(Analysis(kind="evaluation", name="x", options={}, request_sha256="0" * 64, feature_set_id=held))
        assert [item.id for item in removing.result(30)] == [free]
    assert world.remove(settings) == []


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_an_analysis_that_is_queued_before_the_lock(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that commits after the removal began to look, and before it locks the row, is seen all the same."""
    page = retention._page

    def slow_page(*given: Any) -> Any:
        return page(*given).where(sa.cast(sa.func.pg_sleep(1.0), sa.Text).is_not(None))

    monkeypatch.setattr("app.retention._page", slow_page)
    used = world.resource(days=1)
    looking = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%feature_sets%pg_sleep%UPDATE%' "
        "AND pid <> pg_backend_pid() AND wait_event = 'PgSleep'"
    )

    def looks() -> bool:
        with world.engine.connect() as connection:
            return bool(connection.scalar(looking))

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(world.remove, world.keeping(keep_files_days=0))
        until(looks)
        request = EvaluationRequest(kind="evaluation", feature_set_id=used)
        analyses.create(world.engine, world.client, request, None)
        assert removing.result(30) == []
    assert used in world.ids()


def test_a_baseline_that_moves_meanwhile(world: World) -> None:
    """However moves and removals meet, a baseline points at a report that is there."""
    made = [world.analysis(1) for _ in range(30)]
    reports = [world.report_of(id_) for id_ in made]
    go = threading.Barrier(4)

    def move(part: list[str]) -> None:
        go.wait(30)
        for report_id in part:
            with suppress(NotFound):
                baselines.put(world.engine, f"base-{report_id[:8]}", BaselinePut(report_id=report_id))

    def remove() -> list[retention.Item]:
        go.wait(30)
        return world.remove(world.keeping(keep_days=0))

    with ThreadPoolExecutor(4) as pool:
        moving = [pool.submit(move, reports[start::3]) for start in range(3)]
        removing = pool.submit(remove)
        for moved in moving:
            moved.result(60)
        gone = removing.result(60)
    with read(world.engine) as session:
        pointed = set(session.scalars(sa.select(Baseline.report_id).where(Baseline.report_id.is_not(None))))
        assert pointed == set(session.scalars(sa.select(Report.id)))
    assert {item.report_id for item in gone} == set(reports) - pointed


def test_two_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time has the lock, in whatever process; two without it would still remove each row once."""
    monkeypatch.setattr("app.retention._PAGE", 5)
    for number in range(20):
        world.analysis(2, world.resource(days=3, content=bytes([number // 2]) * 5))
    settings = world.keeping(keep_days=0, keep_files_days=0)
    with retention.alone(world.engine, settings) as first:
        assert first
        with retention.alone(world.engine, settings) as second:
            assert not second
        script = (
            "import sys; from app import retention; from app.database import make_engine\n"
            "from app.settings import load_settings; s = load_settings()\n"
            "with retention.alone(make_engine(s), s) as free: print(free)"
        )
        assert _run("-c", script, settings=settings).stdout == "False\n"
    with retention.alone(world.engine, settings, wait=True) as again:
        assert again
    with ThreadPoolExecutor(2) as pool:
        gone = [item.id for one in list(pool.map(world.remove, [settings] * 2)) for item in one]
    gone += [item.id for item in world.remove(settings)]
    assert sorted(gone) == sorted(world.made)
    resources.sweep(world.engine, world.storage)
    world.check()


def _run(*arguments: str, settings: Settings, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"INTERPLAY_DATA_DIR": str(settings.data_dir), "INTERPLAY_DATABASE_URL": settings.database_url}
    given |= {"PATH": "/usr/bin:/bin", **{f"INTERPLAY_{key.upper()}": value for key, value in environment.items()}}
    return subprocess.run([sys.executable, *arguments], env=given, capture_output=True, text=True, timeout=120)


KILLED = """
import os, signal, sys
from app import {module}
real = {module}.{function}
left = [{calls}]
def dying(*given, **named):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
{module}.{function} = dying
from app.__main__ import main
sys.exit(main(["retention"]))
"""


KILLS = [("queue", "forget", 1), ("resources", "release", 0), ("resources", "release", 7), ("resources", "remove", 3)]


@pytest.mark.parametrize(("module", "function", "calls"), campaign(KILLS, often=[KILLS[2]]))
def test_a_kill_is_made_good(world: World, module: str, function: str, calls: int) -> None:
    """Killed before the queue's record, before a file, or in a transaction: sweep and removal finish what is left."""
    for number in range(8):
        world.analysis(2, world.resource("checkpoint", 3), world.resource("probe", 3, content=bytes([number // 2]) * 9))
    kept = world.resource(days=3, content=bytes([0]) * 9)
    given = {"keep_days": "0", "keep_files_days": "0", "keep_if": "none=0"}
    with write(world.engine) as session:
        session.add_all(MetadataEntry.entries(kept, {"none": "0"}))
    script = KILLED.format(module=module, function=function, calls=calls)
    if (module, function) == ("queue", "forget"):
        script = "from app import retention; retention._PAGE = 3\n" + script
    killed = _run("-c", script, settings=world.settings, **given)
    assert killed.returncode == -9, killed.stderr
    # Whatever was killed, no row lacks its file, and no lock is left behind.
    assert verification.verify(world.engine, world.storage, set_aside=False) == 0
    _end_runs(world)
    queue.forget_strays(world.client, world.engine)
    resources.sweep(world.engine, world.storage)
    rest = _run("-m", "app", "retention", settings=world.settings, **given)
    assert rest.returncode == 0, rest.stderr
    assert world.ids() == {kept}
    world.check()


def _end_runs(world: World) -> None:
    """Set the queue's runs as they are once workers have taken them and found nothing to do."""
    table = "workflow_status" if world.engine.dialect.name == "sqlite" else "dbos.workflow_status"
    with world.engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {table} SET status = 'SUCCESS'"))


def test_a_storage_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes while it does not answer; what fails in between has its row until the next sweep."""
    for _ in range(3):
        world.resource(days=1)
    settings, before = world.keeping(keep_files_days=0), world.ids()

    def fail(*_: Any) -> bool:
        raise StorageUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "has", fail)
        with pytest.raises(StorageUnavailable):
            world.remove(settings)
        assert world.ids() == before
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "delete", fail)
        with pytest.raises(StorageUnavailable):
            world.remove(settings)
    assert len(world.files()) == 3
    assert verification.verify(world.engine, world.storage, set_aside=False) == 0
    resources.sweep(world.engine, world.storage)
    world.check()
    assert world.ids() == set()


def test_runs_that_a_worker_holds(world: World) -> None:
    """The record of a run that goes on stays until it has ended; those of other analyses and of fetches stay."""
    gone, stays = world.analysis(2), world.analysis(0.5)
    table = "workflow_status" if world.engine.dialect.name == "sqlite" else "dbos.workflow_status"
    with world.engine.begin() as connection:
        held = sa.text(f"UPDATE {table} SET status = 'PENDING' WHERE workflow_uuid = :id")
        connection.execute(held, {"id": gone})
    with write(world.engine) as session:
        fetch = str(uuid4())
        queue.enqueue(world.client.get(), session, fetch, workflow=queue.FETCH_WORKFLOW, queue=queue.FETCHES)
    world.remove(world.keeping(keep_days=1))
    assert world.runs() == {gone, stays, f"{stays}.0", fetch}
    queue.forget_strays(world.client, world.engine)
    assert world.runs() == {gone, stays, f"{stays}.0", fetch}
    _end_runs(world)
    queue.forget_strays(world.client, world.engine)
    assert world.runs() == {stays, f"{stays}.0", fetch}


@pytest.mark.parametrize("empty_database", campaign(DATABASES, often=["sqlite"]), indirect=True)
def test_the_command(world: World) -> None:
    """A dry run lists and changes nothing; --json has the same; without settings nothing goes; a bad one is refused."""
    checkpoint = world.resource("checkpoint", 40, content=b"x" * 1000)
    old, failed = world.analysis(40, checkpoint), world.analysis(3, outcome="failed")
    base = world.analysis(40)
    name, before = world.baseline(base), world.ids()
    given = {"keep_days": "30", "keep_failed_days": "2", "keep_files_days": "30"}

    def retain(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return _run("-m", "app", "retention", *options, settings=world.settings, **environment)

    dry = retain("--dry-run", **given)
    assert dry.returncode == 0, dry.stderr
    report = world.report_of(old)
    assert dry.stdout.splitlines() == [
        f"analysis {old} (é <x>, report {report}), 40 days, 9 bytes: "
        "succeeded more than 30 days ago (INTERPLAY_KEEP_DAYS)",
        f"analysis {failed} (é <x>), 3 days, 0 bytes: failed more than 2 days ago (INTERPLAY_KEEP_FAILED_DAYS)",
        f"checkpoint {checkpoint} (checkpoint 0), 40 days, 1,000 bytes: came more than 30 days ago, and no analysis "
        "that stays uses it (INTERPLAY_KEEP_FILES_DAYS)",
        "2 analyses, 1 checkpoint would go: 1,009 bytes.",
        f"Kept for baselines ({name}): 1 analysis, 9 bytes.",
    ]
    assert world.ids() == before
    listed = json.loads(retain("--dry-run", "--json", **given).stdout)
    assert [item["id"] for item in listed["items"]] == [old, failed, checkpoint]
    assert (listed["size_bytes"], listed["dry_run"]) == (1009, True)
    assert listed["kept_for_baselines"] == {"baselines": [name], "counts": {"analysis": 1}, "size_bytes": 9}
    nothing = retain()
    assert (nothing.returncode, nothing.stdout) == (0, "Nothing went: 0 bytes.\n")
    assert "no INTERPLAY_KEEP_DAYS" in nothing.stderr
    done = json.loads(retain("--json", **given).stdout)
    assert {**done, "dry_run": True} == listed
    assert world.ids() == {base}
    world.check()


@pytest.mark.parametrize(
    "given", [{"keep_days": -1}, {"keep_days": "inf"}, {"keep_if": "release"}, {"keep_unless": "=x"}]
)
def test_settings_that_are_not_valid(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """They end the command with the name of the variable."""
    with pytest.raises(SystemExit):
        load_settings(**given)
    assert f"INTERPLAY_{next(iter(given)).upper()}" in capsys.readouterr().err


def test_the_service_removes_what_is_old(tmp_path: Path) -> None:
    """An API process does so when it starts, tells of each in its log, and counts in /metrics."""
    settings = Settings(data_dir=tmp_path / "data")
    engine = make_engine(settings)
    migrations.upgrade(engine)
    queue.migrate(engine)
    world = World(engine, settings)
    checkpoint = world.resource("checkpoint", 3, content=b"x" * 100)
    old, new = world.analysis(2, checkpoint), world.analysis(0.5)
    with running(
        settings.data_dir, command="api", tables=False, keep_days="1", keep_files_days="1", log_level="info"
    ) as service:

        def figures() -> dict[str, float]:
            text = httpx.get(f"{service.url}/metrics").text
            return {
                line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"
            }

        until(lambda: figures()["interplay_retention_finished_timestamp_seconds"] > 0)
        found = figures()
        assert found['interplay_retention_removed_total{what="analysis"}'] == 1
        assert found['interplay_retention_removed_total{what="checkpoint"}'] == 1
        assert found['interplay_retention_removed_total{what="probe"}'] == 0
        assert found["interplay_retention_removed_bytes_total"] == 109
    log = (settings.data_dir / "stderr.txt").read_text()
    assert f"the analysis {old} has gone: it succeeded more than 1 days ago" in log
    assert f"the checkpoint {checkpoint} has gone" in log
    assert world.ids() == {new}
    world.check()
    world.client.destroy()
    engine.dispose()

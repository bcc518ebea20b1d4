"""An attempt at an analysis as the database records it: begun, in progress, ended.

Each function is one transaction that locks the analysis's row, so it stays consistent beside concurrent writers: a
client that cancels, or a worker that was assumed dead and still runs.
"""

import hashlib
import json
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from app.database import read, write
from app.errors import problem
from app.models import Analysis, AnalysisCheckpoint, Checkpoint, FeatureSet, MetadataEntry, Probe, Report, now
from app.schemas import EvaluationOptions
from app.schemas.reports import DEFINITIONS_VERSION, SCHEMA_VERSION
from app.schemas.reports import Report as AnyReport
from workers.child import Progress, Result

_REPORTS: TypeAdapter[Any] = TypeAdapter(AnyReport)
# Characters of a prefix that a checkpoint's row stores; a report has all of it.
_MAX_PREFIX = 200


def begin(engine: sa.Engine, analysis_id: str, max_attempts: int) -> dict[str, Any] | None:
    """Count an attempt and return the task to compute, as JSON values; None if there is nothing left to do."""
    with write(engine) as session:
        row = session.get(Analysis, analysis_id, with_for_update=True)
        if row is None or row.outcome is not None:
            return None
        if row.cancel_requested_at is not None:
            _end(row, Result("cancelled"))
            return None
        if row.attempts >= max_attempts:
            detail = f"Its worker died in each of {row.attempts} attempts; it is not tried again."
            body = problem("too-many-attempts", "The analysis was given up", detail, attempts=row.attempts)
            _end(row, Result("failed", problem=body))
            return None
        row.attempts += 1
        row.started_at = row.started_at or now()
        row.progress_phase, row.progress_done, row.progress_total = "starting", 0, 0
        task: dict[str, Any] = {"analysis_id": row.id, "kind": row.kind, "options": row.options, "axis": row.axis}
        if row.feature_set_id is not None:
            feature_set = session.get_one(FeatureSet, row.feature_set_id)
            subject, data = _subject("feature_set", feature_set), _data("feature_set", feature_set)
            return {**task, "subjects": [subject], "probe": data}
        checkpoints = [session.get_one(Checkpoint, place.checkpoint_id) for place in row.checkpoints]
        probe = session.get_one(Probe, row.probe_id)
        return {
            **task,
            "subjects": [_subject("checkpoint", checkpoint) for checkpoint in checkpoints],
            "probe": _data("probe", probe),
            "file": {name: getattr(probe, name) for name in _OF_FILE},
            "brought": [{name: getattr(checkpoint, name) for name in _OF_BROUGHT} for checkpoint in checkpoints],
        }


def evaluation_of(engine: sa.Engine, task: dict[str, Any], position: int) -> dict[str, Any] | None:
    """Return the newest evaluation report of one of a task's checkpoints on its probe with its options, or None."""
    places = sa.select(AnalysisCheckpoint.analysis_id).where(
        AnalysisCheckpoint.checkpoint_id == task["subjects"][position]["id"]
    )
    reports = (
        sa.select(Report.content)
        .where(Report.kind == "evaluation", Report.probe_id == task["probe"]["id"], Report.analysis_id.in_(places))
        .order_by(Report.created_at.desc(), Report.id.desc())
    )
    with read(engine) as session:
        for content in session.scalars(reports):
            report: dict[str, Any] = json.loads(content)
            # Parsed by the schema: a report older than an option was computed with the option's default.
            theirs, ours = (
                EvaluationOptions(**options) for options in (report["provenance"]["options"], task["options"])
            )
            if theirs == ours and report["definitions_version"] == DEFINITIONS_VERSION:
                return report
    return None


def note(engine: sa.Engine, analysis_id: str, progress: Progress | None) -> bool:
    """Store progress, if any; return whether the analysis is to be cancelled or has ended elsewhere."""
    with write(engine) as session:
        row = session.get(Analysis, analysis_id, with_for_update=True)
        if row is None or row.outcome is not None or row.cancel_requested_at is not None:
            return True
        if progress is not None:
            row.progress_phase, row.progress_done, row.progress_total = progress.phase, progress.done, progress.total
        return False


def finish(engine: sa.Engine, analysis_id: str, result: Result) -> bool:
    """Record the outcome and the report once; return False if an outcome was already recorded."""
    with write(engine) as session:
        row = session.get(Analysis, analysis_id, with_for_update=True)
        if row is None or row.outcome is not None:
            return False
        if result.body is not None:
            report = _report(row, result.body)
            session.add(report)
            session.add_all(MetadataEntry.entries(report.id, _metadata(result.body)))
            _note_names(session, result.body)
            row.progress_phase, row.progress_done = "finished", row.progress_total
        _end(row, result)
        return True


def _end(row: Analysis, result: Result) -> None:
    row.outcome, row.problem, row.finished_at = result.outcome, result.problem, now()


def _subjects(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all subjects of a report."""
    return body.get("subjects") or [body["subject"]]


def _note_names(session: Session, body: dict[str, Any]) -> None:
    """Store on the checkpoints how their files name tensors, which was a guess before a network was built."""
    found = {subject["id"]: subject for subject in _subjects(body) if subject.get("infixes") is not None}
    unchecked = sa.select(Checkpoint).where(Checkpoint.id.in_(found), ~Checkpoint.names_checked)
    # Locked in one order, so that two analyses of the same checkpoints cannot deadlock.
    for checkpoint in session.scalars(unchecked.order_by(Checkpoint.id).with_for_update()):
        subject = found[checkpoint.id]
        checkpoint.prefix, checkpoint.ignored = subject["prefix"][:_MAX_PREFIX], subject["ignored"]
        checkpoint.n_parameters, checkpoint.names_checked = subject["n_parameters"], True


def _metadata(body: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of all subjects of a report: each key with every value that a subject has."""
    found: dict[str, list[Any]] = {}
    for subject in _subjects(body):
        for key, value in subject["metadata"].items():
            found.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return found


def _report(row: Analysis, body: dict[str, Any]) -> Report:
    report_id, created_at = str(uuid4()), now()
    head = {
        "schema_version": SCHEMA_VERSION,
        "definitions_version": DEFINITIONS_VERSION,
        "kind": row.kind,
        "id": report_id,
        "analysis_id": row.id,
        "created_at": created_at,
    }
    content = _REPORTS.validate_python({**head, **body}).model_dump_json(by_alias=True)
    return Report(
        id=report_id,
        created_at=created_at,
        analysis_id=row.id,
        kind=row.kind,
        name=row.name,
        probe_id=row.probe_id,
        feature_set_id=row.feature_set_id,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        content=content,
    )


# A feature set has neither network nor inputs: a report has null for their members.
_OF_SUBJECT = (
    "id", "name", "sha256", "size_bytes", "n_parameters", "architecture", "head", "prefix", "ignored", "asked_prefix",
)  # fmt: skip
_OF_DATA = (
    "id",
    "name",
    "sha256",
    "data_sha256",
    "n_samples",
    "n_classes",
    "class_counts",
    "class_names",
    "format",
    "content",
    "input_shape",
    "preprocess",
)
# Members that determine how a probe's file is read, and those that a checkpoint brings for it.
_OF_FILE = ("columns", "tokenizer_sha256", "max_length")
_OF_BROUGHT = ("preprocess", "tokenizer_sha256")


def _subject(kind: str, row: Checkpoint | FeatureSet) -> dict[str, Any]:
    return {"kind": kind, **{name: getattr(row, name, None) for name in _OF_SUBJECT}, "metadata": row.metadata_}


def _data(kind: str, row: Probe | FeatureSet) -> dict[str, Any]:
    return {"kind": kind, **{name: getattr(row, name, None) for name in _OF_DATA}}

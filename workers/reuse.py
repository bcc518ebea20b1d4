"""Take a point of a series from the report of an earlier evaluation of the same checkpoint on the same inputs."""

import sqlalchemy as sa

from app.schemas.reports import ComputedOn, EvaluationReport, SeriesPoint
from workers import attempts
from workers.tasks import Known, SeriesAnswer, SeriesPointTask


def existing_point(engine: sa.Engine, task: SeriesPointTask) -> SeriesAnswer | None:
    """Return a point of a series from an existing report; None if it must be computed."""
    checkpoint = task.checkpoints[task.number]
    report = attempts.evaluation_of(engine, task, checkpoint)
    if report is None or not _has_the_same_inputs(task, report):
        return None
    return SeriesAnswer(
        point=SeriesPoint(
            x=task.place,
            checkpoint_id=checkpoint.id,
            reused_report_id=report.id,
            # As in a point that is computed.
            splits={
                name: split.model_copy(update={"by_class": None, "reliability": None})
                for name, split in report.splits.items()
            },
        ),
        known=Known.model_validate(
            {**dict(report.subject), "probe": report.probe, "computed_on": _computed_on(report)}
        ),
        timings_seconds={},
    )


def _computed_on(report: EvaluationReport) -> ComputedOn:
    return ComputedOn(**{name: getattr(report.provenance, name) for name in ComputedOn.model_fields})


def _has_the_same_inputs(task: SeriesPointTask, report: EvaluationReport) -> bool:
    """Return whether the report's inputs did not depend on its checkpoint's preprocessing or tokenizer, or all agree.

    If the checkpoints bring different ones the series is refused, whatever was evaluated before.
    """
    brought = [(checkpoint.preprocess, checkpoint.tokenizer_sha256) for checkpoint in task.checkpoints]
    if all(one == brought[0] for one in brought):
        return True
    tokenizer = report.probe.tokenizer
    return "checkpoint" not in (report.probe.preprocess_source, tokenizer.source if tokenizer else None)

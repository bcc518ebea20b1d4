"""Requests and answers about gates and baselines."""

from datetime import datetime

from pydantic import Field

from app.schemas.base import PLAIN_TEXT, Id, Slug, Strict


class GateRequest(Strict):
    """Which gate judges a report, and against what."""

    gate_id: Id
    baseline: Slug | None = Field(
        default=None, description="Name of a baseline; one that is not there yet is no error."
    )
    baseline_report_id: Id | None = Field(
        default=None,
        description="A report in place of where the baseline points now; `baseline` is then its name alone.",
    )


class BaselinePut(Strict):
    """Where a baseline shall point."""

    report_id: Id
    expected_report_id: Id | None = Field(
        default=None,
        description="Move it only from here, null: only where there is none yet. Left out: wherever it is.",
    )
    note: str | None = Field(default=None, max_length=500, pattern=PLAIN_TEXT, description="Why, for the history.")


class Baseline(Strict):
    """A name for what candidates are compared with."""

    name: str
    report_id: str
    report_kind: str
    checkpoint_id: str | None = Field(description="That an evaluation looked at; of a comparison B.")
    probe_id: str | None
    created_at: datetime
    moved_at: datetime


class BaselineMove(Strict):
    """A move that was asked for; not `done` where the baseline was no longer where the caller had seen it."""

    id: str
    report_id: str
    before_report_id: str | None
    done: bool
    note: str | None
    created_at: datetime

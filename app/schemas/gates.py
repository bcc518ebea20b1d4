"""Requests and answers about gates and baselines."""

from datetime import datetime

from pydantic import Field

from app.schemas.base import PLAIN_TEXT, Id, Slug, Strict


class GateRequest(Strict):
    """The gate that judges a report, and the baseline to compare with."""

    gate_id: Id
    baseline: Slug | None = Field(default=None, description="Name of a baseline; a missing baseline is not an error.")
    baseline_report_id: Id | None = Field(
        default=None,
        description="Report to use instead of the baseline's current one; `baseline` then only names it.",
    )


class BaselinePut(Strict):
    """The new report of a baseline."""

    report_id: Id
    expected_report_id: Id | None = Field(
        default=None,
        description="Move only if the baseline points at this report; null: only if there is none; omitted: always.",
    )
    note: str | None = Field(default=None, max_length=500, pattern=PLAIN_TEXT, description="Reason, for the history.")


class Baseline(Strict):
    """A named report that candidates are compared with."""

    name: str
    report_id: str
    report_kind: str
    checkpoint_id: str | None = Field(description="The checkpoint of an evaluation; B of a comparison.")
    probe_id: str | None
    created_at: datetime
    moved_at: datetime


class BaselineMove(Strict):
    """A requested move; `done` is false if the baseline no longer pointed at the report that the caller expected."""

    id: str
    report_id: str
    before_report_id: str | None
    done: bool
    note: str | None
    created_at: datetime

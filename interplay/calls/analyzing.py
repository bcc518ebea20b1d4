"""Calls that queue analyses, wait for them, and return their reports."""

import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast, overload

from interplay.calls.collections import CollectionCalls, given
from interplay.kinds import COMPARISON, EVALUATION, PATH, PRUNING, SERIES
from interplay.results import (
    Analysis,
    ComparisonReport,
    EvaluationReport,
    PathReport,
    PruningReport,
    Report,
    SeriesReport,
    SucceededAnalysis,
)
from interplay.transport import AnalysisFailed, Body, InterplayError, segment
from interplay.waiting import poll_states

# Mappings are invariant in their keys: without it mypy would refuse a dict with int keys.
X = TypeVar("X", bound=float)


class AnalyzingCalls(CollectionCalls):
    """Calls that queue analyses, wait for them, and return their reports."""

    def create_analysis(
        self,
        *,
        checkpoint_id: str | None = None,
        probe_id: str | None = None,
        feature_set_id: str | None = None,
        kind: str = EVALUATION.name,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Analysis:
        """Queue an analysis of a checkpoint on a probe, or of a feature set.

        Args:
            checkpoint_id: with `probe_id`.
            probe_id: with `checkpoint_id`.
            feature_set_id: alone.
            kind: kind of the analysis.
            options: `null_permutations`, `seed`, `tolerance`, `batch_size`, `samples`, `precision` ("float32", or
                "bfloat16" for a forward pass under autocast); omitted options have their defaults.
            idempotency_key: the same key and request give the same analysis; default: a new key each call.

        Raises:
            ValueError: a number in the options is NaN or infinite; so too for every other kind of analysis.
        """
        subject = {"checkpoint_id": checkpoint_id, "probe_id": probe_id, "feature_set_id": feature_set_id}
        return self._queue(kind, given(subject), options, idempotency_key)

    def create_comparison(
        self,
        checkpoint_a_id: str,
        checkpoint_b_id: str,
        *,
        probe_id: str,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Analysis:
        """Queue a comparison of two checkpoints on the same samples; their architectures may differ.

        Args:
            checkpoint_a_id: checkpoint A, the reference.
            checkpoint_b_id: checkpoint B; differences are B - A.
            probe_id: the samples that both are evaluated on.
            options: those of `create_analysis`, and `interval` ("delta", "bootstrap"), `resamples`, `confidence`.
            idempotency_key: as of `create_analysis`.
        """
        subject = {"checkpoint_a_id": checkpoint_a_id, "checkpoint_b_id": checkpoint_b_id, "probe_id": probe_id}
        return self._queue(COMPARISON.name, subject, options, idempotency_key)

    def create_path(
        self,
        checkpoint_a_id: str,
        checkpoint_b_id: str,
        *,
        probe_id: str,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Analysis:
        """Queue the straight line between the weights of two checkpoints of one architecture.

        Args:
            checkpoint_a_id: the end at w = 0.
            checkpoint_b_id: the end at w = 1.
            probe_id: the probe that each point is evaluated on.
            options: those of `create_analysis`, and `grid` ({"points": 25}, {"values": [...]} or "adaptive"),
                `normalisation` ("interpolate", "recalibrate"), `alignment` ("none", "weight_matching"), `extrapolate`.
            idempotency_key: as of `create_analysis`.
        """
        subject = {"checkpoint_a_id": checkpoint_a_id, "checkpoint_b_id": checkpoint_b_id, "probe_id": probe_id}
        return self._queue(PATH.name, subject, options, idempotency_key)

    def create_pruning(
        self,
        checkpoint_id: str,
        *,
        probe_id: str,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Analysis:
        """Queue a sweep of magnitude pruning.

        Args:
            checkpoint_id: the checkpoint to prune.
            probe_id: the probe that each point is evaluated on.
            options: those of `create_analysis`, and `sparsities`, `scope` ("global", "layerwise"), `include_head`.
            idempotency_key: as of `create_analysis`.
        """
        subject = {"checkpoint_id": checkpoint_id, "probe_id": probe_id}
        return self._queue(PRUNING.name, subject, options, idempotency_key)

    def create_series(
        self,
        axis: str,
        checkpoints: Mapping[X, str],
        *,
        probe_id: str,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Analysis:
        """Queue checkpoints of one architecture in the order of their numbers.

        Args:
            axis: name of the numbers, for example `epoch`.
            checkpoints: id by number.
            probe_id: the probe that each is evaluated on.
            options: those of `create_analysis`.
            idempotency_key: as of `create_analysis`.
        """
        values = sorted(checkpoints)
        subject = {
            "axis": {"name": axis, "values": values},
            "checkpoint_ids": [checkpoints[value] for value in values],
            "probe_id": probe_id,
        }
        return self._queue(SERIES.name, subject, options, idempotency_key)

    def get_analysis(self, analysis_id: str) -> Analysis:
        """Return the state of an analysis."""
        return cast(Analysis, self._call("GET", f"/v1/analyses/{segment(analysis_id)}", repeatable=True))

    def wait(
        self,
        analysis_id: str,
        *,
        poll_seconds: float = 0.25,
        timeout_seconds: float | None = None,
        on_progress: Callable[[Analysis], None] | None = None,
    ) -> SucceededAnalysis:
        """Block until an analysis has succeeded, and return it.

        The service streams events; if they do not get through, it is polled. The wait survives a restart of the
        service that is no longer than calls are retried.

        Args:
            analysis_id: id of the analysis.
            poll_seconds: pause between two polls, if there are no events.
            timeout_seconds: give up after this time; the analysis continues.
            on_progress: called with each received state of the analysis.

        Raises:
            AnalysisFailed: it failed or was cancelled.
            WaitTimeout: the timeout has passed.
        """
        for state in poll_states(
            self._transport, analysis_id, poll_seconds=poll_seconds, timeout_seconds=timeout_seconds
        ):
            if on_progress is not None:
                on_progress(cast(Analysis, state))
            if state["status"] == "succeeded":
                return cast(SucceededAnalysis, state)
            if state["status"] in ("failed", "cancelled"):
                raise AnalysisFailed(state)
        raise AssertionError("states are polled until the time is up, which raises")

    def cancel(self, analysis_id: str) -> Analysis:
        """Stop an analysis at its next step."""
        # Cancelling is idempotent.
        return cast(Analysis, self._call("POST", f"/v1/analyses/{segment(analysis_id)}/cancel", repeatable=True))

    @overload
    def get_report(self, report_id: str) -> Report: ...
    @overload
    def get_report(self, report_id: str, kind: Literal["evaluation"]) -> EvaluationReport: ...
    @overload
    def get_report(self, report_id: str, kind: Literal["comparison"]) -> ComparisonReport: ...
    @overload
    def get_report(self, report_id: str, kind: Literal["path"]) -> PathReport: ...
    @overload
    def get_report(self, report_id: str, kind: Literal["pruning"]) -> PruningReport: ...
    @overload
    def get_report(self, report_id: str, kind: Literal["series"]) -> SeriesReport: ...
    def get_report(self, report_id: str, kind: str | None = None) -> Report:
        """Return a whole report.

        Args:
            report_id: id of the report.
            kind: the expected kind; with it editors and mypy know the report's keys.

        Raises:
            InterplayError: it is of another kind.
        """
        report = self._call("GET", f"/v1/reports/{segment(report_id)}", repeatable=True)
        if kind is not None and report.get("kind") != kind:
            raise InterplayError(f"The report {report_id} is of the kind {report.get('kind')}, not {kind}.")
        return cast(Report, report)

    def get_chart(self, report_id: str, name: str = "overview", *, format: str = "svg") -> bytes:
        """Return a chart of a report.

        Args:
            report_id: id of the report.
            name: `overview` shows the whole; the problem for an unknown name lists the existing ones.
            format: `svg`, `png`, or `json` for the Vega-Lite specification.
        """
        path = f"/v1/reports/{segment(report_id)}/charts/{segment(name)}.{segment(format)}"
        picture: bytes = self._transport.send("GET", path, repeatable=True).content
        return picture

    def _queue(
        self, kind: str, subject: Body, options: Mapping[str, Any] | None, idempotency_key: str | None
    ) -> Analysis:
        body = {"kind": kind, **subject, "options": dict(options or {})}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return cast(Analysis, self._call("POST", "/v1/analyses", json=body, headers=headers, repeatable=True))

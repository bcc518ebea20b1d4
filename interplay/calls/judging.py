"""Calls of gates, verdicts and baselines."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from interplay.calls.collections import CollectionCalls, given
from interplay.results import Baseline, BaselineMove, Gate, Verdict
from interplay.transport import Body, ProblemError, segment


class JudgingCalls(CollectionCalls):
    """Calls of gates, verdicts and baselines."""

    def create_gate(self, gate: Mapping[str, Any]) -> Gate:
        """Store a gate as the next version of its name; if it equals the current version, return that version.

        Args:
            gate: `name`, `checks`, and optionally `kind` and `description`, as in its file (docs/gates.md).
        """
        return cast(Gate, self._call("POST", "/v1/gates", json=dict(gate), repeatable=True))

    def get_gate(self, gate: str) -> Gate:
        """Return a gate by its id, or by its name: NAME is its current version, NAME@3 its third."""
        name, _, version = gate.partition("@")
        for found in self.list("gates", name=name):
            if version in ("", str(found["version"])):
                gate = found["id"]
                break
        return cast(Gate, self._call("GET", f"/v1/gates/{segment(gate)}", repeatable=True))

    def judge(
        self, report_id: str, *, gate_id: str, baseline: str | None = None, baseline_report_id: str | None = None
    ) -> Verdict:
        """Return the verdict of a gate on a report.

        Args:
            report_id: a report of the gate's kind; of a comparison, B is judged against A.
            gate_id: id of a version of a gate.
            baseline: name of the baseline that changes are measured against; if it is missing they are undefined.
            baseline_report_id: a report to use instead of the one that the baseline points at now.
        """
        request = {"gate_id": gate_id, "baseline": baseline, "baseline_report_id": baseline_report_id}
        return cast(
            Verdict, self._call("POST", f"/v1/reports/{segment(report_id)}/gate", json=given(request), repeatable=True)
        )

    def get_baseline(self, name: str) -> Baseline:
        """Return a baseline with the report that it points at."""
        return cast(Baseline, self._call("GET", f"/v1/baselines/{segment(name)}", repeatable=True))

    def set_baseline(
        self,
        name: str,
        report_id: str,
        *,
        expected_report_id: str | Literal["any"] | None = "any",
        note: str | None = None,
    ) -> Baseline:
        """Point a baseline at a report.

        Args:
            name: letters, digits, dots, dashes and underscores.
            report_id: the report to compare candidates with.
            expected_report_id: move it only from this report; None: only if it does not exist yet; default: always.
            note: reason, for the history.

        Raises:
            ProblemError: status 409 if it is not at `expected_report_id`.
        """
        body: Body = {"report_id": report_id, **given({"note": note})}
        if expected_report_id != "any":
            body["expected_report_id"] = expected_report_id
        place, retries = f"/v1/baselines/{segment(name)}", self._transport.retries()
        try:
            return cast(Baseline, self._call("PUT", place, json=body, repeatable=True, retries=retries))
        except ProblemError as error:
            # The first attempt moved it, and its response was lost.
            if error.status == 409 and retries.used and error.members.get("report_id") == report_id:
                return self.get_baseline(name)
            raise

    def baseline_history(self, name: str, *, limit: int = 50) -> Sequence[BaselineMove]:
        """Return the requested moves, newest first, at most 200; `done` is false for a refused one."""
        history = self._call("GET", f"/v1/baselines/{segment(name)}/history", params={"limit": limit}, repeatable=True)
        items: Sequence[BaselineMove] = history["items"]
        return items

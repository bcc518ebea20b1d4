"""The HTTP client of an Interplay service.

    with Client() as client:
        checkpoint = client.push_checkpoint("net.safetensors", name="net", metadata={"epoch": 10})
        probe = client.push_probe("digits.safetensors", name="digits")
        analysis = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe["id"])
        report = client.get_report(client.wait(analysis["id"])["report_id"])

Results are plain dictionaries, as the service sends them; interplay/results.py gives editors and mypy their keys.
Transient failures are retried: interplay/transport.py documents which, and the exceptions that callers can catch.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast, overload

import httpx

from interplay.folders import packed_checkpoint, zipped_folder
from interplay.results import (
    Analysis,
    Baseline,
    BaselineMove,
    Checkpoint,
    ComparisonReport,
    EvaluationReport,
    FeatureSet,
    Gate,
    GateSummary,
    PathReport,
    Probe,
    PruningReport,
    Report,
    ReportSummary,
    SeriesReport,
    SucceededAnalysis,
    Verdict,
)
from interplay.transport import (
    DEFAULT_URL,
    AnalysisFailed,
    Body,
    InterplayError,
    ProblemError,
    ServiceUnreachable,
    Transport,
    WaitTimeout,
    segment,
)
from interplay.uploads import push
from interplay.waiting import poll_states

__all__ = [
    "DEFAULT_URL",
    "AnalysisFailed",
    "Body",
    "Client",
    "InterplayError",
    "ProblemError",
    "ServiceUnreachable",
    "WaitTimeout",
]

# Mappings are invariant in their keys: without it mypy would refuse a dict with int keys.
X = TypeVar("X", bound=float)
Collection = Literal["checkpoints", "probes", "feature-sets", "analyses", "reports", "gates", "baselines"]

_RETRY_SECONDS = 30.0


class Client:
    """One service, over HTTP. Use it as a context manager, or call `close`.

    Args:
        url: the service's URL; default: the variable INTERPLAY_URL, else http://127.0.0.1:8321.
        api_key: sent as a bearer token; default: the variable INTERPLAY_API_KEY, else none.
        timeout: seconds without network activity after which a call gives up.
        retry_seconds: how long a call is retried after transient failures, in growing pauses; 0 tries once. Default:
            the variable INTERPLAY_RETRY_SECONDS, else 30.

    Raises:
        ValueError: `url` is not an http or https URL, or INTERPLAY_RETRY_SECONDS is not a number of seconds.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        retry_seconds: float | None = None,
    ) -> None:
        self._transport = Transport(
            url or os.environ.get("INTERPLAY_URL") or DEFAULT_URL,
            api_key or os.environ.get("INTERPLAY_API_KEY"),
            timeout,
            _retry_seconds() if retry_seconds is None else retry_seconds,
        )
        self.url = self._transport.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def push_checkpoint(
        self,
        path: str | Path,
        *,
        name: str,
        architecture: Mapping[str, Any] | None = None,
        head: str | None = None,
        prefix: str | None = None,
        preprocess: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Upload a safetensors checkpoint; it streams from disk, whatever its size.

        If the response is lost, the client asks the service whether it has the file before sending it again.

        Args:
            path: the file, or a Hugging Face folder: config.json, weights in one file or in shards with their index,
                and optionally preprocessor_config.json and tokenizer.json. An archive of one is accepted too.
            name: display name; need not be unique.
            architecture: description of the network; default: the one in the file's own metadata, or config.json.
            head: module name of the classification head; default: the family's own.
            prefix: prefix of the weights' names, such as `ema_model.`, if the file holds several copies.
            preprocess: of images, for probes without one: in a probe's form, or a preprocessor_config.json.
            tokenizer: content of a tokenizer.json, for texts of probes without one.
            metadata: for example run, epoch, tags; text, numbers, booleans or lists of these.
        """
        spec = {
            "name": name,
            "architecture": architecture,
            "head": head,
            "prefix": prefix,
            "preprocess": preprocess,
            "tokenizer": tokenizer,
            "metadata": metadata,
        }
        path = Path(path)
        if not path.is_dir():
            return cast(Checkpoint, self._push("checkpoints", path, spec))
        with packed_checkpoint(path) as archive:
            return cast(Checkpoint, self._push("checkpoints", archive, spec))

    def push_probe(
        self,
        path: str | Path,
        *,
        name: str,
        class_names: Sequence[str] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        columns: Mapping[str, str | None] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Probe:
        """Upload a probe dataset; its format is detected from its content.

        Args:
            path: safetensors or npz with `inputs`, `labels` and, optionally, `split`; Parquet with images or texts and
                labels; CSV or JSON lines with texts and labels; a zip of class folders with images, or of Parquet
                files; or a folder of either, which is zipped, uncompressed, in the temporary directory. For causal
                language models texts, or `input_ids` in place of `inputs`, need no labels.
            name: display name.
            class_names: one for each class, in the order of the labels. For a file with its own class names: all of
                them in the order that the labels should have, or other names for them, in their sorted order.
            preprocess: `scale`, `mean`, `std`; the network's inputs are (inputs * scale - mean) / std. For images
                `resize`, `resample`, `crop`, `colour` come first; default: the checkpoint's preprocessing.
            columns: names of columns by `image`, `text`, `label`, `split`, if they are not the usual ones; `label`
                None for texts without labels.
            tokenizer: content of a tokenizer.json, for texts; default: the checkpoint's tokenizer.
            max_length: number of tokens of a text that are kept.
            metadata: as for a checkpoint.
        """
        spec = {
            "name": name,
            "class_names": None if class_names is None else [*class_names],
            "preprocess": preprocess,
            "columns": columns,
            "tokenizer": tokenizer,
            "max_length": max_length,
            "metadata": metadata,
        }
        path = Path(path)
        if not path.is_dir():
            return cast(Probe, self._push("probes", path, spec))
        with zipped_folder(path) as archive:
            return cast(Probe, self._push("probes", archive, spec))

    def push_feature_set(self, path: str | Path, *, name: str, metadata: Mapping[str, Any] | None = None) -> FeatureSet:
        """Upload features, labels and head of a network that the service cannot build (safetensors)."""
        return cast(FeatureSet, self._push("feature-sets", Path(path), {"name": name, "metadata": metadata}))

    def create_analysis(
        self,
        *,
        checkpoint_id: str | None = None,
        probe_id: str | None = None,
        feature_set_id: str | None = None,
        kind: str = "evaluation",
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
        return self._queue({"kind": kind, **_given(subject)}, options, idempotency_key)

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
        ends = {"checkpoint_a_id": checkpoint_a_id, "checkpoint_b_id": checkpoint_b_id}
        return self._queue({"kind": "comparison", **ends, "probe_id": probe_id}, options, idempotency_key)

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
        ends = {"checkpoint_a_id": checkpoint_a_id, "checkpoint_b_id": checkpoint_b_id}
        return self._queue({"kind": "path", **ends, "probe_id": probe_id}, options, idempotency_key)

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
        request = {"kind": "pruning", "checkpoint_id": checkpoint_id, "probe_id": probe_id}
        return self._queue(request, options, idempotency_key)

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
        request = {
            "kind": "series",
            "axis": {"name": axis, "values": values},
            "checkpoint_ids": [checkpoints[value] for value in values],
            "probe_id": probe_id,
        }
        return self._queue(request, options, idempotency_key)

    def _queue(self, request: Body, options: Mapping[str, Any] | None, idempotency_key: str | None) -> Analysis:
        body = {**request, "options": dict(options or {})}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return cast(Analysis, self._call("POST", "/v1/analyses", json=body, headers=headers, repeatable=True))

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
        picture: bytes = self._send("GET", path, repeatable=True).content
        return picture

    # --- gates and baselines ---

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
            Verdict, self._call("POST", f"/v1/reports/{segment(report_id)}/gate", json=_given(request), repeatable=True)
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
        body: Body = {"report_id": report_id, **_given({"note": note})}
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

    def push_checkpoint_once(self, path: str | Path, *, name: str, **described: Any) -> tuple[Checkpoint, bool]:
        """Push a checkpoint as `push_checkpoint` does, but do not send a file whose content the service already has.

        Returns:
            The checkpoint, new in either case, and whether the file was sent. A folder is always sent.
        """
        path = Path(path)
        if path.is_dir():
            return self.push_checkpoint(path, name=name, **described), True
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        spec = json.dumps(_given({"name": name, **described, "sha256": sha256})).encode()
        try:
            held = self._call("POST", "/v1/checkpoints", files=[("spec", (None, spec, "application/json"))])
        except ProblemError as error:
            if error.status != 404:
                raise
            return self.push_checkpoint(path, name=name, **described), True
        return cast(Checkpoint, held), False

    def get(self, collection: Collection, resource_id: str) -> Body:
        """Return one resource of a collection."""
        return self._call("GET", f"/v1/{collection}/{segment(resource_id)}", repeatable=True)

    def find_probe(self, probe: str) -> Probe:
        """Return a probe by its name, the newest of several, or by its id."""
        for found in self.list("probes", name=probe, limit=1):
            return found
        return cast(Probe, self.get("probes", probe))

    def delete(self, collection: Collection, resource_id: str) -> None:
        """Delete a checkpoint, probe or feature set that no analysis needs."""
        retries = self._transport.retries()
        try:
            self._transport.send("DELETE", f"/v1/{collection}/{segment(resource_id)}", repeatable=True, retries=retries)
        except ProblemError as error:
            # The first attempt deleted it, and its response was lost.
            if not (error.status == 404 and retries.used):
                raise

    @overload
    def list(
        self,
        collection: Literal["checkpoints"],
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[Checkpoint]: ...
    @overload
    def list(
        self,
        collection: Literal["probes"],
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[Probe]: ...
    @overload
    def list(
        self,
        collection: Literal["feature-sets"],
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[FeatureSet]: ...
    @overload
    def list(
        self,
        collection: Literal["analyses"],
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[Analysis]: ...
    @overload
    def list(
        self,
        collection: Literal["reports"],
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[ReportSummary]: ...
    @overload
    def list(
        self,
        collection: Literal["gates"],
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[GateSummary]: ...
    @overload
    def list(
        self,
        collection: Literal["baselines"],
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[Baseline]: ...
    def list(
        self,
        collection: Collection,
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[Any]:
        """Yield the resources of a collection that match the filters, newest first, page by page.

        Args:
            collection: checkpoints, probes, feature-sets, analyses, reports, gates or baselines.
            limit: most resources to yield; default: all.
            page_size: resources per request.
            metadata: for each key a value, or a list of values, all of which a resource must have.
            filters: `name`, `created_after`, `created_before`; for analyses and reports `kind`, `checkpoint_id`,
                `probe_id`, `feature_set_id`; for analyses `status`.
        """
        query: dict[str, Any] = {
            # A time without a zone is local time, as in Python; the service needs the zone.
            key: value.astimezone().isoformat() if isinstance(value, datetime) else value
            for key, value in _given(filters).items()
        }
        query["metadata"] = [
            f"{key}={_metadata_text(value)}"
            for key, values in (metadata or {}).items()
            for value in (values if isinstance(values, list | tuple) else [values])
        ]
        left = limit
        while left is None or left > 0:
            query["limit"] = page_size if left is None else min(page_size, left)
            page = self._call("GET", f"/v1/{collection}", params=query, repeatable=True)
            yield from page["items"]
            if not page["next_cursor"]:
                return
            left = None if left is None else left - len(page["items"])
            query["cursor"] = page["next_cursor"]

    def _push(self, collection: Collection, path: Path, spec: Mapping[str, Any]) -> Body:
        return push(self._transport, collection, path, _given(spec))

    def _call(self, method: str, path: str, **request: Any) -> Body:
        return self._transport.call(method, path, **request)

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self._transport.send(method, path, **request)


def _retry_seconds() -> float:
    text = os.environ.get("INTERPLAY_RETRY_SECONDS") or str(_RETRY_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"INTERPLAY_RETRY_SECONDS is {text!r}; it must be a number of seconds, at least 0.")
    return seconds


def _given(values: Mapping[str, Any]) -> Body:
    return {key: value for key, value in values.items() if value is not None}


def _metadata_text(value: Any) -> str:
    """Return a metadata value as the service's filters compare it: `final=true`, `epoch=10`, `run=a`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)

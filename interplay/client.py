"""The HTTP client of an Interplay service.

    with Client() as client:
        checkpoint = client.push_checkpoint("net.safetensors", name="net", metadata={"epoch": 10})
        probe = client.push_probe("digits.safetensors", name="digits")
        analysis = client.create_analysis(checkpoint_id=checkpoint["id"], probe_id=probe["id"])
        report = client.get_report(client.wait(analysis["id"])["report_id"])

Bodies are plain dictionaries, as the service sends them: /docs of a running service lists every field.

    InterplayError          what a caller can expect to catch
    ├── ProblemError        the service answered with a problem (RFC 9457)
    ├── ServiceUnreachable  nothing answered at the URL, or what answered is no Interplay service
    ├── AnalysisFailed      an analysis that was waited for ended as failed or cancelled
    └── WaitTimeout         it had not ended when the time was up
"""

import ipaddress
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx

from interplay.folders import packed_checkpoint, zipped_folder

DEFAULT_URL = "http://127.0.0.1:8321"
Body = dict[str, Any]
# Mappings do not vary in their keys: without it a dict of whole numbers would not do.
X = TypeVar("X", bound=float)
Collection = Literal["checkpoints", "probes", "feature-sets", "analyses", "reports"]

# uvicorn closes a connection that was idle for 5 s. Ours must go first: a request that is written while the other
# side closes is lost, and an upload cannot be sent twice behind the caller's back.
_KEEPALIVE_SECONDS = 2.0
# After the last byte of an upload the service still moves the file to its storage, which may be a slow bucket.
_UPLOAD_ANSWER_SECONDS = 600.0
# `wait` outlives a restart of the service that is shorter than this.
_OUTAGE_SECONDS = 20.0


class InterplayError(Exception):
    """Base of what this client raises; its text is meant for a person."""


class ProblemError(InterplayError):
    """The service answered with a problem.

    Attributes:
        status: HTTP status.
        type: identifier of the kind of problem; docs/problems.md lists them.
        title: the kind in words.
        detail: what was wrong this time.
        members: the problem's other members, such as lists of names.
    """

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        members = dict(problem)
        members.pop("status", None)
        self.status = status
        self.type = str(members.pop("type", "about:blank"))
        self.title = str(members.pop("title", f"HTTP {status}"))
        self.detail = str(members.pop("detail", ""))
        self.members: Body = members
        super().__init__(f"{self.title}: {self.detail}" if self.detail else self.title)


class ServiceUnreachable(InterplayError):
    """Nothing answered at the URL in time, or what answered is no Interplay service."""


class AnalysisFailed(InterplayError):
    """An analysis that was waited for ended as `failed` or `cancelled`.

    Attributes:
        analysis: its last state.
        problem: why, as the service says it; None where it was cancelled.
    """

    def __init__(self, analysis: Body) -> None:
        self.analysis = analysis
        self.problem: Body | None = analysis.get("problem")
        reason = f"{self.problem.get('title')}: {self.problem.get('detail')}" if self.problem else analysis["status"]
        super().__init__(f"Analysis {analysis['id']}: {reason}")


class WaitTimeout(InterplayError):
    """The analysis had not ended when the time was up; it goes on."""


class Client:
    """One service, over HTTP. Use it as a context manager, or call `close`.

    Args:
        url: where the service listens; default the variable INTERPLAY_URL, else http://127.0.0.1:8321.
        api_key: sent as a bearer token; default the variable INTERPLAY_API_KEY, else none.
        timeout: seconds without a sign of life after which a call gives up.

    Raises:
        ValueError: `url` is not an http or https URL.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, timeout: float = 30.0) -> None:
        self.url = (url or os.environ.get("INTERPLAY_URL") or DEFAULT_URL).rstrip("/")
        key = api_key or os.environ.get("INTERPLAY_API_KEY")
        host = _host(self.url)
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("The API key holds characters that a header cannot carry.")
        self._timeout = httpx.Timeout(timeout)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self._timeout,
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS),
            # A proxy from the environment is for other machines; it cannot reach our loopback.
            trust_env=not _is_loopback(host),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def push_checkpoint(
        self,
        path: str | Path,
        *,
        name: str,
        architecture: Mapping[str, Any] | None = None,
        head: str | None = None,
        preprocess: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Body:
        """Upload a safetensors checkpoint; it streams from disk, whatever its size.

        Args:
            path: the file, or a Hugging Face folder: config.json, weights in one file or in shards with their index,
                preprocessor_config.json and tokenizer.json where there are such. An archive of one will do as well.
            name: what people will call it; need not be unique.
            architecture: description of the network; default: the one in the file's own metadata, or config.json.
            head: module name of the classification head; default: the family's own.
            preprocess: of images, where a probe gives none: as of a probe, or a preprocessor_config.json.
            tokenizer: content of a tokenizer.json, for texts of probes that bring none.
            metadata: such as run, epoch, tags; text, numbers, booleans or lists of these.
        """
        spec = {
            "name": name,
            "architecture": architecture,
            "head": head,
            "preprocess": preprocess,
            "tokenizer": tokenizer,
            "metadata": metadata,
        }
        path = Path(path)
        if not path.is_dir():
            return self._push("checkpoints", path, spec)
        with packed_checkpoint(path) as archive:
            return self._push("checkpoints", archive, spec)

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
    ) -> Body:
        """Upload a probe dataset; what is in the file is found by its content.

        Args:
            path: safetensors or npz with `inputs`, `labels` and, optionally, `split`; Parquet with images or texts and
                labels; CSV or JSON lines with texts and labels; a zip of class folders with images, or such a folder
                itself, which is zipped, uncompressed, beside the system's other temporary files. For causal language
                models texts, or `input_ids` in place of `inputs`, need no labels.
            name: what people will call it.
            class_names: one for each class, in the order of the labels, where the file has none.
            preprocess: `scale`, `mean`, `std`; networks see (inputs * scale - mean) / std. Of images `resize`,
                `resample`, `crop`, `colour` come first; default: what the checkpoint brings.
            columns: names of columns by `image`, `text`, `label`, `split`, where they are not the usual ones;
                `label` None for texts without labels.
            tokenizer: content of a tokenizer.json, for texts; default: what the checkpoint brings.
            max_length: tokens of a text that are kept.
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
            return self._push("probes", path, spec)
        with zipped_folder(path) as archive:
            return self._push("probes", archive, spec)

    def push_feature_set(self, path: str | Path, *, name: str, metadata: Mapping[str, Any] | None = None) -> Body:
        """Upload features, labels and head of a network that the service cannot build (safetensors)."""
        return self._push("feature-sets", Path(path), {"name": name, "metadata": metadata})

    def create_analysis(
        self,
        *,
        checkpoint_id: str | None = None,
        probe_id: str | None = None,
        feature_set_id: str | None = None,
        kind: str = "evaluation",
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Body:
        """Queue an analysis of a checkpoint on a probe, or of a feature set.

        Args:
            checkpoint_id: with `probe_id`.
            probe_id: with `checkpoint_id`.
            feature_set_id: alone.
            kind: what to compute.
            options: `null_permutations`, `seed`, `tolerance`, `batch_size`, `samples`, `precision` ("float32", or
                "bfloat16" for a forward pass under autocast); what is left out has its default.
            idempotency_key: the same key and request give the same analysis; default: a new key each call.
        """
        subject = {"checkpoint_id": checkpoint_id, "probe_id": probe_id, "feature_set_id": feature_set_id}
        return self._queue({"kind": kind, **_given(subject)}, options, idempotency_key)

    def create_path(
        self,
        checkpoint_a_id: str,
        checkpoint_b_id: str,
        *,
        probe_id: str,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Body:
        """Queue the straight line between the weights of two checkpoints of one architecture.

        Args:
            checkpoint_a_id: where w is 0.
            checkpoint_b_id: where w is 1.
            probe_id: what each point is evaluated on.
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
    ) -> Body:
        """Queue a sweep of magnitude pruning.

        Args:
            checkpoint_id: what is pruned.
            probe_id: what each point is evaluated on.
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
    ) -> Body:
        """Queue checkpoints of one architecture in the order of their numbers.

        Args:
            axis: what the numbers are, such as `epoch`.
            checkpoints: id by number.
            probe_id: what each is evaluated on.
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

    def _queue(self, request: Body, options: Mapping[str, Any] | None, idempotency_key: str | None) -> Body:
        body = {**request, "options": dict(options or {})}
        key = idempotency_key or uuid.uuid4().hex
        return self._call("POST", "/v1/analyses", json=body, headers={"Idempotency-Key": key}, repeatable=True)

    def get_analysis(self, analysis_id: str) -> Body:
        """The state of an analysis."""
        return self._call("GET", f"/v1/analyses/{_segment(analysis_id)}", repeatable=True)

    def wait(
        self,
        analysis_id: str,
        *,
        poll_seconds: float = 0.25,
        timeout_seconds: float | None = None,
        on_progress: Callable[[Body], None] | None = None,
    ) -> Body:
        """Block until an analysis has succeeded, and return it. A short outage of the service is sat out.

        Args:
            analysis_id: which.
            poll_seconds: pause between two looks.
            timeout_seconds: give up after so long; the analysis goes on.
            on_progress: called with the analysis at each look.

        Raises:
            AnalysisFailed: it failed or was cancelled.
            WaitTimeout: the time was up.
        """
        started = last_answer = time.monotonic()
        answered = False
        while True:
            try:
                analysis = self.get_analysis(analysis_id)
            except (ServiceUnreachable, ProblemError) as error:
                restarting = not isinstance(error, ProblemError) or error.status in (502, 503, 504)
                if not (answered and restarting and time.monotonic() - last_answer < _OUTAGE_SECONDS):
                    raise
            else:
                answered, last_answer = True, time.monotonic()
                if on_progress is not None:
                    on_progress(analysis)
                if analysis["status"] == "succeeded":
                    return analysis
                if analysis["status"] in ("failed", "cancelled"):
                    raise AnalysisFailed(analysis)
            if timeout_seconds is not None and time.monotonic() - started >= timeout_seconds:
                raise WaitTimeout(f"Analysis {analysis_id} has not ended within {timeout_seconds:g} s; it goes on.")
            time.sleep(poll_seconds)

    def cancel(self, analysis_id: str) -> Body:
        """Stop an analysis at its next step."""
        return self._call("POST", f"/v1/analyses/{_segment(analysis_id)}/cancel")

    def get_report(self, report_id: str) -> Body:
        """A report, whole."""
        return self._call("GET", f"/v1/reports/{_segment(report_id)}", repeatable=True)

    def get_chart(self, report_id: str, name: str = "overview", *, format: str = "svg") -> bytes:
        """A picture of a report.

        Args:
            report_id: which.
            name: `overview` shows the whole; the problem for another name lists what there is.
            format: `svg`, `png`, or `json` for the Vega-Lite specification.
        """
        path = f"/v1/reports/{_segment(report_id)}/charts/{_segment(name)}.{_segment(format)}"
        picture: bytes = self._send("GET", path, repeatable=True).content
        return picture

    def delete(self, collection: Collection, resource_id: str) -> None:
        """Delete a checkpoint, probe or feature set that no analysis needs."""
        self._send("DELETE", f"/v1/{collection}/{_segment(resource_id)}")

    def list(
        self,
        collection: Collection,
        *,
        limit: int | None = None,
        page_size: int = 100,
        metadata: Mapping[str, Any] | None = None,
        **filters: str | datetime | None,
    ) -> Iterator[Body]:
        """Every resource of a collection that the filters let through, newest first, page by page.

        Args:
            collection: checkpoints, probes, feature-sets, analyses or reports.
            limit: stop after so many; default: all.
            page_size: how many a request asks for.
            metadata: key and value, or a list of values, that a resource must have, all of them.
            filters: `name`, `created_after`, `created_before`; for analyses and reports `kind`, `checkpoint_id`,
                `probe_id`, `feature_set_id`; for analyses `status`.
        """
        query: dict[str, Any] = {
            # Without a zone it is local time, as Python has it; the service wants to be told.
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
        timeout = httpx.Timeout(self._timeout)
        timeout.read = max(_UPLOAD_ANSWER_SECONDS, timeout.read or 0.0)
        with path.open("rb") as file:
            # The spec goes first: whoever looks at what is on its way sees what it is.
            parts = [
                ("spec", (None, json.dumps(_given(spec)).encode(), "application/json")),
                ("file", (path.name, file, "application/octet-stream")),
            ]
            return self._call("POST", f"/v1/{collection}", files=parts, timeout=timeout)

    def _call(self, method: str, path: str, **request: Any) -> Body:
        return self._body(self._send(method, path, **request))

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        response = self._exchange(method, path, **request)
        if response.is_success:
            return response
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            # Not ours: a proxy between here and the service, or another server.
            problem = {"title": f"{self.url} answered {response.status_code}", "detail": response.text[:300].strip()}
        raise ProblemError(response.status_code, problem)

    def _exchange(self, method: str, path: str, *, repeatable: bool = False, **request: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **request)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            if repeatable:  # the connection broke, and doing it twice does no harm
                return self._exchange(method, path, **request)
            raise ServiceUnreachable(f"The connection to {self.url} broke: {error or type(error).__name__}.") from error
        except httpx.TimeoutException as error:
            raise ServiceUnreachable(f"{self.url} did not answer in time ({type(error).__name__}).") from error
        except httpx.TransportError as error:
            raise ServiceUnreachable(f"{self.url} cannot be reached: {error or type(error).__name__}.") from error
        except httpx.DecodingError as error:
            raise ServiceUnreachable(f"What answers at {self.url} is no Interplay service: {error}.") from error

    def _body(self, response: httpx.Response) -> Body:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ServiceUnreachable(f"What answers at {self.url} is no Interplay service: its answer is not JSON.")
        return body


def _host(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is not a URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is not an http or https URL, such as {DEFAULT_URL}")
    return parsed.host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _given(values: Mapping[str, Any]) -> Body:
    return {key: value for key, value in values.items() if value is not None}


def _segment(identifier: str) -> str:
    # An id is typed by people: "a/b" or "?x" must stay one unknown id, never become another route.
    return quote(identifier, safe="") or "%20"


def _metadata_text(value: Any) -> str:
    """A metadata value as the service's filters compare it: `final=true`, `epoch=10`, `run=a`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)

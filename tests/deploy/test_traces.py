"""Traces of a real service, received by OTLP: one from the request to the report, and none where nobody asked."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import save

from app.models import Analysis
from app.traces import are_wanted
from tests.app.test_analyses import pair
from tests.deploy.collector import Collector, Span, collecting
from tests.services import Service, running, until
from tests.sources import SourceServer, source_server

# A request of a CI job that traces itself: its trace, and its span.
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
# Spans are sent after half a second.
QUICKLY = {"OTEL_BSP_SCHEDULE_DELAY": "500"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def source() -> Iterator[SourceServer]:
    with source_server() as server:
        yield server


@pytest.fixture(scope="module")
def traced(collector: Collector, source: SourceServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service that traces, and may fetch from the source."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            for name, value in QUICKLY.items():
                patch.setenv(name, value)
            service = stack.enter_context(
                running(tmp_path_factory.mktemp("traced") / "data", sources=f"{source.url}/nets inside")
            )
        yield service


def trace_of(collector: Collector, trace_id: str, *, until_there: str, count: int = 1) -> list[Span]:
    """Wait until spans of this name have come; return the trace."""

    def whole() -> list[Span] | None:
        spans = [span for span in collector.spans if span.trace_id == trace_id]
        known = {span.id for span in spans} | {CALLER}
        there = [span.name for span in spans].count(until_there) >= count
        return spans if there and all(span.parent_id in known for span in spans) else None

    return until(whole, seconds=30)


def asked(service: Service, body: dict[str, Any], trace_id: str) -> dict[str, Any]:
    """Queue an analysis in a trace of the caller's; return it once it has ended."""
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    queued = service.client.post("/v1/analyses", json=body, headers=headers)
    assert queued.status_code == 202, queued.text
    return service.wait(queued.json()["id"])


def tree(spans: list[Span], root: str = CALLER) -> list[Any]:
    """The spans below one, in the order of their beginnings, each with those below it."""
    below = sorted((span for span in spans if span.parent_id == root), key=lambda span: span.began_ns)
    return [(span.name, tree(spans, span.id)) for span in below]


def only(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def test_one_trace_from_a_request_to_its_report(
    traced: Service, collector: Collector, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """The caller's trace goes on in the API, the queue, the worker and the compute process, nested as it happened."""
    ids = pair(traced, mlp_checkpoint_file, digits_probe_file)
    analysis = asked(traced, {"kind": "evaluation", **ids}, TRACE)
    report = traced.report(analysis)
    spans = trace_of(collector, TRACE, until_there="attempt")
    (request,) = tree(spans)
    assert request[0] == "POST /v1/analyses"
    names = [name for name, _ in request[1]]
    assert sorted(names) == ["attempt", "wait in the queue"]
    attempt = dict(request[1])["attempt"]
    assert [name for name, _ in attempt] == ["claim", "fetch files", "compute evaluation", "write the report"]
    computed = [name for name, _ in dict(attempt)["compute evaluation"]]
    # What the report has as sums.
    assert {"load", "features"} <= set(computed)
    phases = {span.name for span in spans} & report["timings_seconds"].keys()
    assert phases >= {"load", "features", "entropies", "collapse", "null"}
    for span in spans:
        if span.parent_id != CALLER:
            parent = next(one for one in spans if one.id == span.parent_id)
            # The wait and the attempt come after the answer to the request; all others lie within.
            if parent.name != "POST /v1/analyses":
                assert parent.began_ns <= span.began_ns <= span.ended_ns <= parent.ended_ns, (span, parent)
    wait, claim = only(spans, "wait in the queue"), only(spans, "claim")
    assert wait.ended_ns <= claim.ended_ns + 10**6
    assert wait.ended_ns - wait.began_ns < 60 * 10**9
    load = sum(span.ended_ns - span.began_ns for span in spans if span.name == "load") / 1e9
    assert load == pytest.approx(report["timings_seconds"]["load"], abs=0.05)
    assert {span.service for span in spans} == {"interplay-api", "interplay-worker"}
    about = only(spans, "POST /v1/analyses").attributes
    assert about["http.route"] == "/v1/analyses"
    assert about["http.response.status_code"] == 202
    done = only(spans, "attempt").attributes
    assert done["interplay.analysis_id"] == analysis["id"]
    assert done["interplay.request_id"] == about["interplay.request_id"]
    assert not any(span.failed for span in spans)
    # A report says nothing of who asked.
    assert TRACE not in traced.client.get(f"/v1/reports/{report['id']}").text


def test_each_point_of_a_path_is_a_span(
    traced: Service, collector: Collector, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A planned analysis has its turns, in them its points with their phases, and the report at the end."""
    trace_id = "1" * 32
    ids = pair(traced, mlp_checkpoint_file, digits_probe_file)
    ends = {"checkpoint_a_id": ids["checkpoint_id"], "checkpoint_b_id": ids["checkpoint_id"]}
    body = {"kind": "path", "probe_id": ids["probe_id"], "options": {"grid": {"points": 5}}, **ends}
    traced.report(asked(traced, body, trace_id))
    spans = trace_of(collector, trace_id, until_there="report")
    ((name, below),) = tree(spans)
    assert name == "POST /v1/analyses"
    counted = Counter(name for name, _ in below)
    assert counted.keys() == {"turn", "wait in the queue"}
    assert counted["turn"] == counted["wait in the queue"]
    work = [one for name, turn in below if name == "turn" for one in turn]
    assert [name for name, _ in work] == ["point"] * 5 + ["report"]
    for _, steps in work[:-1]:
        assert [name for name, _ in steps] == ["claim", "fetch files", "compute path.point", "write the point"]
        assert {"mix", "features"} <= {name for name, _ in dict(steps)["compute path.point"]}
    assert [name for name, _ in work[-1][1]] == ["claim", "fetch files", "compute path.report", "write the report"]
    points = [span.attributes for span in spans if span.name == "point"]
    assert sorted((at["interplay.number"], at["interplay.place"]) for at in points) == [
        (1, 0.0), (2, 1.0), (3, 0.25), (4, 0.5), (5, 0.75)
    ]  # fmt: skip


def test_a_fetch_is_traced_too(
    traced: Service, collector: Collector, source: SourceServer, mlp_checkpoint_file: Path
) -> None:
    """What a request has fetched belongs to its trace."""
    trace_id = "4" * 32
    source.files["/nets/mlp.safetensors"] = mlp_checkpoint_file.read_bytes()
    body = {"name": "fetched", "source": f"{source.url}/nets/mlp.safetensors"}
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    made = traced.client.post("/v1/checkpoints", json=body, headers=headers)
    assert made.status_code == 202, made.text
    until(lambda: traced.client.get(made.headers["location"]).json()["status"] == "succeeded")
    spans = trace_of(collector, trace_id, until_there="fetch checkpoint")
    ((name, below),) = tree(spans)
    assert name == "POST /v1/checkpoints"
    assert sorted(name for name, _ in below) == ["fetch checkpoint", "wait in the queue"]
    assert only(spans, "fetch checkpoint").attributes["interplay.fetch_id"] == made.json()["id"]


def test_a_failure_is_told(
    traced: Service, collector: Collector, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """The span of what failed has the problem; a request that is refused has its status, and is no failure."""
    trace_id = "2" * 32
    ids = pair(traced, mlp_checkpoint_file, digits_probe_file)
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    refused = traced.client.post("/v1/analyses", json={"kind": "evaluation", **ids, "surprise": 1}, headers=headers)
    assert refused.status_code == 422
    request = only(trace_of(collector, trace_id, until_there="POST /v1/analyses"), "POST /v1/analyses")
    assert request.attributes["http.response.status_code"] == 422
    assert not request.failed
    trace_id = "3" * 32
    broken = np.zeros((64, 64), dtype=np.float32)
    broken[0, 0] = np.nan
    made = traced.post(
        "/v1/feature-sets",
        {"name": "broken"},
        save({"features": broken, "labels": np.arange(64) % 4, "head": np.ones((4, 64), np.float32)}),
    )
    failed = asked(traced, {"kind": "evaluation", "feature_set_id": made.json()["id"]}, trace_id)
    assert failed["status"] == "failed"
    spans = trace_of(collector, trace_id, until_there="attempt")
    assert [span.name for span in spans if span.failed] == ["compute feature_set"]


def test_what_machines_ask_all_the_time_is_not_traced(traced: Service, collector: Collector) -> None:
    """Health and figures leave no spans; other requests do, in traces of their own."""
    for path in ("/healthz", "/readyz", "/metrics"):
        traced.client.get(path)
    traced.client.get("/v1/checkpoints", headers={"traceparent": "not one"})
    until(lambda: [span for span in collector.spans if span.name == "GET /v1/checkpoints"])
    assert not {span.name.partition(" ")[2] for span in collector.spans} & {"/healthz", "/readyz", "/metrics", "none"}


@pytest.mark.parametrize(
    "fault",
    ["silent", pytest.param("refusing", marks=pytest.mark.slow), pytest.param("away", marks=pytest.mark.slow)],
)
def test_a_receiver_that_fails_costs_nothing_but_spans(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Analyses succeed beside a receiver that is silent, refuses, or is away; the log says so, and processes stop."""
    with collecting() as failing:
        failing.silence_seconds, failing.status = (60.0, 200) if fault == "silent" else (0.0, 500)
        url = "http://127.0.0.1:9" if fault == "away" else failing.url
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        for name, value in QUICKLY.items():
            monkeypatch.setenv(name, value)
        with running(tmp_path / "data") as service:
            ids = pair(service, mlp_checkpoint_file, digits_probe_file)
            for _ in range(3):
                service.report(service.wait(service.analyze(**ids)["id"], seconds=30))
            if fault != "away":
                until(lambda: failing.requests > 0)
            # Its end, which must come within 15 s, has the last spans to send.
    log = (tmp_path / "data" / "stderr.txt").read_text()
    assert " failed\n" not in log


def test_off_unless_asked_for(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A caller's context is not stored by a service that does not trace, and nothing of OpenTelemetry is loaded."""
    ids = pair(service, mlp_checkpoint_file, digits_probe_file)
    analysis = asked(service, {"kind": "evaluation", **ids}, TRACE)
    engine = sa.create_engine(f"sqlite:///{service.data_dir / 'interplay.db'}")
    with engine.connect() as connection:
        query = sa.select(Analysis.traceparent).where(Analysis.id == analysis["id"])
        assert connection.execute(query).scalar_one() is None
    engine.dispose()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    code = (
        "import sys; from app import traces; traces.start('api'); import app.main\n"
        "with traces.span('one'): assert traces.current() is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert told.stdout.strip() == "[]", told.stdout + told.stderr


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_standard_variables_decide(environment: dict[str, str], wanted: bool) -> None:
    assert are_wanted(environment) is wanted


@pytest.mark.parametrize("command", [["app", "api", "--port", "0"], ["workers"]], ids=["api", "worker"])
@pytest.mark.parametrize("lacking", ["extra", "protocol"])
def test_what_cannot_be_traced_does_not_start(command: list[str], lacking: str, tmp_path: Path) -> None:
    """Asked for without the extra, or by gRPC: one sentence, and status 2."""
    # An environment without the extra: a package of the exporter's name that has nothing.
    hidden = tmp_path / "site" / "opentelemetry"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("")
    environment = {
        **os.environ,
        "INTERPLAY_DATA_DIR": str(tmp_path / "data"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        **({"PYTHONPATH": str(hidden.parent)} if lacking == "extra" else {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}),
    }
    ran = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2, ran.stderr
    (said,) = ran.stderr.strip().splitlines()
    assert ("interplay-server[traces]" if lacking == "extra" else "'grpc'") in said

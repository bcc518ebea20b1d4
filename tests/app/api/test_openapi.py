"""The OpenAPI document, and the service's conformity to it: methods, media types, and no fault for odd requests."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import save

from tests.app.api.test_uploads import FEATURES, HEAD, labels, problem
from tests.fuzz import headers
from tests.services import Service


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return dict(service.client.get("/openapi.json").json())


def test_every_reference_leads_somewhere(service: Service, document: dict[str, Any]) -> None:
    """Each $ref of the document names a schema of the document."""
    references = set(re.findall(r'"\$ref":\s*"([^"]+)"', service.client.get("/openapi.json").text))
    assert len(references) > 50
    names = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references <= names


def test_every_error_is_a_problem(document: dict[str, Any]) -> None:
    """Each status from 400 on is application/problem+json, except readiness, which has its own answer."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            errors = {status for status in operation["responses"] if status >= "400"}
            assert errors, path
            for status in errors - ({"503"} if path == "/readyz" else set()):
                content = operation["responses"][status]["content"]
                schema = {"$ref": "#/components/schemas/Problem"}
                assert content == {"application/problem+json": {"schema": schema}}, (path, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_key_is_a_security_scheme(document: dict[str, Any]) -> None:
    """The key is a bearer token, for all of /v1."""
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == path.startswith("/v1/")


def test_streams_of_events_have_their_media_type(service: Service, document: dict[str, Any]) -> None:
    """Events are text/event-stream, in the document as on the wire."""
    responses = document["paths"]["/v1/analyses/{id}/events"]["get"]["responses"]
    assert list(responses["200"]["content"]) == ["text/event-stream"]
    made = service.post("/v1/feature-sets", {"name": "events"}, save(_FEATURE_SET)).json()
    analysis = service.wait(service.analyze(feature_set_id=made["id"])["id"])
    path = f"/v1/analyses/{analysis['id']}/events"
    with service.client.stream("GET", path) as stream:
        assert stream.headers["content-type"].split(";")[0] == "text/event-stream"
    head = service.client.head(path)
    assert (head.status_code, head.content) == (200, b"")


_FEATURE_SET = {"features": FEATURES, "labels": labels(0, 1, 0, 1), "head": HEAD}


def test_head_is_answered_where_get_is(service: Service, document: dict[str, Any]) -> None:
    """HEAD gives the status and headers of GET, and no content."""
    for path, operations in document["paths"].items():
        url = re.sub(r"{\w+}", "none", path)
        if "get" not in operations:
            assert service.client.head(url).status_code == 405
            continue
        got, head = service.client.get(url), service.client.head(url)
        assert (head.status_code, head.content) == (got.status_code, b""), url
        assert head.headers["content-type"] == got.headers["content-type"]
        # Figures for Prometheus are others each time.
        if url != "/metrics":
            assert head.headers["content-length"] == got.headers["content-length"]


def test_allow_lists_all_methods(service: Service, document: dict[str, Any]) -> None:
    """An unsupported method is answered with all methods of the path in Allow."""
    for path, operations in document["paths"].items():
        has = {method.upper() for method in operations} | ({"HEAD"} if "get" in operations else set())
        other = next(method for method in ("PATCH", "PUT") if method not in has)
        answer = service.client.request(other, re.sub(r"{\w+}", "none", path))
        problem(answer, 405, "method-not-allowed")
        assert set(answer.headers["allow"].split(", ")) == has, path


DEEP = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000
ODD_BODIES = {
    "nested without end": DEEP,
    "a list nested without end": b"[" * 200_000,
    "no UTF-8": b'{"kind": "\xff\xfe"}',
    "a number of 5,000 digits": b'{"kind": ' + b"9" * 5000 + b"}",
    "half a character": b'{"kind": "evaluation", "\\ud800": 1}',
    "not JSON": b"{",
    "no body": b"",
    "an empty feature set": b'{"kind": "evaluation", "feature_set_id": ""}',
    "an empty checkpoint": b'{"kind": "evaluation", "checkpoint_id": "", "probe_id": ""}',
    "empty ones of a path": b'{"kind": "path", "checkpoint_a_id": "", "checkpoint_b_id": "", "probe_id": ""}',
    "NaN": b'{"kind": "evaluation", "feature_set_id": "a", "options": {"tolerance": NaN}}',
    "infinity": b'{"kind": "evaluation", "feature_set_id": "a", "options": {"seed": 1e999}}',
}


@pytest.mark.parametrize("case", ODD_BODIES)
@pytest.mark.parametrize("path", ["/v1/analyses", "/v1/gates", "/v1/baselines/a", "/v1/reports/a/gate"])
def test_odd_body_is_a_problem(service: Service, case: str, path: str) -> None:
    """JSON that is nested too deeply, cannot be decoded or is meaningless is an invalid request, whatever the route."""
    method = "PUT" if "baselines" in path else "POST"
    headers = {"Content-Type": "application/json"}
    answer = service.client.request(method, path, content=ODD_BODIES[case], headers=headers)
    problem(answer, 422, "invalid-request")


@pytest.mark.parametrize("value", ["0.5", "1767225600", "2026-01-31", "2026-01-31T12:00:00", "2026-01-31T12:00Z", ""])
def test_instant_is_what_the_document_says(service: Service, value: str) -> None:
    """A filter by time accepts a date-time of RFC 3339, and none of pydantic's other forms."""
    for name in ("created_before", "created_after"):
        problem(service.client.get("/v1/reports", params={name: value}), 422, "invalid-request")
        assert service.client.get("/v1/reports", params={name: "2026-01-31T12:00:00.5+01:00"}).status_code == 200


def test_damaged_headers_are_taken_or_refused(tmp_path: Path) -> None:
    """Files whose headers are damaged at random, by a seed, cause no fault in any reader."""
    done, faults = headers.campaign(tmp_path, 0, count=400)
    assert done == 400
    assert not faults, faults[0].traceback


def test_campaign_finds_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign reports an error that is not a problem, with the seed that reproduces it."""

    def fail(_: Path) -> None:
        raise KeyError("a fault")

    monkeypatch.setitem(headers.DOORS, "probe", fail)
    _, faults = headers.campaign(tmp_path, 7, count=3)
    assert [(fault.seed, fault.door) for fault in faults] == [(7, "probe")]
    assert "KeyError: 'a fault'" in faults[0].traceback


def test_unreadable_detail_is_still_told(service: Service) -> None:
    """A problem that quotes half of a surrogate pair can be written as JSON."""
    body = b'{"name": "a", "checks": [{"metric": "\\ud83d", "min": 0}]}'
    headers = {"Content-Type": "application/json"}
    answer: httpx.Response = service.client.post("/v1/gates", content=body, headers=headers)
    problem(answer, 422, "invalid-request")

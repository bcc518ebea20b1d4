"""Logs of a real service: lines for people, or JSON in which a request can be followed to its compute process."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.services import Service, running

REQUEST = "ci-run-42/evaluate"


def lines(service: Service) -> list[dict[str, Any]]:
    """Return the JSON lines that the service's processes have written."""
    return [json.loads(line) for line in (service.data_dir / "stderr.txt").read_text().splitlines()]


def test_json_follows_a_request_to_its_compute_process(
    tmp_path: Path, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """What the API, the worker and the compute process log of an analysis has the id of the request that asked."""
    with running(tmp_path / "data", log_format="json", log_level="info") as service:
        ids = {
            f"{noun}_id": service.post(f"/v1/{noun}s", {"name": noun}, file).json()["id"]
            for noun, file in (("checkpoint", mlp_checkpoint_file), ("probe", digits_probe_file))
        }
        service.client.headers["X-Request-ID"] = REQUEST
        analysis = service.analyze(**ids)
        del service.client.headers["X-Request-ID"]
        service.wait(analysis["id"])
        found = lines(service)
        for line in found:
            assert {"event", "level", "logger", "timestamp"} <= line.keys()
        of_request = [line for line in found if line.get("request_id") == REQUEST]
        [asked] = [line for line in of_request if line["logger"] == "interplay.access"]
        assert (asked["method"], asked["route"], asked["status"]) == ("POST", "/v1/analyses", 202)
        of_analysis = [line for line in of_request if line.get("analysis_id") == analysis["id"]]
        assert "the analysis has ended: succeeded" in [line["event"] for line in of_analysis]
        assert [line["event"] for line in of_analysis if line["logger"] == "interplay.compute"]
        # Others have ids of their own.
        others = [line["request_id"] for line in found if line["logger"] == "interplay.access" and line != asked]
        assert len(set(others)) == len(others) > 2
        assert all(re.fullmatch("[0-9a-f]{32}", one) for one in others)


@pytest.mark.parametrize(
    ("sent", "kept"), [("a-1.b_2:c/d=e+f", True), ("", False), ("a b", False), ('a"b', False), ("x" * 65, False)]
)
def test_an_answer_names_its_request(service: Service, sent: str, kept: bool) -> None:
    """An id that is given is taken if it can stand in a log."""
    answer = service.client.get("/healthz", headers={"X-Request-ID": sent})
    assert (answer.headers["X-Request-ID"] == sent) is kept
    assert answer.headers["X-Request-ID"]


def test_text_is_as_it_was(tmp_path: Path) -> None:
    """Without the setting lines are for people, and structlog is not loaded."""
    script = (
        "import logging, sys; from app.logs import about, start_logging; from app.settings import load_settings\n"
        "start_logging(load_settings())\n"
        "with about(analysis_id='a'): logging.getLogger('interplay').warning('a line of %d', 1)\n"
        "print('structlog' in sys.modules)"
    )
    environment = {"PATH": "/bin", "INTERPLAY_DATA_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \S+ WARNING interplay: a line of 1\n", done.stderr)
    assert done.stdout == "False\n"


def test_errors_are_one_line_of_json(tmp_path: Path) -> None:
    """Tracebacks, line breaks and bidirectional marks stay inside of their object."""
    script = (
        "import logging; from app.logs import about, start_logging; from app.settings import load_settings\n"
        "start_logging(load_settings(log_format='json'))\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('interplay').exception('a\\nb %s', '\\u202e')"
    )
    environment = {"PATH": "/bin", "INTERPLAY_DATA_DIR": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    [line] = done.stderr.splitlines()
    found = json.loads(line)
    assert found["event"] == "a\nb \u202e"
    assert "ZeroDivisionError" in found["exception"]
    assert found["level"] == "error"

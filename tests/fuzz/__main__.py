"""`make fuzz`: damaged files and graphs, then schemathesis against a service with one resource of every type."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests import services
from tests.fuzz import headers
from tests.services import Service

# Conditions that a schema cannot express (labels that fit a head, a metric that a report has) are refused as well.
_CHECKS_THAT_DO_NOT_HOLD = "positive_data_acceptance"
# tus has statuses of its own, which come before others: of its version, of a size, and of an upload that is in use.
_CONFIGURATION = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422, 423, "5xx"]
"""


def main() -> int:
    """Run all of them, each for a part of the time; return 1 if a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120.0, help="of both together, beside starting the service")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="interplay-fuzz-") as folder:
        found = _damaged_files(Path(folder), options.seed, options.seconds / 3)
        found += _graphs(options.seed, options.seconds / 6)
        found += _calls(Path(folder), options.seed, options.seconds / 2)
    return min(found, 1)


def _damaged_files(folder: Path, seed: int, seconds: float) -> int:
    started = time.monotonic()
    done, faults = headers.campaign(folder, seed, count=sys.maxsize, seconds=seconds)
    print(f"{done} damaged files in {time.monotonic() - started:.0f} s from the seed {seed}: {len(faults)} faults")
    for fault in faults:
        print(f"\nSeed {fault.seed}, {fault.kind}, as {fault.door}:\n{fault.traceback}")
    return len(faults)


def _graphs(seed: int, seconds: float) -> int:
    """Pass damaged graphs of networks to workers' and the API's readers, in a process that forbids all else."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.graphs", "--seed", str(seed), "--count", str(10**9)]
    return run([*command, "--seconds", str(seconds + 15)], check=False).returncode


def _calls(folder: Path, seed: int, seconds: float) -> int:
    with services.running(folder / "data") as service:
        _fill(service)
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{service.url}/openapi.json",
            "--seed", str(seed), "--max-time", str(max(int(seconds), 1)), "--phases", "coverage,fuzzing,stateful",
            "--exclude-checks", _CHECKS_THAT_DO_NOT_HOLD, "--continue-on-failure", "--no-color", "--warnings", "off",
            "--generation-database", "none", "--request-timeout", "60", "--wait-for-schema", "60",
        ]  # fmt: skip
        (folder / "schemathesis.toml").write_text(_CONFIGURATION)
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks"}
        status = run(command, cwd=folder, env=environment, check=False).returncode
        log = (service.data_dir / "stderr.txt").read_text()
        if "Traceback" in log:
            print(log)
            return 1
        return status


def _fill(service: Service) -> None:
    """Create one resource of every type, and request the OpenAPI document, which takes a moment to build."""
    chance = np.random.default_rng(0)
    arrays: dict[str, Any] = {name: chance.normal(size=(12, 3)).astype(np.float32) for name in ("features", "head")}
    file = save({**arrays, "head": arrays["head"][:3], "labels": np.arange(12) % 3})
    made = service.post("/v1/feature-sets", {"name": "fuzz"}, file).json()
    report_id = service.wait(service.analyze(feature_set_id=made["id"])["id"])["report_id"]
    check = {"metric": "splits.all.accuracy", "min": 0}
    assert service.client.post("/v1/gates", json={"name": "fuzz", "checks": [check]}).status_code == 201
    assert service.client.put("/v1/baselines/fuzz", json={"report_id": report_id}).status_code == 200
    assert service.client.get("/openapi.json", timeout=60).status_code == 200


if __name__ == "__main__":
    sys.exit(main())

"""A real tracking server of MLflow on loopback, for tests."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.services import until


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The URL of a server whose runs and artifacts are in a folder; it is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
        # Without it the server is uvicorn's, which loads packages for jobs and assistants that we do not install.
        "--gunicorn-opts", "--threads 2 --no-control-socket",
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        with httpx.Client(trust_env=False, timeout=10) as client:
            until(lambda: process.poll() is not None or client.get(f"{url}/health").is_success)
        assert process.poll() is None, (folder / "log.txt").read_text()
        yield url
    finally:
        process.terminate()
        try:
            process.wait(15)
        finally:
            process.kill()
            process.wait()

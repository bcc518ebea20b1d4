"""deploy/proxy: Caddy and nginx with the files of this repository, before a real API, over TLS."""

import hashlib
import os
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from interplay import Client, resumable
from tests import services
from tests.app.api.test_events import events
from tests.app.test_analyses import pair
from tests.deploy.programs import background, free_port, program
from tests.services import Service, until

FILES = Path(__file__).parents[2] / "deploy" / "proxy"
MEBIBYTE = 2**20


@dataclass
class Proxy:
    """A proxy before the API, which can be started anew on the same port."""

    command: list[str]
    folder: Path
    port: int
    authority: Path
    environment: dict[str, str] = field(default_factory=dict)
    _running: AbstractContextManager[object] | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=self.authority)
        return httpx.Client(base_url=self.url, verify=context, timeout=30, trust_env=False)

    def start(self) -> None:
        self._running = background(self.command, self.folder / "log.txt", self.environment)
        self._running.__enter__()

        def answers() -> bool:
            try:
                with self.client() as client:
                    return client.get("/healthz").status_code == 200
            except (FileNotFoundError, ssl.SSLError):
                # Caddy makes the authority's file when it starts, and may not have written all of it.
                return False

        try:
            until(answers, seconds=30)
        except AssertionError as error:
            raise AssertionError((self.folder / "log.txt").read_text()) from error

    def stop(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None


def substituted(text: str, *changes: tuple[str, str]) -> str:
    """Change what only a real machine has: ports and places. Each must be there exactly once."""
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def caddy(folder: Path, upstream: int, port: int) -> Proxy:
    path = folder / "Caddyfile"
    text = (FILES / "Caddyfile").read_text()
    path.write_text(
        substituted(text, ("\tskip_install_trust\n", f"\tskip_install_trust\n\thttp_port {free_port()}\n\tadmin off\n"))
    )
    return Proxy(
        [program("caddy"), "run", "--config", str(path), "--adapter", "caddyfile"],
        folder,
        port,
        folder / "caddy" / "pki" / "authorities" / "local" / "root.crt",
        {
            "SITE": f"https://localhost:{port}",
            "UPSTREAM": f"127.0.0.1:{upstream}",
            "XDG_DATA_HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
        },
    )


def nginx(folder: Path, upstream: int, port: int) -> Proxy:
    certificate, key = folder / "interplay.pem", folder / "interplay.key"
    made = subprocess.run(
        [program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    text = substituted(
        (FILES / "nginx.conf").read_text(),
        ("server 127.0.0.1:8321 ", f"server 127.0.0.1:{upstream} "),
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("server_name interplay.example.com;", "server_name localhost;"),
        ("/etc/ssl/interplay.pem;", f"{certificate};"),
        ("/etc/ssl/interplay.key;", f"{key};"),
    )
    (folder / "site.conf").write_text(text)
    places = "".join(
        f"    {name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    whole = folder / "nginx.conf"
    whole.write_text(
        f"{user}pid {folder}/pid;\ndaemon off;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\n    access_log off;\n{places}    include {folder}/site.conf;\n}}\n"
    )
    return Proxy([program("nginx"), "-c", str(whole), "-p", str(folder), "-e", "stderr"], folder, port, certificate)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run the API without a worker: what is sent waits."""
    with services.running(tmp_path_factory.mktemp("behind") / "data", command="api") as service:
        yield service


@pytest.fixture(scope="module", params=[caddy, nginx], ids=["caddy", "nginx"])
def proxy(request: pytest.FixtureRequest, api: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("proxy")
    made: Proxy = request.param(folder, httpx.URL(api.url).port, free_port())
    try:
        made.start()
        yield made
    finally:
        made.stop()


def features(path: Path, rows: int) -> Path:
    values = np.random.default_rng(rows).normal(size=(rows, 128)).astype(np.float32)
    save_file({"features": values, "labels": np.arange(rows) % 4, "head": values[:4].copy()}, path)
    return path


def test_a_file_over_the_default_limit_passes(proxy: Proxy, api: Service, tmp_path: Path) -> None:
    """5 MiB in a form, where nginx takes 1 MiB by itself; the file comes back as it was."""
    file = features(tmp_path / "features.safetensors", 10_000)
    with proxy.client() as client:
        made = client.post(
            "/v1/feature-sets", files={"spec": (None, b'{"name": "large"}'), "file": ("file", file.read_bytes())}
        )
        assert made.status_code == 201, made.text
        assert made.json()["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert client.get(f"/v1/feature-sets/{made.json()['id']}/file").content == file.read_bytes()


def test_an_upload_is_not_held_back(proxy: Proxy, api: Service) -> None:
    """What was sent lies at the API while the rest of the request has not been sent yet."""
    staged = api.data_dir / "blobs" / "staging"
    with proxy.client() as client:
        headers = {"Tus-Resumable": "1.0.0"}
        made = client.post("/v1/uploads", headers={**headers, "Upload-Length": str(3 * MEBIBYTE)})
        place = made.headers["location"]
        file = staged / f"{place.rpartition('/')[2]}.upload"
        seen: list[bool] = []

        def body() -> Iterator[bytes]:
            yield bytes(2 * MEBIBYTE)
            seen.append(until(lambda: file.exists() and file.stat().st_size >= MEBIBYTE, seconds=20))
            yield bytes(MEBIBYTE)

        sent = client.patch(
            place,
            content=body(),
            headers={**headers, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"},
        )
        assert sent.status_code == 204, sent.text
        assert seen
        client.delete(place, headers=headers)


def test_events_pass_one_by_one(proxy: Proxy, api: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """The first event of an analysis that waits comes at once, the last one when it is cancelled."""
    queued = api.analyze(**pair(api, mlp_checkpoint_file, digits_probe_file))
    with proxy.client() as client, client.stream("GET", f"/v1/analyses/{queued['id']}/events") as stream:
        assert stream.status_code == 200
        began = time.monotonic()
        told = events(stream.iter_lines())
        assert next(told)["data"]["status"] == "queued"
        # The service says nothing more for 5 s: held back, it would have come with what follows.
        assert time.monotonic() - began < 4
        api.client.post(f"/v1/analyses/{queued['id']}/cancel")
        assert [event["data"]["status"] for event in told][-1] == "cancelled"


def test_a_resumable_upload_outlives_the_proxy(
    proxy: Proxy, api: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy ends in the middle of a push and comes back: the push goes on where it was."""
    monkeypatch.setattr(resumable, "LEAST_BYTES", MEBIBYTE)
    monkeypatch.setattr(resumable, "_LEAST_BYTES", (2**18, 2**17))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL_CERT_FILE", str(proxy.authority))
    file = features(tmp_path / "features.safetensors", 30_000)
    offsets: list[int] = []
    restarted_at = 0

    def on_progress(sent_bytes: int, size_bytes: int) -> None:
        nonlocal restarted_at
        offsets.append(sent_bytes)
        if not restarted_at and sent_bytes > size_bytes / 2:
            restarted_at = sent_bytes
            proxy.stop()
            proxy.start()

    with Client(proxy.url) as client:
        made = client.push_feature_set(file, name="large", on_progress=on_progress)
    assert made["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert restarted_at
    # Nothing that had arrived was sent again.
    assert min(offsets[offsets.index(restarted_at) :]) > file.stat().st_size / 3


def test_what_else_a_proxy_owes(proxy: Proxy) -> None:
    """Figures stay inside; a browser hears to come by TLS alone; the cookie of a session never goes without it."""
    with proxy.client() as client:
        assert client.get("/metrics").status_code == 404
        answer = client.get("/")
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert all("secure" in cookie.lower() for cookie in answer.headers.get_list("set-cookie"))
        assert answer.headers.get_list("set-cookie")


@pytest.mark.parametrize("path", [FILES / "Caddyfile", FILES / "nginx.conf"], ids=lambda path: path.name)
def test_limits_are_those_of_the_service(path: Path) -> None:
    """What a proxy takes is a little more than the default of INTERPLAY_MAX_UPLOAD_BYTES, so the service refuses."""
    from app.settings import Settings

    (size,) = re.findall(r"^\s*(?:max_size|client_max_body_size) (\d+)(?:GB|g)", path.read_text(), re.MULTILINE)
    largest = Settings.model_fields["max_upload_bytes"].default
    # Caddy's GB are powers of 1000, nginx's g of 1024.
    assert largest < int(size) * (10**9 if path.name == "Caddyfile" else 2**30) < 1.2 * largest

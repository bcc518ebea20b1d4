"""Shared fixtures: databases, services and files with real data."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import sqlalchemy as sa
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors

import migrations
import tests.operators.sitecustomize  # noqa: F401  this process too may import torchvision
from analysis.networks.loading import build
from app import queue
from app.database import make_engine
from app.settings import Settings
from tests import services
from tests.buckets import BucketServer, bucket_server
from tests.databases import fresh_database, postgres_server
from tests.elsewhere import Elsewhere, elsewhere_running
from tests.shapes import without_shape_checks  # noqa: F401
from tests.sources import Faults

# The library takes a third of a second to load, and few processes of the tests use it.
if TYPE_CHECKING:
    from dbos import DBOSClient

    from workers.locks import Line

# Their tests take minutes: started last, one of them would run alone at the end while another core is idle.
_LONGEST = (
    "tests/reliability/test_campaigns.py",
    "tests/workers/test_kills.py",
    "tests/workers/test_outages.py",
    "tests/workers/test_bucket.py",
    "tests/workers/test_fetch_kills.py",
    "tests/packages/test_pythons.py",
    "tests/interplay/test_upload_kills.py",
)


# A slow machine is no fault of what is tested; tests that hang have the limit of pytest-timeout.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """Restore the default handling of Ctrl-C here and in child processes: background jobs start with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(_Failures(config))


class _Failures:
    """Prints each failure when it happens: a run that is ended from outside never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._began = config, time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            seconds = time.monotonic() - self._began
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = " ".join((report.longreprtext if crash is None else crash.message).split())[:300]
            terminal.write_line(f"\nafter {seconds:.0f} s: {report.nodeid} ({report.when}): {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first. xdist keeps the tests of a file together, as they share services."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


MLP = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 32, 10], "activation": "relu", "norm": "none"}}


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Return the URL of a PostgreSQL server, for `fresh_database`."""
    with postgres_server() as server:
        yield server.url


@pytest.fixture(scope="session")
def s3() -> Iterator[BucketServer]:
    """Return an S3 server, for storages of their own in its bucket."""
    with bucket_server() as server:
        yield server


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Service]:
    """Run a service with one worker, on SQLite; tests may kill the worker, which is started again at once."""
    with services.running(tmp_path_factory.mktemp("service") / "data", worker_restart_max_seconds="0.2") as service:
        yield service


@pytest.fixture(scope="session")
def service_on_postgres(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Service]:
    """Run the same on PostgreSQL."""
    data_dir = tmp_path_factory.mktemp("service-on-postgres") / "data"
    with (
        fresh_database(postgres) as url,
        services.running(data_dir, database_url=url, worker_restart_max_seconds="0.2") as service,
    ):
        yield service


@pytest.fixture(scope="session")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    with elsewhere_running(tmp_path_factory.mktemp("elsewhere") / "data") as running:
        yield running


@pytest.fixture
def elsewhere(_elsewhere: Elsewhere, mlp_checkpoint_file: Path) -> Iterator[Elsewhere]:
    """Return a service that may fetch, and a source with nets/mlp.safetensors; its faults end with the test."""
    _elsewhere.server.files["/nets/mlp.safetensors"] = mlp_checkpoint_file.read_bytes()
    yield _elsewhere
    _elsewhere.server.faults = Faults()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Return settings of an empty database, once on each."""
    if request.param == "sqlite":
        yield Settings(data_dir=tmp_path, database_url="")
        return
    with fresh_database(request.getfixturevalue("postgres")) as url:
        yield Settings(data_dir=tmp_path, database_url=url)


@pytest.fixture
def engine_with_tables(empty_database: Settings) -> Iterator[sa.Engine]:
    """Return an engine on a database that has our tables and the queue's, once on each."""
    engine = make_engine(empty_database)
    try:
        migrations.upgrade(engine)
        queue.migrate(engine)
        yield engine
    finally:
        engine.dispose()


@pytest.fixture
def queue_client(engine_with_tables: sa.Engine) -> Iterator["DBOSClient"]:
    client = queue.make_client(engine_with_tables)
    yield client
    client.destroy()


@pytest.fixture
def line(engine_with_tables: sa.Engine) -> Iterator["Line"]:
    """Return a worker's own connection to an empty database."""
    from workers.locks import Line

    made = Line(engine_with_tables)
    yield made
    made.close()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def any_service(request: pytest.FixtureRequest) -> services.Service:
    """Return the service, once on each database."""
    name = {"sqlite": "service", "postgresql": "service_on_postgres"}[request.param]
    running: services.Service = request.getfixturevalue(name)
    return running


def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits  # takes seconds, which not every process of the tests needs

    digits: tuple[Any, Any] = load_digits(return_X_y=True)
    return digits


@pytest.fixture(scope="session")
def digits_probe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save scikit-learn's digits as a probe: 1,797 scans of 8 x 8 pixels, every fifth one for testing."""
    images, labels = _digits()
    path = tmp_path_factory.mktemp("files") / "digits.safetensors"
    split = (np.arange(len(labels)) % 5 == 0).astype(np.uint8)
    arrays = {"inputs": images.astype(np.float32), "labels": labels.astype(np.int64), "split": split}
    save_arrays(arrays, path)
    return path


@pytest.fixture(scope="session")
def mlp_checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small network, trained briefly on the digits, with its architecture in the file."""
    path = tmp_path_factory.mktemp("files") / "mlp.safetensors"
    images, labels = _digits()
    inputs, targets = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    network = build(MLP, device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(network(inputs), targets))
        optimizer.step()
    save_tensors(network.state_dict(), path, metadata={"architecture": json.dumps(MLP)})
    return path

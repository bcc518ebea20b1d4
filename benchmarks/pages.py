"""The pages of a full database: 10,000 analyses with 1,000 and then with 10,000 reports, on SQLite.

Reports are copies of real ones, under other ids and with other metrics; each page is asked for on one kept-alive
connection. If chromium is on the machine, the first paint of each page is measured in it.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import sqlalchemy as sa
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sqlalchemy.orm import Session

from analysis.networks.loading import build
from app import models
from app.database import make_engine, write
from app.settings import Settings
from interplay import Client

Row = dict[str, object]
_NETWORK = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, 32, 10], "activation": "relu", "norm": "none"}}
_ANALYSES, _REPORTS = 10_000, (1_000, 10_000)
_ROUNDS = 21
# Milliseconds at the server, milliseconds to the first paint, and kilobytes before the library of the charts.
_MOST_MS, _MOST_PAINT_MS, _MOST_KB = 150.0, 1000.0, 300.0


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Measure every page.

    Args:
        device: of the worker that makes the reports which are copied.

    Returns:
        A row for each page and number of reports: milliseconds, kilobytes, and whether the limits hold.
    """
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _running(folder / "data", "serve", str(device)) as url:
            kinds = _real_reports(url, folder)
        for n_reports in _REPORTS:
            _fill(folder / "data", n_reports)
            with _running(folder / "data", "api", str(device)) as url:
                pages = _pages(url, kinds)
                found += [_measured(url, page, path, n_reports) for page, path in pages.items()]
                if n_reports == _REPORTS[0] and shutil.which("chromium"):
                    found += _painted(url, pages)
    return found


@contextmanager
def _running(data: Path, command: str, device: str) -> Iterator[str]:
    """Run a command of the service; yield its URL once it can be asked."""
    environment = {**os.environ, "INTERPLAY_DATA_DIR": str(data), "INTERPLAY_DEVICE": device}
    process = subprocess.Popen(
        [sys.executable, "-m", "app", command, "--port", "0"], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split()[-1]
        while command == "serve" and httpx.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def _real_reports(url: str, folder: Path) -> dict[str, str]:
    """Make a report of every kind; return their ids by kind."""
    images, labels = load_digits(return_X_y=True)
    split = (np.arange(len(labels)) % 5 == 0).astype(np.uint8)
    arrays = {"inputs": images.astype(np.float32) / 16, "labels": labels.astype(np.int64), "split": split}
    save_arrays(arrays, folder / "digits.safetensors")
    with Client(url) as client:
        probe = client.push_probe(folder / "digits.safetensors", name="digits")["id"]
        ids = []
        for seed in range(2):
            torch.manual_seed(seed)
            network = build(_NETWORK, device="cpu")
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.normal_(std=0.2)
            save_file(network.state_dict(), folder / "net.safetensors", metadata={"architecture": json.dumps(_NETWORK)})
            ids.append(client.push_checkpoint(folder / "net.safetensors", name="net", metadata={"epoch": seed})["id"])
        few: Any = {"null_permutations": 2}
        queued = [
            client.create_analysis(checkpoint_id=ids[0], probe_id=probe, options=few),
            client.create_comparison(*ids, probe_id=probe, options=few),
            client.create_path(*ids, probe_id=probe, options=few),
            client.create_pruning(ids[0], probe_id=probe, options=few),
            client.create_series("epoch", dict(enumerate(ids)), probe_id=probe, options=few),
        ]
        ended = [client.wait(one["id"]) for one in queued]
        return {one["kind"]: one["report_id"] for one in ended}


def _fill(data: Path, n_reports: int) -> None:
    """Copy checkpoints, analyses and reports until there are as many."""
    drawn = random.Random(n_reports)
    engine = make_engine(Settings(data_dir=data, database_url=""))
    with write(engine) as session:
        report = session.scalars(sa.select(models.Report).where(models.Report.kind == "evaluation").limit(1)).one()
        analysis = session.get_one(models.Analysis, report.analysis_id)
        checkpoint = session.get_one(models.Checkpoint, report.checkpoints[0].checkpoint_id)
        metrics = list(
            session.execute(
                sa.select(models.ReportMetric.path, models.ReportMetric.value).where(
                    models.ReportMetric.report_id == report.id
                )
            )
        )
        have = session.scalar(sa.select(sa.func.count()).select_from(models.Report)) or 0
        n_analyses = session.scalar(sa.select(sa.func.count()).select_from(models.Analysis)) or 0
        new = n_reports - have
        for index in range(max(new, _ANALYSES - n_analyses)):
            _copy(session, drawn, index, (checkpoint, analysis, report if index < new else None), metrics)
    engine.dispose()


def _copy(session: Session, drawn: random.Random, index: int, of: Any, metrics: Any) -> None:
    """Add copies of a checkpoint, an analysis and, if given, a report with other metrics."""
    checkpoint, analysis, report = of
    ids = [str(UUID(int=drawn.getrandbits(128), version=4)) for _ in range(3)]
    created = report.created_at if report is not None else analysis.created_at
    created -= timedelta(minutes=index + 1)
    name = f"run {index % 97} epoch {index}"

    def values(row: Any, **changes: Any) -> Mapping[str, Any]:
        return {**{column.key: getattr(row, column.key) for column in sa.inspect(type(row)).column_attrs}, **changes}

    metadata = {"run": f"run {index % 97}", "epoch": index, "lr": drawn.choice([0.1, 0.3])}
    session.add(models.Checkpoint(**values(checkpoint, id=ids[0], name=name, created_at=created, metadata_=metadata)))
    session.add(models.Analysis(**values(analysis, id=ids[1], name=name, created_at=created, idempotency_key=None)))
    session.flush()
    session.add(models.AnalysisCheckpoint(analysis_id=ids[1], position=0, checkpoint_id=ids[0]))
    session.add_all(models.MetadataEntry.entries(ids[0], metadata))
    if report is None:
        return
    content = report.content.replace(report.id, ids[2]).replace(analysis.id, ids[1]).replace(checkpoint.id, ids[0])
    changed = {"id": ids[2], "analysis_id": ids[1], "name": name, "created_at": created, "content": content}
    session.add(models.Report(**values(report, **changed)))
    session.flush()
    session.add_all(models.MetadataEntry.entries(ids[2], metadata))
    session.execute(
        sa.insert(models.ReportMetric),
        [{"report_id": ids[2], "path": path, "value": value * drawn.random()} for path, value in metrics],
    )


def _pages(url: str, kinds: Mapping[str, str]) -> dict[str, str]:
    """Return the path of every page by what it is called."""
    items = httpx.get(f"{url}/v1/reports", params={"kind": "evaluation", "limit": 20}).json()["items"]
    chosen = "&".join(f"report={item['id']}" for item in items)
    one = items[0]
    lists = (
        "reports",
        "analyses",
        "checkpoints",
        "probes",
        "feature-sets",
        "fetches",
        "gates",
        "baselines",
        "definitions",
        "push",
    )
    return {
        "overview": "/",
        **{name: f"/{name}" for name in lists},
        "checkpoints by metadata": "/checkpoints?sort=metadata.epoch",
        "checkpoints that are searched": "/checkpoints?search=EPOCH+77",
        "analyses of a status": "/analyses?status=succeeded",
        "leaderboard": "/leaderboard",
        "leaderboard of a probe": f"/leaderboard?probe_id={one['probe_id']}&sort=splits.test.collapse.nc1&order=asc",
        "leaderboard with a bound": "/leaderboard?metric=splits.test.accuracy%3E%3D0.05&metadata=lr%3D0.1",
        "20 reports side by side": f"/compare?{chosen}",
        "form of an analysis": "/analyses/new?kind=comparison",
        "an analysis": f"/analyses/{one['analysis_id']}",
        "a checkpoint": f"/checkpoints/{one['checkpoint_id']}",
        "a probe": f"/probes/{one['probe_id']}",
        **{f"report of kind {kind}": f"/reports/{id_}" for kind, id_ in kinds.items()},
    }


def _measured(url: str, page: str, path: str, n_reports: int) -> Row:
    with httpx.Client(base_url=url) as client:
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            answer = client.get(path)
            times.append(1000 * (time.perf_counter() - began))
            assert answer.status_code == 200, answer.text[:500]
        # The first one may read templates and tables for the first time.
        middle, largest = statistics.median(times[1:]), max(times[1:])
        kilobytes = (len(answer.content) + _bytes_beside(client, answer.text)) / 1000
    return {
        "case": f"{page}, {_ANALYSES:,} analyses and {n_reports:,} reports",
        "p50_ms": middle,
        "largest_ms": largest,
        "first_ms": times[0],
        "kilobytes": kilobytes,
        "reached": middle <= _MOST_MS and kilobytes <= _MOST_KB,
    }


def _bytes_beside(client: httpx.Client, page: str) -> int:
    """Return the bytes of the static files that a page refers to, without the library of the charts."""
    files = {part.split('"')[0] for part in page.split('"/static/')[1:]}
    return sum(len(client.get(f"/static/{file}").content) for file in files)


def _painted(url: str, pages: Mapping[str, str]) -> list[Row]:
    """Measure the first paint of each page in chromium, in a window without a cache."""
    from playwright.sync_api import sync_playwright

    found: list[Row] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for page, path in pages.items():
            times = []
            for _ in range(3):
                context = browser.new_context()
                opened = context.new_page()
                opened.goto(f"{url}{path}", wait_until="load")
                paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
                while (painted := opened.evaluate(paint)) is None:
                    opened.wait_for_timeout(20)
                times.append(painted)
                context.close()
            middle = statistics.median(times)
            found.append({"case": f"first paint of {page}", "p50_ms": middle, "reached": middle <= _MOST_PAINT_MS})
        browser.close()
    return found

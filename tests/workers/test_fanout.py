"""One analysis on several workers: the same digits, nobody starved, nothing lost."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from app.database import make_engine, read
from app.models import Point, Turn
from app.settings import Settings
from tests import services
from tests.campaigns import DATABASES, campaign
from tests.conftest import MLP
from tests.databases import fresh_database
from tests.services import Service, comparable, until

FEW = {"null_permutations": 0}


@pytest.fixture(scope="module", params=campaign(DATABASES, often=["postgresql"]))
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service with one worker, always on PostgreSQL and in campaigns on SQLite too; tests add workers."""
    data_dir = tmp_path_factory.mktemp("fleet") / "data"
    with ExitStack() as stack:
        url = ""
        if request.param == "postgresql":
            url = stack.enter_context(fresh_database(request.getfixturevalue("postgres")))
        yield stack.enter_context(
            services.running(data_dir, database_url=url, queue_polling_seconds="0.1", worker_restart_max_seconds="0.2")
        )


@pytest.fixture(scope="module")
def ids(fleet: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> dict[str, str]:
    """Upload two checkpoints and a probe; return their ids as a path names them."""
    tensors, generator = load_file(mlp_checkpoint_file), torch.Generator().manual_seed(0)
    noisy = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    files = (mlp_checkpoint_file.read_bytes(), save_tensors(noisy, metadata={"architecture": json.dumps(MLP)}))
    first, second = (fleet.post("/v1/checkpoints", {"name": "net"}, file).json()["id"] for file in files)
    probe = fleet.post("/v1/probes", {"name": "digits"}, digits_probe_file).json()["id"]
    return {"checkpoint_a_id": first, "checkpoint_b_id": second, "probe_id": probe}


def requests(ids: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return a request of each planned kind, of which no result is kept from another request."""
    probe, pair = {"probe_id": ids["probe_id"]}, [ids["checkpoint_a_id"], ids["checkpoint_b_id"]]
    options = {"null_permutations": 2, "seed": 3}
    axis = {"name": "epoch", "values": [1, 2, 3, 4, 5]}
    return {
        "even": {"kind": "path", **ids, "options": {**options, "grid": {"points": 9}}},
        "adaptive": {"kind": "path", **ids, "options": {**options, "grid": "adaptive", "alignment": "weight_matching"}},
        "pruning": {
            "kind": "pruning", "checkpoint_id": pair[0], **probe,
            "options": {**options, "sparsities": [0.0, 0.2, 0.5, 0.7, 0.9, 0.95]},
        },
        "series": {
            "kind": "series", "checkpoint_ids": [*pair, *pair, pair[0]], **probe, "axis": axis, "options": options,
        },
        "comparison": {"kind": "comparison", **ids, "options": {**options, "resamples": 50}},
    }  # fmt: skip


def has_workers(service: Service, count: int) -> bool:
    """Return whether so many workers live."""
    return len(service.client.get("/v1/version").json()["workers"]) == count


def points_of(service: Service, analysis_id: str) -> list[Point]:
    """Return the rows of an analysis's points."""
    engine = make_engine(
        Settings(data_dir=service.data_dir, database_url=service.environment.get("INTERPLAY_DATABASE_URL", ""))
    )
    try:
        with read(engine) as session:
            return list(session.scalars(sa.select(Point).where(Point.analysis_id == analysis_id)))
    finally:
        engine.dispose()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("counts", "kinds"),
    [
        pytest.param([1, 2], ["even", "adaptive", "comparison"], id="two workers"),
        pytest.param([1, 2], ["pruning", "series"], id="sweeps", marks=pytest.mark.slow),
        pytest.param([1, 4], ["even", "adaptive"], id="four workers", marks=pytest.mark.slow),
    ],
)
def test_reports_do_not_depend_on_the_number_of_workers(
    counts: list[int], kinds: list[str], fleet: Service, ids: dict[str, str]
) -> None:
    """Several workers give the report of one bit for bit."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for count in counts:
        with ExitStack() as stack:
            for _ in range(count - 1):
                stack.enter_context(services.worker(fleet))
            until(partial(has_workers, fleet, count))
            for name in kinds:
                analysis = fleet.wait(fleet.analyze(**requests(ids)[name])["id"], seconds=300)
                found[name].append(comparable(fleet.report(analysis)))
                assert analysis["attempts"] == 1
                turns = {point.turn_id for point in points_of(fleet, analysis["id"])}
                if name == "even" and count > 1:
                    assert len(turns) > 1
    for name, (first, second) in found.items():
        assert first == second, name


def test_a_short_evaluation_is_let_between_two_points(fleet: Service, ids: dict[str, str]) -> None:
    """An evaluation that is sent while a path of 1,000 points runs starts within a point's time; the path goes on."""
    grid = {"points": 1000}
    path = fleet.analyze(kind="path", **ids, options={"null_permutations": 40, "grid": grid})
    until(lambda: fleet.client.get(f"/v1/analyses/{path['id']}").json()["progress"]["done"] >= 3)
    ours = {"checkpoint_id": ids["checkpoint_a_id"], "probe_id": ids["probe_id"]}
    before = fleet.client.get(f"/v1/analyses/{path['id']}").json()["progress"]["done"]
    short = fleet.wait(fleet.analyze(**ours, options=FEW)["id"], seconds=30)
    assert short["status"] == "succeeded"
    after = fleet.client.get(f"/v1/analyses/{path['id']}").json()
    # A point takes half a second here, the evaluation some tenths.
    assert after["progress"]["done"] - before <= 4, (before, after)
    until(lambda: fleet.client.get(f"/v1/analyses/{path['id']}").json()["progress"]["done"] > before + 4)
    assert fleet.client.post(f"/v1/analyses/{path['id']}/cancel").status_code == 200
    assert fleet.wait(path["id"], seconds=10)["status"] == "cancelled"


def test_cancelling_frees_every_worker(fleet: Service, ids: dict[str, str]) -> None:
    """All workers of a cancelled path are free within five seconds, and work at the next analysis."""
    with services.worker(fleet):
        until(partial(has_workers, fleet, 2))
        path = fleet.analyze(kind="path", **ids, options={"null_permutations": 400, "grid": {"points": 50}})
        until(lambda: sum(point.turn_id is not None for point in points_of(fleet, path["id"])) >= 2)
        fleet.client.post(f"/v1/analyses/{path['id']}/cancel")
        assert fleet.wait(path["id"], seconds=5)["status"] == "cancelled"
        ours = {"checkpoint_id": ids["checkpoint_a_id"], "probe_id": ids["probe_id"]}
        both = [fleet.analyze(**ours, options={"null_permutations": 0, "seed": seed}) for seed in (11, 12)]
        until(
            lambda: all(fleet.client.get(f"/v1/analyses/{one['id']}").json()["started_at"] for one in both), seconds=5
        )
        assert [fleet.wait(one["id"])["status"] for one in both] == ["succeeded"] * 2


def test_a_killed_worker_costs_a_point(fleet: Service, ids: dict[str, str]) -> None:
    """Of two workers one is killed in the middle of a point: that point is repeated, no other, and the digits stay."""
    request = {"kind": "path", **ids, "options": {"null_permutations": 30, "grid": {"points": 12}}}
    expected = comparable(fleet.report(fleet.wait(fleet.analyze(**request)["id"])))
    with services.worker(fleet) as second:
        until(partial(has_workers, fleet, 2))
        path = fleet.analyze(**request)
        until(lambda: sum(point.finished_at is not None for point in points_of(fleet, path["id"])) >= 3)
        killed = psutil.Process(second.pid)
        killed.kill()
        killed.wait(15)
        done = fleet.wait(path["id"])
    assert comparable(fleet.report(done)) == expected
    attempts = [point.attempts for point in points_of(fleet, path["id"])]
    assert len(attempts) == 13
    assert sum(attempts) <= 14
    assert done["attempts"] == max(attempts)


@pytest.mark.slow
def test_unlike_workers_are_told_point_by_point(fleet: Service, ids: dict[str, str]) -> None:
    """Workers with other numbers of threads compute one path: provenance has what computed each point."""
    with services.worker(fleet, threads="2"):
        until(partial(has_workers, fleet, 2))
        request = {"kind": "path", **ids, "options": {"null_permutations": 30, "grid": {"points": 12}}}
        report = fleet.report(fleet.wait(fleet.analyze(**request)["id"]))
    provenance = report["provenance"]
    assert {one["threads"] for one in provenance["computed_on"]} == {1, 2}
    assert len(provenance["computed_on"]) == len(report["points"])
    assert provenance["computed_on"][0]["threads"] == provenance["threads"]


@pytest.mark.slow
def test_the_first_of_several_failures_is_told(fleet: Service, ids: dict[str, str], tmp_path: Path) -> None:
    """Of a series whose last three checkpoints fail, the failure is that of the first of them, with two workers too."""
    args = {"sizes": [64, 32, 16, 10], "activation": "relu", "norm": "none"}
    other = {"family": "builtin", "name": "mlp", "args": args}
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0": (32, 64), "layers.1": (16, 32), "head": (10, 16)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.full((shape[0],), torch.inf) for name, shape in shapes.items()}
    content = save_tensors(tensors, metadata={"architecture": json.dumps(other)})
    made = fleet.post("/v1/checkpoints", {"name": "infinite"}, content)
    assert made.status_code == 201, made.text
    order = [ids["checkpoint_a_id"], ids["checkpoint_b_id"], *[made.json()["id"]] * 3]
    request = {
        "kind": "series",
        "checkpoint_ids": order,
        "probe_id": ids["probe_id"],
        "axis": {"name": "epoch", "values": [1, 2, 3, 4, 5]},
        "options": FEW,
    }
    with services.worker(fleet):
        until(partial(has_workers, fleet, 2))
        failed = fleet.wait(fleet.analyze(**request)["id"])
    assert failed["status"] == "failed"
    assert (failed["problem"]["point"], failed["problem"]["at"]) == (3, 3.0)
    assert failed["problem"]["detail"].startswith("Point 3, at epoch 3: ")


def test_nothing_of_an_ended_analysis_is_kept(fleet: Service, ids: dict[str, str]) -> None:
    """Answers are gone once the report is there, and no turn is left open."""
    done = fleet.wait(fleet.analyze(kind="path", **ids, options={**FEW, "grid": {"points": 3}})["id"])
    engine = make_engine(
        Settings(data_dir=fleet.data_dir, database_url=fleet.environment.get("INTERPLAY_DATABASE_URL", ""))
    )
    try:
        with read(engine) as session:
            answers = session.scalars(sa.select(Point.answer).where(Point.analysis_id == done["id"])).all()
            assert answers == [None] * 4
        still = sa.select(sa.func.count()).where(Turn.analysis_id == done["id"], Turn.ended_at.is_(None))

        def closed() -> bool:
            with read(engine) as session:
                return session.scalar(still) == 0

        until(closed, seconds=10)
    finally:
        engine.dispose()

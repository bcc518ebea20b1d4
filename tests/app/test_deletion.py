"""Analyses, reports, gates and baselines over HTTP: deleted with all that belongs to them, or kept for a baseline."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from app.database import make_engine
from app.settings import Settings
from tests.app.api.test_uploads import problem
from tests.app.test_analyses import SLOW, pair
from tests.app.test_points import FEW
from tests.datafiles import mlp_adapter
from tests.services import Service, until


def mentions(engine: sa.Engine, text: str) -> dict[str, int]:
    """Return how many rows of each table, those of the queue included, have a text in any of their columns."""
    found: dict[str, int] = {}
    for schema in (None,) if engine.dialect.name == "sqlite" else (None, "dbos"):
        for name in sa.inspect(engine).get_table_names(schema=schema):
            table = sa.Table(name, sa.MetaData(), autoload_with=engine, schema=schema)
            texts = [column for column in table.columns if isinstance(column.type, sa.String | sa.JSON)]
            has = sa.or_(sa.false(), *(sa.cast(column, sa.Text).contains(text) for column in texts))
            with engine.connect() as connection:
                if n_rows := connection.scalar(sa.select(sa.func.count()).select_from(table).where(has)):
                    found[name] = n_rows
    return found


@pytest.fixture
def engine(any_service: Service) -> Iterator[sa.Engine]:
    """Connect to the service's database."""
    url = any_service.environment.get("INTERPLAY_DATABASE_URL", "")
    engine = make_engine(Settings(data_dir=any_service.data_dir, database_url=url))
    yield engine
    engine.dispose()


@pytest.fixture
def ids(any_service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> dict[str, str]:
    return pair(any_service, mlp_checkpoint_file, digits_probe_file, metadata={"mark": uuid4().hex})


def evaluated(service: Service, ids: dict[str, str], **headers: str) -> dict[str, Any]:
    body = {"kind": "evaluation", **ids, "options": {"null_permutations": 0}}
    made = service.client.post(
        "/v1/analyses", json=body, headers={key.replace("_", "-"): headers[key] for key in headers}
    )
    return service.wait(made.json()["id"])


def baseline(service: Service, report_id: str) -> str:
    name = f"base-{uuid4().hex[:8]}"
    assert service.client.put(f"/v1/baselines/{name}", json={"report_id": report_id}).status_code == 200
    return name


def test_an_analysis_goes_with_all_that_is_its_own(
    any_service: Service, engine: sa.Engine, ids: dict[str, str]
) -> None:
    """Of a path, with its points and turns, nothing is left in any table, nor of its report; its subjects stay."""
    ends = {
        "checkpoint_a_id": ids["checkpoint_id"],
        "checkpoint_b_id": ids["checkpoint_id"],
        "probe_id": ids["probe_id"],
    }
    asked = any_service.analyze(kind="path", **ends, options={**FEW, "grid": {"points": 3}})
    analysis = any_service.wait(asked["id"])
    assert analysis["status"] == "succeeded", analysis
    expected = {"analyses", "points", "turns", "analysis_checkpoints", "reports", "workflow_status"}
    assert expected <= set(mentions(engine, analysis["id"]))
    assert {"reports", "report_metrics", "metadata_entries"} <= set(mentions(engine, analysis["report_id"]))
    # The plan and its last turn end moments after the analysis; what a worker still holds would go with a later sweep.
    held = sa.text(
        f"SELECT count(*) FROM {'workflow_status' if engine.dialect.name == 'sqlite' else 'dbos.workflow_status'} "
        "WHERE workflow_uuid LIKE :id AND status = 'PENDING'"
    )

    def settled() -> bool:
        with engine.connect() as connection:
            return not connection.scalar(held, {"id": f"{analysis['id']}%"})

    until(settled)
    assert any_service.client.delete(f"/v1/analyses/{analysis['id']}").status_code == 204
    assert mentions(engine, analysis["id"]) == {}
    assert mentions(engine, analysis["report_id"]) == {}
    for path in (f"analyses/{analysis['id']}", f"reports/{analysis['report_id']}"):
        problem(any_service.client.get(f"/v1/{path}"), 404, "not-found")
        problem(any_service.client.delete(f"/v1/{path}"), 404, "not-found")
    assert any_service.client.get(f"/v1/checkpoints/{ids['checkpoint_id']}").status_code == 200


def test_an_analysis_that_goes_on_is_cancelled_first(any_service: Service, ids: dict[str, str]) -> None:
    """Whether it waits or runs, a 409 says so; once it has stopped it can be deleted, and work goes on."""
    running, waiting = (any_service.analyze(**ids, options=SLOW)["id"] for _ in range(2))
    until(lambda: any_service.client.get(f"/v1/analyses/{running}").json()["status"] == "running")
    for id_ in (running, waiting):
        assert (
            "cancel it first" in problem(any_service.client.delete(f"/v1/analyses/{id_}"), 409, "not-ended")["detail"]
        )
        any_service.client.post(f"/v1/analyses/{id_}/cancel")
    # At once: the queue still has the run of the one that waited, and a worker will take it.
    assert any_service.client.delete(f"/v1/analyses/{waiting}").status_code == 204
    any_service.wait(running)
    assert any_service.client.delete(f"/v1/analyses/{running}").status_code == 204
    assert evaluated(any_service, ids)["status"] == "succeeded"


def test_a_report_goes_and_its_analysis_stays(any_service: Service, engine: sa.Engine, ids: dict[str, str]) -> None:
    """The analysis says that there was a report; the same request with the same key computes another one."""
    key = uuid4().hex
    first = evaluated(any_service, ids, Idempotency_Key=key)
    assert any_service.client.delete(f"/v1/reports/{first['report_id']}").status_code == 204
    left = any_service.client.get(f"/v1/analyses/{first['id']}").json()
    assert (left["status"], left["report_id"]) == ("succeeded", None)
    assert mentions(engine, first["report_id"]) == {}
    assert "Its report was deleted." in any_service.client.get(f"/analyses/{first['id']}").text
    again = evaluated(any_service, ids, Idempotency_Key=key)
    assert again["id"] != first["id"]
    assert again["report_id"] is not None


def test_what_a_baseline_needs_is_kept(
    any_service: Service, engine: sa.Engine, ids: dict[str, str], mlp_checkpoint_file: Path, tmp_path: Path
) -> None:
    """Report, analysis, checkpoint, its base and the probe answer 409 with the baselines; moved away, they go."""
    folder = mlp_adapter(tmp_path)
    spec = {"name": "tuned", "base_id": ids["checkpoint_id"], "adapter": _json(folder / "adapter_config.json")}
    adapter = any_service.post("/v1/checkpoints", spec, folder / "adapter_model.safetensors").json()["id"]
    analysis = evaluated(any_service, {**ids, "checkpoint_id": adapter})
    names = sorted(baseline(any_service, analysis["report_id"]) for _ in range(2))
    needed = [
        f"/v1/reports/{analysis['report_id']}", f"/v1/analyses/{analysis['id']}", f"/v1/checkpoints/{adapter}",
        f"/v1/probes/{ids['probe_id']}",
    ]  # fmt: skip
    for path in needed:
        refused = problem(any_service.client.delete(path), 409, "in-use")
        assert refused["baselines"] == names
        assert all(repr(name) in refused["detail"] for name in names)
    assert (
        "adapters"
        in problem(any_service.client.delete(f"/v1/checkpoints/{ids['checkpoint_id']}"), 409, "in-use")["detail"]
    )

    other = evaluated(any_service, pair(any_service, mlp_checkpoint_file, _probe(any_service, ids)))
    any_service.client.put(f"/v1/baselines/{names[0]}", json={"report_id": other["report_id"]})
    assert problem(any_service.client.delete(needed[0]), 409, "in-use")["baselines"] == names[1:]
    assert any_service.client.delete(f"/v1/baselines/{names[1]}").status_code == 204
    for path in [needed[1], *needed[2:]]:
        assert any_service.client.delete(path).status_code == 204, path
    # The history tells of the report that has gone, and its page says so.
    history = any_service.client.get(f"/v1/baselines/{names[0]}/history").json()["items"]
    assert [move["report_id"] for move in history] == [other["report_id"], analysis["report_id"]]
    assert history[0]["before_report_id"] == analysis["report_id"]
    gate = {"name": f"gate-{uuid4().hex[:8]}", "checks": [{"metric": "splits.test.accuracy", "min_change": -0.5}]}
    gate_id = any_service.client.post("/v1/gates", json=gate).json()["id"]
    page = any_service.client.get(f"/baselines/{names[0]}", params={"gate": gate_id}).text
    assert f"<code>{analysis['report_id']}</code> (deleted)" in page
    assert "from a report that was deleted" in page
    assert "there is nothing to compare with" in page
    assert set(mentions(engine, analysis["report_id"])) == {"baseline_moves"}


def _probe(service: Service, ids: dict[str, str]) -> bytes:
    return service.client.get(f"/v1/probes/{ids['probe_id']}/file").content


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_gate_goes_with_all_versions(any_service: Service, engine: sa.Engine) -> None:
    """By the id of any version; a new gate of the name begins with version 1, and other names are left alone."""
    name, other = (f"gate-{uuid4().hex[:8]}" for _ in range(2))
    made = [
        any_service.client.post(
            "/v1/gates", json={"name": one, "checks": [{"metric": "splits.test.accuracy", "min": bound}]}
        )
        for one, bound in ((name, 0.1), (name, 0.2), (other, 0.1))
    ]
    first, second, third = (answer.json() for answer in made)
    assert any_service.client.delete(f"/v1/gates/{first['id']}").status_code == 204
    assert mentions(engine, name) == {}
    problem(any_service.client.delete(f"/v1/gates/{second['id']}"), 404, "not-found")
    assert any_service.client.get(f"/v1/gates/{third['id']}").json() == third
    again = any_service.client.post(
        "/v1/gates", json={"name": name, "checks": [{"metric": "splits.test.loss", "max": 1}]}
    )
    assert (again.status_code, again.json()["version"]) == (201, 1)


def test_a_baseline_goes_with_its_history(any_service: Service, engine: sa.Engine, ids: dict[str, str]) -> None:
    """Nothing keeps its report any more; a name that there is not is a 404, and may be set anew."""
    report_id = evaluated(any_service, ids)["report_id"]
    name = baseline(any_service, report_id)
    assert any_service.client.delete(f"/v1/baselines/{name}").status_code == 204
    assert {*mentions(engine, report_id)} & {"baselines", "baseline_moves"} == set()
    problem(any_service.client.delete(f"/v1/baselines/{name}"), 404, "not-found")
    problem(any_service.client.get(f"/v1/baselines/{name}/history"), 404, "not-found")
    assert any_service.client.put(f"/v1/baselines/{name}", json={"report_id": report_id}).status_code == 200
    assert len(any_service.client.get(f"/v1/baselines/{name}/history").json()["items"]) == 1
    assert any_service.client.delete(f"/v1/baselines/{name}").status_code == 204
    assert any_service.client.delete(f"/v1/reports/{report_id}").status_code == 204


def test_moves_and_deletions_at_the_same_time(any_service: Service, ids: dict[str, str]) -> None:
    """However they meet, a baseline never points at what is gone, and no call fails by a fault of the service."""
    name = f"base-{uuid4().hex[:8]}"
    for _ in range(4):
        analysis = evaluated(any_service, ids)
        calls = [
            ("PUT", f"/v1/baselines/{name}", {"report_id": analysis["report_id"]}),
            ("DELETE", f"/v1/analyses/{analysis['id']}", None),
            ("DELETE", f"/v1/baselines/{name}", None),
            ("PUT", f"/v1/baselines/{name}", {"report_id": analysis["report_id"]}),
            ("DELETE", f"/v1/reports/{analysis['report_id']}", None),
        ]
        with ThreadPoolExecutor(len(calls)) as pool:
            answers = list(pool.map(lambda call: any_service.client.request(call[0], call[1], json=call[2]), calls))
        assert {answer.status_code for answer in answers} <= {200, 204, 404, 409}, [answer.text for answer in answers]
        found = any_service.client.get(f"/v1/baselines/{name}")
        if found.status_code == 200:
            assert any_service.client.get(f"/v1/reports/{found.json()['report_id']}").status_code == 200
            any_service.client.delete(f"/v1/baselines/{name}")


def test_a_stream_ends_when_its_analysis_is_deleted(any_service: Service, ids: dict[str, str]) -> None:
    """Whoever listens until the end and just misses it is not left waiting."""
    analysis = any_service.analyze(**ids, options=SLOW)
    until(lambda: any_service.client.get(f"/v1/analyses/{analysis['id']}").json()["status"] == "running")
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(any_service.client.get, f"/v1/analyses/{analysis['id']}/events", timeout=30)
        any_service.client.post(f"/v1/analyses/{analysis['id']}/cancel")
        until(lambda: any_service.client.delete(f"/v1/analyses/{analysis['id']}").status_code == 204)
        assert heard.result(30).status_code in (200, 404)

"""Lists of reports by metrics: their order, pages, bounds and values, on both databases."""

import json
import random
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import save
from sqlalchemy.orm import Session

import migrations
from app.database import make_engine, read, write
from app.listing import Listing
from app.models import Analysis, Report, ReportMetric
from app.reports import Ranking, Subject, page_of_reports
from app.schemas import Kind
from app.schemas.metrics import metrics_of
from app.settings import Settings
from tests.app.api.test_uploads import problem
from tests.interplay.reports import comparison_report, difference, evaluation_report
from tests.services import Service

ACCURACY, MIR = "splits.test.accuracy", "splits.all.interplay.sample.global.mir"


def _add(session: Session, probe_id: str, metrics: dict[str, float]) -> str:
    """Add an evaluation's report with these metrics; return its id."""
    analysis = Analysis(kind="evaluation", name="net", options={}, request_sha256="0", probe_id=probe_id)
    session.add(analysis)
    session.flush()
    report = Report(analysis_id=analysis.id, kind="evaluation", name="net", probe_id=probe_id, sha256="0", content="{}")
    session.add(report)
    session.flush()
    session.add_all(ReportMetric(report_id=report.id, path=path, value=value) for path, value in metrics.items())
    return report.id


def _paged(engine: sa.Engine, limit: int, subject: Subject, ranking: Ranking) -> list[tuple[str, float | None]]:
    """Return the ids and values of all pages."""
    found, cursor = [], None
    while True:
        with read(engine) as session:
            page = page_of_reports(session, Listing(limit=limit, cursor=cursor), subject, ranking)
        assert len(page.items) <= limit
        found += [(item.id, item.metrics.get(ranking.sort or "")) for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            return found


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_hold_every_report_once_in_order(engine: sa.Engine, order: Any) -> None:
    """Equal numbers, numbers that differ in the last digit, huge and tiny ones: the pages are the sorted list."""
    drawn = random.Random(0)
    values = [0.1, 0.1, 0.1 + 2**-56, -0.5, 1e300, 5e-324, 0.0, 1 / 3] + [drawn.random() for _ in range(20)]
    expected = []
    with write(engine) as session:
        for value in values:
            expected.append((value, _add(session, "digits", {ACCURACY: value})))
            _add(session, "digits", {MIR: value})
            _add(session, "other", {ACCURACY: value})
    expected.sort(reverse=order == "desc")
    for limit in (1, 3, 28, 100):
        found = _paged(engine, limit, Subject(None, None, "digits", None), Ranking(sort=ACCURACY, order=order))
        assert found == [(id_, value) for value, id_ in expected]


def test_bounds_and_values(engine: sa.Engine) -> None:
    """Bounds hold together with each other, and metrics that a report lacks are null."""
    with write(engine) as session:
        ids = [
            _add(session, "digits", {ACCURACY: accuracy, **({} if mir is None else {MIR: mir})})
            for accuracy, mir in ((0.5, 0.1), (0.7, 0.2), (0.9, 0.3), (0.9, None))
        ]

    def listed(*bounds: str, **ranking: Any) -> dict[str, dict[str, float | None]]:
        with read(engine) as session:
            everything = Subject(None, None, None, None)
            page = page_of_reports(session, Listing(), everything, Ranking(metric=list(bounds), **ranking))
        return {item.id: item.metrics for item in page.items}

    assert set(listed(f"{ACCURACY}>=0.7")) == set(ids[1:])
    assert set(listed(f"{ACCURACY}>0.7")) == set(ids[2:])
    assert set(listed(f"{ACCURACY}>=0.7", f"{MIR}<0.3")) == {ids[1]}
    assert set(listed(f"{ACCURACY}>=0.6", f"{ACCURACY}<=0.8")) == {ids[1]}
    assert listed(show=[MIR])[ids[3]] == {MIR: None}
    assert list(listed(f"{ACCURACY}>0", sort=MIR)) == [ids[2], ids[1], ids[0]]
    assert listed(f"{MIR}>=-1e3", sort=ACCURACY, show=[MIR])[ids[0]] == {ACCURACY: 0.5, MIR: 0.1}


def test_an_index_serves_the_order(engine: sa.Engine) -> None:
    """Neither database sorts all reports to find the best ten."""
    with write(engine) as session:
        for number in range(300):
            _add(session, "digits", {ACCURACY: number / 300, MIR: 0.5})
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", note)
    with read(engine) as session:
        page_of_reports(session, Listing(limit=10), Subject(None, None, None, None), Ranking(sort=ACCURACY))
    sa.event.remove(engine, "before_cursor_execute", note)
    (asked,) = [
        (statement, given) for statement, given in seen if "report_metrics" in statement and "JOIN" in statement
    ]
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with engine.connect() as connection:
        plan = "\n".join(str(row) for row in connection.exec_driver_sql(explain + asked[0], asked[1]))
    assert "ix_report_metrics_path_value_report_id" in plan
    assert "TEMP B-TREE FOR ORDER BY" not in plan
    assert "Sort " not in plan.replace("Incremental Sort", "")


def test_metrics_of_a_report() -> None:
    """Numbers of splits and summaries; of a comparison the differences; no list, no text, no timing."""
    evaluation = metrics_of("evaluation", evaluation_report())
    assert evaluation["splits.all.accuracy"] == 0.97
    assert evaluation["splits.all.interplay.sample.global.optimum.mir"] == pytest.approx(0.9524, abs=1e-3)
    assert "splits.all.calibration_error" not in evaluation, "null in that report"
    assert not [path for path in evaluation if not path.startswith("splits.")]
    compared = metrics_of("comparison", comparison_report({"accuracy": difference(0.9, 0.95, 0.01)}))
    assert {path.rpartition(".")[2] for path in compared if ".differences." in path} == {"difference"}
    assert not [path for path in compared if ".a." in path or ".b." in path]


def test_existing_reports_get_their_metrics(tmp_path: Path) -> None:
    """The migration gives reports of before what new ones have, more of them than it reads at a time."""
    engine = make_engine(Settings(data_dir=tmp_path))
    migrations.upgrade(engine, "0007")
    order: list[Kind] = ["evaluation", "comparison"]
    contents = {
        "evaluation": evaluation_report(),
        "comparison": comparison_report({"accuracy": difference(0.9, 0.95, 0.01)}),
    }
    tables = sa.MetaData()
    tables.reflect(engine, only=["analyses", "reports"])
    with engine.begin() as connection:
        kinds: dict[str, Kind] = {}
        for number in range(230):
            id_, kind = str(uuid4()), order[number % 2]
            kinds[id_] = kind
            common = {"id": id_, "kind": kind, "name": "x", "created_at": sa.func.current_timestamp()}
            analysis = {"options": "{}", "request_sha256": "0", "attempts": 0, "progress_phase": "finished"}
            analysis |= {"progress_done": 0, "progress_total": 0}
            connection.execute(sa.insert(tables.tables["analyses"]).values({**common, **analysis}))
            report = {"analysis_id": id_, "sha256": "0", "content": json.dumps(contents[kind])}
            connection.execute(sa.insert(tables.tables["reports"]).values({**common, **report}))
    migrations.upgrade(engine)
    with read(engine) as session:
        found: dict[str, dict[str, float]] = {}
        for metric in session.scalars(sa.select(ReportMetric)):
            found.setdefault(metric.report_id, {})[metric.path] = metric.value
    assert len(found) == 230
    for id_, kind in kinds.items():
        assert found[id_] == metrics_of(kind, contents[kind])
    engine.dispose()


def test_leaderboard_over_http(any_service: Service) -> None:
    """The best of five feature sets by MIR, by metadata and page by page, with the reports' own digits."""
    run, generator = uuid4().hex, np.random.default_rng(0)
    labels = np.arange(40) % 4
    means = generator.normal(size=(4, 8))
    reports: dict[str, dict[str, Any]] = {}
    for spread in (0.1, 0.5, 1.0, 2.0, 4.0):
        features = (means[labels] + spread * generator.normal(size=(40, 8))).astype(np.float32)
        file = save({"features": features, "labels": labels, "head": means.astype(np.float32)})
        spec = {"name": f"{spread}", "metadata": {"run": run, "wide": spread > 1}}
        feature_set = any_service.post("/v1/feature-sets", spec, file).json()
        ended = any_service.wait(
            any_service.analyze(feature_set_id=feature_set["id"], options={"null_permutations": 0})["id"]
        )
        reports[ended["report_id"]] = any_service.report(ended)
    values = {id_: report["splits"]["all"]["interplay"]["sample"]["global"]["mir"] for id_, report in reports.items()}
    best = sorted(values, key=lambda id_: values[id_], reverse=True)

    def listed(**params: Any) -> dict[str, Any]:
        answer = any_service.client.get("/v1/reports", params={"metadata": f"run={run}", **params})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    page = listed(sort=MIR)
    assert [(item["id"], item["metrics"][MIR]) for item in page["items"]] == [(id_, values[id_]) for id_ in best]
    found, cursor = [], None
    for _ in range(5):
        page = listed(sort=MIR, order="asc", limit=1, **({"cursor": cursor} if cursor else {}))
        found += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert (found, cursor) == (best[::-1], None)
    middle = values[best[2]]
    assert [item["id"] for item in listed(sort=MIR, metric=f"{MIR}>={middle!r}")["items"]] == best[:3]
    both = listed(metadata=[f"run={run}", "wide=true"], show=["splits.all.accuracy", "splits.all.collapse.nc1"])
    for item in both["items"]:
        split = reports[item["id"]]["splits"]["all"]
        expected = {"splits.all.accuracy": split["accuracy"], "splits.all.collapse.nc1": split["collapse"]["nc1"]}
        assert item["metrics"] == expected
    assert len(both["items"]) == 2


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"sort": "splits.test.acuracy"}, "nearest is 'splits.test.accuracy'"),
        ({"sort": "summary.cosine", "kind": "evaluation"}, "of kind path"),
        ({"sort": "subject.n_parameters"}, "not sorted or filtered by 'subject.n_parameters'"),
        ({"sort": "splits.test.class_counts.0"}, "not sorted or filtered"),
        ({"show": "points.0.w"}, "not sorted or filtered"),
        ({"metric": "splits.test.accuracy=0.9"}, "PATH>=NUMBER"),
        ({"metric": "splits.test.accuracy>=nan"}, "PATH>=NUMBER"),
        ({"metric": "splits.test.accuracy>=1e999"}, "PATH>=NUMBER"),
        ({"metric": ">=1"}, "PATH>=NUMBER"),
        ({"sort": "splits.test.accuracy", "cursor": "MjAyNi0xMS0yN1QwMDowMDowMCswMDowMCBh"}, "for this order"),
        ({"sort": "splits.test.accuracy", "order": "up"}, "order"),
    ],
)
def test_what_there_is_not_is_said(service: Service, params: dict[str, str], said: str) -> None:
    """Paths, bounds, orders and cursors that there are not are problems that name what there is."""
    body = problem(service.client.get("/v1/reports", params=params), 422, "invalid-request")
    assert said in json.dumps(body).replace('\\"', '"')

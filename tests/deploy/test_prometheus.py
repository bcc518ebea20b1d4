"""deploy/grafana and deploy/prometheus: what they name is told by a real service, and a real Prometheus takes it."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from tests import services
from tests.app.test_analyses import pair
from tests.deploy.programs import background, free_port, program
from tests.services import Service, until

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "interplay.json"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
ROWS = ["Queue", "Workers", "Points", "HTTP", "Storage", "Retention"]
# Those of runs are told while there are any.
SOMETIMES = {"interplay_oldest_wait_seconds", "interplay_most_attempts"}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> dict[str, str]:
    """The dashboard's queries by panel and legend."""
    return {
        f"{panel['title']}: {target['legendFormat'] or target['refId']}": target["expr"]
        for panel in panels()
        for target in panel.get("targets", [])
    }


def rules() -> list[dict[str, Any]]:
    return [rule for group in YAML(typ="safe").load(RULES)["groups"] for rule in group["rules"]]


def names(expression: str) -> set[str]:
    """The metrics that an expression names."""
    return set(re.findall(r"\b(?:interplay|process)_[a-z_]+\b", expression))


def test_the_dashboard_is_whole() -> None:
    """Rows come in order; panels have ids of their own, a description, queries and a place that no other takes."""
    assert [panel["title"] for panel in panels() if panel["type"] == "row"] == ROWS
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    variables = {variable["name"] for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) - {"__rate_interval"}
    assert used == variables == {"datasource", "job"}


def test_every_figure_is_one_of_the_service(service: Service) -> None:
    """What queries and alarms name is on /metrics; and what the service tells of its own is on the dashboard."""
    service.client.get("/healthz")
    families = list(text_string_to_metric_families(service.client.get("/metrics").text))
    told = {sample.name for family in families for sample in family.samples}
    told |= {family.name for family in families} | SOMETIMES
    shown = set().union(*map(names, queries().values()))
    assert shown <= told
    assert set().union(*(names(rule["expr"]) for rule in rules())) <= told
    ours = {family.name for family in families if family.name.startswith("interplay_")} | SOMETIMES
    # Samples of a counter end in _total, those of a histogram in one of the others.
    assert {re.sub("_(total|count|bucket|sum)$", "", name) for name in shown} >= ours


def test_alarms_are_those_of_the_document() -> None:
    """docs/operations.md names each alarm, and none that there is not."""
    text = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"`(Interplay[A-Z][A-Za-z]+)`", text)) == {rule["alert"] for rule in rules()}


def test_alarms_are_heard_where_they_should_be() -> None:
    """promtool takes the rules; each is silent on a service that is well, and heard on one that is not."""
    tool = program("prometheus").removesuffix("prometheus") + "promtool"
    for command in (["check", "rules", RULES.name], ["test", "rules", "rules_test.yml"]):
        ran = subprocess.run([tool, *command], cwd=RULES.parent, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    tested = YAML(typ="safe").load(RULES.with_name("rules_test.yml"))["tests"]
    heard = {case["alertname"] for test in tested for case in test["alert_rule_test"] if "exp_alerts" in case}
    assert heard == {rule["alert"] for rule in rules()}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[Service, httpx.Client]]:
    """Run a service with a key, and a Prometheus that asks it each second, as docs/operations.md configures it."""
    server = program("prometheus")
    with services.running(tmp_path / "data", api_key="secret") as service:
        service.client.headers["Authorization"] = "Bearer secret"
        (tmp_path / "key").write_text("secret\n")
        (documented,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
        configuration = YAML(typ="safe").load(documented)
        configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        assert configuration["rule_files"] == ["/etc/prometheus/interplay/rules.yml"]
        configuration["rule_files"] = [str(RULES)]
        (job,) = configuration["scrape_configs"]
        assert job["job_name"] == "interplay"
        job["authorization"]["credentials_file"] = str(tmp_path / "key")
        job["static_configs"][0]["targets"] = [service.url.removeprefix("http://")]
        path = tmp_path / "prometheus.yml"
        with path.open("w") as file:
            YAML(typ="safe").dump(configuration, file)
        port = free_port()
        command = [
            server,
            f"--config.file={path}",
            f"--storage.tsdb.path={tmp_path / 'series'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (
            background(command, tmp_path / "prometheus.txt"),
            httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30, trust_env=False) as client,
        ):

            def scraped() -> bool:
                found = client.get("/query", params={"query": "up"})
                return found.status_code == 200 and found.json()["data"]["result"] != []

            until(scraped)
            yield service, client


@pytest.mark.slow
def test_every_query_has_data_on_a_real_prometheus(
    prometheus: tuple[Service, httpx.Client], mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """A service that works for half a minute leaves nothing of the dashboard empty; the rules are loaded, and quiet."""
    service, client = prometheus
    ids = pair(service, mlp_checkpoint_file, digits_probe_file)
    began = time.time()
    path = {"kind": "path", "checkpoint_a_id": ids["checkpoint_id"], "checkpoint_b_id": ids["checkpoint_id"]}
    planned = service.analyze(probe_id=ids["probe_id"], options={"grid": {"points": 101}}, **path)
    waiting = [service.analyze(**ids)["id"] for _ in range(20)]
    # Figures of the database are read every five seconds, and a rate needs two of its samples.
    while time.time() < began + 30:
        service.client.get("/v1/analyses")
        service.client.get("/v1/analyses/none")
        time.sleep(0.2)
    for analysis_id in (planned["id"], *waiting):
        service.client.post(f"/v1/analyses/{analysis_id}/cancel")
    empty = {}
    for name, expression in queries().items():
        query = expression.replace("$job", "interplay").replace("$__rate_interval", "10s")
        window: dict[str, Any] = {"query": query, "start": began, "end": time.time(), "step": 1}
        answer = client.get("/query_range", params=window).json()
        assert answer["status"] == "success", (name, answer)
        values = [value for series in answer["data"]["result"] for _, value in series["values"] if value != "NaN"]
        if not values:
            empty[name] = query
    assert not empty
    # What is zero unless something happens did happen.
    for expression in (
        'sum(interplay_runs{status="queued"})',
        "sum(interplay_points)",
        "max(interplay_wanted_workers)",
    ):
        window = {"query": f"max_over_time(({expression})[1m:1s])"}
        (found,) = client.get("/query", params=window).json()["data"]["result"]
        assert float(found["value"][1]) > 0
    loaded = client.get("/rules").json()["data"]["groups"]
    states = {rule["name"]: (rule["health"], rule["state"]) for group in loaded for rule in group["rules"]}
    assert states.keys() == {rule["alert"] for rule in rules()}
    quiet = {name: state for name, state in states.items() if name != "InterplayLittleRoom"}
    assert set(quiet.values()) == {("ok", "inactive")}
    assert states["InterplayLittleRoom"][0] == "ok"

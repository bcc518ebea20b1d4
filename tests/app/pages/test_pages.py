"""Pages over HTTP, without a browser: what they show and what confines them; tests/app/test_keys.py has the login."""

import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from app import pages
from app.pages import words
from interplay.export import to_csv
from tests.app.api.test_charts import reports  # noqa: F401  a report of every kind
from tests.app.test_analyses import SLOW, pair
from tests.services import Service

ROOT = Path(__file__).parents[3]
HOSTILE = "<script>alert(1)</script>\u202e" + "W" * 150
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}


def read(client: httpx.Client, path: str, *, status: int = 200) -> str:
    """Return a page; check the headers and the content that confine it."""
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    text = answer.text
    # The policy would stop these; a page that has none of them does not depend on it.
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", text)
    for address in re.findall(r"""(?:src|href|action|data-chart|data-events)="([^"]*)\"""", text):
        assert re.match(r"/(?!/)|#", address), address
    return text


def token_of(page: str) -> str:
    """Return the token of a page's form."""
    found = re.search(r'name="csrf_token" value="([^"]+)"', page)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", ["evaluation", "comparison", "path", "pruning", "series"])
def test_every_kind_of_report_has_its_page(service: Service, reports: dict[str, Any], kind: str) -> None:  # noqa: F811
    """It begins with sentences, has every chart, and each number of the report that it shows has all its digits."""
    report = reports[kind]
    page = read(service.client, f"/reports/{report['id']}")
    assert len(re.findall(r"<p><bdi>[A-Z][^<]*\.</bdi></p>", page)) >= 1
    charts = re.findall(r'data-chart="([^"]+)"', page)
    assert charts
    for address in charts:
        assert service.client.get(address).status_code == 200
    split = {"evaluation": lambda: report["splits"]["test"], "comparison": lambda: report["splits"]["test"]["b"]}.get(
        kind, lambda: report["points"][-1]["splits"]["test"]
    )()
    for value in (split["accuracy"], split["loss"], split["interplay"]["sample"]["global"]["mir"]):
        assert f'title="{value}"' in page
    assert "before &lt;&amp;&gt;" in page or kind == "evaluation"


def test_an_evaluation_by_class(service: Service, reports: dict[str, Any]) -> None:  # noqa: F811
    """The confusion matrix has the report's counts, and its rows add up to the class counts."""
    report = reports["evaluation"]
    page = read(service.client, f"/reports/{report['id']}")
    matrices = re.findall(r'<table class="matrix">(.*?)</table>', page, re.DOTALL)
    assert len(matrices) == len(report["splits"])
    for matrix, split in zip(matrices, report["splits"].values(), strict=True):
        body = matrix.partition("<tbody>")[2]
        cells = [
            [int(cell.replace("·", "0")) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        ]
        assert [sum(row) for row in cells] == split["class_counts"]
        for confusion in split["by_class"]["confusions"]:
            assert cells[confusion["label"]][confusion["predicted"]] == confusion["n_samples"]


def test_the_table_is_that_of_the_export(service: Service, reports: dict[str, Any]) -> None:  # noqa: F811
    """The CSV of a report's page is the file that `interplay export --csv` writes."""
    for report in reports.values():
        expected = io.StringIO(newline="")
        assert to_csv(report, expected) > 100
        answer = service.client.get(f"/reports/{report['id']}.csv")
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert answer.text == expected.getvalue()


def test_names_are_text(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A name of markup, of a mark that turns the line, and of 150 letters is text on every page."""
    spec = {"name": HOSTILE, "metadata": {"<b>key": "<i>value\u2066"}}
    checkpoint = service.post("/v1/checkpoints", spec, mlp_checkpoint_file).json()["id"]
    probe = service.post("/v1/probes", {"name": HOSTILE, "preprocess": {"scale": 0.0625}}, digits_probe_file).json()[
        "id"
    ]
    ended = service.wait(
        service.analyze(checkpoint_id=checkpoint, probe_id=probe, options={"null_permutations": 0})["id"]
    )
    for path in (
        "/", "/reports", "/analyses", "/checkpoints", "/probes", "/leaderboard", f"/checkpoints/{checkpoint}",
        f"/probes/{probe}", f"/reports/{ended['report_id']}", f"/analyses/{ended['id']}",
        f"/reports?name={quote(HOSTILE)}",
    ):  # fmt: skip
        page = read(service.client, path)
        body = page.partition("<main")[2]
        assert "<script>alert" not in page
        assert "<b>key" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
        shown = re.sub(r'(?:value|title|aria-label|href)="[^"]*"', "", body)
        assert "\u202e" not in re.sub(r"<option[^>]*>[^<]*", "", shown), path
        assert "\u2066" not in shown


def test_the_leaderboard_is_that_of_the_api(service: Service, reports: dict[str, Any]) -> None:  # noqa: F811
    """Reports of a probe stand in the order, and with the digits, of the API."""
    probe, sort = reports["evaluation"]["probe"]["id"], "splits.test.loss"
    params = {"probe_id": probe, "sort": sort, "order": "asc"}
    items = service.client.get("/v1/reports", params=params).json()["items"]
    assert items
    page = read(service.client, f"/leaderboard?probe_id={probe}&sort={sort}&order=asc&metric=&metadata=")
    assert re.findall(r'<td><a href="/reports/([^"]+)">', page) == [item["id"] for item in items]
    for item in items:
        assert f'title="{item["metrics"][sort]}"' in page
    assert "nearest is" in read(service.client, "/leaderboard?sort=splits.test.acuracy", status=422)


def test_lists_filter_as_the_api_does(service: Service, reports: dict[str, Any]) -> None:  # noqa: F811
    """Filters, and links to the next page, are those of the API; what was left empty filters nothing."""
    page = read(service.client, "/reports?kind=path&name=&metadata=")
    assert reports["path"]["id"] in page
    assert reports["series"]["id"] not in page
    first = read(service.client, "/reports?limit=1")
    following = re.search(r'rel="next" href="([^"]+)"', first)
    assert following is not None
    second = read(service.client, following[1].replace("&amp;", "&"))
    ids = [re.findall(r'<td><a href="/reports/([^"]+)">', one) for one in (first, second)]
    assert len(ids[0]) == 1
    assert ids[0][0] not in ids[1]
    assert "Input should be" in read(service.client, "/analyses?status=done", status=422)


def test_errors_are_pages(service: Service) -> None:
    """What there is not is said on a page, and the API's own paths still answer with problems."""
    assert "There is no report" in read(service.client, "/reports/none", status=404)
    assert "There is no analysis" in read(service.client, "/analyses/none", status=404)
    assert "There is no checkpoint" in read(service.client, "/checkpoints/none", status=404)
    read(service.client, "/checkpoints/a/b", status=404)
    assert service.client.get("/v1/nothing").headers["content-type"] == "application/problem+json"
    assert service.client.put("/v1/probes").status_code == 405
    assert service.client.get("/nothing").status_code == 404


def test_every_metric_has_its_definition(service: Service) -> None:
    """The anchors that metrics link to exist in docs/metrics.md as the service shows it."""
    page = read(service.client, "/definitions")
    anchors = set(re.findall(r'<h\d id="([^"]+)"', page))
    assert {metric.anchor for metric in words.METRICS.values()} <= anchors
    assert "theta(w)" in page
    shown = Path(pages.__file__).with_name("metrics.md")
    assert shown.read_text() == (ROOT / "docs" / "metrics.md").read_text(), "`make types` copies it"


def test_an_analysis_is_cancelled_by_its_form(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """The form of its own session cancels; without the token, or with another session's, nothing happens."""
    analysis = service.analyze(**pair(service, mlp_checkpoint_file, digits_probe_file), options=SLOW)
    path = f"/analyses/{analysis['id']}"
    with (
        httpx.Client(base_url=service.url, trust_env=False) as own,
        httpx.Client(base_url=service.url, trust_env=False) as other,
    ):
        token = token_of(read(own, path))
        foreign = token_of(read(other, path))
        for data in ({}, {"csrf_token": foreign}, {"csrf_token": ""}):
            refused = own.post(f"{path}/cancel", data=data)
            assert refused.status_code == 403, refused.text
        assert service.client.get(f"/v1{path}").json()["status"] in ("queued", "running")
        done = own.post(f"{path}/cancel", data={"csrf_token": token})
        assert (done.status_code, done.headers["location"]) == (303, path)
    assert service.wait(analysis["id"])["status"] == "cancelled"

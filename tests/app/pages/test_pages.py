"""Pages over HTTP, without a browser: what they show and what confines them; tests/app/test_keys.py has the login."""

import io
import json
import re
import sqlite3
from contextlib import closing
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import numpy as np
import pytest
from markupsafe import escape
from safetensors.numpy import save

from app import pages
from app.pages import words
from app.pages.rendering import place
from app.schemas.reports import Subject
from interplay.export import to_csv
from tests.app.test_analyses import SLOW, pair
from tests.datafiles import mlp_adapter
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
    for address in re.findall(r"""(?:src|href|action|data-chart|data-events|data-poll)="([^"]*)\"""", text):
        assert re.match(r"/(?!/)|#", address), address
    return text


def token_of(page: str) -> str:
    """Return the token of a page's form."""
    found = re.search(r'name="csrf_token" value="([^"]+)"', page)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", ["evaluation", "comparison", "path", "pruning", "series"])
def test_every_kind_of_report_has_its_page(service: Service, reports: dict[str, Any], kind: str) -> None:
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


@pytest.mark.parametrize("kind", ["evaluation", "comparison", "path"])
def test_a_report_of_an_earlier_version_has_its_page(service: Service, reports: dict[str, Any], kind: str) -> None:
    """A report is stored as it was served then, without the members that have come since."""
    optional = [name for name, field in Subject.model_fields.items() if not field.is_required()]
    with closing(sqlite3.connect(service.data_dir / "interplay.db")) as database, database:
        id = reports[kind]["id"]
        [(content,)] = database.execute("SELECT content FROM reports WHERE id = ?", (id,)).fetchall()
        earlier = json.loads(content)
        for subject in earlier.get("subjects") or [earlier["subject"]]:
            for name in optional:
                del subject[name]
        database.execute("UPDATE reports SET content = ? WHERE id = ?", (json.dumps(earlier), id))
        database.commit()
        shown = service.client.get(f"/reports/{id}")
        database.execute("UPDATE reports SET content = ? WHERE id = ?", (content, id))
    assert shown.status_code == 200, shown.text


def test_an_evaluation_by_class(service: Service, reports: dict[str, Any]) -> None:
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


def test_the_table_is_that_of_the_export(service: Service, reports: dict[str, Any]) -> None:
    """The CSV of a report's page is the file that `interplay export --csv` writes."""
    for report in reports.values():
        expected = io.StringIO(newline="")
        assert to_csv(report, expected) > 100
        answer = service.client.get(f"/reports/{report['id']}.csv")
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert answer.text == expected.getvalue()


def test_names_are_text(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, reports: dict[str, Any]
) -> None:
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
        f"/reports?name={quote(HOSTILE)}", f"/analyses/new?like={ended['id']}",
        f"/compare?report={ended['report_id']}&report={reports['path']['id']}",
    ):  # fmt: skip
        page = read(service.client, path)
        body = page.partition("<main")[2]
        assert "<script>alert" not in page
        assert "<b>key" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
        # But for what a field or a link gives back to the service as it was.
        shown = re.sub(r'(?:value|href)="[^"]*"', "", page)
        assert "\u202e" not in shown, path
        assert "\u2066" not in shown


def test_the_leaderboard_is_that_of_the_api(service: Service, reports: dict[str, Any]) -> None:
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


def test_lists_filter_as_the_api_does(service: Service, reports: dict[str, Any]) -> None:
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


def test_collections_sort_by_any_column(service: Service, mlp_checkpoint_file: Path) -> None:
    """Headers are links that sort by their column, metadata as numbers; a part of a name and days filter."""
    run = uuid4().hex
    for epoch in (9, 10, 1):
        spec = {"name": f"{run} of {epoch}", "metadata": {"epoch": epoch, "<i>": "x"}}
        assert service.post("/v1/checkpoints", spec, mlp_checkpoint_file).status_code == 201
    page = read(service.client, f"/checkpoints?search={run[:20].upper()}&metadata=&created_after=2020-01-31")
    assert 'aria-sort="descending"><a href="/checkpoints?sort=created_at&amp;order=asc' in page
    sorters = re.findall(r'<th scope="col"[^>]*><a[^>]* href="([^"]+)">', page)
    assert len(sorters) == 7
    for sorter, expected in (
        (next(one for one in sorters if "metadata.epoch" in one), ["1", "9", "10"]),
        (next(one for one in sorters if "sort=name" in one), ["1", "10", "9"]),
    ):
        ascending = read(service.client, unescape(sorter))
        assert re.findall(rf"<bdi>{run} of (\d+)</bdi>", ascending) == expected
        assert 'aria-sort="ascending"' in ascending
        turned = re.search(r'aria-sort="ascending"><a[^>]* href="([^"]+)">', ascending)
        assert turned is not None
        descending = read(service.client, unescape(turned[1]))
        assert re.findall(rf"<bdi>{run} of (\d+)</bdi>", descending) == expected[::-1]
        assert 'name="created_after" value="2020-01-31"' in descending
    assert "No checkpoint matches" in read(service.client, f"/checkpoints?search={run}&created_before=2020-01-31")
    assert "are not sorted by" in read(service.client, "/probes?sort=sha256", status=422)


def test_gates_and_baselines(service: Service, reports: dict[str, Any]) -> None:
    """A gate's versions and checks, a baseline's moves, and what the gate says of each move."""
    name, report = f"gate-{uuid4().hex[:8]}", reports["evaluation"]
    spec: dict[str, Any] = {
        "name": name,
        "checks": [{"metric": "splits.test.accuracy", "min": 0.9999, "name": "<b>nearly all</b>"}],
    }
    first = service.client.post("/v1/gates", json=spec).json()["id"]
    spec["checks"].append({"metric": "splits.test.loss", "max": 100})
    second = service.client.post("/v1/gates", json=spec).json()["id"]
    assert f"/gates/{second}" in read(service.client, "/gates")
    page = read(service.client, f"/gates/{second}")
    assert "&lt;b&gt;nearly all&lt;/b&gt;" in page
    assert f"/gates/{first}" in page
    baseline = f"main-{uuid4().hex[:8]}"
    put = service.client.put(f"/v1/baselines/{baseline}", json={"report_id": report["id"], "note": "<i>by hand</i>"})
    assert put.status_code == 200, put.text
    assert f"/baselines/{baseline}" in read(service.client, "/baselines")
    page = read(service.client, f"/baselines/{baseline}")
    assert f"/reports/{report['id']}" in page
    assert "&lt;i&gt;by hand&lt;/i&gt;" in page
    page = read(service.client, f"/baselines/{baseline}?gate={second}")
    verdict = service.client.post(f"/v1/reports/{report['id']}/gate", json={"gate_id": second}).json()
    for check in verdict["checks"]:
        assert escape(check["why"]) in page
    asked = f"/reports/{report['id']}/verdict"
    assert f'href="{asked}"' in read(service.client, f"/reports/{report['id']}")
    assert f'<option value="{second}"' in read(service.client, asked)
    judged = read(service.client, f"{asked}?gate={second}&baseline={baseline}")
    for check in verdict["checks"]:
        assert escape(check["why"]) in judged
    assert f"the report of the baseline {baseline}" in judged
    path = reports["path"]["id"]
    assert "reports of kind path" in read(service.client, f"/reports/{path}/verdict")
    assert 'class="warn"' in read(service.client, f"/reports/{path}/verdict?gate={second}")
    assert "There is no report" in read(service.client, f"/reports/{second}/verdict", status=404)
    problem = service.client.get(f"/v1/baselines/{baseline}/history", params={"search": "x"})
    assert problem.status_code == 422
    assert "There is no baseline" in read(service.client, "/baselines/none", status=404)
    assert "There is no gate" in read(service.client, f"/baselines/{baseline}?gate=none", status=404)


def test_files_are_pushed_by_forms(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path: Path
) -> None:
    """What a form sends becomes the resource that the API would have made, and a mistake is said on a page."""
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
        token = token_of(read(client, "/push"))

        def push(collection: str, file: bytes | None, **fields: str) -> httpx.Response:
            data = {"csrf_token": token, "name": "pushed", **fields}
            return client.post(f"/push/{collection}", data=data, files={"file": ("a.safetensors", file or b"")})

        def made(answer: httpx.Response) -> dict[str, Any]:
            assert answer.status_code == 303, answer.text
            read(client, answer.headers["location"])
            return dict(client.get(f"/v1{answer.headers['location']}").json())

        checkpoint = made(
            push("checkpoints", mlp_checkpoint_file.read_bytes(), metadata="run = a\n\nepoch=10\nfinal=true", head="")
        )
        assert (checkpoint["name"], checkpoint["metadata"]) == ("pushed", {"run": "a", "epoch": 10, "final": True})
        names = "\n".join(f"digit {digit}" for digit in range(10))
        probe = made(push("probes", digits_probe_file.read_bytes(), class_names=names, preprocess='{"scale": 0.0625}'))
        assert probe["class_names"] == names.splitlines()
        assert probe["preprocess"]["scale"] == 0.0625
        features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
        arrays: dict[str, Any] = {"features": features, "labels": np.arange(12) % 3, "head": features[:3].copy()}
        assert made(push("feature-sets", save(arrays)))["n_features"] == 4
        for fields, said in (
            ({"architecture": "{broken"}, "architecture is not valid JSON"),
            ({"metadata": "epoch"}, "key=value"),
            ({"further": "[]"}, "must be a JSON object"),
            ({"bogus": "1"}, "bogus"),
        ):
            refused = push("checkpoints", mlp_checkpoint_file.read_bytes(), **fields)
            assert refused.status_code == 422
            assert said in refused.text
        tensors = (mlp_adapter(tmp_path) / "adapter_model.safetensors").read_bytes()
        config = (tmp_path / "adapter_config.json").read_text()
        adapter = made(push("checkpoints", tensors, base_id=checkpoint["id"], adapter=config))
        assert (adapter["base_id"], adapter["adapter"]["rank"]) == (checkpoint["id"], 2)
        page = read(client, f"/checkpoints/{adapter['id']}")
        assert f'<dt>Base</dt><dd><a href="/checkpoints/{checkpoint["id"]}">' in page
        assert "lora, rank 2, alpha 4" in page
        assert "Push an adapter of it" not in page
        link = f"/push?base={checkpoint['id']}"
        assert f'href="{link}">Push an adapter of it</a>' in read(client, f"/checkpoints/{checkpoint['id']}")
        assert f'value="{checkpoint["id"]}"' in read(client, link)
        refused = push("checkpoints", tensors, base_id=adapter["id"], adapter=config)
        assert refused.status_code == 422
        assert "is an adapter itself" in refused.text
        assert push("checkpoints", None).status_code == 422
        before = {path.name for path in (service.data_dir / "blobs").rglob("*")}
        assert push("checkpoints", b"other" * 1000, csrf_token="0").status_code == 403
        assert {path.name for path in (service.data_dir / "blobs").rglob("*")} == before
        assert client.post("/push/nothing", data={"csrf_token": token}).status_code == 422


def test_every_kind_is_asked_for_by_its_form(service: Service, reports: dict[str, Any]) -> None:
    """A form that begins with an earlier analysis asks for the same; other options and mistakes are taken and said."""
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
        for kind, report in reports.items():
            before = client.get(f"/v1/analyses/{report['analysis_id']}").json()
            form = read(client, f"/analyses/new?like={before['id']}")
            fields = fields_of(form)
            assert fields["kind"] == kind
            fields["options.null_permutations"] = "1"
            sent = client.post("/analyses/new", data=fields)
            assert sent.status_code == 303, sent.text
            after = client.get(f"/v1{sent.headers['location']}").json()
            for member in ("kind", "checkpoint_ids", "probe_id", "axis"):
                assert after[member] == before[member], member
            assert after["options"] == {**before["options"], "null_permutations": 1}
            read(client, sent.headers["location"])
            client.post(f"/v1{sent.headers['location']}/cancel")
        fields = fields_of(read(client, f"/analyses/new?like={reports['series']['analysis_id']}"))
        for change, said in (
            ({"checkpoint_ids": "one"}, "place = id"),
            ({"options.null_permutations": "-1"}, "null_permutations"),
            ({"options.precision": "float8"}, "precision"),
            ({"kind": "speed"}, "no kind of analysis"),
            ({"probe_id": "none"}, "probe"),
        ):
            answer = client.post("/analyses/new", data=fields | change)
            assert answer.status_code in (404, 422), answer.text
            assert said in answer.text
        assert client.post("/analyses/new", data=fields | {"csrf_token": "0"}).status_code == 403
    assert "Axis" not in read(service.client, "/analyses/new?kind=path")


def test_a_series_is_filled_in_by_metadata(service: Service, mlp_checkpoint_file: Path) -> None:
    """Checkpoints of a run stand in the form at their epochs; of one without an epoch nothing does."""
    run = uuid4().hex
    ids = {}
    for epoch in (10, 9.5, "last"):
        spec = {"name": "net", "metadata": {"run": run, "epoch": epoch}}
        ids[epoch] = service.post("/v1/checkpoints", spec, mlp_checkpoint_file).json()["id"]
    link = re.search(r'href="(/analyses/new\?kind=series[^"]*)"', read(service.client, f"/checkpoints/{ids[10]}"))
    assert link is not None
    form = read(service.client, unescape(link[1]))
    assert f">9.5 = {ids[9.5]}\n10 = {ids[10]}</textarea>" in form
    assert "A series of its run" not in read(service.client, f"/checkpoints/{ids['last']}")
    asked = read(service.client, f"/analyses/new?checkpoint_id={ids[10]}")
    assert f'<option value="{ids[10]}" selected>' in asked
    assert "is not of the form key=value" in read(service.client, "/analyses/new?kind=series&of=x", status=422)


@pytest.mark.parametrize("value", [1000001.0, 1000002.0, 1 / 24, 0.30000000000000004, 1e-15, -0.0, 7.0])
def test_places_are_exact(value: float) -> None:
    """A place that a form gives back is the same number, and no two look alike."""
    assert float(place(value)) == value
    assert not place(value).endswith(".0")
    assert not place(value).startswith("-0")


def fields_of(page: str) -> dict[str, str]:
    """Return what a browser would send of the page's form."""
    form = page[page.index("<form method") : page.index("</form>", page.index("<form method"))]
    fields = dict(re.findall(r'<input[^>]* name="([^"]+)" value="([^"]*)"', form))
    for name, options in re.findall(r'<select[^>]* name="([^"]+)">(.*?)</select>', form):
        chosen = re.search(r'value="([^"]*)" selected', options) or re.search(r'value="([^"]*)"', options)
        fields[name] = chosen[1] if chosen else ""
    fields |= dict(re.findall(r'<textarea[^>]* name="([^"]+)"[^>]*>([^<]*)</textarea>', form))
    return {name: unescape(value) for name, value in fields.items()}


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

"""Reports side by side: differences are marked where an interval says so, and charts have the reports' numbers."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app.pages import words
from tests.app.pages.test_pages import read
from tests.app.test_points import FEW
from tests.services import Service

CHECKPOINT_NAMES = ("trained", "half noise", "noise")


@pytest.fixture(scope="module")
def three(
    service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Evaluate a network and two with noise in their weights; compare the second with the first."""
    folder = tmp_path_factory.mktemp("noisy")
    weights = load_file(mlp_checkpoint_file)
    with safe_open(mlp_checkpoint_file, "pt") as file:
        architecture = file.metadata()
    generator = torch.Generator().manual_seed(1)
    ids = []
    for name, amount in zip(CHECKPOINT_NAMES, (0.0, 0.1, 0.3), strict=True):
        noisy = {key: value + amount * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        save_file(noisy, folder / "noisy.safetensors", metadata=architecture)
        spec = {"name": name, "metadata": {"noise": amount, "run": "a", "kind": name[:5]}}
        ids.append(service.post("/v1/checkpoints", spec, folder / "noisy.safetensors").json()["id"])
    spec = {"name": "digits", "preprocess": {"scale": 0.0625}}
    probe = service.post("/v1/probes", spec, digits_probe_file).json()["id"]
    asked = [{"checkpoint_id": id_, "options": {"null_permutations": 2}} for id_ in ids]
    queued = [service.analyze(probe_id=probe, **one)["id"] for one in asked]
    # The second is A here: the page turns the differences round.
    pair = {"kind": "comparison", "checkpoint_a_id": ids[1], "checkpoint_b_id": ids[0]}
    queued.append(service.analyze(probe_id=probe, **pair, options={"null_permutations": 2})["id"])
    *evaluations, comparison = [service.report(service.wait(id_)) for id_ in queued]
    return {"evaluations": evaluations, "comparison": comparison, "checkpoint_ids": ids}


def address(*reports: dict[str, Any], split: str | None = None) -> str:
    """Return the path of a page that compares reports."""
    query = "&".join(f"report={report['id']}" for report in reports)
    return f"/compare?{query}" + (f"&split={split}" if split else "")


def rows_of(page: str) -> dict[str, list[str]]:
    """Return the cells of the first table of metrics by label, as text without markup."""
    table = page.partition("Metrics of ")[2].partition("</table>")[0]
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
        heading, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        texts = [" ".join(unescape(re.sub(r"<[^>]*>", " ", cell)).split()) for cell in (heading, *cells)]
        found[texts[0]] = texts[1:]
    return found


@pytest.mark.parametrize("split", ["test", "train"])
def test_differences_are_marked_where_an_interval_says_so(service: Service, three: dict[str, Any], split: str) -> None:
    """The cells of the second report have the comparison's differences, turned round; those of the third have none."""
    evaluations = three["evaluations"]
    rows = rows_of(read(service.client, address(*evaluations, split=split)))
    differences = three["comparison"]["splits"][split]["differences"]
    marked = 0
    for path in words.COMPARED:
        metric, found = words.metric_of(path), differences[path]
        assert metric is not None
        first, second, third = rows[metric.label]
        assert not re.search(r"[▲▼]|\(", first + third), path
        if found["low"] is None:
            assert second.endswith("no interval")
            continue
        assert re.search(r"[▲▼]", second) is not None if found["significant"] else "▲" not in second, path
        marked += found["significant"]
        if found["significant"]:
            assert ("▲" in second) == (found["high"] < 0), path
        low, high = (float(text) for text in re.findall(r"\((\S+) to (\S+)\)", second)[0])
        assert low == pytest.approx(-found["high"], rel=1e-2, abs=1e-4)
        assert high == pytest.approx(-found["low"], rel=1e-2, abs=1e-4)
    assert marked >= 3


def test_reports_without_a_comparison_lead_to_its_form(service: Service, three: dict[str, Any]) -> None:
    """The form has both checkpoints and the probe; the comparison that there is has a link."""
    a, b, c = three["evaluations"]
    page = read(service.client, address(a, b, c))
    assert f'<a href="/reports/{three["comparison"]["id"]}" aria-label="The comparison of A and B">' in page
    form = re.search(r'<a href="([^"]+)" aria-label="Ask for a comparison of A and C">', page)
    assert form is not None
    asked = read(service.client, unescape(form[1]))
    for id_ in (three["checkpoint_ids"][0], three["checkpoint_ids"][2], a["probe"]["id"]):
        assert f'<option value="{id_}" selected>' in asked
    # A second report of the same checkpoint has the same comparison.
    request = {"checkpoint_id": three["checkpoint_ids"][1], "probe_id": a["probe"]["id"], "options": FEW}
    again = service.report(service.wait(service.analyze(**request)["id"]))
    both = read(service.client, address(a, b, again))
    assert all(f'aria-label="The comparison of A and {letter}"' in both for letter in "BC")
    # Another one first: what it was compared with is marked, the others are not.
    turned = read(service.client, address(b, a, c))
    assert 'aria-label="The comparison of A and B"' in turned
    assert 'aria-label="Ask for a comparison of A and C"' in turned


def test_a_comparison_with_other_options_marks_nothing(service: Service, three: dict[str, Any]) -> None:
    """Its numbers are not those of the reports: here it looked at fewer samples."""
    a, _, c = three["evaluations"]
    ids = three["checkpoint_ids"]
    asked = {"kind": "comparison", "checkpoint_a_id": ids[0], "checkpoint_b_id": ids[2], "probe_id": a["probe"]["id"]}
    ended = service.wait(service.analyze(**asked, options={**FEW, "samples": 400})["id"])
    rows = rows_of(read(service.client, address(a, c)))
    assert ended["report_id"]
    assert not any(re.search(r"[▲▼]|no interval", cell) for cells in rows.values() for cell in cells)


def test_what_differs_stands_apart(service: Service, three: dict[str, Any]) -> None:
    """Metadata that differ are columns, what is the same for all is said once."""
    page = read(service.client, address(*three["evaluations"]))
    differing, common = page.partition("What differs")[2].split("The same for all")
    assert "Metadata: noise" in differing
    assert "Metadata: run" in common
    assert "Option: null_permutations" in common


def test_evaluations_lie_on_parallel_axes(service: Service, three: dict[str, Any]) -> None:
    """Axes are the metadata that differ and the first metrics; heights follow the numbers, and words have an order."""
    evaluations = three["evaluations"]
    query = "&".join(f"report={report['id']}" for report in evaluations)
    chart = service.client.get(f"/compare/charts/parallel.json?{query}").json()
    rows = _rows_of(chart, "title")
    by_title: dict[str, list[float]] = {}
    for row in rows:
        by_title.setdefault(row["title"], []).append(row["height"])
    assert list(by_title) == ["noise", "kind", "Loss", "NC1", "HDR", "MIR", "Accuracy"]
    assert by_title["noise"] == pytest.approx([0, 1 / 3, 1])
    # Sorted words: half, noise, train.
    assert by_title["kind"] == pytest.approx([5 / 6, 1 / 6, 1 / 2])
    values = [report["splits"]["test"]["interplay"]["sample"]["global"]["mir"] for report in evaluations]
    span = max(values) - min(values)
    assert by_title["MIR"] == pytest.approx([(value - min(values)) / span for value in values])
    assert service.client.get(f"/compare/charts/parallel.svg?{query}").headers["content-type"] == "image/svg+xml"


def test_points_lie_in_one_chart(service: Service, reports: dict[str, Any], three: dict[str, Any]) -> None:
    """Lines of two series have the points of their reports; one over another axis is left out, and said so."""
    ids, probe = three["checkpoint_ids"], three["evaluations"][0]["probe"]["id"]
    more = []
    for name in ("epoch", "noise"):
        asked = {"kind": "series", "checkpoint_ids": ids, "axis": {"name": name, "values": [0, 1, 3]}}
        queued = service.analyze(**asked, probe_id=probe, options=FEW)
        more.append(service.report(service.wait(queued["id"])))
    page = read(service.client, address(reports["series"], *more, reports["path"]))
    assert "Left out of the charts, as its axis is another: C." in page
    addresses = [unescape(found) for found in re.findall(r'data-chart="([^"]+)"', page)]
    assert [re.findall(r"charts/(\w+)\.json", one)[0] for one in addresses] == ["loss", "accuracy", "mir", "hdr"]
    together = [reports["series"], more[0]]
    assert all(
        [f"report={report['id']}" in one for report in (*together, more[1])] == [True, True, False] for one in addresses
    )
    drawn = service.client.get(addresses[2]).json()
    rows = [(row["place"], row["value"]) for row in _rows_of(drawn, "place")]
    expected = [
        (point["x"], point["splits"]["test"]["interplay"]["sample"]["global"]["mir"])
        for report in together
        for point in report["points"]
    ]
    assert rows == expected
    # A summary without intervals marks nothing, and has the last point of each.
    last = rows_of(read(service.client, address(*together)))["Accuracy at the last point"]
    assert last == [f"{100 * report['points'][-1]['splits']['test']['accuracy']:.2f} %" for report in together]


def test_choices_that_cannot_be_compared(service: Service, three: dict[str, Any], reports: dict[str, Any]) -> None:
    """One report is too few, 21 are too many, an unknown one is named; addresses of pages are as good as ids."""
    a, b, _ = three["evaluations"]
    assert "One report is chosen." in read(service.client, address(a))
    offered = read(service.client, "/compare")
    assert f'name="report" value="{a["id"]}"' in offered
    unknown = a["id"][:-1] + ("0" if a["id"][-1] != "0" else "1")
    assert unknown in read(service.client, f"/compare?report={a['id']}&report={unknown}", status=404)
    many = "&".join(f"report={a['id'][:-2]}{index:02d}" for index in range(21))
    assert "At most 20 reports" in read(service.client, f"/compare?{many}", status=422)
    pasted = f"/compare?report={a['id']}&report=https%3A%2F%2Fhost%2Freports%2F{b['id']}&report={a['id']}"
    assert "Put B first" in read(service.client, pasted)
    mixed = f"report={a['id']}&report={reports['series']['id']}"
    assert service.client.get(f"/compare/charts/mir.svg?{mixed}").status_code == 404
    assert service.client.get(f"/compare/charts/nc9.svg?report={a['id']}&report={b['id']}").status_code == 404


def _rows_of(specification: dict[str, Any], member: str) -> list[dict[str, Any]]:
    """Return the rows of a chart's data that have a member."""
    return [row for rows in specification["datasets"].values() for row in rows if member in row]

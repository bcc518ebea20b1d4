"""Pictures of real reports: each kind, each format, what they show, and what there is not."""

import json
import struct
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from app import charts
from tests.app.test_points import FEW
from tests.app.test_uploads import problem
from tests.services import Service

NAMES = {
    "evaluation": ["overview", "mir", "hdr"],
    "comparison": ["overview", "accuracy", "loss", "mir", "hdr"],
    "path": ["overview", "loss", "error", "mir", "hdr"],
    "pruning": ["overview", "loss", "accuracy", "mir", "hdr"],
    "series": ["overview", "loss", "accuracy", "mir", "hdr"],
}


@pytest.fixture(scope="module")
def reports(service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> dict[str, dict[str, Any]]:
    """A report of every kind."""
    ids = [
        service.post("/v1/checkpoints", {"name": name}, mlp_checkpoint_file).json()["id"]
        for name in ("before <&>", "after")
    ]
    probe = service.post("/v1/probes", {"name": "data", "preprocess": {"scale": 0.0625}}, digits_probe_file).json()[
        "id"
    ]
    requests: dict[str, dict[str, Any]] = {
        "evaluation": {"checkpoint_id": ids[0], "options": {"null_permutations": 2}},
        "comparison": {"checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "options": FEW},
        "path": {"checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "options": {**FEW, "grid": {"points": 3}}},
        "pruning": {"checkpoint_id": ids[0], "options": {**FEW, "sparsities": [0.5, 0.9, 0.99]}},
        "series": {"axis": {"name": "epoch", "values": [0, 5]}, "checkpoint_ids": ids, "options": FEW},
    }
    return {
        kind: service.report(service.wait(service.analyze(kind=kind, probe_id=probe, **request)["id"]))
        for kind, request in requests.items()
    }


@pytest.mark.parametrize("kind", NAMES)
def test_every_chart_is_drawn_in_every_format(service: Service, reports: dict[str, Any], kind: str) -> None:
    """SVG that is XML and says what it is of, PNG of a size to read, and the specification that both came from."""
    url = f"/v1/reports/{reports[kind]['id']}/charts"
    listed = service.client.get(url).json()
    assert listed == {"names": NAMES[kind], "formats": ["svg", "png", "json"]}
    for name in NAMES[kind]:
        picture = service.client.get(f"{url}/{name}.svg")
        assert picture.headers["content-type"].startswith("image/svg+xml")
        words = "".join(ET.fromstring(picture.text).itertext())
        assert "train" in words
        if name == "overview":
            assert "before <&>" in words
        image = service.client.get(f"{url}/{name}.png")
        assert image.headers["content-type"] == "image/png"
        assert image.content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", image.content[16:24])
        assert 600 <= width <= 2200
        assert 200 <= height <= 1600
        specification = service.client.get(f"{url}/{name}.json")
        assert specification.headers["content-type"] == "application/vnd.vegalite+json"
        assert "vega-lite" in specification.json()["$schema"]


def test_a_chart_shows_the_numbers_of_the_report(reports: dict[str, Any]) -> None:
    """Points, the optimum of a series, the knee of a sweep, and where a barrier is: all from the report."""
    specification = charts.describe(reports["series"], "mir")
    text = json.dumps(specification)
    for point in reports["series"]["points"]:
        for split in point["splits"].values():
            values = split["interplay"]["sample"]["global"]
            assert json.dumps(values["mir"]) in text
            assert json.dumps(values["optimum"]["mir"]) in text
    knees = [split["knee"] for split in reports["pruning"]["summary"]["splits"].values()]
    drawn = json.dumps(charts.describe(reports["pruning"], "accuracy"))
    assert all(f'{{"sparsity": {json.dumps(knee)}, "split"' in drawn for knee in knees)
    path = json.loads(json.dumps(reports["path"]))
    for split, point in zip(("all", "train", "test"), [path["points"][1]] * 3, strict=True):
        point["splits"][split]["loss"] += 1
        path["summary"]["splits"][split]["loss_barrier"] = {"value": 1.0, "at": 0.5}
    rule = json.dumps(charts.describe(path, "loss"))
    raised = path["points"][1]["splits"]["test"]["loss"]
    assert f'"at": 0.5, "from": {json.dumps(raised - 1.0)}, "to": {json.dumps(raised)}' in rule


def test_what_is_not_defined_is_left_out(reports: dict[str, Any]) -> None:
    """A null is no zero: its point is missing, and the rest is drawn."""
    series = json.loads(json.dumps(reports["series"]))
    for split in series["points"][0]["splits"].values():
        split["interplay"]["sample"]["global"]["mir"] = None
        split["interplay"]["sample"]["global"]["optimum"]["mir"] = None
    assert "<svg" in charts.svg(charts.describe(series, "mir"))
    path = json.loads(json.dumps(reports["path"]))
    whole = charts.svg(charts.describe(path, "mir"))
    for name, split in path["points"][1]["splits"].items():
        split["interplay"]["sample"]["global"]["mir"] = None
        path["summary"]["splits"][name]["mir_barrier"] = None
    # Over the gap in the middle only the chord is left, from end to end.
    assert (_longest_line(whole), _longest_line(charts.svg(charts.describe(path, "mir")))) == (3, 2)
    evaluation = json.loads(json.dumps(reports["evaluation"]))
    for split in evaluation["splits"].values():
        split["interplay"]["class_mean"]["none"] |= {"mir": None, "hdr": None, "null": None}
    assert "<svg" in charts.svg(charts.describe(evaluation, "overview"))


def _longest_line(picture: str) -> int:
    """Points that the longest unbroken line over the points of a report joins."""
    drawn = [path.get("d", "") for path in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}path")]
    lines = [part.count("L") + 1 for d in drawn if "Z" not in d and "A" not in d for part in d.split("M")[1:]]
    return max(lines)


def test_charts_that_there_are_not(service: Service, reports: dict[str, Any]) -> None:
    """An unknown name lists those that there are; an unknown format and an unknown report say so."""
    url = f"/v1/reports/{reports['path']['id']}/charts"
    assert problem(service.client.get(f"{url}/nonsense.svg"), 404, "not-found")["charts"] == NAMES["path"]
    problem(service.client.get(f"{url}/loss.gif"), 422, "invalid-request")
    problem(service.client.get("/v1/reports/none/charts/loss.svg"), 404, "not-found")
    problem(service.client.get("/v1/reports/none/charts"), 404, "not-found")

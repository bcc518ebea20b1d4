"""Charts of real reports: each kind, each format, their content, and charts that do not exist."""

import asyncio
import copy
import json
import struct
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.api import drawing
from app.api.charts.rendering import svg
from app.api.charts.reports import describe
from app.settings import Settings
from tests.app.api.test_uploads import problem
from tests.campaigns import campaign
from tests.services import Service

FURTHER = [
    *("calibration_error", "effective_rank", "mutual_information", "entropy_features", "entropy_head", "entropy_joint"),
    *("nc1", "nc1_condition", "nc2_equinorm_means", "nc2_equinorm_head", "nc2_equiangularity_means"),
    *("nc2_equiangularity_head", "nc2_max_angle_means", "nc2_max_angle_head", "nc3", "nc4"),
]
NAMES = {
    "evaluation": ["overview", "mir", "hdr", "classes", "confusion", "reliability"],
    "comparison": ["overview", "accuracy", "loss", "mir", "hdr", *FURTHER],
    "path": ["overview", "loss", "error", "mir", "hdr", *FURTHER],
    "pruning": ["overview", "loss", "accuracy", "mir", "hdr", *FURTHER],
    "series": ["overview", "loss", "accuracy", "mir", "hdr", *FURTHER],
}
# Of the further ones, which differ in their numbers alone, one is rendered.
DRAWN = {kind: [name for name in names if name not in FURTHER[1:]] for kind, names in NAMES.items()}


@pytest.mark.parametrize("kind", campaign(NAMES, often=["evaluation", "path"]))
def test_every_chart_is_drawn_in_every_format(service: Service, reports: dict[str, Any], kind: str) -> None:
    """Each chart exists as valid SVG with a description, as PNG of a legible size, and as the specification of both."""
    url = f"/v1/reports/{reports[kind]['id']}/charts"
    listed = service.client.get(url).json()
    assert listed == {"names": NAMES[kind], "formats": ["svg", "png", "json"]}
    for name in DRAWN[kind]:
        picture = service.client.get(f"{url}/{name}.svg")
        assert picture.headers["content-type"].startswith("image/svg+xml")
        words = "".join(ET.fromstring(picture.text).itertext())
        assert ("test" if name == "confusion" else "train") in words
        assert f"{kind.capitalize()}: before <&>" in words
        assert "on data" in words
        specification = service.client.get(f"{url}/{name}.json")
        assert specification.headers["content-type"] == "application/vnd.vegalite+json"
        assert "vega-lite" in specification.json()["$schema"]
    # The same picture in pixels: one of each kind is enough.
    for name in DRAWN[kind][:1]:
        image = service.client.get(f"{url}/{name}.png")
        assert image.headers["content-type"] == "image/png"
        assert image.content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", image.content[16:24])
        assert 600 <= width <= 2200
        assert 200 <= height <= 1600


def test_a_chart_shows_the_numbers_of_the_report(reports: dict[str, Any]) -> None:
    """A chart shows the report's numbers: points, the optimum of a series, the knee of a sweep, places of barriers."""
    specification = describe(reports["series"], "mir")
    text = json.dumps(specification)
    for point in reports["series"]["points"]:
        for split in point["splits"].values():
            values = split["interplay"]["sample"]["global"]
            assert json.dumps(values["mir"]) in text
            assert json.dumps(values["optimum"]["mir"]) in text
    knees = [split["knee"] for split in reports["pruning"]["summary"]["splits"].values()]
    drawn = json.dumps(describe(reports["pruning"], "accuracy"))
    assert all(f'{{"sparsity": {json.dumps(knee)}, "split"' in drawn for knee in knees)
    path = _with_barriers(reports["path"])
    rule = json.dumps(describe(path, "loss"))
    raised = path["points"][1]["splits"]["test"]["loss"]
    assert f'"w": 0.5, "from": {json.dumps(raised - 1.0)}, "to": {json.dumps(raised)}' in rule


def test_every_measure_has_a_chart_of_its_numbers(reports: dict[str, Any]) -> None:
    """The further charts hold the report's own digits, wherever in a split the measure stands."""
    for kind in ("comparison", "path", "pruning", "series"):
        report = reports[kind]
        for name in FURTHER:
            within = "collapse." if name.startswith("nc") else ""
            if name.startswith(("entropy", "mutual")):
                within = "interplay.sample.global."
            text = json.dumps(describe(report, name))
            if kind == "comparison":
                values = [split["differences"][f"{within}{name}"]["difference"] for split in report["splits"].values()]
            else:
                values = [
                    _at(split, f"{within}{name}") for point in report["points"] for split in point["splits"].values()
                ]
            assert values
            for value in values:
                assert json.dumps(value) in text, (kind, name)


def _at(split: dict[str, Any], path: str) -> Any:
    found: Any = split
    for part in path.split("."):
        found = found[part]
    return found


def test_charts_of_classes(reports: dict[str, Any]) -> None:
    """Accuracies, counts and bins are the report's; many classes are cut to the lowest, and old reports say so."""
    report = copy.deepcopy(reports["evaluation"])
    split = report["splits"]["test"]
    shown = {name: json.dumps(describe(report, name)) for name in ("classes", "confusion", "reliability")}
    for accuracy in split["by_class"]["accuracy"]:
        assert f'"accuracy": {json.dumps(accuracy)}' in shown["classes"]
    for entry in split["by_class"]["confusions"]:
        pair = f'"class": "{entry["label"]}", "predicted": "{entry["predicted"]}", "samples": {entry["n_samples"]}'
        assert pair in shown["confusion"]
    for one in split["reliability"]:
        if one["n_samples"]:
            assert f'"confidence": {json.dumps(one["confidence"])}' in shown["reliability"]
    many = 1000
    for one in report["splits"].values():
        one["class_counts"] = [5] * many
        one["by_class"]["accuracy"] = [label / many for label in range(many)]
        one["by_class"]["confusions"] = [
            {"label": label, "predicted": label - 1, "n_samples": 5} for label in range(many - 1, 0, -1)
        ]
    assert "the 30 of 1,000 classes with the lowest accuracy" in _words(describe(report, "classes"))
    assert "the largest confusions" in _words(describe(report, "confusion"))
    assert json.dumps(describe(report, "confusion")).count('"pair": "') == 20
    for one in report["splits"].values():
        one["by_class"] = one["reliability"] = None
    for name in ("classes", "confusion", "reliability"):
        assert "older than predictions by class" in json.dumps(describe(report, name))


def test_every_chart_says_what_its_marks_mean(reports: dict[str, Any]) -> None:
    """The overview and each measure have a legend of the drawn marks, and of no others."""
    path = _with_barriers(reports["path"])
    keys = {
        "chord": "dashed: chord between the ends",
        "mean": "dashed (error): mean of the ends",
        "bar": "bar: barrier at its place",
        "knee": "dashed: knee, the largest sparsity within 1 point of the accuracy at 0",
        "optimum": "dotted: optimum under neural collapse",
        "tick": "tick: optimum under neural collapse",
        "cross": "cross: mean of the permutation baseline",
        "interval": "bar: 95 % interval of the difference",
        "zero": "dashed: no difference",
        "level": "MIR and HDR: sample level, global centring",
    }
    for report, name, shown in (
        (path, "overview", {"chord", "mean", "bar", "level"}),
        (path, "loss", {"chord", "bar"}),
        (path, "error", {"mean"}),
        (path, "mir", {"chord", "level"}),
        (reports["pruning"], "overview", {"knee", "optimum", "level"}),
        (reports["pruning"], "accuracy", {"knee"}),
        (reports["series"], "loss", set()),
        (reports["series"], "hdr", {"optimum", "level"}),
        (reports["evaluation"], "overview", {"tick", "cross"}),
        (reports["evaluation"], "hdr", {"tick"}),
        (reports["comparison"], "loss", {"interval", "zero"}),
        (reports["comparison"], "mir", {"interval", "zero", "level"}),
    ):
        words = _words(describe(report, name))
        assert {mark for mark, meaning in keys.items() if meaning in words} == shown, (report["kind"], name)


def test_a_barrier_reaches_from_its_line_to_the_value(reports: dict[str, Any]) -> None:
    """The error's barrier starts at the mean of the ends, which is drawn, and the loss's at the chord between them."""
    path = copy.deepcopy(reports["path"])
    for point, accuracy, loss in zip(path["points"], (0.75, 0.25, 0.25), (1.0, 4.0, 3.0), strict=True):
        point["splits"]["test"] |= {"accuracy": accuracy, "loss": loss}
    path["summary"]["splits"]["test"]["error_barrier"] = {"value": 0.25, "at": 0.5}
    path["summary"]["splits"]["test"]["loss_barrier"] = {"value": 2.0, "at": 0.5}
    for name, levels, bar in (("error", [0.5, 0.5], (0.5, 0.75)), ("loss", [1.0, 3.0], (2.0, 4.0))):
        rows = [row for row in _rows(describe(path, name)) if row.get("split") == "test"]
        assert [row["level"] for row in rows if "level" in row] == levels
        assert [(row["from"], row["to"]) for row in rows if "from" in row] == [bar]


def test_bars_and_knees_of_all_splits_are_seen(reports: dict[str, Any]) -> None:
    """Bars and knees of all splits are visible, whether at one place or a few pixels apart."""
    path = _with_barriers(reports["path"])
    assert sorted(_upright(describe(path, "loss")).values()) == [157, 160, 163]
    # 6 pixels to the right: a fixed offset for each split would cover the bar of another one.
    for point in path["points"][1:2]:
        point["w"] = 0.5 + 6 / 320
        path["points"].insert(1, copy.deepcopy(reports["path"]["points"][1]))
    path["summary"]["splits"]["train"]["loss_barrier"]["at"] = 0.5 + 6 / 320
    places = _upright(describe(path, "loss"))
    assert places["#0072B2"] == pytest.approx(169)
    assert {places["#D55E00"], places["#7F7F7F"]} == {157, 160}
    pruning = copy.deepcopy(reports["pruning"])
    for split in pruning["summary"]["splits"].values():
        split["knee"] = 0.5
    first, second, third = sorted(_upright(describe(pruning, "accuracy")).values())
    assert (second - first, third - second) == (3, 3)


def test_a_panel_without_a_value_says_why(reports: dict[str, Any]) -> None:
    """A measure that is undefined everywhere, for a split or at a point has its reason in words in the picture."""
    path = copy.deepcopy(reports["path"])
    _undefine(path["points"][1]["splits"]["test"], "zero_entropy")
    assert "not defined for test at 1 of 3 points: all directions coincide" in _words(describe(path, "mir"))
    for point in path["points"]:
        for split in point["splits"].values():
            _undefine(split, "no_directions")
    words = _words(describe(path, "overview"))
    assert words.count("not defined: no vector has a direction") == 1
    assert "at 3 of 3" not in words
    evaluation = copy.deepcopy(reports["evaluation"])
    assert "not defined" not in _words(describe(evaluation, "mir"))
    _undefine(evaluation["splits"]["train"], "zero_entropy")
    assert "not defined: all directions coincide" in _words(describe(evaluation, "mir"))
    comparison = copy.deepcopy(reports["comparison"])
    assert "not defined" not in _words(describe(comparison, "mir"))
    for split in comparison["splits"].values():
        _undefine(split["a"], "no_directions")
        for lacking in ("a", "difference", "low", "high"):
            split["differences"]["interplay.sample.global.mir"][lacking] = None
        split["differences"]["loss"] |= {"low": None, "high": None, "reason": "no_derivative"}
    words = _words(describe(comparison, "overview"))
    assert "not defined: no vector has a direction (of A)" in words
    assert "no interval: no derivative" in words


def test_the_optimum_of_a_single_sparsity_is_drawn(reports: dict[str, Any]) -> None:
    """A sweep of one point shows the dotted lines of its optima across the panel, one split's in another's gaps."""
    pruning = copy.deepcopy(reports["pruning"])
    del pruning["points"][1:]
    dotted = [line for line in _lines(describe(pruning, "mir")) if line.get("stroke-dasharray") == "2,10"]
    assert {line.get("stroke") for line in dotted} == {"#0072B2", "#D55E00", "#7F7F7F"}
    assert {abs(float(str(line.get("x2")))) for line in dotted} == {320}
    assert len({line.get("stroke-dashoffset") for line in dotted}) == 3


def test_values_that_are_all_the_same_have_a_scale_to_read(reports: dict[str, Any]) -> None:
    """Equal values have a readable scale: rounding errors fill no panel, ticks are short, shares stay in 0 to 1."""
    series = copy.deepcopy(reports["series"])
    for point, error in zip(series["points"], (0, 4e-16), strict=True):
        for split in point["splits"].values():
            split |= {"loss": 2.302585092994046 + error, "accuracy": 1 - error}
    loss, accuracy = describe(series, "loss"), describe(series, "accuracy")
    assert max(map(len, _tick_labels(loss))) <= len("2.3025")
    low, high = _span(loss)
    assert high - low == pytest.approx(2.3025e-3, rel=1e-3)
    assert _span(accuracy) == pytest.approx([0.999, 1])
    comparison = copy.deepcopy(reports["comparison"])
    for split in comparison["splits"].values():
        split["differences"]["accuracy"] |= {"difference": 1e-17, "low": -1e-17, "high": 1e-17}
    assert {"−0.0005", "0", "0.0005"} <= set(_tick_labels(describe(comparison, "accuracy")))


@pytest.mark.slow
def test_long_names_do_not_widen_a_picture(reports: dict[str, Any]) -> None:
    """Names of 200 wide characters and an axis name of 100 are cut in the middle, and pictures keep their size."""
    for kind in NAMES:
        report = copy.deepcopy(reports[kind])
        for subject in report.get("subjects") or [report["subject"]]:
            subject["name"] = "begin" + "W" * 190 + "final"
        report["probe"]["name"] = "W" * 200
        if kind == "series":
            report["axis"]["name"] = "begin" + "n" * 90 + "final"
        for name in DRAWN[kind]:
            specification = describe(report, name)
            width, height = _size(specification)
            assert width <= 1100
            assert height <= 800
            assert "begin" in _words(specification)
    assert "begin" + "n" * 17 + "…" + "n" * 16 + "final" in _words(describe(report, "loss"))


def _size(specification: dict[str, Any]) -> tuple[float, float]:
    """Return a picture's width and height in pixels, which in a PNG are twice as many."""
    root = ET.fromstring(svg(specification))
    return float(root.attrib["width"]), float(root.attrib["height"])


def test_an_axis_may_have_huge_and_tiny_values(reports: dict[str, Any]) -> None:
    """Axis values up to 1e15 on both sides, close together out there, or far below 1, have distinct ticks."""
    series = copy.deepcopy(reports["series"])
    for values, tick in (((-1e15, 1e15), "1e+15"), ((1e15, 1e15 + 5), "1000000000000005"), ((0, 1e-15), "1e-15")):
        series["axis"]["values"] = list(values)
        for point, value in zip(series["points"], values, strict=True):
            point["x"] = value
        labels = _tick_labels(describe(series, "loss"))
        assert tick in labels
        assert "NaN" not in labels


def test_what_is_not_defined_is_left_out(reports: dict[str, Any]) -> None:
    """A null is not zero: its point is left out, and the others are drawn."""
    series = copy.deepcopy(reports["series"])
    for split in series["points"][0]["splits"].values():
        split["interplay"]["sample"]["global"]["mir"] = None
        split["interplay"]["sample"]["global"]["optimum"]["mir"] = None
    assert "<svg" in svg(describe(series, "mir"))
    path = copy.deepcopy(reports["path"])
    whole = svg(describe(path, "mir"))
    for name, split in path["points"][1]["splits"].items():
        split["interplay"]["sample"]["global"]["mir"] = None
        path["summary"]["splits"][name]["mir_barrier"] = None
    # Across the gap in the middle only the chord remains, from end to end.
    assert (_longest_line(whole), _longest_line(svg(describe(path, "mir")))) == (3, 2)
    evaluation = copy.deepcopy(reports["evaluation"])
    for split in evaluation["splits"].values():
        split["interplay"]["class_mean"]["none"] |= {"mir": None, "hdr": None, "null": None}
    assert "<svg" in svg(describe(evaluation, "overview"))


def _drawing_processes() -> list[psutil.Process]:
    """Return the drawing processes of this process, not of a service that it started."""
    children = psutil.Process().children()
    return [child for child in children if child.status() != "zombie" and "app.api.charts" in child.cmdline()]


def _with_barriers(report: dict[str, Any]) -> dict[str, Any]:
    """Return a path of three points whose loss is one higher in the middle."""
    path = copy.deepcopy(report)
    for name, split in path["points"][1]["splits"].items():
        split["loss"] += 1
        path["summary"]["splits"][name]["loss_barrier"] = {"value": 1.0, "at": 0.5}
    return path


def _undefine(split: dict[str, Any], reason: str) -> None:
    values = split["interplay"]["sample"]["global"]
    values |= {"mir": None, "reasons": {**values["reasons"], "mir": reason}}


def _rows(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all rows of data of a specification."""
    return [row for rows in specification["datasets"].values() for row in rows]


def _span(specification: dict[str, Any]) -> list[float]:
    """Return the ends of the measure's scale, in a chart of one panel."""
    scales = [layer["encoding"].get("y", {}).get("scale") for layer in specification["concat"][0]["layer"]]
    found: list[float] = next(scale["domain"] for scale in scales if scale)
    return found


SVG = "{http://www.w3.org/2000/svg}"


def _words(specification: dict[str, Any]) -> str:
    """Return all text of the picture, with wrapped lines joined."""
    return " ".join(" ".join(ET.fromstring(svg(specification)).itertext()).split())


def _tick_labels(specification: dict[str, Any]) -> list[str]:
    """Return the visible tick labels: overlapping ones are hidden."""
    groups = ET.fromstring(svg(specification)).iter(f"{SVG}g")
    labels = [label for group in groups if "role-axis-label" in group.get("class", "") for label in group]
    return ["".join(label.itertext()) for label in labels if label.get("opacity") != "0"]


def _lines(specification: dict[str, Any]) -> list[ET.Element]:
    return list(ET.fromstring(svg(specification)).iter(f"{SVG}line"))


def _upright(specification: dict[str, Any]) -> dict[str, float]:
    """Return the positions of the splits' upright rules, by colour, of a chart without level ones."""
    found = {}
    for line in _lines(specification):
        if line.get("stroke") in ("#0072B2", "#D55E00", "#7F7F7F"):
            found[str(line.get("stroke"))] = float(str(line.get("transform"))[len("translate(") :].split(",")[0])
    return found


def _longest_line(picture: str) -> int:
    """Return the number of points that the longest unbroken line over a report's points joins."""
    drawn = [path.get("d", "") for path in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}path")]
    lines = [part.count("L") + 1 for d in drawn if "Z" not in d and "A" not in d for part in d.split("M")[1:]]
    return max(lines)


def test_a_chart_never_changes_and_is_inert(service: Service, reports: dict[str, Any]) -> None:
    """A chart's ETag gives 304, the same bytes come again, and the headers let a browser run nothing of it."""
    url = f"/v1/reports/{reports['series']['id']}/charts"
    tags = set()
    for format in ("svg", "png", "json"):
        first = service.client.get(f"{url}/loss.{format}")
        again = service.client.get(f"{url}/loss.{format}")
        assert again.content == first.content
        assert again.headers["etag"] == first.headers["etag"]
        assert "immutable" in first.headers["cache-control"]
        for held in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
            unchanged = service.client.get(f"{url}/loss.{format}", headers={"If-None-Match": held})
            assert (unchanged.status_code, unchanged.content) == (304, b"")
            assert unchanged.headers["etag"] == first.headers["etag"]
        assert service.client.get(f"{url}/loss.{format}", headers={"If-None-Match": '"other"'}).status_code == 200
        for answer in (first, unchanged):
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "sandbox"} <= set(policy)
            assert not any(source.startswith("script-src") for source in policy)
        tags.add(first.headers["etag"])
    assert len(tags) == 3
    assert len(list((service.data_dir / "charts").iterdir())) >= 3


def test_many_who_ask_for_one_chart_have_it_drawn_once(tmp_path: Path, reports: dict[str, Any]) -> None:
    """A chart requested by many at once, in sequence, and from another process's folder is drawn only once."""
    text, read = json.dumps(reports["series"]), []
    chart = drawing.Chart("of this report", "mir", "svg")

    def report() -> str:
        read.append(1)
        return text

    async def ask(times: int) -> set[bytes]:
        drawings = drawing.Drawings(Settings(data_dir=tmp_path))
        try:
            found = set(await asyncio.gather(*(drawings.get(chart, report) for _ in range(times))))
            return found | {await drawings.get(chart, report)}
        finally:
            drawings.close()

    (first,) = asyncio.run(ask(30))
    assert b"<svg" in first
    assert len(read) == 1
    assert asyncio.run(ask(1)) == {first}
    assert len(read) == 1
    # A file that a crash has truncated is not served.
    (kept,) = (tmp_path / "charts").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert asyncio.run(ask(1)) == {first}
    assert len(read) == 2


def test_kept_charts_have_a_limit(tmp_path: Path) -> None:
    """Beyond the limit the least recently used charts are deleted; a chart larger than the limit is not cached."""
    kept = drawing.KeptCharts(tmp_path / "charts", most_bytes=400)
    # Each is 132 bytes: its hash comes first.
    for name in "abc":
        kept.write(name, name.encode() * 100)
        time.sleep(0.01)
    assert kept.read("a") == b"a" * 100
    time.sleep(0.01)
    kept.write("d", b"d" * 100)
    assert [kept.read(name) is not None for name in "abcd"] == [True, False, True, True]
    kept.write("e", b"e" * 401)
    assert kept.read("e") is None
    assert sum(path.stat().st_size for path in (tmp_path / "charts").iterdir()) <= 400
    nothing = drawing.KeptCharts(tmp_path / "none", most_bytes=0)
    nothing.write("a", b"a")
    assert not (tmp_path / "none").exists()


def test_a_drawing_process_that_dies_is_replaced(tmp_path: Path, reports: dict[str, Any]) -> None:
    """A drawing process that dies is replaced and the chart retried once; a report that cannot be drawn is an error."""
    text = json.dumps(reports["evaluation"])

    async def scenario() -> None:
        drawings = drawing.Drawings(Settings(data_dir=tmp_path, max_charts_bytes=0))
        try:
            before = await drawings.get(drawing.Chart("a", "mir", "json"), lambda: text)
            (process,) = _drawing_processes()
            process.kill()
            with pytest.raises(drawing.DrawingFailed):
                await drawings.get(drawing.Chart("b", "mir", "json"), lambda: "{}")
            assert await drawings.get(drawing.Chart("a", "mir", "json"), lambda: text) == before
            assert [found.pid for found in _drawing_processes()] != [process.pid]
        finally:
            drawings.close()
        assert _drawing_processes() == []

    asyncio.run(scenario())


def test_charts_that_there_are_not(service: Service, reports: dict[str, Any]) -> None:
    """An unknown chart name lists the existing ones; an unknown format and an unknown report are problems."""
    url = f"/v1/reports/{reports['path']['id']}/charts"
    assert problem(service.client.get(f"{url}/nonsense.svg"), 404, "not-found")["charts"] == NAMES["path"]
    problem(service.client.get(f"{url}/loss.gif"), 422, "invalid-request")
    problem(service.client.get("/v1/reports/none/charts/loss.svg"), 404, "not-found")
    problem(service.client.get("/v1/reports/none/charts"), 404, "not-found")

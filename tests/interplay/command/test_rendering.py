"""The rendering of reports, collections and problems for a terminal."""

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from app.descriptions.adapters import check_adapter
from interplay.command import rendering
from tests.interplay.reports import evaluation_report, path_report, pruning_report, series_report


def rendered(view: RenderableType, width: int = 200) -> str:
    """Return the view as plain text, by default wide enough that nothing folds."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, markup=False, highlight=False, emoji=False).print(view)
    return buffer.getvalue()


def rows(text: str, *starts: str) -> list[list[str]]:
    """Return the cells of the lines that contain all given words."""
    return [line.split() for line in text.splitlines() if all(start in line.split() for start in starts)]


def test_report_shows_mir_beside_optimum_and_null() -> None:
    """A row gives MIR, its optimum, null, z, then HDR and its optimum."""
    (row,) = rows(rendered(rendering.report_view(evaluation_report())), "sample", "global", "0.8123")
    assert row == ["sample", "global", "0.8123", "0.9524", "0.2000", "±", "0.0100", "61.0", "0.0456", "0.0000"]


def test_report_shows_undefined_values_as_dashes_with_their_reasons() -> None:
    """An undefined value is a dash, and its reason is below the tables."""
    text = rendered(rendering.report_view(evaluation_report()))
    (row,) = rows(text, "all", "sample", "none", "–")
    assert row == ["all", "sample", "none", "–", "0.9524", "–", "–", "0.0000", "0.0000"]
    assert "None" not in text
    for note in (
        "all, sample, none: mir is undefined (zero_entropy).",
        "all, class mean, none: mir_z is undefined (null_degenerate).",
        "all: calibration_error is undefined (no_logits).",
        "all, collapse: nc3 is undefined (head_is_zero).",
        "all, sample, global: 3 samples without a direction were omitted.",
        "all, collapse: 2 classes have no samples and were omitted.",
    ):
        assert note in text


def test_report_says_that_hdr_of_two_centred_classes_says_nothing() -> None:
    """HDR of two centred classes is shown with a note that it carries no information."""
    report = evaluation_report()
    values = report["splits"]["all"]["interplay"]["sample"]["global"]
    values.update(mir=None, hdr=1.0, reasons={"mir": "two_classes", "hdr": "two_classes"})
    text = rendered(rendering.report_view(report))
    assert "all, sample, global: mir is undefined (two_classes)." in text
    assert "all, sample, global: hdr carries no information: two centred head rows are always opposite." in text


def test_report_marks_an_optimum_that_cannot_be_reached() -> None:
    """An unreachable optimum has a star and a note; otherwise there is no note."""
    report = evaluation_report()
    text = rendered(rendering.report_view(report))
    assert "0.9524 *" in text
    assert "* cannot be reached" in text
    report["splits"]["all"]["interplay"]["class_mean"]["global"]["optimum"]["reachable"] = True
    assert "*" not in rendered(rendering.report_view(report))


def test_report_of_a_feature_set() -> None:
    """A subject without network, size or metadata is shown without them."""
    subject = {**evaluation_report()["subject"], "kind": "feature_set", "n_parameters": None, "architecture": None}
    probe = {**evaluation_report()["probe"], "kind": "feature_set", "input_shape": None}
    text = rendered(rendering.report_view(evaluation_report(subject={**subject, "metadata": {}}, probe=probe)))
    assert "feature set" in text
    assert "mlp" not in text
    assert "metadata" not in text


def test_report_of_an_adapter() -> None:
    """The line of an adapter has its kind, its rank and its base's name."""
    base = {"id": "b", "name": "base", "sha256": "0" * 64}
    adapter = {**check_adapter({"peft_type": "LORA", "use_rslora": True}), "rank": 8}
    report = evaluation_report(subject={**evaluation_report()["subject"], "base": base, "adapter": adapter})
    assert "rslora adapter of rank 8 on base" in rendered(rendering.report_view(report))


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 4, "–"),
        (0.0, 4, "0.0000"),
        (0.95235078, 4, "0.9524"),
        (0.00003214, 4, "3.2e-05"),
        (-0.00003214, 4, "-3.2e-05"),
        (61.04, 1, "61.0"),
        (1234567.0, 4, "1.235e+06"),
    ],
)
def test_numbers_keep_their_leading_digits(value: float | None, digits: int, text: str) -> None:
    """Small and large measurements use powers of ten; an undefined one is a dash."""
    assert rendering.number(value, digits) == text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (-0.0, "0"),
        (0.04, "0.04"),
        (12.5, "12.5"),
        (-0.5, "-0.5"),
        (1234567, "1234567"),
        (1234567.25, "1234567.25"),
        (1700000000.123456, "1700000000.123456"),
        (1e-05, "1e-05"),
        (1 / 24, "0.0416667"),
        (0.1 + 0.2, "0.3"),
    ],
)
def test_places_are_shown_as_they_were_given(x: float | None, text: str) -> None:
    """All typed digits are kept; a number without a short form keeps six."""
    assert rendering.place(x) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_places_lose_nothing_unless_they_are_shortened(x: float) -> None:
    """The text reads back as the same number, or as the same six digits if shortened."""
    assert float(rendering.place(x, shorten=False)) == x
    assert float(rendering.place(x)) == pytest.approx(x, rel=1e-5, abs=0)


def first_cells(text: str) -> list[str]:
    """Return the first cell of each row of a table of points; the rows have a loss of 3.2e-05."""
    return [line.split()[0] for line in text.splitlines() if "3.2e-05" in line]


def test_steps_of_a_series_keep_their_digits() -> None:
    """Steps that differ in their last digit stay distinct in the table and the summary."""
    steps = [1234567, 1234568, 1234569]
    text = rendered(rendering.report_view(series_report(steps, train_at=1234567, test_at=1234569, delay=2)))
    assert first_cells(text) == ["1234567", "1234568", "1234569"]
    assert "first at: train 1234567, test 1234569; delay 2." in text
    text = rendered(rendering.report_view(series_report([0.04, 12.5], train_at=0.04, test_at=12.5, delay=12.46)))
    assert first_cells(text) == ["0.04", "12.5"]
    assert "first at: train 0.04, test 12.5; delay 12.46." in text
    text = rendered(rendering.report_view(series_report([1, 2], train_at=None, test_at=None, delay=None)))
    assert "first at: train –, test –; delay –." in text


def test_points_of_a_path_are_never_alike() -> None:
    """w of an even grid is shortened unless two points would look the same; a barrier has its point's text."""
    ws = [n / 24 for n in range(25)]
    text = rendered(rendering.report_view(path_report(ws, barrier_at=1 / 24)))
    assert first_cells(text)[:4] == ["0", "0.0416667", "0.0833333", "0.125"]
    assert len({*first_cells(text)}) == 25
    assert "0.2500 at 0.0416667" in text
    near = [0, 1 / 3, 1 / 3 + 1e-9, 1]
    text = rendered(rendering.report_view(path_report(near, barrier_at=near[2])))
    assert [*map(float, first_cells(text))] == near
    assert f"0.2500 at {near[2]}" in text


def test_sparsities_are_shown_whole() -> None:
    """Sparsities that differ beyond the fourth digit, including the knee, keep their digits."""
    text = rendered(rendering.report_view(pruning_report([0, 0.99991, 0.99992], knee=0.99991)))
    assert first_cells(text) == ["0", "0.99991", "0.99992"]
    assert rows(text, "all", "0.99991") == [["all", "0.99991"]]


@given(st.text())
def test_printable_keeps_no_control_characters(text: str) -> None:
    """No character of an untrusted name moves the cursor; printable ones stay."""
    shown = rendering.printable(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
    assert [char for char in text if char.isprintable()] == [
        new for new, old in zip(shown, text, strict=True) if old.isprintable()
    ]


EVIL = "\x1b[2J\x9b31m[red]:boom:\r\n\u202eevil"


def test_views_defuse_names_and_metadata() -> None:
    """Escape sequences, markup and emoji codes in names, metadata and descriptions are shown as text."""
    report = evaluation_report()
    report["subject"]["name"] = report["probe"]["name"] = EVIL
    report["subject"]["metadata"] = {EVIL: [EVIL]}
    report["subject"]["architecture"] = {"name": EVIL, "args": {EVIL: {EVIL: EVIL}}}
    report["splits"]["all"]["reasons"] = {EVIL: EVIL}
    item = {"id": "1", "name": EVIL, "metadata": {EVIL: EVIL}, "architecture": {"name": EVIL}, "created_at": EVIL}
    for text in (
        rendered(rendering.report_view(report)),
        rendered(rendering.collection_view("checkpoints", [item])),
        rendering.problem_text(EVIL, EVIL, {EVIL: [EVIL, {EVIL: EVIL}], "other": EVIL}),
        rendering.resource_text("checkpoint", {"id": "1", "name": EVIL}),
        rendering.progress_line({"status": "running", "progress": {"done": 1, "total": 2, "phase": EVIL}}),
    ):
        assert not {"\x1b", "\x9b", "\r", "\u202e"} & set(text)
        assert "[red]:boom:" in text.replace("\n", "")


def test_collections_fit_80_columns() -> None:
    """Ids are short, unless columns are chosen; null is a dash, sizes have separators, a failure has its reason."""
    id_ = "01990000-0000-7000-8000-000000000001"
    common = {"id": id_, "created_at": "2026-01-31T12:00:00.123456Z", "kind": "evaluation", "report_id": None}
    progress = {"progress": {"done": 3, "total": 12, "phase": "features"}}
    problem = {"title": "The checkpoint does not fit", "detail": "2 names are missing.", "missing": ["a", "b"]}
    analyses: list[dict[str, Any]] = [
        {**common, **progress, "name": "resnet18 epoch 90", "status": "running"},
        {**common, **progress, "name": "b", "status": "failed", "problem": problem},
        {**common, **progress, "name": "c", "status": "succeeded", "report_id": "abcdef01-0000-7000-8000-000000000001"},
    ]
    view = rendering.collection_view("analyses", analyses)
    text = rendered(view, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert id_ not in text
    first, *_, last = rows(text, "01990000")
    assert first == ["01990000", "resnet18", "evaluation", "running", "3/12", "2026-01-31", "12:00", "–"]
    assert last[-1] == "abcdef01"
    assert "The checkpoint does not fit: 2 names are missing." in rendered(view)
    assert id_ in rendered(rendering.collection_view("analyses", analyses, ["id", "name"], whole_ids=True))
    metrics = {"splits.all.accuracy": 0.9, "splits.train.accuracy": 0.123456, "splits.all.collapse.nc1": 1e-7}
    columns = ["id", "mir", "accuracy", "splits.train.accuracy", "nc1", "metadata.epoch"]
    report = {**common, "name": "net", "metrics": metrics, "metadata": {"epoch": 10}}
    ((*_, mir, accuracy, train, nc1, epoch),) = rows(
        rendered(rendering.collection_view("reports", [report], columns)), "01990000"
    )
    assert (mir, accuracy, train, nc1, epoch) == ("–", "0.9000", "0.1235", "1.0e-07", "10")
    text = rendered(
        rendering.collection_view("checkpoints", [{"id": "1", "n_parameters": 1234567, "metadata": {"epoch": 1}}])
    )
    assert "1,234,567" in text
    assert "epoch=1" in text


def test_problem_lists_names_and_says_how_many_more() -> None:
    """A list has one entry per line, at most 20; type and status are omitted."""
    members = {"type": "urn:x", "status": 422, "missing": [f"w{n}" for n in range(23)], "limit_bytes": 5, "empty": []}
    lines = rendering.problem_text("Wrong", "It is wrong.", members).splitlines()
    assert lines[:3] == ["Wrong: It is wrong.", "  missing:", "    w0"]
    assert lines[-2:] == ["    ... and 3 more", "  limit_bytes: 5"]
    assert len(lines) == 2 + 20 + 2


def test_problem_shows_validation_errors_by_their_place() -> None:
    """A validation error of a request is shown as place and message."""
    errors = [{"loc": ["spec", "name"], "message": "Field required"}]
    assert "    spec.name: Field required" in rendering.problem_text("Wrong", "", {"errors": errors})


@pytest.mark.parametrize(
    ("status", "total", "line"),
    [("queued", 0, "queued"), ("running", 0, "running loading"), ("running", 12, "running 3/12 loading")],
)
def test_progress_line(status: str, total: int, line: str) -> None:
    """A running analysis shows its progress and phase; a queued one only its status."""
    progress = {"done": 3, "total": total, "phase": "loading"}
    assert rendering.progress_line({"status": status, "progress": progress}) == line


def test_configuration_is_shown_by_the_name_of_its_class() -> None:
    """A config.json has hundreds of members; a cell shows the name of its class."""
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 768}
    report = evaluation_report()
    report["subject"]["architecture"] = {"family": "transformers", "config": config}
    text = rendered(rendering.report_view(report))
    assert "ViTForImageClassification" in text
    assert "768" not in text.split("ViTForImageClassification")[1].splitlines()[0]


def test_report_of_a_language_model_says_what_its_samples_are() -> None:
    """Positions, sequences and the tokens of each measure are shown; a loose bound of MIR is noted."""
    report = evaluation_report()
    report["probe"] |= {"n_classes": 0, "class_counts": []}
    report["probe"]["next_tokens"] = {
        "ignored_labels": True,
        "n_sequences": {"all": 60},
        "n_positions": {"all": 1797},
        "n_vocabulary": 50257,
        "token_ids": [3, 5, 8],
    }
    method = {"name": "pinched", "kept": 2048, "total": 19161, "tail_mass": 0.4, "error_estimate": 0.108}
    report["splits"]["all"]["interplay"]["sample"]["global"]["method"] = method
    lines = [" ".join(line.split()) for line in rendered(rendering.report_view(report)).splitlines()]
    text = " ".join(lines)
    assert "1,797 samples without labels" in text
    assert "1,797 in 60 sequences" in text
    assert "Of 50,257 tokens 3 occur as classes" in text
    assert "The labels of the probe were not used." in text
    assert {"positions 1,797", "sequences 60"} <= set(lines)
    assert (
        "all, sample, global: MIR may be up to 0.11 higher; 2,048 of 19,161 rows of its spectrum were coupled." in lines
    )


def test_a_probe_without_labels_in_one_line() -> None:
    """The line about a pushed probe says that it has no labels."""
    body = {"id": "a", "name": "texts", "n_samples": 1200, "n_classes": 0}
    assert rendering.resource_text("probe", body) == "probe a, texts, 1,200 samples without labels"

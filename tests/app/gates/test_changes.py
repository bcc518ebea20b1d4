"""Changes against a baseline: intervals, and values that are not comparable."""

import copy
from statistics import NormalDist
from typing import Any

import pytest

from app.errors import NotComparable
from app.gates import verdicts
from app.gates.form import GateSpec
from tests.app.gates.checks import gate, result
from tests.interplay.reports import comparison_report, difference, evaluation_report


def judged(check: dict[str, Any], found: dict[str, Any], **options: Any) -> verdicts.CheckResult:
    """Return the result of a check of the test accuracy on a comparison with this difference."""
    return result({"metric": "splits.test.accuracy", **check}, comparison_report({"accuracy": found}, **options))


WIDE, NARROW = difference(0.9, 0.896, 0.005), difference(0.9, 0.896, 0.001)
WORSE, BETTER = difference(0.9, 0.86, 0.005), difference(0.9, 0.94, 0.005)


@pytest.mark.parametrize(
    ("bounds", "found", "within", "beyond"),
    [
        ({"min_change": -0.01}, WIDE, ("fail", "low"), ("pass", "high")),
        ({"min_change": -0.01}, NARROW, ("pass", "low"), ("pass", "high")),
        ({"min_change": -0.01}, WORSE, ("fail", "low"), ("fail", "high")),
        ({"min_change": -0.01}, BETTER, ("pass", "low"), ("pass", "high")),
        ({"max_change": 0.01}, BETTER, ("fail", "high"), ("fail", "low")),
        ({"max_change": 0.01}, WORSE, ("pass", "high"), ("pass", "low")),
        ({"max_change": 0.0}, WIDE, ("fail", "high"), ("pass", "low")),
        ({"min_change": -0.01, "max_change": 0.01}, NARROW, ("pass", "both"), ("pass", "both")),
        ({"min_change": -0.01, "max_change": 0.01}, WIDE, ("fail", "low"), ("pass", "both")),
        ({"min_change": -0.01, "max_change": 0.01}, BETTER, ("fail", "high"), ("fail", "low")),
    ],
)
def test_which_end_of_the_interval_decides(
    bounds: dict[str, float], found: dict[str, Any], within: tuple[str, str], beyond: tuple[str, str]
) -> None:
    """Within: passes only if the whole interval is in bounds. Beyond: fails only if none of it is."""
    for proof, expected in (("within", within), ("beyond", beyond)):
        check = judged({**bounds, "significance": 0.95, "proof": proof}, found)
        assert (check.status, check.decided_by) == expected, check.why
        assert judged({**bounds, "significance": 0.95}, found).status == within[0]


def test_the_end_of_an_interval_at_its_bound_passes() -> None:
    """An end at its bound passes, as a change does; for beyond, an upper end at the lower bound shows nothing."""
    at = difference(0.9, 0.896, 0.005, low=-0.01, high=0.002)
    assert judged({"min_change": -0.01, "significance": 0.95}, at).status == "pass"
    at["low"] = -0.0101
    assert judged({"min_change": -0.01, "significance": 0.95}, at).status == "fail"
    at["high"] = -0.01
    assert judged({"min_change": -0.01, "significance": 0.95, "proof": "beyond"}, at).status == "pass"
    at["high"] = -0.0101
    assert judged({"min_change": -0.01, "significance": 0.95, "proof": "beyond"}, at).status == "fail"


def test_sentences_of_intervals_say_which_end_decided_and_what_it_shows() -> None:
    """Each outcome has its sentence; a failure of within says whether it is certain or the probe is too small."""
    told = "0.896 after 0.9, a change of -0.004, 95 % interval"
    lower = "its lower end is {} min_change -0.01, so the change is {} to be within."
    check = {"min_change": -0.01, "significance": 0.95}
    assert judged(check, WIDE).why == f"{told} -0.0137998 to +0.00579982: {lower.format('below', 'not shown')}"
    assert judged(check, NARROW).why == f"{told} -0.00595996 to -0.00204004: {lower.format('at least', 'shown')}"
    assert judged({**check, "proof": "beyond"}, WIDE).why == (
        f"{told} -0.0137998 to +0.00579982: its upper end is at least min_change -0.01, "
        "so the change is not shown to be beyond."
    )
    assert judged({**check, "proof": "beyond"}, WORSE).why.endswith(
        "its upper end is below min_change -0.01, so the change is shown to be beyond."
    )
    assert judged(check, WORSE).why.endswith(
        "its lower end is below min_change -0.01, so the change is shown to be beyond."
    )
    assert judged({"max_change": 0.01, "significance": 0.95}, BETTER).why.endswith(
        "so the change is shown to be beyond."
    )


def test_the_interval_is_the_comparisons_own_at_its_confidence_and_normal_at_another() -> None:
    """At its own confidence a bootstrap's interval is used as it is; at another it comes from the standard error."""
    found = difference(0.9, 0.896, 0.005, low=-0.02, high=0.001)
    own = judged({"min_change": -1, "significance": 0.95}, found, interval="bootstrap").interval
    assert own is not None
    assert (own.low, own.high, own.method) == (-0.02, 0.001, "bootstrap")
    other = judged({"min_change": -1, "significance": 0.8}, found, interval="bootstrap").interval
    assert other is not None
    margin = NormalDist().inv_cdf(0.9) * 0.005
    assert (other.low, other.high) == pytest.approx((-0.004 - margin, -0.004 + margin), rel=1e-12)
    assert (other.method, other.confidence) == ("normal", 0.8)


@pytest.mark.parametrize(
    "found",
    [difference(0.9, 0.896, None), difference(0.9, 0.896, None, low=0.1, high=None)],
)
def test_a_change_without_an_interval_is_undefined(found: dict[str, Any]) -> None:
    """A change without an interval is undefined: significance was requested, so the point value does not decide."""
    check = judged({"min_change": -1, "significance": 0.95}, found)
    assert check.status == "undefined"
    assert check.change == pytest.approx(-0.004)
    assert "no standard error of this change (not_computed)" in check.why


def test_numbers_that_a_comparison_has_no_difference_of() -> None:
    """Numbers without a difference in the comparison have a change, but no interval."""
    metric = {"metric": "splits.test.collapse.nc1", "max_change": 0.1}
    report = comparison_report({"accuracy": WIDE})
    assert result(metric, report).status == "pass"
    check = result({**metric, "significance": 0.95}, report)
    assert (check.status, check.why) == (
        "undefined",
        "Undefined: the comparison has no interval of the change of this number.",
    )
    assert (
        result({"metric": "timings_seconds.features", "max_change": 0, "significance": 0.9}, report).status
        == "undefined"
    )


def test_a_comparison_is_judged_as_its_b_against_its_a() -> None:
    """Values are B's and the baseline is A's, for nested paths too."""
    report = comparison_report({"interplay.sample.global.mir": difference(0.8, 0.85, 0.01)})
    path = "splits.test.interplay.sample.global.mir"
    check = result({"metric": path, "min": 0.85, "max": 0.85}, report)
    assert check.status == "pass"
    check = result({"metric": path, "min_change": 0.02, "significance": 0.95}, report)
    assert (check.status, check.value, check.baseline) == ("pass", 0.85, 0.8)


def test_a_gate_of_kind_comparison_bounds_any_number_of_one() -> None:
    """A gate of kind comparison bounds any of its numbers; paths may contain the path of a metric, which has dots."""
    report = comparison_report({"interplay.sample.global.mir": difference(0.8, 0.85, 0.01)})
    path = "splits.test.differences.interplay.sample.global.mir.low"
    spec = gate(
        {"metric": path, "min": 0.03}, {"metric": "splits.test.predictions.agreement", "min": 0.9}, kind="comparison"
    )
    low, agreement = verdicts.judge(spec, verdicts.sides(spec, report, None))
    assert (low.status, low.value) == ("pass", report["splits"]["test"]["differences"][path[24:-4]]["low"])
    assert (agreement.status, agreement.value) == ("pass", 0.95)


def changed(member: str, value: Any) -> dict[str, Any]:
    report = copy.deepcopy(evaluation_report())
    *above, last = member.split(".")
    holder: Any = report
    for name in above:
        holder = holder[name]
    holder[last] = value
    return report


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("probe.sha256", "9" * 64),
        ("probe.class_counts", [1797] + [0] * 9),
        ("probe.samples", {"used": 100, "of": 1797, "seed": 0}),
        ("provenance.precision", "bfloat16"),
        ("definitions_version", "2"),
    ],
)
def test_a_baseline_of_other_circumstances_is_refused(member: str, value: Any) -> None:
    """A baseline of another probe or part, precision or definition is refused: values differ for other reasons."""
    spec = gate({"min_change": 0})
    with pytest.raises(NotComparable) as caught:
        verdicts.sides(spec, evaluation_report(), changed(member, value))
    assert caught.value.members["differing"][0]["member"].startswith(member)


def test_preprocessing_is_the_datas_or_the_checkpoints() -> None:
    """A probe's preprocessing must be equal; a checkpoint's own is part of the comparison."""
    spec = gate({"min_change": 0})
    report = changed("probe.preprocess", {"scale": 0.5, "mean": 0.0, "std": 1.0})
    report["probe"]["preprocess_source"] = "checkpoint"
    verdicts.sides(spec, report, evaluation_report())
    report["probe"]["preprocess_source"] = "probe"
    with pytest.raises(NotComparable, match=r"probe\.preprocess"):
        verdicts.sides(spec, report, evaluation_report())
    later = changed("probe.preprocess", {**report["probe"]["preprocess"], "pad_offset": "floored"})
    later["probe"]["preprocess_source"] = "probe"
    verdicts.sides(spec, later, report)


def test_another_draw_of_samples_is_another_probe() -> None:
    """The same number of samples drawn with another seed is another probe."""
    report, baseline = (changed("probe.samples", {"used": 100, "of": 1797, "seed": seed}) for seed in (0, 1))
    verdicts.sides(gate({"min_change": 0}), report, report)
    with pytest.raises(NotComparable, match=r"probe\.samples\.seed"):
        verdicts.sides(gate({"min_change": 0}), report, baseline)


def test_a_tokenizer_is_the_datas_or_the_checkpoints() -> None:
    """A probe's tokenizer must be equal; a checkpoint's own is part of the comparison."""
    tokenizer = {"sha256": "4" * 64, "source": "checkpoint", "max_length": 9, "pad_id": 0, "n_truncated": 0}
    report = changed("probe.tokenizer", tokenizer)
    verdicts.sides(gate({"min_change": 0}), report, evaluation_report())
    tokenizer["source"] = "probe"
    with pytest.raises(NotComparable, match=r"probe\.tokenizer\.sha256"):
        verdicts.sides(gate({"min_change": 0}), report, evaluation_report())


def test_precision_of_before_the_option_is_float32() -> None:
    """Reports older than the precision option are float32 and stay comparable."""
    verdicts.sides(gate({"min_change": 0}), changed("provenance.precision", "float32"), evaluation_report())


def _points(kind: str, places: list[float], subjects: int = 2, **options: Any) -> dict[str, Any]:
    """Return a report of points, each with an accuracy of 1 less its number."""
    report = {**evaluation_report(), "kind": kind}
    name = {"path": "w", "pruning": "sparsity", "series": "x"}[kind]
    split = evaluation_report()["splits"]["all"]
    report["points"] = [
        {name: place, "splits": {"all": {**split, "accuracy": 1.0 - index}}} for index, place in enumerate(places)
    ]
    report["subjects"] = [{**report["subject"], "name": f"net-{index}"} for index in range(subjects)]
    report["axis"] = {"name": options.pop("axis", "epoch"), "values": places}
    usual = {"grid": {"points": len(places)}, "normalisation": "interpolate", "alignment": "none"}
    pruning = {"sparsities": places, "scope": "global", "include_head": False}
    report["provenance"] = {**report["provenance"], "options": {**usual, **pruning, **options}}
    return report


@pytest.mark.parametrize(
    ("report", "baseline", "member"),
    [
        (_points("path", [0.0, 0.5, 1.0]), _points("path", [0.0, 1.0]), "options.grid"),
        (_points("path", [0.0, 1.0]), _points("path", [0.0, 1.0], grid="adaptive"), "options.grid"),
        (_points("path", [0, 1]), _points("path", [0, 1], normalisation="recalibrate"), "options.normalisation"),
        (_points("path", [0, 1]), _points("path", [0, 1], alignment="weight_matching"), "options.alignment"),
        (_points("pruning", [0.0, 0.5]), _points("pruning", [0.0, 0.6]), "options.sparsities"),
        (_points("pruning", [0.0, 0.5]), _points("pruning", [0.0, 0.5], scope="layerwise"), "options.scope"),
        (_points("pruning", [0.0, 0.5]), _points("pruning", [0.0, 0.5], include_head=True), "options.include_head"),
        (_points("series", [1.0, 2.0]), _points("series", [1.0, 2.0], axis="width"), "axis.name"),
    ],
)  # fmt: skip
def test_points_that_were_found_in_another_way_are_refused(
    report: dict[str, Any], baseline: dict[str, Any], member: str
) -> None:
    """Barriers of another grid and knees of another scope are refused: values differ for other reasons."""
    spec = gate({"metric": "points.0.splits.all.accuracy", "min_change": 0}, kind=report["kind"])
    with pytest.raises(NotComparable) as caught:
        verdicts.sides(spec, report, baseline)
    assert [entry["member"] for entry in caught.value.members["differing"]] == [member]
    assert verdicts.sides(spec, report, report).baseline == report


def test_a_grid_is_the_same_however_it_was_asked_for() -> None:
    """Three even points equal their values written out."""
    report = _points("path", [0.0, 0.5, 1.0])
    spelled = _points("path", [0.0, 0.5, 1.0], grid={"values": [0.5]})
    spec = gate({"metric": "points.1.splits.all.accuracy", "max_change": 0}, kind="path")
    (check,) = verdicts.judge(spec, verdicts.sides(spec, spelled, report))
    assert (check.status, check.value, check.baseline) == ("pass", 0.0, 0.0)


def test_a_change_is_of_one_place() -> None:
    """A point that the baseline lacks, in an adaptive grid or a series, has no change; a series' last point has one."""
    adaptive = [_points("path", ws, grid="adaptive") for ws in ([0.0, 0.5, 1.0], [0.0, 0.25, 1.0])]
    runs = [_points("series", xs) for xs in ([1.0, 2.0], [1.0, 2.0, 3.0])]
    cases = [
        ("path", "points.1", adaptive, "point 1 is at w 0.5, and at 0.25 in the baseline"),
        ("path", "points.-2", adaptive, "point -2 is at w 0.5, and at 0.25 in the baseline"),
        ("path", "points.2", adaptive, None),
        ("series", "points.1", runs, None),
        ("series", "points.-1", runs, None),
        ("series", "points.1", [runs[0], _points("series", [1.0, 5.0])], "point 1 is at x 2.0, and at 5.0"),
    ]
    for kind, point, (report, baseline), why in cases:
        spec = gate({"metric": f"{point}.splits.all.accuracy", "min_change": -9}, kind=kind)
        (check,) = verdicts.judge(spec, verdicts.sides(spec, report, baseline))
        assert check.status == ("pass" if why is None else "undefined"), check.why
        assert why is None or why in check.why


def test_a_path_is_named_by_both_ends() -> None:
    """A path's subject is both checkpoints, a series' its last."""
    assert verdicts.subject_name(_points("path", [0.0, 1.0])) == "net-0 to net-1"
    assert verdicts.subject_name(_points("series", [0.0, 1.0, 2.0], subjects=3)) == "net-2"


def test_reasons_are_found_under_the_path_from_where_they_stand() -> None:
    """Reasons of `distance_to_optimum.mir` are found two levels above, those of list entries under the list's name."""
    report = evaluation_report()
    place = report["splits"]["all"]["interplay"]["sample"]["global"]
    place["distance_to_optimum"] = {"mir": None, "hdr": 0.1}
    place["reasons"] = {"distance_to_optimum.mir": "zero_entropy"}
    metric = "splits.all.interplay.sample.global.distance_to_optimum.mir"
    assert f"{metric} is null in the report (zero_entropy)" in result({"metric": metric, "min": 0}, report).why
    series = _points("series", [1.0, 2.0])
    series["summary"] = {"splits": {"all": {"mir_distance": [0.1, None], "reasons": {"mir_distance": "why"}}}}
    spec = gate({"metric": "summary.splits.all.mir_distance.1", "max": 0}, kind="series")
    (check,) = verdicts.judge(spec, verdicts.sides(spec, series, None))
    assert "mir_distance.1 is null in the report (why)" in check.why


def test_kinds_that_do_not_belong_together_are_refused() -> None:
    """A gate of paths judges no evaluation, and an evaluation is not compared with a path."""
    spec = GateSpec.model_validate(
        {"name": "g", "kind": "path", "checks": [{"metric": "summary.l2_distance", "max": 1}]}
    )
    with pytest.raises(NotComparable, match="reports of kind path"):
        verdicts.sides(spec, evaluation_report(), None)
    with pytest.raises(NotComparable, match="kind is 'evaluation' where the baseline's is 'path'"):
        verdicts.sides(gate({"min_change": 0}), evaluation_report(), {**evaluation_report(), "kind": "path"})


def test_a_baseline_that_is_a_comparison_is_its_b() -> None:
    """A baseline that is a comparison stands for its B, the promoted candidate."""
    baseline = comparison_report({"accuracy": difference(0.5, 0.9, 0.01)})
    report = evaluation_report()
    report["splits"]["test"] = {**report["splits"]["all"], "accuracy": 0.95}
    check = result({"metric": "splits.test.accuracy", "min_change": 0.05}, report, baseline)
    assert (check.status, check.baseline) == ("pass", 0.9)


def test_a_comparison_with_another_checkpoint_than_the_baselines_is_refused() -> None:
    """A comparison's A must be the baseline's subject: the subject of an evaluation, B of a comparison."""
    spec = gate({"metric": "splits.test.accuracy", "min_change": -1})
    report = comparison_report({"accuracy": WIDE})
    verdicts.sides(spec, report, evaluation_report())
    with pytest.raises(NotComparable, match="Compare with the baseline's checkpoint"):
        verdicts.sides(spec, report, comparison_report({"accuracy": WIDE}))
    # The same adapter on another base is another network.
    report["subjects"][0]["base"] = {"id": "x", "name": "base", "sha256": "0" * 64}
    with pytest.raises(NotComparable, match="adapter of another base") as caught:
        verdicts.sides(spec, report, evaluation_report())
    [differing] = caught.value.members["differing"]
    assert differing == {"member": "subject.base.sha256", "expected": None, "found": "0" * 64}

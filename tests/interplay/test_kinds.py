"""The table of kinds: the same kinds, points and summaries as the types of the service's reports."""

from typing import get_args, get_type_hints

from interplay import results
from interplay.kinds import KINDS, KindName


def test_kinds_are_those_of_the_service() -> None:
    """Every kind of report has an entry, under its own name."""
    reports = {get_args(get_type_hints(report)["kind"])[0]: report for report in get_args(results.Report)}
    assert set(KINDS) == set(reports) == set(get_args(KindName))
    for name, kind in KINDS.items():
        assert kind.name == name


def test_places_and_summaries_are_members_of_the_reports() -> None:
    """A kind has a place exactly if its report has points, and its summary names members of the report's own."""
    for report in get_args(results.Report):
        members = get_type_hints(report)
        kind = KINDS[get_args(members["kind"])[0]]
        assert (kind.place is not None) == ("points" in members)
        assert kind.names_axis == ("axis" in members)
        if kind.place is None:
            assert not kind.summary
            continue
        (point,) = get_args(members["points"])
        assert kind.place in get_type_hints(point)
        _, split = get_args(get_type_hints(members["summary"])["splits"])
        assert set(kind.summary) <= set(get_type_hints(split))
        assert kind.places_in_summary <= set(kind.summary)

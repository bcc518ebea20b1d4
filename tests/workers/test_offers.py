"""A worker's checks of its libraries: results one by one, a library that crashes its process, the next start."""

from copy import deepcopy
from pathlib import Path

import pytest

from analysis.networks.loading import FAMILIES
from workers import offers
from workers.offers import Offers, find_out

ENDS = """
import os
import sys
from importlib.abc import MetaPathFinder


class Ends(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            os.kill(os.getpid(), 11)
        if name == "timm":
            raise OSError("libcudart.so.13: cannot open shared object file")


sys.meta_path.insert(0, Ends())
"""


def test_the_families_are_those_of_the_networks() -> None:
    """The families are in the order of the networks' table, and are known without torch."""
    assert tuple(FAMILIES) == offers._FAMILIES


@pytest.mark.slow
def test_a_library_that_ends_its_process_costs_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that crashes its process costs one process: the others are still tried, and results are cached."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(ENDS)
    monkeypatch.setenv("PYTHONPATH", str(site))
    told: list[Offers] = []
    found = Offers(["builtin"], ["torchvision", "timm", "custom"])
    find_out(found, tmp_path, lambda now: told.append(deepcopy(now)))
    assert found.families == ["builtin", "custom"]
    assert found.unavailable == {
        "torchvision": "importing it ended the process",
        "timm": "OSError: libcudart.so.13: cannot open shared object file",
    }
    assert [len(now.untried) for now in told] == [2, 1, 0]

    monkeypatch.setattr(offers, "_try", None)
    again: list[Offers] = []
    find_out(Offers(["builtin"], ["torchvision", "timm", "custom"]), tmp_path, again.append)
    assert again == [found]


def test_what_cannot_be_read_is_found_out_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache file that is truncated, of another format or of other families is ignored: libraries are tried again."""
    tried: list[list[str]] = []

    def attempt(found: Offers, announce: object) -> None:
        tried.append([*found.untried])
        for family in [*found.untried]:
            found.take(family, names=["a"])

    monkeypatch.setattr(offers, "_try", attempt)
    find_out(Offers(["builtin"], ["timm"]), tmp_path, lambda _: None)
    [kept] = tmp_path.iterdir()
    for content in ('{"families": [', "[]", '{"other": 1}', kept.read_text().replace("timm", "torchvision")):
        kept.write_text(content)
        find_out(Offers(["builtin"], ["timm"]), tmp_path, lambda _: None)
    find_out(Offers(["builtin"], ["timm"]), tmp_path, lambda _: None)
    assert tried == [["timm"]] * 5

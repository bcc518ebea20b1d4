"""Cases that are too many for every run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def campaign(cases: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """Return all cases for `parametrize`: `make test` runs those in `often`, `make test-all` the others too."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in often else pytest.mark.slow)
        for case in cases
    ]

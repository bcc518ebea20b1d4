"""Cases that are too many for every run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

DATABASES = ["sqlite", "postgresql"]


def campaign(cases: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """Return all cases for `parametrize`: `make test` runs those in `often`, `make test-all` the others too."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in often else pytest.mark.slow)
        for case in cases
    ]


# For tests whose subject is what is computed: on the other database, which other tests of the same calls cover, they
# run in `make test-all`. The fixture `any_service` alone means both databases.
on_one_database = pytest.mark.parametrize("any_service", campaign(DATABASES, often=["sqlite"]), indirect=True)

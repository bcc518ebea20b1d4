"""The checks of shapes, for the tests that can do without them."""

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """For simulations: the checks take a third of their time, and hold in all other tests of the same functions."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)

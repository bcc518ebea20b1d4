"""The device on which these tests run: DEVICE, else the first GPU, else the processor."""

import os

import pytest
import torch

import tests.operators.sitecustomize  # noqa: F401  torchvision may be imported beside a CPU build of torch
from tests.shapes import without_shape_checks  # noqa: F401


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the other side of each comparison is computed."""
    chosen = os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    # With its index, as a tensor's own device has one.
    return torch.zeros(0, device=chosen).device

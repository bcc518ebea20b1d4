"""The training loss, as users import it."""

import subprocess
import sys

import pytest

import interplay
from interplay._analysis.measures import losses


def test_loss_is_found_where_users_look_for_it() -> None:
    """The package exports the loss of analysis, and other names do not exist."""
    assert interplay.InterplayLoss is losses.InterplayLoss
    assert interplay.mir_loss is losses.mir_loss
    assert interplay.hdr_loss is losses.hdr_loss
    with pytest.raises(AttributeError, match="nothing"):
        _ = interplay.nothing  # type: ignore[attr-defined]


def test_importing_the_client_does_not_load_torch() -> None:
    """A runner without torch can import the package."""
    script = "import sys, interplay; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"

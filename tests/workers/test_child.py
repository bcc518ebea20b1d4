"""The worker's side of the compute process."""

from pathlib import Path

import pytest

from app.settings import Settings
from tests.workers.examples import FILES, pruning_task
from workers.child import ComputeChild
from workers.tasks import Progress, Work, point_step


def test_an_error_while_a_step_is_computed_ends_the_process(tmp_path: Path) -> None:
    """Otherwise the answer that still comes would be taken for the answer to the next step of the same analysis."""
    child = ComputeChild(Settings(data_dir=tmp_path))
    work = Work(step=point_step(pruning_task(), number=0, place=0.0, first=None), files=FILES)

    def fail(progress: Progress | None) -> bool:
        raise ValueError(progress)

    try:
        with pytest.raises(ValueError, match="None"):
            child.run(work, fail)
        assert not child.is_running()
    finally:
        child.kill()

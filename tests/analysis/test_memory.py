"""Freed memory goes back to the system where that is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Blocks of 2 MiB that go, each between two small ones that stay; prints the MiB that the process still holds of them.
_SCRIPT = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from analysis.memory import returned_soon

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

with returned_soon() if sys.argv[1] == "soon" else nullcontext():
    before = held()
    large, small = [], []
    for _ in range(64):
        large.append(torch.ones(2**19))
        small.append(torch.ones(16))
    assert held() - before > 120
    del large
    print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the C library is not glibc")
def test_freed_blocks_go_back_at_once() -> None:
    """With the thresholds of compute processes blocks between others that stay are kept, unless they are to go back."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}
    left = {}
    for mode in ("usual", "soon"):
        command = [sys.executable, "-c", _SCRIPT, mode]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        left[mode] = float(ran.stdout)
    assert left["usual"] > 100
    assert left["soon"] < 10

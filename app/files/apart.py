"""Limits of a process that reads one stranger's file and then ends."""

import resource
from contextlib import suppress
from pathlib import Path


def bound_this_process(most_bytes: int) -> None:
    """Limit this process, so that a file that announces too much memory ends this process and no other."""
    for kind, most in ((resource.RLIMIT_DATA, most_bytes), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")

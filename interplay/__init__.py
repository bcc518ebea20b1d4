"""What users import and type: the client of an Interplay service, the `interplay` command, and the training loss.

The loss needs torch, so its names are looked up only when they are asked for.
"""

from typing import Any

from interplay.client import (
    AnalysisFailed,
    Client,
    InterplayError,
    ProblemError,
    ServiceUnreachable,
    WaitTimeout,
)

__all__ = ["AnalysisFailed", "Client", "InterplayError", "ProblemError", "ServiceUnreachable", "WaitTimeout"]

_LOSSES = ("InterplayLoss", "hdr_loss", "mir_loss")


def __getattr__(name: str) -> Any:
    if name not in _LOSSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from analysis import losses

    return getattr(losses, name)

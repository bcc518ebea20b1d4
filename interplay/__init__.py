"""What users import and type: the client of an Interplay service, and the `interplay` command."""

from interplay.client import (
    AnalysisFailed,
    Client,
    InterplayError,
    ProblemError,
    ServiceUnreachable,
    WaitTimeout,
)

__all__ = ["AnalysisFailed", "Client", "InterplayError", "ProblemError", "ServiceUnreachable", "WaitTimeout"]

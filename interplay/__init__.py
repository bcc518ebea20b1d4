"""What users import and type: the client of an Interplay service, the `interplay` command, and the training loss.

What needs torch is looked up only when it is asked for.
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
from interplay.results import (
    Analysis,
    Checkpoint,
    EvaluationReport,
    FeatureSet,
    PathReport,
    Probe,
    PruningReport,
    Report,
    ReportSummary,
    SeriesReport,
    SucceededAnalysis,
)

__all__ = [
    "Analysis",
    "AnalysisFailed",
    "Checkpoint",
    "Client",
    "EvaluationReport",
    "FeatureSet",
    "InterplayError",
    "PathReport",
    "Probe",
    "ProblemError",
    "PruningReport",
    "Report",
    "ReportSummary",
    "SeriesReport",
    "ServiceUnreachable",
    "SucceededAnalysis",
    "WaitTimeout",
]

_LOSSES = ("InterplayLoss", "hdr_loss", "mir_loss")


def __getattr__(name: str) -> Any:
    if name not in _LOSSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from analysis import losses

    return getattr(losses, name)

"""Public API: the client of a service, the `interplay` command, and functions for training scripts.

Each name is imported at its first use: the commands of the server need none, and some need torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "Analysis",
    "AnalysisFailed",
    "Checkpoint",
    "Client",
    "ComparisonReport",
    "EvaluationReport",
    "FeatureSet",
    "Fetch",
    "FetchFailed",
    "InterplayError",
    "NotOne",
    "PathReport",
    "Probe",
    "ProblemError",
    "PruningReport",
    "Report",
    "ReportSummary",
    "SeriesReport",
    "ServiceUnreachable",
    "SucceededAnalysis",
    "SucceededFetch",
    "WaitTimeout",
]

_MODULES = {
    **dict.fromkeys(
        (
            "AnalysisFailed", "Client", "FetchFailed", "InterplayError", "NotOne", "ProblemError", "ServiceUnreachable",
            "WaitTimeout",
        ),
        "interplay.client",
    ),
    **dict.fromkeys(
        (
            "Analysis", "Checkpoint", "ComparisonReport", "EvaluationReport", "FeatureSet", "Fetch", "PathReport",
            "Probe", "PruningReport", "Report", "ReportSummary", "SeriesReport", "SucceededAnalysis", "SucceededFetch",
        ),
        "interplay.results",
    ),
    # These need torch.
    "AnalysisError": "interplay._analysis.errors",
    "ConversionError": "interplay._analysis.saving.conversion",
    "InterplayLoss": "interplay._analysis.measures.losses",
    "capture_features": "interplay._analysis.saving.capturing",
    "hdr_loss": "interplay._analysis.measures.losses",
    "mir_loss": "interplay._analysis.measures.losses",
    "save_checkpoint": "interplay._analysis.saving.checkpoint",
}  # fmt: skip

if TYPE_CHECKING:
    from interplay._analysis.errors import AnalysisError as AnalysisError
    from interplay._analysis.measures.losses import InterplayLoss as InterplayLoss
    from interplay._analysis.measures.losses import hdr_loss as hdr_loss
    from interplay._analysis.measures.losses import mir_loss as mir_loss
    from interplay._analysis.saving.capturing import capture_features as capture_features
    from interplay._analysis.saving.checkpoint import save_checkpoint as save_checkpoint
    from interplay._analysis.saving.conversion import ConversionError as ConversionError
    from interplay.client import (
        AnalysisFailed,
        Client,
        FetchFailed,
        InterplayError,
        NotOne,
        ProblemError,
        ServiceUnreachable,
        WaitTimeout,
    )
    from interplay.results import (
        Analysis,
        Checkpoint,
        ComparisonReport,
        EvaluationReport,
        FeatureSet,
        Fetch,
        PathReport,
        Probe,
        PruningReport,
        Report,
        ReportSummary,
        SeriesReport,
        SucceededAnalysis,
        SucceededFetch,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            found = getattr(importlib.import_module(_MODULES[name]), name)
        except ModuleNotFoundError as error:
            if not _MODULES[name].startswith("interplay._analysis."):
                raise
            text = f"interplay.{name} needs {error.name}, which `pip install 'interplay[train]'` brings"
            raise ModuleNotFoundError(text, name=error.name) from error
        return globals().setdefault(name, found)

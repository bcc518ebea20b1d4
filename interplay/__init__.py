"""What users import and type: the client of a service, the `interplay` command, and what a training script calls.

What needs torch is looked up only when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

# What needs torch, by its module.
_LATER = {
    "AnalysisError": "errors",
    "ConversionError": "conversion",
    "InterplayLoss": "losses",
    "capture_features": "capturing",
    "hdr_loss": "losses",
    "mir_loss": "losses",
    "save_checkpoint": "saving",
}

if TYPE_CHECKING:
    from analysis.capturing import capture_features as capture_features
    from analysis.conversion import ConversionError as ConversionError
    from analysis.errors import AnalysisError as AnalysisError
    from analysis.losses import InterplayLoss as InterplayLoss
    from analysis.losses import hdr_loss as hdr_loss
    from analysis.losses import mir_loss as mir_loss
    from analysis.saving import save_checkpoint as save_checkpoint
else:

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"analysis.{_LATER[name]}"), name)
        except ModuleNotFoundError as error:
            text = f"interplay.{name} needs {error.name}, which `pip install 'interplay[worker]'` brings"
            raise ModuleNotFoundError(text, name=error.name) from error

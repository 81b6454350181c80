"""Make an existing model's slow blocks fast in place, say what was done, and undo it exactly."""

from fastvit.patching.explanation import Explanation, explain
from fastvit.patching.folding import FoldedNormalization, fold_normalization
from fastvit.patching.freezing import freeze, unfreeze
from fastvit.patching.fusion import Fused
from fastvit.patching.models import create_model
from fastvit.patching.register import register, unregister
from fastvit.patching.reporting import Report, ReportRow, report
from fastvit.patching.swap import is_patched, patch, patched, unpatch

__all__ = [
    "Explanation",
    "FoldedNormalization",
    "Fused",
    "Report",
    "ReportRow",
    "create_model",
    "explain",
    "fold_normalization",
    "freeze",
    "is_patched",
    "patch",
    "patched",
    "register",
    "report",
    "unfreeze",
    "unpatch",
    "unregister",
]


def __dir__() -> list[str]:
    return __all__

"""Make an existing model's slow blocks fast in place, say what was done, and undo it exactly."""

from fastvit.patching.explanation import Explanation, explain
from fastvit.patching.freezing import freeze, unfreeze
from fastvit.patching.fusion import Fused
from fastvit.patching.models import create_model, fuse_reference_models
from fastvit.patching.register import register, unregister
from fastvit.patching.reporting import Report, ReportRow, report
from fastvit.patching.swap import is_patched, patch, patched, unpatch

__all__ = [
    "Explanation",
    "Fused",
    "Report",
    "ReportRow",
    "create_model",
    "explain",
    "freeze",
    "fuse_reference_models",
    "is_patched",
    "patch",
    "patched",
    "register",
    "report",
    "unfreeze",
    "unpatch",
    "unregister",
]

"""The public names of ``fastvit``, which imports them when the first of them is asked for."""

from fastvit import backends, deployment, losses, ops, patching, reference
from fastvit._version import __version__
from fastvit.deployment import exporting
from fastvit.graphs import Captured, capture
from fastvit.ops._packing import release_memory
from fastvit.patching import (
    Explanation,
    FoldedNormalization,
    Fused,
    Report,
    ReportRow,
    create_model,
    explain,
    fold_normalization,
    freeze,
    is_patched,
    patch,
    patched,
    register,
    report,
    unfreeze,
    unpatch,
    unregister,
)
from fastvit.reference import list_models
from fastvit.reference.transform import transform
from fastvit.reference.weights import LoadReport, load_weights

__all__ = [
    "Captured",
    "Explanation",
    "FoldedNormalization",
    "Fused",
    "LoadReport",
    "Report",
    "ReportRow",
    "__version__",
    "backends",
    "capture",
    "create_model",
    "deployment",
    "explain",
    "exporting",
    "fold_normalization",
    "freeze",
    "is_patched",
    "list_models",
    "load_weights",
    "losses",
    "ops",
    "patch",
    "patched",
    "patching",
    "reference",
    "register",
    "release_memory",
    "report",
    "transform",
    "unfreeze",
    "unpatch",
    "unregister",
]

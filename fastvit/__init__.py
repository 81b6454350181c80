"""Seven vision transformer families with custom kernels, and ``patch`` for the models you have already.

>>> import fastvit
>>> model = fastvit.patch(model)          # in place; same outputs, same state_dict
>>> print(fastvit.report(model))          # what was fused, what was not, and why
>>> model = fastvit.unpatch(model)        # exactly as before

``fastvit.create_model("deepvit_s")`` builds a reference model that is fused from the start.
"""

import os

from fastvit import backends, losses, ops, patching, reference
from fastvit._version import __version__
from fastvit.ops._packing import release_memory
from fastvit.patching import (
    Explanation,
    Fused,
    Report,
    ReportRow,
    create_model,
    explain,
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
from fastvit.reference.weights import LoadReport, load_weights

__all__ = [
    "Explanation",
    "Fused",
    "LoadReport",
    "Report",
    "ReportRow",
    "__version__",
    "backends",
    "create_model",
    "explain",
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
    "unfreeze",
    "unpatch",
    "unregister",
]

patching.fuse_reference_models()
if os.environ.get("FASTVIT_AUTO"):
    from fastvit import auto as auto

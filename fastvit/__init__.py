"""Seven vision transformer families with custom kernels, and ``patch`` for the models you have already.

>>> import fastvit
>>> model = fastvit.create_model("cait_xxs24_224", depth=2, fused=False)  # or a model of timm, transformers, your own
>>> model = fastvit.patch(model)                     # in place; same outputs, same state_dict
>>> report = fastvit.report(model)                   # print it: what was fused, what was not, and why
>>> [row.status for row in report.rows if row.op == "head_mixed_attention"]
['patched', 'patched']
>>> model = fastvit.unpatch(model)                   # exactly as before

``fastvit.create_model("deepvit_s")`` builds a reference model that is fused from the start.
"""

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from fastvit._version import __version__ as __version__

if TYPE_CHECKING:
    from fastvit._public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Import a sub-module, or all of the public names, when one is asked for: torch takes seconds."""
        if not name.startswith("__") and importlib.util.find_spec(f"fastvit.{name}"):
            return importlib.import_module(f"fastvit.{name}")
        if not name.startswith("_") or name == "__all__":
            public = importlib.import_module("fastvit._public")
            if hasattr(public, name):
                return globals().setdefault(name, getattr(public, name))
        raise AttributeError(f"module 'fastvit' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __getattr__("__all__")


def _fuse(model: Any) -> None:
    importlib.import_module("fastvit.patching.models").fuse(model)


_on_build = [_fuse]
"""What ``fastvit.reference`` does with every model it builds, whichever of our modules is imported first."""

if any(name.startswith(("FASTVIT_", "TRITON_INTERPRET")) for name in os.environ):  # what they hold is judged at import
    importlib.import_module("fastvit._public")
if os.environ.get("FASTVIT_AUTO"):
    importlib.import_module("fastvit.auto")

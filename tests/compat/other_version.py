"""Tries the models of one library, in whatever version Python finds, plain and patched; tells the outcome as JSON.

    PYTHONPATH=folder python -m tests.compat.other_version timm

For :mod:`test_versions`, which says where to find which.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.patching import patch, report, unpatch
from tests import conftest  # noqa: F401  (declares what timm imports)
from tests.tiny import TIMM

MODELS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "timm": ("tests.tiny", TIMM),
    "transformers": ("tests.patching.test_transformers", ("vit_eager", "vit_sdpa", "deit_eager", "deit_sdpa", "cvt")),
    "vit_pytorch": (
        "tests.patching.test_vit_pytorch",
        ("vit", "simple_vit", "distillable_vit", "deepvit", "cait", "cvt", "twins_svt"),
    ),
    "torchvision": ("tests.patching.test_torchvision", (None,)),
}
"""By library, the module that builds its tiny models, and their names; None where it builds one alone."""


def _outcome(build: Callable[..., nn.Module], images: Callable[..., Tensor], *name: str) -> dict[str, Any]:
    try:
        model, x = build(*name), images(*name)
    except (TypeError, ImportError, AttributeError) as error:
        return {"not in this version": f"{type(error).__name__}: {error}"}
    with torch.no_grad():
        plain = model(x)
        patch(model, verify=x)
        torch.testing.assert_close(model(x), plain, rtol=1e-3, atol=1e-4)
        rows = [(row.kind, row.status, list(row.reasons)) for row in report(model).rows]
        assert torch.equal(unpatch(model)(x), plain)
    return {"rows": rows}


def main(library: str) -> None:
    """Print what became of each model."""
    warnings.simplefilter("ignore")
    module, names = MODELS[library]
    source: Any = importlib.import_module(module)
    version = metadata.version(library.replace("_", "-"))
    outcomes = {name or "vit": _outcome(source.build, source.images, *([name] if name else [])) for name in names}
    print(json.dumps({"version": version, "models": outcomes}))


if __name__ == "__main__":
    main(sys.argv[1])

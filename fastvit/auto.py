"""``import fastvit.auto``: every timm, transformers, torchvision and vit-pytorch model built from now on is patched.

>>> import fastvit.auto
>>> model = timm.create_model("cait_xxs24_224")   # its blocks are fused; fastvit.unpatch(model) gives them back
>>> fastvit.auto.disable()                        # models built from now on are plain again

It does not matter which is imported first, and no library is imported by it. Models built before stay as they are.
``FASTVIT_AUTO=timm,transformers`` does it at ``import fastvit``, for these libraries; ``FASTVIT_BACKEND=reference``
leaves all models plain. A block is fused when it is put into another module, so one that is built by itself is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastvit.patching import building

__all__ = ["LIBRARIES", "disable", "enable", "enabled"]

LIBRARIES = building.LIBRARIES
"""The libraries that are known."""


def enable(libraries: str | Iterable[str] | None = None) -> None:
    """Fuse the blocks of models built from now on, as ``fastvit.patch(model)`` would.

    Args:
        libraries: names out of :data:`LIBRARIES`, instead of those enabled before; all by default.

    Raises:
        ValueError: an unknown library; lists the valid names.
    """
    building.fuse_when_built(building.check_libraries("libraries", libraries))


def disable() -> None:
    """Leave models built from now on as their libraries make them; those built already stay as they are."""
    building.fuse_when_built(frozenset())


def enabled() -> tuple[str, ...]:
    """The libraries whose models are patched as they are built now."""
    return tuple(sorted(building.fused_when_built()))


def _requested() -> frozenset[str]:
    """What FASTVIT_AUTO asks for: names with commas between them; all where it is not set."""
    value = os.environ.get("FASTVIT_AUTO")
    return building.check_libraries("FASTVIT_AUTO", [name.strip() for name in value.split(",")] if value else None)


building.fuse_when_built(_requested())

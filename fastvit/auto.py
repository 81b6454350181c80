"""``import fastvit.auto``: every timm, transformers, torchvision and vit-pytorch model built from now on is patched.

    import fastvit.auto
    model = timm.create_model("cait_xxs24_224")   # its blocks are fused; fastvit.unpatch(model) restores them
    fastvit.auto.disable()                        # models built from now on are plain again

The order of imports does not matter, and this module imports none of the libraries. Models built before stay as they
are. ``FASTVIT_AUTO=timm,transformers`` does the same at ``import fastvit``, for the libraries it names;
``FASTVIT_BACKEND=reference`` keeps all models plain. A block is fused when it becomes a sub-module of another module,
so a block that is built on its own stays plain.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastvit.patching import building

__all__ = ["LIBRARIES", "disable", "enable", "enabled"]

LIBRARIES = building.LIBRARIES
"""The supported libraries."""


def enable(libraries: str | Iterable[str] | None = None) -> None:
    """Fuse the blocks of models built from now on, as ``fastvit.patch(model)`` would.

    Args:
        libraries: names from :data:`LIBRARIES`, which replace those enabled before; all by default.

    Raises:
        ValueError: an unknown library; lists the valid names.
    """
    building.fuse_when_built(building.check_libraries("libraries", libraries))


def disable() -> None:
    """Stop patching models as they are built; models built before stay as they are."""
    building.fuse_when_built(frozenset())


def enabled() -> tuple[str, ...]:
    """The libraries whose models are patched as they are built."""
    return tuple(sorted(building.fused_when_built()))


def _requested() -> frozenset[str]:
    """The libraries named by FASTVIT_AUTO, joined by commas; all if it is not set."""
    value = os.environ.get("FASTVIT_AUTO")
    names = [name.strip().lower() for name in value.split(",")] if value else None
    return building.check_libraries("FASTVIT_AUTO", names)


building.fuse_when_built(_requested())

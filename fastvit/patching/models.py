"""Reference models that are fused from the start."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit import backends
from fastvit.patching.plan import apply, survey
from fastvit.patching.swap import unpatch
from fastvit.reference import VisionModel, registry


def fuse(model: nn.Module) -> None:
    """Fuse a reference model that has just been built, unless FASTVIT_BACKEND asks for the reference alone."""
    if {"reference"} != backends.REQUESTED:
        apply(survey(model), "auto")


def create_model(
    name: str,
    *,
    fused: bool = True,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    pool: str | None = None,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> VisionModel:
    """Build a named model of the seven families, with fresh weights and fused blocks.

    Examples:
        >>> import fastvit
        >>> fastvit.create_model("deit_tiny_patch16_224", num_classes=10).head
        Linear(in_features=192, out_features=10, bias=True)

    Args:
        name: one of :func:`fastvit.list_models`.
        fused: False leaves the blocks plain, as does ``FASTVIT_BACKEND=reference``.
        num_classes: 0 leaves the head out.
        img_size: pixels, an int or (height, width); the variant's own by default.
        in_chans: channels of the images.
        pool: how tokens become one vector, where the family has a choice; its own by default.
        drop_rate: probability of dropout.
        attn_drop_rate: probability of dropping an attention weight.
        drop_path_rate: probability of stochastic depth.
        options: further arguments of the family class.

    Raises:
        ValueError: unknown name (the nearest are suggested) or a value the family does not take.
        TypeError: an option the family does not know.
    """
    model = registry.create_model(
        name,
        num_classes=num_classes,
        img_size=img_size,
        in_chans=in_chans,
        pool=pool,
        drop_rate=drop_rate,
        attn_drop_rate=attn_drop_rate,
        drop_path_rate=drop_path_rate,
        **options,
    )
    return model if fused else unpatch(model)

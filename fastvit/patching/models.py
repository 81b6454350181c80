"""Reference models that are fused from the start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import backends
from fastvit.ops._operator import is_dynamo_compiling
from fastvit.patching.fusion import is_ours
from fastvit.patching.plan import apply, survey
from fastvit.patching.replay import replayed
from fastvit.patching.swap import unpatch
from fastvit.reference import VisionModel, base, registry
from fastvit.reference.overrides import is_own


def fuse(model: nn.Module) -> None:
    """Fuse a reference model that has just been built, unless FASTVIT_BACKEND asks for the reference alone."""
    if {"reference"} != backends.REQUESTED:
        apply(survey(model), "auto")


def _run_features(features: Callable[..., Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
    """features(x, mask) of a fused model; without the Python between the blocks where nothing changed since a call."""
    if is_dynamo_compiling() or torch.compiler._is_exporting_flag:
        return features(x, mask)
    model = getattr(features, "__self__", None)
    if isinstance(model, VisionModel) and any(is_ours(type(part)) for part in model.modules()):
        alone = features.__name__ == "forward_prefix"
        out = replayed(model, _prefix if alone else _features, x, mask)
        if out is not None:
            return out
    return features(x, mask)


def _features(model: VisionModel, x: Tensor, mask: Tensor | None) -> Tensor | None:
    return model.forward_features(x, mask) if _is_as_defined(model) else None


def _prefix(model: VisionModel, x: Tensor, mask: Tensor | None) -> Tensor | None:
    return model.forward_prefix(x, mask) if _is_as_defined(model) else None


def _is_as_defined(model: VisionModel) -> bool:
    """Whether a model, at inference, is of one of our classes, and nobody has put a method of his own on either."""
    cls = type(model)
    if torch.is_grad_enabled() or model.training or not cls.__module__.startswith("fastvit."):
        return False
    if any(isinstance(value, (FunctionType, MethodType, partial)) for value in vars(model).values()):
        return False
    known = cls.__mro__[: cls.__mro__.index(nn.Module)]
    names = {name for each in known for name, value in vars(each).items() if isinstance(value, FunctionType)}
    return all(is_own(getattr(cls, name), cls, name) for name in names)


base.run_features = _run_features


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

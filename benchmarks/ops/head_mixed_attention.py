"""Head-mixed attention of published models, beside attention without mixing (torch's SDPA), which is a floor.

In training re-attention takes batch statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import Op
from fastvit.reference.functional import BatchNorm, LayerNorm


class Shape(NamedTuple):
    """One model's attention: heads, tokens, head dimension; the norm of re-attention, or None for talking heads."""

    model: str
    heads: int
    tokens: int
    dim: int
    norm: str | None


SHAPES = (
    Shape("deepvit_16b", 12, 197, 32, "batch"),
    Shape("deepvit_s", 12, 197, 33, "batch"),
    Shape("deepvit_l", 12, 197, 35, "batch"),
    Shape("vit_pytorch", 12, 197, 32, "layer"),
    Shape("cait_xxs24_224", 4, 196, 48, None),
    Shape("cait_s24_224", 8, 196, 48, None),
)


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    packed = torch.randn(batch, shape.tokens, 3, shape.heads, shape.dim).to(dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def make_arguments(shape: Shape, batch: int) -> dict[str, Any]:
    """The weights and biases of the mixes, and the norm."""
    heads = shape.heads
    names = ("pre", "post") if shape.norm is None else ("post",)
    made: dict[str, Any] = {f"{name}_weight": torch.eye(heads) + 0.1 * torch.randn(heads, heads) for name in names}
    if shape.norm != "layer":
        made |= {f"{name}_bias": 0.1 * torch.randn(heads) for name in names}
    affine = torch.ones(heads), torch.zeros(heads)
    if shape.norm == "batch":
        made["norm"] = BatchNorm(torch.full((heads,), 1.0 / shape.tokens), torch.full((heads,), 1e-4), *affine)
    if shape.norm == "layer":
        made["norm"] = LayerNorm(*affine)
    return made


def unmixed(arguments: dict[str, Any]) -> Callable[..., Tensor]:
    return F.scaled_dot_product_attention


ROWS = tuple(
    Op(
        "head_mixed_attention",
        shape.model,
        functools.partial(make_inputs, shape),
        functools.partial(make_arguments, shape),
        {"sdpa": unmixed},
        floors=("sdpa",),
    )
    for shape in SHAPES
)

"""Masked and class attention of published models, on views of a packed qkv, beside torch's SDPA on the same views.

"padding" is a mask over keys, (B, 1, 1, Nk), that keeps four fifths; "full" a mask for each query, (B, 1, Nq, Nk);
"bias" an additive bias, (1, H, Nq, Nk), which has a gradient in training. Shapes with up to four queries run
``class_attention``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import Op


class Shape(NamedTuple):
    """One model's attention: heads, queries, keys, head dimension."""

    model: str
    heads: int
    queries: int
    keys: int
    dim: int


SHAPES = (
    Shape("vit_ti", 3, 197, 197, 64),
    Shape("vit_s", 6, 197, 197, 64),
    Shape("vit_b", 12, 197, 197, 64),
    Shape("vit_b_384", 12, 577, 577, 64),
    Shape("vit_s_512", 6, 1025, 1025, 64),
    Shape("cvt_stage1", 1, 3136, 784, 64),
    Shape("cvt_stage2", 3, 784, 196, 64),
    Shape("cvt_stage3", 6, 197, 50, 64),
    Shape("cpvt_s", 6, 196, 196, 64),
    Shape("cait_s_class", 8, 1, 197, 48),
    Shape("cait_xxs_class", 4, 1, 197, 48),
    Shape("cait_m_class_448", 16, 1, 785, 48),
    Shape("two_class_tokens", 12, 2, 198, 64),
    Shape("ceit_s_class", 6, 1, 12, 64),
)
CLASS_QUERIES = 4
MASKED = ("vit_s", "vit_s_512", "cvt_stage1", "cait_s_class")
"""The shapes that are measured with masks, too."""


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v as views of packed tensors."""
    longest = max(shape.queries, shape.keys)
    packed = torch.randn(batch, longest, 3, shape.heads, shape.dim).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, : shape.queries], k[:, :, : shape.keys], v[:, :, : shape.keys]


def make_arguments(shape: Shape, mask: str, batch: int) -> dict[str, Any]:
    if mask == "bias":
        return {"bias": torch.randn(1, shape.heads, shape.queries, shape.keys)}
    sizes = {"padding": (batch, 1, 1, shape.keys), "full": (batch, 1, shape.queries, shape.keys)}
    return {"mask": torch.rand(sizes[mask]) < 0.8} if mask in sizes else {}


def sdpa(arguments: dict[str, Any]) -> Callable[..., Tensor]:
    allowed = arguments.get("mask", arguments.get("bias"))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, allowed)


ROWS = tuple(
    Op(
        "class_attention" if shape.queries <= CLASS_QUERIES else "masked_attention",
        f"{shape.model}{'' if mask == 'none' else ' ' + mask}",
        functools.partial(make_inputs, shape),
        functools.partial(make_arguments, shape, mask),
        {"sdpa": sdpa},
    )
    for shape in SHAPES
    for mask in (("none", "padding", "full", "bias") if shape.model in MASKED else ("none",))
)

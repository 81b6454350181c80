"""Linear layers and MLPs of published models; the plain form is the library's product."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ops.cases import Op


class Shape(NamedTuple):
    """One layer of a model: tokens of an image, widths of input and output, and of the hidden layer of an MLP."""

    name: str
    tokens: int
    depth: int
    columns: int
    hidden: int | None = None


SHAPES = (
    Shape("vit_ti_mlp", 197, 192, 192, 768),
    Shape("vit_s_qkv", 197, 384, 1152),
    Shape("vit_s_proj", 197, 384, 384),
    Shape("vit_s_mlp", 197, 384, 384, 1536),
    Shape("vit_b_mlp", 197, 768, 768, 3072),
    Shape("cait_xxs_mlp", 196, 192, 192, 768),
    Shape("cvt_1_mlp", 3136, 64, 64, 256),
    Shape("cvt_2_mlp", 784, 192, 192, 768),
    Shape("head", 1, 384, 1000),
)


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(batch, shape.tokens, shape.depth).to(dtype),)


def _layer(depth: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.randn(columns, depth) / depth**0.5, torch.randn(columns)


def make_arguments(shape: Shape, batch: int) -> dict[str, Any]:
    if shape.hidden is None:
        return dict(zip(("weight", "bias"), _layer(shape.depth, shape.columns), strict=True))
    layers = (*_layer(shape.depth, shape.hidden), *_layer(shape.hidden, shape.columns))
    return dict(zip(("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), layers, strict=True))


ROWS = tuple(
    Op(
        "linear" if shape.hidden is None else "mlp",
        shape.name,
        functools.partial(make_inputs, shape),
        functools.partial(make_arguments, shape),
    )
    for shape in SHAPES
)

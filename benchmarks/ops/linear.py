"""Linear layers, MLPs and gated MLPs of published models; the plain form is the library's product."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ops.cases import Op
from fastvit.reference.functional import LayerNorm


class Shape(NamedTuple):
    """One layer of a model: tokens of an image, widths of input and output, and of the hidden layer of an MLP.

    ``gated``: None, or whether hidden values, which are gated, have a norm.
    """

    name: str
    tokens: int
    depth: int
    columns: int
    hidden: int | None = None
    gated: bool | None = None

    @property
    def op(self) -> str:
        return "linear" if self.hidden is None else "mlp" if self.gated is None else "glu_mlp"


SHAPES = (
    Shape("vit_ti_mlp", 197, 192, 192, 768),
    Shape("vit_s_qkv", 197, 384, 1152),
    Shape("vit_s_proj", 197, 384, 384),
    Shape("vit_s_mlp", 197, 384, 384, 1536),
    Shape("vit_b_mlp", 197, 768, 768, 3072),
    Shape("cait_xxs_mlp", 196, 192, 192, 768),
    Shape("cvt_1_mlp", 3136, 64, 64, 256),
    Shape("cvt_2_mlp", 784, 192, 192, 768),
    Shape("dinov2_g_swiglu", 257, 1536, 1536, 4096, gated=False),
    Shape("eva02_s_swiglu", 577, 384, 384, 1024, gated=False),
    Shape("eva02_b_swiglu", 1025, 768, 768, 2048, gated=True),
    Shape("head", 1, 384, 1000),
)


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(batch, shape.tokens, shape.depth).to(dtype),)


def _layer(depth: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.randn(columns, depth) / depth**0.5, torch.randn(columns)


def make_arguments(shape: Shape, batch: int) -> dict[str, Any]:
    if shape.hidden is None:
        return dict(zip(("weight", "bias"), _layer(shape.depth, shape.columns), strict=True))
    if shape.gated is not None:
        parts = {"gate": shape.depth, "value": shape.depth, "fc2": shape.hidden}
        layers = {
            name: _layer(depth, shape.columns if name == "fc2" else shape.hidden) for name, depth in parts.items()
        }
        found: dict[str, Any] = {f"{name}_weight": weight for name, (weight, _) in layers.items()}
        found |= {f"{name}_bias": bias for name, (_, bias) in layers.items()}
        if shape.gated:
            found["hidden_norm"] = LayerNorm(torch.ones(shape.hidden), torch.zeros(shape.hidden), 1e-6)
        return found
    layers = (*_layer(shape.depth, shape.hidden), *_layer(shape.hidden, shape.columns))
    return dict(zip(("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), layers, strict=True))


ROWS = tuple(
    Op(
        shape.op,
        shape.name,
        functools.partial(make_inputs, shape),
        functools.partial(make_arguments, shape),
    )
    for shape in SHAPES
)

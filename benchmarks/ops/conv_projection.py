"""CvT's projections, three and one alone, in CvT-13 and CvT-W24, beside the library's convolutions and products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import both_layouts, convolve, folded, random_norm, rows_of
from fastvit.reference.functional import Projection


class Shape(NamedTuple):
    """One stage of a model."""

    name: str
    side: int
    channels: int
    prefix_tokens: int = 0


SHAPES = (
    Shape("cvt 64", 56, 64),
    Shape("cvt 192", 28, 192),
    Shape("cvt 384", 14, 384, 1),
    Shape("cvt-w24 1024", 14, 1024, 1),
)


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(batch, shape.prefix_tokens + shape.side**2, shape.channels).to(dtype),)


def make_arguments(shape: Shape, batch: int) -> dict[str, Any]:
    channels = shape.channels

    def part(stride: int) -> Projection:
        pointwise = torch.randn(channels, channels) / channels**0.5
        return Projection(
            torch.randn(channels, 1, 3, 3) / 3, random_norm(channels), pointwise, torch.randn(channels), stride
        )

    grid = (shape.side, shape.side)
    return {"q": part(1), "k": part(2), "v": part(2), "grid": grid, "prefix_tokens": shape.prefix_tokens}


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Any:
    """The best one can write with the library's convolution in the given layout."""
    grid, prefix = arguments["grid"], arguments["prefix_tokens"]
    parts = [arguments[name] for name in "qkv"]
    convolutions = [folded(part.dw_weight, None, part.norm) for part in parts]

    def run(x: Tensor) -> list[Tensor]:
        out = []
        for part, (weight, bias) in zip(parts, convolutions, strict=True):
            tokens = convolve(x[:, prefix:], weight, bias, grid, part.stride, channels_last)
            if prefix:
                tokens = torch.cat((x[:, :prefix], tokens), dim=1)
            out.append(F.linear(tokens, part.pw_weight, part.pw_bias))
        return out

    return run


def make_one(shape: Shape, batch: int) -> dict[str, Any]:
    """The arguments of the queries' projection alone."""
    arguments = make_arguments(shape, batch)
    return arguments.pop("q")._asdict() | {name: arguments[name] for name in ("grid", "prefix_tokens")}


PEERS = both_layouts(library_composition)
ROWS = (
    *rows_of("conv_projection", SHAPES, make_inputs, make_arguments, PEERS),
    *rows_of("depthwise_separable_conv", SHAPES, make_inputs, make_one, {}),
)

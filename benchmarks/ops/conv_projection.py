"""CvT's three projections, compared with the library's convolutions and linear layers, in CvT-13 and CvT-W24.

    python -m benchmarks.ops.conv_projection [--isa avx2] [--threads 2] [--batch 1 8] [--only 384] [--json FILE]

Columns, all timed in turn in one run:
    fastvit         the operator: one reading of the tokens, then three linear layers
    eager           the plain function: tokens to image and back, each step its own pass
    nchw            the library's convolution on NCHW, the norm folded into its weight beforehand, then the linears
    channels-last   the same on a view of the tokens as a channels-last image, without transposes

No ratio is printed for a result that fails the accuracy rule.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import _composed
from benchmarks.ops._composed import converted, convolve, folded, random_norm
from benchmarks.ops._timing import Call
from benchmarks.timing import keep_memory
from fastvit import ops
from fastvit.reference import functional
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


def make_arguments(shape: Shape, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    channels = shape.channels

    def part(stride: int) -> Projection:
        pointwise = torch.randn(channels, channels) / channels**0.5
        return Projection(
            torch.randn(channels, 1, 3, 3) / 3, random_norm(channels), pointwise, torch.randn(channels), stride
        )

    x = torch.randn(batch, shape.prefix_tokens + shape.side**2, channels)
    arguments = {"x": x, "q": part(1), "k": part(2), "v": part(2)}
    return converted(arguments, dtype) | {"grid": (shape.side,) * 2, "prefix_tokens": shape.prefix_tokens}


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Call:
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


CANDIDATES: _composed.Makers = {
    "fastvit": lambda arguments: functools.partial(ops.conv_projection, **arguments),
    "eager": lambda arguments: functools.partial(functional.conv_projection, **arguments),
    "nchw": functools.partial(library_composition, channels_last=False),
    "channels-last": functools.partial(library_composition, channels_last=True),
}
TABLE = _composed.make_table(SHAPES, make_arguments, CANDIDATES)


if __name__ == "__main__":
    keep_memory()
    _composed.main(__doc__, TABLE)

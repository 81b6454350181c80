"""CeiT's whole feed-forward, compared with the library's layers, on the shapes of CeiT tiny, small and base.

    python -m benchmarks.ops.leff [--isa avx2] [--threads 2] [--batch 1 8] [--only small] [--json FILE]

Columns, all timed in turn in one run:
    fastvit         the operator
    eager           the plain function: each step its own pass, tokens to image and back around the convolution
    nchw            every norm folded into the preceding layer beforehand, the library's convolution on NCHW
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


class Shape(NamedTuple):
    """The block of one model, at 224 pixels."""

    name: str
    channels: int
    side: int = 14


SHAPES = (Shape("ceit tiny 192", 192), Shape("ceit small 384", 384), Shape("ceit base 768", 768))


def make_arguments(shape: Shape, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    channels, hidden = shape.channels, 4 * shape.channels
    arguments = {
        "x": torch.randn(batch, 1 + shape.side**2, channels),
        "up_weight": torch.randn(hidden, channels) / channels**0.5,
        "up_bias": torch.randn(hidden),
        "dw_weight": torch.randn(hidden, 1, 3, 3) / 3,
        "dw_bias": torch.randn(hidden),
        "down_weight": torch.randn(channels, hidden) / hidden**0.5,
        "down_bias": torch.randn(channels),
        "up_norm": random_norm(hidden),
        "dw_norm": random_norm(hidden),
        "down_norm": random_norm(channels),
    }
    return converted(arguments, dtype) | {"grid": (shape.side,) * 2}


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Call:
    """The best one can write with the library's layers."""
    grid = arguments["grid"]
    up, middle, down = (
        folded(*(arguments[f"{part}_{what}"] for what in ("weight", "bias", "norm"))) for part in ("up", "dw", "down")
    )

    def run(x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x[:, 1:], *up))
        hidden = convolve(hidden, *middle, grid, 1, channels_last, "gelu")
        return torch.cat((x[:, :1], F.linear(hidden, *down)), dim=1)

    return run


CANDIDATES: _composed.Makers = {
    "fastvit": lambda arguments: functools.partial(ops.leff, **arguments),
    "eager": lambda arguments: functools.partial(functional.leff, **arguments),
    "nchw": functools.partial(library_composition, channels_last=False),
    "channels-last": functools.partial(library_composition, channels_last=True),
}
TABLE = _composed.make_table(SHAPES, make_arguments, CANDIDATES)


if __name__ == "__main__":
    keep_memory()
    _composed.main(__doc__, TABLE)

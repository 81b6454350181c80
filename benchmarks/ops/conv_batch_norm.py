"""Convolution, BatchNorm and activation of an image beside the library's layers, in the stems of CeiT and DeepViT.

    python -m benchmarks.ops.conv_batch_norm [--isa avx2] [--threads 2] [--batch 1 8] [--only ceit] [--json FILE]

Columns, all timed in turn in one run:
    fastvit         the operator, which folds the norm in every call
    eager           the plain function: convolution, norm and activation, each its own pass
    nchw            the library's convolution on NCHW, the norm folded into its weight beforehand
    channels-last   the same in channels-last layout, the image converted in every call

No ratio is printed for a result that fails the accuracy rule.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import _composed
from benchmarks.ops._composed import converted, folded, random_norm
from benchmarks.ops._timing import Call
from benchmarks.timing import keep_memory
from fastvit import ops
from fastvit.reference import functional
from fastvit.reference.functional import activate


class Shape(NamedTuple):
    """One convolution of a model, at 224 pixels."""

    name: str
    side: int
    in_channels: int
    channels: int
    kernel: int
    stride: int
    activation: str | None = None


SHAPES = (
    Shape("ceit 7x7", 224, 3, 32, 7, 2),
    Shape("deepvit 7x7", 224, 3, 64, 7, 2, "relu"),
    Shape("deepvit 3x3", 112, 64, 64, 3, 1, "relu"),
)


def make_arguments(shape: Shape, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    fan_in = shape.in_channels * shape.kernel**2
    arguments = {
        "x": torch.randn(batch, shape.in_channels, shape.side, shape.side),
        "weight": torch.randn(shape.channels, shape.in_channels, shape.kernel, shape.kernel) / fan_in**0.5,
        "bias": None,
        "norm": random_norm(shape.channels),
    }
    options = {"stride": shape.stride, "padding": shape.kernel // 2, "activation": shape.activation}
    return converted(arguments, dtype) | options


def library_composition(arguments: dict[str, Any], layout: torch.memory_format) -> Call:
    """The best one can write with the library's convolution in the given layout."""
    weight, bias = folded(arguments["weight"], arguments["bias"], arguments["norm"])
    weight = weight.contiguous(memory_format=layout)
    stride, padding, activation = (arguments[name] for name in ("stride", "padding", "activation"))

    def run(x: Tensor) -> Tensor:
        return activate(F.conv2d(x.contiguous(memory_format=layout), weight, bias, stride, padding), activation)

    return run


CANDIDATES: _composed.Makers = {
    "fastvit": lambda arguments: functools.partial(ops.conv_batch_norm, **arguments),
    "eager": lambda arguments: functools.partial(functional.conv_batch_norm, **arguments),
    "nchw": functools.partial(library_composition, layout=torch.contiguous_format),
    "channels-last": functools.partial(library_composition, layout=torch.channels_last),
}
TABLE = _composed.make_table(SHAPES, make_arguments, CANDIDATES)


if __name__ == "__main__":
    keep_memory()
    _composed.main(__doc__, TABLE)

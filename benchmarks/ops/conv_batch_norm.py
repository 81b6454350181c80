"""Convolution, BatchNorm and activation of an image, in the stems of CeiT and DeepViT."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import both_layouts, folded, random_norm, rows_of
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


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(batch, shape.in_channels, shape.side, shape.side).to(dtype),)


def make_arguments(shape: Shape, batch: int) -> dict[str, Any]:
    fan_in = shape.in_channels * shape.kernel**2
    return {
        "weight": torch.randn(shape.channels, shape.in_channels, shape.kernel, shape.kernel) / fan_in**0.5,
        "bias": None,
        "norm": random_norm(shape.channels),
        "stride": shape.stride,
        "padding": shape.kernel // 2,
        "activation": shape.activation,
    }


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Any:
    """The best one can write with the library's convolution in the given layout."""
    weight, bias = folded(arguments["weight"], arguments["bias"], arguments["norm"])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.contiguous(memory_format=layout)
    stride, padding, activation = (arguments[name] for name in ("stride", "padding", "activation"))

    def run(x: Tensor) -> Tensor:
        return activate(F.conv2d(x.contiguous(memory_format=layout), weight, bias, stride, padding), activation)

    return run


PEERS = both_layouts(library_composition)
ROWS = rows_of("conv_batch_norm", SHAPES, make_inputs, make_arguments, PEERS)

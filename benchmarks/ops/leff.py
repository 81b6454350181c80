"""CeiT's whole feed-forward, tiny, small and base, beside the library's layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import both_layouts, convolve, folded, random_norm, rows_of


class Shape(NamedTuple):
    """The block of one model, at 224 pixels."""

    name: str
    channels: int
    side: int = 14


SHAPES = (Shape("ceit tiny 192", 192), Shape("ceit small 384", 384), Shape("ceit base 768", 768))


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 1 + shape.side**2, shape.channels).to(dtype),)


def make_arguments(shape: Shape, batch: int) -> dict[str, Any]:
    channels, hidden = shape.channels, 4 * shape.channels
    return {
        "up_weight": torch.randn(hidden, channels) / channels**0.5,
        "up_bias": torch.randn(hidden),
        "dw_weight": torch.randn(hidden, 1, 3, 3) / 3,
        "dw_bias": torch.randn(hidden),
        "down_weight": torch.randn(channels, hidden) / hidden**0.5,
        "down_bias": torch.randn(channels),
        "up_norm": random_norm(hidden),
        "dw_norm": random_norm(hidden),
        "down_norm": random_norm(channels),
        "grid": (shape.side, shape.side),
    }


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Any:
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


PEERS = both_layouts(library_composition)
ROWS = rows_of("leff", SHAPES, make_inputs, make_arguments, PEERS)

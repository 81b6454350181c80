"""Token depthwise convolution of CPVT, CeiT and CvT, beside the library's and a copy of its input, which is a floor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import Maker, both_layouts, folded, random_norm, rows_of
from fastvit.reference.functional import activate


class Shape(NamedTuple):
    """One use of the operator in a model."""

    name: str
    side: int
    channels: int
    stride: int = 1
    norm: bool = False
    leff: bool = False  # norm and GELU on both sides
    residual: bool = False


SHAPES = (
    *(Shape(f"cpvt PEG {channels}", 14, channels, residual=True) for channels in (192, 384, 768)),
    *(Shape(f"ceit depthwise {channels}", 14, channels) for channels in (768, 1536, 3072)),
    *(Shape(f"ceit LeFF middle {channels}", 14, channels, leff=True) for channels in (768, 1536, 3072)),
    *(
        Shape(f"cvt {channels} stride {stride}", side, channels, stride, norm=True)
        for side, channels in ((56, 64), (28, 192), (14, 384))
        for stride in (1, 2)
    ),
)


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(batch, shape.side**2, shape.channels).to(dtype),)


def make_arguments(shape: Shape, batch: int) -> dict[str, Any]:
    activation, channels = "gelu" if shape.leff else None, shape.channels
    return {
        "weight": torch.randn(channels, 1, 3, 3) / 3,
        "bias": None if shape.norm else torch.randn(channels),
        "grid": (shape.side, shape.side),
        "stride": shape.stride,
        "pre_norm": random_norm(channels) if shape.leff else None,
        "pre_activation": activation,
        "norm": random_norm(channels) if shape.leff or shape.norm else None,
        "activation": activation,
        "residual": shape.residual,
    }


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Any:
    """The best one can write with the library's convolution in the given layout; parameters are prepared beforehand."""
    (h, w), channels = arguments["grid"], arguments["weight"].shape[0]
    weight, bias, norm = (arguments[name] for name in ("weight", "bias", "norm"))
    if norm is not None:
        weight, bias = folded(weight, bias, norm)
    pre_norm, padding = arguments["pre_norm"], arguments["weight"].shape[-1] // 2

    def run(x: Tensor) -> Tensor:
        image = x.view(-1, h, w, channels).permute(0, 3, 1, 2)
        if not channels_last:
            image = image.contiguous()
        inner = pre_norm(image) if pre_norm is not None else image
        inner = activate(inner, arguments["pre_activation"])
        out = F.conv2d(inner, weight, bias, arguments["stride"], padding, groups=channels)
        out = activate(out, arguments["activation"])
        if arguments["residual"]:
            out = out + image
        return out.flatten(2).transpose(1, 2).contiguous()

    return run


def copied(arguments: dict[str, Any]) -> Any:
    """A copy of x into an existing tensor."""
    kept: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        kept[:] = kept or [torch.empty_like(x)]
        return kept[0].copy_(x)

    return run


PEERS: dict[str, Maker] = {**both_layouts(library_composition), "copy": copied}
ROWS = rows_of("token_depthwise_conv", SHAPES, make_inputs, make_arguments, PEERS, floors=("copy",))

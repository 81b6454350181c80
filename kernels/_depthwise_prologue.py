"""A depthwise convolution fused into the prologue of a GEMM: the convolution in registers, and the configurations.

A program computes the GEMM's left operand [BLOCK_M tokens, BLOCK_K channels] itself: k * k shifted tiles of the grid,
all but the first from the L1 cache, times their taps. That takes as long as the multiplication, so a program should
cover the whole width of the output: a second, narrower accumulator makes widths of 192 and 384 from powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import load_norm, load_vector
from torch import Tensor

FOLD_BLOCK = 128
"""Channels per program of the kernels that fold an epilogue."""


class Epilogue(NamedTuple):
    """The epilogue of a GEMM or convolution: bias, then BatchNorm with given statistics; no norm where var is None."""

    bias: Tensor | None
    weight: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float

    @classmethod
    def of(cls, arguments: Any, name: str) -> Epilogue:
        """That of the layer ``name`` among an operator's arguments."""
        fields = ("bias", "norm_weight", "norm_bias", "norm_mean", "norm_var", "norm_eps")
        return cls(*(getattr(arguments, f"{name}_{field}") for field in fields))


class Config(NamedTuple):
    """A launch configuration: tile sizes, warps, pipeline stages; block_n2 is the second accumulator's width, or 0."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_n2: int = 0

    def options(self) -> dict[str, int]:
        """The launch options of every kernel with this tiling, which is all of it where block_n2 is 0."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By kind of product (see product_kind). The first of a row fits every GPU without spills and within 99 kB of shared
# memory (64 kB on gfx942); the others fit the GPUs that `choose_configs` gives them to. tests/kernels checks that.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "half": (Config(32, 64, 16, 4, 1), Config(64, 128, 16, 8, 2, 64), Config(64, 256, 32, 8, 2, 128)),
    "tf32": (Config(32, 64, 16, 4, 1), Config(32, 128, 16, 8, 1, 64)),
    "ieee": (Config(32, 64, 16, 4, 1),),
}
"""For aligned rows, narrow ones first. The second is for NVIDIA, the third for compute capability 9 and later."""

AMD_CONFIG = Config(16, 128, 16, 4, 1, 64)
"""The second candidate of "half" on gfx942."""

IRREGULAR_CONFIG = Config(32, 32, 16, 8, 1)
"""For rows loaded element by element: one address per element costs registers."""


def choose_configs(product: str, width: int, *, regular: bool, chip: int) -> tuple[Config, ...]:
    """The candidates for a GEMM with a convolution in its prologue, wide ones first: they convolve an input less often.

    Args:
        product: the kind of product.
        width: output channels. Candidates wider than these are dropped, except for the narrowest.
        regular: whether all tensors have aligned rows.
        chip: the major compute capability, 0 for AMD.
    """
    if not regular:
        return (IRREGULAR_CONFIG,)
    narrowest, *others = CONFIGS[product]
    if chip == 0:
        others = [AMD_CONFIG] if product == "half" else []
    elif chip < 9:
        others = others[:1]
    return (*(config for config in reversed(others) if config.block_n < width), narrowest)


@triton.jit
def weight_tile(weight, first_row, first_column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transposed tile [COLUMNS, ROWS] of a contiguous (num_rows, num_columns) matrix, zeros out of bounds."""
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    return tl.load(weight + rows[None, :] * num_columns + columns[:, None], mask=inside, other=0)


@triton.jit
def scale_and_offset(epilogue, first, size, BLOCK: tl.constexpr):
    """The epilogue of BLOCK channels from first on, as result * scale + offset."""
    bias = load_vector(epilogue.bias, first, size, BLOCK)
    center, scale, shift = load_norm(
        epilogue.mean, epilogue.var, epilogue.weight, epilogue.shift, epilogue.eps, first, size, BLOCK
    )  # fmt: skip
    return scale, (bias - center) * scale + shift


@triton.jit
def fold_taps(taps, epilogue, folded, first, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Fold the epilogue into BLOCK channels' taps: TAPS rows of scaled taps, then a row of offsets."""
    channels = first + tl.arange(0, BLOCK)
    within = channels < C
    scale, offset = scale_and_offset(epilogue, first, C, BLOCK)
    for tap in range(TAPS):
        value = tl.load(taps + channels * TAPS + tap, mask=within, other=0).to(tl.float32)
        tl.store(folded + tap * C + channels, value * scale, mask=within)
    tl.store(folded + TAPS * C + channels, offset, mask=within)


@triton.jit
def depthwise_tile(
    tokens,
    token_stride,
    folded,
    origin,
    row,
    column,
    height,
    width,
    first_channel,
    C,
    PADDING: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """norm(depthwise(tokens)) as [BLOCK_M, BLOCK_K channels] float32, by folded taps.

    Args:
        origin: [BLOCK_M], element offsets of the tokens at (row, column).
        row, column: [BLOCK_M], the grid position under tap (PADDING, PADDING) of each window; row is negative where
            there is no window.
    """
    channels = first_channel + tl.arange(0, BLOCK_K)
    within = channels < C
    offset = load_vector(folded + KERNEL * KERNEL * C, first_channel, C, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32) + offset[None, :]
    for dy in tl.static_range(KERNEL):
        for dx in tl.static_range(KERNEL):
            tap = load_vector(folded + (dy * KERNEL + dx) * C, first_channel, C, BLOCK_K)
            y, z = row + (dy - PADDING), column + (dx - PADDING)
            inside = (row >= 0) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            offsets = origin + ((dy - PADDING) * width + (dx - PADDING)) * token_stride
            inside = inside[:, None] & within[None, :]
            tile = tl.load(tokens + (offsets[:, None] + channels[None, :]), mask=inside, other=0)
            acc += tile.to(tl.float32) * tap[None, :]
    return acc


def chip() -> int:
    """The current GPU's major compute capability, 0 for AMD; 8 without a GPU."""
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 8

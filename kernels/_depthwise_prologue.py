"""What kernels with a depthwise convolution in front of a product share: the convolution in registers, and the tiles.

A program makes the product's left operand [BLOCK_M tokens, BLOCK_K channels] itself: k * k shifted tiles of the map,
of which all but the first come from the L1 cache, times their taps. Making it costs as much as multiplying it, so a
program is to be as wide as the output: a second, narrower accumulator makes widths of 192 and 384 out of powers of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import load_norm, load_vector
from torch import Tensor

FOLD_BLOCK = 128


class Behind(NamedTuple):
    """What stands behind a product or the convolution: a bias, then a BatchNorm, of which var is None where none is."""

    bias: Tensor | None
    weight: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


class Config(NamedTuple):
    """How one launch is cut: tile sizes, warps and loop stages; block_n2 is the second accumulator's width or 0."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_n2: int = 0


# Keyed by what is multiplied ("half": float16 and bfloat16 on tensor cores, "tf32": float32 on tensor cores, "ieee":
# float32 on the plain units). The first of a row fits every chip without spills and within 99 kB of shared memory (64
# kB on gfx942); the others those that `choose_contract` gives them to. tests/kernels holds them to that.
CONTRACT: dict[str, tuple[Config, ...]] = {
    "half": (Config(32, 64, 16, 4, 1), Config(64, 128, 16, 8, 2, 64), Config(64, 256, 32, 8, 2, 128)),
    "tf32": (Config(32, 64, 16, 4, 1), Config(32, 128, 16, 8, 1, 64)),
    "ieee": (Config(32, 64, 16, 4, 1),),
}
"""Aligned rows, narrow first. The second of a row is for NVIDIA, the third for its compute capability 9 and later."""

CONTRACT_AMD = Config(16, 128, 16, 4, 1, 64)
"""What gfx942 takes beside the first of "half"."""

CONTRACT_IRREGULAR = Config(32, 32, 16, 8, 1)
"""Rows read element by element: one address per element takes registers."""


def choose_contract(product: str, width: int, *, regular: bool, chip: int) -> tuple[Config, ...]:
    """The candidates for a product with a convolution in front.

    Args:
        width: output channels. Wider than they are is of no use, but for the narrowest candidate.
        regular: whether rows start on 16 bytes and hold a multiple of 16 elements.
        chip: compute capability's major number, 0 for AMD.
    """
    if not regular:
        return (CONTRACT_IRREGULAR,)
    first, *others = CONTRACT[product]
    if chip == 0:
        others = [CONTRACT_AMD] if product == "half" else []
    elif chip < 9:
        others = others[:1]
    return (first, *(config for config in others if config.block_n < width))


@triton.jit
def weight_tile(weight, first_row, first_column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transposed tile [COLUMNS, ROWS] of a contiguous (num_rows, num_columns) matrix, zeros outside."""
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    return tl.load(weight + rows[None, :] * num_columns + columns[:, None], mask=inside, other=0)


@triton.jit
def scale_and_offset(behind, first, size, BLOCK: tl.constexpr):
    """What stands behind a result, of BLOCK channels from first on, as result * scale + offset."""
    bias = load_vector(behind.bias, first, size, BLOCK)
    center, scale, shift = load_norm(
        behind.mean, behind.var, behind.weight, behind.shift, behind.eps, first, size, BLOCK
    )  # fmt: skip
    return scale, (bias - center) * scale + shift


@triton.jit
def fold_taps(taps, behind, folded, first, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """The first TAPS + 1 rows of folded: BLOCK channels' taps with the scale behind them in, and the offset."""
    channels = first + tl.arange(0, BLOCK)
    within = channels < C
    scale, offset = scale_and_offset(behind, first, C, BLOCK)
    for tap in range(TAPS):
        value = tl.load(taps + channels * TAPS + tap, mask=within, other=0).to(tl.float32)
        tl.store(folded + tap * C + channels, value * scale, mask=within)
    tl.store(folded + TAPS * C + channels, offset, mask=within)


@triton.jit
def convolved(
    tokens,
    step,
    folded,
    corner,
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
    """norm(depthwise(tokens)) [BLOCK_M, BLOCK_K channels] in float32, of folded taps.

    Args:
        step: from one token to the next.
        corner: pointer offsets of the tokens under the windows' middle, or with PADDING 0 under their first taps.
        row, column: the places of those tokens in the grid, row negative where there is none.
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
            place = corner + ((dy - PADDING) * width + (dx - PADDING)) * step
            inside = inside[:, None] & within[None, :]
            tile = tl.load(tokens + (place[:, None] + channels[None, :]), mask=inside, other=0)
            acc += tile.to(tl.float32) * tap[None, :]
    return acc


def is_regular(*tensors: Tensor) -> bool:
    """Whether Triton can see that every row of every tensor starts on 16 bytes, and reads them in pieces of that."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[-1] % 16 == 0 and all(s % 16 == 0 for s in tensor.stride()[:-1])
        for tensor in tensors
    )


def chip() -> int:
    """Compute capability's major number, 0 for AMD."""
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 8

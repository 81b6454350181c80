"""Pieces that more than one kernel is made of.

Offsets inside a tile are 32-bit, the place of the tile is 64-bit: no tensor is too large, and addresses stay cheap.
:func:`with_small_strides` sees to it that a tile's offsets fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x * LOG2_E), and GPUs have an instruction for exp2 only."""

LARGEST_TILE = 256
"""No tile of any kernel has a longer side."""


@triton.jit
def load_tile(
    matrix,
    first_row,
    first_column,
    num_rows,
    num_columns,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr = False,
):
    """The tile [ROWS, COLUMNS] at (first_row, first_column) of a (num_rows, num_columns) matrix, zeros outside.

    WHOLE_ROWS: the tile is known to be as wide as the matrix.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (first_row + rows < num_rows)[:, None]
    if not WHOLE_ROWS:
        inside = inside & (first_column + columns < num_columns)[None, :]
    tile = matrix + (tl.cast(first_row, tl.int64) * stride_row + tl.cast(first_column, tl.int64) * stride_column)
    return tl.load(tile + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=inside, other=0)


@triton.jit
def store_rows(
    matrix, tile, first_row, num_rows, stride_row, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the tile [ROWS, BLOCK_D] at first_row of a (num_rows, D) matrix with adjacent columns."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (first_row + rows < num_rows)[:, None]
    if BLOCK_D != D:
        inside = inside & (columns < D)[None, :]
    place = matrix + tl.cast(first_row, tl.int64) * stride_row
    tl.store(place + rows[:, None] * stride_row + columns[None, :], tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def load_key_mask(key_mask, first_key, num_keys, stride, KEYS: tl.constexpr):
    """Which of KEYS keys from first_key on are visible, [KEYS]; those behind the last one are not."""
    keys = tl.arange(0, KEYS)
    place = key_mask + tl.cast(first_key, tl.int64) * stride
    return tl.load(place + keys * stride, mask=first_key + keys < num_keys, other=0) != 0


@triton.jit
def visible_range(key_mask, num_keys, stride, BLOCK: tl.constexpr):
    """First visible key and one past the last of a key padding mask; an empty range where every key is masked."""
    first = num_keys
    end = 0
    for start in range(0, num_keys, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        visible = load_key_mask(key_mask, start, num_keys, stride, BLOCK)
        first = tl.minimum(first, tl.min(tl.where(visible, keys, num_keys), axis=0))
        end = tl.maximum(end, tl.max(tl.where(visible, keys + 1, 0), axis=0))
    return first, end


def with_small_strides(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where an offset inside one tile would pass 2^31 (a view of millions of columns).

    ValueError where the copy would as well.
    """
    if LARGEST_TILE * sum(tensor.stride()[-2:]) < 2**31:
        return tensor
    copy = tensor.contiguous()
    if LARGEST_TILE * sum(copy.stride()[-2:]) >= 2**31:
        raise ValueError(f"tensor: got shape {tuple(tensor.shape)}, accepted are last axes under 8 million elements")
    return copy


def product_kind(dtype: torch.dtype) -> str:
    """Which product a dtype takes: "half", or for float32 "tf32" where PyTorch's CUDA setting allows it, else "ieee".

    ``fp32_precision`` can be read whichever of its ways PyTorch was told by; ``allow_tf32`` raises after the new one.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

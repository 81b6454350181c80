"""What kernels of several operators share.

Offsets within a tile are 32-bit, the offset of the tile is 64-bit: tensors may be of any size, and address arithmetic
stays cheap. :func:`with_small_strides` makes sure that the offsets within a tile fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_MASK, KEY_MASK, FULL_MASK = 0, 1, 2
"""How an attention mask is read: not at all, one row for all queries, or a tile of (queries, keys)."""

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) is exp2(x * LOG2_E): GPUs compute exp2, and Triton compiles it, unlike exp, without care for denormals."""

MAX_TILE_SIDE = 256
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
    wanted=None,
):
    """The tile [ROWS, COLUMNS] at (first_row, first_column) of a (num_rows, num_columns) matrix, zeros out of bounds.

    WHOLE_ROWS: the tile is exactly as wide as the matrix. ``wanted``: [ROWS], where other rows are to be zeros; False
    out of bounds.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    tile = matrix + (tl.cast(first_row, tl.int64) * stride_row + tl.cast(first_column, tl.int64) * stride_column)
    pointers = tile + rows[:, None] * stride_row + columns[None, :] * stride_column
    inside = first_row + rows < num_rows
    if wanted is not None:
        inside = wanted
    if WHOLE_ROWS:
        values = tl.load(pointers, mask=inside[:, None], other=0)
    else:
        values = tl.load(pointers, mask=inside[:, None] & (first_column + columns < num_columns)[None, :], other=0)
    return values


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
    """Whether each of the KEYS keys from first_key on is visible, [KEYS]; False out of bounds."""
    keys = tl.arange(0, KEYS)
    place = key_mask + tl.cast(first_key, tl.int64) * stride
    return tl.load(place + keys * stride, mask=first_key + keys < num_keys, other=0) != 0


@triton.jit
def _joined(first, end, count, other_first, other_end, other_count):
    return tl.minimum(first, other_first), tl.maximum(end, other_end), count + other_count


@triton.jit
def _range_of(visible, first_key, num_keys, BLOCK: tl.constexpr):
    """The same of BLOCK keys; all three in one reduction."""
    keys = first_key + tl.arange(0, BLOCK)
    found = (tl.where(visible, keys, num_keys), tl.where(visible, keys + 1, 0), visible.to(tl.int32))
    return tl.reduce(found, 0, _joined)


@triton.jit
def visible_range(key_mask, num_keys, stride, BLOCK: tl.constexpr, visible=None):
    """(first visible key, last + 1, number of visible keys) of a key padding mask; an empty range where none is.

    ``visible``: the first BLOCK keys by :func:`load_key_mask`, where they were loaded ahead.
    """
    if visible is None:
        visible = load_key_mask(key_mask, 0, num_keys, stride, BLOCK)
    first, end, count = _range_of(visible, 0, num_keys, BLOCK)
    for start in range(BLOCK, num_keys, BLOCK):
        more = load_key_mask(key_mask, start, num_keys, stride, BLOCK)
        other_first, other_end, other_count = _range_of(more, start, num_keys, BLOCK)
        first, end, count = _joined(first, end, count, other_first, other_end, other_count)
    return first, end, count


@triton.jit
def finite_maximum(row_max):
    """The row maximum, or 0 for a row without visible keys: exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def inverse_of_sum(row_sum):
    """1 / row_sum, or 0 for a row without visible keys."""
    return tl.where(row_sum == 0.0, 0.0, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))


def with_small_strides(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where offsets within a tile would exceed 2^31 (a view of millions of columns).

    ValueError where those of the copy would, too.
    """
    if MAX_TILE_SIDE * sum(tensor.stride()[-2:]) < 2**31:
        return tensor
    copy = tensor.contiguous()
    if MAX_TILE_SIDE * sum(copy.stride()[-2:]) >= 2**31:
        raise ValueError(f"tensor: expected a last axis under 8 million elements, got shape {tuple(tensor.shape)}")
    return copy


def has_aligned_rows(*tensors: Tensor) -> bool:
    """Whether Triton can prove that all rows are whole, aligned 16-byte vectors, and so loads them as such."""
    return all(
        tensor.stride(-1) == 1
        and tensor.shape[-1] % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and all(stride % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def empty_heads_last(like: Tensor, num_tokens: int) -> Tensor:
    """An uninitialised (B, H, num_tokens, D) with the strides of a contiguous (B, num_tokens, H, D)."""
    batch, heads, _, head_dim = like.shape
    return torch.empty((batch, num_tokens, heads, head_dim), dtype=like.dtype, device=like.device).transpose(1, 2)


def product_kind(dtype: torch.dtype) -> str:
    """How matrix products of a dtype are computed, which the tables of configurations are keyed by.

    "half": float16 or bfloat16 on tensor cores; "tf32": float32 on tensor cores, where PyTorch's setting allows it;
    "ieee": true float32. The setting is read as ``fp32_precision``: ``allow_tf32`` raises once the other was assigned.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def input_precision(product: str) -> str:
    """``input_precision`` of ``tl.dot`` for a kind of product; it affects float32 operands only."""
    return "tf32" if product == "tf32" else "ieee"

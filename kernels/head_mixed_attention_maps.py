"""Tiles of the attention maps of all heads: what the kernels of head-mixed attention share.

A mix couples the heads at every (query, key), so a program holds the same tile of every head's map:

    S_g = scale * q_g k_g^T;  S'_h = sum_g pre_weight[h, g] S_g + pre_bias[h];  P_h = softmax(S'_h)

as one tensor [SLOTS, BLOCK_M, BLOCK_N]: a batched product over the slots gives S, and a mix is the product
[SLOTS, SLOTS] x [SLOTS, BLOCK_M * BLOCK_N].

Slots: a tensor core instruction has 16 rows, which few heads do not fill. So the slots hold groups of all heads
(padded to a power of two), each for different queries of the same batch element, or for different keys in the kernels
that loop over queries. Four heads fill 16 slots with four blocks of queries; the matrix of the mix is then block
diagonal. Above 16 heads there is one group. Everything out of bounds, padded heads included, is loaded as zero.

The softmax takes two passes: :func:`row_statistics_kernel` computes the maximum and the reciprocal sum of each row,
from S alone; with these every other kernel computes normalised tiles of P, in any order. A row without visible keys has
the reciprocal 0, which makes its P zero.

Inputs are multiplied in their own dtype (float32 as true float32, or TF32 where PyTorch's setting allows it); maps are
float32, mixed in TF32 unless products are to be exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from fastvit.kernels._primitives import LOG2_E, finite_maximum, inverse_of_sum


class Heads(NamedTuple):
    """A (B, H, N, D) tensor with columns of stride 1."""

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any


class Mask(NamedTuple):
    """A mask broadcast to (B, H, Nq, Nk), most strides of which are usually 0."""

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_q: Any
    stride_k: Any


class Mixes(NamedTuple):
    """The parameters before and after the softmax, contiguous (H, H) or (H), None where absent; and the scalars."""

    pre_weight: Any
    pre_bias: Any
    post_weight: Any
    post_bias: Any
    norm_weight: Any
    norm_bias: Any
    norm_eps: Any
    output_scale: Any
    scale: Any
    centre: Any


class Rows(NamedTuple):
    """Statistics of each row of the maps, contiguous (B, H, Nq) float32."""

    maximum: Any
    inverse: Any
    lse: Any
    """log2 of the sum of exp2 of base-2 logits, less the part of pre_bias."""
    delta: Any


class Plan(NamedTuple):
    """The compile-time settings of a kernel: sizes, tiles, and the steps there are."""

    heads: int
    head_dim: int
    """Columns of the result."""
    padded_dim: int
    """Columns of operands: a multiple of 16, so that rows are whole vectors."""
    padded_heads: int
    slots: int
    block_m: int
    """Queries per slot in a tile."""
    block_n: int
    """Keys per slot in a tile."""
    depth: int
    """Columns of a tile of q or k: products over the head dimension loop over such tiles."""
    resident: bool
    """Whether loop-invariant operands such as q stay in registers; else each iteration reloads them."""
    block_out: int
    """Columns of the result per program."""
    block_rest: int
    """The columns behind these, in the same program; 0: there are none, or other programs compute them."""
    spread_keys: bool
    """Whether groups of slots hold different keys instead of different queries."""
    mask_kind: int
    pre_mix: bool
    post_mix: bool
    layer_norm: bool
    exact: bool
    """Whether all products are in true float32, whatever the operands' dtype; these take tiles of any size."""
    precision: str
    mix_precision: str


@triton.jit
def heads_of(PLAN: tl.constexpr):
    """The head of each slot, [SLOTS]."""
    return tl.arange(0, PLAN.slots) % PLAN.padded_heads


@triton.jit
def rows_of(first, ROWS: tl.constexpr, SPREAD: tl.constexpr, PLAN: tl.constexpr):
    """The rows of each slot, counted from the program's first, [SLOTS, ROWS]; SPREAD: groups have different ones."""
    group = tl.arange(0, PLAN.slots) // PLAN.padded_heads
    return first + group[:, None] * (ROWS if SPREAD else 0) + tl.arange(0, ROWS)[None, :]


@triton.jit
def batch_entry(tensor, b, head=0):
    """Batch element b of Heads, from a head on."""
    pointer = tensor.pointer + tl.cast(b, tl.int64) * tensor.stride_b + tl.cast(head, tl.int64) * tensor.stride_h
    return Heads(pointer, tensor.stride_b, tensor.stride_h, tensor.stride_n)


@triton.jit
def batch_entry_of_mask(mask, b, head, PLAN: tl.constexpr):
    """Batch element b of a Mask, from a head on."""
    element = mask
    if PLAN.mask_kind != 0:
        pointer = mask.pointer + tl.cast(b, tl.int64) * mask.stride_b + tl.cast(head, tl.int64) * mask.stride_h
        element = Mask(pointer, mask.stride_b, mask.stride_h, mask.stride_q, mask.stride_k)
    return element


@triton.jit
def _row_pointers(tensor, first, ROWS: tl.constexpr, SPREAD: tl.constexpr, PLAN: tl.constexpr):
    """Pointers to the rows of a tile, [SLOTS, ROWS]: 64-bit offsets of tile and head, 32-bit ones within."""
    tile = tensor.pointer + tl.cast(first, tl.int64) * tensor.stride_n
    heads = tile + heads_of(PLAN).to(tl.int64) * tensor.stride_h
    return heads[:, None] + rows_of(0, ROWS, SPREAD, PLAN) * tensor.stride_n


@triton.jit
def _inside(
    first, num_rows, first_column, num_columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile of Heads are in bounds; broadcasts to [SLOTS, ROWS, COLUMNS]."""
    rows = rows_of(first, ROWS, SPREAD, PLAN)
    inside = ((rows < num_rows) & (heads_of(PLAN) < PLAN.heads)[:, None])[:, :, None]
    if num_columns % COLUMNS != 0:
        inside = inside & (first_column + tl.arange(0, COLUMNS) < num_columns)[None, None, :]
    return inside


@triton.jit
def load_heads(
    tensor,
    first,
    num_rows,
    first_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr,
    PLAN: tl.constexpr,
):
    """The tile [SLOTS, ROWS, COLUMNS] of operands (H, num_rows, padded D), zeros out of bounds.

    SPREAD: groups of slots hold different rows.
    """
    pointers = _row_pointers(tensor, first, ROWS, SPREAD, PLAN)[:, :, None]
    inside = _inside(first, num_rows, first_column, PLAN.padded_dim, ROWS, COLUMNS, SPREAD, PLAN)
    tile = tl.load(pointers + (first_column + tl.arange(0, COLUMNS))[None, None, :], mask=inside, other=0)
    return tile.to(tl.float32) if PLAN.exact else tile


@triton.jit
def load_queries(tensor, first, num_queries, first_column, COLUMNS: tl.constexpr, PLAN: tl.constexpr):
    """The tile [SLOTS, BLOCK_M, COLUMNS] of q, or of a gradient of its shape."""
    return load_heads(tensor, first, num_queries, first_column, PLAN.block_m, COLUMNS, not PLAN.spread_keys, PLAN)


@triton.jit
def load_keys(tensor, first, num_keys, first_column, COLUMNS: tl.constexpr, PLAN: tl.constexpr):
    """The tile [SLOTS, BLOCK_N, COLUMNS] of k or v."""
    return load_heads(tensor, first, num_keys, first_column, PLAN.block_n, COLUMNS, PLAN.spread_keys, PLAN)


@triton.jit
def store_heads(
    tensor, tile, first, num_rows, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLAN: tl.constexpr
):
    """Write a tile [SLOTS, ROWS, BLOCK_OUT] whose groups hold different rows."""
    pointers = _row_pointers(tensor, first, ROWS, True, PLAN)[:, :, None]
    inside = _inside(first, num_rows, first_column, PLAN.head_dim, ROWS, COLUMNS, True, PLAN)
    values = tile.to(tensor.pointer.dtype.element_ty)
    tl.store(pointers + (first_column + tl.arange(0, COLUMNS))[None, None, :], values, mask=inside)


@triton.jit
def _row_offsets(b, first_query, num_queries, num_heads, first_head, PLAN: tl.constexpr):
    """Offsets of a tile's rows in a contiguous (B, num_heads, num_queries), and which exist; [SLOTS, BLOCK_M]."""
    queries = rows_of(first_query, PLAN.block_m, not PLAN.spread_keys, PLAN)
    heads = heads_of(PLAN)[:, None]
    offsets = (b.to(tl.int64) * num_heads + first_head + heads) * num_queries + queries
    return offsets, (queries < num_queries) & (heads < PLAN.heads)


@triton.jit
def load_row_statistics(values, b, first_query, num_queries, PLAN: tl.constexpr):
    """One number per row of a tile's maps, [SLOTS, BLOCK_M], zeros out of bounds."""
    offsets, inside = _row_offsets(b, first_query, num_queries, PLAN.heads, 0, PLAN)
    return tl.load(values + offsets, mask=inside, other=0)


@triton.jit
def store_row_statistics(values, tile, b, first_query, num_queries, num_heads, first_head, PLAN: tl.constexpr):
    """Write one number per row of a tile's maps, [SLOTS, BLOCK_M]."""
    offsets, inside = _row_offsets(b, first_query, num_queries, num_heads, first_head, PLAN)
    tl.store(values + offsets, tile, mask=inside)


@triton.jit
def opaque_zero(first_query, first_key, PLAN: tl.constexpr):
    """0, to be added to the addresses of loop-invariant operands.

    Unless these are to stay in registers, it is a 0 that the compiler cannot see through, so that it reloads them from
    the cache in each iteration.
    """
    zero = 0
    if not PLAN.resident:
        zero = tl.minimum(tl.minimum(first_query, first_key), 0)
    return zero


@triton.jit
def load_per_head(vector, zero, DEFAULT: tl.constexpr, PLAN: tl.constexpr):
    """An (H) vector by slot, [SLOTS] float32, zero for padded heads; DEFAULT everywhere for None."""
    SLOTS: tl.constexpr = PLAN.slots
    values = tl.full([SLOTS], DEFAULT, tl.float32)
    if vector is not None:
        heads = heads_of(PLAN)
        values = tl.load(vector + zero + heads, mask=heads < PLAN.heads, other=0).to(tl.float32)
    return values


@triton.jit
def load_mix(weight, zero, TRANSPOSED: tl.constexpr, PLAN: tl.constexpr):
    """An (H, H) matrix by slots, [SLOTS, SLOTS] float32: block diagonal, as groups do not mix."""
    heads = heads_of(PLAN)
    groups = tl.arange(0, PLAN.slots) // PLAN.padded_heads
    inside = (heads < PLAN.heads)[:, None] & (heads < PLAN.heads)[None, :] & (groups[:, None] == groups[None, :])
    if TRANSPOSED:
        offsets = heads[:, None] + heads[None, :] * PLAN.heads
    else:
        offsets = heads[:, None] * PLAN.heads + heads[None, :]
    return tl.load(weight + zero + offsets, mask=inside, other=0).to(tl.float32)


@triton.jit
def mix(weight, maps, PLAN: tl.constexpr):
    """sum_g weight[h, g] maps[g] for maps [SLOTS, ROWS, COLUMNS]."""
    flat = tl.reshape(maps, [maps.shape[0], maps.shape[1] * maps.shape[2]])
    return tl.reshape(tl.dot(weight, flat, input_precision=PLAN.mix_precision), maps.shape)


@triton.jit
def _add_products(sums, a, b, first_query, num_queries, first_key, num_keys, column, PLAN: tl.constexpr):
    rows = load_queries(a, first_query, num_queries, column, PLAN.depth, PLAN)
    keys = load_keys(b, first_key, num_keys, column, PLAN.depth, PLAN)
    return tl.dot(rows, tl.permute(keys, (0, 2, 1)), sums, input_precision=PLAN.precision)


@triton.jit
def products(a, b, first_query, num_queries, first_key, num_keys, PLAN: tl.constexpr):
    """a_h b_h^T, [SLOTS, BLOCK_M, BLOCK_N] float32; a has a row per query, b a row per key."""
    SLOTS: tl.constexpr = PLAN.slots
    BLOCK_M: tl.constexpr = PLAN.block_m
    BLOCK_N: tl.constexpr = PLAN.block_n
    D: tl.constexpr = PLAN.padded_dim
    DEPTH: tl.constexpr = PLAN.depth
    sums = tl.zeros([SLOTS, BLOCK_M, BLOCK_N], tl.float32)
    if PLAN.resident:
        for column in tl.static_range(0, D, DEPTH):
            sums = _add_products(sums, a, b, first_query, num_queries, first_key, num_keys, column, PLAN)
    else:
        for column in range(0, D, DEPTH):
            sums = _add_products(sums, a, b, first_query, num_queries, first_key, num_keys, column, PLAN)
    return sums


@triton.jit
def mixed_logits(scores, mixes, zero, PLAN: tl.constexpr):
    """S' from S."""
    logits = scores
    if PLAN.pre_mix:
        weight = load_mix(mixes.pre_weight, zero, False, PLAN)
        logits = mix(weight, scores, PLAN) + load_per_head(mixes.pre_bias, zero, 0.0, PLAN)[:, None, None]
    return logits


@triton.jit
def visible_keys(mask, first_query, num_queries, first_key, num_keys, PLAN: tl.constexpr):
    """Which (query, key) pairs of a tile are visible; broadcasts to [SLOTS, BLOCK_M, BLOCK_N]."""
    keys = rows_of(first_key, PLAN.block_n, PLAN.spread_keys, PLAN)
    inside = keys < num_keys
    if PLAN.mask_kind == 0:
        visible = inside[:, None, :]
    elif PLAN.mask_kind == 1:
        visible = (tl.load(mask.pointer + keys.to(tl.int64) * mask.stride_k, mask=inside, other=0) != 0)[:, None, :]
    else:
        queries = rows_of(first_query, PLAN.block_m, not PLAN.spread_keys, PLAN)
        heads = heads_of(PLAN)
        origin = tl.cast(first_query, tl.int64) * mask.stride_q + tl.cast(first_key, tl.int64) * mask.stride_k
        pointers = mask.pointer + (origin + heads.to(tl.int64) * mask.stride_h)
        rows = ((queries - first_query) * mask.stride_q)[:, :, None]
        columns = ((keys - first_key) * mask.stride_k)[:, None, :]
        known = (queries < num_queries) & (heads < PLAN.heads)[:, None]
        tile = tl.load(pointers[:, None, None] + (rows + columns), mask=known[:, :, None] & inside[:, None, :], other=0)
        visible = tile != 0
    return visible


@triton.jit
def attention_tile(q, k, mask, mixes, rows, b, first_query, num_queries, first_key, num_keys, PLAN: tl.constexpr):
    """S and P of one tile, and which positions are visible."""
    scores = products(q, k, first_query, num_queries, first_key, num_keys, PLAN) * tl.cast(mixes.scale, tl.float32)
    logits = mixed_logits(scores, mixes, opaque_zero(first_query, first_key, PLAN), PLAN)
    visible = visible_keys(mask, first_query, num_queries, first_key, num_keys, PLAN)
    maximum = load_row_statistics(rows.maximum, b, first_query, num_queries, PLAN)[:, :, None]
    inverse = load_row_statistics(rows.inverse, b, first_query, num_queries, PLAN)[:, :, None]
    p = tl.exp2((tl.where(visible, logits, float("-inf")) - maximum) * LOG2_E) * inverse
    return scores, p, visible


@triton.jit
def this_block(num_rows, ROWS: tl.constexpr, PLAN: tl.constexpr):
    """First row of the program's block of queries (or keys), and its batch element, shared by adjacent programs."""
    BLOCK: tl.constexpr = PLAN.slots // PLAN.padded_heads * ROWS
    blocks = tl.cdiv(num_rows, BLOCK)
    return tl.program_id(0) % blocks * BLOCK, tl.program_id(0) // blocks


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def row_statistics_kernel(q, k, mask, mixes, rows, num_heads, num_queries, num_keys, PLAN: tl.constexpr):
    """Maximum and reciprocal sum of the rows of one block of queries, online over tiles of keys.

    Without a pre-mix the heads are independent: PLAN has one head, and program_id(1) is its index among ``num_heads``.
    With one PLAN has all heads.
    """
    SLOTS: tl.constexpr = PLAN.slots
    BLOCK_M: tl.constexpr = PLAN.block_m
    first_query, b = this_block(num_queries, BLOCK_M, PLAN)
    head = tl.program_id(1).to(tl.int64)
    q = batch_entry(q, b, head)
    k = batch_entry(k, b, head)
    mask = batch_entry_of_mask(mask, b, head, PLAN)

    largest = tl.full([SLOTS, BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS, BLOCK_M], tl.float32)
    for first_key in range(0, num_keys, PLAN.block_n):
        scores = products(q, k, first_query, num_queries, first_key, num_keys, PLAN)
        scores *= tl.cast(mixes.scale, tl.float32)
        logits = mixed_logits(scores, mixes, opaque_zero(first_query, first_key, PLAN), PLAN)
        visible = visible_keys(mask, first_query, num_queries, first_key, num_keys, PLAN)
        logits = tl.where(visible, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 2))
        finite = finite_maximum(new_largest)
        rescale = tl.exp2((largest - finite) * LOG2_E)
        total = total * rescale + tl.sum(tl.exp2((logits - finite[:, :, None]) * LOG2_E), 2)
        largest = new_largest
    maximum = finite_maximum(largest)
    store_row_statistics(rows.maximum, maximum, b, first_query, num_queries, num_heads, head, PLAN)
    store_row_statistics(rows.inverse, inverse_of_sum(total), b, first_query, num_queries, num_heads, head, PLAN)
    biases = load_per_head(mixes.pre_bias, 0, 0.0, PLAN)[:, None]
    lse = (maximum - biases) * LOG2_E + tl.log2(total)
    store_row_statistics(rows.lse, lse, b, first_query, num_queries, num_heads, head, PLAN)

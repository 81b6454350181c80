"""Head-mixed attention tile by tile, the log-sum-exp of each row being known: most of a training step.

In Gluon. X_g = P_g - 1 / Nk comes from q and k alone, and with dO the gradient of the result, dM_h = dO_h v_h^T. The
result and the gradient of v are products of the finished maps (:func:`weighted_rows_kernel`). What is summed over all
queries and keys, and what is kept of each row (:func:`row_sums_kernel`):

    products[g, g'] = sum X_g X_g';    d_weight[h, g] = sum dM_h X_g;    d_bias[h] = sum dM_h
    delta_g = sum over a row's keys of P_g dP_g,    dP_g = sum_h weight[h, g] dM_h + sum_g' moments[g, g'] X_g'

where moments is the gradient of products, plus its transpose: batch statistics. As that is known only once d_weight is,
the rows' sums of X_g X_g' are written, and their part of delta is added from these, H x H numbers a row. Then
(:func:`score_gradients_kernel`)

    dS_g = P_g (dP_g - delta_g);    dq_g = scale dS_g k_g;    dk_g = scale dS_g^T q_g

and with a mix in front of the softmax, dS' in the place of dS: dS_g = sum_h pre_weight[h, g] dS'_h and
d_pre_weight[h, g] = sum dS'_h S_g.

A program has 16 rows (queries; keys for dk and dv), all heads, and loops over tiles of 32 columns. Why it looks as it
does:

- A product over a head's columns has its accumulators in the warps that the columns belong to; a mix is a product over
  the heads, [16, 16] x [16, columns] for each row. So X and dM change hands in shared memory once, as [row, head,
  column], where the tensor cores find that operand as well as the one of sums over a row.
- X is in float16, in which it loses less than in bfloat16; dM in the inputs' dtype, since float16 has not its range.
- Row operands (q and dO, for dk k and v) stay in shared memory; column operands go from global memory into registers.
- Shared memory limits, so three programs a multiprocessor, which hide each other's latencies, are worth a few spills.

Sums of the programs are added in a fixed order, without atomics.

Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import LOG2_E
from fastvit.kernels.head_mixed_attention_launch import Problem
from fastvit.kernels.head_mixed_attention_maps import Heads
from fastvit.kernels.head_mixed_attention_whole import (
    index,
    key_layout,
    query_layout,
    result_layout,
    shared_layout,
)
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere

SLOTS = tl.constexpr(16)
"""Heads of a program, padded: the depth of a product on tensor cores."""

COLUMNS = 32
"""Of a tile, unless a kernel has registers and shared memory for 64."""


class Tiles(NamedTuple):
    """The compile-time settings of a kernel.

    "First" are the operands of the logits, "second" those of dM; their strides, in elements, are part of the code.
    """

    heads: int
    head_dim: int
    padded_dim: int
    pre_mix: bool
    gradients: bool
    """Whether there is dM: else X alone, and its products."""
    moments: bool
    """Whether the gradient of the products takes part, or is to."""
    columns_are_queries: bool
    """Whether statistics of rows of the maps belong to columns of tiles."""
    warps: int
    columns: int
    """Of a tile."""
    first_row: tuple[int, int]
    first_column: tuple[int, int]
    second_row: tuple[int, int]
    second_column: tuple[int, int]
    out: tuple[int, int]


class Mixed(NamedTuple):
    """What the maps are mixed with; None where absent."""

    pre_weight: Any
    scale: Any
    centre: Any
    weight: Any
    """(SLOTS, SLOTS), transposed, in the dtype of dM, times ``sizes``."""
    sizes: Any
    moments: Any
    """(SLOTS, SLOTS) in float16, times ``moment_sizes``."""
    moment_sizes: Any
    pre_transposed: Any
    """As ``weight``."""
    pre_sizes: Any
    value_weight: Any
    """(H, H) in float16, times ``value_sizes``, and ``shifts`` behind it: the mix of the finished maps."""
    value_sizes: Any
    shifts: Any


# --- Layouts --------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def product_layout(warps):
    """Accumulators of [16, columns]: adjacent warps have adjacent columns."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])


@triton.constexpr_function
def batch_layout(warps):
    """Accumulators of one product a row, or a head, [16, 16, n]."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@triton.constexpr_function
def source_layout(width, warps):
    """32 rows of a head for each warp as second operand, [warps, 32, 8, width // 8]: adjacent columns in a thread."""
    registers = [[0, 0, 0, 1 << i] for i in range((width // 8).bit_length() - 1)]
    registers += [[0, 1, 0, 0], [0, 8, 0, 0], [0, 16, 0, 0]]
    lanes = [[0, 2, 0, 0], [0, 4, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    warp_bits = [[1 << i, 0, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp_bits, [], [warps, 32, 8, width // 8])


@triton.constexpr_function
def exchange_layout(shape):
    """[a, b, 32 columns] in shared memory, without conflicts between eight of a, nor between eight of b."""
    bases = [[0, 0, 1 << bit] for bit in range(5)]
    moved = {(1, 1): (2, 8), (1, 2): (2, 16), (0, 0): (2, 8), (0, 1): (2, 16), (0, 2): (1, 1)}
    for axis in (1, 0):
        for bit in range(shape[axis].bit_length() - 1):
            basis = [0, 0, 0]
            basis[axis] = 1 << bit
            other, by = moved.get((axis, bit), (2, 0))
            basis[other] += by
            bases.append(basis)
    return gl.SharedLinearLayout(bases)


@triton.constexpr_function
def width_of(padded_dim, start):
    """Columns of a head in the block that starts there."""
    return min(32, padded_dim - start)


# --- Steps ----------------------------------------------------------------------------------------------------------


@gluon.jit
def kept_block(source, last_row, START: tl.constexpr, DEPTH: tl.constexpr, STRIDE: tl.constexpr, PLAN: tl.constexpr):
    """Columns START, ... of 16 rows of a head in shared memory, in the order of :func:`add_block`."""
    LAYOUT: tl.constexpr = query_layout(DEPTH, PLAN.warps)
    rows = gl.minimum(index(16, 0, 3, LAYOUT), last_row).to(gl.int64)
    columns = START + index(4, 1, 3, LAYOUT) * (DEPTH // 4) + index(DEPTH // 4, 2, 3, LAYOUT)
    tile = tl.load(source + (rows * STRIDE + columns))
    pairs = gl.reshape(gl.permute(gl.reshape(tile, [16, 4, DEPTH // 8, 2]), (0, 2, 1, 3)), [16, DEPTH])
    return gl.allocate_shared_memory(source.dtype.element_ty, [16, DEPTH], shared_layout(2, DEPTH), pairs)


@gluon.jit
def kept_rows(source, last_row, HEAD_STRIDE: tl.constexpr, STRIDE: tl.constexpr, PLAN: tl.constexpr):
    """16 rows of all heads in shared memory, a tuple of heads times blocks of columns."""
    HEADS: tl.constexpr = PLAN.heads
    PARTS: tl.constexpr = (PLAN.padded_dim + 16) // 32
    kept = ()
    for g in gl.static_range(HEADS):
        for part in gl.static_range(PARTS):
            block = kept_block(
                source + g * HEAD_STRIDE, last_row, 32 * part, width_of(PLAN.padded_dim, 32 * part), STRIDE, PLAN
            )
            kept = kept + (block,)
    return kept


@gluon.jit
def add_block(
    acc, rows, source, first, last, START: tl.constexpr, DEPTH: tl.constexpr, STRIDE: tl.constexpr, PLAN: tl.constexpr
):
    """Add rows times columns first, ... over a block of a head's columns."""
    LAYOUT: tl.constexpr = product_layout(PLAN.warps)
    OPERAND: tl.constexpr = key_layout(DEPTH, PLAN.columns // PLAN.warps, PLAN.warps)
    columns = gl.minimum(first + index(PLAN.columns, 2, 3, OPERAND), last).to(gl.int64)
    depths = index(4, 0, 3, OPERAND) * (DEPTH // 4) + index(DEPTH // 4, 1, 3, OPERAND)
    tile = tl.load(source + (columns * STRIDE + depths) + START)  # in this order START is part of the instruction
    pairs = gl.permute(gl.reshape(tile, [4, DEPTH // 8, 2, PLAN.columns]), (1, 0, 2, 3))
    second = gl.reshape(pairs, [DEPTH, PLAN.columns])
    second = gl.convert_layout(second, gl.DotOperandLayout(1, LAYOUT, 2), assert_trivial=True)
    return ampere.mma_v2(rows.load(gl.DotOperandLayout(0, LAYOUT, 2)), second, acc)


@gluon.jit
def product(
    kept, source, first, last, g: tl.constexpr, HEAD_STRIDE: tl.constexpr, STRIDE: tl.constexpr, PLAN: tl.constexpr
):
    """Rows times columns first, ... of a head, [16, columns] float32. Columns out of bounds repeat the last."""
    PARTS: tl.constexpr = (PLAN.padded_dim + 16) // 32
    acc = gl.full([16, PLAN.columns], 0.0, gl.float32, product_layout(PLAN.warps))
    for part in gl.static_range(PARTS):
        acc = add_block(
            acc, kept[g * PARTS + part], source, first, last, g * HEAD_STRIDE + 32 * part,
            width_of(PLAN.padded_dim, 32 * part), STRIDE, PLAN,
        )  # fmt: skip
    return acc


@gluon.jit
def mixed(logits, pre_weight, h: tl.constexpr, PLAN: tl.constexpr):
    """sum_g pre_weight[h, g] logits[g]."""
    HEADS: tl.constexpr = PLAN.heads
    total = logits[0] * tl.load(pre_weight + h * HEADS).to(gl.float32)
    for g in gl.static_range(1, HEADS):
        total += logits[g] * tl.load(pre_weight + h * HEADS + g).to(gl.float32)
    return total


@gluon.jit
def parts_of(tile, PLAN: tl.constexpr):
    """A tile as parts [8 rows, 32 columns], a tuple: both halves of the rows, of each 32 columns."""
    if PLAN.columns == 64:
        low, high = gl.split(gl.permute(gl.reshape(tile, [2, 8, 2, 32]), (1, 3, 2, 0)))
        first, third = gl.split(low)
        second, fourth = gl.split(high)
        found = (first, second, third, fourth)
    else:
        first, second = gl.split(gl.permute(gl.reshape(tile, [2, 8, 32]), (1, 2, 0)))
        found = (first, second)
    return found


@gluon.jit
def exchanged(tiles, dtype: tl.constexpr, PLAN: tl.constexpr):
    """Tiles of all heads in shared memory as parts [row, head, column], a tuple; zeros for no head."""
    HEADS: tl.constexpr = PLAN.heads
    COUNT: tl.constexpr = PLAN.columns // 16
    pieces = ()
    for h in gl.static_range(16):
        if h < HEADS:
            pieces = pieces + (parts_of(tiles[h].to(dtype), PLAN),)
        else:
            pieces = pieces + (parts_of(gl.full([16, PLAN.columns], 0.0, dtype, product_layout(PLAN.warps)), PLAN),)
    buffers = ()
    for i in gl.static_range(COUNT):
        some = ()
        for h in gl.static_range(16):
            some = some + (pieces[h][i],)
        for level in gl.static_range(4):
            pairs = ()
            for j in gl.static_range(8 >> level):
                pairs = pairs + (gl.join(some[j], some[j + (8 >> level)]),)
            some = pairs
        part = gl.permute(gl.reshape(some[0], [8, 32, SLOTS]), (0, 2, 1))
        buffers = buffers + (gl.allocate_shared_memory(dtype, [8, SLOTS, 32], exchange_layout([8, 16, 32]), part),)
    return buffers


@gluon.jit
def statistics_of_rows(values, last_row, num_queries, PLAN: tl.constexpr):
    """A number of each head and row, (H, num_queries), in shared memory: [SLOTS, 16]."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [PLAN.warps, 1], [1, 0])
    heads, rows = index(SLOTS, 0, 2, LAYOUT), index(16, 1, 2, LAYOUT)
    offsets = gl.minimum(heads, PLAN.heads - 1) * num_queries + gl.minimum(rows, last_row)
    return gl.allocate_shared_memory(
        gl.float32, [SLOTS, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), tl.load(values + offsets)
    )


@gluon.jit
def statistics_of_columns(values, first, last, num_queries, PLAN: tl.constexpr):
    """The same of columns first, ...: [SLOTS, PLAN.columns]."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [PLAN.warps, 1], [1, 0])
    heads, columns = index(SLOTS, 0, 2, LAYOUT), index(PLAN.columns, 1, 2, LAYOUT)
    offsets = gl.minimum(heads, PLAN.heads - 1) * num_queries + gl.minimum(first + columns, last)
    return gl.allocate_shared_memory(
        gl.float32, [SLOTS, PLAN.columns], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), tl.load(values + offsets)
    )


@gluon.jit
def centred_tile(scores, lse, factor, centre, g: tl.constexpr, PLAN: tl.constexpr):
    """X of a head from its logits, float32."""
    LAYOUT: tl.constexpr = product_layout(PLAN.warps)
    if PLAN.columns_are_queries:
        known = lse.slice(g, 1, 0).load(LAYOUT)
    else:
        known = lse.slice(g, 1, 0).permute((1, 0)).load(LAYOUT)
    return gl.exp2(scores * factor - known) - centre


@gluon.jit
def maps_of_tile(kept, source, lse, mixes, first, last, PLAN: tl.constexpr):
    """X of all heads, float32, and the scores where there is a mix in front of the softmax: tuples."""
    HEADS: tl.constexpr = PLAN.heads
    factor = tl.cast(mixes.scale, gl.float32) * LOG2_E  # a Python float may arrive as float64
    centre = tl.cast(mixes.centre, gl.float32)
    found = ()
    scores = ()
    if PLAN.pre_mix:
        for g in gl.static_range(HEADS):
            scores = scores + (product(kept, source, first, last, g, PLAN.first_column[0], PLAN.first_column[1], PLAN),)
        for h in gl.static_range(HEADS):
            logits = mixed(scores, mixes.pre_weight, h, PLAN)
            found = found + (centred_tile(logits, lse, factor, centre, h, PLAN),)
    else:
        for g in gl.static_range(HEADS):
            logits = product(kept, source, first, last, g, PLAN.first_column[0], PLAN.first_column[1], PLAN)
            found = found + (centred_tile(logits, lse, factor, centre, g, PLAN),)
    return found, scores


@gluon.jit
def or_zero(tiles, inside):
    """Each of a tuple of tiles where ``inside``, and else zero."""
    found = ()
    for i in gl.static_range(len(tiles)):
        found = found + (gl.where(inside, tiles[i], 0.0),)
    return found


@gluon.jit
def row_products(sums, a, b, PLAN: tl.constexpr):
    """Add sum over the columns of a tile of a[row, h] b[row, g]: [8, SLOTS, SLOTS] of each half of the rows."""
    LAYOUT: tl.constexpr = batch_layout(PLAN.warps)
    COUNT: tl.constexpr = PLAN.columns // 16
    halves = sums
    for i in gl.static_range(0, COUNT, 2):
        found = ()
        for half in gl.static_range(2):
            first = a[i + half].load(gl.DotOperandLayout(0, LAYOUT, 2))
            second = b[i + half].permute((0, 2, 1)).load(gl.DotOperandLayout(1, LAYOUT, 2))
            found = found + (ampere.mma_v2(first, second, halves[half]),)
        halves = found
    return halves


@gluon.jit
def store_sum(parts, halves, STRIDE: tl.constexpr, PLAN: tl.constexpr):
    """A program's [SLOTS, SLOTS] from those of its rows."""
    LAYOUT: tl.constexpr = gl.SliceLayout(0, batch_layout(PLAN.warps))
    total = gl.sum(halves[0] + halves[1], 0)
    h, g = gl.arange(0, SLOTS, gl.SliceLayout(1, LAYOUT)), gl.arange(0, SLOTS, gl.SliceLayout(0, LAYOUT))
    place = parts + gl.program_id(0).to(gl.int64) * STRIDE
    tl.store(place + (gl.expand_dims(h, 1) * SLOTS + gl.expand_dims(g, 0)), total)


@gluon.jit
def added(sums, parts, PLAN: tl.constexpr):
    """Add the parts of a tile, [8, SLOTS, 32], in each half of the rows."""
    COUNT: tl.constexpr = PLAN.columns // 16
    halves = sums
    for i in gl.static_range(0, COUNT, 2):
        found = ()
        for half in gl.static_range(2):
            found = found + (halves[half] + parts[i + half].load(batch_layout(PLAN.warps)).to(gl.float32),)
        halves = found
    return halves


@gluon.jit
def store_delta(delta, values, last_row, num_queries, FIRST: tl.constexpr, PLAN: tl.constexpr):
    """Write [8 rows, SLOTS] from row FIRST on, to (H, num_queries)."""
    LAYOUT: tl.constexpr = gl.SliceLayout(1, batch_layout(PLAN.warps))
    rows = FIRST + gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(1, LAYOUT)), 1)
    g = gl.expand_dims(gl.arange(0, SLOTS, gl.SliceLayout(0, LAYOUT)), 0)
    tl.store(delta + (g.to(gl.int64) * num_queries + rows), values, mask=(rows <= last_row) & (g < PLAN.heads))


@gluon.jit(do_not_specialize=["num_queries", "num_keys"])
def row_sums_kernel(
    q, k, grad, v, lse, mixes, products, product_parts, weight_parts, bias_parts, delta,
    q_step, k_step, grad_step, v_step, num_queries, num_keys, PLAN: tl.constexpr,
):  # fmt: skip
    """The sums of one block of queries; ``products`` (B, Nq, H, H) of each of its rows; delta without their part."""
    HEADS: tl.constexpr = PLAN.heads
    LAYOUT: tl.constexpr = product_layout(PLAN.warps)
    BATCH: tl.constexpr = batch_layout(PLAN.warps)
    dtype: tl.constexpr = q.dtype.element_ty
    blocks = gl.cdiv(num_queries, 16)
    first_row = gl.program_id(0) % blocks * 16
    b = (gl.program_id(0) // blocks).to(gl.int64)
    last_row, last = num_queries - 1 - first_row, num_keys - 1
    q += b * q_step + first_row.to(gl.int64) * PLAN.first_row[1]
    k += b * k_step
    queries = kept_rows(q, last_row, PLAN.first_row[0], PLAN.first_row[1], PLAN)
    first_of_rows = b * (HEADS * num_queries) + first_row
    known = statistics_of_rows(lse + first_of_rows, last_row, num_queries, PLAN)
    if PLAN.gradients:
        grad += b * grad_step + first_row.to(gl.int64) * PLAN.second_row[1]
        grads = kept_rows(grad, last_row, PLAN.second_row[0], PLAN.second_row[1], PLAN)
        v += b * v_step
    exists = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, LAYOUT)) <= last_row, 1)

    zeros = gl.full([8, SLOTS, SLOTS], 0.0, gl.float32, BATCH)
    d_weight = (zeros, zeros)
    squares = (zeros, zeros)
    zeros = gl.full([8, SLOTS, 32], 0.0, gl.float32, BATCH)
    d_bias = (zeros, zeros)
    for first in range(0, num_keys, PLAN.columns):
        columns = gl.expand_dims(first + gl.arange(0, PLAN.columns, gl.SliceLayout(0, LAYOUT)), 0)
        inside = exists & (columns <= last)
        maps, _scores = maps_of_tile(queries, k, known, mixes, first, last, PLAN)
        kept_maps = exchanged(or_zero(maps, inside), dtype, PLAN)
        if PLAN.gradients:
            dm = ()
            for h in gl.static_range(HEADS):
                dm = dm + (product(grads, v, first, last, h, PLAN.second_column[0], PLAN.second_column[1], PLAN),)
            kept_dm = exchanged(or_zero(dm, inside), dtype, PLAN)
            d_weight = row_products(d_weight, kept_dm, kept_maps, PLAN)
            d_bias = added(d_bias, kept_dm, PLAN)
        if PLAN.moments:
            squares = row_products(squares, kept_maps, kept_maps, PLAN)

    for half in gl.static_range(2):
        rows = 8 * half + index(8, 0, 3, BATCH)
        h = index(SLOTS, 1, 3, BATCH)
        g = index(SLOTS, 2, 3, BATCH)
        if PLAN.moments and PLAN.gradients:
            offsets = ((b * num_queries + first_row + rows) * PLAN.heads + h) * PLAN.heads + g
            inside_heads = (h < PLAN.heads) & (g < PLAN.heads)
            tl.store(products + offsets, squares[half], mask=(rows <= last_row) & inside_heads)
        if PLAN.gradients:
            # delta_g = sum_h weight[h, g] (d_weight[h, g] + centre d_bias[h])
            weight = tl.load(mixes.weight + (g * SLOTS + h)).to(gl.float32) * tl.load(mixes.sizes + g)
            biases = gl.expand_dims(gl.sum(d_bias[half], 2), 2)
            terms = weight * (d_weight[half] + tl.cast(mixes.centre, gl.float32) * biases)
            store_delta(delta + first_of_rows, gl.sum(terms, 1), last_row, num_queries, 8 * half, PLAN)
    if PLAN.gradients:
        store_sum(weight_parts, d_weight, SLOTS * SLOTS + SLOTS, PLAN)
        SUMS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, BATCH))
        place = bias_parts + gl.program_id(0).to(gl.int64) * (SLOTS * SLOTS + SLOTS)
        tl.store(place + gl.arange(0, SLOTS, SUMS), gl.sum(gl.sum(d_bias[0] + d_bias[1], 2), 0))
    elif PLAN.moments:
        store_sum(product_parts, squares, SLOTS * SLOTS, PLAN)


@gluon.jit
def for_rows(matrix, SIDE: tl.constexpr, PLAN: tl.constexpr):
    """A (SIDE, SIDE) matrix as first operand of the products of all rows; the threads hold it once."""
    LAYOUT: tl.constexpr = gl.DotOperandLayout(0, batch_layout(PLAN.warps), 2)
    g, h = index(SLOTS, 1, 3, LAYOUT), index(SLOTS, 2, 3, LAYOUT)
    one = tl.load(matrix + (g * SIDE + h), mask=(g < SIDE) & (h < SIDE), other=0)
    each, _zeros = gl.broadcast(one, gl.full([8, SLOTS, SLOTS], 0.0, matrix.dtype.element_ty, LAYOUT))
    return each


@gluon.jit
def for_heads(sizes, PLAN: tl.constexpr):
    """A number of each head, for [row, head, column]."""
    return tl.load(sizes + index(SLOTS, 1, 3, batch_layout(PLAN.warps)))


@gluon.jit
def mix_of_part(matrix, part, PLAN: tl.constexpr):
    """sum_h matrix[g, h] part[row, h, column] of a part in shared memory."""
    BATCH: tl.constexpr = batch_layout(PLAN.warps)
    zeros = gl.full([8, SLOTS, 32], 0.0, gl.float32, BATCH)
    return ampere.mma_v2(matrix, part.load(gl.DotOperandLayout(1, BATCH, 2)), zeros)


@gluon.jit
def finished_part(low, high, dtype: tl.constexpr):
    """Both halves of the rows, [8, SLOTS, 32], in shared memory as [head, row, column]."""
    rows = gl.permute(gl.join(low.to(dtype), high.to(dtype)), (1, 3, 0, 2))
    whole = gl.reshape(rows, [SLOTS, 16, 32])
    return gl.allocate_shared_memory(dtype, [SLOTS, 16, 32], exchange_layout([16, 16, 32]), whole)


@gluon.jit
def add_rows(
    acc, maps, source, first, last, HEAD: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr,
    HEAD_STRIDE: tl.constexpr, STRIDE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Add maps times 32 rows first, ... of a source: heads HEAD, ... of as many warps, columns COLUMN, ... ."""
    LAYOUT: tl.constexpr = source_layout(WIDTH, PLAN.warps)
    heads = index(PLAN.warps, 0, 4, LAYOUT)
    if HEAD + PLAN.warps > PLAN.heads:
        heads = gl.minimum(heads, PLAN.heads - 1 - HEAD)
    rows = first + index(32, 1, 4, LAYOUT)
    columns = index(8, 2, 4, LAYOUT) * (WIDTH // 8) + index(WIDTH // 8, 3, 4, LAYOUT)
    offsets = heads.to(gl.int64) * HEAD_STRIDE + rows.to(gl.int64) * STRIDE + columns
    tile = tl.load(source + offsets + (HEAD * HEAD_STRIDE + COLUMN), mask=rows <= last, other=0)
    tile = gl.reshape(gl.permute(tile, (0, 1, 3, 2)), [PLAN.warps, 32, WIDTH])
    operand = gl.convert_layout(tile, gl.DotOperandLayout(1, batch_layout(PLAN.warps), 2), assert_trivial=True)
    return ampere.mma_v2(maps, operand, acc)


@gluon.jit
def no_rows(PLAN: tl.constexpr):
    """Zeros to accumulate :func:`add_product` in."""
    PARTS: tl.constexpr = (PLAN.padded_dim + 16) // 32
    ROUNDS: tl.constexpr = (PLAN.heads + PLAN.warps - 1) // PLAN.warps
    LAYOUT: tl.constexpr = batch_layout(PLAN.warps)
    accs = ()
    for _ in gl.static_range(ROUNDS):
        for part in gl.static_range(PARTS):
            accs = accs + (gl.full([PLAN.warps, 16, width_of(PLAN.padded_dim, 32 * part)], 0.0, gl.float32, LAYOUT),)
    return accs


@gluon.jit
def rounds_of(maps, PLAN: tl.constexpr):
    """[SLOTS, 16, 32] as first operands of the products of as many heads as there are warps: a tuple of rounds."""
    OPERAND: tl.constexpr = gl.DotOperandLayout(0, batch_layout(PLAN.warps), 2)
    each = gl.permute(gl.reshape(maps.load(OPERAND), [2, 2, 4, 16, 32]), (2, 3, 4, 1, 0))
    low, high = gl.split(each)
    first, second = gl.split(low)
    third, fourth = gl.split(high)
    return (
        gl.convert_layout(first, OPERAND, assert_trivial=True),
        gl.convert_layout(second, OPERAND, assert_trivial=True),
        gl.convert_layout(third, OPERAND, assert_trivial=True),
        gl.convert_layout(fourth, OPERAND, assert_trivial=True),
    )


@gluon.jit
def add_product(accs, maps, source, first, last, HEAD_STRIDE: tl.constexpr, STRIDE: tl.constexpr, PLAN: tl.constexpr):
    """Add maps [head, row, column] times 32 rows of a source, a tuple of rounds times blocks of columns."""
    PARTS: tl.constexpr = (PLAN.padded_dim + 16) // 32
    ROUNDS: tl.constexpr = (PLAN.heads + PLAN.warps - 1) // PLAN.warps
    rounds = rounds_of(maps, PLAN)
    sums = ()
    for r in gl.static_range(ROUNDS):
        for part in gl.static_range(PARTS):
            sums = sums + (
                add_rows(
                    accs[r * PARTS + part], rounds[r], source, first, last, r * PLAN.warps, 32 * part,
                    width_of(PLAN.padded_dim, 32 * part), HEAD_STRIDE, STRIDE, PLAN,
                ),
            )  # fmt: skip
    return sums


@gluon.jit
def store_block(out, acc, last_row, HEAD: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr, PLAN: tl.constexpr):
    """Write columns COLUMN, ... of the result of a head for each warp."""
    LAYOUT: tl.constexpr = result_layout(WIDTH, PLAN.warps)
    acc = gl.permute(gl.reshape(acc, [PLAN.warps, 16, WIDTH // 8, 8]), (0, 1, 3, 2))
    tile = gl.convert_layout(gl.reshape(acc, [PLAN.warps, 16, WIDTH]), LAYOUT, assert_trivial=True)
    heads = HEAD + index(PLAN.warps, 0, 3, LAYOUT)
    rows = index(16, 1, 3, LAYOUT)
    columns = COLUMN + index(WIDTH, 2, 3, LAYOUT)
    offsets = heads.to(gl.int64) * PLAN.out[0] + rows.to(gl.int64) * PLAN.out[1] + columns
    inside = (rows <= last_row) & (heads < PLAN.heads) & (columns < PLAN.head_dim)
    tl.store(out + offsets, tile.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def store_rows(out, accs, last_row, scale, PLAN: tl.constexpr):
    """Write the result, times a number."""
    PARTS: tl.constexpr = (PLAN.padded_dim + 16) // 32
    ROUNDS: tl.constexpr = (PLAN.heads + PLAN.warps - 1) // PLAN.warps
    for r in gl.static_range(ROUNDS):
        for part in gl.static_range(PARTS):
            acc = accs[r * PARTS + part] * scale
            store_block(out, acc, last_row, r * PLAN.warps, 32 * part, width_of(PLAN.padded_dim, 32 * part), PLAN)


@gluon.jit(do_not_specialize=["num_rows", "num_columns"])
def weighted_rows_kernel(
    rows, columns, values, lse, mixes, out, row_step, column_step, value_step, num_rows, num_columns,
    PLAN: tl.constexpr,
):  # fmt: skip
    """The result of one block of queries, or, if columns are queries, dv of one of keys."""
    BATCH: tl.constexpr = batch_layout(PLAN.warps)
    COUNT: tl.constexpr = PLAN.columns // 32
    dtype: tl.constexpr = out.dtype.element_ty
    blocks = gl.cdiv(num_rows, 16)
    first_row = gl.program_id(0) % blocks * 16
    b = (gl.program_id(0) // blocks).to(gl.int64)
    last_row, last = num_rows - 1 - first_row, num_columns - 1
    row = first_row.to(gl.int64)
    rows += b * row_step + row * PLAN.first_row[1]
    kept = kept_rows(rows, last_row, PLAN.first_row[0], PLAN.first_row[1], PLAN)
    columns += b * column_step
    values += b * value_step
    if PLAN.columns_are_queries:
        statistics = b * (PLAN.heads * num_columns)
    else:
        known = statistics_of_rows(lse + b * (PLAN.heads * num_rows) + first_row, last_row, num_rows, PLAN)
    weight = for_rows(mixes.value_weight, PLAN.heads, PLAN)
    heads = gl.minimum(index(SLOTS, 1, 3, BATCH), PLAN.heads - 1)
    sizes, shifts = tl.load(mixes.value_sizes + heads), tl.load(mixes.shifts + heads)

    accs = no_rows(PLAN)
    for first in range(0, num_columns, PLAN.columns):
        if PLAN.columns_are_queries:
            known = statistics_of_columns(lse + statistics, first, last, num_columns, PLAN)
        maps, _scores = maps_of_tile(kept, columns, known, mixes, first, last, PLAN)
        kept_maps = exchanged(maps, gl.float16, PLAN)
        for i in gl.static_range(COUNT):
            low = mix_of_part(weight, kept_maps[2 * i], PLAN) * sizes + shifts
            high = mix_of_part(weight, kept_maps[2 * i + 1], PLAN) * sizes + shifts
            finished = finished_part(low, high, dtype)
            place = first + 32 * i
            accs = add_product(accs, finished, values, place, last, PLAN.second_column[0], PLAN.second_column[1], PLAN)
    store_rows(out + (b * num_rows + row) * PLAN.out[1], accs, last_row, 1.0, PLAN)


@gluon.jit(do_not_specialize=["num_rows", "num_columns"])
def score_gradients_kernel(
    first_rows, first_columns, second_rows, second_columns, lse, delta, mixes, out, dv, pre_weight_parts,
    first_row_step, first_column_step, second_row_step, second_column_step, num_rows, num_columns, PLAN: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries and the sum for d_pre_weight, or, if columns are queries, dk and dv of one of keys."""
    HEADS: tl.constexpr = PLAN.heads
    COUNT: tl.constexpr = PLAN.columns // 32
    BATCH: tl.constexpr = batch_layout(PLAN.warps)
    WANTS_PRE_WEIGHT: tl.constexpr = PLAN.pre_mix and not PLAN.columns_are_queries
    dtype: tl.constexpr = out.dtype.element_ty
    blocks = gl.cdiv(num_rows, 16)
    first_row = gl.program_id(0) % blocks * 16
    b = (gl.program_id(0) // blocks).to(gl.int64)
    last_row, last = num_rows - 1 - first_row, num_columns - 1
    row = first_row.to(gl.int64)
    first_rows += b * first_row_step + row * PLAN.first_row[1]
    second_rows += b * second_row_step + row * PLAN.second_row[1]
    rows = kept_rows(first_rows, last_row, PLAN.first_row[0], PLAN.first_row[1], PLAN)
    others = kept_rows(second_rows, last_row, PLAN.second_row[0], PLAN.second_row[1], PLAN)
    first_columns += b * first_column_step
    second_columns += b * second_column_step
    out += (b * num_rows + row) * PLAN.out[1]
    centre = tl.cast(mixes.centre, gl.float32)
    if PLAN.columns_are_queries:
        statistics = b * (HEADS * num_columns)
    else:
        statistics = b * (HEADS * num_rows) + first_row
        known = statistics_of_rows(lse + statistics, last_row, num_rows, PLAN)
        taken = statistics_of_rows(delta + statistics, last_row, num_rows, PLAN)

    weight, sizes = for_rows(mixes.weight, SLOTS, PLAN), for_heads(mixes.sizes, PLAN)
    if PLAN.moments:
        moments, moment_sizes = for_rows(mixes.moments, SLOTS, PLAN), for_heads(mixes.moment_sizes, PLAN)
    if PLAN.pre_mix:
        pre_weight, pre_sizes = for_rows(mixes.pre_transposed, SLOTS, PLAN), for_heads(mixes.pre_sizes, PLAN)

    accs = no_rows(PLAN)
    if PLAN.columns_are_queries:
        values = no_rows(PLAN)
        value_weight = for_rows(mixes.value_weight, PLAN.heads, PLAN)
        heads = gl.minimum(index(SLOTS, 1, 3, BATCH), PLAN.heads - 1)
        value_sizes, shifts = tl.load(mixes.value_sizes + heads), tl.load(mixes.shifts + heads)
    zeros = gl.full([8, SLOTS, SLOTS], 0.0, gl.float32, BATCH)
    d_pre_weight = (zeros, zeros)
    for first in range(0, num_columns, PLAN.columns):
        if PLAN.columns_are_queries:
            known = statistics_of_columns(lse + statistics, first, last, num_columns, PLAN)
            taken = statistics_of_columns(delta + statistics, first, last, num_columns, PLAN)
        maps, scores = maps_of_tile(rows, first_columns, known, mixes, first, last, PLAN)
        kept_maps = exchanged(maps, gl.float16, PLAN)
        if WANTS_PRE_WEIGHT:
            kept_scores = exchanged(scores, dtype, PLAN)
        dm = ()
        for h in gl.static_range(HEADS):
            dm = dm + (
                product(others, second_columns, first, last, h, PLAN.second_column[0], PLAN.second_column[1], PLAN),
            )
        kept_dm = exchanged(dm, dtype, PLAN)
        kept_ds = ()
        for i in gl.static_range(COUNT):
            place = first + 32 * i
            if PLAN.columns_are_queries:
                low = mix_of_part(value_weight, kept_maps[2 * i], PLAN) * value_sizes + shifts
                high = mix_of_part(value_weight, kept_maps[2 * i + 1], PLAN) * value_sizes + shifts
                weights = finished_part(low, high, dtype)
                values = add_product(
                    values, weights, second_columns, place, last, PLAN.second_column[0], PLAN.second_column[1], PLAN
                )
            halves = ()
            for half in gl.static_range(2):
                dp = mix_of_part(weight, kept_dm[2 * i + half], PLAN)
                part = kept_maps[2 * i + half]
                if PLAN.moments:
                    operand = part.load(gl.DotOperandLayout(1, BATCH, 2))
                    dp = ampere.mma_v2(moments, operand, dp * (sizes / moment_sizes)) * moment_sizes
                else:
                    dp *= sizes
                if PLAN.columns_are_queries:
                    less = gl.expand_dims(taken.slice(32 * i, 32, 1).load(gl.SliceLayout(0, BATCH)), 0)
                else:
                    less = gl.expand_dims(taken.slice(8 * half, 8, 1).permute((1, 0)).load(gl.SliceLayout(2, BATCH)), 2)
                ds = (part.load(BATCH).to(gl.float32) + centre) * (dp - less)
                if PLAN.pre_mix:
                    if WANTS_PRE_WEIGHT:
                        inside = 8 * half + index(8, 0, 3, BATCH) <= last_row
                        inside = inside & (first + 32 * i + index(32, 2, 3, BATCH) <= last)
                        ds = gl.where(inside, ds, 0.0)
                    kept = gl.allocate_shared_memory(dtype, [8, SLOTS, 32], exchange_layout([8, 16, 32]), ds.to(dtype))
                    kept_ds = kept_ds + (kept,)
                    ds = mix_of_part(pre_weight, kept, PLAN) * pre_sizes
                halves = halves + (ds,)
            finished = finished_part(halves[0], halves[1], dtype)
            accs = add_product(
                accs, finished, first_columns, place, last, PLAN.first_column[0], PLAN.first_column[1], PLAN
            )
        if WANTS_PRE_WEIGHT:
            d_pre_weight = row_products(d_pre_weight, kept_ds, kept_scores, PLAN)
    scale = tl.cast(mixes.scale, gl.float32)
    store_rows(out, accs, last_row, scale, PLAN)
    if PLAN.columns_are_queries:
        store_rows(dv + (b * num_rows + row) * PLAN.out[1], values, last_row, 1.0, PLAN)
    if WANTS_PRE_WEIGHT:
        store_sum(pre_weight_parts, (d_pre_weight[0] * scale, d_pre_weight[1] * scale), SLOTS * SLOTS, PLAN)


# --- Launching ------------------------------------------------------------------------------------------------------


class Maps(NamedTuple):
    """What the gradients' kernels have in common.

    ``mix`` (SLOTS, SLOTS), times ``sizes``: post_weight, transposed, with the output scale, in q's dtype.
    """

    problem: Problem
    lse: Tensor
    values: Heads
    grad: Heads
    mix: Tensor
    sizes: Tensor


def fits(problem: Problem, limit: int) -> bool:
    """Whether every kernel fits a program's shared memory of ``limit`` bytes."""
    rows = 2 * problem.heads * 16 * problem.q.pointer.shape[3] * 2
    tiles = 3 * SLOTS.value * 16 * COLUMNS * 2  # of all heads, at once
    return problem.heads <= SLOTS.value and rows + tiles + 6144 <= limit


def plan_for(
    problem: Problem,
    first: tuple[Heads, Heads],
    second: tuple[Heads, Heads] | None = None,
    out: Tensor | None = None,
    *,
    columns: int = COLUMNS,
    gradients: bool = True,
    moments: bool = False,
    columns_are_queries: bool = False,
) -> Tiles:
    """The settings of a kernel; ``first`` and ``second``: operands by rows and by columns, of the logits and of dM."""
    operands = (*first, *(second or first))
    return Tiles(
        problem.heads,
        problem.head_dim,
        first[0].pointer.shape[3],
        problem.mixes.pre_weight is not None,
        gradients,
        moments,
        columns_are_queries,
        4,
        columns,
        *(each.pointer.stride()[1:3] for each in operands),
        (0, 0) if out is None else out.stride()[1:3],
    )


def options(plan: Tiles) -> dict[str, int]:
    """Compiler options: three programs a multiprocessor, four of the smallest kernel, where accumulators allow it."""
    held = triton.cdiv(plan.heads, plan.warps) * plan.padded_dim // 2 * (2 if plan.columns_are_queries else 1)
    registers = 128 if not plan.gradients else 160 if held <= 72 else 168 if held <= 96 else 255
    return {"num_warps": plan.warps, "maxnreg": registers}


def _mixed(
    problem: Problem,
    maps: Maps | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
    pre: tuple[Tensor, Tensor] | None = None,
    values: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Mixed:
    mix = (None, None) if maps is None else (maps.mix, maps.sizes)
    others = (*(moments or (None, None)), *(pre or (None, None)), *(values or (None, None, None)))
    return Mixed(problem.mixes.pre_weight, problem.mixes.scale, 1.0 / problem.num_keys, *mix, *others)


def map_products(problem: Problem, lse: Tensor) -> Tensor:
    """sum X_g X_g', (SLOTS, SLOTS) float32."""
    operands = (problem.q, problem.k)
    columns = 64 if problem.q.pointer.shape[3] <= 64 else COLUMNS
    plan = plan_for(problem, operands, columns=columns, gradients=False, moments=True)
    grid = (problem.batch * triton.cdiv(problem.num_queries, 16),)
    parts = torch.empty((*grid, SLOTS.value, SLOTS.value), dtype=torch.float32, device=problem.device)
    row_sums_kernel[grid](
        problem.q.pointer, problem.k.pointer, None, None, lse, _mixed(problem), None, parts, None, None, None,
        problem.q.stride_b, problem.k.stride_b, 0, 0, problem.num_queries, problem.num_keys,
        PLAN=plan, **options(plan),
    )  # fmt: skip
    return parts.sum(0)


def row_sums(maps: Maps, *, moments: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums with dM = dO v^T, without the output scale.

    Returns:
        (SLOTS + 1, SLOTS) float32: those with X of each head, in the last row without; delta (B, H, Nq), without the
        part of ``products``, the sums of X_g X_g' of each row, (B, Nq, H, H), or None without ``moments``.
    """
    problem, slots = maps.problem, SLOTS.value
    plan = plan_for(problem, (problem.q, problem.k), (maps.grad, maps.values), moments=moments)
    grid = (problem.batch * triton.cdiv(problem.num_queries, 16),)
    parts = torch.empty((*grid, slots + 1, slots), dtype=torch.float32, device=problem.device)
    delta = torch.empty_like(maps.lse)
    products = None
    if moments:
        shape = (problem.batch, problem.num_queries, problem.heads, problem.heads)
        products = torch.empty(shape, dtype=torch.float32, device=problem.device)
    row_sums_kernel[grid](
        problem.q.pointer, problem.k.pointer, maps.grad.pointer, maps.values.pointer, maps.lse,
        _mixed(problem, maps), products, None, parts, parts[0, slots:], delta,
        problem.q.stride_b, problem.k.stride_b, maps.grad.stride_b, maps.values.stride_b,
        problem.num_queries, problem.num_keys, PLAN=plan, **options(plan),
    )  # fmt: skip
    return parts.sum(0), delta, products


def weighted_rows(
    problem: Problem,
    lse: Tensor,
    values: Heads,
    mix: tuple[Tensor, Tensor, Tensor],
    *,
    columns_are_queries: bool = False,
) -> Tensor:
    """The result, or with ``columns_are_queries`` dv, for which ``values`` are the gradient of the result.

    ``mix``: (H, H) in float16, sizes and shifts (H), of maps less 1 / Nk, as :func:`fold` makes them.
    """
    operands, rows, columns = (problem.q, problem.k), problem.num_queries, problem.num_keys
    if columns_are_queries:
        operands, rows, columns = operands[::-1], columns, rows
    out = problem.new_heads(rows)
    plan = plan_for(problem, operands, (values, values), out, columns_are_queries=columns_are_queries)
    weighted_rows_kernel[(problem.batch * triton.cdiv(rows, 16),)](
        *(each.pointer for each in operands), values.pointer, lse, _mixed(problem, values=mix), out,
        *(each.stride_b for each in operands), values.stride_b, rows, columns, PLAN=plan, **options(plan),
    )  # fmt: skip
    return out


def _score_gradients(
    maps: Maps,
    delta: Tensor,
    moments: tuple[Tensor, Tensor] | None,
    pre: tuple[Tensor, Tensor] | None,
    parts: Tensor | None,
    values: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dq, or with ``values`` dk and dv."""
    columns_are_queries = values is not None
    problem = maps.problem
    first, second = (problem.q, problem.k), (maps.grad, maps.values)
    rows, columns = problem.num_queries, problem.num_keys
    if columns_are_queries:
        first, second, rows, columns = first[::-1], second[::-1], columns, rows
    out = problem.new_heads(rows)
    dv = None if values is None else problem.new_heads(rows)
    moved = moments is not None
    plan = plan_for(problem, first, second, out, moments=moved, columns_are_queries=columns_are_queries)
    score_gradients_kernel[(problem.batch * triton.cdiv(rows, 16),)](
        *(each.pointer for each in (*first, *second)), maps.lse, delta,
        _mixed(problem, maps, moments, pre, values), out, dv, parts,
        *(each.stride_b for each in (*first, *second)), rows, columns, PLAN=plan, **options(plan),
    )  # fmt: skip
    return out, dv


def query_gradients(
    maps: Maps, delta: Tensor, moments: tuple[Tensor, Tensor] | None, pre: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """dq, and d_pre_weight (H, H) float32 or None.

    Args:
        moments: the symmetric gradient of the products, (SLOTS, SLOTS) float16, and sizes of its rows; or None.
        pre: pre_weight, transposed, as ``Maps.mix``; or None.
    """
    problem, parts = maps.problem, None
    if pre is not None:
        count = problem.batch * triton.cdiv(problem.num_queries, 16)
        parts = torch.empty((count, SLOTS.value, SLOTS.value), dtype=torch.float32, device=problem.device)
    dq, _ = _score_gradients(maps, delta, moments, pre, parts)
    return dq, None if parts is None else parts.sum(0)[: problem.heads, : problem.heads]


def key_gradients(
    maps: Maps,
    delta: Tensor,
    moments: tuple[Tensor, Tensor] | None,
    pre: tuple[Tensor, Tensor] | None,
    values: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """dk and dv; arguments as of :func:`query_gradients`, ``values`` as ``mix`` of :func:`weighted_rows`."""
    dk, dv = _score_gradients(maps, delta, moments, pre, None, values)
    assert dv is not None
    return dk, dv

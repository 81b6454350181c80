"""Head-mixed attention in one pass, where a block of queries sees all keys at once: the maps stay in registers.

    P_g = softmax(scale * q_g k_g^T);  X_h = sum_g weight[h, g] (P_g - 1 / Nk) + bias[h];  out_h = output_scale X_h v_h

and the same with a mix in front of the softmax. A program has 16 queries of one image, all heads and all keys, up to
256. Why it looks as it does:

- A mix of twelve heads is 144 multiply-adds a position, and a position's twelve numbers must meet in one thread. So
  every warp takes some keys for all heads: the accumulators of q k^T of each head stay where they are, packed in pairs
  of float16, and the mix is packed multiply-adds of registers. A map loses less in float16 than in bfloat16, and the
  centre 1 / Nk is taken off first, so that a BatchNorm enlarges no rounding of it.
- Rows of the softmax lie across the warps. Each warp takes its own maximum and sum; after all heads the warps read each
  other's, once, and rescale what they have.
- The mixed maps change hands in shared memory: in the second product a warp has a head, and all keys.
- k and v are loaded from global memory straight into the operands of the tensor cores, each by the one warp that needs
  it, without shared memory and its barriers. A contraction may take its columns in any order, and so may a product:
  they are dealt to the threads such that each loads 4 to 16 adjacent bytes.

That is Gluon, Triton's language of explicit layouts: Triton loads operands through shared memory, behind barriers, and
has no say in which warp has what.

Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from fastvit.kernels._primitives import LOG2_E, empty_heads_last
from fastvit.kernels.head_mixed_attention_fold import Post, fold
from fastvit.kernels.head_mixed_attention_launch import as_operand, padded_dim
from fastvit.kernels.head_mixed_attention_maps import Heads
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere

MAX_HEADS, MAX_KEYS = 16, 256

# By hand, since the compiler would keep each float16 in a register of its own until it multiplies them in pairs.
CONVERT = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
MULTIPLY_ADD = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")


class Folded(NamedTuple):
    """The mixes: the one before the softmax as it is, the other as :func:`fold` gives it."""

    pre_weight: Any
    pre_bias: Any
    scale: Any
    weight: Any
    sizes: Any
    shifts: Any


class Whole(NamedTuple):
    """The compile-time settings of the kernel.

    The strides, in elements, are part of the code: addresses are then immediate offsets.
    """

    heads: int
    head_dim: int
    padded_dim: int
    row_dim: int
    """Columns that q has in memory: padded or not. It is q that is read once."""
    pre_mix: bool
    warps: int
    pieces: tuple[int, ...]
    """Keys of a warp in each of the tensors that a row of the maps consists of: 32, 16 and 8 as needed."""
    steps: int
    """Blocks of 16 keys."""
    q_strides: tuple[int, int]
    k_strides: tuple[int, int]
    v_strides: tuple[int, int]
    out_strides: tuple[int, int]


# --- Layouts --------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _bits(n):
    return [1 << i for i in range(n.bit_length() - 1)]


@triton.constexpr_function
def map_layout(keys, warps):
    """Accumulators of 16 queries and a warp's ``keys`` keys, as [16, keys // 8, warps, 8]."""
    registers = [[0, 0, 0, 1], [8, 0, 0, 0], *([0, b, 0, 0] for b in _bits(keys // 8))]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    shape = [16, keys // 8, warps, 8]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0, b, 0] for b in _bits(warps)], [], shape)


@triton.constexpr_function
def tile_layout(warps):
    """One tile of accumulators a warp, [16, warps, 8]."""
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    warp_bits = [[0, b, 0] for b in _bits(warps)]
    return gl.DistributedLinearLayout([[0, 0, 1], [8, 0, 0]], lanes, warp_bits, [], [16, warps, 8])


@triton.constexpr_function
def row_layout(warps):
    """A number of each row and warp, [16, warps]: all warps' in the threads that have a row's accumulators."""
    registers = [*([0, b] for b in _bits(warps)), [8, 0]]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * len(_bits(warps)), [], [16, warps])


@triton.constexpr_function
def key_layout(depth, keys, warps):
    """k^T as the tensor cores' second operand, [4, depth // 4, keys of all warps]: adjacent columns in a thread."""
    registers = [*([0, b, 0] for b in _bits(depth // 4)), *([0, 0, 8 * warps * b] for b in _bits(keys // 8))]
    lanes = [[1, 0, 0], [2, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    shape = [4, depth // 4, keys * warps]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0, 8 * b] for b in _bits(warps)], [], shape)


@triton.constexpr_function
def query_layout(depth, warps):
    """q before it goes to shared memory, [16, 4, depth // 4]."""
    places = [*([0, 0, b] for b in _bits(depth // 4)), [0, 1, 0], [0, 2, 0], *([b, 0, 0] for b in _bits(16))]
    threads = 5 + len(_bits(warps))
    held = len(places) - threads
    return gl.DistributedLinearLayout(
        places[:held], places[held : held + 5], places[held + 5 :], [], [16, 4, depth // 4]
    )


@triton.constexpr_function
def value_layout(columns, warps):
    """v of a head for each warp as second operand, [warps, 16 keys, 8, columns // 8]: adjacent columns in a thread."""
    registers = [*([0, 0, 0, b] for b in _bits(columns // 8)), [0, 1, 0, 0], [0, 8, 0, 0]]
    lanes = [[0, 2, 0, 0], [0, 4, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    shape = [warps, 16, 8, columns // 8]
    return gl.DistributedLinearLayout(registers, lanes, [[b, 0, 0, 0] for b in _bits(warps)], [], shape)


@triton.constexpr_function
def result_layout(columns, warps):
    """The accumulators of that product with the columns in order, [warps, 16, columns]."""
    width = columns // 8
    registers = [*([0, 0, b] for b in _bits(width)), [0, 0, width], [0, 8, 0]]
    lanes = [[0, 0, 2 * width], [0, 0, 4 * width], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[b, 0, 0] for b in _bits(warps)], [], [warps, 16, columns])


@triton.constexpr_function
def shared_layout(rank, columns):
    """Rows of 16-bit numbers in shared memory, without conflicts between eight rows."""
    phases = min(8, columns // 8)
    return gl.SwizzledSharedLayout(8, 8 // phases, phases, list(reversed(range(rank))))


@triton.constexpr_function
def sliced(layout, axis, rank):
    """The layout of a vector along an axis."""
    for other in reversed(range(rank)):
        layout = layout if other == axis else gl.SliceLayout(other, layout)
    return layout


@triton.constexpr_function
def first_key_of(pieces, piece, warps):
    """The first key of a piece."""
    return sum(pieces[:piece]) * warps


@triton.constexpr_function
def is_ragged(pieces, piece, warps, steps):
    """Whether keys of a piece may be out of bounds."""
    return sum(pieces[: piece + 1]) * warps > 16 * steps - 16


@triton.constexpr_function
def steps_of(pieces, piece, warps):
    """Blocks of 16 keys in a piece."""
    return pieces[piece] * warps // 16


@gluon.jit
def index(N: tl.constexpr, AXIS: tl.constexpr, RANK: tl.constexpr, LAYOUT: tl.constexpr):
    """0, ..., N - 1 along an axis of a tensor of a layout, the other axes of size 1."""
    line = gl.arange(0, N, sliced(LAYOUT, AXIS, RANK))
    for other in gl.static_range(RANK):
        if other != AXIS:
            line = gl.expand_dims(line, other)
    return line


# --- Steps ----------------------------------------------------------------------------------------------------------


@gluon.jit
def keep_queries(q, buffer, last_row, START: tl.constexpr, DEPTH: tl.constexpr, PLAN: tl.constexpr):
    """Columns START, ..., START + DEPTH - 1 of a head's q into shared memory, in the order of :func:`add_scores`."""
    LAYOUT: tl.constexpr = query_layout(DEPTH, PLAN.warps)
    rows = gl.minimum(index(16, 0, 3, LAYOUT), last_row).to(gl.int64)
    columns = START + index(4, 1, 3, LAYOUT) * (DEPTH // 4) + index(DEPTH // 4, 2, 3, LAYOUT)
    pointers = q + (rows * PLAN.q_strides[1] + columns)
    if PLAN.row_dim < START + DEPTH:
        tile = tl.load(pointers, mask=(columns < PLAN.row_dim) & (rows >= 0), other=0)
    else:
        tile = tl.load(pointers)
    pairs = gl.permute(gl.reshape(tile, [16, 4, DEPTH // 8, 2]), (0, 2, 1, 3))
    buffer.store(gl.reshape(pairs, [16, DEPTH]))


@gluon.jit
def add_scores(
    acc, buffer, k, last_key, START: tl.constexpr, DEPTH: tl.constexpr, FIRST: tl.constexpr, KEYS: tl.constexpr,
    RAGGED: tl.constexpr, PRODUCT: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Add the products over some columns. Keys out of bounds repeat the last."""
    LAYOUT: tl.constexpr = key_layout(DEPTH, KEYS, PLAN.warps)
    keys = index(KEYS * PLAN.warps, 2, 3, LAYOUT)
    if RAGGED:
        keys = gl.minimum(keys, last_key - FIRST)
    columns = index(4, 0, 3, LAYOUT) * (DEPTH // 4) + index(DEPTH // 4, 1, 3, LAYOUT)
    pointers = k + (keys.to(gl.int64) * PLAN.k_strides[1] + columns) + (FIRST * PLAN.k_strides[1] + START)
    pairs = gl.permute(gl.reshape(tl.load(pointers), [4, DEPTH // 8, 2, KEYS * PLAN.warps]), (1, 0, 2, 3))
    second = gl.reshape(pairs, [DEPTH, KEYS * PLAN.warps])
    second = gl.convert_layout(second, gl.DotOperandLayout(1, PRODUCT, 2), assert_trivial=True)
    return ampere.mma_v2(buffer.load(gl.DotOperandLayout(0, PRODUCT, 2)), second, acc)


@gluon.jit
def scores(queries, k, last_key, g: tl.constexpr, i: tl.constexpr, PLAN: tl.constexpr):
    """q k^T of head g for piece i of the keys, [16, keys // 8, warps, 8]."""
    PRODUCT: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, PLAN.warps], [16, 8])
    WIDE: tl.constexpr = PLAN.padded_dim // 32
    PARTS: tl.constexpr = (PLAN.padded_dim + 16) // 32
    KEYS: tl.constexpr = PLAN.pieces[i]
    FIRST: tl.constexpr = first_key_of(PLAN.pieces, i, PLAN.warps)
    RAGGED: tl.constexpr = is_ragged(PLAN.pieces, i, PLAN.warps, PLAN.steps)
    k += g * PLAN.k_strides[0]
    acc = gl.full([16, KEYS * PLAN.warps], 0.0, gl.float32, PRODUCT)
    for part in gl.static_range(WIDE):
        second = queries[g * PARTS + part]
        acc = add_scores(acc, second, k, last_key, 32 * part, 32, FIRST, KEYS, RAGGED, PRODUCT, PLAN)
    if PARTS > WIDE:
        second = queries[g * PARTS + WIDE]
        acc = add_scores(acc, second, k, last_key, 32 * WIDE, 16, FIRST, KEYS, RAGGED, PRODUCT, PLAN)
    tiles = gl.reshape(acc, [16, KEYS // 8, PLAN.warps, 8])
    return gl.convert_layout(tiles, map_layout(KEYS, PLAN.warps), assert_trivial=True)


@gluon.jit
def without_keys_beyond(tiles, last, KEYS: tl.constexpr, PLAN: tl.constexpr):
    """-inf for keys of a piece beyond the last."""
    LAYOUT: tl.constexpr = map_layout(KEYS, PLAN.warps)
    keys = index(KEYS // 8, 1, 4, LAYOUT) * (8 * PLAN.warps) + index(PLAN.warps, 2, 4, LAYOUT) * 8
    return gl.where(keys + index(8, 3, 4, LAYOUT) <= last, tiles, float("-inf"))


@gluon.jit
def of_row(maxima, sums, h: tl.constexpr, GROUPS: tl.constexpr, PLAN: tl.constexpr):
    """Maximum and sum of exp2 of the rows of a head, from those of each warp and group of keys."""
    HEADS: tl.constexpr = PLAN.heads
    LAYOUT: tl.constexpr = row_layout(PLAN.warps)
    top = gl.max(maxima[h].load(LAYOUT), 1)
    for group in gl.static_range(1, GROUPS):
        top = gl.maximum(top, gl.max(maxima[group * HEADS + h].load(LAYOUT), 1))
    total = gl.full([16], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
    for group in gl.static_range(GROUPS):
        shares = gl.exp2(maxima[group * HEADS + h].load(LAYOUT) - gl.expand_dims(top, 1))
        total += gl.sum(shares * sums[group * HEADS + h].load(LAYOUT), 1)
    return top, total


@gluon.jit
def store_lse(lse, maxima, sums, last_row, num_queries, GROUPS: tl.constexpr, PLAN: tl.constexpr):
    """Write the log2-sum-exp2 of the rows, (H, num_queries)."""
    HEADS: tl.constexpr = PLAN.heads
    rows = gl.arange(0, 16, gl.SliceLayout(1, row_layout(PLAN.warps)))
    for h in gl.static_range(HEADS):
        top, total = of_row(maxima, sums, h, GROUPS, PLAN)
        tl.store(lse + h * num_queries + rows, top + gl.log2(total), mask=rows <= last_row)


@gluon.jit
def shares_of_warp(maxima, sums, h: tl.constexpr, GROUPS: tl.constexpr, PLAN: tl.constexpr):
    """What a warp's exp2 of a head are to be multiplied by, for each group of keys: a tuple of [16, warps]."""
    HEADS: tl.constexpr = PLAN.heads
    OWN: tl.constexpr = gl.SliceLayout(2, tile_layout(PLAN.warps))
    top, total = of_row(maxima, sums, h, GROUPS, PLAN)
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, OWN), assert_trivial=True)
    top = gl.expand_dims(gl.convert_layout(top, gl.SliceLayout(1, OWN), assert_trivial=True), 1)
    found = ()
    for group in gl.static_range(GROUPS):
        found = found + (gl.exp2(maxima[group * HEADS + h].load(OWN) - top) * gl.expand_dims(inverse, 1),)
    return found


@gluon.jit
def for_tiles(row, KEYS: tl.constexpr, PLAN: tl.constexpr):
    """A number of each row and warp, broadcastable to a piece of a map."""
    LAYOUT: tl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, map_layout(KEYS, PLAN.warps)))
    return gl.expand_dims(gl.expand_dims(gl.convert_layout(row, LAYOUT, assert_trivial=True), 1), 3)


@gluon.jit
def packed(tiles):
    """In float16, two numbers in a register."""
    return gl.inline_asm_elementwise(CONVERT, "=r,r,r", [tiles], gl.float16, True, 2)


@gluon.jit
def less_centre(tiles, factor, centre, KEYS: tl.constexpr, PLAN: tl.constexpr):
    """A piece of P - 1 / Nk, in float16."""
    LAYOUT: tl.constexpr = map_layout(KEYS, PLAN.warps)
    shape: tl.constexpr = [16, KEYS // 8, PLAN.warps, 8]
    factors = gl.full(shape, 1.0, gl.float16, LAYOUT) * for_tiles(factor.to(gl.float16), KEYS, PLAN)
    centres = gl.full(shape, centre, gl.float16, LAYOUT)
    return gl.inline_asm_elementwise(MULTIPLY_ADD, "=r,r,r,r", [tiles, factors, centres], gl.float16, True, 2)


@gluon.jit
def over_tiles(tiles, LARGEST: tl.constexpr, PLAN: tl.constexpr):
    """Maximum or sum over the tiles of a piece, which a thread has all of: [16, warps, 8]."""
    if LARGEST:
        tile = gl.max(tiles, 1)
    else:
        tile = gl.sum(tiles, 1)
    return gl.convert_layout(tile, tile_layout(PLAN.warps), assert_trivial=True)


@gluon.jit
def exponentials(logits, factor, last_key, FIRST: tl.constexpr, PLAN: tl.constexpr):
    """exp2(factor * logits - m) in float16, a tuple of pieces from FIRST on; a warp's m and sum, [16, warps]."""
    COUNT: tl.constexpr = len(logits)
    LAYOUT: tl.constexpr = tile_layout(PLAN.warps)
    inside = ()
    largest = gl.full([16, PLAN.warps, 8], float("-inf"), gl.float32, LAYOUT)
    for i in gl.static_range(COUNT):
        tiles = logits[i]
        if is_ragged(PLAN.pieces, FIRST + i, PLAN.warps, PLAN.steps):
            first_key = first_key_of(PLAN.pieces, FIRST + i, PLAN.warps)
            tiles = without_keys_beyond(tiles, last_key - first_key, PLAN.pieces[FIRST + i], PLAN)
        largest = gl.maximum(largest, over_tiles(tiles, True, PLAN))
        inside = inside + (tiles,)
    maximum = gl.max(largest, 2) * factor
    finite = gl.where(maximum == float("-inf"), 0.0, maximum)  # of a warp without keys
    maps = ()
    total = gl.full([16, PLAN.warps, 8], 0.0, gl.float32, LAYOUT)
    for i in gl.static_range(COUNT):
        tiles = gl.exp2(inside[i] * factor - for_tiles(finite, PLAN.pieces[FIRST + i], PLAN))
        total += over_tiles(tiles, False, PLAN)
        maps = maps + (packed(tiles),)
    return maps, maximum, gl.sum(total, 2)


@gluon.jit
def kept_queries(q, last_row, PLAN: tl.constexpr):
    """q of all heads in shared memory, a tuple of heads times blocks of columns."""
    HEADS: tl.constexpr = PLAN.heads
    WIDE: tl.constexpr = PLAN.padded_dim // 32
    PARTS: tl.constexpr = (PLAN.padded_dim + 16) // 32
    dtype: tl.constexpr = q.dtype.element_ty
    queries = ()
    for g in gl.static_range(HEADS):
        for i in gl.static_range(WIDE):
            queries = queries + (gl.allocate_shared_memory(dtype, [16, 32], shared_layout(2, 32)),)
            keep_queries(q + g * PLAN.q_strides[0], queries[g * PARTS + i], last_row, 32 * i, 32, PLAN)
        if PARTS > WIDE:
            queries = queries + (gl.allocate_shared_memory(dtype, [16, 16], shared_layout(2, 16)),)
            keep_queries(q + g * PLAN.q_strides[0], queries[g * PARTS + WIDE], last_row, 32 * WIDE, 16, PLAN)
    return queries


@gluon.jit
def mixed_logits(logits, pre_weight, h: tl.constexpr, PLAN: tl.constexpr):
    """sum_g pre_weight[h, g] logits[g], of a piece."""
    HEADS: tl.constexpr = PLAN.heads
    mixed = logits[0] * tl.load(pre_weight + h * HEADS).to(gl.float32)
    for g in gl.static_range(1, HEADS):
        mixed += logits[g] * tl.load(pre_weight + h * HEADS + g).to(gl.float32)
    return mixed


@gluon.jit
def centred_maps(q, k, mixes, last_row, last_key, GROUPS: tl.constexpr, PLAN: tl.constexpr):
    """P - 1 / Nk in float16, a tuple of heads times pieces; maxima and sums of the warps, as :func:`of_row` takes them.

    With a mix in front of the softmax a group of keys is one piece, of which all heads' scores are held in float32;
    without one, where a head is done with as soon as it is computed, it is all of them.
    """
    HEADS: tl.constexpr = PLAN.heads
    COUNT: tl.constexpr = len(PLAN.pieces)
    ROWS: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    queries = kept_queries(q, last_row, PLAN)
    scale = tl.cast(mixes.scale, gl.float32) * LOG2_E  # a Python float may arrive as float64
    maps = ()
    maxima = ()
    sums = ()
    for group in gl.static_range(GROUPS):
        logits = ()
        if PLAN.pre_mix:
            for g in gl.static_range(HEADS):
                logits = logits + (scores(queries, k, last_key, g, group, PLAN),)
        for h in gl.static_range(HEADS):
            own = ()
            if PLAN.pre_mix:
                own = (mixed_logits(logits, mixes.pre_weight, h, PLAN),)
            else:
                for i in gl.static_range(COUNT):
                    own = own + (scores(queries, k, last_key, h, i, PLAN),)
            found, maximum, total = exponentials(own, scale, last_key, group, PLAN)
            if mixes.pre_bias is not None:  # the softmax takes it away again, but not a NaN or inf
                maximum += tl.load(mixes.pre_bias + h).to(gl.float32) * 0.0
            maps = maps + found
            # A buffer for each, since the compiler puts a barrier between two stores to one.
            maxima = maxima + (gl.allocate_shared_memory(gl.float32, [16, PLAN.warps], ROWS, maximum),)
            sums = sums + (gl.allocate_shared_memory(gl.float32, [16, PLAN.warps], ROWS, total),)
    centre = (-1.0 / (last_key + 1).to(gl.float32)).to(gl.float16)
    centred = ()
    for h in gl.static_range(HEADS):
        shares = shares_of_warp(maxima, sums, h, GROUPS, PLAN)
        for i in gl.static_range(COUNT):
            if PLAN.pre_mix:
                centred = centred + (less_centre(maps[i * HEADS + h], shares[i], centre, PLAN.pieces[i], PLAN),)
            else:
                centred = centred + (less_centre(maps[h * COUNT + i], shares[0], centre, PLAN.pieces[i], PLAN),)
    return centred, maxima, sums


@gluon.jit
def add_values(
    acc, maps, v, last_key, FIRST: tl.constexpr, HEAD: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr, PRODUCT: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Add the product of 16 keys: heads HEAD, ... of as many warps, columns COLUMN, ... of the result."""
    LAYOUT: tl.constexpr = value_layout(COLUMNS, PLAN.warps)
    heads = index(PLAN.warps, 0, 4, LAYOUT)
    if HEAD + PLAN.warps > PLAN.heads:
        heads = gl.minimum(heads, PLAN.heads - 1 - HEAD)
    keys = index(16, 1, 4, LAYOUT)
    columns = index(8, 2, 4, LAYOUT) * (COLUMNS // 8) + index(COLUMNS // 8, 3, 4, LAYOUT)
    offsets = heads.to(gl.int64) * PLAN.v_strides[0] + keys.to(gl.int64) * PLAN.v_strides[1] + columns
    pointers = v + offsets + (HEAD * PLAN.v_strides[0] + FIRST * PLAN.v_strides[1] + COLUMN)
    if RAGGED:
        tile = tl.load(pointers, mask=(FIRST + keys <= last_key) & (offsets >= 0), other=0)
    else:
        tile = tl.load(pointers)
    tile = gl.reshape(gl.permute(tile, (0, 1, 3, 2)), [PLAN.warps, 16, COLUMNS])
    return ampere.mma_v2(maps, gl.convert_layout(tile, gl.DotOperandLayout(1, PRODUCT, 2), assert_trivial=True), acc)


@gluon.jit
def store_result(
    out, acc, last_row, HEAD: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, PLAN: tl.constexpr
):
    """Write COLUMNS columns of the result of a head for each warp."""
    LAYOUT: tl.constexpr = result_layout(COLUMNS, PLAN.warps)
    tile = gl.permute(gl.reshape(acc, [PLAN.warps, 16, COLUMNS // 8, 8]), (0, 1, 3, 2))
    tile = gl.convert_layout(gl.reshape(tile, [PLAN.warps, 16, COLUMNS]), LAYOUT, assert_trivial=True)
    heads = HEAD + index(PLAN.warps, 0, 3, LAYOUT)
    rows = index(16, 1, 3, LAYOUT)
    columns = COLUMN + index(COLUMNS, 2, 3, LAYOUT)
    offsets = heads.to(gl.int64) * PLAN.out_strides[0] + rows.to(gl.int64) * PLAN.out_strides[1] + columns
    inside = (rows <= last_row) & (heads < PLAN.heads) & (columns < PLAN.head_dim)
    tl.store(out + offsets, tile.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def mix_and_multiply(out, centred, mixes, v, last_row, last_key, PLAN: tl.constexpr):
    """The finished maps, and their product with v."""
    HEADS: tl.constexpr = PLAN.heads
    COUNT: tl.constexpr = len(PLAN.pieces)
    PRODUCT: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [PLAN.warps, 1, 1], [1, 16, 8])
    dtype: tl.constexpr = v.dtype.element_ty
    ROUNDS: tl.constexpr = (PLAN.heads + PLAN.warps - 1) // PLAN.warps
    mixed = ()
    for _ in gl.static_range(ROUNDS):
        for i in gl.static_range(COUNT):
            mixed = mixed + (
                gl.allocate_shared_memory(
                    dtype, [PLAN.warps, 16, PLAN.pieces[i] * PLAN.warps], shared_layout(3, PLAN.pieces[i] * PLAN.warps)
                ),
            )
    for h in gl.static_range(HEADS):
        weights = ()
        for g in gl.static_range(HEADS):
            weights = weights + (tl.load(mixes.weight + h * PLAN.heads + g),)
        size = tl.load(mixes.sizes + h)
        shift = tl.load(mixes.shifts + h)
        for i in gl.static_range(COUNT):
            x = centred[i] * weights[0]
            for g in gl.static_range(1, HEADS):
                x += centred[g * COUNT + i] * weights[g]
            finished = (x.to(gl.float32) * size + shift).to(dtype)
            finished = gl.reshape(finished, [1, 16, PLAN.pieces[i] * PLAN.warps])
            mixed[h // PLAN.warps * COUNT + i].slice(h % PLAN.warps, 1).store(finished)

    WIDE: tl.constexpr = PLAN.padded_dim // 32
    for r in gl.static_range(ROUNDS):
        accs = ()
        for _ in gl.static_range(WIDE):
            accs = accs + (gl.full([PLAN.warps, 16, 32], 0.0, gl.float32, PRODUCT),)
        if PLAN.padded_dim > 32 * WIDE:
            accs = accs + (gl.full([PLAN.warps, 16, 16], 0.0, gl.float32, PRODUCT),)
        for i in gl.static_range(COUNT):
            for step in gl.static_range(steps_of(PLAN.pieces, i, PLAN.warps)):
                if first_key_of(PLAN.pieces, i, PLAN.warps) + 16 * step < 16 * PLAN.steps:
                    first = mixed[r * COUNT + i].slice(16 * step, 16, 2).load(gl.DotOperandLayout(0, PRODUCT, 2))
                    sums = ()
                    for j in gl.static_range(len(accs)):
                        sums = sums + (
                            add_values(
                                accs[j], first, v, last_key, first_key_of(PLAN.pieces, i, PLAN.warps) + 16 * step,
                                r * PLAN.warps, 32 * j, 32 if j < WIDE else 16,
                                first_key_of(PLAN.pieces, i, PLAN.warps) + 16 * step == 16 * PLAN.steps - 16,
                                PRODUCT, PLAN,
                            ),
                        )  # fmt: skip
                    accs = sums
        for j in gl.static_range(len(accs)):
            store_result(out, accs[j], last_row, r * PLAN.warps, 32 * j, 32 if j < WIDE else 16, PLAN)


@gluon.jit(do_not_specialize=["num_queries", "num_keys"])
def whole_rows_kernel(q, k, v, mixes, lse, out, q_step, k_step, v_step, num_queries, num_keys, PLAN: tl.constexpr):
    """The result of one block of queries, and the log2-sum-exp2 of its rows, unless lse is None."""
    blocks = gl.cdiv(num_queries, 16)
    first_row = gl.program_id(0) % blocks * 16
    b = (gl.program_id(0) // blocks).to(gl.int64)
    last_row = num_queries - 1 - first_row
    last_key = num_keys - 1
    q += b * q_step + first_row.to(gl.int64) * PLAN.q_strides[1]
    k += b * k_step
    v += b * v_step
    out += (b * num_queries + first_row) * PLAN.out_strides[1]

    GROUPS: tl.constexpr = len(PLAN.pieces) if PLAN.pre_mix else 1
    centred, maxima, sums = centred_maps(q, k, mixes, last_row, last_key, GROUPS, PLAN)
    mix_and_multiply(out, centred, mixes, v, last_row, last_key, PLAN)
    if lse is not None:  # at last, when there are registers
        store_lse(lse + (b * (PLAN.heads * num_queries) + first_row), maxima, sums, last_row, num_queries, GROUPS, PLAN)


# --- Launching ------------------------------------------------------------------------------------------------------


MAX_HELD = 168
"""Registers of a thread for the maps."""


def plan_for(
    heads: int, keys: int, head_dim: int, row_dim: int, pre_mix: bool, shared_limit: int, strides: Callable[[], Any]
) -> Whole | None:
    """The settings for a call, or None where the maps do not fit the registers or the shared memory.

    ``strides``: of q, k, v and the result, from head to head and from row to row.
    """
    if heads > MAX_HEADS or keys > MAX_KEYS:
        return None
    for warps in (4, 8):
        tiles = triton.cdiv(keys, 8 * warps)
        pieces = tuple(8 * n for n in (8, 4, 2, 1) if tiles & n)
        # The packed maps; with a mix in front of the softmax, a piece of them beside its scores in float32.
        registers = heads * max(2 * tiles, pieces[0] * 5 // 8 if pre_mix else 0)
        shared = triton.cdiv(heads, warps) * warps * 16 * tiles * 8 * warps * 2
        if registers <= MAX_HELD and shared < shared_limit:
            steps = triton.cdiv(keys, 16)
            return Whole(heads, head_dim, padded_dim(head_dim), row_dim, pre_mix, warps, pieces, steps, *strides())
    return None


def whole_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post: Post,
    scale: float,
    shared_limit: int,
    *,
    centred: bool,
    lse: Tensor | None = None,
) -> Tensor | None:
    """The result, or None where the maps do not fit.

    Args:
        q, k, v, pre_weight, pre_bias, scale, centred: as in
            :func:`fastvit.kernels.head_mixed_attention.head_mixed_attention_forward`.
        shared_limit: bytes of shared memory per program.
        lse: (B, H, Nq) float32, to be written, of base-2 logits without pre_bias.
    """
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    q = q if q.stride(3) == 1 else q.contiguous()
    out = empty_heads_last(q, num_queries)
    operands: list[Heads] = []

    def strides() -> tuple[Any, ...]:
        operands.extend((as_operand(k), as_operand(v)))
        return tuple(tensor.stride()[1:3] for tensor in (q, *(each.pointer for each in operands), out))

    plan = plan_for(heads, num_keys, head_dim, head_dim, pre_weight is not None, shared_limit, strides)
    if plan is None:
        return None
    keys, values = operands
    folded = fold(post, missing=0.0 if centred else 1.0 / num_keys, sized=True)
    pre = (None if tensor is None else tensor.contiguous() for tensor in (pre_weight, pre_bias))
    whole_rows_kernel[(batch * triton.cdiv(num_queries, 16),)](
        q, keys.pointer, values.pointer, Folded(*pre, float(scale), *folded), lse, out,
        q.stride(0), keys.stride_b, values.stride_b, num_queries, num_keys, PLAN=plan, num_warps=plan.warps,
    )  # fmt: skip
    return out

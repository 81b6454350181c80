"""Class attention, one query or a few over all tokens, forward. The backward is in ``attention_class_backward.py``.

    out[b, h, i] = softmax(q[b, h, i] k[b, h]^T * scale + bias, over the keys that mask allows) v[b, h]

Shapes: q (B, H, Nq, D) with few queries, k and v (B, H, Nk, D), any strides with stride 1 in the last axis; mask and
bias are read through the strides of their broadcast to (B, H, Nq, Nk). The result has the strides of a contiguous
(B, Nq, H, D). A query without visible keys gives zeros, and zero gradients.

With few queries there is little arithmetic per key, and the time is that of reading K and V once. So there are no
matrix products, and to keep every multiprocessor reading, even for one image, the keys of a head are split:

In 16 bits, where there are heads enough to fill the device and neither a bias nor a mask that varies by query, the
kernel of masked attention takes them in tiles of 16 queries: by prediction (``benchmarks/gpu_model``) products with
rows that do not exist cost less there than these kernels' sums, whose reductions wait for each other. Otherwise

1. parts: a program takes one query and a range of keys, in tiles [BLOCK_N, BLOCK_D] with a running maximum m, a running
   sum l and an accumulator. Programs that share keys are adjacent, so that all but the first find them in the cache.
2. combine: a program adds the parts of one query, in order: out = sum(acc exp(m - M)) / sum(l exp(m - M)), M = max(m).

Everything between input and output is float32. There are no atomics: every sum has a fixed order.

Source: Touvron et al. 2021 (CaiT), section 3; Dao et al. 2023 (Flash-Decoding: keys split between programs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import (
    FULL_MASK,
    LOG2_E,
    empty_heads_last,
    finite_maximum,
    inverse_of_sum,
    load_key_mask,
    load_tile,
    product_kind,
)
from fastvit.kernels.attention_masked import FEW_QUERIES, masked_attention_forward
from fastvit.kernels.attention_tiles import Operands, named_strides
from torch import Tensor

from fastvit import autotune

MAX_PARTS = 64
"""The most parts of a query: one program combines them all."""

COMBINE_WARPS = 4


class Config(NamedTuple):
    """A launch configuration: keys in a tile, and warps."""

    block_n: int
    num_warps: int


CONFIGS: dict[int, tuple[Config, ...]] = {
    32: (Config(32, 4), Config(64, 4)),
    64: (Config(64, 8), Config(32, 4)),
    128: (Config(16, 4), Config(32, 8)),
}
"""The candidates, by padded head dimension."""

NOT_SPECIALIZED = ["H", "num_queries", "num_keys", "keys_per_part", "parts", "stride_mb", "stride_mh"]


@triton.jit
def load_row(row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The D elements at ``row`` as float32, padded with zeros."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(row + columns, mask=columns < D, other=0).to(tl.float32)


@triton.jit
def row_logits(
    q_row,
    k_tile,
    scale,
    mask,
    bias,
    first_key,
    num_keys,
    stride_mk,
    stride_biask,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Logits [BLOCK_N] of one query, -inf where a key is masked or out of bounds; and where it is neither."""
    logits = tl.sum(k_tile * q_row[None, :], 1) * scale
    keys = tl.arange(0, BLOCK_N)
    visible = first_key + keys < num_keys
    if HAS_MASK:
        visible = load_key_mask(mask, first_key, num_keys, stride_mk, BLOCK_N)
    if HAS_BIAS:
        place = bias + tl.cast(first_key, tl.int64) * stride_biask
        added = tl.load(place + keys * stride_biask, mask=visible, other=0).to(tl.float32)
        logits += added
        visible = visible & (added != float("-inf"))
    return tl.where(visible, logits, float("-inf")), visible


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def class_attention_parts_kernel(
    q,
    k,
    v,
    mask,
    bias,
    grad,
    part_max,
    part_sum,
    part_acc,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_biasb,
    stride_biash,
    stride_biasq,
    stride_biask,
    H,
    num_queries,
    num_keys,
    keys_per_part,
    parts,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One part of one query: its maximum, its sum, and the sum of P V; in the backward that of P dP, one number.

    part_max and part_sum are (B, H, Nq, parts), part_acc is (B, H, Nq, parts, D), in the backward (B, H, Nq, parts).
    """
    scale = tl.cast(scale, tl.float32)  # a Python float may arrive as float64

    program = tl.program_id(0)
    query = program % num_queries
    program = program // num_queries
    part = program % parts
    head = (program // parts).to(tl.int64)
    b = head // H
    h = head % H
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    if HAS_MASK:
        mask += b * stride_mb + h * stride_mh + query.to(tl.int64) * stride_mq
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash + query.to(tl.int64) * stride_biasq
    EXACT_D: tl.constexpr = BLOCK_D == D
    q_row = load_row(q + (b * stride_qb + h * stride_qh + query.to(tl.int64) * stride_qn), D, BLOCK_D)
    if BACKWARD:
        g_row = load_row(grad + (b * stride_gb + h * stride_gh + query.to(tl.int64) * stride_gn), D, BLOCK_D)
        acc = tl.zeros([1], tl.float32)
    else:
        acc = tl.zeros([BLOCK_D], tl.float32)

    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    first = part * keys_per_part
    for start in range(first, tl.minimum(first + keys_per_part, num_keys), BLOCK_N):
        k_tile = load_tile(k, start, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D).to(tl.float32)
        logits, visible = row_logits(
            q_row, k_tile, scale, mask, bias, start, num_keys, stride_mk, stride_biask, BLOCK_N, HAS_MASK, HAS_BIAS
        )
        new_max = tl.maximum(row_max, tl.max(logits, 0))
        finite_max = finite_maximum(new_max)
        p = tl.exp2((logits - finite_max) * LOG2_E)
        rescale = tl.exp2((row_max - finite_max) * LOG2_E)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        wanted = None
        if HAS_MASK or HAS_BIAS:  # 0 times NaN is NaN
            wanted = visible
        v_tile = load_tile(v, start, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D, wanted).to(tl.float32)
        if BACKWARD:
            acc = acc * rescale + tl.sum(p * tl.sum(v_tile * g_row[None, :], 1), 0)
        else:
            acc = acc * rescale + tl.sum(p[:, None] * v_tile, 0)
        row_max = new_max

    place = (head * num_queries + query) * parts + part
    one = tl.arange(0, 1)
    tl.store(part_max + place + one, row_max)
    tl.store(part_sum + place + one, row_sum)
    if BACKWARD:
        tl.store(part_acc + place + one, acc)
    else:
        columns = tl.arange(0, BLOCK_D)
        tl.store(part_acc + place * D + columns, acc, mask=columns < D)


@triton.jit
def weights_of_parts(part_max, part_sum, row, parts, PARTS: tl.constexpr):
    """The factors that rescale a row's parts, [PARTS], the row's maximum (0 without keys), and 1 / its sum."""
    index = tl.arange(0, PARTS)
    maxima = tl.load(part_max + row * parts + index, mask=index < parts, other=float("-inf"))
    row_max = finite_maximum(tl.max(maxima, 0))
    weights = tl.exp2((maxima - row_max) * LOG2_E)
    sums = tl.load(part_sum + row * parts + index, mask=index < parts, other=0.0)
    return weights, row_max, inverse_of_sum(tl.sum(sums * weights, 0))


@triton.jit(do_not_specialize=["H", "num_queries", "parts"])
def class_attention_combine_kernel(
    part_max,
    part_sum,
    part_acc,
    out,
    H,
    num_queries,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The output of one query, from its parts."""
    row = tl.program_id(0).to(tl.int64)
    query = row % num_queries
    head = row // num_queries
    weights, _, inverse = weights_of_parts(part_max, part_sum, row, parts, PARTS)
    acc = load_tile(part_acc + row * parts * D, 0, 0, parts, D, D, 1, PARTS, BLOCK_D)
    result = tl.sum(acc * weights[:, None], 0) * inverse
    columns = tl.arange(0, BLOCK_D)
    place = ((head // H * num_queries + query) * H + head % H) * D
    tl.store(out + place + columns, result.to(out.dtype.element_ty), mask=columns < D)


def _parts(q: Tensor, num_keys: int, block_n: int) -> tuple[int, int]:
    """(parts, keys per part): two programs per multiprocessor where there are enough keys; parts of whole tiles."""
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    tiles = triton.cdiv(num_keys, block_n)
    wanted = min(tiles, MAX_PARTS, triton.cdiv(2 * autotune.multiprocessors(q.device), rows))
    tiles_per_part = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_per_part), tiles_per_part * block_n


class Launches:
    """The arguments of one call's launches, and the first launch; ``grad`` is None in the forward."""

    def __init__(self, operands: Operands, grad: Tensor | None, scale: float) -> None:
        q, k = operands.q, operands.k
        self.q = q
        self.num_keys = k.shape[2]
        self.backward = grad is not None
        self.arguments = {
            **operands.arguments(scale),
            **named_strides("g", grad),
            "grad": grad,
            "HAS_MASK": operands.mask is not None,
            "HAS_BIAS": operands.bias is not None,
        }
        buckets = map(autotune.token_bucket, (self.num_keys, q.shape[0] * q.shape[2]))
        self.key = (q.dtype, q.shape[1], q.shape[3], operands.mask is not None, operands.bias is not None, *buckets)

    def parts(self, config: Config) -> dict[str, Tensor | int]:
        """Compute the parts of every query."""
        q = self.q
        parts, keys_per_part = _parts(q, self.num_keys, config.block_n)
        rows = q.shape[:3]
        part_max, part_sum = torch.empty((2, *rows, parts), dtype=torch.float32, device=q.device)
        part_acc = torch.empty(
            (*rows, parts) if self.backward else (*rows, parts, q.shape[3]), dtype=torch.float32, device=q.device
        )
        found: dict[str, Tensor | int] = {
            "part_max": part_max, "part_sum": part_sum, "part_acc": part_acc, "parts": parts,
        }  # fmt: skip
        class_attention_parts_kernel[(rows.numel() * parts,)](
            **self.arguments,
            **found,
            keys_per_part=keys_per_part,
            BLOCK_N=config.block_n,
            BACKWARD=self.backward,
            num_warps=config.num_warps,
        )
        return found

    def choose(self, name: str, run: Callable[[Config], object]) -> Config:
        """The autotuned configuration."""
        candidates = CONFIGS[self.arguments["BLOCK_D"]]
        return autotune.choose(name, self.key, candidates, run)


def _combine(launches: Launches, config: Config, out: Tensor) -> None:
    """Compute the output of every query."""
    found = launches.parts(config)
    names = ("H", "num_queries", "D", "BLOCK_D")
    class_attention_combine_kernel[(launches.q.shape[:3].numel(),)](
        **found,
        **{name: launches.arguments[name] for name in names},
        out=out,
        PARTS=triton.next_power_of_2(found["parts"]),
        num_warps=COMBINE_WARPS,
    )


def class_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    config: Config | None = None,
) -> Tensor:
    """Launch the kernels.

    Args:
        q: (B, H, Nq, D) with few queries, k, v: (B, H, Nk, D); float32, float16 or bfloat16, all the same, D up to 128.
            Any strides; copied where that of the last axis is not 1.
        mask: bool, True = attend, broadcastable to (B, H, Nq, Nk). bias: floating, likewise.
        scale: multiplies q k^T.
        config: instead of the autotuned one.

    Returns:
        (B, H, Nq, D) with the strides of a contiguous (B, Nq, H, D).
    """
    out = empty_heads_last(q, q.shape[2])
    if 0 in (*q.shape, k.shape[2]):
        return out.zero_()
    operands = Operands.of(q, k, v, mask, bias)
    few = product_kind(q.dtype) == "half" and q.shape[2] <= FEW_QUERIES
    few = few and bias is None and operands.mask_kind != FULL_MASK
    if config is None and few and q.shape[0] * q.shape[1] >= 2 * autotune.multiprocessors(q.device):
        return masked_attention_forward(q, k, v, mask, bias, scale)[0]
    with torch.cuda.device_of(q):
        launches = Launches(operands, None, scale)
        if config is None:
            config = launches.choose(
                "class_attention", lambda config: _combine(launches, config, torch.empty_like(out))
            )
        _combine(launches, config, out)
    return out

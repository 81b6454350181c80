"""Masked attention, backward: the gradient of the bias.

    dbias = dS summed over bias's broadcast axes

with dS as in ``attention_masked_backward.py``, whose dq kernel has written shift, factor and delta of every row. A
program holds one tile of the bias and loops over the batch elements, heads and query tiles that it is broadcast to. A
bias with one value for all keys has no effect, so its gradient is zero. Where there would be too few programs, or too
many terms in a float32 sum, the sum is split into partial sums, which are then added in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import load_key_mask, load_tile
from fastvit.kernels.attention_masked import Config
from fastvit.kernels.attention_tiles import NOT_SPECIALIZED, exponentials, load_row_values, logits_tile
from torch import Tensor

from fastvit import autotune

MAX_TERMS_PER_SUM = 64
"""The most terms a float32 sum over broadcast axes may have; longer sums are split."""


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "steps", "steps_per_split", "splits"])
def masked_attention_dbias_kernel(
    grad,
    q,
    k,
    v,
    mask,
    bias,
    dbias,
    shift,
    factor,
    delta,
    scale,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
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
    steps,
    steps_per_split,
    splits,
    bias_batch,
    bias_heads,
    bias_queries,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One partial sum of one tile of dbias; the partial sums are (splits, *bias.shape)."""
    scale = tl.cast(scale, tl.float32)

    # The program's tile of the bias, and the number of tiles it is broadcast to along each axis.
    query_blocks = tl.cdiv(num_queries, BLOCK_M)
    key_blocks = tl.cdiv(num_keys, BLOCK_N)
    own_query_blocks = tl.cdiv(bias_queries, BLOCK_M)
    program = tl.program_id(0)
    split = program % splits
    program = program // splits
    first_key = (program % key_blocks) * BLOCK_N
    program = program // key_blocks
    own_query = program % own_query_blocks
    program = program // own_query_blocks
    own_h = program % bias_heads
    own_b = program // bias_heads
    query_steps = query_blocks // own_query_blocks
    head_steps = H // bias_heads

    EXACT_D: tl.constexpr = BLOCK_D == D
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * steps_per_split, tl.minimum(steps, (split + 1) * steps_per_split)):
        first_query = (own_query + step % query_steps) * BLOCK_M
        rest = step // query_steps
        h = (own_h + rest % head_steps).to(tl.int64)
        b = (own_b + rest // head_steps).to(tl.int64)
        head = b * H + h
        q_tile = load_tile(
            q + b * stride_qb + h * stride_qh, first_query, 0, num_queries, D, stride_qn, 1, BLOCK_M, BLOCK_D, EXACT_D
        )
        k_tile = load_tile(
            k + b * stride_kb + h * stride_kh, first_key, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D
        )
        head_mask = mask
        if MASK_KIND != 0:
            head_mask = mask + (b * stride_mb + h * stride_mh)
        logits = logits_tile(
            q_tile, k_tile, scale, head_mask, bias + (b * stride_biasb + h * stride_biash), first_query, first_key,
            num_queries, num_keys, stride_mq, stride_mk, stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND,
            True, PRECISION,
        )  # fmt: skip
        row_shift = load_row_values(shift + head * num_queries, first_query, num_queries, BLOCK_M)
        row_factor = load_row_values(factor + head * num_queries, first_query, num_queries, BLOCK_M)
        p = exponentials(logits, row_shift[:, None], True) * row_factor[:, None]
        g_tile = load_tile(
            grad + b * stride_gb + h * stride_gh, first_query, 0, num_queries, D, stride_gn, 1, BLOCK_M, BLOCK_D,
            EXACT_D,
        )  # fmt: skip
        wanted = None
        if MASK_KIND == 1:  # 0 times NaN is NaN
            wanted = load_key_mask(head_mask, first_key, num_keys, stride_mk, BLOCK_N)
        v_tile = load_tile(
            v + b * stride_vb + h * stride_vh, first_key, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D,
            wanted,
        )  # fmt: skip
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        row_delta = load_row_values(delta + head * num_queries, first_query, num_queries, BLOCK_M)
        acc += p * (dp - row_delta[:, None])

    if bias_queries == 1:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
    place = ((tl.cast(split, tl.int64) * bias_batch + own_b) * bias_heads + own_h) * bias_queries * num_keys
    rows = own_query * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_key + tl.arange(0, BLOCK_N)
    inside = (rows < bias_queries)[:, None] & (columns < num_keys)[None, :]
    rows = rows.to(tl.int64)
    tl.store(dbias + place + rows[:, None] * num_keys + columns[None, :], acc, mask=inside)


def bias_gradient(arguments: dict[str, Any], bias: Tensor, config: Config) -> Tensor:
    """dbias in bias's shape and dtype; ``arguments`` include shift, factor and delta."""
    if bias.shape[3] == 1:  # softmax is invariant to what is added to all keys alike
        return torch.zeros_like(bias)
    q, num_keys = arguments["q"], arguments["num_keys"]
    blocks = (triton.cdiv(q.shape[2], config.block_m), triton.cdiv(num_keys, config.block_n))
    whole = (*q.shape[:2], *blocks)
    own = (*bias.shape[:2], triton.cdiv(bias.shape[2], config.block_m), blocks[1])
    programs, steps = math.prod(own), math.prod(whole) // math.prod(own)
    splits_to_fill_device = triton.cdiv(2 * autotune.multiprocessors(q.device), programs)
    steps_per_split = min(MAX_TERMS_PER_SUM, triton.cdiv(steps, splits_to_fill_device))
    splits = triton.cdiv(steps, steps_per_split)
    partial = torch.empty((splits, *bias.shape), dtype=torch.float32, device=q.device)
    masked_attention_dbias_kernel[(programs * splits,)](
        **arguments,
        **config.options(),
        dbias=partial,
        steps=steps,
        steps_per_split=steps_per_split,
        splits=splits,
        **dict(zip(("bias_batch", "bias_heads", "bias_queries"), bias.shape, strict=False)),
    )
    return (partial[0] if splits == 1 else partial.sum(0)).to(bias.dtype)

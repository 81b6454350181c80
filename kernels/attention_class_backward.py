"""Class attention, backward. It needs only the forward's arguments, none of its results.

With P = softmax(q k^T * scale + bias over the keys that mask allows), out = P v and g the gradient of out,

    dP = g v^T,    delta = rowsum(P * dP),    dS = P * (dP - delta)
    dq = dS k * scale,    dk = dS^T q * scale,    dv = P^T g,    dbias = dS summed over bias's broadcast axes

1. parts, as in ``attention_class.py``: maximum, sum, and the sum of P dP, the part's share of delta.
2. tokens: a program takes one tile of keys, and for each query combines the parts into P's normalisation and delta. It
   computes dk and dv whole; it writes the tile's share of dq, summed over tiles afterwards, and dS, which is summed
   over bias's broadcast axes afterwards.

Everything between input and output is float32. There are no atomics: every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import empty_heads_last, load_tile, store_rows
from fastvit.kernels.attention_class import (
    NOT_SPECIALIZED,
    Config,
    Launches,
    load_row,
    row_logits,
    weights_of_parts,
)
from fastvit.kernels.attention_tiles import Operands, token_rows
from torch import Tensor


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def class_attention_tokens_kernel(
    q,
    k,
    v,
    mask,
    bias,
    grad,
    part_max,
    part_sum,
    part_acc,
    dq,
    dk,
    dv,
    dlogits,
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
    parts,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_DLOGITS: tl.constexpr,
):
    """dk and dv of one tile of keys, its share of dq (B, H, tiles, Nq, D), and its dlogits, of (B, H, Nq, Nk)."""
    scale = tl.cast(scale, tl.float32)

    tiles = tl.cdiv(num_keys, BLOCK_N)
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles).to(tl.int64)
    b = head // H
    h = head % H
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    grad += b * stride_gb + h * stride_gh
    dq += (head * tiles + tile) * num_queries * D
    dk += (b * num_keys * H + h) * D
    dv += (b * num_keys * H + h) * D
    if HAS_MASK:
        mask += b * stride_mb + h * stride_mh
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash

    first_key = tile * BLOCK_N
    EXACT_D: tl.constexpr = BLOCK_D == D
    k_tile = load_tile(k, first_key, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D).to(tl.float32)
    v_tile = load_tile(v, first_key, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D).to(tl.float32)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    columns = tl.arange(0, BLOCK_D)
    keys = first_key + tl.arange(0, BLOCK_N)
    for query in range(num_queries):
        row = head * num_queries + query
        weights, row_max, inverse = weights_of_parts(part_max, part_sum, row, parts, PARTS)
        index = tl.arange(0, PARTS)
        part_delta = tl.load(part_acc + row * parts + index, mask=index < parts, other=0.0)
        delta = tl.sum(part_delta * weights, 0) * inverse
        at = tl.cast(query, tl.int64)
        q_row = load_row(q + at * stride_qn, D, BLOCK_D)
        g_row = load_row(grad + at * stride_gn, D, BLOCK_D)
        mask_row = mask
        if HAS_MASK:
            mask_row = mask + at * stride_mq
        bias_row = bias
        if HAS_BIAS:
            bias_row = bias + at * stride_biasq
        logits, visible = row_logits(
            q_row, k_tile, scale, mask_row, bias_row, first_key, num_keys, stride_mk, stride_biask,
            BLOCK_N, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        p = tl.exp(logits - row_max) * inverse
        ds = p * (tl.sum(v_tile * g_row[None, :], 1) - delta)
        if HAS_MASK or HAS_BIAS:  # 0 times NaN is NaN
            p, ds = tl.where(visible, p, 0.0), tl.where(visible, ds, 0.0)
        dv_tile += p[:, None] * g_row[None, :]
        terms = ds[:, None] * k_tile
        if HAS_MASK or HAS_BIAS:
            terms = tl.where(visible[:, None], terms, 0.0)
        dk_tile += ds[:, None] * q_row[None, :]
        tl.store(dq + at * D + columns, tl.sum(terms, 0) * scale, mask=columns < D)
        if WRITE_DLOGITS:
            tl.store(dlogits + row * num_keys + keys, ds, mask=keys < num_keys)

    store_rows(dk, dk_tile * scale, first_key, num_keys, H * D, D, BLOCK_N, BLOCK_D)
    store_rows(dv, dv_tile, first_key, num_keys, H * D, D, BLOCK_N, BLOCK_D)


def _tokens(launches: Launches, config: Config, dk: Tensor, dv: Tensor, dlogits: Tensor | None) -> Tensor:
    """Write dk, dv and, unless it is None, dlogits; return dq in float32."""
    q = launches.q
    found = launches.parts(config)
    tiles = triton.cdiv(launches.num_keys, config.block_n)
    dq = torch.empty((*q.shape[:2], tiles, *q.shape[2:]), dtype=torch.float32, device=q.device)
    class_attention_tokens_kernel[(q.shape[0] * q.shape[1] * tiles,)](
        **launches.arguments,
        **found,
        dq=dq,
        dk=dk,
        dv=dv,
        dlogits=dlogits,
        BLOCK_N=config.block_n,
        PARTS=triton.next_power_of_2(found["parts"]),
        WRITE_DLOGITS=dlogits is not None,
        num_warps=config.num_warps,
    )
    return dq.sum(2)


def class_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    bias_grad: bool = False,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels.

    Args:
        grad: gradient of the output, (B, H, Nq, D) in q's dtype, any strides.
        q, k, v, mask, bias, scale: the forward's arguments.
        bias_grad: whether to compute dbias.
        config: instead of the autotuned one.

    Returns:
        dq, dk and dv in q's dtype with the strides of a contiguous (B, N, H, D); dbias in bias's shape and dtype, or an
        empty (0,).
    """
    wants_bias = bias_grad and bias is not None
    dq, dk, dv = empty_heads_last(q, q.shape[2]), empty_heads_last(q, k.shape[2]), empty_heads_last(q, k.shape[2])
    if 0 in (*q.shape, k.shape[2]):
        dbias = torch.zeros_like(bias) if wants_bias else q.new_empty(0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    dlogits = None
    if wants_bias:
        dlogits = torch.empty((*q.shape[:3], k.shape[2]), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        launches = Launches(Operands.of(q, k, v, mask, bias), token_rows(grad), scale)
        if config is None:
            config = launches.choose(
                "class_attention_backward",
                lambda config: _tokens(
                    launches,
                    config,
                    torch.empty_like(dk),
                    torch.empty_like(dv),
                    None if dlogits is None else torch.empty_like(dlogits),
                ),
            )
        dq.copy_(_tokens(launches, config, dk, dv, dlogits))
    if dlogits is None:
        return dq, dk, dv, q.new_empty(0)
    if bias.shape[3] == 1:  # softmax is invariant to what is added to all keys alike
        return dq, dk, dv, torch.zeros_like(bias)
    return dq, dk, dv, dlogits.sum_to_size(bias.shape).to(bias.dtype)

"""Masked attention, backward. The forward is in ``attention_masked.py``.

With P = softmax(q k^T * scale + bias over the keys that mask allows), out = P v and the gradient g of out:

    dP = g v^T,    delta = rowsum(P * dP),    dS = P * (dP - delta)
    dq = dS k * scale,    dk = dS^T q * scale,    dv = P^T g,    dbias = dS summed over bias's broadcast axes

Nothing of size (Nq, Nk) is stored: each kernel recomputes the tiles of P that it needs. Shapes and strides are those
of the forward; dq, dk and dv have the strides of a contiguous (B, N, H, D). There are no atomics, and the order of
every sum depends on the shapes only. Three kernels:

1. dq: a program holds BLOCK_M queries of one head and loops over the keys. It also writes, for the other kernels, three
   numbers per row: shift and factor, with P = exp(logits - shift) * factor, and delta.
   ONE_PASS, all keys in one tile: shift is the row's maximum, factor the reciprocal of its sum, delta as above.
   Streaming: shift is the forward's log-sum-exp, and factor corrects its rounding. dq is computed with
   delta = rowsum(g * out), which is known beforehand; the delta written is the sum over P, which agrees better with the
   dP of the other kernels.
2. dk, dv: a program holds BLOCK_N keys of one head and loops over tiles of BLOCK_M queries. The tiles are transposed,
   so that P and dS are left operands in the layout the products give. A tile without visible keys skips the loop.
3. dbias, on request: ``attention_masked_bias_gradient.py``.

Source: Dao et al. 2022, appendix B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import (
    empty_heads_last,
    finite_maximum,
    input_precision,
    inverse_of_sum,
    load_key_mask,
    load_tile,
    product_kind,
    store_rows,
    visible_range,
)
from fastvit.kernels.attention_masked import Config, one_pass
from fastvit.kernels.attention_masked_bias_gradient import bias_gradient
from fastvit.kernels.attention_tiles import (
    NOT_SPECIALIZED,
    Operands,
    exponentials,
    load_row_values,
    logits_tile,
    named_strides,
    padded_head_dim,
    store_row_values,
    to_base_2,
    token_rows,
)
from torch import Tensor

from fastvit import autotune


class Configs(NamedTuple):
    """The candidates for the three kernels; the first of each is valid everywhere."""

    queries: tuple[Config, ...]
    keys: tuple[Config, ...]
    bias: Config


CONFIGS: dict[tuple[str, int], Configs] = {
    ("half", 32): Configs((one_pass(32, 64, 4), Config(32, 32, 4)), (Config(32, 32, 4),), Config(32, 32, 4)),
    ("half", 64): Configs((one_pass(32, 64, 4), Config(32, 32, 8)), (Config(32, 32, 4),), Config(32, 32, 8)),
    ("half", 128): Configs((one_pass(32, 64, 8), Config(32, 16, 8, 2)), (Config(16, 32, 8),), Config(16, 32, 8)),
    ("tf32", 32): Configs((one_pass(32, 64, 4), Config(32, 32, 4)), (Config(32, 32, 4),), Config(32, 32, 4)),
    ("tf32", 64): Configs((one_pass(32, 64, 8), Config(32, 16, 8)), (Config(32, 32, 8),), Config(16, 32, 8)),
    ("tf32", 128): Configs((Config(32, 16, 8),), (Config(16, 16, 8),), Config(16, 16, 8)),
    ("ieee", 32): Configs((Config(16, 32, 8, 2),), (Config(16, 32, 8),), Config(32, 32, 4)),
    ("ieee", 64): Configs((Config(16, 32, 8, 2),), (Config(16, 32, 8),), Config(16, 32, 8)),
    ("ieee", 128): Configs((Config(16, 16, 8),), (Config(16, 32, 8),), Config(16, 16, 8)),
}
"""By kind of product and padded head dimension, for any input on any GPU. BLOCK_M counts queries and BLOCK_N keys in
``keys`` and ``bias``, too."""

REGULAR_CONFIGS: dict[tuple[str, int], Configs] = {
    ("half", 32): Configs(
        (one_pass(32, 64, 4), one_pass(64, 128, 8), Config(64, 64, 4, 2)),
        (Config(64, 64, 8), Config(32, 128, 8, 2)),
        Config(32, 32, 4),
    ),
    ("half", 64): Configs(
        (one_pass(32, 64, 4), Config(64, 64, 8, 2)),
        (Config(32, 64, 4), Config(32, 128, 8, 2)),
        Config(32, 32, 8),
    ),
}
"""Instead of those on NVIDIA GPUs, for aligned rows without a bias or a mask of (queries, keys)."""


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def masked_attention_dq_kernel(
    grad,
    q,
    k,
    v,
    mask,
    bias,
    out,
    lse,
    dq,
    shift,
    factor,
    delta,
    scale,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_PASS: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, shift, factor and delta of one block of BLOCK_M queries of one head."""
    scale = tl.cast(scale, tl.float32)  # a Python float may arrive as float64
    logits_scale = to_base_2(scale, HAS_BIAS)

    # Adjacent programs share the head.
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    b = head // H
    h = head % H
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    grad += b * stride_gb + h * stride_gh
    dq += (b * num_queries * H + h) * D
    if MASK_KIND != 0:
        mask += b * stride_mb + h * stride_mh
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash

    first_query = (program % blocks) * BLOCK_M
    EXACT_D: tl.constexpr = BLOCK_D == D
    q_tile = load_tile(q, first_query, 0, num_queries, D, stride_qn, 1, BLOCK_M, BLOCK_D, EXACT_D)
    g_tile = load_tile(grad, first_query, 0, num_queries, D, stride_gn, 1, BLOCK_M, BLOCK_D, EXACT_D)

    if ONE_PASS:
        wanted = None
        if MASK_KIND == 1:  # 0 times NaN is NaN
            wanted = load_key_mask(mask, 0, num_keys, stride_mk, BLOCK_N)
        k_tile = load_tile(k, 0, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D, wanted)
        v_tile = load_tile(v, 0, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D, wanted)
        logits = logits_tile(
            q_tile, k_tile, logits_scale, mask, bias, first_query, 0, num_queries, num_keys,
            stride_mq, stride_mk, stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION,
        )  # fmt: skip
        row_shift = finite_maximum(tl.max(logits, 1))
        p = exponentials(logits, row_shift[:, None], HAS_BIAS)
        row_factor = inverse_of_sum(tl.sum(p, 1))
        p = p * row_factor[:, None]
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        row_delta = tl.sum(p * dp, 1)
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    else:
        out += b * stride_ob + h * stride_oh
        o_tile = load_tile(out, first_query, 0, num_queries, D, stride_on, 1, BLOCK_M, BLOCK_D, EXACT_D)
        forward_delta = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
        row_shift = finite_maximum(load_row_values(lse + head * num_queries, first_query, num_queries, BLOCK_M))
        row_shift = to_base_2(row_shift, HAS_BIAS)
        if MASK_KIND == 1:
            first, end, _count = visible_range(mask, num_keys, stride_mk, 256)
            first = first // BLOCK_N * BLOCK_N
        else:
            first, end = 0, num_keys
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        delta_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(first, end, BLOCK_N):
            wanted = None
            if MASK_KIND == 1:
                wanted = load_key_mask(mask, start, num_keys, stride_mk, BLOCK_N)
            k_tile = load_tile(k, start, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D, wanted)
            logits = logits_tile(
                q_tile, k_tile, logits_scale, mask, bias, first_query, start, num_queries, num_keys,
                stride_mq, stride_mk, stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION,
            )  # fmt: skip
            p = exponentials(logits, row_shift[:, None], HAS_BIAS)
            row_sum += tl.sum(p, 1)
            v_tile = load_tile(v, start, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D, wanted)
            dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
            delta_sum += tl.sum(p * dp, 1)
            ds = p * (dp - forward_delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
        row_factor = inverse_of_sum(row_sum)
        row_delta = delta_sum * row_factor
        acc = acc * row_factor[:, None]

    store_rows(dq, acc * scale, first_query, num_queries, H * D, D, BLOCK_M, BLOCK_D)
    store_row_values(shift + head * num_queries, row_shift, first_query, num_queries, BLOCK_M)
    store_row_values(factor + head * num_queries, row_factor, first_query, num_queries, BLOCK_M)
    store_row_values(delta + head * num_queries, row_delta, first_query, num_queries, BLOCK_M)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def masked_attention_dkv_kernel(
    grad,
    q,
    k,
    v,
    mask,
    bias,
    dk,
    dv,
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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one block of BLOCK_N keys of one head."""
    scale = tl.cast(scale, tl.float32)
    logits_scale = to_base_2(scale, HAS_BIAS)

    blocks = tl.cdiv(num_keys, BLOCK_N)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    b = head // H
    h = head % H
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    grad += b * stride_gb + h * stride_gh
    dk += (b * num_keys * H + h) * D
    dv += (b * num_keys * H + h) * D
    if MASK_KIND != 0:
        mask += b * stride_mb + h * stride_mh
    if HAS_BIAS:
        bias += b * stride_biasb + h * stride_biash

    first_key = (program % blocks) * BLOCK_N
    EXACT_D: tl.constexpr = BLOCK_D == D
    k_tile = load_tile(k, first_key, 0, num_keys, D, stride_kn, 1, BLOCK_N, BLOCK_D, EXACT_D)
    v_tile = load_tile(v, first_key, 0, num_keys, D, stride_vn, 1, BLOCK_N, BLOCK_D, EXACT_D)
    end = num_queries
    if MASK_KIND == 1:
        visible = load_key_mask(mask, first_key, num_keys, stride_mk, BLOCK_N)
        end = tl.where(tl.max(visible.to(tl.int32), 0) > 0, num_queries, 0)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, end, BLOCK_M):
        q_tile = load_tile(q, start, 0, num_queries, D, stride_qn, 1, BLOCK_M, BLOCK_D, EXACT_D)
        logits = logits_tile(
            q_tile, k_tile, logits_scale, mask, bias, start, first_key, num_queries, num_keys, stride_mq, stride_mk,
            stride_biasq, stride_biask, BLOCK_M, BLOCK_N, MASK_KIND, HAS_BIAS, PRECISION, TRANSPOSED=True,
        )  # fmt: skip
        row_shift = load_row_values(shift + head * num_queries, start, num_queries, BLOCK_M)
        row_factor = load_row_values(factor + head * num_queries, start, num_queries, BLOCK_M)
        p = exponentials(logits, row_shift[None, :], HAS_BIAS) * row_factor[None, :]
        g_tile = load_tile(grad, start, 0, num_queries, D, stride_gn, 1, BLOCK_M, BLOCK_D, EXACT_D)
        dv_acc = tl.dot(p.to(g_tile.dtype), g_tile, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        row_delta = load_row_values(delta + head * num_queries, start, num_queries, BLOCK_M)
        ds = p * (dp - row_delta[None, :])
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)

    if MASK_KIND == 1:  # 0 times NaN is NaN; loaded again, for there are no registers to keep it in
        visible = load_key_mask(mask, first_key, num_keys, stride_mk, BLOCK_N)
        dk_acc = tl.where(visible[:, None], dk_acc, 0.0)
        dv_acc = tl.where(visible[:, None], dv_acc, 0.0)
    store_rows(dk, dk_acc * scale, first_key, num_keys, H * D, D, BLOCK_N, BLOCK_D)
    store_rows(dv, dv_acc, first_key, num_keys, H * D, D, BLOCK_N, BLOCK_D)


def configurations(product: str, head_dim: int, num_keys: int, *, regular: bool, amd: bool = False) -> Configs:
    """The candidates for a call; for dq the smallest one-pass tile that holds all keys, then the streaming ones."""
    key = product, padded_head_dim(head_dim)
    found = REGULAR_CONFIGS.get(key, CONFIGS[key]) if regular and not amd else CONFIGS[key]
    fitting = [config for config in found.queries if config.one_pass and num_keys <= config.block_n]
    return found._replace(queries=(*fitting[:1], *(config for config in found.queries if not config.one_pass)))


def masked_attention_backward(
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    bias_grad: bool = False,
    *,
    configs: Configs | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels.

    Args:
        out, lse: the forward's results, with need_lse.
        grad: gradient of out, (B, H, Nq, D) in q's dtype, any strides.
        q, k, v, mask, bias, scale: the forward's arguments.
        bias_grad: whether to compute dbias.
        configs: instead of the autotuned ones; the first of ``queries`` and of ``keys`` is taken.

    Returns:
        dq, dk and dv in q's dtype with the strides of a contiguous (B, N, H, D); dbias in bias's shape and dtype, or an
        empty (0,).
    """
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    dq, dk, dv = empty_heads_last(q, num_queries), empty_heads_last(q, num_keys), empty_heads_last(q, num_keys)
    wants_bias = bias_grad and bias is not None
    if 0 in (*q.shape, num_keys):
        dbias = torch.zeros_like(bias) if wants_bias else q.new_empty(0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    operands = Operands.of(q, k, v, mask, bias)
    grad, out = token_rows(grad), token_rows(out)
    product = product_kind(q.dtype)
    rows = torch.empty((3, batch, heads, num_queries), dtype=torch.float32, device=q.device)
    arguments = {
        **operands.arguments(scale),
        **named_strides("g", grad),
        **dict(zip(("shift", "factor", "delta"), rows, strict=True)),
        "grad": grad,
        "MASK_KIND": operands.mask_kind,
        "PRECISION": input_precision(product),
    }

    def launch_dq(config: Config, dq: Tensor) -> None:
        masked_attention_dq_kernel[(triton.cdiv(num_queries, config.block_m) * batch * heads,)](
            **arguments,
            **config.options(),
            **named_strides("o", out),
            out=out,
            lse=lse,
            dq=dq,
            ONE_PASS=config.one_pass,
            HAS_BIAS=bias is not None,
        )

    def launch_dkv(config: Config, dk: Tensor, dv: Tensor) -> None:
        masked_attention_dkv_kernel[(triton.cdiv(num_keys, config.block_n) * batch * heads,)](
            **arguments, **config.options(), dk=dk, dv=dv, HAS_BIAS=bias is not None
        )

    with torch.cuda.device_of(q):
        if configs is None:
            regular, amd = operands.regular, torch.version.hip is not None
            configs = configurations(product, head_dim, num_keys, regular=regular, amd=amd)
            buckets = map(autotune.token_bucket, (num_keys, num_queries, batch * num_queries))
            key = (q.dtype, product, heads, head_dim, operands.mask_kind, bias is not None, regular, *buckets)
            query_config = autotune.choose(
                "masked_attention_dq",
                key,
                configs.queries,
                lambda config: launch_dq(config, torch.empty_like(dq)),
            )
            launch_dq(query_config, dq)
            key_config = autotune.choose(
                "masked_attention_dkv",
                key,
                configs.keys,
                lambda config: launch_dkv(config, torch.empty_like(dk), torch.empty_like(dv)),
            )
        else:
            query_config, key_config = configs.queries[0], configs.keys[0]
            launch_dq(query_config, dq)
        launch_dkv(key_config, dk, dv)
        dbias = bias_gradient(arguments, bias, configs.bias) if wants_bias else q.new_empty(0)
    if num_keys == 1:  # the softmax over one key is constant, but dP and delta may round differently
        dq.zero_()
        dk.zero_()
    return dq, dk, dv, dbias

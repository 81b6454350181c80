"""Head-mixed attention (talking heads, re-attention), forward. No attention map reaches memory.

    P as in :mod:`fastvit.kernels.head_mixed_attention_maps`
    X_h = sum_g post_weight[h, g] (P_g - centre) + post_bias[h]
    M_h = X_h, or LayerNorm over the heads of X, norm_weight[h] * (X_h - mean) / sqrt(var + eps) + norm_bias[h];
          zero at masked positions
    out_h = output_scale * M_h v_h

Shapes: q (B, H, Nq, D), k and v (B, H, Nk, D), any strides with stride 1 in the last axis. The result is (B, H, Nq, D)
with the strides of a contiguous (B, Nq, H, D).

Half precision without a mask or a LayerNorm, and a block of queries' maps in the registers of a program: that is
:mod:`fastvit.kernels.head_mixed_attention_whole`, one pass. Everything else runs here.

Tiling: a pass for the row statistics, then one program per block of queries, with all heads, which loops over the keys:
S, mix, P, mix, M V; four products per tile. Where the accumulator [SLOTS, BLOCK_M, D] does not fit the registers, a
program computes BLOCK_OUT columns of it, and each of these programs recomputes the maps.

Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT); Shazeer et al. 2020 (talking heads).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import empty_heads_last
from fastvit.kernels.head_mixed_attention_configs import Config
from fastvit.kernels.head_mixed_attention_fold import Post, fold
from fastvit.kernels.head_mixed_attention_launch import (
    Problem,
    as_heads,
    as_operand,
    column_blocks,
    options,
    programs,
    shared_limit,
)
from fastvit.kernels.head_mixed_attention_maps import (
    attention_tile,
    batch_entry,
    batch_entry_of_mask,
    heads_of,
    load_keys,
    load_mix,
    load_per_head,
    mix,
    opaque_zero,
    store_heads,
    this_block,
)
from torch import Tensor


@triton.jit
def mean_over_heads(maps, PLAN: tl.constexpr):
    """The mean over the heads of a group, broadcast to its slots. Padded heads must be zero."""
    GROUPS: tl.constexpr = PLAN.slots // PLAN.padded_heads
    HEADS: tl.constexpr = PLAN.padded_heads
    POSITIONS: tl.constexpr = maps.shape[1] * maps.shape[2]
    grouped = tl.reshape(maps, [GROUPS, HEADS, POSITIONS])
    means = tl.sum(grouped, 1, keep_dims=True) * (1.0 / PLAN.heads)
    return tl.reshape(tl.broadcast_to(means, [GROUPS, HEADS, POSITIONS]), maps.shape)


@triton.jit
def normalised_over_heads(maps, eps, PLAN: tl.constexpr):
    """LayerNorm over heads without its affine part, and the reciprocal standard deviation."""
    real = (heads_of(PLAN) < PLAN.heads)[:, None, None]
    centred = tl.where(real, maps - mean_over_heads(maps, PLAN), 0.0)
    inverse = 1.0 / tl.sqrt(mean_over_heads(centred * centred, PLAN) + tl.cast(eps, tl.float32))
    return centred * inverse, inverse


@triton.jit
def post_mixed(p, mixes, zero, PLAN: tl.constexpr):
    """X from P."""
    maps = p
    if PLAN.post_mix:
        weight = load_mix(mixes.post_weight, zero, False, PLAN)
        maps = mix(weight, p - tl.cast(mixes.centre, tl.float32), PLAN)
        maps += load_per_head(mixes.post_bias, zero, 0.0, PLAN)[:, None, None]
    return maps


@triton.jit
def finished_maps(p, visible, mixes, zero, PLAN: tl.constexpr):
    """M from P, except for the output scale."""
    maps = post_mixed(p, mixes, zero, PLAN)
    if PLAN.layer_norm:
        maps, _inverse = normalised_over_heads(maps, mixes.norm_eps, PLAN)
        maps *= load_per_head(mixes.norm_weight, zero, 1.0, PLAN)[:, None, None]
        maps += load_per_head(mixes.norm_bias, zero, 0.0, PLAN)[:, None, None]
    return tl.where(visible, maps, 0.0)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def head_mixed_attention_kernel(q, k, v, mask, mixes, rows, out, num_queries, num_keys, PLAN: tl.constexpr):
    """BLOCK_OUT columns of the result for one block of queries."""
    SLOTS: tl.constexpr = PLAN.slots
    BLOCK_M: tl.constexpr = PLAN.block_m
    BLOCK_OUT: tl.constexpr = PLAN.block_out
    first_query, b = this_block(num_queries, BLOCK_M, PLAN)
    first_column = tl.program_id(1) * BLOCK_OUT
    q = batch_entry(q, b)
    k = batch_entry(k, b)
    v = batch_entry(v, b)
    mask = batch_entry_of_mask(mask, b, 0, PLAN)

    acc = tl.zeros([SLOTS, BLOCK_M, BLOCK_OUT], tl.float32)
    for first_key in range(0, num_keys, PLAN.block_n):
        _scores, p, visible = attention_tile(
            q, k, mask, mixes, rows, b, first_query, num_queries, first_key, num_keys, PLAN
        )
        maps = finished_maps(p, visible, mixes, opaque_zero(first_query, first_key, PLAN), PLAN)
        values = load_keys(v, first_key, num_keys, first_column, BLOCK_OUT, PLAN)
        acc = tl.dot(maps.to(values.dtype), values, acc, input_precision=PLAN.precision)
    acc *= tl.cast(mixes.output_scale, tl.float32)  # a Python float may arrive as float64
    store_heads(batch_entry(out, b), acc, first_query, num_queries, first_column, BLOCK_M, BLOCK_OUT, PLAN)


def gluon_runs(device: torch.device) -> bool:
    """Whether kernels in Gluon run there; Triton's interpreter does not know them."""
    return device.type == "cuda" and torch.version.hip is None


def head_mixed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    norm_eps: float,
    layer_norm: bool,
    output_scale: float,
    centred: bool,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Launch the kernels.

    Args:
        q: (B, H, Nq, D), k, v: (B, H, Nk, D); float32, float16 or bfloat16, all the same; H up to 32, D up to 128. Any
            strides; copied where rows are not aligned.
        pre_weight, post_weight: (H, H), row h computes head h; pre_bias, post_bias: (H,); any floating dtype. None
            omits the step.
        norm_weight, norm_bias, norm_eps: of the LayerNorm over heads, if ``layer_norm``, or else of the BatchNorm with
            the running statistics norm_mean and norm_var, which needs post_weight.
        output_scale: multiplies the final maps.
        centred: whether 1 / Nk, the centre, is taken off the maps in front of post_weight.
        mask: bool, True = attend, broadcastable to (B, H, Nq, Nk).
        scale: multiplies q k^T.

    Returns:
        (B, H, Nq, D) with the strides of a contiguous (B, Nq, H, D).
    """
    if post_weight is not None and not layer_norm:
        post = Post(post_weight, post_bias, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, output_scale)
        fits = mask is None and scale > 0 and q.dtype != torch.float32 and 0 not in q.shape + k.shape
        if fits and gluon_runs(q.device):
            from fastvit.kernels.head_mixed_attention_whole import whole_rows

            with torch.cuda.device_of(q):
                out = whole_rows(q, k, v, pre_weight, pre_bias, post, scale, shared_limit(q.device), centred=centred)
            if out is not None:
                return out
        if norm_var is not None:
            with torch.cuda.device_of(q):
                post_weight, _, post_bias = fold(post, missing=0.0, sized=False)
            norm_weight = norm_bias = None
            output_scale = 1.0
    problem = Problem(
        q, k, mask, scale, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias, norm_eps, layer_norm,
        output_scale, centred,
    )  # fmt: skip
    if problem.empty:
        return empty_heads_last(q, q.shape[2]).zero_()
    rows = problem.row_statistics()
    values = as_operand(v)

    def launch(config: Config) -> Tensor:
        plan = problem.plan(config)
        out = problem.new_heads(problem.num_queries)
        grid = (programs(problem.batch, problem.num_queries, plan.block_m, plan), column_blocks(plan))
        head_mixed_attention_kernel[grid](
            problem.q, problem.k, values, problem.mask, problem.mixes, rows, as_heads(out),
            problem.num_queries, problem.num_keys,
            PLAN=plan, **options(config),
        )  # fmt: skip
        return out

    return problem.run("head_mixed_attention", launch)

"""Head-mixed attention, backward. The maps are recomputed from q and k tile by tile; none reaches memory.

With the forward's names, dO the gradient of the result, and dM_h = output_scale * dO_h v_h^T where visible:

    dX = dM, or with a LayerNorm, Y the normalised X and r the reciprocal standard deviation,
         dY_h = norm_weight[h] dM_h;  dX_h = r (dY_h - mean_heads(dY) - Y_h mean_heads(dY Y))
    dnorm_weight[h] = sum dM_h Y_h;  dnorm_bias[h] = sum dM_h
    dpost_weight[h, g] = sum dX_h (P_g - centre);  dpost_bias[h] = sum dX_h
    dP_g = sum_h post_weight[h, g] dX_h;  delta_g = sum over the keys of a row of P_g dP_g
    dS'_g = P_g (dP_g - delta_g);  dpre_weight[h, g] = sum dS'_h S_g;  dpre_bias = 0, as rows of dS' sum to zero
    dS_g = sum_h pre_weight[h, g] dS'_h
    dq_g = scale * dS_g k_g;  dk_g = scale * dS_g^T q_g;  dv_h = output_scale * M_h^T dO_h

The gradient of :mod:`fastvit.kernels.head_mixed_attention_moments` differs in dX only: given dC, the gradient of
C[g, g'] = sum (P_g - c)(P_g' - c), dP = (dC + dC^T)(P - c), which is a mix of X = P - c.

Four kernels run after the row statistics. delta comes first, as it is a row's sum over all keys, and dq and dk need it:

- rows: one program per block of queries loops over the keys: delta, and the program's partial sums of the parameters'
  gradients, which are added in a fixed order, without atomics;
- queries: the same blocks: dq, and the partial sums of dpre_weight;
- keys and values: one program per block of keys loops over the queries: dk, and dv. One kernel for both would share the
  maps, but two accumulators would halve the columns of each that fit the registers.

The last three compute BLOCK_OUT columns per program where more would not fit, and recompute the maps for each block;
those of q and k take a few more, BLOCK_REST, where these are the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import empty_heads_last
from fastvit.kernels.head_mixed_attention import (
    finished_maps,
    gluon_runs,
    mean_over_heads,
    normalised_over_heads,
    post_mixed,
)
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
    Heads,
    Rows,
    attention_tile,
    batch_entry,
    batch_entry_of_mask,
    heads_of,
    load_keys,
    load_mix,
    load_per_head,
    load_queries,
    load_row_statistics,
    mix,
    opaque_zero,
    products,
    store_heads,
    store_row_statistics,
    this_block,
)
from torch import Tensor


class Parts(NamedTuple):
    """Partial sums of the parameters' gradients, one per program of the rows kernel; None where absent."""

    post_weight: Any
    post_bias: Any
    norm_weight: Any
    norm_bias: Any


@triton.jit
def add_outer_products(sums, a, b, PLAN: tl.constexpr):
    """Add sum over the positions of a tile of a[h] b[g] to [PIECES, SLOTS, SLOTS]: an equal share to each piece.

    One product over the whole tile would have too few outputs to occupy all warps, and long sums.
    """
    PIECES: tl.constexpr = sums.shape[0]
    SLOTS: tl.constexpr = PLAN.slots
    DEPTH: tl.constexpr = PLAN.block_m * PLAN.block_n // PIECES
    a = tl.permute(tl.reshape(a, [SLOTS, PIECES, DEPTH]), (1, 0, 2))
    b = tl.permute(tl.reshape(b, [SLOTS, PIECES, DEPTH]), (1, 2, 0))
    return tl.dot(a, b, sums, input_precision=PLAN.mix_precision)


@triton.jit
def no_outer_products(PLAN: tl.constexpr):
    """Zeros to accumulate :func:`add_outer_products` in."""
    SLOTS: tl.constexpr = PLAN.slots
    PIECES: tl.constexpr = min(2048 // (SLOTS * SLOTS), PLAN.block_m * PLAN.block_n // 16)
    return tl.zeros([PIECES, SLOTS, SLOTS], tl.float32)


@triton.jit
def store_matrix(parts, matrix, PLAN: tl.constexpr):
    """Write the program's partial sum of outer products."""
    slots = tl.arange(0, PLAN.slots)
    place = parts + tl.program_id(0).to(tl.int64) * (PLAN.slots * PLAN.slots)
    tl.store(place + slots[:, None] * PLAN.slots + slots[None, :], tl.sum(matrix, 0))


@triton.jit
def store_vector(parts, vector, PLAN: tl.constexpr):
    """Write the program's partial sum, [SLOTS]."""
    tl.store(parts + tl.program_id(0).to(tl.int64) * PLAN.slots + tl.arange(0, PLAN.slots), vector)


@triton.jit
def gradient_tile(
    p, visible, grad, v, mixes, first_query, num_queries, first_key, num_keys,
    MOMENTS: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """dP, dX, dM and Y of a tile from its P. Where dM or Y does not exist, P stands in for it, to be ignored."""
    zero = opaque_zero(first_query, first_key, PLAN)
    dm = p
    y = p
    if MOMENTS:
        dx = p - 1.0 / num_keys
    else:
        dm = products(grad, v, first_query, num_queries, first_key, num_keys, PLAN)
        dm = tl.where(visible, dm * tl.cast(mixes.output_scale, tl.float32), 0.0)
        dx = dm
        if PLAN.layer_norm:
            y, inverse = normalised_over_heads(post_mixed(p, mixes, zero, PLAN), mixes.norm_eps, PLAN)
            dy = dm * load_per_head(mixes.norm_weight, zero, 1.0, PLAN)[:, None, None]
            dx = inverse * (dy - mean_over_heads(dy, PLAN) - y * mean_over_heads(dy * y, PLAN))
            dx = tl.where((heads_of(PLAN) < PLAN.heads)[:, None, None], dx, 0.0)
    dp = dx
    if PLAN.post_mix:
        dp = mix(load_mix(mixes.post_weight, zero, True, PLAN), dx, PLAN)
    return dp, dx, dm, y


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def row_gradients_kernel(
    q, k, v, grad, mask, mixes, rows, parts, num_queries, num_keys, MOMENTS: tl.constexpr, PLAN: tl.constexpr
):
    """delta, and the partial sums of the gradients of the parameters after the softmax, for one block of queries."""
    SLOTS: tl.constexpr = PLAN.slots
    BLOCK_M: tl.constexpr = PLAN.block_m
    first_query, b = this_block(num_queries, BLOCK_M, PLAN)
    q = batch_entry(q, b)
    k = batch_entry(k, b)
    if not MOMENTS:
        v = batch_entry(v, b)
        grad = batch_entry(grad, b)
    mask = batch_entry_of_mask(mask, b, 0, PLAN)

    delta = tl.zeros([SLOTS, BLOCK_M], tl.float32)
    d_post_weight = no_outer_products(PLAN)
    d_post_bias = tl.zeros([SLOTS, BLOCK_M], tl.float32)
    d_norm_weight = tl.zeros([SLOTS, BLOCK_M], tl.float32)
    d_norm_bias = tl.zeros([SLOTS, BLOCK_M], tl.float32)
    for first_key in range(0, num_keys, PLAN.block_n):
        _scores, p, visible = attention_tile(
            q, k, mask, mixes, rows, b, first_query, num_queries, first_key, num_keys, PLAN
        )
        dp, dx, dm, y = gradient_tile(
            p, visible, grad, v, mixes, first_query, num_queries, first_key, num_keys, MOMENTS, PLAN
        )
        delta += tl.sum(p * dp, 2)
        if not MOMENTS:
            if PLAN.post_mix:
                apart = p - tl.cast(mixes.centre, tl.float32)
                d_post_weight = add_outer_products(d_post_weight, dx, apart, PLAN)
                d_post_bias += tl.sum(dx, 2)
            if PLAN.layer_norm:
                d_norm_weight += tl.sum(dm * y, 2)
                d_norm_bias += tl.sum(dm, 2)
    store_row_statistics(rows.delta, delta, b, first_query, num_queries, PLAN.heads, 0, PLAN)
    if not MOMENTS:
        if PLAN.post_mix:
            store_matrix(parts.post_weight, d_post_weight, PLAN)
            store_vector(parts.post_bias, tl.sum(d_post_bias, 1), PLAN)
        if PLAN.layer_norm:
            store_vector(parts.norm_weight, tl.sum(d_norm_weight, 1), PLAN)
            store_vector(parts.norm_bias, tl.sum(d_norm_bias, 1), PLAN)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def query_gradients_kernel(
    q, k, v, grad, mask, mixes, rows, dq, d_pre_weight_parts, num_queries, num_keys,
    MOMENTS: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT columns of dq, and the partial sum of dpre_weight, for one block of queries."""
    SLOTS: tl.constexpr = PLAN.slots
    BLOCK_M: tl.constexpr = PLAN.block_m
    BLOCK_OUT: tl.constexpr = PLAN.block_out
    REST: tl.constexpr = PLAN.block_rest
    first_query, b = this_block(num_queries, BLOCK_M, PLAN)
    first_column = tl.program_id(1) * BLOCK_OUT
    q = batch_entry(q, b)
    k = batch_entry(k, b)
    if not MOMENTS:
        v = batch_entry(v, b)
        grad = batch_entry(grad, b)
    mask = batch_entry_of_mask(mask, b, 0, PLAN)
    delta = load_row_statistics(rows.delta, b, first_query, num_queries, PLAN)

    acc = tl.zeros([SLOTS, BLOCK_M, BLOCK_OUT], tl.float32)
    if REST:
        rest = tl.zeros([SLOTS, BLOCK_M, REST], tl.float32)
    d_pre_weight = no_outer_products(PLAN)
    for first_key in range(0, num_keys, PLAN.block_n):
        scores, p, visible = attention_tile(
            q, k, mask, mixes, rows, b, first_query, num_queries, first_key, num_keys, PLAN
        )
        dp, _dx, _dm, _y = gradient_tile(
            p, visible, grad, v, mixes, first_query, num_queries, first_key, num_keys, MOMENTS, PLAN
        )
        ds = p * (dp - delta[:, :, None])
        if PLAN.pre_mix:
            d_pre_weight = add_outer_products(d_pre_weight, ds, scores, PLAN)
            zero = opaque_zero(first_query, first_key, PLAN)
            ds = mix(load_mix(mixes.pre_weight, zero, True, PLAN), ds, PLAN)
        keys = load_keys(k, first_key, num_keys, first_column, BLOCK_OUT, PLAN)
        ds = ds.to(keys.dtype)
        acc = tl.dot(ds, keys, acc, input_precision=PLAN.precision)
        if REST:
            keys = load_keys(k, first_key, num_keys, BLOCK_OUT, REST, PLAN)
            rest = tl.dot(ds, keys, rest, input_precision=PLAN.precision)
    scale = tl.cast(mixes.scale, tl.float32)
    store_heads(batch_entry(dq, b), acc * scale, first_query, num_queries, first_column, BLOCK_M, BLOCK_OUT, PLAN)
    if REST:
        store_heads(batch_entry(dq, b), rest * scale, first_query, num_queries, BLOCK_OUT, BLOCK_M, REST, PLAN)
    if PLAN.pre_mix:  # noqa: SIM102 (a compile-time condition)
        if tl.program_id(1) == 0:
            store_matrix(d_pre_weight_parts, d_pre_weight, PLAN)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def key_gradients_kernel(
    q, k, v, grad, mask, mixes, rows, dk, num_queries, num_keys, MOMENTS: tl.constexpr, PLAN: tl.constexpr
):
    """BLOCK_OUT columns of dk for one block of keys."""
    SLOTS: tl.constexpr = PLAN.slots
    BLOCK_N: tl.constexpr = PLAN.block_n
    BLOCK_OUT: tl.constexpr = PLAN.block_out
    REST: tl.constexpr = PLAN.block_rest
    first_key, b = this_block(num_keys, BLOCK_N, PLAN)
    first_column = tl.program_id(1) * BLOCK_OUT
    q = batch_entry(q, b)
    k = batch_entry(k, b)
    if not MOMENTS:
        v = batch_entry(v, b)
        grad = batch_entry(grad, b)
    mask = batch_entry_of_mask(mask, b, 0, PLAN)

    acc = tl.zeros([SLOTS, BLOCK_N, BLOCK_OUT], tl.float32)
    if REST:
        rest = tl.zeros([SLOTS, BLOCK_N, REST], tl.float32)
    for first_query in range(0, num_queries, PLAN.block_m):
        _scores, p, visible = attention_tile(
            q, k, mask, mixes, rows, b, first_query, num_queries, first_key, num_keys, PLAN
        )
        dp, _dx, _dm, _y = gradient_tile(
            p, visible, grad, v, mixes, first_query, num_queries, first_key, num_keys, MOMENTS, PLAN
        )
        ds = p * (dp - load_row_statistics(rows.delta, b, first_query, num_queries, PLAN)[:, :, None])
        if PLAN.pre_mix:
            zero = opaque_zero(first_query, first_key, PLAN)
            ds = mix(load_mix(mixes.pre_weight, zero, True, PLAN), ds, PLAN)
        queries = load_queries(q, first_query, num_queries, first_column, BLOCK_OUT, PLAN)
        ds = tl.permute(ds.to(queries.dtype), (0, 2, 1))
        acc = tl.dot(ds, queries, acc, input_precision=PLAN.precision)
        if REST:
            queries = load_queries(q, first_query, num_queries, BLOCK_OUT, REST, PLAN)
            rest = tl.dot(ds, queries, rest, input_precision=PLAN.precision)
    scale = tl.cast(mixes.scale, tl.float32)
    store_heads(batch_entry(dk, b), acc * scale, first_key, num_keys, first_column, BLOCK_N, BLOCK_OUT, PLAN)
    if REST:
        store_heads(batch_entry(dk, b), rest * scale, first_key, num_keys, BLOCK_OUT, BLOCK_N, REST, PLAN)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def value_gradients_kernel(q, k, grad, mask, mixes, rows, dv, num_queries, num_keys, PLAN: tl.constexpr):
    """BLOCK_OUT columns of dv for one block of keys."""
    SLOTS: tl.constexpr = PLAN.slots
    BLOCK_N: tl.constexpr = PLAN.block_n
    BLOCK_OUT: tl.constexpr = PLAN.block_out
    first_key, b = this_block(num_keys, BLOCK_N, PLAN)
    first_column = tl.program_id(1) * BLOCK_OUT
    q = batch_entry(q, b)
    k = batch_entry(k, b)
    grad = batch_entry(grad, b)
    mask = batch_entry_of_mask(mask, b, 0, PLAN)

    acc = tl.zeros([SLOTS, BLOCK_N, BLOCK_OUT], tl.float32)
    for first_query in range(0, num_queries, PLAN.block_m):
        _scores, p, visible = attention_tile(
            q, k, mask, mixes, rows, b, first_query, num_queries, first_key, num_keys, PLAN
        )
        maps = finished_maps(p, visible, mixes, opaque_zero(first_query, first_key, PLAN), PLAN)
        grads = load_queries(grad, first_query, num_queries, first_column, BLOCK_OUT, PLAN)
        maps = tl.permute(maps.to(grads.dtype), (0, 2, 1))
        acc = tl.dot(maps, grads, acc, input_precision=PLAN.precision)
    acc *= tl.cast(mixes.output_scale, tl.float32)
    store_heads(batch_entry(dv, b), acc, first_key, num_keys, first_column, BLOCK_N, BLOCK_OUT, PLAN)


def query_gradients(
    problem: Problem, rows: Rows, v: Heads | None, grad: Heads | None, *, moments: bool
) -> tuple[Tensor, Tensor]:
    """dq, and dpre_weight, empty without a pre-mix; ``rows`` with delta."""

    def launch(config: Config) -> tuple[Tensor, Tensor]:
        plan = problem.plan(config)
        count = programs(problem.batch, problem.num_queries, plan.block_m, plan)
        dq = problem.new_heads(problem.num_queries)
        parts = problem.new_parts(plan, count, 2) if plan.pre_mix else None
        query_gradients_kernel[count, column_blocks(plan)](
            problem.q, problem.k, v, grad, problem.mask, problem.mixes, rows, as_heads(dq), parts,
            problem.num_queries, problem.num_keys, MOMENTS=moments, PLAN=plan, **options(config),
        )  # fmt: skip
        return dq, problem.sum_of_parts(parts, plan)

    return problem.run("query_gradients", launch)


def key_gradients(problem: Problem, rows: Rows, v: Heads | None, grad: Heads | None, *, moments: bool) -> Tensor:
    """dk; ``rows`` with delta."""

    def launch(config: Config) -> Tensor:
        plan = problem.plan(config, spread_keys=True)
        count = programs(problem.batch, problem.num_keys, plan.block_n, plan)
        dk = problem.new_heads(problem.num_keys)
        key_gradients_kernel[count, column_blocks(plan)](
            problem.q, problem.k, v, grad, problem.mask, problem.mixes, rows, as_heads(dk),
            problem.num_queries, problem.num_keys, MOMENTS=moments, PLAN=plan, **options(config),
        )  # fmt: skip
        return dk

    return problem.run("key_gradients", launch)


def value_gradients(problem: Problem, rows: Rows, grad: Heads) -> Tensor:
    """dv."""

    def launch(config: Config) -> Tensor:
        plan = problem.plan(config, spread_keys=True)
        count = programs(problem.batch, problem.num_keys, plan.block_n, plan)
        dv = problem.new_heads(problem.num_keys)
        value_gradients_kernel[count, column_blocks(plan)](
            problem.q, problem.k, grad, problem.mask, problem.mixes, rows, as_heads(dv),
            problem.num_queries, problem.num_keys, PLAN=plan, **options(config),
        )  # fmt: skip
        return dv

    return problem.run("value_gradients", launch)


def row_gradients(
    problem: Problem, rows: Rows, v: Heads | None, grad: Heads | None, *, moments: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write rows.delta; return the gradients of the parameters after the softmax, empty where they are absent."""

    def launch(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plan = problem.plan(config)
        count = programs(problem.batch, problem.num_queries, plan.block_m, plan)
        mixes = plan.post_mix and not moments
        wanted = (mixes, mixes, plan.layer_norm, plan.layer_norm)
        parts = Parts(
            *(
                problem.new_parts(plan, count, axes) if want else None
                for want, axes in zip(wanted, (2, 1, 1, 1), strict=True)
            )
        )
        row_gradients_kernel[(count,)](
            problem.q, problem.k, v, grad, problem.mask, problem.mixes, rows, parts,
            problem.num_queries, problem.num_keys,
            MOMENTS=moments, PLAN=plan, **options(config),
        )  # fmt: skip
        return tuple(problem.sum_of_parts(part, plan) for part in parts)

    return problem.run("row_gradients", launch)


def head_mixed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    layer_norm: bool,
    output_scale: float,
    centred: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Launch the kernels.

    Args:
        grad: gradient of the result, (B, H, Nq, D) in q's dtype, any strides.
        The others: arguments of :func:`fastvit.kernels.head_mixed_attention.head_mixed_attention_forward`.

    Returns:
        dq, dk, dv in q's dtype with the strides of a contiguous (B, N, H, D); dpre_weight, dpre_bias, dpost_weight,
        dpost_bias, dnorm_weight, dnorm_bias in float32, empty where the parameter is None.
    """
    problem = Problem(
        q, k, mask, scale, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias, norm_eps, layer_norm,
        output_scale, centred,
    )  # fmt: skip
    parameters = (pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias)
    if problem.empty:
        gradients = tuple(empty_heads_last(tensor, tensor.shape[2]).zero_() for tensor in (q, k, v))
        small = tuple(problem.zeros(parameter) for parameter in parameters)
        return gradients + small
    heads_of_grad, heads_of_v = as_operand(grad), as_operand(v)
    rows = problem.row_statistics()
    d_post = row_gradients(problem, rows, heads_of_v, heads_of_grad, moments=False)
    dq, d_pre_weight = query_gradients(problem, rows, heads_of_v, heads_of_grad, moments=False)
    dk = key_gradients(problem, rows, heads_of_v, heads_of_grad, moments=False)
    dv = None
    fits = post_weight is not None and not layer_norm and mask is None and q.dtype != torch.float32
    if fits and scale > 0 and gluon_runs(q.device):
        from fastvit.kernels import head_mixed_attention_tiles as tiles

        if tiles.fits(problem, shared_limit(q.device)):
            post = Post(post_weight, post_bias, None, None, None, None, 0.0, output_scale)
            with torch.cuda.device_of(q):
                mix = fold(post, missing=0.0 if centred else 1.0 / k.shape[2], sized=True)
                dv = tiles.weighted_rows(problem, rows.lse, heads_of_grad, mix, columns_are_queries=True)
    if dv is None:
        dv = value_gradients(problem, rows, heads_of_grad)
    small = (
        gradient if parameter is not None else gradient.new_empty(0)
        for gradient, parameter in zip(d_post, parameters[2:], strict=True)
    )
    return dq, dk, dv, d_pre_weight, problem.zeros(pre_bias), *small

"""First and second moments of the attention maps of all heads, and their gradients: BatchNorm statistics without maps.

With P as in :mod:`fastvit.kernels.head_mixed_attention_maps` and c = 1 / Nk, summed over batch elements, queries and
keys (masked ones too, where P = 0):

    sums[g] = sum (P_g - c);  moments[g, g'] = sum (P_g - c)(P_g' - c)

Mean and variance of a mix of the maps follow from these. A row of P sums to 1, so its mean is c and little is lost to
cancellation. For the same reason ``sums`` is a count, 0 for a row with a visible key and -1 for one without, and no
gradient flows through it.

Tiling: the row statistics, then one program per block of queries, which loops over the keys and accumulates
(P - c)(P - c)^T. The programs' partial sums are added in a fixed order. The backward is that of
:mod:`fastvit.kernels.head_mixed_attention_backward` with another gradient of P.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels._primitives import empty_heads_last
from fastvit.kernels.head_mixed_attention_backward import (
    add_outer_products,
    key_gradients,
    no_outer_products,
    query_gradients,
    row_gradients,
    store_matrix,
)
from fastvit.kernels.head_mixed_attention_configs import Config
from fastvit.kernels.head_mixed_attention_launch import Problem, options, programs
from fastvit.kernels.head_mixed_attention_maps import (
    attention_tile,
    batch_entry,
    batch_entry_of_mask,
    rows_of,
    this_block,
)
from torch import Tensor


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def head_map_moments_kernel(q, k, mask, mixes, rows, parts, num_queries, num_keys, PLAN: tl.constexpr):
    """The partial sum of one block of queries; entries of padded heads or between groups of slots are meaningless."""
    first_query, b = this_block(num_queries, PLAN.block_m, PLAN)
    q = batch_entry(q, b)
    k = batch_entry(k, b)
    mask = batch_entry_of_mask(mask, b, 0, PLAN)
    query_exists = (rows_of(first_query, PLAN.block_m, True, PLAN) < num_queries)[:, :, None]

    moments = no_outer_products(PLAN)
    for first_key in range(0, num_keys, PLAN.block_n):
        _scores, p, _visible = attention_tile(
            q, k, mask, mixes, rows, b, first_query, num_queries, first_key, num_keys, PLAN
        )
        key_exists = (rows_of(first_key, PLAN.block_n, False, PLAN) < num_keys)[:, None, :]
        centred = tl.where(query_exists & key_exists, p - 1.0 / num_keys, 0.0)
        moments = add_outer_products(moments, centred, centred, PLAN)
    store_matrix(parts, moments, PLAN)


def head_map_moments(
    q: Tensor,
    k: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments as in :func:`fastvit.kernels.head_mixed_attention.head_mixed_attention_forward`.

    ``weight``, that of the mix whose variance is wanted, is not used: the products are of float32 whatever cancels.

    Returns:
        sums (H), float32, moments (H, H), float64; zeros where there are no maps.
    """
    problem = Problem(q, k, mask, scale, pre_weight, pre_bias)
    if problem.empty:
        return q.new_zeros(problem.heads, dtype=torch.float32), q.new_zeros((problem.heads,) * 2, dtype=torch.float64)
    rows = problem.row_statistics()

    def launch(config: Config) -> Tensor:
        plan = problem.plan(config)
        count = programs(problem.batch, problem.num_queries, plan.block_m, plan)
        parts = problem.new_parts(plan, count, 2)
        head_map_moments_kernel[(count,)](
            problem.q, problem.k, problem.mask, problem.mixes, rows, parts, problem.num_queries, problem.num_keys,
            PLAN=plan, **options(config),
        )  # fmt: skip
        return problem.sum_of_parts(parts, plan, torch.float64)

    rows_without_keys = (rows.inverse == 0).sum((0, 2))
    return -rows_without_keys.float(), problem.run("head_map_moments", launch)


def head_map_moments_backward(
    dsums: Tensor,
    dmoments: Tensor,
    q: Tensor,
    k: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels.

    Args:
        dsums: (H), unused: ``sums`` counts rows, whatever q and k are.
        dmoments: (H, H).
        The others: the forward's arguments.

    Returns:
        dq, dk in q's dtype with the strides of a contiguous (B, N, H, D); dpre_weight, dpre_bias in float32, empty
        where the parameter is None.
    """
    symmetric = dmoments.float() + dmoments.float().t()
    problem = Problem(q, k, mask, scale, pre_weight, pre_bias, post_weight=symmetric)
    if problem.empty:
        small = (problem.zeros(pre_weight), problem.zeros(pre_bias))
        dq, dk = (empty_heads_last(tensor, tensor.shape[2]).zero_() for tensor in (q, k))
        return dq, dk, *small
    rows = problem.row_statistics()
    row_gradients(problem, rows, None, None, moments=True)
    dq, d_pre_weight = query_gradients(problem, rows, None, None, moments=True)
    dk = key_gradients(problem, rows, None, None, moments=True)
    return dq, dk, d_pre_weight, problem.zeros(pre_bias)

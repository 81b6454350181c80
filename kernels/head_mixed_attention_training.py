"""A training step of head-mixed attention in half precision, without a mask: forward and backward as one operator each.

    P as in :mod:`fastvit.kernels.head_mixed_attention_maps`, N_k keys, n = B N_q N_k numbers in a map
    X_g = P_g - 1 / N_k;  C[g, g'] = sum X_g X_g' / n;  var_h = w_h^T C w_h;  f_h = gamma_h / sqrt(var_h + eps)
    out_h = output_scale (f_h sum_g w[h, g] X_g + beta_h) v_h    with batch statistics, or else
    out_h = output_scale (sum_g w[h, g] P_g + bias_h) v_h

As rows of P sum to 1, the mean of a map is 1 / N_k, and the batch's statistics follow from C. The forward keeps the
log-sum-exp of each row of the logits. With A = diag(f) w, dA its gradient as that of any matrix, and db that of beta:

    df_h = sum_g dA[h, g] w[h, g];  dvar_h = -df_h f_h / (2 (var_h + eps))
    dw_h = f_h dA_h + 2 dvar_h C w_h;  dgamma_h = df_h / sqrt(var_h + eps);  dbeta = db
    dX_g = sum_h A[h, g] dM_h + sum_g' S[g, g'] X_g',  S = 2 / n sum_h dvar_h w_h w_h^T

Where tiles of all heads do not fit (:mod:`fastvit.kernels.head_mixed_attention_tiles`), the kernels for every case run.

Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT); Ioffe and Szegedy 2015 (batch statistics).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels.head_mixed_attention import gluon_runs, head_mixed_attention_forward
from fastvit.kernels.head_mixed_attention_backward import head_mixed_attention_backward
from fastvit.kernels.head_mixed_attention_fold import Post, fold, normalised_rows
from fastvit.kernels.head_mixed_attention_launch import Problem, as_operand, shared_limit
from fastvit.kernels.head_mixed_attention_moments import head_map_moments, head_map_moments_backward
from torch import Tensor

SLOTS = 16
"""Side of a matrix over heads, padded."""


# --- H x H arithmetic -----------------------------------------------------------------------------------------------


@triton.jit
def load_vector(vector, DEFAULT: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """(H) in float32, zero for padded heads; DEFAULT for None."""
    slots = tl.arange(0, SLOTS)
    values = tl.where(slots < HEADS, DEFAULT, 0.0)
    if vector is not None:
        values = tl.load(vector + slots, mask=slots < HEADS, other=0).to(tl.float32)
    return values


@triton.jit
def places_of(STRIDE: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """Where the elements of a matrix (H, H) lie, and which there are."""
    slots = tl.arange(0, SLOTS)
    inside = (slots < HEADS)[:, None] & (slots < HEADS)[None, :]
    return slots[:, None] * STRIDE + slots[None, :], inside


@triton.jit
def load_matrix(matrix, STRIDE: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """(H, H) in float32, zero for padded heads."""
    places, inside = places_of(STRIDE, HEADS, SLOTS)
    return tl.load(matrix + places, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_matrix(out, matrix, STRIDE: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """Write (H, H)."""
    places, inside = places_of(STRIDE, HEADS, SLOTS)
    tl.store(out + places, matrix.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_vector(out, vector, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """Write (H), where it is wanted."""
    if out is not None:
        slots = tl.arange(0, SLOTS)
        tl.store(out + slots, vector.to(out.dtype.element_ty), mask=slots < HEADS)


@triton.jit
def store_normalised(out, sizes, matrix, SLOTS: tl.constexpr):
    """Write a (SLOTS, SLOTS) as numbers up to 1, and the powers of two that its rows are to be multiplied by."""
    matrix, size = normalised_rows(matrix)
    slots = tl.arange(0, SLOTS)
    tl.store(out + slots[:, None] * SLOTS + slots[None, :], matrix.to(out.dtype.element_ty))
    tl.store(sizes + slots, size)


@triton.jit
def times(a, b):
    """Product of two small matrices in float32."""
    return tl.sum(a[:, :, None] * b[None, :, :], 1)


@triton.jit
def fold_batch_kernel(
    products, weight, bias, norm_weight, norm_bias, mean, var, eps, momentum, values, unbiased, centre, output_scale,
    matrix, sizes, shifts, kept, new_mean, new_var, STRIDE: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The mix and the norm behind it as one mix of X; what the backward needs; the running statistics, moved.

    kept (2 H + 1, H): A, C, and 1 / sqrt(var + eps). matrix, sizes, shifts: as those of ``fold_kernel``.
    """
    mix = load_matrix(weight, HEADS, HEADS, SLOTS)
    covariance = load_matrix(products, STRIDE, HEADS, SLOTS) / tl.cast(values, tl.float32)
    shift = load_vector(bias, 0.0, HEADS, SLOTS)
    # The mean takes a bias away again, but not a NaN or inf.
    variance = tl.sum(times(mix, covariance) * mix, 1) + shift * 0.0
    inverse = 1.0 / tl.sqrt_rn(variance + tl.cast(eps, tl.float32))
    folded = mix * (inverse * load_vector(norm_weight, 1.0, HEADS, SLOTS))[:, None]
    store_matrix(kept, folded, HEADS, HEADS, SLOTS)
    store_matrix(kept + HEADS * HEADS, covariance, HEADS, HEADS, SLOTS)
    store_vector(kept + 2 * HEADS * HEADS, inverse, HEADS, SLOTS)
    scale = tl.cast(output_scale, tl.float32)
    small, size = normalised_rows(folded)
    store_matrix(matrix, small, HEADS, HEADS, SLOTS)
    store_vector(sizes, size * scale, HEADS, SLOTS)
    store_vector(shifts, load_vector(norm_bias, 0.0, HEADS, SLOTS) * scale, HEADS, SLOTS)
    if mean is not None:
        rate = tl.cast(momentum, tl.float32)
        old = load_vector(mean, 0.0, HEADS, SLOTS)
        batch = tl.sum(mix, 1) * tl.cast(centre, tl.float32) + shift
        store_vector(new_mean, old + rate * (batch - old), HEADS, SLOTS)
        old = load_vector(var, 0.0, HEADS, SLOTS)
        store_vector(new_var, old + rate * (variance * tl.cast(unbiased, tl.float32) - old), HEADS, SLOTS)


@triton.jit
def fold_batch_backward_kernel(
    d_mix, d_shift, weight, norm_weight, kept, values, output_scale,
    d_weight, d_bias, d_norm_weight, d_norm_bias, moments, small_moments, moment_sizes,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters, and S, which is symmetric: (SLOTS, SLOTS) in float32, and normalised."""
    scale = tl.cast(output_scale, tl.float32)
    d_mix = load_matrix(d_mix, STRIDE, HEADS, SLOTS) * scale
    d_shift = load_vector(d_shift, 0.0, HEADS, SLOTS) * scale
    mix = load_matrix(weight, HEADS, HEADS, SLOTS)
    covariance = load_matrix(kept + HEADS * HEADS, HEADS, HEADS, SLOTS)
    inverse = load_vector(kept + 2 * HEADS * HEADS, 0.0, HEADS, SLOTS)
    factor = inverse * load_vector(norm_weight, 1.0, HEADS, SLOTS)
    d_factor = tl.sum(d_mix * mix, 1)
    d_variance = -0.5 * d_factor * factor * inverse * inverse
    gradient = factor[:, None] * d_mix + 2.0 * d_variance[:, None] * times(mix, covariance)
    store_matrix(d_weight, gradient, HEADS, HEADS, SLOTS)
    store_vector(d_bias, d_variance * 0.0, HEADS, SLOTS)  # the mean takes a bias away again; NaN stays NaN
    store_vector(d_norm_weight, d_factor * inverse, HEADS, SLOTS)
    store_vector(d_norm_bias, d_shift, HEADS, SLOTS)
    weighted = tl.sum(mix[:, :, None] * (d_variance[:, None] * mix)[:, None, :], 0)
    weighted *= 2.0 / tl.cast(values, tl.float32)
    slots = tl.arange(0, SLOTS)
    tl.store(moments + slots[:, None] * SLOTS + slots[None, :], weighted)
    if small_moments is not None:
        store_normalised(small_moments, moment_sizes, weighted, SLOTS)


@triton.jit
def mix_gradients_kernel(
    d_mix, d_shift, centre, output_scale, d_weight, d_bias, HEADS: tl.constexpr, SLOTS: tl.constexpr
):
    """The gradients of a mix of P from sums with X."""
    scale = tl.cast(output_scale, tl.float32)
    d_shift = load_vector(d_shift, 0.0, HEADS, SLOTS)
    gradient = load_matrix(d_mix, SLOTS, HEADS, SLOTS) + tl.cast(centre, tl.float32) * d_shift[:, None]
    store_matrix(d_weight, gradient * scale, HEADS, HEADS, SLOTS)
    store_vector(d_bias, d_shift * scale, HEADS, SLOTS)


@triton.jit
def transpose_kernel(
    weight, bias, factor, missing, out, sizes, matrix, value_sizes, shifts, HEADS: tl.constexpr, SLOTS: tl.constexpr
):
    """factor weight^T, normalised; and unless ``matrix`` is None the same mix as ``fold_kernel`` makes it."""
    scale = tl.cast(factor, tl.float32)
    mix = load_matrix(weight, HEADS, HEADS, SLOTS)
    store_normalised(out, sizes, tl.trans(mix) * scale, SLOTS)
    if matrix is not None:
        small, size = normalised_rows(mix)
        store_matrix(matrix, small, HEADS, HEADS, SLOTS)
        store_vector(value_sizes, size * scale, HEADS, SLOTS)
        shift = load_vector(bias, 0.0, HEADS, SLOTS) + tl.sum(mix, 1) * tl.cast(missing, tl.float32)
        store_vector(shifts, shift * scale, HEADS, SLOTS)


@triton.jit(do_not_specialize=["num_queries"])
def moments_of_rows_kernel(
    products, moments, delta, num_queries, HEADS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr
):
    """Add sum_g' S[g, g'] products[g, g'] of each row to delta[g]."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, SLOTS)
    places, inside = places_of(HEADS, HEADS, SLOTS)
    exists = rows < num_queries
    offsets = (b * num_queries + rows)[:, None, None] * (HEADS * HEADS) + places[None, :, :]
    each = tl.load(products + offsets, mask=exists[:, None, None] & inside[None, :, :], other=0)
    weights = tl.load(moments + slots[:, None] * SLOTS + slots[None, :])
    place = delta + (b * HEADS + slots[None, :]) * num_queries + rows[:, None]
    known = exists[:, None] & (slots < HEADS)[None, :]
    total = tl.sum(each * weights[None, :, :], 2) + tl.load(place, mask=known, other=0)
    tl.store(place, total, mask=known)


def transposed(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight^T, (SLOTS, SLOTS) in a dtype, and what its rows are to be multiplied by."""
    out = torch.empty((SLOTS, SLOTS), dtype=dtype, device=weight.device)
    sizes = torch.empty(SLOTS, dtype=torch.float32, device=weight.device)
    transpose_kernel[(1,)](
        weight.contiguous(), None, 1.0, 0.0, out, sizes, None, None, None,
        HEADS=weight.shape[1], SLOTS=SLOTS, num_warps=1,
    )  # fmt: skip
    return out, sizes


def both_ways(
    weight: Tensor, bias: Tensor | None, output_scale: float, missing: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The mix times ``output_scale`` as :func:`transposed` gives it, and as ``fold`` does."""
    heads, device = weight.shape[1], weight.device
    out = torch.empty((SLOTS, SLOTS), dtype=dtype, device=device)
    matrix = torch.empty((heads, heads), dtype=torch.float16, device=device)
    sizes, value_sizes, shifts = torch.empty((3, SLOTS), dtype=torch.float32, device=device).unbind(0)
    transpose_kernel[(1,)](
        weight, bias, float(output_scale), missing, out, sizes, matrix, value_sizes, shifts,
        HEADS=heads, SLOTS=SLOTS, num_warps=1,
    )  # fmt: skip
    return (out, sizes), (matrix, value_sizes, shifts)


# --- The operators --------------------------------------------------------------------------------------------------


def like(tensor: Tensor | None, given: Tensor) -> Tensor:
    """Uninitialised, of a parameter's shape and dtype; of size 0 for None."""
    return given.new_empty(0) if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=given.device)


def or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def head_mixed_attention_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor,
    post_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    norm_eps: float,
    momentum: float,
    batch_statistics: bool,
    output_scale: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels.

    Args:
        q: (B, H, Nq, D), k, v: (B, H, Nk, D); float16 or bfloat16, all the same; not empty; H up to 16, D up to 128.
        pre_weight, pre_bias, post_weight, post_bias: (H, H) and (H,), of any floating dtype.
        norm_weight, norm_bias, norm_mean, norm_var, norm_eps, momentum: of the BatchNorm, if ``batch_statistics``; the
            running statistics are read, not written.
        scale: positive.

    Returns:
        The result, (B, H, Nq, D) with the strides of a contiguous (B, Nq, H, D); the log2-sum-exp2 of the logits' rows,
        (B, H, Nq) float32, less the part of pre_bias, unwritten where the backward will not read it; what
        ``fold_batch_kernel`` keeps, or empty; norm_mean and norm_var moved, or empty.
    """
    from fastvit.kernels import head_mixed_attention_tiles as tiles
    from fastvit.kernels.head_mixed_attention_whole import whole_rows

    heads, num_keys = q.shape[1], k.shape[2]
    problem = Problem(q, k, None, scale, pre_weight, pre_bias)
    limit = shared_limit(q.device)
    fits = gluon_runs(q.device) and tiles.fits(problem, limit)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    kept = q.new_empty(0, dtype=torch.float32)
    new_mean, new_var = like(norm_mean, q), like(norm_var, q)
    mixes = Post(post_weight, post_bias, None, None, None, None, 0.0, output_scale)
    with torch.cuda.device_of(q):
        folded = None
        if batch_statistics:
            if fits:
                lse = problem.row_statistics().lse
                products, stride = tiles.map_products(problem, lse), SLOTS
            else:
                _, moments = head_map_moments(q, k, pre_weight, pre_bias, None, scale)
                products, stride = moments.float(), heads
            matrix = torch.empty((heads, heads), dtype=torch.float16, device=q.device)
            sizes, shifts = torch.empty((2, heads), dtype=torch.float32, device=q.device).unbind(0)
            kept = torch.empty((2 * heads + 1, heads), dtype=torch.float32, device=q.device)
            count = q.shape[0] * q.shape[2] * num_keys
            parameters = (post_weight, post_bias, norm_weight, norm_bias, norm_mean, norm_var)
            fold_batch_kernel[(1,)](
                products, *(None if each is None else each.contiguous() for each in parameters), float(norm_eps),
                float(momentum), float(count), count / (count - 1.0), 1.0 / num_keys, float(output_scale),
                matrix, sizes, shifts, kept, or_none(new_mean), or_none(new_var),
                STRIDE=stride, HEADS=heads, SLOTS=SLOTS,
            )  # fmt: skip
            folded = matrix, sizes, shifts
            mixes = Post(kept[:heads], norm_bias, None, None, None, None, 0.0, output_scale)
        if fits and not batch_statistics:
            out = whole_rows(q, k, v, pre_weight, pre_bias, mixes, scale, limit, centred=False, lse=lse)
            if out is not None:
                return out, lse, kept, new_mean, new_var
            lse = problem.row_statistics().lse
            folded = fold(mixes, missing=1.0 / num_keys, sized=True)
        if fits:
            out = tiles.weighted_rows(problem, lse, as_operand(v), folded)
        else:
            settings = (None, None, None, None, 0.0, False, output_scale, batch_statistics, None, scale)
            out = head_mixed_attention_forward(q, k, v, pre_weight, pre_bias, mixes.weight, mixes.bias, *settings)
    return out, lse, kept, new_mean, new_var


def head_mixed_attention_training_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor,
    post_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lse: Tensor,
    kept: Tensor,
    output_scale: float,
    scale: float,
) -> tuple[Tensor, ...]:
    """Launch the kernels.

    Args:
        grad: of the result, in q's dtype.
        lse, kept: results of the forward. The others: its arguments.

    Returns:
        dq, dk, dv with the strides of a contiguous (B, N, H, D); dpre_weight, dpre_bias, dpost_weight, dpost_bias,
        dnorm_weight, dnorm_bias in their parameters' dtypes, of size 0 where the parameter is None.
    """
    from fastvit.kernels import head_mixed_attention_tiles as tiles

    heads, num_keys = q.shape[1], k.shape[2]
    batch_statistics = kept.numel() > 0
    count = float(q.shape[0] * q.shape[2] * num_keys)
    d_weight, d_bias, d_norm_weight, d_norm_bias, d_pre_weight = (
        like(each, q) for each in (post_weight, post_bias, norm_weight, norm_bias, pre_weight)
    )
    d_pre_bias = torch.zeros_like(pre_bias) if pre_bias is not None else q.new_empty(0)
    weight, bias = (kept[:heads], norm_bias) if batch_statistics else (post_weight.contiguous(), post_bias)
    moments = torch.empty((SLOTS, SLOTS), dtype=torch.float32, device=q.device) if batch_statistics else None

    def fold_backward(d_mix: Tensor, d_shift: Tensor | None, stride: int, factor: float) -> tuple[Tensor, Tensor]:
        small = torch.empty((SLOTS, SLOTS), dtype=torch.float16, device=q.device)
        sizes = torch.empty(SLOTS, dtype=torch.float32, device=q.device)
        fold_batch_backward_kernel[(1,)](
            d_mix, d_shift, post_weight.contiguous(), norm_weight, kept, count, float(factor),
            d_weight, or_none(d_bias), or_none(d_norm_weight), or_none(d_norm_bias), moments, small, sizes,
            STRIDE=stride, HEADS=heads, SLOTS=SLOTS,
        )  # fmt: skip
        return small, sizes

    problem = Problem(
        q, k, None, scale, pre_weight, pre_bias, weight, bias, output_scale=output_scale, centred=batch_statistics
    )
    limit = shared_limit(q.device)
    with torch.cuda.device_of(q):
        if not (gluon_runs(q.device) and tiles.fits(problem, limit)):
            settings = (None, None, 0.0, False, output_scale, batch_statistics, None, scale)
            dq, dk, dv, d_pre, _, d_mix, d_shift, *_ = head_mixed_attention_backward(
                grad, q, k, v, pre_weight, pre_bias, weight, bias, *settings
            )
            if not batch_statistics:
                d_weight, d_bias = d_mix.to(d_weight.dtype), d_shift.to(d_bias.dtype)
            else:
                fold_backward(d_mix, or_none(d_shift), heads, 1.0)
                assert moments is not None
                inner = moments[:heads, :heads] * 0.5
                more = head_map_moments_backward(inner[0], inner, q, k, pre_weight, pre_bias, None, scale)
                dq, dk, d_pre = dq + more[0], dk + more[1], d_pre + more[2]
            if pre_weight is not None:
                d_pre_weight = d_pre.to(pre_weight.dtype)
            return dq, dk, dv, d_pre_weight, d_pre_bias, d_weight, d_bias, d_norm_weight, d_norm_bias

        values, grads = as_operand(v), as_operand(grad)
        mix, folded = both_ways(weight, bias, output_scale, 0.0 if batch_statistics else 1.0 / num_keys, q.dtype)
        maps = tiles.Maps(problem, lse, values, grads, *mix)
        sums, delta, products = tiles.row_sums(maps, moments=batch_statistics)
        small_moments = None
        if batch_statistics:
            small_moments = fold_backward(sums[:SLOTS], sums[SLOTS], SLOTS, output_scale)
            moments_of_rows_kernel[triton.cdiv(q.shape[2], 16), q.shape[0]](
                products, moments, delta, q.shape[2], HEADS=heads, SLOTS=SLOTS, ROWS=16
            )
        else:
            mix_gradients_kernel[(1,)](
                sums[:SLOTS], sums[SLOTS], 1.0 / num_keys, float(output_scale), d_weight, or_none(d_bias),
                HEADS=heads, SLOTS=SLOTS, num_warps=1,
            )  # fmt: skip
        pre = None if pre_weight is None else transposed(pre_weight, q.dtype)
        dq, d_pre = tiles.query_gradients(maps, delta, small_moments, pre)
        if pre_weight is not None:
            d_pre_weight = d_pre.to(pre_weight.dtype)
        dk, dv = tiles.key_gradients(maps, delta, small_moments, pre, folded)
    return dq, dk, dv, d_pre_weight, d_pre_bias, d_weight, d_bias, d_norm_weight, d_norm_bias

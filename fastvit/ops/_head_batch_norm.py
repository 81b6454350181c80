"""BatchNorm over heads, folded into the mix in front of it: A and b with norm(W P + c) = A P + b. Differentiable.

    by running statistics:  f_h = gamma_h / sqrt(var_h + eps);  A = diag(f) W;  b = beta + f (c - mean)
    by the batch's:         the same with mean = W e + c and var_h = w_h^T C w_h, where e_g is the mean of map g over
                            the batch, queries and keys, and C the H x H covariance of the maps; so b = beta - f (W e)

All of it is arithmetic on H x H numbers, done in float64, which costs nothing and which autocast leaves alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvit.reference.functional import BatchNorm

__all__ = ["fold_batch", "fold_running"]

Folded = tuple[Tensor, Tensor]
"""A (H, H) and b (H,), float64."""


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def fold_running(norm: BatchNorm, weight: Tensor | None, bias: Tensor | None) -> Folded:
    """The mix (None: the identity, or no bias) with a norm by running statistics behind it."""
    assert norm.running_mean is not None and norm.running_var is not None  # checked with the arguments
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    mean = norm.running_mean.double()
    shift = factor * (-mean if bias is None else bias.double() - mean)
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return factor.diag() if weight is None else factor[:, None] * weight.double(), shift


def fold_batch(
    norm: BatchNorm,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    moments: Tensor,
    keys: int,
    values: int,
) -> Folded:
    """The mix with a norm by the batch's statistics behind it; moves the running ones.

    Args:
        weight, bias: (H, H) and (H,); None is the identity, or no bias.
        sums, moments: (H,) and (H, H), of the maps less 1 / keys.
        values: numbers in a map over the whole batch. Like the sums, those of this process.
    """
    small = (weight, bias, norm.weight, norm.bias)
    settings = (norm.eps, norm.process_group, 1.0 / keys, values)
    mix, shift, mean, variance, count = _FoldBatch.apply(settings, *map(_wide, (sums, moments, *small)))
    _track(norm, mean, variance, count)
    return mix, shift


def _over_processes(group: Any, *parts: Tensor) -> tuple[Tensor, ...]:
    """Each part summed over a group's processes, in one exchange; None: as they are."""
    if group is None:
        return parts
    total = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(total, group=group)
    pieces = total.split([part.numel() for part in parts])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))


class _FoldBatch(torch.autograd.Function):
    """By hand, since autograd makes some sixty small operations of it, which a step of a small batch feels."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[float, Any, float, int],
        sums: Tensor,
        moments: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> tuple[Tensor, ...]:
        eps, group, centre, values = settings
        # About zero rather than about 1 / Nk, which is not every process's; float64 has the digits for that.
        totals = sums + values * centre
        products = moments + centre * (sums[:, None] + sums) + values * centre**2
        count, totals, products = _over_processes(group, sums.new_full((1,), values), totals, products)
        each = totals / count
        covariance = products / count - each[:, None] * each
        mix = torch.eye(each.numel(), dtype=each.dtype, device=each.device) if weight is None else weight
        moved = mix @ covariance
        variance = (moved * mix).sum(1)
        mean = mix @ each
        inverse = (variance + eps).rsqrt()
        factor = inverse if gamma is None else inverse * gamma
        shift = -factor * mean
        ctx.save_for_backward(mix, gamma, each, moved, mean, inverse, factor, count)
        ctx.group, ctx.centre, ctx.absent = group, centre, [tensor is None for tensor in (weight, bias, beta)]
        ctx.mark_non_differentiable(mean, variance, count)
        return (
            factor[:, None] * mix,
            shift if beta is None else shift + beta,
            mean if bias is None else mean + bias,
            variance,
            count,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmix: Tensor, dshift: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        mix, gamma, each, moved, mean, inverse, factor, count = ctx.saved_tensors
        dfactor = (dmix * mix).sum(1) - dshift * mean
        dmean = -factor * dshift
        dvariance = -0.5 * dfactor * factor * inverse.square()
        scaled = dvariance[:, None] * mix
        dcovariance = mix.t() @ scaled
        deach = mix.t() @ dmean - 2.0 * (dcovariance @ each)
        # Every process's result depends on every one's sums.
        dtotals, dproducts = _over_processes(ctx.group, deach / count, dcovariance / count)
        dsums = dtotals + 2.0 * ctx.centre * dproducts.sum(1)
        dweight = factor[:, None] * dmix + dmean[:, None] * each + 2.0 * dvariance[:, None] * moved
        no_weight, no_bias, no_beta = ctx.absent
        return (
            None,
            dsums,
            dproducts,
            None if no_weight else dweight,
            None if no_bias else torch.zeros_like(mean),  # the mean takes a bias away again
            None if gamma is None else dfactor * inverse,
            None if no_beta else dshift,
        )


def _track(norm: BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Move the running statistics, in place, as ``nn.BatchNorm2d`` does: the variance without bias."""
    if norm.running_mean is None or norm.running_var is None or norm.momentum == 0.0:
        return
    with torch.no_grad():
        unbiased = variance * (count / (count - 1.0))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.copy_(torch.lerp(running.double(), new, norm.momentum))

"""BatchNorm by statistics that a kernel gathered: summed over processes, tracked, and folded into a factor and a shift.

All of it is arithmetic on a few numbers a channel and done in float64, which autocast leaves alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvit.reference.functional import BatchNorm

__all__ = ["factor_and_shift", "sum_over_processes", "track"]


class _AllReduce(torch.autograd.Function):
    """The sum over processes; of its gradients too, since every process's result depends on every one's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_processes(group: Any, *parts: Tensor) -> tuple[Tensor, ...]:
    """Each part (counts, sums, moments; of one dtype) summed over a group's processes, in one exchange; differentiable.

    The group is the ``process_group`` of a :class:`BatchNorm`.
    """
    total = _AllReduce.apply(torch.cat([part.flatten() for part in parts]), group)
    pieces = total.split([part.numel() for part in parts])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))


def track(norm: BatchNorm, mean: Tensor, variance: Tensor, count: Any) -> None:
    """Move the running statistics, in place, as ``nn.BatchNorm*`` does: the variance without bias.

    Args:
        mean, variance: of the batch, (C,); the variance as it normalises, divided by the count.
        count: values a channel; a number or a tensor.
    """
    if norm.running_mean is None or norm.running_var is None or norm.momentum == 0.0:
        return
    with torch.no_grad():
        unbiased = variance.detach() * (count / (count - 1))
        for running, new in ((norm.running_mean, mean.detach()), (norm.running_var, unbiased)):
            running.copy_(running.to(new.dtype) * (1.0 - norm.momentum) + new * norm.momentum)


def factor_and_shift(norm: BatchNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) factor and shift with norm(x) = factor * x + shift, in float64; differentiable."""
    factor = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -factor * mean.double()
    return factor, shift if norm.bias is None else shift + norm.bias.double()

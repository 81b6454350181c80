"""The low-level operator of LeFF at inference, which ``kernels/leff.py`` implements: the feed-forward whole.

    leff_triton(x, up_weight, dw_weight, down_weight, {what stands behind each of them}, ...) -> out

with behind each a bias and a BatchNorm with given statistics. Weights have x's dtype; dw_weight and all vectors may be
float32 beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.reference.functional import BatchNorm

__all__ = ["fits", "run"]

MAX_KERNEL = 3  # more taps spill registers

_BEHIND = (
    "Tensor? {0}_bias, Tensor? {0}_norm_weight, Tensor? {0}_norm_bias, Tensor? {0}_mean, Tensor? {0}_var, float {0}_eps"
)

torch.library.define(
    "fastvit::leff_triton",
    "(Tensor x, Tensor up_weight, Tensor dw_weight, Tensor down_weight, "
    f"{', '.join(_BEHIND.format(part) for part in ('up', 'dw', 'down'))}, "
    "SymInt height, SymInt width, int prefix_tokens, bool paper) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastvit::leff_triton")
def _fake(x: Tensor, up_weight: Tensor, dw_weight: Tensor, down_weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:2], down_weight.shape[0]))


@torch.library.impl("fastvit::leff_triton", ("cpu", "cuda"))
def _launch(*arguments: Any) -> Tensor:
    from fastvit.kernels.leff import leff_operator

    return leff_operator(*arguments)


def _behind(bias: Tensor | None, norm: BatchNorm | None) -> tuple[Any, ...]:
    """The operator's arguments for what stands behind a layer."""
    vectors = (bias, None, None, None, None)
    if norm is not None:
        vectors = (bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return *(None if v is None else v.contiguous() for v in vectors), 0.0 if norm is None else norm.eps


def fits(x: Tensor, up_weight: Tensor, dw_weight: Tensor, down_weight: Tensor) -> bool:
    """Whether the kernels take these sizes: their offsets inside an image and inside a weight are 32-bit."""
    widest = max(up_weight.shape[0], down_weight.shape[0])
    large = (x.shape[1] + 64) * widest >= 2**30 or max(up_weight.numel(), down_weight.numel()) >= 2**31
    return dw_weight.shape[-1] <= MAX_KERNEL and not large


def run(
    x: Tensor,
    layers: tuple[tuple[Tensor, Tensor | None, BatchNorm | None], ...],
    grid: tuple[int, int],
    prefix_tokens: int,
    paper: bool,
) -> Tensor:
    """Call the operator; layers: weight, bias and norm of up, dw and down, the weights in x's dtype."""
    weights = [weight.contiguous() for weight, _, _ in layers]
    behind = [argument for _, bias, norm in layers for argument in _behind(bias, norm)]
    return torch.ops.fastvit.leff_triton(x, *weights, *behind, *grid, prefix_tokens, paper)

"""The low-level operators at inference of Triton kernels with a depthwise convolution in front of a product.

    leff_triton(x, up_weight, dw_weight, down_weight, {what stands behind each of them}, ...) -> out
    depthwise_separable_conv_triton(x, dw_weight, pw_weight, pw_bias, {what stands behind dw_weight}, ...) -> out

with behind each a bias and a BatchNorm with given statistics. The weights of products have x's dtype; everything else
may be float32 beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.ops._token_depthwise_conv_native import out_size
from fastvit.reference.functional import BatchNorm

__all__ = ["leff", "leff_fits", "separable", "separable_fits"]

MAX_KERNEL = 3  # more taps spill registers

_BEHIND = (
    "Tensor? {0}_bias, Tensor? {0}_norm_weight, Tensor? {0}_norm_bias, Tensor? {0}_mean, Tensor? {0}_var, float {0}_eps"
)
_SCHEMAS = {
    "leff": (
        "(Tensor x, Tensor up_weight, Tensor dw_weight, Tensor down_weight, "
        f"{', '.join(_BEHIND.format(part) for part in ('up', 'dw', 'down'))}, "
        "SymInt height, SymInt width, int prefix_tokens, bool paper) -> Tensor"
    ),
    "depthwise_separable_conv": (
        f"(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? pw_bias, {_BEHIND.format('dw')}, "
        "SymInt height, SymInt width, int stride, int padding, int prefix_tokens) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastvit::{_name}_triton", _schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("fastvit::leff_triton")
def _fake_leff(x: Tensor, up_weight: Tensor, dw_weight: Tensor, down_weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:2], down_weight.shape[0]))


@torch.library.register_fake("fastvit::depthwise_separable_conv_triton")
def _fake_separable(x: Tensor, dw_weight: Tensor, pw_weight: Tensor, *rest: Any) -> Tensor:
    height, width, stride, padding, prefix_tokens = rest[-5:]
    rows, columns = (out_size(size, dw_weight.shape[-1], stride, padding) for size in (height, width))
    return x.new_empty((x.shape[0], prefix_tokens + rows * columns, pw_weight.shape[0]))


@torch.library.impl("fastvit::leff_triton", ("cpu", "cuda"))
def _launch_leff(*arguments: Any) -> Tensor:
    from fastvit.kernels.leff import leff_operator

    return leff_operator(*arguments)


@torch.library.impl("fastvit::depthwise_separable_conv_triton", ("cpu", "cuda"))
def _launch_separable(*arguments: Any) -> Tensor:
    from fastvit.kernels.conv_projection import depthwise_separable_conv_operator

    return depthwise_separable_conv_operator(*arguments)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _behind(bias: Tensor | None, norm: BatchNorm | None) -> tuple[Any, ...]:
    """The arguments for what stands behind a layer."""
    vectors = (bias, None, None, None, None)
    if norm is not None:
        vectors = (bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return *map(_contiguous, vectors), 0.0 if norm is None else norm.eps


def _fits(x: Tensor, dw_weight: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take these sizes: their offsets inside an image and inside a product's weight are 32-bit."""
    widest, largest = max(weight.shape[0] for weight in weights), max(weight.numel() for weight in weights)
    return dw_weight.shape[-1] <= MAX_KERNEL and (x.shape[1] + 64) * widest < 2**30 and largest < 2**31


def leff_fits(x: Tensor, up_weight: Tensor, dw_weight: Tensor, down_weight: Tensor) -> bool:
    """Whether the kernels take a feed-forward of these sizes."""
    return _fits(x, dw_weight, up_weight, down_weight)


def leff(
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


def separable_fits(x: Tensor, dw_weight: Tensor, pw_weight: Tensor, padding: int) -> bool:
    """Whether the kernels take a convolution of these sizes; one that pads more than it reaches makes a larger map."""
    return _fits(x, dw_weight, pw_weight) and padding <= dw_weight.shape[-1] // 2


def separable(
    x: Tensor,
    depthwise: tuple[Tensor, Tensor | None, BatchNorm | None],
    pointwise: tuple[Tensor, Tensor | None],
    grid: tuple[int, int],
    stride: int,
    padding: int,
    prefix_tokens: int,
) -> Tensor:
    """Call the operator; depthwise: weight, bias and norm; pointwise: weight, in x's dtype, and bias."""
    dw_weight, *around = depthwise
    pw_weight, pw_bias = (_contiguous(tensor) for tensor in pointwise)
    return torch.ops.fastvit.depthwise_separable_conv_triton(
        x, dw_weight.contiguous(), pw_weight, pw_bias, *_behind(*around), *grid, stride, padding, prefix_tokens
    )

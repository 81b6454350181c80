"""Convolution of an image, BatchNorm and activation: the stems of CeiT and DeepViT.

- ``channels_last``: the library's convolution in channels-last layout, the norm (by running statistics) folded into its
  weight; inference on the CPU.
- ``reference``: ``fastvit.reference.functional.conv_batch_norm``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops._checks import check_activation, check_batch_norm, check_parameter, fail, is_int
from fastvit.ops._operator import AUTO, REFERENCE, Implementation, Operator, gradients_needed, never
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm

__all__ = ["conv_batch_norm"]

_DTYPES = (torch.float32, torch.bfloat16)


class Call(NamedTuple):
    """The arguments of the public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    activation: str | None


def _check_pair(name: str, value: int | tuple[int, int], least: int) -> None:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(is_int(each) and each >= least for each in pair):
        fail(name, f"an int >= {least} or two", value)


def _check(call: Call) -> None:
    x, weight = call.x, call.weight
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        fail("x", "a floating tensor (B, C, H, W)", x)
    shaped = isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[1] == x.shape[1]
    if not shaped or not weight.is_floating_point():
        fail("weight", f"a floating tensor (O, {x.shape[1]}, k, l)", weight)
    if weight.device != x.device:
        fail("weight", f"a tensor on {x.device}", weight)
    check_parameter("bias", call.bias, (weight.shape[0],), x)
    if call.norm is None:
        fail("norm", "BatchNorm.of(module)", call.norm)
    check_batch_norm("norm", call.norm, weight.shape[0], x)
    _check_pair("stride", call.stride, 1)
    _check_pair("padding", call.padding, 0)
    check_activation("activation", call.activation)


def _channels_last_reasons(call: Call, named: bool) -> Iterator[str]:
    x, norm = call.x, call.norm
    if not x.is_cpu:
        yield f"it has been measured on the CPU only, x is on {x.device}"
    if x.dtype not in _DTYPES:
        yield f"dtype {x.dtype} is not one of float32, bfloat16"
    if torch.is_autocast_enabled("cpu"):
        yield "autocast is on, whose cast weights the library keeps"
    if norm.layer is not None:
        yield f"the norm is a {type(norm.layer).__name__}, which has to be called"
    if norm.use_batch_stats:
        yield "the norm uses batch statistics"
    if torch.is_grad_enabled() and gradients_needed(x, call.weight, call.bias, *norm[:4]):
        yield "gradients are needed"


def _run_channels_last(call: Call) -> Tensor:
    norm = call.norm
    assert norm.running_mean is not None and norm.running_var is not None  # by the check
    factor = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if call.bias is not None:
        shift = shift + call.bias * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    dtype = call.x.dtype
    weight = (call.weight * factor.view(-1, 1, 1, 1)).to(dtype, memory_format=torch.channels_last)
    x = call.x.contiguous(memory_format=torch.channels_last)
    return functional.activate(F.conv2d(x, weight, shift.to(dtype), call.stride, call.padding), call.activation)


def _run_reference(call: Call) -> Tensor:
    x, weight, bias, norm, stride, padding, activation = call
    return functional.conv_batch_norm(x, weight, bias, norm, stride=stride, padding=padding, activation=activation)


OPERATOR = Operator(
    "conv_batch_norm",
    (
        Implementation("channels_last", _channels_last_reasons, _run_channels_last),
        Implementation(REFERENCE, never, _run_reference),
    ),
    _check,
)


def conv_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    activation: str | None = None,
    backend: str = AUTO,
) -> Tensor:
    """activation(norm(conv(x) + bias)) of an image.

    Args:
        x: (B, C, H, W), floating, in any memory format.
        weight: (O, C, k, l), cross-correlation as in ``nn.Conv2d``; bias: (O,). On x's device.
        norm: BatchNorm over channels.
        stride, padding: of the convolution, an int or (vertical, horizontal).
        activation: None, "gelu" (erf), "quick_gelu", "silu" or "relu".
        backend: "auto", "channels_last" or "reference".

    Returns:
        (B, O, H', W'); by "channels_last" in that memory format.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Yuan et al. 2021 (CeiT), section 3.1; the plain form is ``fastvit.reference.functional.conv_batch_norm``.
    """
    return OPERATOR(Call(x, weight, bias, norm, stride, padding, activation), backend)

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

from fastvit.ops._checks import INTS, LARGEST, check_activation, check_batch_norm, check_parameter, fail
from fastvit.ops._operator import AUTO, REFERENCE, Implementation, Operator, gradients_needed
from fastvit.reference import functional
from fastvit.reference.functional import ACTIVATIONS, BatchNorm

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


def _check_pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, ...]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    for each in pair:
        if len(pair) != 2 or not isinstance(each, INTS) or isinstance(each, bool) or not least <= each <= LARGEST:
            fail(name, f"an int from {least} to {LARGEST}, or two", value)
    return pair


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
    padding, sizes, kernel = _check_pair("padding", call.padding, 0), tuple(x.shape[2:]), tuple(weight.shape[2:])
    if sizes[0] + 2 * padding[0] < kernel[0] or sizes[1] + 2 * padding[1] < kernel[1]:
        fail("padding", f"enough for a kernel of {kernel} to fit the padded {sizes}", call.padding)
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


def _refuse(call: Call) -> None:
    """Raise for what torch would broadcast, convert or, on meta, take for another; it takes True and [0] for a size."""
    x, weight, bias, norm, stride, padding, _ = call
    shape, device = weight.shape[:1], x.device
    for vector in (bias, norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if vector is not None and (vector.shape != shape or vector.device != device or not vector.is_floating_point()):
            raise ValueError("norm")
    if x.dim() != 4 or weight.device != device or not weight.is_floating_point():
        raise ValueError("x")
    if not (type(stride) is type(padding) is int and padding <= LARGEST):
        _check(call)


def _run_channels_last(call: Call) -> Tensor:
    _refuse(call)
    x, weight, bias, norm, stride, padding, activation = call
    assert norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if bias is not None:
        shift = shift + bias * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = (weight * factor.view(-1, 1, 1, 1)).to(x.dtype, memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    return ACTIVATIONS[activation](F.conv2d(x, weight, shift.to(x.dtype), stride, padding))


def _run_reference(call: Call) -> Tensor:
    x, weight, bias, norm, stride, padding, activation = call
    if not isinstance(x, torch.fx.Proxy):  # which has no shape
        _refuse(call)
        usual = type(norm) is BatchNorm and activation in ACTIVATIONS
        if not usual or (norm.running_mean is None) is not (norm.running_var is None):
            _check(call)  # torch takes one statistic, and moves statistics before the activation is named
    return functional.conv_batch_norm(x, weight, bias, norm, stride=stride, padding=padding, activation=activation)


OPERATOR = Operator(
    "conv_batch_norm",
    (
        Implementation("channels_last", _run_channels_last, _channels_last_reasons, validates=True),
        Implementation(REFERENCE, _run_reference, validates=True),
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
        activation: None, "gelu" (erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        backend: "auto", "channels_last" or "reference".

    Returns:
        (B, O, H', W'); by "channels_last" in that memory format.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Yuan et al. 2021 (CeiT), section 3.1; the plain form is ``fastvit.reference.functional.conv_batch_norm``.
    """
    return OPERATOR(Call(x, weight, bias, norm, stride, padding, activation), backend)

"""Convolution of an image, BatchNorm and activation (the stems of CeiT and DeepViT): the checks, and who computes it.

- ``channels_last``: the library's convolution in channels-last layout, the norm (by running statistics) folded into its
  weight; inference on the CPU.
- ``reference``: ``fastvit.reference.functional.conv_batch_norm``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops._checks import describe
from fastvit.ops._convolution_checks import check_bias, check_norm
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm

__all__ = ["conv_batch_norm"]

_DTYPES = (torch.float32, torch.bfloat16)


class Call(NamedTuple):
    """The arguments of one call, checked."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm
    stride: tuple[int, int]
    padding: tuple[int, int]
    activation: str | None


def _channels_last_reasons(call: Call) -> list[str]:
    x, norm = call.x, call.norm
    if x.device.type != "cpu":
        return [f"it has been measured on the CPU only, x is on {x.device}"]
    reasons = []
    if x.dtype not in _DTYPES:
        reasons.append(f"dtype {x.dtype} is not one of float32, bfloat16")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on, whose cast weights the library keeps")
    if norm.layer is not None:
        reasons.append(f"the norm is a {type(norm.layer).__name__}, which has to be called")
    if norm.use_batch_stats:
        reasons.append("the norm uses batch statistics")
    if gradients_needed(x, call.weight, call.bias, *norm[:4]):
        reasons.append("gradients are needed")
    return reasons


def _run_channels_last(call: Call) -> Tensor:
    norm = call.norm
    assert norm.running_mean is not None and norm.running_var is not None  # by the checks
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


def _no_reasons(call: Call) -> list[str]:
    return []


IMPLEMENTATIONS = (
    Implementation("channels_last", _channels_last_reasons, _run_channels_last),
    Implementation("reference", _no_reasons, _run_reference),
)
"""In order of preference."""


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: got {value!r}, accepted is an int of at least {least}, or two")
    return pair


def conv_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    activation: str | None = None,
    backend: str = "auto",
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
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: got {describe(x)}, accepted is a floating tensor (B, C, H, W)")
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: got {describe(weight)}, accepted beside x {describe(x)} is (O, {x.shape[1]}, k, l)")
    if weight.device != x.device:
        raise ValueError(f"weight: got {describe(weight)}, x is on {x.device}")
    check_bias("bias", bias, weight.shape[0], x)
    if norm is None:
        raise ValueError("norm: got None, accepted is BatchNorm.of(module)")
    check_norm("norm", norm, weight.shape[0], x)
    if activation not in functional.ACTIVATIONS:
        accepted = sorted(map(str, functional.ACTIVATIONS))
        raise ValueError(f"activation: got {activation!r}, accepted are {accepted}")
    call = Call(x, weight, bias, norm, _pair("stride", stride, 1), _pair("padding", padding, 0), activation)
    return select("conv_batch_norm", IMPLEMENTATIONS, backend, (call,), {}).run(call)

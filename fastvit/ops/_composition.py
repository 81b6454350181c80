"""What the operators made of a depthwise convolution and linear layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.ops import _products
from fastvit.ops._dispatch import REFERENCE, automatic
from fastvit.ops.token_depthwise_conv import IMPLEMENTATIONS
from fastvit.reference.functional import BatchNorm

__all__ = ["KERNELS", "as_dtype_of", "has_batch_statistics", "linear", "linear_dtype", "parameters_of"]

KERNELS = tuple(implementation for implementation in IMPLEMENTATIONS if implementation.name != REFERENCE)
"""Who has a kernel for the depthwise convolution, in order of preference; what is composed around it suits all."""


def as_dtype_of(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters in x's dtype, as a plain convolution or linear layer wants them; autocast sees to that by itself."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return list(parameters)
    return [tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(x.dtype) for tensor in parameters]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with parameters of any floating dtype, by whichever product is the faster."""
    weight, bias = as_dtype_of(x, weight, bias)
    call = _products.Call(x, (_products.Layer(weight, bias),), None)
    return automatic(_products.IMPLEMENTATIONS, (call,), {}).run(call)


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer gives for x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if not x.is_meta and torch.is_autocast_enabled(device) else x.dtype


def has_batch_statistics(*norms: BatchNorm | None) -> bool:
    """Whether one of the norms uses the statistics of the batch."""
    return any(norm is not None and norm.use_batch_stats for norm in norms)


def parameters_of(*parts: Tensor | BatchNorm | None) -> list[Tensor]:
    """The tensors among these, those of norms included."""
    found: list[Tensor | None] = []
    for part in parts:
        found += part[:4] if isinstance(part, BatchNorm) else [part]
    return [tensor for tensor in found if tensor is not None]

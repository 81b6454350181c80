"""The short way of a call: on the CPU straight to the C++ operators, whose own checks are enough.

Checking in Python and choosing an implementation cost as much as a small convolution, several times that where large
tensors have just been through the caches. A call that the operators refuse goes the long way, where the checks name
what is wrong or another implementation takes it; so does everything that is traced, transformed, recorded or cast. It
is for inference; a convolution has one for training, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvit import backends
from fastvit.ops import _attention, _dispatch, _products
from fastvit.ops._token_depthwise_conv_native import ACTIVATION_CODES
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm

__all__ = [
    "NotAtOnceError",
    "attention",
    "convolution",
    "is_open",
    "norm_arguments",
    "normalise",
    "product",
    "require_cpu",
    "tried",
    "two_products",
]

Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]

_NO_NORM: Norm = (None, None, None, None, 0.0)

_HAS_CPP = not backends.cpp_reasons()
_DTYPES = (torch.float32, torch.bfloat16)
_PARAMETERS = (Tensor, torch.nn.Parameter)
# Each name less on the way is a line less to be fetched where the caches hold something else.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_autocast_enabled = torch.is_autocast_enabled
_is_tracing = torch._C._is_tracing
_is_transformed = torch._C._are_functorch_transforms_active

_CONVOLUTION = torch.ops.fastvit.token_depthwise_conv.default
_ATTENTION = torch.ops.fastvit.masked_attention_cpp.default
_LINEAR = torch.ops.fastvit.linear.default


class NotAtOnceError(Exception):
    """The call is not for the short way."""


def tried(backend: str, run: Callable[..., Any], x: Tensor, *rest: Any, trains: bool = False) -> Any:
    """run(x, *rest), or None where the call is for the long way: because something stands against the short one, or
    because ``run`` raised, whatever it was. ``trains``: it does what autograd asks for.
    """
    if not is_open(x, backend) or (torch.is_grad_enabled() and not trains):
        return None
    try:
        return run(x, *rest)
    except Exception:
        return None


def is_open(x: Tensor, backend: str) -> bool:
    """Whether nothing that can be told from x and the state of torch stands against the short way.

    What compiles without Dynamo, or exports, does so with tensors of other types.
    """
    return (
        _HAS_CPP
        and backend == _dispatch.AUTO
        and not _is_dynamo_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in _DTYPES
        and not _is_autocast_enabled("cpu")
        and backends.REQUESTED is None
        and not _is_tracing()
        and not _is_transformed()
        and forward_ad._current_level < 0
        and not _dispatch.is_observed()
    )


def require_cpu(*parameters: Tensor | None) -> None:
    """Raises unless all are there to be read; with one of the meta device among them, an operator computes nothing."""
    for parameter in parameters:
        if parameter is not None and not parameter.is_cpu:
            raise NotAtOnceError


def norm_arguments(norm: BatchNorm | None) -> Norm:
    """(weight, bias, mean, variance, eps) as the operators take them."""
    if norm is None:
        return _NO_NORM
    if type(norm) is not BatchNorm or norm.use_batch_stats or norm.running_mean is None or norm.layer is not None:
        raise NotAtOnceError
    require_cpu(*norm[:4])
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    stride: int,
    padding: int | None,
    prefix_tokens: int,
    pre_norm: BatchNorm | None,
    pre_activation: str | None,
    norm: BatchNorm | None,
    activation: str | None,
    residual: bool,
) -> Tensor:
    """``token_depthwise_conv``; raises where the call needs the long way."""
    if type(weight) not in _PARAMETERS or not weight.is_cpu or not (bias is None or bias.is_cpu):
        raise NotAtOnceError
    return _CONVOLUTION(
        x,
        weight,
        bias,
        *norm_arguments(pre_norm),
        ACTIVATION_CODES[pre_activation],
        *norm_arguments(norm),
        ACTIVATION_CODES[activation],
        *grid,
        stride,
        weight.shape[3] // 2 if padding is None else padding,
        prefix_tokens,
        residual,
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """A linear layer by whichever product is the faster; raises where the call needs the long way."""
    right = type(weight) in _PARAMETERS and weight.dim() == 2 and weight.dtype == x.dtype
    if not right or not (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype)):
        raise NotAtOnceError
    require_cpu(weight, bias)
    if _products.chooses_cpp(x, weight):
        return _LINEAR(x, weight, bias, ACTIVATION_CODES[activation])
    return functional.linear(x, weight, bias, activation)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float | None, dropout_p: float
) -> Tensor:
    """``masked_attention`` and ``class_attention``; raises where the call needs the long way."""
    right = dropout_p == 0.0 and q.shape[3] <= _attention.CPP_MAX_HEAD_DIM and _attention.VECTORISED
    if not right or not (mask is None or mask.dim() == 4) or not (bias is None or bias.dim() == 4):
        raise NotAtOnceError
    require_cpu(k, v, mask, bias)
    return _ATTENTION(q, k, v, mask, bias, q.shape[3] ** -0.5 if scale is None else scale)


def two_products(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """``mlp``; raises where the call needs the long way."""
    return product(product(x, fc1_weight, fc1_bias, activation), fc2_weight, fc2_bias)


def normalise(tokens: Tensor, norm: BatchNorm | None) -> Tensor:
    """A norm over batch and tokens alike; raises where the call needs the long way."""
    *vectors, _ = norm_arguments(norm)
    if norm is None:
        return tokens
    if not all(_is_vector(vector, tokens.shape[-1]) for vector in vectors):
        raise NotAtOnceError
    return norm(tokens.flatten(0, 1)).view_as(tokens)


def _is_vector(parameter: Tensor | None, size: int) -> bool:
    return parameter is None or parameter.shape == (size,)

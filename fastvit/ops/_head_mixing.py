"""The differentiable core of head-mixed attention: what surrounds the four functions that an engine computes.

An engine mixes maps by H x H matrices, and gathers two sums over the maps that it recomputes. A BatchNorm is folded
into the mix in front of it (:mod:`fastvit.ops._head_batch_norm`); one that uses the batch's statistics has them from
the two sums. So its backward is two of the engine's, one after the other, and all between them H x H numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.ops._head_batch_norm import fold_batch, fold_running
from fastvit.reference.functional import BatchNorm, LayerNorm

__all__ = ["Call", "Engine", "as_rows", "attend"]


class Call(NamedTuple):
    """The arguments of one call, checked; ``mask`` has four axes."""

    q: Tensor
    k: Tensor
    v: Tensor
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    post_weight: Tensor | None
    post_bias: Tensor | None
    norm: BatchNorm | LayerNorm | None
    output_scale: float
    mask: Tensor | None
    scale: float
    dropout_p: float
    dropout_after_mix: bool

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Every small tensor that a gradient may be asked for."""
        affine = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return self.pre_weight, self.pre_bias, self.post_weight, self.post_bias, *affine


class Engine(NamedTuple):
    """Who computes on the maps; mixes and norms in float32 (float64 where q is), mask as in :class:`Call`.

    - ``forward(q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias, norm_eps, layer_norm,
      output_scale, mask, scale)``: the result; with ``layer_norm`` over heads.
    - ``backward(grad, q, k, ...)``, as forward but for the order (see :class:`_Mix`): the gradients of q, k, v, the
      four tensors of the mixes and the two of the norm, of size 0 for what is absent.
    - ``moments(q, k, pre_weight, pre_bias, mask, scale)``: sums over b, i, j of P_g - 1/Nk, and of the products
      (P_g - 1/Nk) (P_g' - 1/Nk); P is zero where masked.
    - ``moments_backward(dsums, dmoments, q, k, pre_weight, pre_bias, mask, scale)``: the gradients of q, k, pre_weight,
      pre_bias.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    moments: Callable[..., tuple[Tensor, Tensor]]
    moments_backward: Callable[..., tuple[Tensor, ...]]


def _present(gradients: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else grad for grad, tensor in zip(gradients, tensors, strict=True))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        norm_eps: float,
        layer_norm: bool,
        output_scale: float,
        scale: float,
        mask: Tensor | None,
        *tensors: Tensor | None,  # q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias
    ) -> Tensor:
        ctx.save_for_backward(mask, *tensors)
        ctx.engine, ctx.settings, ctx.scale = engine, (norm_eps, layer_norm, output_scale), scale
        return engine.forward(*tensors, norm_eps, layer_norm, output_scale, mask, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *tensors = ctx.saved_tensors
        gradients = ctx.engine.backward(as_rows(grad, grad.dtype), *tensors, *ctx.settings, mask, ctx.scale)
        return (None,) * 6 + _present(gradients, tuple(tensors))


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        scale: float,
        mask: Tensor | None,
        *tensors: Tensor | None,  # q, k, pre_weight, pre_bias
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mask, *tensors)
        ctx.engine, ctx.scale = engine, scale
        return engine.moments(*tensors, mask, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dsums: Tensor, dmoments: Tensor) -> tuple[Tensor | None, ...]:
        mask, *tensors = ctx.saved_tensors
        gradients = ctx.engine.moments_backward(dsums, dmoments, *tensors, mask, ctx.scale)
        return (None,) * 3 + _present(gradients, tuple(tensors))


def as_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype, with the channels of a token side by side, as the engines read them."""
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    # Not contiguous(), which leaves the strides of an empty tensor as they are.
    return tensor if tensor.stride(3) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def attend(engine: Engine, call: Call, dtype: torch.dtype) -> Tensor:
    """The call on an engine, q, k and v in ``dtype``; differentiable but for dropout, which is left to the reference.

    Updates the running statistics of a BatchNorm that uses the batch's.
    """
    small = torch.promote_types(dtype, torch.float32)
    q, k, v = as_rows(call.q, dtype), as_rows(call.k, dtype), as_rows(call.v, dtype)
    pre = _in(small, call.pre_weight), _in(small, call.pre_bias)
    weight, bias, norm = call.post_weight, call.post_bias, call.norm
    affine: tuple[Tensor | None, Tensor | None] = None, None
    eps, layer_norm = 0.0, isinstance(norm, LayerNorm)
    if isinstance(norm, LayerNorm):
        affine, eps = (_in(small, norm.weight), _in(small, norm.bias)), norm.eps
    elif norm is not None and not norm.use_batch_stats:
        weight, bias = fold_running(norm, weight, bias)
    elif norm is not None:
        sums, moments = _Moments.apply(engine, call.scale, call.mask, q, k, *pre)
        keys = k.shape[2]
        weight, bias = fold_batch(norm.opened(), weight, bias, sums, moments, keys, q.shape[0] * q.shape[2] * keys)
    post = _in(small, weight), _in(small, bias)
    return _Mix.apply(engine, eps, layer_norm, call.output_scale, call.scale, call.mask, q, k, v, *pre, *post, *affine)


def _in(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)

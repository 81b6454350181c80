"""What the tests of attention operators share: inputs, and a result held to the reference forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvit.reference import functional
from tests.helpers import assert_as_accurate, poisoned_empty

NAMES = ("out", "dq", "dk", "dv", "dbias")


def packed(batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the views of a packed projection (B, N, 3, H, D)."""
    qkv = torch.randn(batch, tokens, 3, heads, head_dim).to(dtype)
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def outputs_and_gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of every tensor under ``grad``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(
    function: Callable[..., Tensor],
    tensors: list[Tensor],
    mask: Tensor | None = None,
    scale: float | None = None,
    grad: Tensor | None = None,
) -> list[Tensor]:
    """Forward and every gradient of ``function(q, k, v, mask, bias, scale)``; returns them in the order of NAMES.

    Args:
        tensors: q, k, v and perhaps a bias.
        grad: of the output; random by default.
    """

    def run(call, poisoned, *tensors):
        def bound(q, k, v, bias=None):
            return call(q, k, v, mask, bias, scale)

        if not poisoned:
            return outputs_and_gradients(bound, list(tensors), grad)
        with poisoned_empty():
            return outputs_and_gradients(bound, list(tensors), grad)

    grad = torch.randn(tensors[0].shape) if grad is None else grad
    grad = grad.to(tensors[0].dtype)
    got = run(function, True, *tensors)
    plain = run(functional.masked_attention, False, *tensors)
    exact = run(functional.masked_attention, False, *(tensor.double() for tensor in tensors))
    plains, ulps = [plain], 4.0
    if tensors[0].dtype == torch.float64:
        # The oracle is the plain form itself, so the errors of both count; its own shows in another order of summation.
        q, k, *others = tensors
        out, dq, dk, *rest = run(functional.masked_attention, False, q.flip(3), k.flip(3), *others)
        plains, ulps = [plain, [out, dq.flip(3), dk.flip(3), *rest]], 16.0
    for name, result, oracle, *same in zip(NAMES, got, exact, *plains, strict=False):
        assert_as_accurate(result, same, oracle, ulps=ulps, name=name)
    return got

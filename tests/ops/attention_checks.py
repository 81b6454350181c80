"""What the tests of attention operators share: inputs, and a result held to the reference forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

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


def backwards(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float | None) -> Tensor:
    """The plain form, its sums over channels and keys in the opposite order."""
    mask, bias = (each if each is None or each.shape[-1] == 1 else each.flip(-1) for each in (mask, bias))
    return functional.masked_attention(q.flip(3), k.flip(2, 3), v.flip(2), mask, bias, scale)


def check(
    function: Callable[..., Tensor],
    tensors: list[Tensor],
    mask: Tensor | None = None,
    scale: float | None = None,
    grad: Tensor | None = None,
    only_forward: Collection[torch.dtype] = (),
) -> list[Tensor]:
    """Forward and every gradient of ``function(q, k, v, mask, bias, scale)``; returns them in the order of NAMES.

    Args:
        tensors: q, k, v and perhaps a bias.
        grad: of the output; random by default.
        only_forward: dtypes in which there are no gradients.
    """

    def run(call, poisoned, *tensors):
        def bound(q, k, v, bias=None):
            return call(q, k, v, mask, bias, scale)

        if forward:
            with poisoned_empty() if poisoned else contextlib.nullcontext():
                return [bound(*tensors)]
        if not poisoned:
            return outputs_and_gradients(bound, list(tensors), grad)
        with poisoned_empty():
            return outputs_and_gradients(bound, list(tensors), grad)

    forward = tensors[0].dtype in only_forward
    grad = torch.randn(tensors[0].shape) if grad is None else grad
    grad = grad.to(tensors[0].dtype)
    got = run(function, True, *tensors)
    # The plain form in two orders of summation: one alone is right by luck where a rounded logit decides.
    plain = zip(*(run(form, False, *tensors) for form in (functional.masked_attention, backwards)), strict=True)
    exact = run(functional.masked_attention, False, *(tensor.double() for tensor in tensors))
    for name, *three in zip(NAMES, got, plain, exact, strict=False):
        assert_as_accurate(*three, ulps=16.0 if tensors[0].dtype == torch.float64 else 4.0, name=name)
    return got

"""Attention under a mask and an additive bias, of many queries or of few.

- ``cpp``: ``csrc/attention``, forward and backward, in float16 the forward alone; class attention of up to eight
  queries has kernels of its own.
- ``triton``: ``kernels/attention_*.py``. Reads masks through their strides, where PyTorch's CUDA backends first
  materialise and pad them, so it is preferred on CUDA where there is a mask or a bias, and for class attention, whose
  keys it splits between programs so that one image fills the device.
- ``sdpa``: ``torch.nn.functional.scaled_dot_product_attention``, for calls without mask and bias: its kernels add a
  mask to the logits, so that a NaN or inf at a masked key spreads. On GPUs it is first there by prediction
  (``benchmarks/gpu_model``): ours takes 16 us for ViT-S at batch 64, cuDNN's is estimated at 15 to 18. Its gradients
  lose digits at large logits: at logits of 2e5, dq on the CPU has a relative error of 0.5 (``cpp``: 0.005). On the CPU
  it gives zeros for a row whose logits are all NaN or -inf, which are made NaN here; a logit of +inf may still get it a
  finite row in 16 bits.
- ``reference``: ``fastvit.reference.functional.masked_attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import check_attention, check_broadcast, check_probability, fail, four_axes
from fastvit.ops._operator import (
    AUTO,
    REFERENCE,
    Implementation,
    Operator,
    any_autocast,
    compute_dtype,
    differentiable_backward,
    distinct,
    gradients_needed,
    is_dynamo_compiling,
    is_grad_enabled,
)
from fastvit.ops._schema import define, heads_last, launch
from fastvit.reference import functional

__all__ = ["class_attention", "masked_attention"]

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPP_BACKWARD_DTYPES = CPP_DTYPES[:2]
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
MAX_HEADS = 65535
_CPP_REASONS = tuple(backends.cpp_reasons())


class Call(NamedTuple):
    """The arguments of the public functions."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scale: float | None
    dropout_p: float


def _check(call: Call) -> None:
    q, k, v, mask, bias, scale, dropout_p = call
    check_attention(q, k, v, mask, scale)
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            fail("bias", "a floating tensor (pass a bool mask as mask)", bias)
        check_broadcast("bias", bias, q, k)
    check_probability("dropout_p", dropout_p)


# --- Registered operators -------------------------------------------------------------------------------------------

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, float scale"


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    wanted = a.bias_grad and a.bias is not None
    dbias = a.bias.new_empty(a.bias.shape) if wanted else a.q.new_empty(0)
    return heads_last(a.q), heads_last(a.k), heads_last(a.v), dbias


def _fake_with_lse(a: Any) -> tuple[Tensor, Tensor]:
    return heads_last(a.q), a.q.new_empty(a.q.shape[:3] if a.need_lse else 0, dtype=torch.float32)


class Kernels(NamedTuple):
    """The registered operators of one kind of kernel.

    ``forward(q, k, v, mask, bias, scale)`` gives the output, and so does ``eager``, see :class:`Registered`; ``train``
    of the same arguments gives the output and what the backward needs beside the inputs; ``backward(*kept, grad, q, k,
    v, mask, bias, scale, bias_grad)`` the gradients of q, k, v and bias. The map is computed anew in the backward.
    """

    forward: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    train: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., tuple[Tensor, ...]]


def _define(name: str) -> Kernels:
    """Kernels that keep nothing for the backward."""
    forward, eager, _ = define(name, _INPUTS, "Tensor", lambda a: heads_last(a.q))
    arguments = f"Tensor grad, {_INPUTS}, bool bias_grad"
    backward = define(f"{name}_backward", arguments, "(Tensor, Tensor, Tensor, Tensor)", _fake_backward).call
    return Kernels(forward, eager, lambda *arguments: (forward(*arguments), ()), backward)


def _define_with_lse(name: str) -> Kernels:
    """Kernels that keep the output and the logarithm of each row's sum of exponentials."""
    forward = define(name, f"{_INPUTS}, bool need_lse", "(Tensor, Tensor)", _fake_with_lse).call
    arguments = f"Tensor out, Tensor lse, Tensor grad, {_INPUTS}, bool bias_grad"
    backward = define(f"{name}_backward", arguments, "(Tensor, Tensor, Tensor, Tensor)", _fake_backward).call

    def train(*arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, lse = forward(*arguments, True)
        return out, (out, lse)

    def infer(*arguments: Any) -> Tensor:
        return forward(*arguments, False)[0]

    return Kernels(infer, infer, train, backward)


CPP = _define("masked_attention_cpp")
TRITON = _define_with_lse("masked_attention_triton")
CLASS_TRITON = _define("class_attention_triton")
launch("masked_attention_triton", "attention_masked", "masked_attention_forward")
launch("masked_attention_triton_backward", "attention_masked_backward", "masked_attention_backward")
launch("class_attention_triton", "attention_class", "class_attention_forward")
launch("class_attention_triton_backward", "attention_class_backward", "class_attention_backward")


# --- Autograd -------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        scale: float,
        mask: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        out, kept = kernels.train(q, k, v, mask, bias, scale)
        ctx.kernels, ctx.scale = kernels, scale
        ctx.save_for_backward(q, k, v, mask, bias, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, *kept = ctx.saved_tensors
        *_, needs_bias = ctx.needs_input_grad
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True

            def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
                return functional.masked_attention(q, k, v, mask, bias, ctx.scale)

            _, _, _, *needed = ctx.needs_input_grad
            return None, None, None, *differentiable_backward(plain, (q, k, v, bias), needed, grad)
        dq, dk, dv, dbias = ctx.kernels.backward(*kept, grad, q, k, v, mask, bias, ctx.scale, needs_bias)
        if needs_bias and bias.shape[3] == 1:  # the softmax takes it away again, but not a NaN
            dbias = (dq * 0.0).sum(3, keepdim=True).sum_to_size(bias.shape)
        return None, None, None, dq, dk, dv, dbias if needs_bias else None


def _runner(kernels: Kernels) -> Callable[[Call], Tensor]:
    """``run`` of an implementation by these kernels."""

    def run(call: Call) -> Tensor:
        q, k, v, mask, bias, scale, _ = call
        if any_autocast():
            dtype = compute_dtype(q)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if mask is not None and mask.dim() != 4:
            mask = four_axes(mask, key_padding=True)
        if bias is not None and (bias.dim() != 4 or bias.dtype != q.dtype):
            if not bias.is_floating_point():
                _check(call)
            bias = four_axes(bias.to(q.dtype), key_padding=False)
        if scale is None:
            scale = q.shape[3] ** -0.5
        elif type(scale) is not float:  # a schema takes a tensor of one number
            _check(call)
        if is_grad_enabled() and gradients_needed(q, k, v, bias):
            if is_dynamo_compiling():
                q, k, v, bias = distinct(q, k, v, bias)
            return _Attention.apply(kernels, scale, mask, q, k, v, bias)
        forward = kernels.forward if is_dynamo_compiling() else kernels.eager
        return forward(q, k, v, mask, bias, scale)

    return run


# --- Implementations ------------------------------------------------------------------------------------------------


def _cpp_reasons(call: Call, named: bool) -> Iterator[str]:
    yield from _CPP_REASONS
    q = call.q
    if not q.is_cpu:
        yield f"it takes tensors on the CPU, q is on {q.device}"
    dtype = compute_dtype(q) if any_autocast() else q.dtype
    if dtype not in CPP_DTYPES:
        yield f"dtype {dtype} is not one of float32, bfloat16, float16"
    elif dtype not in CPP_BACKWARD_DTYPES and is_grad_enabled() and gradients_needed(*call[:3], call.bias):
        yield f"it has no backward in {str(dtype).removeprefix('torch.')}"
    if q.shape[3] > MAX_HEAD_DIM:
        yield f"head dimension {q.shape[3]} is larger than {MAX_HEAD_DIM}"
    if call.dropout_p != 0.0:
        yield "attention dropout is not implemented"


def _triton_reasons(call: Call, named: bool) -> Iterator[str]:
    q = call.q
    yield from backends.triton_reasons(q.device)
    dtype = compute_dtype(q)
    if dtype not in TRITON_DTYPES:
        yield f"dtype {dtype} is not one of float32, float16, bfloat16"
    if dtype == torch.bfloat16 and q.device.type == "cpu":
        yield "Triton's interpreter multiplies bfloat16 as integers"
    if q.shape[3] > MAX_HEAD_DIM:
        yield f"head dimension {q.shape[3]} is larger than {MAX_HEAD_DIM}"
    if call.dropout_p != 0.0:
        yield "attention dropout is not implemented"
    if not named and q.device.type == "cpu":
        yield "on the CPU it is interpreted"


def _masked_triton_reasons(call: Call, named: bool) -> Iterator[str]:
    yield from _triton_reasons(call, named)
    if call.q.shape[1] > MAX_HEADS:
        yield f"{call.q.shape[1]} heads are more than a grid of programs takes, {MAX_HEADS}"
    if not named and call.mask is None and call.bias is None:
        yield "PyTorch's own kernels are taken to be faster without mask and bias"


def _sdpa_reasons(call: Call, named: bool) -> Iterator[str]:
    if call.mask is not None or call.bias is not None:
        yield "it lets a NaN or inf at a masked key spread"
    if call.k.shape[2] < 2:  # without a key it may give NaN
        yield "with one key its gradients of q and k are rounding errors instead of zero"
    if call.scale == 0.0:
        yield "at a scale of zero it may give NaN"


def _all_finite(q: Tensor, k: Tensor) -> bool:
    """Whether it is known, at the cost of two sums, that nothing has to be made NaN."""
    if is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() or type(q) not in _PLAIN or type(k) not in _PLAIN:
        return False  # what traces cannot branch on values
    return bool((q.detach().sum() + k.detach().sum()).isfinite())


_PLAIN = (Tensor, torch.nn.Parameter)


def _run_sdpa(call: Call) -> Tensor:
    q, k, v = call[:3]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=call.dropout_p, scale=call.scale)
    if not q.is_cpu or _all_finite(q, k):
        return out
    lost = ~q.isfinite().all(-1, keepdim=True) | ~k.isfinite().all(-1).any(-1)[..., None, None]
    return out * torch.where(lost, torch.nan, 1.0).to(out.dtype)  # a product, so that gradients are NaN too


def _run_reference(call: Call) -> Tensor:
    """The plain form; a bias of another dtype is taken in q's."""
    bias = None if call.bias is None else call.bias.to(call.q.dtype)
    return functional.masked_attention(*call[:4], bias, call.scale, call.dropout_p)


_CPP = Implementation("cpp", _runner(CPP), _cpp_reasons, validates=True)
_SDPA = Implementation("sdpa", _run_sdpa, _sdpa_reasons)
_REFERENCE = Implementation(REFERENCE, _run_reference)
_MASKED_TRITON = Implementation("triton", _runner(TRITON), _masked_triton_reasons)
_CLASS_TRITON = Implementation("triton", _runner(CLASS_TRITON), _triton_reasons)

MASKED = Operator("masked_attention", (_CPP, _MASKED_TRITON, _SDPA, _REFERENCE), _check)
CLASS = Operator("class_attention", (_CPP, _CLASS_TRITON, _SDPA, _REFERENCE), _check)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = AUTO,
) -> Tensor:
    """softmax(q k^T * scale + bias) v, restricted to the keys that ``mask`` allows; no (Nq, Nk) map is written.

    Args:
        q: (B, H, Nq, D), floating, any strides.
        k, v: (B, H, Nk, D), dtype and device of q (under autocast dtypes may differ).
        mask: bool, True = attend; (B, Nk) key padding, or broadcastable to (B, H, Nq, Nk). A row with no key left gives
            zeros, and zero gradients. What stands at masked keys has no influence, be it NaN; with "triton" that holds
            of masks that are the same for all queries.
        bias: floating, added to the logits; broadcastable to (B, H, Nq, Nk); -inf masks a key, but with "triton" not a
            NaN there.
        scale: D ** -0.5 by default.
        dropout_p: probability of dropping an attention weight; pass 0 outside training.
        backend: "auto", "cpp", "triton", "sdpa" (without mask and bias) or "reference".

    Returns:
        (B, H, Nq, D) in q's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or probability that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Vaswani et al. 2017, section 3.2.1; the plain form is ``fastvit.reference.functional.masked_attention``.
    """
    return MASKED(Call(q, k, v, mask, bias, scale, dropout_p), backend)


def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = AUTO,
) -> Tensor:
    """:func:`masked_attention` for few queries, as class tokens are, over all tokens.

    Args:
        q: (B, H, Nq, D), floating, any strides; made for one to four queries, right for any number.
        k, v, mask, bias, scale, dropout_p, backend: as in :func:`masked_attention`; what stands at masked keys has no
            influence with any backend, mask or bias.

    Returns:
        (B, H, Nq, D) in q's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or probability that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Touvron et al. 2021 (CaiT), section 3; Yuan et al. 2021 (CeiT), section 3.3; the plain form is
    ``fastvit.reference.functional.class_attention``.
    """
    return CLASS(Call(q, k, v, mask, bias, scale, dropout_p), backend)

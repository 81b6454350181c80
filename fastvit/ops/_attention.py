"""What attention without head mixing is made of: one call, the engines that compute it, and its gradient.

An engine is a pair of registered operators, one for each direction; :func:`attend` puts autograd around them. What the
backward needs beside the inputs is the engine's own affair: the C++ one computes the map of a few queries anew and
needs nothing, Triton's keeps the output and the logarithm of each row's sum of exponentials.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import check_mask, check_tokens, describe, to_four_axes
from fastvit.ops._dispatch import Implementation, gradients_needed
from fastvit.reference import functional

__all__ = [
    "ENGINES",
    "Call",
    "Engine",
    "Orders",
    "attend",
    "checked",
    "define_attention",
    "orders",
]

CPP_DTYPES = (torch.float32, torch.bfloat16)
CPP_MAX_HEAD_DIM = 128
DEVICES = ("cpu", "cuda")
"""What the kernels run on."""
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MAX_HEAD_DIM = 128


class Call(NamedTuple):
    """The arguments of one call, checked: mask and bias have four axes, the scale is a number.

    It is made for each call, and a call of one image may take ten microseconds: hence nothing here is done twice.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scale: float
    dropout_p: float
    dtype: torch.dtype
    """What it is computed in: autocast's dtype where that is on and q is not float64."""

    @property
    def needs_gradients(self) -> bool:
        return gradients_needed(self.q, self.k, self.v, self.bias)


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Call:
    """The call; ValueError names the argument, what it is and what is accepted."""
    check_tokens(q, k, v)
    if mask is not None:
        mask = check_mask(mask, q, k)
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise ValueError(f"bias: got {describe(bias)}, accepted is floating; pass bool masks as mask")
        bias = to_four_axes("bias", bias, q, k)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p!r}, accepted is a probability from 0 to 1")
    dtype, device = q.dtype, q.device.type
    if device in DEVICES and torch.is_autocast_enabled(device) and dtype in TRITON_DTYPES:
        dtype = torch.get_autocast_dtype(device)
    return Call(q, k, v, mask, bias, q.shape[3] ** -0.5 if scale is None else scale, dropout_p, dtype)


# --- Operators ------------------------------------------------------------------------------------------------------

_INPUTS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "Tensor? mask, Tensor? bias, float scale"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"


def _define(name: str, schema: str) -> None:
    torch.library.define(f"fastvit::{name}", schema, tags=torch.Tag.pt2_compliant_tag)


_define("masked_attention_triton", f"({_INPUTS}, {_OPTIONS}, bool need_lse) -> (Tensor, Tensor)")
_define(
    "masked_attention_triton_backward",
    f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool bias_grad) -> {_GRADIENTS}",
)


def _heads_last(like: Tensor) -> Tensor:
    """Uninitialised, of like's shape (B, H, N, D), lying as a contiguous (B, N, H, D)."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bias_grad: bool) -> tuple[Tensor, ...]:
    of_bias = bias.new_empty(bias.shape) if bias_grad and bias is not None else q.new_empty(0)
    return _heads_last(q), _heads_last(k), _heads_last(v), of_bias


def define_attention(name: str) -> None:
    """Declare ``fastvit::name`` and ``fastvit::name_backward``, which needs nothing of the forward but its inputs."""
    _define(name, f"({_INPUTS}, {_OPTIONS}) -> Tensor")
    _define(f"{name}_backward", f"(Tensor grad, {_INPUTS}, {_OPTIONS}, bool bias_grad) -> {_GRADIENTS}")

    @torch.library.register_fake(f"fastvit::{name}")
    def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
        return _heads_last(q)

    @torch.library.register_fake(f"fastvit::{name}_backward")
    def fake_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float,
        bias_grad: bool,
    ) -> tuple[Tensor, ...]:
        return _fake_gradients(q, k, v, bias, bias_grad)


define_attention("masked_attention_cpp")


@torch.library.register_fake("fastvit::masked_attention_triton")
def _fake_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor]:
    return _heads_last(q), q.new_empty(q.shape[:3] if need_lse else 0, dtype=torch.float32)


@torch.library.register_fake("fastvit::masked_attention_triton_backward")
def _fake_triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    return _fake_gradients(q, k, v, bias, bias_grad)


@torch.library.impl("fastvit::masked_attention_triton", ("cpu", "cuda"))
def _triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor]:
    from fastvit.kernels.attention_masked import masked_attention_forward

    return masked_attention_forward(q, k, v, mask, bias, scale, need_lse)


@torch.library.impl("fastvit::masked_attention_triton_backward", ("cpu", "cuda"))
def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastvit.kernels.attention_masked_backward import masked_attention_backward

    return masked_attention_backward(*arguments)


# --- Engines --------------------------------------------------------------------------------------------------------


class Engine(NamedTuple):
    """``infer(q, k, v, mask, bias, scale)`` gives the output, ``forward`` of the same arguments (output, what to keep),
    and ``backward(grad, q, k, v, *kept, mask, bias, scale, bias_grad)`` (dq, dk, dv, dbias).
    """

    infer: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., tuple[Tensor, ...]]

    @classmethod
    def keeping_nothing(cls, name: str) -> Engine:
        """The operators of :func:`define_attention`."""
        infer: Callable[..., Tensor] = getattr(torch.ops.fastvit, name).default
        backward = getattr(torch.ops.fastvit, f"{name}_backward").default

        def forward(*arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
            return infer(*arguments), ()

        return cls(infer, forward, backward)


def _triton_infer(*arguments: Any) -> Tensor:
    return torch.ops.fastvit.masked_attention_triton.default(*arguments, False)[0]


def _triton_forward(*arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    out, lse = torch.ops.fastvit.masked_attention_triton.default(*arguments, True)
    return out, (out, lse)


ENGINES: dict[str, Engine] = {
    "cpp": Engine.keeping_nothing("masked_attention_cpp"),
    "triton": Engine(_triton_infer, _triton_forward, torch.ops.fastvit.masked_attention_triton_backward.default),
}


def _with_adjacent_channels(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by the reference, which can be differentiated themselves."""
    q, k, v, mask, bias, *_ = ctx.saved_tensors
    inputs = [None, q, k, v, None, bias, None]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    out = functional.masked_attention(q, k, v, mask, bias, ctx.scale)
    found = torch.autograd.grad(out, [inputs[i] for i in wanted], grad, create_graph=True)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


class _Attention(torch.autograd.Function):
    """Attention with its gradient, by the engine named. The map is computed anew in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        out, kept = ENGINES[engine].forward(q, k, v, mask, bias, scale)
        ctx.engine, ctx.scale = engine, scale
        ctx.save_for_backward(q, k, v, mask, bias, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, *kept = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(ctx, grad)
        bias_grad = ctx.needs_input_grad[5]
        dq, dk, dv, dbias = ENGINES[ctx.engine].backward(
            _with_adjacent_channels(grad, q.dtype), q, k, v, *kept, mask, bias, ctx.scale, bias_grad
        )
        return None, dq, dk, dv, None, dbias if bias_grad else None, None


def attend(engine: str, call: Call) -> Tensor:
    """The call computed by the engine of this name, with its gradient where one is needed."""
    dtype = call.dtype
    q, k, v = [_with_adjacent_channels(tensor, dtype) for tensor in call[:3]]
    bias = None if call.bias is None else call.bias.to(dtype)
    if call.needs_gradients:
        return _Attention.apply(engine, q, k, v, call.mask, bias, call.scale)
    return ENGINES[engine].infer(q, k, v, call.mask, bias, call.scale)


# --- Implementations ------------------------------------------------------------------------------------------------


def cpp_reasons(call: Call) -> list[str]:
    """Why the C++ kernels cannot take the call."""
    q, reasons = call.q, backends.cpp_reasons()
    if q.device.type != "cpu":
        return [*reasons, f"it takes tensors on the CPU, q is on {q.device}"]
    dtype = call.dtype
    if dtype not in CPP_DTYPES:
        reasons.append(f"dtype {dtype} is not one of float32, bfloat16")
    if q.shape[3] > CPP_MAX_HEAD_DIM:
        reasons.append(f"head dimension {q.shape[3]} is larger than {CPP_MAX_HEAD_DIM}")
    if call.dropout_p > 0.0:
        reasons.append("attention dropout is not implemented")
    return reasons


def run_cpp(call: Call) -> Tensor:
    return attend("cpp", call)


def triton_reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot take the call."""
    q, dtype = call.q, call.dtype
    reasons = list(backends.triton_reasons(q.device))
    if dtype not in TRITON_DTYPES:
        reasons.append(f"dtype {dtype} is not one of float32, float16, bfloat16")
    if dtype == torch.bfloat16 and q.device.type == "cpu":
        reasons.append("Triton's interpreter multiplies bfloat16 as integers")
    if q.shape[3] > TRITON_MAX_HEAD_DIM:
        reasons.append(f"head dimension {q.shape[3]} is larger than {TRITON_MAX_HEAD_DIM}")
    if call.dropout_p > 0.0:
        reasons.append("attention dropout is not implemented")
    return reasons


def run_sdpa(call: Call) -> Tensor:
    """torch's own; a row without keys gives zeros on every device."""
    q, k, v, mask, bias, scale, dropout_p, _ = call
    if bias is None:
        allowed = mask
    else:
        bias = bias.to(q.dtype)
        allowed = bias if mask is None else torch.where(mask, bias, float("-inf"))
    if allowed is None or q.device.type == "cpu":  # the CPU backends give zeros for a row without keys
        return F.scaled_dot_product_attention(q, k, v, allowed, dropout_p, scale=scale)
    # Of the other devices' backends some give NaN there, or the mean of v, and NaN gradients: such a row sees every key
    # in the call, and its result is cut off behind it.
    empty = ~(allowed if bias is None else allowed != float("-inf")).any(-1, keepdim=True)
    allowed = allowed | empty if bias is None else allowed.masked_fill(empty, 0.0)
    return F.scaled_dot_product_attention(q, k, v, allowed, dropout_p, scale=scale).masked_fill(empty, 0.0)


def run_reference(call: Call) -> Tensor:
    """The plain form; a bias of another dtype is taken in q's."""
    bias = None if call.bias is None else call.bias.to(call.q.dtype)
    return functional.masked_attention(*call[:4], bias, call.scale, call.dropout_p)


def no_reasons(call: Call) -> list[str]:
    """For what takes every call."""
    return []


class Orders(NamedTuple):
    """The implementations of one kind of attention, in three orders of preference."""

    cpp_first: tuple[Implementation, ...]
    sdpa_first: tuple[Implementation, ...]
    triton_first: tuple[Implementation, ...]


def orders(triton_engine: str) -> Orders:
    """Of an attention whose Triton kernels are the engine of this name; all else is shared."""
    cpp = Implementation("cpp", cpp_reasons, run_cpp)
    sdpa = Implementation("sdpa", no_reasons, run_sdpa)
    triton = Implementation("triton", triton_reasons, functools.partial(attend, triton_engine))
    reference = Implementation("reference", no_reasons, run_reference)
    return Orders(
        cpp_first=(cpp, sdpa, triton, reference),
        sdpa_first=(sdpa, cpp, triton, reference),
        triton_first=(triton, sdpa, cpp, reference),
    )


VECTORISED = not backends.cpp_reasons() and importlib.import_module("fastvit._C").cpu_info()["in_use"] != "portable"
"""Whether the C++ kernels run on vectors of their own (AVX2 or better); without, SDPA ties with them."""

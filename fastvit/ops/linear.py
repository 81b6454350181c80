"""Linear layers and MLPs, with the activation in the epilogue of the product.

- ``cpp``: ``csrc/linear``, float32 and bfloat16, gradients too; :func:`pays_off` says where it is chosen.
- ``reference``: ``torch.nn.functional.linear``, the library's product, and the activation after it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvit import backends
from fastvit.ops._checks import check_activation, check_linear, check_parameter, fail
from fastvit.ops._operator import (
    AUTO,
    REFERENCE,
    Implementation,
    Operator,
    differentiable_backward,
    gradients_needed,
)
from fastvit.ops._schema import ACTIVATION_CODES, define
from fastvit.reference import functional
from fastvit.reference.functional import ACTIVATIONS

__all__ = ["linear", "mlp", "pays_off"]

CPP_DTYPES = (torch.float32, torch.bfloat16)
CPP_MIN_ROWS = 16
CPP_MIN_COLUMNS = 16
_CPP_REASONS = tuple(backends.cpp_reasons())
_PLAIN = (Tensor, torch.nn.Parameter)

_linear = define(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, int activation",
    "Tensor",
    lambda a: a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0])),
).call


class Linear(NamedTuple):
    """The arguments of :func:`linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None = None


class Mlp(NamedTuple):
    """The arguments of :func:`mlp`."""

    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    activation: str | None = "gelu"


def _check_layer(names: tuple[str, str], x: Tensor, weight: Tensor, bias: Tensor | None, inputs: int) -> int:
    """The number of outputs."""
    outputs = check_linear(names[0], weight, inputs, x)
    check_parameter(names[1], bias, (outputs,), x)
    for name, tensor in zip(names, (weight, bias), strict=True):
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            fail(name, f"x's dtype {x.dtype}", tensor)
    return outputs


def _check_x(x: Tensor, activation: str | None) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or not x.is_floating_point():
        fail("x", "a floating tensor (..., K)", x)
    check_activation("activation", activation)


def _check_linear(call: Linear) -> None:
    _check_x(call.x, call.activation)
    _check_layer(("weight", "bias"), call.x, call.weight, call.bias, call.x.shape[-1])


def _check_mlp(call: Mlp) -> None:
    _check_x(call.x, call.activation)
    hidden = _check_layer(("fc1_weight", "fc1_bias"), call.x, call.fc1_weight, call.fc1_bias, call.x.shape[-1])
    _check_layer(("fc2_weight", "fc2_bias"), call.x, call.fc2_weight, call.fc2_bias, hidden)


# --- By the C++ kernel ----------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x, copied unless it is contiguous, so that its leading axes can be seen as one."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


class _Linear(torch.autograd.Function):
    """A linear layer whose gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _linear(_rows(x), weight, bias, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            return tuple(differentiable_backward(functional.linear, (x, weight, bias), ctx.needs_input_grad, grad))
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if needs_x:
            of_x = _linear(_rows(grad), weight.t(), None, 0)
        if needs_weight or needs_bias:
            rows = grad.flatten(0, -2)
            if needs_weight:
                of_weight = _linear(_rows(rows.t()), _rows(x).flatten(0, -2).t(), None, 0)
            if needs_bias:
                of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def _run_linear_cpp(call: Linear) -> Tensor:
    x, weight, bias, activation = call
    if 1 not in weight.stride():
        weight = weight.clone(memory_format=torch.contiguous_format)
    if torch.is_grad_enabled() and gradients_needed(x, weight, bias):
        out = _Linear.apply(x if x.dim() > 1 else x[None], weight, bias)
        return functional.activate(out if x.dim() > 1 else out[0], activation)
    return _linear(x if x.is_contiguous() else _rows(x), weight, bias, ACTIVATION_CODES[activation])


def _run_linear_reference(call: Linear) -> Tensor:
    x, weight, bias, activation = call
    # torch would broadcast a bias, add one of another dtype, and answer meta parameters with an empty result; a proxy
    # of torch.fx has no shape.
    if not isinstance(x, torch.fx.Proxy):
        if bias is not None:
            if bias.dim() != 1 or bias.numel() != weight.shape[0] or bias.is_meta is not x.is_meta:
                raise ValueError("bias")
            if bias.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ValueError("bias")
        if weight.is_meta is not x.is_meta:
            raise ValueError("weight")
    out = F.linear(x, weight, bias)
    return out if activation is None else ACTIVATIONS[activation](out)


def _run_mlp_reference(call: Mlp) -> Tensor:
    hidden = _run_linear_reference(Linear(call.x, call.fc1_weight, call.fc1_bias, call.activation))
    return _run_linear_reference(Linear(hidden, call.fc2_weight, call.fc2_bias))


def _run_mlp_cpp(call: Mlp) -> Tensor:
    hidden = _run_linear_cpp(Linear(call.x, call.fc1_weight, call.fc1_bias, call.activation))
    return _run_linear_cpp(Linear(hidden, call.fc2_weight, call.fc2_bias))


# Found out at import, since a graph that is being traced cannot ask.
_CPU = {} if backends.cpp_reasons() else importlib.import_module("fastvit._C").cpu_info()
_PAYS_OFF = (
    torch.backends.mkl.is_available()
    and _CPU.get("vendor") == "amd"
    and _CPU.get("in_use") in ("avx512", "avx512_bf16")
)
_HAS_BFLOAT16_PRODUCTS = _CPU.get("in_use") == "avx512_bf16"


def pays_off() -> bool:
    """Whether products of the C++ kernel are faster than the library's on this machine, where they are not small.

    They are where the library's float32 product does not use what the CPU has: MKL does not on AMD's. There the C++
    kernel takes 0.4 to 0.75 times its time, and 0.7 to 1.0 times oneDNN's in bfloat16
    (``python -m benchmarks.ops --only linear mlp``). Elsewhere neither has been measured, and the library is left to
    it.
    """
    return _PAYS_OFF


def _cpp_reasons(call: Linear | Mlp, named: bool) -> Iterator[str]:
    if not (named or _PAYS_OFF):
        yield "the library's products are taken to be as fast on this machine"
    yield from _CPP_REASONS
    x = call.x
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    if isinstance(call, Linear):
        weights, biases = (call.weight,), (call.bias,)
    else:
        weights, biases = (call.fc1_weight, call.fc2_weight), (call.fc1_bias, call.fc2_bias)
    if not x.is_cpu:
        yield f"it takes tensors on the CPU, x is on {x.device}"
        return
    dtype = x.dtype
    if dtype not in CPP_DTYPES:
        yield f"dtype {dtype} is not one of float32, bfloat16"
    if torch.is_autocast_enabled("cpu"):
        yield "autocast is on, whose cast weights the library keeps"
    for tensor in (*weights, *biases):
        if tensor is not None and type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
            yield f"a parameter is a {type(tensor).__name__}"
        elif tensor is not None and (tensor.dtype != dtype or not tensor.is_cpu):
            yield f"a parameter is {tensor.dtype} on {tensor.device}, x is {dtype}"
    if named:
        return
    if dtype == torch.bfloat16 and not _HAS_BFLOAT16_PRODUCTS:
        yield "the library's bfloat16 products are faster on a CPU without AVX-512 BF16"
    # Not asked of a graph that is traced: it would be a guard on the batch size.
    if not torch.compiler.is_dynamo_compiling() and x.numel() < CPP_MIN_ROWS * x.shape[-1]:
        yield f"fewer than {CPP_MIN_ROWS} rows do not repay the packing of the weight"
    for weight in weights:
        if weight.shape[0] < CPP_MIN_COLUMNS:
            yield f"fewer than {CPP_MIN_COLUMNS} columns leave the vectors empty"


LINEAR = Operator(
    "linear",
    (
        Implementation("cpp", _run_linear_cpp, _cpp_reasons, validates=True),
        Implementation(REFERENCE, _run_linear_reference, validates=True),
    ),
    _check_linear,
)
MLP = Operator(
    "mlp",
    (
        Implementation("cpp", _run_mlp_cpp, _cpp_reasons, validates=True),
        Implementation(REFERENCE, _run_mlp_reference, validates=True),
    ),
    _check_mlp,
)


# --- For operators with linear layers in them -----------------------------------------------------------------------


def cast_like(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters in x's dtype, as a plain convolution or linear layer wants them; autocast sees to that by itself."""
    for tensor in parameters:
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError("parameters: expected floating tensors")
    if not isinstance(x, Tensor):  # a proxy of torch.fx
        return list(parameters)
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return list(parameters)
    return [tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(x.dtype) for tensor in parameters]


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer gives for x."""
    device = x.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer within another operator, with parameters of any floating dtype, by whichever product is faster."""
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        weight, bias = cast_like(x, weight, bias)
    call = Linear(x, weight, bias)
    if _PAYS_OFF and (backends.REQUESTED is None or "cpp" in backends.REQUESTED):
        for _ in _cpp_reasons(call, False):
            break
        else:
            return _run_linear_cpp(call)
    return _run_linear_reference(call)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = AUTO,
) -> Tensor:
    """activation(x weight^T + bias).

    Args:
        x: (..., K), floating.
        weight: (N, K), dtype and device of x (under autocast dtypes may differ).
        bias: (N,), likewise.
        activation: None, "gelu" (erf), "quick_gelu", "silu" or "relu".
        backend: "auto", "cpp" or "reference".

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or activation that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    The plain form is ``fastvit.reference.functional.linear``.
    """
    return LINEAR(Linear(x, weight, bias, activation), backend)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None = "gelu",
    backend: str = AUTO,
) -> Tensor:
    """activation(x fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias.

    Args:
        x: (..., K), floating.
        fc1_weight, fc2_weight: (M, K) and (N, M), dtype and device of x (under autocast dtypes may differ).
        fc1_bias, fc2_bias: (M,) and (N,), likewise.
        activation: as for :func:`linear`.
        backend: "auto", "cpp" or "reference".

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or activation that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Dosovitskiy et al. 2021 (ViT), section 3.1. The plain form is ``fastvit.reference.functional.mlp``.
    """
    return MLP(Mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation), backend)

"""What linear layers and MLPs share: the checks, the low-level operator's schema, autograd, and who computes them.

- ``cpp``: ``csrc/cpu/linear*``, float32 and bfloat16, gradients too; :func:`pays_off` says where it is chosen.
- ``reference``: ``torch.nn.functional.linear``, the library's product, and the activation behind it.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvit import backends
from fastvit.ops._checks import describe
from fastvit.ops._dispatch import Implementation, gradients_needed
from fastvit.reference import functional

__all__ = ["IMPLEMENTATIONS", "NAMED_IMPLEMENTATIONS", "Call", "check_input", "check_layer", "chooses_cpp", "pays_off"]

ACTIVATION_CODES = {None: 0, "gelu": 1, "quick_gelu": 2, "silu": 3, "relu": 4}  # csrc's enum Activation
CPP_DTYPES = (torch.float32, torch.bfloat16)
CPP_MIN_ROWS = 16
CPP_MIN_COLUMNS = 16

torch.library.define(
    "fastvit::linear",
    "(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastvit::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class Layer(NamedTuple):
    """One linear layer."""

    weight: Tensor
    bias: Tensor | None


class Call(NamedTuple):
    """Linear layers one behind the other, with one activation behind the first of them."""

    x: Tensor
    layers: tuple[Layer, ...]
    activation: str | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.x, *(tensor for layer in self.layers for tensor in layer))


class _Linear(torch.autograd.Function):
    """A linear layer whose gradients are products of the same kind: of columns that lie side by side, or of rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return torch.ops.fastvit.linear.default(_as_rows(x), weight, bias, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.fastvit.linear.default(_as_rows(grad), weight.t(), None, 0)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            rows = grad.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                columns = _as_rows(x).flatten(0, -2).t()
                of_weight = torch.ops.fastvit.linear.default(rows.t().contiguous(), columns, None, 0)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def _as_rows(x: Tensor) -> Tensor:
    """x, copied unless its leading axes can be seen as one and the last is contiguous."""
    return x if x.is_contiguous() else x.contiguous()


def _run_layer(x: Tensor, layer: Layer, activation: str | None) -> Tensor:
    if not gradients_needed(x, *layer):
        return torch.ops.fastvit.linear.default(_as_rows(x), *layer, ACTIVATION_CODES[activation])
    x = x[None] if x.dim() == 1 else x
    return functional.activate(_Linear.apply(x, *layer), activation)


def _run_cpp(call: Call) -> Tensor:
    one_row = call.x.dim() == 1
    x = call.x[None] if one_row else call.x
    for i, layer in enumerate(call.layers):
        x = _run_layer(x, layer, call.activation if i == 0 else None)
    return x[0] if one_row else x


def _cpp_reasons(call: Call) -> list[str]:
    x = call.x
    if x.device.type != "cpu":
        return [*backends.cpp_reasons(), f"it takes tensors on the CPU, x is on {x.device}"]
    reasons = backends.cpp_reasons()
    if x.dtype not in CPP_DTYPES:
        reasons.append(f"dtype {x.dtype} is not one of float32, bfloat16")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on, whose cast weights the library keeps")
    for layer in call.layers:
        if layer.weight.dtype != x.dtype or is_traceable_wrapper_subclass(layer.weight):
            reasons.append(f"a weight is a {type(layer.weight).__name__} of {layer.weight.dtype}, x is {x.dtype}")
        elif layer.weight.stride(1) != 1:
            reasons.append("a weight is not contiguous along its last axis")
        if layer.bias is not None and (layer.bias.dtype != x.dtype or is_traceable_wrapper_subclass(layer.bias)):
            reasons.append(f"a bias is a {type(layer.bias).__name__} of {layer.bias.dtype}, x is {x.dtype}")
    return reasons


def _run_reference(call: Call) -> Tensor:
    x = functional.linear(call.x, *call.layers[0], call.activation)
    for layer in call.layers[1:]:
        x = functional.linear(x, *layer)
    return x


def _no_reasons(call: Call) -> list[str]:
    return []


# Found out at import, since a graph that is being traced cannot ask.
_CPU = {} if backends.cpp_reasons() else importlib.import_module("fastvit._C").cpu_info()
_MKL_ON_AMD = torch.backends.mkl.is_available() and _CPU.get("vendor") == "amd"
_HAS_BFLOAT16_PRODUCTS = _CPU.get("in_use") == "avx512_bf16"


def pays_off() -> bool:
    """Whether products of the C++ kernel are faster than the library's on this machine, where they are not small.

    They are where the library's float32 product does not use what the CPU has: MKL does not on AMD's. There the C++
    kernel takes 0.4 to 0.75 times its time, and 0.7 to 1.0 times oneDNN's in bfloat16
    (``benchmarks/ops/linear.py``). Elsewhere neither has been measured, and the library is left to it.
    """
    return _MKL_ON_AMD and _CPU["in_use"] in ("avx512", "avx512_bf16")


def _has_bfloat16_products() -> bool:
    return _HAS_BFLOAT16_PRODUCTS


def _reasons_not_to_choose_cpp(call: Call) -> list[str]:
    x = call.x
    if x.device.type != "cpu" or not pays_off():
        return [*_cpp_reasons(call), "the library's products are taken to be as fast on this machine"]
    reasons = _cpp_reasons(call)
    if x.dtype == torch.bfloat16 and not _has_bfloat16_products():
        reasons.append("the library's bfloat16 products are faster on a CPU without AVX-512 BF16")
    # Not asked of a graph that is traced: it would be a guard on the batch size.
    if not torch.compiler.is_compiling() and x.numel() < CPP_MIN_ROWS * x.shape[-1]:
        reasons.append(f"fewer than {CPP_MIN_ROWS} rows do not repay the packing of the weight")
    if any(layer.weight.shape[0] < CPP_MIN_COLUMNS for layer in call.layers):
        reasons.append(f"fewer than {CPP_MIN_COLUMNS} columns leave the vectors empty")
    return reasons


def chooses_cpp(x: Tensor, weight: Tensor) -> bool:
    """Whether a product that the C++ kernel takes is left to it; as :data:`IMPLEMENTATIONS` has it, only sooner."""
    return (
        pays_off()
        and (x.dtype != torch.bfloat16 or _has_bfloat16_products())
        and x.numel() >= CPP_MIN_ROWS * x.shape[-1]
        and weight.shape[0] >= CPP_MIN_COLUMNS
    )


_REFERENCE = Implementation("reference", _no_reasons, _run_reference)

IMPLEMENTATIONS = (Implementation("cpp", _reasons_not_to_choose_cpp, _run_cpp), _REFERENCE)
"""In order of preference."""

NAMED_IMPLEMENTATIONS = (Implementation("cpp", _cpp_reasons, _run_cpp), _REFERENCE)
"""For a backend asked for by name, which runs where it can."""


def check_layer(names: tuple[str, str], weight: Tensor, bias: Tensor | None, x: Tensor, depth: int) -> Layer:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != depth:
        raise ValueError(f"{names[0]}: got {describe(weight)}, accepted is (N, {depth}) beside x {describe(x)}")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        raise ValueError(f"{names[1]}: got {describe(bias)}, accepted is ({weight.shape[0]},) or None")
    for name, tensor in zip(names, (weight, bias), strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: got {describe(tensor)}, x is on {x.device}")
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name}: got {describe(tensor)}, x is {x.dtype}")
    return Layer(weight, bias)


def check_input(x: Tensor, activation: str | None) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x: got {describe(x)}, accepted is a floating tensor (..., K)")
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"activation: got {activation!r}, accepted are {sorted(map(str, ACTIVATION_CODES))}")

"""Convolution of an image, BatchNorm and activation: stems, patch embeddings, spatial reductions.

- ``cpp``: ``csrc/conv_batch_norm``, the product of ``linear`` on the windows of the image, which are read where they
  lie, with a packed weight and the norm behind; inference. Its result lies as tokens do.
- ``channels_last``: the library's convolution in channels-last layout, the norm (by running statistics) folded into its
  weight; inference on the CPU.
- ``reference``: ``fastvit.reference.functional.conv_batch_norm``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastvit import autotune, backends
from fastvit.ops._checks import INTS, LARGEST, check_activation, check_batch_norm, check_parameter, fail, out_size
from fastvit.ops._operator import (
    AUTO,
    REFERENCE,
    Implementation,
    Operator,
    any_autocast,
    gradients_needed,
    is_dynamo_compiling,
    is_grad_enabled,
)
from fastvit.ops._packing import pack, packed
from fastvit.ops._schema import ACTIVATION_CODES, NO_NORM, define, norm_arguments
from fastvit.ops.linear import CPP_DTYPES, HAS_VECTORS, packed_in_graph
from fastvit.reference import functional
from fastvit.reference.functional import ACTIVATIONS, BatchNorm

__all__ = ["conv_batch_norm"]

_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


class Call(NamedTuple):
    """The arguments of the public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    activation: str | None


def _pair(value: int | tuple[int, int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _check_pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, ...]:
    pair = _pair(value)
    for each in pair:
        if len(pair) != 2 or not isinstance(each, INTS) or isinstance(each, bool) or not least <= each <= LARGEST:
            fail(name, f"an int from {least} to {LARGEST}, or two", value)
    return pair


def _check(call: Call) -> None:
    x, weight = call.x, call.weight
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        fail("x", "a floating tensor (B, C, H, W)", x)
    shaped = isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[1] == x.shape[1]
    if not shaped or not weight.is_floating_point():
        fail("weight", f"a floating tensor (O, {x.shape[1]}, k, l)", weight)
    if weight.device != x.device:
        fail("weight", f"a tensor on {x.device}", weight)
    check_parameter("bias", call.bias, (weight.shape[0],), x)
    check_batch_norm("norm", call.norm, weight.shape[0], x)
    _check_pair("stride", call.stride, 1)
    padding, sizes, kernel = _check_pair("padding", call.padding, 0), tuple(x.shape[2:]), tuple(weight.shape[2:])
    if sizes[0] + 2 * padding[0] < kernel[0] or sizes[1] + 2 * padding[1] < kernel[1]:
        fail("padding", f"enough for a kernel of {kernel} to fit the padded {sizes}", call.padding)
    check_activation("activation", call.activation)


# --- The product with windows -----------------------------------------------------------------------------------------

_SIZES = ", ".join(f"int {name}_{side}" for name in ("kernel", "stride", "padding") for side in ("height", "width"))
_BEHIND = f"{norm_arguments('norm')}, int activation"


def _fake(a: Any) -> Tensor:
    sides = zip(
        a.x.shape[2:],
        (a.kernel_height, a.kernel_width),
        (a.stride_height, a.stride_width),
        (a.padding_height, a.padding_width),
        strict=True,
    )
    outputs, (rows, columns) = a.weight.shape[0], (out_size(*side) for side in sides)
    strides = (rows * columns * outputs, 1, columns * outputs, outputs)
    return a.x.new_empty_strided((a.x.shape[0], outputs, rows, columns), strides)


_PACKED = define(
    "packed_conv_batch_norm",
    f"Tensor x, Tensor weight, Tensor? bias, Tensor? packed, {_SIZES}, bool channels_last, {_BEHIND}",
    "Tensor",
    _fake,
)
_packed_convolution = _PACKED.eager
# For the graphs of torch.compile, which cannot hold a packed weight.
_convolution = define("conv_batch_norm", f"Tensor x, Tensor weight, Tensor? bias, {_SIZES}, {_BEHIND}", "Tensor", _fake)
_ACTIVATIONS = list(ACTIVATION_CODES)
_FOUR_INTS = [int] * 4


@torch.library.impl("fastvit::conv_batch_norm", "cpu")
def _run_compiled(*arguments: Any) -> Tensor:
    a = _convolution.Arguments(*arguments)
    norm = BatchNorm(a.norm_mean, a.norm_var, a.norm_weight, a.norm_bias, eps=a.norm_eps)
    stride, padding = (a.stride_height, a.stride_width), (a.padding_height, a.padding_width)
    activation = _ACTIVATIONS[a.activation]
    return _run_cpp(Call(a.x, a.weight, a.bias, None if a.norm_mean is None else norm, stride, padding, activation))


def _run_cpp(call: Call, traced: bool = False) -> Tensor:
    """By the kernel, with the weight packed in the order in which a window's elements lie in x."""
    x, weight, bias, norm, stride, padding, activation = call
    sizes: Any = (*(stride if type(stride) is tuple else (stride, stride)),)
    sizes += padding if type(padding) is tuple else (padding, padding)
    if list(map(type, sizes)) != _FOUR_INTS or (norm is not None and norm.running_mean is None):
        _check(call)  # torch takes True for a number; lists are pairs, too
        sizes = _pair(stride) + _pair(padding)
    mean, var, factor, shift, eps = NO_NORM[:4] + NO_NORM[6:7] if norm is None else norm[:4] + norm[6:7]
    behind = (factor, shift, mean, var, eps, ACTIVATION_CODES[activation])
    if torch.compiler._is_exporting_flag:
        layer, windows = packed_in_graph(weight.flatten(1), bias), (*weight.shape[2:], *sizes)
        return _PACKED.call(x, *layer, *windows, False, *behind)
    if traced:
        return _convolution.call(x, weight, bias, *weight.shape[2:], *sizes, *behind)
    channels_last = x.stride(1) == 1 and x.stride(3) == x.shape[1]
    # as_matrix, written out: tests/patching/test_blocks.py counts the Python calls of a block.
    matrix = weight.view(weight.shape[0], weight.shape[1:].numel()) if weight.is_contiguous() else weight.flatten(1)
    if channels_last:
        kept = packed(matrix, "windows", make=lambda matrix: pack(_by_pixels(matrix.view_as(weight))))
        matrix = _by_pixels(weight) if kept is None else matrix
    else:
        kept = packed(matrix)
    return _packed_convolution(x, matrix, bias, kept, *weight.shape[2:], *sizes, channels_last, *behind)


def _by_pixels(weight: Tensor) -> Tensor:
    """(O, C, k, l) as (O, k * l * C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


# --- Implementations --------------------------------------------------------------------------------------------------


def _reasons(
    name: str, missing: Sequence[str], dtypes: Sequence[torch.dtype], call: Call, named: bool
) -> Iterator[str]:
    """Against our own product ("cpp") or the library's convolution with the norm folded in ("channels_last").

    Args:
        missing: why it cannot run here at all.
        dtypes: those it takes.
    """
    yield from missing
    x, weight, bias, norm = call[:4]
    if not x.is_cpu:
        yield f"it has been measured on the CPU only, x is on {x.device}"
    if x.dtype not in dtypes:
        yield f"dtype {x.dtype} is not one of {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    if any_autocast() and torch.is_autocast_enabled("cpu"):
        yield "autocast is on, whose cast weights the library keeps"
    if norm is not None and norm.layer is not None:
        yield f"the norm is a {type(norm.layer).__name__}, which has to be called"
    if norm is not None and norm.use_batch_stats:
        yield "the norm uses batch statistics"
    if is_grad_enabled() and gradients_needed(x, weight, bias, *(norm or ())[:4]):
        yield "gradients are needed"
    if name == "cpp":
        if x.shape[1] == 0:
            yield "x has no channels, where torch gives no outputs"
        if type(weight) not in _PLAIN and not torch.compiler._is_exporting_flag:
            yield f"the weight is a {type(weight).__name__}"
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            yield "weight or bias have another dtype than x"
    if named or is_dynamo_compiling() or x.dim() != 4 or not x.numel():
        return
    # What the times depend on; within a bucket of images they are taken to be in proportion.
    batch, _, height, width = x.shape
    sizes = (batch > 1, (height * width).bit_length(), x.stride(1) == 1, *weight.shape, f"{call.stride} {call.padding}")
    key = (*sizes, norm is not None, call.activation, x.dtype, torch.get_num_threads())
    faster = _FASTER.get(key) or _measure(call, key)
    if faster != name:
        yield f"{'the library' if faster == REFERENCE else faster} is faster on this machine"


_FASTER: dict[tuple[Any, ...], str] = {}
"""The fastest implementation, by what the times depend on."""
MEASURED_BATCH = 2
"""At most."""


def _measure(call: Call, key: tuple[Any, ...]) -> str:
    """The fastest implementation for calls like this one, by :mod:`fastvit.autotune`."""
    twin = call._replace(x=torch.ones_like(call.x[:MEASURED_BATCH]))
    runs = {
        (each.name,): each.run
        for each in OPERATOR.implementations
        if each.reasons is None or not any(each.reasons(twin, True))
    }
    # What is first is taken where nothing is measured.
    names = sorted(runs, key=lambda name: name == ("cpp",) and not HAS_VECTORS)

    def run(name: tuple[str]) -> Tensor:
        return runs[name](twin).contiguous(memory_format=torch.channels_last)  # as tokens lie, which read it

    hollow = type(call.x) not in _PLAIN  # a tensor without contents, which takes no time
    with _disable_current_modes(), autotune.unmeasured() if hollow else contextlib.nullcontext():
        (found,) = autotune.choose("convolutions", key, names, run, on_cpu=True)
    if not hollow:
        _FASTER[key] = found
    return found


def _refuse(call: Call) -> None:
    """Raise for what torch would broadcast, convert or, on meta, take for another; it takes True and [0] for a size."""
    x, weight, bias, norm, stride, padding, _ = call
    shape, device = weight.shape[:1], x.device
    for vector in (bias, *(norm or ())[:4]):
        if vector is not None and (vector.shape != shape or vector.device != device or not vector.is_floating_point()):
            raise ValueError("norm")
    if x.dim() != 4 or weight.device != device or not weight.is_floating_point():
        raise ValueError("x")
    if not (type(stride) is type(padding) is int and padding <= LARGEST):
        _check(call)


def _run_channels_last(call: Call) -> Tensor:
    _refuse(call)
    x, weight, bias, norm, stride, padding, activation = call
    x = x.contiguous(memory_format=torch.channels_last)
    if norm is None:
        return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding))
    assert norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if bias is not None:
        shift = shift + bias * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = (weight * factor.view(-1, 1, 1, 1)).to(x.dtype, memory_format=torch.channels_last)
    return ACTIVATIONS[activation](F.conv2d(x, weight, shift.to(x.dtype), stride, padding))


def _run_reference(call: Call) -> Tensor:
    x, weight, bias, norm, stride, padding, activation = call
    if not isinstance(x, torch.fx.Proxy):  # which has no shape
        _refuse(call)
        usual = type(norm) in (BatchNorm, type(None)) and activation in ACTIVATIONS
        if not usual or (norm is not None and (norm.running_mean is None) is not (norm.running_var is None)):
            _check(call)  # torch takes one statistic, and moves statistics before the activation is named
    return functional.conv_batch_norm(x, weight, bias, norm, stride=stride, padding=padding, activation=activation)


_cpp_reasons = partial(_reasons, "cpp", backends.cpp_reasons(), CPP_DTYPES)
_channels_last_reasons = partial(_reasons, "channels_last", (), _DTYPES)
OPERATOR = Operator(
    "conv_batch_norm",
    (
        Implementation("cpp", _run_cpp, _cpp_reasons, True, partial(_run_cpp, traced=True)),
        Implementation("channels_last", _run_channels_last, _channels_last_reasons, validates=True),
        Implementation(REFERENCE, _run_reference, validates=True),
    ),
    _check,
)


def conv_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    activation: str | None = None,
    backend: str = AUTO,
) -> Tensor:
    """activation(norm(conv(x) + bias)) of an image.

    Args:
        x: (B, C, H, W), floating, in any memory format.
        weight: (O, C, k, l), cross-correlation as in ``nn.Conv2d``; bias: (O,). On x's device.
        norm: BatchNorm over channels, or None.
        stride, padding: of the convolution, an int or (vertical, horizontal).
        activation: None, "gelu" (erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        backend: "auto", "cpp", "channels_last" or "reference".

    Returns:
        (B, O, H', W'); but for "reference" in channels-last memory format.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Yuan et al. 2021 (CeiT), section 3.1; the plain form is ``fastvit.reference.functional.conv_batch_norm``.
    """
    return OPERATOR(Call(x, weight, bias, norm, stride, padding, activation), backend)

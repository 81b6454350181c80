"""Depthwise convolution of tokens as they lie: the checks, and who computes it.

- ``cuda``: ``csrc/cuda/token_depthwise_conv.cu``.
- ``cpp``: ``csrc/cpu/token_depthwise_conv*.cpp``; float32 and bfloat16.
- ``triton``: ``kernels/token_depthwise_conv*.py``, for ROCm and for installations without the extension; where both it
  and ``cuda`` take a call at inference, the faster one by measuring.
- ``reference``: ``fastvit.reference.functional.token_depthwise_conv``.

The schemas that kernels implement, and autograd, are in ``_token_depthwise_conv_native.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops import _at_once
from fastvit.ops._convolution_checks import check_bias, check_depthwise, check_geometry, check_norm, check_x
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.ops._measured import fastest_first
from fastvit.ops._token_depthwise_conv_native import ACTIVATION_CODES, NATIVE, TRITON, Call, Operators, out_size, run
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm

__all__ = ["token_depthwise_conv"]

_NAME = "token_depthwise_conv"
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_MAX_KERNEL = 7
_CUDA_MAX_KERNEL = 13  # one output's window must fit into shared memory


def _check_activation(name: str, activation: str | None) -> None:
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"{name}: got {activation!r}, accepted are {list(ACTIVATION_CODES)}")


def _parameters(call: Call) -> list[Tensor]:
    """Every parameter tensor there is."""
    tensors = [call.weight, call.bias]
    for norm in (call.pre_norm, call.norm):
        if norm is not None:
            tensors += norm[:4]
    return [tensor for tensor in tensors if tensor is not None]


def _missing_kernel(device_type: str, reasons: list[str]) -> tuple[str, ...]:
    if reasons or backends.extension().has_op(_NAME, device_type):
        return tuple(reasons)
    return (f"fastvit._C has no {_NAME} for {device_type}",)


_CPP_REASONS = _missing_kernel("cpu", backends.cpp_reasons())
_CUDA_REASONS = _missing_kernel("cuda", backends.cuda_reasons())
_TRAINABLE = {
    device_type: all(backends.extension().has_op(_NAME + name, device_type) for name in ("_training", "_backward"))
    for device_type in ("cpu", "cuda")
}


def _values(call: Call, convolved: bool) -> int:
    """How many values of a channel a norm in front of or behind the convolution sees."""
    h, w = call.grid
    if convolved:
        h, w = (out_size(size, call.weight.shape[-1], call.stride, call.padding) for size in call.grid)
    return call.x.shape[0] * h * w


def _norm_reasons(norm: BatchNorm, values: int) -> list[str]:
    """What keeps any of the kernels from a norm over that many values per channel."""
    if norm.layer is not None:
        return [f"a norm is a {type(norm.layer).__name__}, of which only the layer itself knows what it does"]
    if gradients_needed(norm.running_mean, norm.running_var):
        return ["running statistics need gradients"]
    if norm.use_batch_stats and values < 2:
        return [f"batch statistics need more than one value per channel, here are {values}"]
    return []


def _kernel_reasons(call: Call, dtypes: tuple[torch.dtype, ...], trainable: bool) -> list[str]:
    """What keeps any of the kernels from a call; trainable: they have gradients and batch statistics."""
    x, parameters = call.x, _parameters(call)
    reasons = []
    if x.dtype not in dtypes:
        reasons.append(f"dtype {x.dtype} is not one of {', '.join(map(str, dtypes))}")
    for parameter in parameters:
        if parameter.dtype != x.dtype and parameter.dtype != torch.float32:
            reasons.append(f"a parameter has dtype {parameter.dtype}, it takes float32 and x's {x.dtype}")
            break
    trains = gradients_needed(x, *parameters)
    for norm, convolved in ((call.pre_norm, False), (call.norm, True)):
        if norm is not None:
            reasons += _norm_reasons(norm, _values(call, convolved))
            trains = trains or norm.use_batch_stats
    if trains and not trainable:
        reasons.append("gradients or batch statistics are needed and it has none")
    return reasons


def _cpp_reasons(call: Call) -> list[str]:
    reasons = list(_CPP_REASONS)
    if call.x.device.type != "cpu":
        reasons.append(f"the C++ kernels take tensors on the CPU, not on {call.x.device.type}")
    return reasons + _kernel_reasons(call, _CPU_DTYPES, _TRAINABLE["cpu"])


def _cuda_reasons(call: Call) -> list[str]:
    if call.x.device.type != "cuda":
        return [f"the CUDA kernels take tensors on a CUDA device, not on {call.x.device.type}"]
    reasons = list(_CUDA_REASONS) or backends.cuda_reasons(call.x.device)
    if call.weight.shape[-1] > _CUDA_MAX_KERNEL:
        reasons.append(f"kernel size {call.weight.shape[-1]} is larger than {_CUDA_MAX_KERNEL}")
    return reasons + _kernel_reasons(call, _CUDA_DTYPES, _TRAINABLE["cuda"])


def _autocast_dtype(call: Call) -> torch.dtype:
    """The dtype of the plain result: autocast lowers the convolution, adding or joining x raises it again."""
    device, dtype = call.x.device.type, call.x.dtype
    if not torch.is_autocast_enabled(device):
        return dtype
    lowered = torch.get_autocast_dtype(device)
    return torch.promote_types(dtype, lowered) if call.prefix_tokens or call.residual else lowered


def _triton_reasons(call: Call) -> list[str]:
    reasons = list(backends.triton_reasons(call.x.device))
    if call.weight.shape[-1] > _TRITON_MAX_KERNEL:
        reasons.append(f"kernel size {call.weight.shape[-1]} is larger than {_TRITON_MAX_KERNEL}")
    return reasons + _kernel_reasons(call, _CUDA_DTYPES, trainable=True)


def _train_at_once(*arguments: Any) -> Tensor:
    """A call on the CPU with gradients or batch statistics; raises where it needs the long way, before any running
    statistics have moved. The operators check the rest.
    """
    call = Call(*arguments)
    if call.padding is None:
        call = call._replace(padding=call.weight.shape[3] // 2)
    _at_once.require_cpu(call.weight, call.bias)
    for name, norm, convolved in (("pre_norm", call.pre_norm, False), ("norm", call.norm, True)):
        if norm is not None:
            check_norm(name, norm, call.x.shape[2], call.x)
            if _norm_reasons(norm, _values(call, convolved)):
                raise _at_once.NotAtOnceError
    return run(call, NATIVE, gradients_needed(call.x, *_parameters(call)))


def _run_by(operators: Operators, call: Call) -> Tensor:
    out = run(call, operators, gradients_needed(call.x, *_parameters(call)))
    dtype = _autocast_dtype(call)
    return out if dtype == out.dtype else out.to(dtype)


def _run_native(call: Call) -> Tensor:
    return _run_by(NATIVE, call)


def _run_triton(call: Call) -> Tensor:
    return _run_by(TRITON, call)


def _reference_reasons(_: Call) -> list[str]:
    return []


def _run_reference(call: Call) -> Tensor:
    arguments = call._asdict()
    x, weight, bias = (arguments.pop(name) for name in ("x", "weight", "bias"))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return functional.token_depthwise_conv(x, weight, bias, **arguments)


IMPLEMENTATIONS = (
    Implementation("cuda", _cuda_reasons, _run_native),
    Implementation("cpp", _cpp_reasons, _run_native),
    Implementation("triton", _triton_reasons, _run_triton),
    Implementation("reference", _reference_reasons, _run_reference),
)
"""In order of preference."""


def token_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    prefix_tokens: int = 0,
    pre_norm: BatchNorm | None = None,
    pre_activation: str | None = None,
    norm: BatchNorm | None = None,
    activation: str | None = None,
    residual: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Depthwise k x k convolution of tokens laid out as (B, P + h*w, C), with what surrounds it in the models.

    t = pre_activation(pre_norm(x)) on the grid tokens; y = activation(norm(conv(t) + bias)); y += x with ``residual``.
    Prefix tokens pass through untouched. The tokens are never brought into image layout.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        weight: (C, 1, k, k), cross-correlation as in ``nn.Conv2d``; bias: (C,). On x's device.
        grid: (h, w). stride: of the convolution. padding: k // 2 zeros on each side by default (zeros of t, not of x).
        norm, pre_norm: BatchNorm over channels. activation, pre_activation: None, "gelu" (erf), "quick_gelu", "silu"
            or "relu".
        residual: adds the grid tokens of x; needs a convolution that keeps the grid size.
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        (B, P + h'*w', C), contiguous where a kernel ran, with h' = (h + 2 * padding - k) // stride + 1, likewise w'.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Chu et al. 2021 (CPVT), algorithm 1; Yuan et al. 2021 (CeiT), section 3.2; Wu et al. 2021 (CvT), 3.2; the
    plain form is ``fastvit.reference.functional.token_depthwise_conv``.
    """
    geometry, around = (grid, stride, padding, prefix_tokens), (pre_norm, pre_activation, norm, activation, residual)
    short = _train_at_once if torch.is_grad_enabled() else _at_once.convolution
    found = _at_once.tried(backend, short, x, weight, bias, *geometry, *around, trains=True)
    if found is not None:
        return found
    check_x(x)
    channels, kernel = x.shape[2], check_depthwise("weight", weight, x.shape[2], x)
    check_bias("bias", bias, channels, x)
    padding = kernel // 2 if padding is None else padding
    check_geometry(x, kernel, grid, stride, padding, prefix_tokens, residual)
    _check_activation("pre_activation", pre_activation)
    _check_activation("activation", activation)
    check_norm("pre_norm", pre_norm, channels, x)
    check_norm("norm", norm, channels, x)
    call = Call(
        x,
        weight,
        bias,
        grid,
        stride,
        padding,
        prefix_tokens,
        pre_norm,
        pre_activation,
        norm,
        activation,
        residual,
    )
    order = fastest_first(_NAME, IMPLEMENTATIONS, backend, x, call)
    return select(_NAME, order, backend, (call,), {}).run(call)

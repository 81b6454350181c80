"""CvT's projections: depthwise convolution of tokens, BatchNorm, linear layer; one of them, or q, k and v of one x.

- ``cpp``, ``cuda``, ``triton``: ``token_depthwise_conv`` by that backend with the norm in it, then a product, on GPUs
  the library's: by prediction (``benchmarks/gpu_model``) it takes a third of the time of a kernel that computes the
  convolution within the product. For q, k and v at inference ``cpp`` and ``cuda`` read x once
  (``csrc/conv_projection``).
- ``reference``: the functions of the same names in ``fastvit.reference.functional``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import (
    check_batch,
    check_batch_norm,
    check_depthwise,
    check_geometry,
    check_grid,
    check_linear,
    check_parameter,
    check_tokens,
    fail,
)
from fastvit.ops._operator import (
    AUTO,
    REFERENCE,
    Implementation,
    Operator,
    gradients_needed,
    is_dynamo_compiling,
    is_grad_enabled,
)
from fastvit.ops._schema import NO_NORM, define, norm_arguments
from fastvit.ops.linear import cast_like, multiply
from fastvit.ops.token_depthwise_conv import KERNELS, Convolution, convolved
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, Projection

__all__ = ["conv_projection", "depthwise_separable_conv"]


class Separable(NamedTuple):
    """A convolution with its norm, and the linear layer that follows; ``part`` prefixes their names in errors."""

    x: Tensor
    convolution: Convolution
    pw_weight: Tensor
    pw_bias: Tensor | None
    part: str = ""


class Projections(NamedTuple):
    """Those of q, k and v, of one x."""

    x: Tensor
    q: Separable
    k: Separable
    v: Separable


Projected = tuple[Tensor, Tensor, Tensor]


def _check_part(call: Separable) -> int:
    """The arguments; returns how many values a channel has in front of the norm."""
    x, c, part = call.x, call.convolution, call.part
    check_tokens(x)
    check_grid(x, c.grid, c.prefix_tokens)
    channels = x.shape[2]
    kernel = check_depthwise(f"{part}dw_weight", c.weight, channels, x)
    check_parameter(f"{part}dw_bias", c.bias, (channels,), x)
    check_batch_norm(f"{part}norm", c.norm, channels, x)
    outputs = check_linear(f"{part}pw_weight", call.pw_weight, channels, x)
    check_parameter(f"{part}pw_bias", call.pw_bias, (outputs,), x)
    rows, columns = check_geometry(c.grid, kernel, c.stride, c.padding, part)
    return x.shape[0] * rows * columns


def _check_separable(call: Separable) -> None:
    check_batch(f"{call.part}norm", call.convolution.norm, _check_part(call))


def _check_projections(call: Projections) -> None:
    parts = (call.q, call.k, call.v)
    for part, values in zip(parts, [_check_part(part) for part in parts], strict=True):
        check_batch(f"{part.part}norm", part.convolution.norm, values)


def _trains(call: Separable) -> bool:
    """Whether it needs gradients or statistics of the batch."""
    norm = call.convolution.norm
    if norm is not None and norm.use_batch_stats:
        return True
    return gradients_needed(*call.convolution.tensors(), call.pw_weight, call.pw_bias)


# --- Registered operators -------------------------------------------------------------------------------------------


def _part(name: str) -> str:
    tensors = f"Tensor {name}_weight, Tensor? {name}_bias"
    return f"{tensors}, {norm_arguments(f'{name}_norm')}, int {name}_stride, int {name}_padding"


class _Geometry(NamedTuple):
    height: int
    width: int
    stride: int
    padding: int
    prefix_tokens: int


def convolved_together(a: Any) -> tuple[Tensor, ...]:
    """Empty, of the sizes of the results of the convolutions; ``a``: the arguments of ``fastvit::conv_projection``."""
    outputs = []
    for name in "qkv":
        stride, padding = getattr(a, f"{name}_stride"), getattr(a, f"{name}_padding")
        geometry = _Geometry(a.height, a.width, stride, padding, a.prefix_tokens)
        outputs.append(convolved(a.x, getattr(a, f"{name}_weight"), geometry))
    return tuple(outputs)


_together = define(
    "conv_projection",
    f"Tensor x, {', '.join(map(_part, 'qkv'))}, SymInt height, SymInt width, int prefix_tokens",
    "(Tensor, Tensor, Tensor)",
    convolved_together,
)
_HAS_TOGETHER = {device: backends.extension().has_op("conv_projection", device) for device in ("cpu", "cuda")}


# --- Implementations ------------------------------------------------------------------------------------------------


def _by(kernels: Implementation) -> tuple[Implementation, Implementation]:
    """The two operators with the convolution computed so."""
    assert kernels.reasons is not None
    convolution_reasons = kernels.reasons

    def reasons(call: Separable, named: bool) -> Iterable[str]:
        return convolution_reasons(call.convolution, named)

    def run(call: Separable) -> Tensor:
        norm = call.convolution.norm
        if norm is not None and norm.use_batch_stats:
            _check_separable(call)  # before running statistics move
        return multiply(kernels.run(call.convolution), call.pw_weight, call.pw_bias)

    def reasons_together(call: Projections, named: bool) -> Iterator[str]:
        for part in (call.q, call.k, call.v):
            yield from convolution_reasons(part.convolution, named)

    def run_together(call: Projections) -> Projected:
        x, *parts = call
        together = kernels.name != "triton" and _HAS_TOGETHER["cpu" if x.is_cpu else "cuda"]
        for part in parts:
            norm = part.convolution.norm
            together = together and not (norm is not None and norm.use_batch_stats)
        if not together or (is_grad_enabled() and any(map(_trains, parts))):
            _check_projections(call)  # before running statistics move
            q, k, v = map(run, parts)
            return q, k, v
        q, k, v = _convolve_together(call)
        _, _, q_weight, q_bias, _ = call.q
        _, _, k_weight, k_bias, _ = call.k
        _, _, v_weight, v_bias, _ = call.v
        return multiply(q, q_weight, q_bias), multiply(k, k_weight, k_bias), multiply(v, v_weight, v_bias)

    return Implementation(kernels.name, run, reasons, kernels.validates), Implementation(
        kernels.name, run_together, reasons_together, kernels.validates
    )


def _convolve_together(call: Projections) -> Projected:
    arguments: list[Any] = []
    for part in call[1:]:
        _, weight, bias, (height, width), stride, padding, prefix_tokens, _, _, norm, _, _ = part.convolution
        mean, var, gamma, beta, _, _, eps, _, _ = norm or NO_NORM
        padding = weight.shape[3] // 2 if padding is None else padding
        if not type(height) is type(width) is type(prefix_tokens) is type(stride) is type(padding) is int:
            _check_projections(call)  # a schema takes True, and a tensor of one number
        arguments += (weight, bias, gamma, beta, mean, var, eps, stride, padding)
    together = _together.call if is_dynamo_compiling() else _together.eager
    return together(call.x, *arguments, height, width, prefix_tokens)


def _run_reference(call: Separable) -> Tensor:
    x, c = call.x, call.convolution
    dw_weight, dw_bias, pw_weight, pw_bias = cast_like(x, c.weight, c.bias, call.pw_weight, call.pw_bias)
    return functional.depthwise_separable_conv(
        x,
        dw_weight,
        c.norm,
        pw_weight,
        pw_bias,
        grid=c.grid,
        stride=c.stride,
        padding=c.padding,
        prefix_tokens=c.prefix_tokens,
        dw_bias=dw_bias,
    )


def _run_reference_together(call: Projections) -> Projected:
    _, *parts = call
    q, k, v = map(_run_reference, parts)
    return q, k, v


_SEPARABLE, _TOGETHER = zip(*map(_by, KERNELS), strict=True)
SEPARABLE = Operator(
    "depthwise_separable_conv", (*_SEPARABLE, Implementation(REFERENCE, _run_reference)), _check_separable
)
PROJECTION = Operator(
    "conv_projection", (*_TOGETHER, Implementation(REFERENCE, _run_reference_together)), _check_projections
)


def depthwise_separable_conv(
    x: Tensor,
    dw_weight: Tensor,
    norm: BatchNorm | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    prefix_tokens: int = 0,
    dw_bias: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Depthwise k x k convolution of tokens, BatchNorm, then a linear layer: one of CvT's projections.

    Prefix tokens skip the convolution and the norm, and join at the linear layer.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        dw_weight: (C, 1, k, k), dw_bias: (C,). pw_weight: (O, C), pw_bias: (O,). On x's device.
        norm: BatchNorm over channels, between the two, or None.
        grid: (h, w). stride: of the convolution. padding: k // 2 zeros on each side by default.
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        (B, P + h'*w', O) with h' = (h + 2 * padding - k) // stride + 1, likewise w'.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Wu et al. 2021 (CvT), section 3.2; the plain form is
    ``fastvit.reference.functional.depthwise_separable_conv``.
    """
    convolution = Convolution(x, dw_weight, dw_bias, grid, stride, padding, prefix_tokens, norm=norm)
    return SEPARABLE(Separable(x, convolution, pw_weight, pw_bias), backend)


def conv_projection(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 0,
    backend: str = AUTO,
) -> Projected:
    """CvT's queries, keys and values: three depthwise-separable convolutions of the same tokens.

    Prefix tokens skip the convolutions and the norms, and join at the linear layers.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        q, k, v: the parameters and the stride of each, as :func:`depthwise_separable_conv` takes them.
        grid: (h, w).
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        Queries, keys and values (B, P + h'*w', O), each of the size its own stride and weight give.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Wu et al. 2021 (CvT), section 3.2; the plain form is ``fastvit.reference.functional.conv_projection``.
    """
    parts = []
    for name, part in (("q.", q), ("k.", k), ("v.", v)):
        if not isinstance(part, Projection):
            fail(name[0], "a Projection", part)
        dw_weight, norm, pw_weight, pw_bias, stride, padding, dw_bias = part
        convolution = Convolution(x, dw_weight, dw_bias, grid, stride, padding, prefix_tokens, norm=norm)
        parts.append(Separable(x, convolution, pw_weight, pw_bias, name))
    return PROJECTION(Projections(x, *parts), backend)

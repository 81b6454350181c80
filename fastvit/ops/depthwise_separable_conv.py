"""Depthwise convolution, BatchNorm and a linear layer on tokens as they lie: the checks, and who computes it.

- ``cuda``, ``cpp``, ``triton``: ``token_depthwise_conv`` by that backend, the norm in it, then the library's product.
- ``triton`` at inference, with kernels up to 3 x 3: ``kernels/depthwise_separable_conv.py``, which never brings the
  convolution's result into memory.
- ``reference``: ``fastvit.reference.functional.depthwise_separable_conv``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastvit.ops import _at_once, _convolved_products
from fastvit.ops._composition import KERNELS, as_dtype_of, has_batch_statistics, linear, linear_dtype, parameters_of
from fastvit.ops._convolution_checks import (
    check_bias,
    check_depthwise,
    check_geometry,
    check_linear,
    check_norm,
    check_x,
)
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.ops._measured import fastest_first
from fastvit.ops._token_depthwise_conv_native import Call as Convolution
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm

__all__ = ["depthwise_separable_conv"]

_NAME = "depthwise_separable_conv"


class Call(NamedTuple):
    """The checked arguments of one call: the convolution with its norm, and the linear layer behind it."""

    convolution: Convolution
    pw_weight: Tensor
    pw_bias: Tensor | None


def checked(
    x: Tensor,
    dw_weight: Tensor,
    norm: BatchNorm | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    stride: int,
    padding: int | None,
    dw_bias: Tensor | None,
    grid: tuple[int, int],
    prefix_tokens: int,
    part: str = "",
) -> Call:
    """The call for these arguments; ValueError names what is not accepted, ``part`` in front of the name."""
    channels = x.shape[2]
    kernel = check_depthwise(f"{part}dw_weight", dw_weight, channels, x)
    check_bias(f"{part}dw_bias", dw_bias, channels, x)
    check_norm(f"{part}norm", norm, channels, x)
    check_bias(f"{part}pw_bias", pw_bias, check_linear(f"{part}pw_weight", pw_weight, channels, x), x)
    padding = kernel // 2 if padding is None else padding
    check_geometry(x, kernel, grid, stride, padding, prefix_tokens, part=part)
    convolution = Convolution(
        x, dw_weight, dw_bias, grid, stride, padding, prefix_tokens, None, None, norm, None, False
    )
    return Call(convolution, pw_weight, pw_bias)


def _joins(call: Call) -> bool:
    """Whether ``kernels/depthwise_separable_conv.py`` takes the call: it has no gradients and no batch statistics."""
    c = call.convolution
    if has_batch_statistics(c.norm) or gradients_needed(c.x, *parameters_of(*call[1:], c.weight, c.bias, c.norm)):
        return False
    return _convolved_products.separable_fits(c.x, c.weight, call.pw_weight, c.padding)


def _infer_joined(call: Call) -> Tensor:
    """In the dtype that the linear layer takes under autocast."""
    c = call.convolution
    dtype = linear_dtype(c.x)
    pointwise = (call.pw_weight.to(dtype), call.pw_bias)
    return _convolved_products.separable(
        c.x.to(dtype), (c.weight, c.bias, c.norm), pointwise, c.grid, c.stride, c.padding, c.prefix_tokens
    )


def _by(kernels: Implementation) -> Implementation:
    """The composition whose convolution is computed so."""

    def reasons(call: Call) -> list[str]:
        return kernels.reasons(call.convolution)

    def run(call: Call) -> Tensor:
        if kernels.name == "triton" and _joins(call):
            return _infer_joined(call)
        return linear(kernels.run(call.convolution), call.pw_weight, call.pw_bias)

    return Implementation(kernels.name, reasons, run)


def _convolve_at_once(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[tuple[int, int], int, int | None, int],
    norm: BatchNorm | None,
    pointwise: tuple[Tensor, Tensor | None],
) -> Tensor:
    tokens = _at_once.convolution(x, weight, bias, *geometry, None, None, norm, None, False)
    return _at_once.product(tokens, *pointwise)


def _run_reference(call: Call) -> Tensor:
    x, dw_weight, dw_bias, grid, stride, padding, prefix_tokens, _, _, norm, _, _ = call.convolution
    dw_weight, dw_bias, pw_weight, pw_bias = as_dtype_of(x, dw_weight, dw_bias, call.pw_weight, call.pw_bias)
    return functional.depthwise_separable_conv(
        x,
        dw_weight,
        norm,
        pw_weight,
        pw_bias,
        grid=grid,
        stride=stride,
        padding=padding,
        prefix_tokens=prefix_tokens,
        dw_bias=dw_bias,
    )


IMPLEMENTATIONS = (*map(_by, KERNELS), Implementation("reference", lambda call: [], _run_reference))
"""In order of preference."""


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
    backend: str = "auto",
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
    geometry, pointwise = (grid, stride, padding, prefix_tokens), (pw_weight, pw_bias)
    found = _at_once.tried(backend, _convolve_at_once, x, dw_weight, dw_bias, geometry, norm, pointwise)
    if found is not None:
        return found
    check_x(x)
    call = checked(x, dw_weight, norm, pw_weight, pw_bias, stride, padding, dw_bias, grid, prefix_tokens)
    return select(_NAME, fastest_first(_NAME, IMPLEMENTATIONS, backend, x, call), backend, (call,), {}).run(call)

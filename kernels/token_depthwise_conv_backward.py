"""Depthwise convolution of tokens in their own layout, backward. The forward is in ``token_depthwise_conv.py``, the
tiling in ``token_depthwise_conv_tiles.py``.

With n = (v - mean) / sqrt(var + eps), u = weight n + bias, y = activation(u), v being c or x, of M values per channel:

    d = dy activation'(u);  dbias = sum d;  dweight = sum d n
    dv = weight / sqrt(var + eps) * d                                          with given statistics
    dv = weight / sqrt(var + eps) * (d - sum(d) / M - n sum(d n) / M)          with those of the batch
    dconv_weight[tap] = sum dc * (t under the tap);  dconv_bias = sum dc;  dt = dc convolved transposed

- ``norm_activation_backward_kernel``: dv, elementwise.
- ``sums_kernel``: the sums of d and d (v - mean).
- ``weight_gradient_kernel``: the gradient of the convolution's weight and bias; a program takes one tap.

dt is computed by ``convolve_kernel`` of ``token_depthwise_conv.py``, transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import load_vector, with_small_row_strides
from fastvit.kernels.token_depthwise_conv import convolve, normalized
from fastvit.kernels.token_depthwise_conv_tiles import (
    NO_NORM,
    Config,
    Geometry,
    Norm,
    activation_gradient,
    as_tokens,
    choose_config,
    load_statistics,
    load_tokens,
    programs,
    sizes_of,
    split_reduction,
    store_sum,
    store_tokens,
    this_program,
    tile_at,
    tile_under_tap,
)
from torch import Tensor


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def norm_activation_backward_kernel(
    grad,
    v,
    residual,
    out,
    norm,
    constant,
    slope,
    tokens,
    num_rows,
    C,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = scale * (d - constant - (v - mean) * slope) [+ residual], d = grad * activation'(norm(v))."""
    first, block = this_program(C, CHANNELS)
    tile = tile_at(block * ROWS, first, num_rows, tokens, C, ROWS, CHANNELS)
    center, scale, shift = load_statistics(norm, first, C, CHANNELS)
    d, centred = activation_gradient(grad, v, tile, center, scale, shift, ACTIVATION)
    if slope is not None:
        d -= load_vector(constant, first, C, CHANNELS)[None, :]
        d -= centred * load_vector(slope, first, C, CHANNELS)[None, :]
    d *= scale[None, :]
    if residual is not None:
        d += load_tokens(residual, tile)
    store_tokens(out, tile, d)


@triton.jit(do_not_specialize=["tokens", "num_rows", "steps"])
def sums_kernel(
    grad,
    v,
    partials,
    norm,
    tokens,
    num_rows,
    steps,
    C,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over ``steps`` tiles of rows of d = grad * activation'(norm(v)) and of d * (v - mean); (programs, 2, C)."""
    first, split = this_program(C, CHANNELS)
    center, scale, shift = load_statistics(norm, first, C, CHANNELS)
    plain = tl.zeros([CHANNELS], tl.float32)
    weighted = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        tile = tile_at((split * steps + step) * ROWS, first, num_rows, tokens, C, ROWS, CHANNELS)
        d, centred = activation_gradient(grad, v, tile, center, scale, shift, ACTIVATION)
        plain += tl.sum(d, axis=0)
        weighted += tl.sum(d * centred, axis=0)
    place = partials + tl.cast(split, tl.int64) * 2 * C
    store_sum(place, first, C, plain)
    store_sum(place + C, first, C, weighted)


@triton.jit(do_not_specialize=["height", "width", "out_width", "tokens", "num_rows", "steps"])
def weight_gradient_kernel(
    t,
    dc,
    partials,
    height,
    width,
    out_width,
    tokens,
    num_rows,
    steps,
    C,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Over ``steps`` tiles of rows, one tap's sum of dc times t under the tap; after the last tap the sum of dc.

    partials is (programs, taps + 1, C).
    """
    taps: tl.constexpr = KERNEL * KERNEL
    first, program = this_program(C, CHANNELS)
    tap = program % (taps + 1)
    split = program // (taps + 1)
    total = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        tile = tile_at((split * steps + step) * ROWS, first, num_rows, tokens, C, ROWS, CHANNELS)
        d = load_tokens(dc, tile)
        if tap < taps:
            row, column = tile.token // out_width, tile.token % out_width
            dy, dx = tap // KERNEL, tap % KERNEL
            d *= load_tokens(t, tile_under_tap(tile, row, column, dy, dx, height, width, PADDING, STRIDE, False))
        total += tl.sum(d, axis=0)
    store_sum(partials + (tl.cast(split, tl.int64) * (taps + 1) + tap) * C, first, C, total)


Correction = tuple[Tensor | None, Tensor | None]
"""What batch statistics subtract from every value's gradient: per channel a constant, and a slope in v - mean."""


class NormGradients(NamedTuple):
    """The gradients of a norm's parameters, and the correction by its batch statistics."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    correction: Correction = (None, None)


def norm_activation_backward(
    grad: Tensor, v: Tensor, norm: Norm, correction: Correction, residual: Tensor | None, out: Tensor, config: Config
) -> None:
    """out = the gradient of v [+ residual], given ``grad``, that of activation(norm(v))."""
    norm_activation_backward_kernel[programs(v, config)](
        as_tokens(grad),
        as_tokens(v),
        as_tokens(residual),
        as_tokens(out),
        norm.statistics(),
        *correction,
        ACTIVATION=norm.activation,
        **sizes_of(v, config),
    )


def norm_gradients(grad: Tensor, v: Tensor, norm: Norm, batch: bool, wanted: bool, config: Config) -> NormGradients:
    """The gradients of a norm's parameters where ``wanted``, and with ``batch`` statistics their correction."""
    if norm.var is None or not (batch or wanted):
        return NormGradients()
    grid, steps, partials = split_reduction(v, 2, config)
    sums_kernel[grid](
        as_tokens(grad),
        as_tokens(v),
        partials,
        norm.statistics(),
        steps=steps,
        ACTIVATION=norm.activation,
        **sizes_of(v, config),
    )
    deviation = (norm.var.double() + norm.eps).sqrt()
    plain, weighted = partials.sum(0, dtype=torch.float64)
    weighted = weighted / deviation
    correction: Correction = (None, None)
    if batch:
        values = max(v.shape[0] * v.shape[1], 1)
        correction = (plain / values).float(), (weighted / (values * deviation)).float()
    return NormGradients(weighted.float(), plain.float(), correction)


def weight_gradients(t: Tensor, dc: Tensor, kernel: int, geometry: Geometry, config: Config) -> tuple[Tensor, Tensor]:
    """The gradients of the weight (C, 1, k, k) and of the bias (C,), float32."""
    rows, channels = kernel * kernel + 1, t.shape[2]
    grid, steps, partials = split_reduction(dc, rows, config, tasks=rows)
    (height, width), (_, out_width) = geometry.grids(kernel)
    weight_gradient_kernel[grid](
        as_tokens(t),
        as_tokens(dc),
        partials,
        height,
        width,
        out_width,
        steps=steps,
        KERNEL=kernel,
        STRIDE=geometry.stride,
        PADDING=geometry.padding,
        **sizes_of(dc, config),
    )
    sums = partials.sum(0, dtype=torch.float64).float()
    return sums[:-1].t().reshape(channels, 1, kernel, kernel).contiguous(), sums[-1].clone()


def _input_gradient(
    dc: Tensor,
    dout: Tensor,
    image: Tensor,
    a: Any,
    pre_norm: Norm,
    geometry: Geometry,
    dx: Tensor | None,
    config: Config,
) -> NormGradients:
    """Write dx of the grid tokens ``image`` unless it is None; return the gradients of the pre-norm."""
    residual = dout if geometry.residual else None
    if not pre_norm.exists():
        if dx is not None:
            convolve(dc, a.weight, None, NO_NORM, residual, None, dx, geometry, config, transposed=True)
        return NormGradients()
    if dx is None and not (a.parameter_grads and pre_norm.var is not None):
        return NormGradients()
    dt = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    convolve(dc, a.weight, None, NO_NORM, None, None, dt, geometry, config, transposed=True)
    gradients = norm_gradients(dt, image, pre_norm, a.pre_norm_batch, a.parameter_grads, config)
    if dx is not None:
        norm_activation_backward(dt, image, pre_norm, gradients.correction, residual, dx, config)
    return gradients


def token_depthwise_conv_backward(a: Any) -> tuple[Tensor, ...]:
    """The operator ``fastvit::token_depthwise_conv_triton_backward``."""
    grad, x, conv, weight, x_grad, parameter_grads = a.grad, a.x, a.conv, a.weight, a.x_grad, a.parameter_grads
    pre_norm, norm, geometry = Norm.of(a, "pre_"), Norm.of(a), Geometry.of(a)
    prefix, kernel = geometry.prefix_tokens, weight.shape[-1]
    config = choose_config(x.dtype, kernel)
    dx = torch.empty(x.shape if x_grad else (0,), dtype=x.dtype, device=x.device)
    dweight = dbias = None
    post = NormGradients()
    with torch.cuda.device_of(x):
        grad, x = with_small_row_strides(grad), with_small_row_strides(x)
        dout, image = grad[:, prefix:], x[:, prefix:]
        dc = dout
        if norm.exists():
            grid_conv = conv[:, prefix:]
            post = norm_gradients(dout, grid_conv, norm, a.norm_batch, parameter_grads, config)
            dc = torch.empty(dout.shape, dtype=x.dtype, device=x.device)
            norm_activation_backward(dout, grid_conv, norm, post.correction, None, dc, config)
        if parameter_grads:
            dweight, dbias = weight_gradients(normalized(image, pre_norm, config), dc, kernel, geometry, config)
            if a.norm_batch:  # batch statistics cancel any constant: the sum would be zero up to rounding
                dbias.zero_()
        grid_dx = dx[:, prefix:] if x_grad else None
        pre = _input_gradient(dc, dout, image, a, pre_norm, geometry, grid_dx, config)
        if x_grad:
            dx[:, :prefix] = grad[:, :prefix]

    def or_empty(parameter: Tensor | None, gradient: Tensor | None) -> Tensor:
        if parameter_grads and parameter is not None and gradient is not None:
            return gradient
        return torch.empty(0, dtype=torch.float32, device=x.device)

    return (
        dx,
        or_empty(weight, dweight),
        or_empty(a.bias, dbias),
        or_empty(pre_norm.weight, pre.weight),
        or_empty(pre_norm.bias, pre.bias),
        or_empty(norm.weight, post.weight),
        or_empty(norm.bias, post.bias),
    )

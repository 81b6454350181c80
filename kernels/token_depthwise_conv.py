"""Depthwise convolution of tokens (B, P + h*w, C) in their own layout, at inference.

    t = pre_activation(pre_norm(x)),  c = conv(t) + bias,  out = activation(norm(c)) [+ x]

Batch statistics are in ``token_depthwise_conv_training.py``, gradients in ``token_depthwise_conv_backward.py``. The
function at the end of each file implements the operator of its name. Kernels work on the grid tokens only; PyTorch
copies the prefix tokens.

- ``norm_activation_kernel``: activation(norm(v)) elementwise. The convolution's input is written to memory with it,
  since every tap would otherwise compute it again.
- ``convolve_kernel``: one shifted tile per tap; with TRANSPOSED, the gradient of the convolution's input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import load_vector, with_small_row_strides
from fastvit.kernels.token_depthwise_conv_tiles import (
    Config,
    Geometry,
    Norm,
    as_tokens,
    choose_config,
    load_tokens,
    programs,
    sizes_of,
    store_epilogue,
    store_tokens,
    this_program,
    tile_at,
    tile_under_tap,
)
from torch import Tensor


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def norm_activation_kernel(
    v, residual, out, norm, tokens, num_rows, C, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """out = activation(norm(v)) [+ residual]."""
    first, block = this_program(C, CHANNELS)
    tile = tile_at(block * ROWS, first, num_rows, tokens, C, ROWS, CHANNELS)
    store_epilogue(load_tokens(v, tile), norm, residual, out, tile, first, C, ACTIVATION, CHANNELS)


@triton.jit(do_not_specialize=["height", "width", "out_width", "tokens", "num_rows"])
def convolve_kernel(
    t,
    taps,
    bias,
    residual,
    conv,
    out,
    norm,
    height,
    width,
    out_width,
    tokens,
    num_rows,
    C,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = activation(norm(c)) [+ residual] and conv = c, each where it is not None; c = conv(t) + bias.

    height, width: of t's grid. out_width, tokens: of the result's. TRANSPOSED: the transposed convolution.
    """
    first, block = this_program(C, CHANNELS)
    tile = tile_at(block * ROWS, first, num_rows, tokens, C, ROWS, CHANNELS)
    row = tile.token // out_width
    column = tile.token % out_width
    acc = tl.zeros([ROWS, CHANNELS], tl.float32) + load_vector(bias, first, C, CHANNELS)[None, :]
    for dy in tl.static_range(KERNEL):
        for dx in tl.static_range(KERNEL):
            pointers = taps + tile.channels * (KERNEL * KERNEL) + (dy * KERNEL + dx)
            tap = tl.load(pointers, mask=tile.within, other=0).to(tl.float32)
            shifted = tile_under_tap(tile, row, column, dy, dx, height, width, PADDING, STRIDE, TRANSPOSED)
            acc += load_tokens(t, shifted) * tap[None, :]
    if conv is not None:
        store_tokens(conv, tile, acc)
    if out is not None:
        store_epilogue(acc, norm, residual, out, tile, first, C, ACTIVATION, CHANNELS)


def norm_activation(v: Tensor, norm: Norm, residual: Tensor | None, out: Tensor, config: Config) -> None:
    """out = activation(norm(v)) [+ residual]; all (B, N, C)."""
    norm_activation_kernel[programs(v, config)](
        as_tokens(v),
        as_tokens(residual),
        as_tokens(out),
        norm.statistics(),
        ACTIVATION=norm.activation,
        **sizes_of(v, config),
    )


def normalized(x: Tensor, norm: Norm, config: Config) -> Tensor:
    """activation(norm(x)) of grid tokens x; x itself where there is neither."""
    if not norm.exists():
        return x
    t = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_activation(x, norm, None, t, config)
    return t


def convolve(
    t: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    norm: Norm,
    residual: Tensor | None,
    conv: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
    config: Config,
    *,
    transposed: bool = False,
) -> None:
    """Launch :func:`convolve_kernel`; transposed: from the convolution's output grid to its input grid."""
    result = conv if out is None else out
    assert result is not None, "no result was asked for"
    kernel = taps.shape[-1]
    grids = geometry.grids(kernel)
    (height, width), (_, out_width) = grids[::-1] if transposed else grids
    convolve_kernel[programs(result, config)](
        as_tokens(t),
        taps,
        bias,
        as_tokens(residual),
        as_tokens(conv),
        as_tokens(out),
        norm.statistics(),
        height,
        width,
        out_width,
        ACTIVATION=norm.activation,
        KERNEL=kernel,
        STRIDE=geometry.stride,
        PADDING=geometry.padding,
        TRANSPOSED=transposed,
        **sizes_of(result, config),
    )


def token_depthwise_conv_forward(a: Any) -> Tensor:
    """The operator ``fastvit::token_depthwise_conv_triton``."""
    x, weight, pre_norm, norm, geometry = a.x, a.weight, Norm.of(a, "pre_"), Norm.of(a), Geometry.of(a)
    prefix, kernel = geometry.prefix_tokens, weight.shape[-1]
    config = choose_config(x.dtype, kernel)
    out = geometry.empty_result(x, kernel)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        x = with_small_row_strides(x)
        image = x[:, prefix:]
        residual = image if geometry.residual else None
        t = normalized(image, pre_norm, config)
        convolve(t, weight, a.bias, norm, residual, None, out[:, prefix:], geometry, config)
        out[:, :prefix] = x[:, :prefix]
    return out

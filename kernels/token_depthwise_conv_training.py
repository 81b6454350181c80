"""Depthwise convolution of tokens in their own layout, forward in training: batch statistics, and what backward needs.

The formula is that of ``token_depthwise_conv.py``, the tiling that of ``token_depthwise_conv_tiles.py``.
``statistics_kernel`` reduces a program's rows to a mean and a sum of squares about it, merged tile by tile (Chan et al.
1979), which avoids cancellation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import with_small_row_strides
from fastvit.kernels.token_depthwise_conv import convolve, norm_activation, normalized
from fastvit.kernels.token_depthwise_conv_tiles import (
    Config,
    Geometry,
    Norm,
    as_tokens,
    choose_config,
    load_tokens,
    sizes_of,
    split_reduction,
    store_sum,
    this_program,
    tile_at,
)
from torch import Tensor


@triton.jit(do_not_specialize=["tokens", "num_rows", "steps"])
def statistics_kernel(v, partials, tokens, num_rows, steps, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Per channel, over ``steps`` tiles of rows: count, mean, sum of squares about it; (programs, 3, C)."""
    first, split = this_program(C, CHANNELS)
    count = tl.zeros([CHANNELS], tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        tile = tile_at((split * steps + step) * ROWS, first, num_rows, tokens, C, ROWS, CHANNELS)
        value = load_tokens(v, tile)
        tile_count = tl.sum(tile.exists.to(tl.float32), axis=0)
        tile_mean = tl.sum(value, axis=0) / tl.maximum(tile_count, 1.0)
        inside = tile.exists[:, None] & tile.within[None, :]
        centred = tl.where(inside, value - tile_mean[None, :], 0.0)
        total = tl.maximum(count + tile_count, 1.0)
        difference = tile_mean - mean
        squares += tl.sum(centred * centred, axis=0) + difference * difference * count * (tile_count / total)
        mean += difference * (tile_count / total)
        count += tile_count
    place = partials + tl.cast(split, tl.int64) * 3 * C
    store_sum(place, first, C, count)
    store_sum(place + C, first, C, mean)
    store_sum(place + 2 * C, first, C, squares)


def channel_statistics(v: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of (B, N, C), float32."""
    grid, steps, partials = split_reduction(v, 3, config)
    statistics_kernel[grid](as_tokens(v), partials, steps=steps, **sizes_of(v, config))
    count, mean, squares = partials.double().unbind(1)
    values = v.shape[0] * v.shape[1]
    overall = (count * mean).sum(0) / values
    var = (squares + count * (mean - overall).square()).sum(0) / values
    return overall.float(), var.float()


def token_depthwise_conv_training(a: Any) -> tuple[Tensor, ...]:
    """The operator ``fastvit::token_depthwise_conv_triton_training``; conv is empty where nothing follows it."""
    x, weight, bias, pre_norm, norm, geometry = a.x, a.weight, a.bias, Norm.of(a, "pre_"), Norm.of(a), Geometry.of(a)
    prefix, kernel = geometry.prefix_tokens, weight.shape[-1]
    config = choose_config(x.dtype, kernel)
    out = geometry.empty_result(x, kernel)
    keeps_conv = norm.exists() or a.norm_batch
    conv = torch.empty_like(out) if keeps_conv else x.new_empty(0)
    pre_mean, pre_var, mean, var = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(4))
    with torch.cuda.device_of(x):
        x = with_small_row_strides(x)
        image, grid_out, grid_conv = x[:, prefix:], out[:, prefix:], conv[:, prefix:] if keeps_conv else None
        residual = image if geometry.residual else None
        if a.pre_norm_batch:
            pre_mean, pre_var = channel_statistics(image, config)
            pre_norm = pre_norm._replace(mean=pre_mean, var=pre_var)
        if out.numel() == 0:
            return out, conv, pre_mean, pre_var, mean, var
        t = normalized(image, pre_norm, config)
        if grid_conv is not None and a.norm_batch:
            # The norm takes the bias away again, but not a NaN or infinity; the results would lack its digits.
            convolve(t, weight, None, norm, None, grid_conv, None, geometry, config)
            mean, var = channel_statistics(grid_conv, config)
            if bias is not None:
                var = var + 0.0 * bias
            norm_activation(grid_conv, norm._replace(mean=mean, var=var), residual, grid_out, config)
        else:
            convolve(t, weight, bias, norm, residual, grid_conv, grid_out, geometry, config)
        out[:, :prefix] = x[:, :prefix]
    return out, conv, pre_mean, pre_var, mean, var

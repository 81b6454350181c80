"""Depthwise convolution of tokens as they lie, forward in training: with batch statistics, and what backward needs.

The formula and the tile plan are those of ``token_depthwise_conv.py`` and ``token_depthwise_conv_tiles.py``. ``statistics_kernel``
reduces a program's rows to a mean and the squares about it, tile by tile, so that no digits cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import with_near_rows
from fastvit.kernels.token_depthwise_conv import convolve, map_tokens, mapped
from fastvit.kernels.token_depthwise_conv_tiles import (
    Config,
    TrainingArguments,
    as_tokens,
    choose_config,
    divide,
    load_tokens,
    sizes_of,
    store_sum,
    this_program,
    tile_at,
)
from torch import Tensor


@triton.jit(do_not_specialize=["tokens", "num_rows", "steps"])
def statistics_kernel(v, partials, tokens, num_rows, steps, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of `steps` tiles of rows, per channel: how many, their mean, the squares about it. (programs, 3, C)."""
    first, split = this_program(C, CHANNELS)
    count = tl.zeros([CHANNELS], tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        tile = tile_at((split * steps + step) * ROWS, first, num_rows, tokens, C, ROWS, CHANNELS)
        value = load_tokens(v, tile)
        fresh = tl.sum(tile.exists.to(tl.float32), axis=0)
        fresh_mean = tl.sum(value, axis=0) / tl.maximum(fresh, 1.0)
        inside = tile.exists[:, None] & tile.within[None, :]
        away = tl.where(inside, value - fresh_mean[None, :], 0.0)
        both = tl.maximum(count + fresh, 1.0)
        difference = fresh_mean - mean
        squares += tl.sum(away * away, axis=0) + difference * difference * count * (fresh / both)
        mean += difference * (fresh / both)
        count += fresh
    place = partials + tl.cast(split, tl.int64) * 3 * C
    store_sum(place, first, C, count)
    store_sum(place + C, first, C, mean)
    store_sum(place + 2 * C, first, C, squares)


def channel_statistics(v: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of (B, N, C), float32."""
    grid, steps, partials = divide(v, 3, config)
    statistics_kernel[grid](as_tokens(v), partials, steps=steps, **sizes_of(v, config))
    count, mean, squares = partials.double().unbind(1)
    values = v.shape[0] * v.shape[1]
    overall = (count * mean).sum(0) / values
    var = (squares + count * (mean - overall).square()).sum(0) / values
    return overall.float(), var.float()


def token_depthwise_conv_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | float | int | bool | None
) -> tuple[Tensor, ...]:
    """The operator ``token_depthwise_conv_training``; keeps the convolution's result where something follows it."""
    pre_norm, pre_batch, norm, batch, geometry = TrainingArguments.of(rest)
    prefix, kernel = geometry.prefix_tokens, weight.shape[-1]
    config = choose_config(x.dtype, kernel)
    out = geometry.empty_result(x, kernel)
    keeps = norm.exists() or batch
    conv = torch.empty_like(out) if keeps else x.new_empty(0)
    pre_mean, pre_var, mean, var = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(4))
    with torch.cuda.device_of(x):
        near = with_near_rows(x)
        image, behind, kept = near[:, prefix:], out[:, prefix:], conv[:, prefix:] if keeps else None
        residual = image if geometry.residual else None
        if pre_batch:
            pre_mean, pre_var = channel_statistics(image, config)
            pre_norm = pre_norm._replace(mean=pre_mean, var=pre_var)
        if out.numel() == 0:
            return out, conv, pre_mean, pre_var, mean, var
        t = mapped(image, pre_norm, config)
        if kept is not None and batch:
            convolve(t, weight, bias, norm, None, kept, None, geometry, config)
            mean, var = channel_statistics(kept, config)
            map_tokens(kept, norm._replace(mean=mean, var=var), residual, behind, config)
        else:
            convolve(t, weight, bias, norm, residual, kept, behind, geometry, config)
        out[:, :prefix] = near[:, :prefix]
    return out, conv, pre_mean, pre_var, mean, var

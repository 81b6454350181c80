"""Depthwise convolution of tokens as they lie (B, P + h*w, C), forward, statistics and backward.

    t = pre_activation(pre_norm(x)),  c = conv(t) + bias,  out = activation(norm(c)) [+ x]

The three functions at the end take the arguments of the operators in ``fastvit/ops/_token_depthwise_conv_native.py``,
and give what those give. They see the grid tokens alone; prefix tokens are copied by PyTorch.

Tile plan: a program works on ROWS tokens (of all images in a row) times CHANNELS channels, as a tile in registers, with
16-byte accesses along the channels; programs of neighbouring tokens are neighbours, so what a window shares with the
next comes from the cache.

- ``map_kernel``, ``map_backward_kernel``: activation(norm(v)) and its way back, element by element.
- ``convolve_kernel``: one shifted tile per tap; with TRANSPOSED the gradient of the convolution's input.
- ``weight_gradient_kernel``: a program has one tap, and adds up the products of t and dc over its rows.
- ``statistics_kernel``, ``sums_kernel``: reduce a program's rows to one result per channel.

Reductions have two stages in a fixed order: a program's partial result, and PyTorch's sum of those in float64.
Everything is computed in float32. What stands in front of the convolution is written to memory once, since every tap
would have to compute it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import activate, derivative, load_norm, load_vector, place_rows, with_near_rows
from torch import Tensor

MAX_KERNEL = 7


class Config(NamedTuple):
    """How launches are cut: the tile's sides and warps, and of reductions how many programs there are at most."""

    rows: int
    channels: int
    num_warps: int
    programs: int = 1024


HALF, LARGE_HALF, FLOAT = Config(32, 64, 4), Config(16, 64, 4), Config(32, 32, 4)
"""float16 and bfloat16, the same with many taps, float32. Every kernel fits every chip without spills so."""


def choose_config(dtype: torch.dtype, kernel: int) -> Config:
    """The configuration for tensors of a dtype and a kernel size."""
    if dtype == torch.float32:
        return FLOAT
    return LARGE_HALF if kernel > 5 else HALF


# --- Element by element ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def map_kernel(
    v,
    residual,
    out,
    mean,
    var,
    weight,
    bias,
    eps,
    stride_vb,
    stride_vn,
    stride_rb,
    stride_rn,
    stride_ob,
    stride_on,
    tokens,
    num_rows,
    C,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = activation(norm(v)) [+ residual]."""
    blocks = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    first = (program % blocks) * CHANNELS
    image, images, token, exists = place_rows((program // blocks) * ROWS, num_rows, tokens, ROWS)
    channels = first + tl.arange(0, CHANNELS)
    inside = exists[:, None] & (channels < C)[None, :]
    center, scale, shift = load_norm(mean, var, weight, bias, eps, first, C, CHANNELS)
    place = (images * stride_vb + token * stride_vn)[:, None] + channels[None, :]
    value = tl.load(v + image * stride_vb + place, mask=inside, other=0).to(tl.float32)
    value = activate((value - center[None, :]) * scale[None, :] + shift[None, :], ACTIVATION)
    if residual is not None:
        place = (images * stride_rb + token * stride_rn)[:, None] + channels[None, :]
        value += tl.load(residual + image * stride_rb + place, mask=inside, other=0).to(tl.float32)
    place = (images * stride_ob + token * stride_on)[:, None] + channels[None, :]
    tl.store(out + image * stride_ob + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def map_backward_kernel(
    grad,
    v,
    residual,
    out,
    mean,
    var,
    weight,
    bias,
    constant,
    slope,
    eps,
    stride_gb,
    stride_gn,
    stride_vb,
    stride_vn,
    stride_rb,
    stride_rn,
    stride_ob,
    stride_on,
    tokens,
    num_rows,
    C,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = scale * (d - constant - (v - mean) * slope) [+ residual], d = grad * activation'(norm(v))."""
    blocks = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    first = (program % blocks) * CHANNELS
    image, images, token, exists = place_rows((program // blocks) * ROWS, num_rows, tokens, ROWS)
    channels = first + tl.arange(0, CHANNELS)
    inside = exists[:, None] & (channels < C)[None, :]
    center, scale, shift = load_norm(mean, var, weight, bias, eps, first, C, CHANNELS)
    place = (images * stride_gb + token * stride_gn)[:, None] + channels[None, :]
    d = tl.load(grad + image * stride_gb + place, mask=inside, other=0).to(tl.float32)
    place = (images * stride_vb + token * stride_vn)[:, None] + channels[None, :]
    centred = tl.load(v + image * stride_vb + place, mask=inside, other=0).to(tl.float32) - center[None, :]
    d *= derivative(centred * scale[None, :] + shift[None, :], ACTIVATION)
    if slope is not None:
        d -= load_vector(constant, first, C, CHANNELS)[None, :]
        d -= centred * load_vector(slope, first, C, CHANNELS)[None, :]
    d *= scale[None, :]
    if residual is not None:
        place = (images * stride_rb + token * stride_rn)[:, None] + channels[None, :]
        d += tl.load(residual + image * stride_rb + place, mask=inside, other=0).to(tl.float32)
    place = (images * stride_ob + token * stride_on)[:, None] + channels[None, :]
    tl.store(out + image * stride_ob + place, d.to(out.dtype.element_ty), mask=inside)


# --- The convolution ------------------------------------------------------------------------------------------------


@triton.jit
def _met_by(position, tap, size, PADDING: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Along one axis: where an output's tap lies in the input, or an input met the tap; and whether there is such."""
    if TRANSPOSED:
        ahead = position + PADDING - tap
        there = ahead // STRIDE
        return there, (ahead >= 0) & (there < size) & (there * STRIDE == ahead)
    there = position * STRIDE + tap - PADDING
    return there, (there >= 0) & (there < size)


@triton.jit(do_not_specialize=["height", "width", "out_width", "out_tokens", "num_rows"])
def convolve_kernel(
    t,
    taps,
    bias,
    residual,
    conv,
    out,
    mean,
    var,
    norm_weight,
    norm_bias,
    eps,
    stride_tb,
    stride_tn,
    stride_rb,
    stride_rn,
    stride_cb,
    stride_cn,
    stride_ob,
    stride_on,
    height,
    width,
    out_width,
    out_tokens,
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

    height, width: of t's grid; out_width, out_tokens: of the result's. TRANSPOSED: the gradient of such an input.
    """
    blocks = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    first = (program % blocks) * CHANNELS
    image, images, token, exists = place_rows((program // blocks) * ROWS, num_rows, out_tokens, ROWS)
    channels = first + tl.arange(0, CHANNELS)
    within = channels < C
    row = token // out_width
    column = token % out_width
    t += image * stride_tb
    acc = tl.zeros([ROWS, CHANNELS], tl.float32) + load_vector(bias, first, C, CHANNELS)[None, :]
    for dy in tl.static_range(KERNEL):
        for dx in tl.static_range(KERNEL):
            tap = tl.load(taps + channels * (KERNEL * KERNEL) + (dy * KERNEL + dx), mask=within, other=0)
            y, in_rows = _met_by(row, dy, height, PADDING, STRIDE, TRANSPOSED)
            z, in_columns = _met_by(column, dx, width, PADDING, STRIDE, TRANSPOSED)
            inside = (exists & in_rows & in_columns)[:, None] & within[None, :]
            place = (images * stride_tb + (y * width + z) * stride_tn)[:, None] + channels[None, :]
            acc += tl.load(t + place, mask=inside, other=0).to(tl.float32) * tap.to(tl.float32)[None, :]
    inside = exists[:, None] & within[None, :]
    if conv is not None:
        place = (images * stride_cb + token * stride_cn)[:, None] + channels[None, :]
        tl.store(conv + image * stride_cb + place, acc.to(conv.dtype.element_ty), mask=inside)
    if out is not None:
        center, scale, shift = load_norm(mean, var, norm_weight, norm_bias, eps, first, C, CHANNELS)
        acc = activate((acc - center[None, :]) * scale[None, :] + shift[None, :], ACTIVATION)
        if residual is not None:
            place = (images * stride_rb + token * stride_rn)[:, None] + channels[None, :]
            acc += tl.load(residual + image * stride_rb + place, mask=inside, other=0).to(tl.float32)
        place = (images * stride_ob + token * stride_on)[:, None] + channels[None, :]
        tl.store(out + image * stride_ob + place, acc.to(out.dtype.element_ty), mask=inside)


# --- Reductions -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "num_rows", "steps"])
def statistics_kernel(
    v,
    partials,
    stride_vb,
    stride_vn,
    tokens,
    num_rows,
    steps,
    C,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of `steps` tiles of rows, per channel: how many, their mean, the squares about it. (programs, 3, C)."""
    blocks = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    first = (program % blocks) * CHANNELS
    channels = first + tl.arange(0, CHANNELS)
    count = tl.zeros([CHANNELS], tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        first_row = ((program // blocks) * steps + step) * ROWS
        image, images, token, exists = place_rows(first_row, num_rows, tokens, ROWS)
        inside = exists[:, None] & (channels < C)[None, :]
        place = (images * stride_vb + token * stride_vn)[:, None] + channels[None, :]
        value = tl.load(v + image * stride_vb + place, mask=inside, other=0).to(tl.float32)
        fresh = tl.sum(exists.to(tl.float32), axis=0)
        fresh_mean = tl.sum(value, axis=0) / tl.maximum(fresh, 1.0)
        away = tl.where(inside, value - fresh_mean[None, :], 0.0)
        both = tl.maximum(count + fresh, 1.0)
        difference = fresh_mean - mean
        squares += tl.sum(away * away, axis=0) + difference * difference * count * (fresh / both)
        mean += difference * (fresh / both)
        count += fresh
    place = partials + tl.cast(program // blocks, tl.int64) * 3 * C + channels
    tl.store(place, count, mask=channels < C)
    tl.store(place + C, mean, mask=channels < C)
    tl.store(place + 2 * C, squares, mask=channels < C)


@triton.jit(do_not_specialize=["tokens", "num_rows", "steps"])
def sums_kernel(
    grad,
    v,
    partials,
    mean,
    var,
    weight,
    bias,
    eps,
    stride_gb,
    stride_gn,
    stride_vb,
    stride_vn,
    tokens,
    num_rows,
    steps,
    C,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of `steps` tiles of rows the sums of d and d * (v - mean), d = grad * activation'(norm(v)). (programs, 2, C)."""
    blocks = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    first = (program % blocks) * CHANNELS
    channels = first + tl.arange(0, CHANNELS)
    center, scale, shift = load_norm(mean, var, weight, bias, eps, first, C, CHANNELS)
    plain = tl.zeros([CHANNELS], tl.float32)
    weighted = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        first_row = ((program // blocks) * steps + step) * ROWS
        image, images, token, exists = place_rows(first_row, num_rows, tokens, ROWS)
        inside = exists[:, None] & (channels < C)[None, :]
        place = (images * stride_gb + token * stride_gn)[:, None] + channels[None, :]
        d = tl.load(grad + image * stride_gb + place, mask=inside, other=0).to(tl.float32)
        place = (images * stride_vb + token * stride_vn)[:, None] + channels[None, :]
        centred = tl.load(v + image * stride_vb + place, mask=inside, other=0).to(tl.float32) - center[None, :]
        d *= derivative(centred * scale[None, :] + shift[None, :], ACTIVATION)
        plain += tl.sum(d, axis=0)
        weighted += tl.sum(d * centred, axis=0)
    place = partials + tl.cast(program // blocks, tl.int64) * 2 * C + channels
    tl.store(place, plain, mask=channels < C)
    tl.store(place + C, weighted, mask=channels < C)


@triton.jit(do_not_specialize=["height", "width", "out_width", "out_tokens", "num_rows", "steps"])
def weight_gradient_kernel(
    t,
    dc,
    partials,
    stride_tb,
    stride_tn,
    stride_gb,
    stride_gn,
    height,
    width,
    out_width,
    out_tokens,
    num_rows,
    steps,
    C,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of `steps` tiles of rows, for one tap the sum of dc times what it met of t, and behind the last tap that of dc.

    (programs, taps + 1, C).
    """
    blocks = tl.cdiv(C, CHANNELS)
    taps: tl.constexpr = KERNEL * KERNEL
    program = tl.program_id(0)
    first = (program % blocks) * CHANNELS
    tap = program // blocks % (taps + 1)
    split = program // blocks // (taps + 1)
    channels = first + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        image, images, token, exists = place_rows((split * steps + step) * ROWS, num_rows, out_tokens, ROWS)
        inside = exists[:, None] & (channels < C)[None, :]
        place = (images * stride_gb + token * stride_gn)[:, None] + channels[None, :]
        d = tl.load(dc + image * stride_gb + place, mask=inside, other=0).to(tl.float32)
        if tap < taps:
            y, in_rows = _met_by(token // out_width, tap // KERNEL, height, PADDING, STRIDE, False)
            z, in_columns = _met_by(token % out_width, tap % KERNEL, width, PADDING, STRIDE, False)
            inside = inside & (in_rows & in_columns)[:, None]
            place = (images * stride_tb + (y * width + z) * stride_tn)[:, None] + channels[None, :]
            d *= tl.load(t + image * stride_tb + place, mask=inside, other=0).to(tl.float32)
        total += tl.sum(d, axis=0)
    place = partials + (tl.cast(split, tl.int64) * (taps + 1) + tap) * C + channels
    tl.store(place, total, mask=channels < C)


# --- Launches -------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """A BatchNorm and the activation behind it, as kernels take them; no norm where var is None."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    activation: int

    def vectors(self) -> tuple[Tensor | None, ...]:
        """In the kernels' order."""
        weight, bias = (self.weight, self.bias) if self.var is not None else (None, None)
        return self.mean, self.var, weight, bias

    def exists(self) -> bool:
        """Whether it does anything."""
        return self.var is not None or self.activation != 0


class Geometry(NamedTuple):
    """The grid, and what the convolution does with it."""

    height: int
    width: int
    stride: int
    padding: int
    prefix_tokens: int
    residual: bool

    def out_size(self, kernel: int) -> tuple[int, int]:
        """The grid behind the convolution."""
        height, width = ((s + 2 * self.padding - kernel) // self.stride + 1 for s in (self.height, self.width))
        return height, width


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


def _options(config: Config) -> dict[str, int]:
    return {"ROWS": config.rows, "CHANNELS": config.channels, "num_warps": config.num_warps}


def _programs(like: Tensor, config: Config) -> int:
    """For a tile each of all tokens and channels."""
    return triton.cdiv(like.shape[0] * like.shape[1], config.rows) * triton.cdiv(like.shape[2], config.channels)


def _map(v: Tensor, norm: Norm, residual: Tensor | None, out: Tensor, config: Config) -> None:
    """out = activation(norm(v)) [+ residual]; all (B, N, C)."""
    map_kernel[(_programs(v, config),)](
        v,
        residual,
        out,
        *norm.vectors(),
        norm.eps,
        *_strides(v, residual, out),
        v.shape[1],
        v.shape[0] * v.shape[1],
        v.shape[2],
        ACTIVATION=norm.activation,
        **_options(config),
    )


def _map_backward(
    grad: Tensor,
    v: Tensor,
    norm: Norm,
    carried: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    out: Tensor,
    config: Config,
) -> None:
    """The gradient of v [+ residual]; carried: what batch statistics take off, as a constant and a slope, or None."""
    map_backward_kernel[(_programs(v, config),)](
        grad,
        v,
        residual,
        out,
        *norm.vectors(),
        *carried,
        norm.eps,
        *_strides(grad, v, residual, out),
        v.shape[1],
        v.shape[0] * v.shape[1],
        v.shape[2],
        ACTIVATION=norm.activation,
        **_options(config),
    )


def _convolve(
    t: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    norm: Norm,
    residual: Tensor | None,
    conv: Tensor | None,
    out: Tensor | None,
    grids: tuple[tuple[int, int], tuple[int, int]],
    geometry: Geometry,
    config: Config,
    *,
    transposed: bool = False,
) -> None:
    """From t on the first grid to conv and out on the second one."""
    result = conv if out is None else out
    assert result is not None, "one of the results is asked for"
    (height, width), (_, out_width) = grids
    convolve_kernel[(_programs(result, config),)](
        t,
        taps,
        bias,
        residual,
        conv,
        out,
        *norm.vectors(),
        norm.eps,
        *_strides(t, residual, conv, out),
        height,
        width,
        out_width,
        result.shape[1],
        result.shape[0] * result.shape[1],
        t.shape[2],
        ACTIVATION=norm.activation,
        KERNEL=taps.shape[-1],
        STRIDE=geometry.stride,
        PADDING=geometry.padding,
        TRANSPOSED=transposed,
        **_options(config),
    )


def _division(like: Tensor, tasks: int, config: Config) -> tuple[int, int]:
    """Tiles of rows per program of a reduction, and how many programs share the rows, `tasks` working beside them."""
    tiles = triton.cdiv(like.shape[0] * like.shape[1], config.rows)
    side_by_side = tasks * triton.cdiv(like.shape[2], config.channels)
    steps = triton.cdiv(tiles, max(1, config.programs // side_by_side))
    steps = min(steps, 32)  # of more, sums would lose digits
    return steps, triton.cdiv(tiles, steps)


def _statistics(v: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of (B, N, C), float32."""
    steps, splits = _division(v, 1, config)
    partials = torch.empty((splits, 3, v.shape[2]), dtype=torch.float32, device=v.device)
    statistics_kernel[(splits * triton.cdiv(v.shape[2], config.channels),)](
        v,
        partials,
        *_strides(v),
        v.shape[1],
        v.shape[0] * v.shape[1],
        steps,
        v.shape[2],
        **_options(config),
    )
    count, mean, squares = partials.double().unbind(1)
    values = v.shape[0] * v.shape[1]
    overall = (count * mean).sum(0) / values
    var = (squares + count * (mean - overall).square()).sum(0) / values
    return overall.float(), var.float()


def _norm_sums(grad: Tensor, v: Tensor, norm: Norm, config: Config) -> tuple[Tensor, Tensor]:
    """The gradients of a norm's bias and weight, (C,) float64."""
    assert norm.var is not None, "there is a norm"
    steps, splits = _division(v, 1, config)
    partials = torch.empty((splits, 2, v.shape[2]), dtype=torch.float32, device=v.device)
    sums_kernel[(splits * triton.cdiv(v.shape[2], config.channels),)](
        grad,
        v,
        partials,
        *norm.vectors(),
        norm.eps,
        *_strides(grad, v),
        v.shape[1],
        v.shape[0] * v.shape[1],
        steps,
        v.shape[2],
        ACTIVATION=norm.activation,
        **_options(config),
    )
    plain, weighted = partials.sum(0, dtype=torch.float64)
    return plain, weighted / (norm.var.double() + norm.eps).sqrt()


def _weight_gradient(
    t: Tensor,
    dc: Tensor,
    kernel: int,
    grids: tuple[tuple[int, int], tuple[int, int]],
    geometry: Geometry,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (C, 1, k, k) and the bias (C,), float32."""
    rows = kernel * kernel + 1
    steps, splits = _division(dc, rows, config)
    channels = t.shape[2]
    partials = torch.empty((splits, rows, channels), dtype=torch.float32, device=t.device)
    (height, width), (_, out_width) = grids
    weight_gradient_kernel[(splits * rows * triton.cdiv(channels, config.channels),)](
        t,
        dc,
        partials,
        *_strides(t, dc),
        height,
        width,
        out_width,
        dc.shape[1],
        dc.shape[0] * dc.shape[1],
        steps,
        channels,
        KERNEL=kernel,
        STRIDE=geometry.stride,
        PADDING=geometry.padding,
        **_options(config),
    )
    sums = partials.sum(0, dtype=torch.float64).float()
    return sums[:-1].t().reshape(channels, 1, kernel, kernel).contiguous(), sums[-1].clone()


# --- The operators --------------------------------------------------------------------------------------------------


def _pre_mapped(x: Tensor, pre_norm: Norm, config: Config) -> Tensor:
    """t of the grid tokens x."""
    if not pre_norm.exists():
        return x
    t = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _map(x, pre_norm, None, t, config)
    return t


def token_depthwise_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | float | int | bool | None
) -> Tensor:
    """The operator ``token_depthwise_conv``."""
    pre_norm, norm, geometry = Norm(*rest[:6]), Norm(*rest[6:12]), Geometry(*rest[12:])
    return _forward(x, weight, bias, pre_norm, norm, geometry)[0]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_norm: Norm,
    norm: Norm,
    geometry: Geometry,
    *,
    keeps: bool = False,
    batch: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; the convolution's, where `keeps`; and its statistics, which norm takes, where `batch`."""
    prefix, kernel = geometry.prefix_tokens, weight.shape[-1]
    config = choose_config(x.dtype, kernel)
    grids = (geometry.height, geometry.width), geometry.out_size(kernel)
    tokens = grids[1][0] * grids[1][1]
    out = torch.empty((x.shape[0], prefix + tokens, x.shape[2]), dtype=x.dtype, device=x.device)
    conv = torch.empty_like(out) if keeps else x.new_empty(0)
    mean, var = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    if out.numel() == 0:
        return out, conv, mean, var
    with torch.cuda.device_of(x):
        x = with_near_rows(x)
        image, behind = x[:, prefix:], out[:, prefix:]
        residual = image if geometry.residual else None
        kept = conv[:, prefix:] if keeps else None
        t = _pre_mapped(image, pre_norm, config)
        if batch:
            assert kept is not None, "statistics are those of what is kept"
            _convolve(t, weight, bias, norm, None, kept, None, grids, geometry, config)
            mean, var = _statistics(kept, config)
            _map(kept, norm._replace(mean=mean, var=var), residual, behind, config)
        else:
            _convolve(t, weight, bias, norm, residual, kept, behind, grids, geometry, config)
        out[:, :prefix] = x[:, :prefix]
    return out, conv, mean, var


def token_depthwise_conv_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | float | int | bool | None
) -> tuple[Tensor, ...]:
    """The operator ``token_depthwise_conv_training``; keeps the convolution's result where something follows it."""
    pre_norm, pre_batch = Norm(*rest[:5], rest[6]), rest[5]
    norm, batch, geometry = Norm(*rest[7:12], rest[13]), rest[12], Geometry(*rest[14:])
    pre_mean, pre_var = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    if pre_batch:
        config = choose_config(x.dtype, weight.shape[-1])
        with torch.cuda.device_of(x):
            pre_mean, pre_var = _statistics(with_near_rows(x)[:, geometry.prefix_tokens :], config)
        pre_norm = pre_norm._replace(mean=pre_mean, var=pre_var)
    keeps = norm.exists() or batch
    out, conv, mean, var = _forward(x, weight, bias, pre_norm, norm, geometry, keeps=keeps, batch=batch)
    return out, conv, pre_mean, pre_var, mean, var


class _NormGradients(NamedTuple):
    weight: Tensor | None = None
    bias: Tensor | None = None
    carried: tuple[Tensor | None, Tensor | None] = (None, None)


def _norm_gradients(grad: Tensor, v: Tensor, norm: Norm, batch: bool, wanted: bool, config: Config) -> _NormGradients:
    """The gradients of a norm's parameters, and what its batch statistics carry to every value."""
    if norm.var is None or not (batch or wanted):
        return _NormGradients()
    plain, weighted = _norm_sums(grad, v, norm, config)
    carried: tuple[Tensor | None, Tensor | None] = (None, None)
    if batch:
        values = max(v.shape[0] * v.shape[1], 1)
        deviation = (norm.var.double() + norm.eps).sqrt()
        carried = (plain / values).float(), (weighted / (values * deviation)).float()
    return _NormGradients(weighted.float(), plain.float(), carried)


def token_depthwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Tensor | float | int | bool | None,
) -> tuple[Tensor, ...]:
    """The operator ``token_depthwise_conv_backward``."""
    pre_norm, pre_batch = Norm(*rest[:5], rest[6]), rest[5]
    norm, batch, geometry = Norm(*rest[7:12], rest[13]), rest[12], Geometry(*rest[14:20])
    x_grad, parameter_grads = rest[20:]
    prefix, kernel = geometry.prefix_tokens, weight.shape[-1]
    config = choose_config(x.dtype, kernel)
    grids = (geometry.height, geometry.width), geometry.out_size(kernel)
    dx = torch.empty(x.shape if x_grad else (0,), dtype=x.dtype, device=x.device)
    dweight = dbias = None
    behind = in_front = _NormGradients()
    with torch.cuda.device_of(x):
        grad, x = with_near_rows(grad), with_near_rows(x)
        dout, image = grad[:, prefix:], x[:, prefix:]
        dc = dout
        if norm.exists():
            kept = conv[:, prefix:]
            behind = _norm_gradients(dout, kept, norm, batch, parameter_grads, config)
            dc = torch.empty(dout.shape, dtype=x.dtype, device=x.device)
            _map_backward(dout, kept, norm, behind.carried, None, dc, config)
        if parameter_grads:
            t = _pre_mapped(image, pre_norm, config)
            dweight, dbias = _weight_gradient(t, dc, kernel, grids, geometry, config)
            if batch:  # which take any constant away again: a sum would find zero up to rounding
                dbias.zero_()
        if x_grad or (parameter_grads and pre_norm.var is not None):
            dt = torch.empty(image.shape, dtype=x.dtype, device=x.device) if pre_norm.exists() else dx[:, prefix:]
            added = dout if geometry.residual else None
            plain = Norm(None, None, None, None, 0.0, 0)
            first = None if pre_norm.exists() else added
            _convolve(dc, weight, None, plain, first, None, dt, grids[::-1], geometry, config, transposed=True)
            if pre_norm.exists():
                in_front = _norm_gradients(dt, image, pre_norm, pre_batch, parameter_grads, config)
            if x_grad and pre_norm.exists():
                _map_backward(dt, image, pre_norm, in_front.carried, added, dx[:, prefix:], config)
        if x_grad:
            dx[:, :prefix] = grad[:, :prefix]

    def found(parameter: Tensor | None, gradient: Tensor | None) -> Tensor:
        if parameter_grads and parameter is not None and gradient is not None:
            return gradient
        return torch.empty(0, dtype=torch.float32, device=x.device)

    return (
        dx,
        found(weight, dweight),
        found(bias, dbias),
        found(pre_norm.weight, in_front.weight),
        found(pre_norm.bias, in_front.bias),
        found(norm.weight, behind.weight),
        found(norm.bias, behind.bias),
    )

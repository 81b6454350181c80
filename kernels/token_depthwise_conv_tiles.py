"""What the kernels of token depthwise convolution share: tiles of tokens, and the arguments of launches.

A program works on a tile in registers, of ROWS tokens, counted over all images, and CHANNELS channels, with 16-byte
accesses along the channels. Programs of neighbouring tokens are adjacent, so the tokens that windows share come from
the cache. Everything is computed in float32.

Reductions have two stages and a fixed order: partial results per program and channel, then PyTorch's sum of those in
float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import activate, derivative, load_norm, locate_rows
from torch import Tensor

MAX_TILES_PER_SUM = 32
"""The most tiles that one program of a reduction sums: longer float32 sums would lose accuracy."""


# --- In kernels -----------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A (B, N, C) tensor with channels of stride 1, as an argument of kernels."""

    pointer: Any
    stride_b: Any
    stride_n: Any


class Statistics(NamedTuple):
    """A BatchNorm, as an argument of kernels; no norm where var is None."""

    weight: Any
    bias: Any
    mean: Any
    var: Any
    eps: Any


class Tile(NamedTuple):
    """The position of a tile in tensors of tokens, and which of its elements are in bounds."""

    image: Any
    """The first row's image, 64-bit."""
    images: Any
    """Each row's image, counted from the first row's."""
    token: Any
    """Each row's token."""
    channels: Any
    exists: Any
    """Whether each row is in bounds."""
    within: Any
    """Whether each channel is in bounds."""


@triton.jit
def this_program(C, CHANNELS: tl.constexpr):
    """The program's first channel, and its index among the programs of the same channels."""
    blocks = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    return (program % blocks) * CHANNELS, program // blocks


@triton.jit
def tile_at(first_row, first, num_rows, tokens, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The tile of the rows from first_row on and the channels from first on."""
    image, images, token, exists = locate_rows(first_row, num_rows, tokens, ROWS)
    channels = first + tl.arange(0, CHANNELS)
    return Tile(image, images, token, channels, exists, channels < C)


@triton.jit
def _pointers(tensor, tile):
    """Pointers to the elements of a tile, and which of them are in bounds."""
    offsets = (tile.images * tensor.stride_b + tile.token * tensor.stride_n)[:, None] + tile.channels[None, :]
    return tensor.pointer + tile.image * tensor.stride_b + offsets, tile.exists[:, None] & tile.within[None, :]


@triton.jit
def load_tokens(tensor, tile):
    """The tile in float32, zeros out of bounds."""
    pointers, inside = _pointers(tensor, tile)
    return tl.load(pointers, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tokens(tensor, tile, values):
    """Write the tile in the tensor's dtype."""
    pointers, inside = _pointers(tensor, tile)
    tl.store(pointers, values.to(tensor.pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_sum(sums, first, C, values):
    """Write one number per channel, from the first on."""
    channels = first + tl.arange(0, values.shape[0])
    tl.store(sums + channels, values, mask=channels < C)


@triton.jit
def _position_under_tap(position, tap, size, PADDING: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Along one axis: the input position under an output's tap, and whether it is in bounds.

    TRANSPOSED: the output position whose tap is over an input, and whether there is one.
    """
    if TRANSPOSED:
        shifted = position + PADDING - tap
        found = shifted // STRIDE
        return found, (shifted >= 0) & (found < size) & (found * STRIDE == shifted)
    found = position * STRIDE + tap - PADDING
    return found, (found >= 0) & (found < size)


@triton.jit
def tile_under_tap(
    tile, row, column, dy, dx, height, width,
    PADDING: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The tile of a (height, width) grid under tap (dy, dx) of the windows of the tile's tokens, at (row, column)."""
    y, in_rows = _position_under_tap(row, dy, height, PADDING, STRIDE, TRANSPOSED)
    x, in_columns = _position_under_tap(column, dx, width, PADDING, STRIDE, TRANSPOSED)
    exists = tile.exists & in_rows & in_columns
    return Tile(tile.image, tile.images, y * width + x, tile.channels, exists, tile.within)


@triton.jit
def load_statistics(norm, first, C, CHANNELS: tl.constexpr):
    """The norm's mean, scale and bias for the channels from first on."""
    return load_norm(norm.mean, norm.var, norm.weight, norm.bias, norm.eps, first, C, CHANNELS)


@triton.jit
def store_epilogue(value, norm, residual, out, tile, first, C, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr):
    """out = activation(norm(value)) [+ residual]."""
    center, scale, shift = load_statistics(norm, first, C, CHANNELS)
    value = activate((value - center[None, :]) * scale[None, :] + shift[None, :], ACTIVATION)
    if residual is not None:
        value += load_tokens(residual, tile)
    store_tokens(out, tile, value)


@triton.jit
def activation_gradient(grad, v, tile, center, scale, shift, ACTIVATION: tl.constexpr):
    """(grad * activation'(norm(v)), v - mean)."""
    d = load_tokens(grad, tile)
    centred = load_tokens(v, tile) - center[None, :]
    return d * derivative(centred * scale[None, :] + shift[None, :], ACTIVATION), centred


# --- Launches -------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """A launch configuration: the tile's size, warps, and the most programs of a reduction."""

    rows: int
    channels: int
    num_warps: int
    programs: int = 1024


HALF, LARGE_HALF, FLOAT = Config(32, 64, 4), Config(16, 64, 4), Config(32, 32, 4)
"""For half precision, the same with many taps, and float32. No kernel spills with them on any GPU."""


def choose_config(dtype: torch.dtype, kernel: int) -> Config:
    """The configuration for tensors of a dtype and a kernel size."""
    if dtype == torch.float32:
        return FLOAT
    return LARGE_HALF if kernel > 5 else HALF


class Norm(NamedTuple):
    """A BatchNorm and the activation after it, as arguments of operators; no norm where var is None."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    activation: int

    @classmethod
    def of(cls, arguments: Any, prefix: str = "") -> Norm:
        """The operator's ``pre_`` norm, or the one behind the convolution."""
        fields = ("norm_weight", "norm_bias", "norm_mean", "norm_var", "norm_eps", "activation")
        return cls(*(getattr(arguments, prefix + field) for field in fields))

    def statistics(self) -> Statistics:
        """The norm, as an argument of kernels."""
        weight, bias = (self.weight, self.bias) if self.var is not None else (None, None)
        return Statistics(weight, bias, self.mean, self.var, self.eps)

    def exists(self) -> bool:
        """Whether there is a norm or an activation."""
        return self.var is not None or self.activation != 0


NO_NORM = Norm(None, None, None, None, 0.0, 0)

Grid = tuple[int, int]


class Geometry(NamedTuple):
    """The grid and the convolution's settings."""

    height: int
    width: int
    stride: int
    padding: int
    prefix_tokens: int
    residual: bool

    @classmethod
    def of(cls, arguments: Any) -> Geometry:
        """That of an operator."""
        return cls(*(getattr(arguments, field) for field in cls._fields))

    def grids(self, kernel: int) -> tuple[Grid, Grid]:
        """(height, width) of the convolution's input and output."""
        height, width = ((s + 2 * self.padding - kernel) // self.stride + 1 for s in (self.height, self.width))
        return (self.height, self.width), (height, width)

    def empty_result(self, x: Tensor, kernel: int) -> Tensor:
        """An uninitialised result of the operator, prefix tokens included."""
        _, (height, width) = self.grids(kernel)
        tokens = self.prefix_tokens + height * width
        return torch.empty((x.shape[0], tokens, x.shape[2]), dtype=x.dtype, device=x.device)


def as_tokens(tensor: Tensor | None) -> Tokens | None:
    """A (B, N, C) tensor, as an argument of kernels."""
    return None if tensor is None else Tokens(tensor, *tensor.stride()[:2])


def sizes_of(like: Tensor, config: Config) -> dict[str, int]:
    """The arguments of every kernel: the sizes of the tensor (B, N, C) that programs divide, and of the tile."""
    batch, tokens, channels = like.shape
    tile = {"ROWS": config.rows, "CHANNELS": config.channels, "num_warps": config.num_warps}
    return {"tokens": tokens, "num_rows": batch * tokens, "C": channels, **tile}


def programs(like: Tensor, config: Config) -> tuple[int]:
    """The launch grid with one program per tile."""
    return (triton.cdiv(like.shape[0] * like.shape[1], config.rows) * triton.cdiv(like.shape[2], config.channels),)


class Reduction(NamedTuple):
    """The launch of a sum over all tokens."""

    grid: tuple[int]
    steps: int
    """Tiles of rows per program."""
    partials: Tensor
    """(programs of a channel, results, C) float32, uninitialised."""


def split_reduction(like: Tensor, results: int, config: Config, *, tasks: int = 1) -> Reduction:
    """A reduction to ``results`` numbers per channel; tasks: programs that work on the same tile side by side."""
    tiles = triton.cdiv(like.shape[0] * like.shape[1], config.rows)
    side_by_side = tasks * triton.cdiv(like.shape[2], config.channels)
    steps = max(1, min(triton.cdiv(tiles, max(1, config.programs // side_by_side)), MAX_TILES_PER_SUM))
    splits = triton.cdiv(tiles, steps)
    partials = torch.empty((splits, results, like.shape[2]), dtype=torch.float32, device=like.device)
    return Reduction((splits * side_by_side,), steps, partials)

"""What the kernels of token depthwise convolution share: tiles of tokens in them, and what their launches need.

A program works on ROWS tokens (of all images in a row) times CHANNELS channels, as a tile in registers, with 16-byte
accesses along the channels; programs of neighbouring tokens are neighbours, so what a window shares with the next
comes from the cache. Everything is computed in float32.

Reductions have two stages in a fixed order: a program's partial result per channel, and PyTorch's sum of those in
float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels._tokens import activate, derivative, load_norm, place_rows
from torch import Tensor

LONGEST_SUM = 32
"""Tiles that one program of a reduction adds up at most: of more, sums would lose digits."""


# --- In kernels -----------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A (B, N, C) tensor with adjacent channels, as a kernel sees it."""

    place: Any
    stride_b: Any
    stride_n: Any


class Statistics(NamedTuple):
    """A BatchNorm as a kernel sees it: no norm where var is None."""

    weight: Any
    bias: Any
    mean: Any
    var: Any
    eps: Any


class Tile(NamedTuple):
    """Where the elements of a tile lie in any tensor of tokens, and which of them exist."""

    image: Any
    """The first row's."""
    images: Any
    """Of each row, counted from there."""
    token: Any
    channels: Any
    exists: Any
    """By row."""
    within: Any
    """By channel."""


@triton.jit
def this_program(C, CHANNELS: tl.constexpr):
    """The program's first channel, and its number among those of the same channels."""
    blocks = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    return (program % blocks) * CHANNELS, program // blocks


@triton.jit
def tile_at(first_row, first, num_rows, tokens, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The Tile of the rows from first_row on and the channels from first on."""
    image, images, token, exists = place_rows(first_row, num_rows, tokens, ROWS)
    channels = first + tl.arange(0, CHANNELS)
    return Tile(image, images, token, channels, exists, channels < C)


@triton.jit
def _places(tensor, tile):
    """Pointers to the elements of a tile, and which of them exist."""
    place = (tile.images * tensor.stride_b + tile.token * tensor.stride_n)[:, None] + tile.channels[None, :]
    return tensor.place + tile.image * tensor.stride_b + place, tile.exists[:, None] & tile.within[None, :]


@triton.jit
def load_tokens(tensor, tile):
    """The tile in float32, zeros where there is nothing."""
    places, inside = _places(tensor, tile)
    return tl.load(places, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tokens(tensor, tile, values):
    """Write the tile in the tensor's dtype."""
    places, inside = _places(tensor, tile)
    tl.store(places, values.to(tensor.place.dtype.element_ty), mask=inside)


@triton.jit
def store_sum(sums, first, C, values):
    """Write one number per channel from the first on."""
    channels = first + tl.arange(0, values.shape[0])
    tl.store(sums + channels, values, mask=channels < C)


@triton.jit
def _met_by(position, tap, size, PADDING: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Along one axis: where an output's tap lies in the input, or an input met the tap; and whether there is such."""
    if TRANSPOSED:
        ahead = position + PADDING - tap
        there = ahead // STRIDE
        return there, (ahead >= 0) & (there < size) & (there * STRIDE == ahead)
    there = position * STRIDE + tap - PADDING
    return there, (there >= 0) & (there < size)


@triton.jit
def tile_under_tap(
    tile, row, column, dy, dx, height, width,
    PADDING: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What the tap (dy, dx) meets of a (height, width) grid, for the tile's tokens, which lie at (row, column)."""
    y, in_rows = _met_by(row, dy, height, PADDING, STRIDE, TRANSPOSED)
    x, in_columns = _met_by(column, dx, width, PADDING, STRIDE, TRANSPOSED)
    exists = tile.exists & in_rows & in_columns
    return Tile(tile.image, tile.images, y * width + x, tile.channels, exists, tile.within)


@triton.jit
def load_statistics(norm, first, C, CHANNELS: tl.constexpr):
    """The norm's center, scale and shift of the channels from first on."""
    return load_norm(norm.mean, norm.var, norm.weight, norm.bias, norm.eps, first, C, CHANNELS)


@triton.jit
def store_finished(value, norm, residual, out, tile, first, C, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr):
    """out = activation(norm(value)) [+ residual]."""
    center, scale, shift = load_statistics(norm, first, C, CHANNELS)
    value = activate((value - center[None, :]) * scale[None, :] + shift[None, :], ACTIVATION)
    if residual is not None:
        value += load_tokens(residual, tile)
    store_tokens(out, tile, value)


@triton.jit
def gradient_behind_norm(grad, v, tile, center, scale, shift, ACTIVATION: tl.constexpr):
    """(grad * activation'(norm(v)), v - mean)."""
    d = load_tokens(grad, tile)
    centred = load_tokens(v, tile) - center[None, :]
    return d * derivative(centred * scale[None, :] + shift[None, :], ACTIVATION), centred


# --- Launches -------------------------------------------------------------------------------------------------------


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


class Norm(NamedTuple):
    """A BatchNorm and the activation behind it, as operators take them; no norm where var is None."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    activation: int

    def statistics(self) -> Statistics:
        """The norm for kernels."""
        weight, bias = (self.weight, self.bias) if self.var is not None else (None, None)
        return Statistics(weight, bias, self.mean, self.var, self.eps)

    def exists(self) -> bool:
        """Whether it does anything."""
        return self.var is not None or self.activation != 0


NO_NORM = Norm(None, None, None, None, 0.0, 0)

Grid = tuple[int, int]


class Geometry(NamedTuple):
    """The grid, and what the convolution does with it."""

    height: int
    width: int
    stride: int
    padding: int
    prefix_tokens: int
    residual: bool

    def grids(self, kernel: int) -> tuple[Grid, Grid]:
        """(height, width) in front of the convolution and behind it."""
        height, width = ((s + 2 * self.padding - kernel) // self.stride + 1 for s in (self.height, self.width))
        return (self.height, self.width), (height, width)

    def empty_result(self, x: Tensor, kernel: int) -> Tensor:
        """For the result of the operator, prefix tokens included."""
        _, (height, width) = self.grids(kernel)
        tokens = self.prefix_tokens + height * width
        return torch.empty((x.shape[0], tokens, x.shape[2]), dtype=x.dtype, device=x.device)


class TrainingArguments(NamedTuple):
    """What the operators of training take behind the bias; ``*_batch``: the norm's statistics are the batch's."""

    pre_norm: Norm
    pre_batch: bool
    norm: Norm
    batch: bool
    geometry: Geometry

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> TrainingArguments:
        """From the operators' order."""
        pre_norm, norm = Norm(*arguments[:5], arguments[6]), Norm(*arguments[7:12], arguments[13])
        return cls(pre_norm, arguments[5], norm, arguments[12], Geometry(*arguments[14:20]))


def as_tokens(tensor: Tensor | None) -> Tokens | None:
    """A (B, N, C) tensor for a kernel."""
    return None if tensor is None else Tokens(tensor, *tensor.stride()[:2])


def sizes_of(like: Tensor, config: Config) -> dict[str, int]:
    """The arguments that all kernels have: of the tensor (B, N, C) whose tokens are divided, and of the tile."""
    batch, tokens, channels = like.shape
    tile = {"ROWS": config.rows, "CHANNELS": config.channels, "num_warps": config.num_warps}
    return {"tokens": tokens, "num_rows": batch * tokens, "C": channels, **tile}


def programs(like: Tensor, config: Config) -> tuple[int]:
    """The launch grid with a program for every tile."""
    return (triton.cdiv(like.shape[0] * like.shape[1], config.rows) * triton.cdiv(like.shape[2], config.channels),)


class Reduction(NamedTuple):
    """How a sum over all tokens is divided."""

    grid: tuple[int]
    steps: int
    """Tiles of rows per program."""
    partials: Tensor
    """(programs that share the rows, results, C) float32, uninitialised."""


def divide(like: Tensor, results: int, config: Config, *, tasks: int = 1) -> Reduction:
    """A reduction to so many results per channel; tasks: programs that work beside each other on the same rows."""
    tiles = triton.cdiv(like.shape[0] * like.shape[1], config.rows)
    side_by_side = tasks * triton.cdiv(like.shape[2], config.channels)
    steps = max(1, min(triton.cdiv(tiles, max(1, config.programs // side_by_side)), LONGEST_SUM))
    splits = triton.cdiv(tiles, steps)
    partials = torch.empty((splits, results, like.shape[2]), dtype=torch.float32, device=like.device)
    return Reduction((splits * side_by_side,), steps, partials)

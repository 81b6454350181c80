"""What the kernels on tokens (B, N, C) share: row offsets, activations, norms.

Channels have stride 1. The B * N tokens are the rows that programs divide among themselves. Offsets within a tile are
32-bit, the offset of its first image is 64-bit; :func:`with_small_row_strides` makes sure that this is enough.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL = tl.constexpr(0.3989422804014327)
"""The standard normal density at 0."""

MAX_TILE_ROWS = 128
"""No tile of tokens has more rows."""


def with_small_row_strides(tensor: Tensor) -> Tensor:
    """The tensor (B, N, C), copied where channels are not of stride 1 or offsets within a tile would exceed 2^31.

    ValueError where those of the copy would, too.
    """

    def fits(view: Tensor) -> bool:
        tokens = max(view.shape[1], 1)
        steps = (MAX_TILE_ROWS // tokens + 2) * view.stride(0) + tokens * view.stride(1)
        return steps + view.shape[2] < 2**31

    if tensor.stride(2) == 1 and fits(tensor):
        return tensor
    copy = tensor.contiguous()
    if not fits(copy):
        raise ValueError(f"tensor: expected at most 2^29 elements per image, got shape {tuple(tensor.shape)}")
    return copy


@triton.jit
def locate_rows(first_row, num_rows, tokens, BLOCK: tl.constexpr):
    """The BLOCK rows from first_row on, of images of ``tokens`` rows each.

    Returns the first row's image, and per row its image counted from there, its token, and whether it is in bounds.
    """
    rows = tl.arange(0, BLOCK)
    places = first_row % tokens + rows
    image = tl.cast(first_row // tokens, tl.int64)
    return image, places // tokens, places % tokens, first_row + rows < num_rows


@triton.jit
def load_vector(vector, first, size, BLOCK: tl.constexpr, absent: tl.constexpr = 0.0):
    """BLOCK elements from first on, in float32; zeros out of bounds, ``absent`` where the vector is None."""
    # Not an early return: Triton would compile the code after it all the same.
    if vector is None:
        values = tl.full([BLOCK], absent, tl.float32)
    else:
        places = first + tl.arange(0, BLOCK)
        values = tl.load(vector + places, mask=places < size, other=0).to(tl.float32)
    return values


@triton.jit
def gelu(x):
    """GELU, erf form."""
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def _twice_tanh_argument(x):
    """2 u of GELU's tanh form 0.5 x (1 + tanh(u)), which is x times the sigmoid of this."""
    return x * (1.5957691216057308 + 0.07135481627260025 * (x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of a code: 0 none, 1 gelu, 2 quick_gelu, 3 silu, 4 relu, 5 gelu_tanh."""
    if ACTIVATION == 1:
        return gelu(x)
    if ACTIVATION == 2:
        return x / (1.0 + tl.exp(-1.702 * x))
    if ACTIVATION == 3:
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == 4:
        return tl.where(x < 0.0, 0.0, x)  # keeps NaN
    if ACTIVATION == 5:
        return x / (1.0 + tl.exp(-_twice_tanh_argument(x)))
    return x


@triton.jit
def _swish_derivative(scaled):
    s = 1.0 / (1.0 + tl.exp(-scaled))
    return s * (1.0 + scaled * (1.0 - s))


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of :func:`activate` at x."""
    if ACTIVATION == 1:
        clamped = tl.minimum(tl.maximum(x, -30.0), 30.0)  # x phi(x) underflows to 0 long before x * x overflows
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + clamped * NORMAL * tl.exp(-0.5 * clamped * clamped)
    if ACTIVATION == 2:
        return _swish_derivative(1.702 * x)
    if ACTIVATION == 3:
        return _swish_derivative(x)
    if ACTIVATION == 4:
        return tl.where(x <= 0.0, 0.0, 1.0)
    if ACTIVATION == 5:
        s = 1.0 / (1.0 + tl.exp(-_twice_tanh_argument(x)))
        return s + x * (s * (1.0 - s)) * (1.5957691216057308 + 0.21406444881780074 * (x * x))
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def load_norm(mean, var, weight, bias, eps, first, size, BLOCK: tl.constexpr):
    """A BatchNorm of BLOCK channels as (mean, scale, bias): (v - mean) * scale + bias; no norm where var is None."""
    center = load_vector(mean, first, size, BLOCK)
    scale = load_vector(weight, first, size, BLOCK, 1.0)
    if var is not None:
        scale = scale / tl.sqrt_rn(load_vector(var, first, size, BLOCK) + tl.cast(eps, tl.float32))
    return center, scale, load_vector(bias, first, size, BLOCK)

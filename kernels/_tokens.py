"""What the kernels on tokens as they lie share: where rows are, activations, norms.

A tensor is (B, N, C) with adjacent channels; its B * N tokens are the rows that programs divide among themselves.
Offsets inside a tile are 32-bit, the place of the tile's first image is 64-bit: :func:`with_near_rows` sees to it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL = tl.constexpr(0.3989422804014327)
"""The normal distribution's density at 0."""

MOST_ROWS = 128
"""No tile of any kernel here has more."""


def with_near_rows(tensor: Tensor) -> Tensor:
    """The tensor (B, N, C), copied where its channels are not adjacent, or where offsets in a tile would pass 2^31.

    ValueError where those of the copy would as well.
    """

    def reaches(view: Tensor) -> bool:
        tokens = max(view.shape[1], 1)
        steps = (MOST_ROWS // tokens + 2) * view.stride(0) + tokens * view.stride(1)
        return steps + view.shape[2] < 2**31

    if tensor.stride(2) == 1 and reaches(tensor):
        return tensor
    copy = tensor.contiguous()
    if not reaches(copy):
        raise ValueError(f"tensor: got shape {tuple(tensor.shape)}, accepted are up to 2^29 elements per image")
    return copy


@triton.jit
def place_rows(first_row, num_rows, tokens, BLOCK: tl.constexpr):
    """Where the BLOCK rows from first_row on lie, of images of `tokens` rows each.

    The first row's image; then per row its image, counted from there, its token, and whether it exists.
    """
    rows = tl.arange(0, BLOCK)
    places = first_row % tokens + rows
    image = tl.cast(first_row // tokens, tl.int64)
    return image, places // tokens, places % tokens, first_row + rows < num_rows


@triton.jit
def load_vector(vector, first, size, BLOCK: tl.constexpr, absent: tl.constexpr = 0.0):
    """BLOCK elements from first on, in float32; zeros behind the last one, `absent` where there is no vector at all."""
    # A return within the first branch would leave the compiler to look at what follows it.
    if vector is None:
        values = tl.full([BLOCK], absent, tl.float32)
    else:
        places = first + tl.arange(0, BLOCK)
        values = tl.load(vector + places, mask=places < size, other=0).to(tl.float32)
    return values


@triton.jit
def gelu(x):
    """The erf form."""
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """By code: none, gelu, quick_gelu, silu, relu."""
    if ACTIVATION == 1:
        return gelu(x)
    if ACTIVATION == 2:
        return x / (1.0 + tl.exp(-1.702 * x))
    if ACTIVATION == 3:
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == 4:
        return tl.where(x < 0.0, 0.0, x)  # keeps NaN
    return x


@triton.jit
def _swish_derivative(scaled):
    s = 1.0 / (1.0 + tl.exp(-scaled))
    return s * (1.0 + scaled * (1.0 - s))


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """Of the activation of that code, at x."""
    if ACTIVATION == 1:
        near = tl.minimum(tl.maximum(x, -30.0), 30.0)  # x phi(x) has vanished long before x * x overflows
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + near * NORMAL * tl.exp(-0.5 * near * near)
    if ACTIVATION == 2:
        return _swish_derivative(1.702 * x)
    if ACTIVATION == 3:
        return _swish_derivative(x)
    if ACTIVATION == 4:
        return tl.where(x <= 0.0, 0.0, 1.0)
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def load_norm(mean, var, weight, bias, eps, first, size, BLOCK: tl.constexpr):
    """A BatchNorm of BLOCK channels as (mean, scale, bias): n = (v - mean) * scale + bias. No norm: var is None."""
    center = load_vector(mean, first, size, BLOCK)
    scale = load_vector(weight, first, size, BLOCK, 1.0)
    if var is not None:
        scale = scale / tl.sqrt_rn(load_vector(var, first, size, BLOCK) + tl.cast(eps, tl.float32))
    return center, scale, load_vector(bias, first, size, BLOCK)

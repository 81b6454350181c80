"""The mix after the softmax as kernels take it, a BatchNorm by running statistics folded into it: one small launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Post(NamedTuple):
    """A mix after the softmax, of any floating dtype, None where absent; the norm behind it has running statistics."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_mean: Tensor | None
    norm_var: Tensor | None
    norm_eps: float
    output_scale: float


@triton.jit
def normalised_rows(matrix):
    """Numbers up to 1, and the powers of two that the rows are to be multiplied by."""
    largest = tl.max(tl.abs(matrix), 1)
    size = tl.exp2(tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0))))
    return matrix / size[:, None], size


@triton.jit
def fold_kernel(
    weight, bias, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, output_scale, missing, matrix, sizes, shifts,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """M_h = sizes[h] sum_g matrix[h, g] (P_g - missing) + shifts[h].

    SIZED: matrix has numbers up to 1, and sizes are powers of two, so that in float16 it loses no digit of a float16
    weight. Else sizes is not written, and is 1.
    """
    slots = tl.arange(0, SLOTS)
    real = slots < HEADS
    inside = real[:, None] & real[None, :]
    places = slots[:, None] * HEADS + slots[None, :]
    mix = tl.load(weight + places, mask=inside, other=0).to(tl.float32)
    shift = tl.zeros([SLOTS], tl.float32)
    if bias is not None:
        shift += tl.load(bias + slots, mask=real, other=0).to(tl.float32)
    if norm_var is not None:
        variance = tl.load(norm_var + slots, mask=real, other=1).to(tl.float32)
        factor = 1.0 / tl.sqrt_rn(variance + tl.cast(norm_eps, tl.float32))
        if norm_weight is not None:
            factor *= tl.load(norm_weight + slots, mask=real, other=0).to(tl.float32)
        shift = factor * (shift - tl.load(norm_mean + slots, mask=real, other=0).to(tl.float32))
        if norm_bias is not None:
            shift += tl.load(norm_bias + slots, mask=real, other=0).to(tl.float32)
        mix *= factor[:, None]
    shift += tl.sum(mix, 1) * tl.cast(missing, tl.float32)
    scale = tl.cast(output_scale, tl.float32)
    if SIZED:
        mix, size = normalised_rows(mix)
        tl.store(sizes + slots, size * scale, mask=real)
    else:
        mix *= scale
    tl.store(matrix + places, mix.to(matrix.dtype.element_ty), mask=inside)
    tl.store(shifts + slots, shift * scale, mask=real)


def fold(post: Post, *, missing: float, sized: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel.

    Args:
        missing: what the maps will be less by, and the mix does not know of.
        sized: for maps in float16.

    Returns:
        matrix (H, H), in float16 if ``sized``; sizes and shifts (H), all else in float32.
    """
    heads, device = post.weight.shape[0], post.weight.device
    matrix = torch.empty((heads, heads), dtype=torch.float16 if sized else torch.float32, device=device)
    sizes, shifts = torch.empty((2, heads), dtype=torch.float32, device=device).unbind(0)
    tensors = (None if tensor is None else tensor.contiguous() for tensor in post[:6])
    fold_kernel[(1,)](
        *tensors, float(post.norm_eps), float(post.output_scale), missing, matrix, sizes, shifts,
        HEADS=heads, SLOTS=max(2, triton.next_power_of_2(heads)), SIZED=sized, num_warps=1,
    )  # fmt: skip
    return matrix, sizes, shifts

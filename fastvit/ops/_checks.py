"""Checks of arguments that several operators share. Each raises a ValueError "name: expected ..., got ..."."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

import torch
from torch import Tensor

from fastvit.reference.functional import ACTIVATIONS, BatchNorm

__all__ = [
    "INTS",
    "LARGEST",
    "check_activation",
    "check_attention",
    "check_batch_norm",
    "check_depthwise",
    "check_grid",
    "check_linear",
    "check_number",
    "check_parameter",
    "check_probability",
    "check_tokens",
    "fail",
    "four_axes",
    "out_size",
]


def fail(name: str, expected: str, value: object) -> NoReturn:
    """Raise the ValueError; a tensor is described by its shape, dtype and device."""
    if isinstance(value, Tensor):
        got = f"{tuple(value.shape)} {value.dtype} on {value.device}"
    elif type(value).__name__ == "ndarray":
        got = f"a numpy array {value.shape}: torch.from_numpy(...) makes a tensor of it"  # type: ignore[attr-defined]
    else:
        got = f"{value!r:.200} ({type(value).__name__})"
    raise ValueError(f"{name}: expected {expected}, got {got}")


INTS = (int, torch.SymInt)
"""What counts or measures; a bool, which is an int to Python, does not."""

LARGEST = 2**30
"""Of strides and paddings, so that sizes made of them fit 64 bits."""


def check_parameter(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """None, or floating of this shape on x's device."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.shape != shape or not tensor.is_floating_point():
        fail(name, f"a floating tensor {shape}", tensor)
    if tensor.device != x.device:
        fail(name, f"a tensor on {x.device}", tensor)


def check_number(name: str, value: float) -> None:
    """A number; not a tensor, whose gradient would be lost."""
    if not isinstance(value, (int, float, torch.SymFloat)):
        fail(name, "a number", value)


def check_activation(name: str, activation: str | None, names: Collection[str | None] = ACTIVATIONS) -> None:
    """One of the names, by default those of ``fastvit.reference.functional.ACTIVATIONS``."""
    if not isinstance(activation, (str, type(None))) or activation not in names:
        fail(name, f"one of {list(names)}", activation)


def check_probability(name: str, value: float) -> None:
    """A number from 0 to 1."""
    if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        fail(name, "a probability from 0 to 1", value)


def check_batch_norm(name: str, norm: BatchNorm | None, channels: int, x: Tensor) -> None:
    """None, or a BatchNorm over that many channels with statistics to normalise by."""
    if norm is None:
        return
    if not isinstance(norm, BatchNorm):
        fail(name, "BatchNorm.of(module) or None", norm)
    for field, tensor in zip(BatchNorm._fields, norm[:4], strict=False):
        check_parameter(f"{name}.{field}", tensor, (channels,), x)
    if (norm.running_mean is None) != (norm.running_var is None) or (
        norm.running_mean is None and not norm.use_batch_stats
    ):
        fail(name, "running_mean and running_var, or neither and use_batch_stats=True", norm)
    for field, number in (("eps", norm.eps), ("momentum", norm.momentum)):
        if not isinstance(number, (int, float, torch.SymFloat)):
            fail(f"{name}.{field}", "a number", number)
    if not isinstance(norm.use_batch_stats, bool):
        fail(f"{name}.use_batch_stats", "a bool", norm.use_batch_stats)


def check_batch(name: str, norm: BatchNorm | None, values: int) -> None:
    """More than one value per channel, where they have statistics: before running ones move, of another norm's too."""
    if norm is not None and norm.use_batch_stats and norm.layer is None and values == 1:
        raise ValueError(f"{name}: Expected more than 1 value per channel when training, got 1")


# --- Attention ------------------------------------------------------------------------------------------------------


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> None:
    """q (B, H, Nq, D) and k, v (B, H, Nk, D) of one floating dtype on one device, and a mask that broadcasts."""
    if not isinstance(q, Tensor) or q.dim() != 4 or not q.is_floating_point():
        fail("q", "a floating tensor (B, H, Nq, D)", q)
    if not isinstance(k, Tensor) or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        fail("k", f"a tensor (B, H, Nk, D) like q {tuple(q.shape)}", k)
    if not isinstance(v, Tensor) or v.shape != k.shape:
        fail("v", f"a tensor of k's shape {tuple(k.shape)}", v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            fail(name, f"a tensor on {q.device}", tensor)
        if tensor.dtype != q.dtype and not (tensor.is_floating_point() and torch.is_autocast_enabled(q.device.type)):
            fail(name, f"q's dtype {q.dtype}", tensor)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            fail("mask", "a bool tensor, True = attend", mask)
        if mask.dim() == 2 and mask.shape[0] not in (1, q.shape[0]):
            fail("mask", f"(B, Nk) = {(q.shape[0], k.shape[2])}; a mask (Nq, Nk) needs leading axes of size 1", mask)
        check_broadcast("mask", mask, q, k)
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        fail("scale", "a number or None", scale)


def check_broadcast(name: str, tensor: Tensor, q: Tensor, k: Tensor) -> None:
    """Broadcastable to the logits (B, H, Nq, Nk), on q's device."""
    full = (*q.shape[:3], k.shape[2])
    sizes = tensor.shape if tensor.dim() > 4 else four_axes(tensor, key_padding=name == "mask").shape
    if len(sizes) > 4 or any(size not in (1, wanted) for size, wanted in zip(sizes, full, strict=True)):
        fail(name, f"a tensor that broadcasts to (B, H, Nq, Nk) = {full}", tensor)
    if tensor.device != q.device:
        fail(name, f"a tensor on {q.device}", tensor)


def four_axes(tensor: Tensor, key_padding: bool) -> Tensor:
    """A view with leading axes of size 1; (B, Nk) becomes (B, 1, 1, Nk) with ``key_padding``."""
    if key_padding and tensor.dim() == 2:
        return tensor.unsqueeze(1).unsqueeze(1)
    return tensor[(None,) * (4 - tensor.dim())]


# --- Grids of tokens ------------------------------------------------------------------------------------------------


def check_tokens(x: Tensor) -> None:
    """Floating (B, P + h*w, C)."""
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        fail("x", "a floating tensor (B, P + h*w, C)", x)


def _check_weight(name: str, weight: Tensor, dims: int, expected: str, x: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != dims:
        fail(name, f"a floating tensor {expected}", weight)
    if weight.device != x.device:
        fail(name, f"a tensor on {x.device}", weight)


def check_depthwise(name: str, weight: Tensor, channels: int, x: Tensor) -> int:
    """Floating (channels, 1, k, k); the kernel size k."""
    expected = f"({channels}, 1, k, k)"
    _check_weight(name, weight, 4, expected, x)
    size, group, height, width = weight.shape
    if size != channels or group != 1 or height != width or height < 1:
        fail(name, f"a floating tensor {expected}", weight)
    return width


def check_linear(name: str, weight: Tensor, inputs: int, x: Tensor) -> int:
    """Floating (O, inputs); the number of outputs O."""
    expected = f"(O, {inputs})"
    _check_weight(name, weight, 2, expected, x)
    if weight.shape[1] != inputs:
        fail(name, f"a floating tensor {expected}", weight)
    return weight.shape[0]


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Outputs of a convolution along one axis."""
    return (size + 2 * padding - kernel) // stride + 1


def check_grid(x: Tensor, grid: tuple[int, int], prefix_tokens: int) -> None:
    """x has the tokens of the grid after its prefix tokens."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        fail("grid", "a pair of positive ints (h, w)", grid)
    for size in grid:
        if not isinstance(size, INTS) or isinstance(size, bool) or size < 1:
            fail("grid", "a pair of positive ints (h, w)", grid)
    if not isinstance(prefix_tokens, INTS) or isinstance(prefix_tokens, bool) or prefix_tokens < 0:
        fail("prefix_tokens", "an int >= 0", prefix_tokens)
    if x.shape[1] != prefix_tokens + grid[0] * grid[1]:
        tokens = f"h * w = {x.shape[1]} - {prefix_tokens}" if prefix_tokens else f"h * w = {x.shape[1]}"
        fail("grid", f"(h, w) with {tokens} tokens of x", tuple(grid))


def check_geometry(
    grid: tuple[int, int], kernel: int, stride: int, padding: int | None, part: str = ""
) -> tuple[int, int]:
    """A convolution that fits the padded grid; the grid of its result. ``part`` prefixes the names in errors."""
    if not isinstance(stride, INTS) or isinstance(stride, bool) or not 1 <= stride <= LARGEST:
        fail(f"{part}stride", f"an int from 1 to {LARGEST}", stride)
    padding = kernel // 2 if padding is None else padding
    if not isinstance(padding, INTS) or isinstance(padding, bool) or not 0 <= padding <= LARGEST:
        fail(f"{part}padding", f"an int from 0 to {LARGEST}, the same on all sides", padding)
    if min(grid) + 2 * padding < kernel:
        fail(f"{part}padding", f"enough for a kernel of {kernel} to fit the padded grid of {tuple(grid)}", padding)
    height, width = grid
    return out_size(height, kernel, stride, padding), out_size(width, kernel, stride, padding)

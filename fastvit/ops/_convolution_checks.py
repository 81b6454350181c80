"""Checks of arguments that the operators on token grids share; each error names the argument and what is accepted."""

from __future__ import annotations

from torch import Tensor

from fastvit.ops._checks import describe
from fastvit.ops._token_depthwise_conv_native import out_size
from fastvit.reference.functional import BatchNorm

__all__ = ["check_bias", "check_depthwise", "check_geometry", "check_grid", "check_linear", "check_norm", "check_x"]


def check_x(x: Tensor) -> None:
    """ValueError unless x is floating with three axes."""
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: got {describe(x)}, accepted is a floating tensor (B, P + h*w, C)")


def _check_weight(name: str, weight: Tensor, right: bool, accepted: str, x: Tensor) -> None:
    if not right:
        raise ValueError(f"{name}: got {describe(weight)}, accepted is a floating tensor {accepted}")
    if weight.device != x.device:
        raise ValueError(f"{name}: got {describe(weight)}, x is on {x.device}")


def check_depthwise(name: str, weight: Tensor, channels: int, x: Tensor) -> int:
    """The kernel size; ValueError unless the weight is floating (channels, 1, k, k) on x's device."""
    right = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 4
    if right:
        size, group, height, width = weight.shape
        right = size == channels and group == 1 and height == width >= 1
    _check_weight(name, weight, right, f"({channels}, 1, k, k)", x)
    return weight.shape[3]


def check_linear(name: str, weight: Tensor, inputs: int, x: Tensor) -> int:
    """How many channels it gives; ValueError unless the weight is floating (any, inputs) on x's device."""
    right = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2
    _check_weight(name, weight, right and weight.shape[1] == inputs, f"(O, {inputs})", x)
    return weight.shape[0]


def check_bias(name: str, bias: Tensor | None, channels: int, x: Tensor) -> None:
    """ValueError unless the tensor is None, or floating (channels,) on x's device."""
    if bias is None:
        return
    right = isinstance(bias, Tensor) and bias.is_floating_point() and bias.shape == (channels,)
    if not right or bias.device != x.device:
        raise ValueError(
            f"{name}: got {describe(bias)}, accepted beside x {describe(x)} is floating ({channels},) on its device"
        )


def check_norm(name: str, norm: BatchNorm | None, channels: int, x: Tensor) -> None:
    """ValueError unless the norm is None, or a BatchNorm over that many channels."""
    if norm is None:
        return
    if not isinstance(norm, BatchNorm):
        raise ValueError(f"{name}: got {type(norm).__name__}, accepted is BatchNorm.of(module) or None")
    for field, tensor in zip(BatchNorm._fields[:4], norm[:4], strict=True):
        check_bias(f"{name}.{field}", tensor, channels, x)
    if (norm.running_mean is None) != (norm.running_var is None) or (
        norm.running_mean is None and not norm.use_batch_stats
    ):
        raise ValueError(f"{name}: running_mean and running_var are both needed without use_batch_stats")


def check_grid(x: Tensor, grid: tuple[int, int], prefix_tokens: int) -> None:
    """ValueError unless x has the tokens of the grid behind its prefix tokens."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"grid: got {grid}, accepted is a pair of positive ints (h, w)")
    h, w = grid
    if prefix_tokens < 0:
        raise ValueError(f"prefix_tokens: got {prefix_tokens}, accepted is an int from 0")
    if x.shape[1] != prefix_tokens + h * w:
        behind = x.shape[1] - prefix_tokens
        raise ValueError(f"grid: {grid} has {h * w} tokens, x has {behind} behind {prefix_tokens} prefix tokens")


def check_geometry(
    x: Tensor,
    kernel: int,
    grid: tuple[int, int],
    stride: int,
    padding: int,
    prefix_tokens: int,
    residual: bool = False,
    part: str = "",
) -> None:
    """ValueError unless a convolution can go over the grid tokens of x. ``part`` stands before the names of numbers."""
    check_grid(x, grid, prefix_tokens)
    h, w = grid
    if isinstance(stride, (tuple, list)) or stride < 1:
        raise ValueError(f"{part}stride: got {stride}, accepted is an int from 1")
    if isinstance(padding, (tuple, list, str)):
        raise ValueError(f"{part}padding: got {padding!r}, accepted is an int from 0, the same on all sides")
    if padding < 0 or min(h, w) + 2 * padding < kernel:
        raise ValueError(
            f"{part}padding: got {padding}, a kernel of {kernel} does not fit into the padded grid of {grid}"
        )
    if residual and (out_size(h, kernel, stride, padding), out_size(w, kernel, stride, padding)) != (h, w):
        raise ValueError(
            f"residual: needs a convolution that keeps the grid {grid}; kernel {kernel}, stride {stride} and padding "
            f"{padding} do not"
        )

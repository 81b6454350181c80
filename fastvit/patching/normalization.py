"""A convolution that normalises images of values 0..255: with its weight over 255 std, of the image less 255 mean.

The mean is not made part of the bias: large sums would cancel there, at the cost of digits, and where a convolution
pads with zeros they stand for the mean. The image is converted once, by the subtraction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit.ops._operator import is_dynamo_compiling
from fastvit.ops._packing import derived

LEVELS = 255.0
"""The value of an image that counts as 1."""


class Normalization(NamedTuple):
    """Mean and standard deviation per channel, of images of values 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def offset(self, like: Tensor) -> Tensor:
        """255 mean, (C,), on like's device, in float32 or like's wider dtype."""
        return _vector([LEVELS * mean for mean in self.mean], torch.promote_types(like.dtype, torch.float32), like)

    def scaled(self, weight: Tensor) -> Tensor:
        """The weight (O, C, k, l) of a convolution over 255 std; the same tensor at each call while it is the same."""

        def divide(weight: Tensor) -> Tensor:
            factors = _vector([1.0 / (LEVELS * std) for std in self.std], torch.float64, weight)
            return (weight.double() * factors[:, None, None]).to(weight.dtype)

        trains = torch.is_grad_enabled() and weight.requires_grad
        return divide(weight) if trains or is_dynamo_compiling() else derived(weight, self, divide)


def _vector(values: list[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Filled on like's device, so that a CUDA graph may capture it."""
    return torch.stack([torch.full((), value, dtype=dtype, device=like.device) for value in values])


class NormalizingConv2d(nn.Conv2d):
    """A convolution of images of values 0..255, whose weight and bias are for normalised ones."""

    normalization: Normalization

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self._conv_forward(self.centred(input), self.normalization.scaled(self.weight), self.bias)

    def centred(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) less 255 mean, in the weight's dtype.

        Raises:
            ValueError: they are neither uint8 nor floating.
        """
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(f"x: expected images of values 0..255, uint8 or floating, got {x.dtype}")
        return (x - self.normalization.offset(self.weight)[:, None, None]).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mean={self.normalization.mean}, std={self.normalization.std}"

"""Helpers of the convolutional families' parity tests: parameters away from their initial values, relative errors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a value that shows when it is left out, or put in the wrong place."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel() if parameter.dim() != 3 else 1
            parameter.normal_(0, fan_in**-0.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.2)
        else:
            parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, name: str = "output") -> None:
    """Hold the relative error to ``tolerance``."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def assert_same_gradients(
    model: nn.Module,
    peer: nn.Module,
    rename: dict[str, str] | None = None,
    *,
    tolerance: float = 1e-5,
    floor: float = 1e-2,
) -> None:
    """Compare the gradient of every parameter of ``model`` with its peer's (``rename``: own name to the peer's).

    Relative to the largest value of that gradient, or to ``floor`` times the largest of the whole model where that is
    more: a gradient that is zero but for rounding (a bias in front of a BatchNorm, a key's bias) has no digits to
    compare, and in float32 those summed over many tokens behind a BatchNorm have few (``floor=1``).
    """
    theirs = dict(peer.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        expected = theirs[rename[name] if rename else name].grad
        size = max(float(expected.abs().max()), floor * largest)
        error = float((parameter.grad - expected).abs().max()) / size
        assert error <= tolerance, f"gradient of {name}: relative error {error:.2e} > {tolerance:.0e}"

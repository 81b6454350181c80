"""What the tests of recognition share: which operators a call runs, and the module in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.ops import _operator
from fastvit.patching import unpatch


def operators_in(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of a call, and the names of the operators that ran in it."""
    ran: list[str] = []

    def record(selection: _operator.Selection) -> None:
        ran.append(selection.op)

    with _operator.recording(record):
        return call(), ran


def in_float64(module: nn.Module) -> nn.Module:
    """A plain copy."""
    return unpatch(copy.deepcopy(module)).double()


def gradients(
    module: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and by name the gradients of the input and of every parameter, for fixed weights of the output.

    ``run`` stands for the module: it compiled.
    """
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = (module if run is None else run)(x)
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return out.detach(), {"x": x.grad, **found}

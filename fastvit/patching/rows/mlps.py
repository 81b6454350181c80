"""MLPs made of parts that every library names otherwise: which they are, and when the operator may stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.rows.parts import activation_name, check_activation, dropout_p, project
from fastvit.reference.overrides import is_plain, must_call, obstacles


class Layers(NamedTuple):
    """Linear, activation, linear, and the dropouts behind either linear.

    ``by_name``: whether a class called QuickGELU is taken for what the name says, since a trial shows whether it is.
    """

    fc1: Any
    activation: nn.Module
    fc2: Any
    dropouts: tuple[Any, ...] = ()
    by_name: bool = False

    def named_activation(self) -> str | None:
        """The operator's name of the activation; None where it has none."""
        layer = self.activation
        if self.by_name and type(layer).__name__ == "QuickGELU" and is_plain(layer, type(layer)):
            return "quick_gelu"
        return activation_name(layer)

    def reasons(self, *names: str) -> list[str]:
        """Why the operator does not stand for them; ``names`` are those of linear, activation and linear."""
        linears = ((names[0], self.fc1), (names[2], self.fc2))
        found = [f"{name} {obstacle}" for name, part in linears for obstacle in obstacles(part, nn.Linear)]
        if self.named_activation() is None:
            found += check_activation(names[1], self.activation)
        unknown = [part for part in self.dropouts if not is_plain(part, nn.Dropout, nn.Identity)]
        return found + [f"{part!r} is not a plain nn.Dropout without hooks" for part in unknown]

    def fusible(self) -> bool:
        """Whether the operator gives what calling them would, now, as far as they themselves tell."""
        if not (is_plain(self.fc1, nn.Linear) and is_plain(self.fc2, nn.Linear)):
            return False
        for part in self.dropouts:
            if not is_plain(part, nn.Dropout, nn.Identity) or (type(part) is nn.Dropout and dropout_p(part) > 0.0):
                return False
        return self.named_activation() is not None

    def run(self, x: Tensor, backend: str) -> Tensor:
        """The operator on them; only where they are fusible."""
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return ops.mlp(x, *weights, self.named_activation(), backend=backend)


class Found(NamedTuple):
    """An MLP among modules that are called one after the other: from ``begin`` up to ``end``."""

    begin: int
    layers: Layers
    end: int


def first_of(parts: Sequence[nn.Module]) -> Found | None:
    """The first linear layer with one module, beside dropouts, between it and the next linear layer."""
    begin = None
    for end, part in enumerate(parts):
        if not isinstance(part, nn.Linear):
            continue
        between: Sequence[nn.Module] = () if begin is None else parts[begin + 1 : end]
        dropouts = tuple(each for each in between if isinstance(each, (nn.Dropout, nn.Identity)))
        if begin is not None and len(between) == len(dropouts) + 1:
            activation = next(each for each in between if each not in dropouts)
            return Found(begin, Layers(parts[begin], activation, part, dropouts), end + 1)
        begin = end
    return None


def in_sequence(module: nn.Module, start: int = 0) -> Layers | None:
    """The layers that a Sequential holds from ``start`` on: linear, activation, (dropout), linear, (dropout).

    None where it is no plain Sequential of so many.
    """
    if not is_plain(module, nn.Sequential):
        return None
    layers = list(module.children())[start:]
    if len(layers) == 3:
        return Layers(*layers)
    if len(layers) == 5:
        return Layers(layers[0], layers[1], layers[3], (layers[2], layers[4]))
    return None


def project_in_sequence(module: nn.Module, x: Tensor, backend: str) -> Tensor:
    """module(x), for a linear layer that may stand in front of others in a Sequential, as ``parts.project`` has it."""
    if must_call(module, nn.Sequential):
        return project(module, x, backend)
    first, *others = module.children()
    x = project(first, x, backend)
    for layer in others:
        x = layer(x)
    return x

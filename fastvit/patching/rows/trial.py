"""Does an override give what a class of unknown origin gives? Found out by running both on a small input in float64.

A class may carry the attributes of a known one and still compute something else with them. The trial runs a copy of the
module with random weights, plain and fused (reference backend), in eval and in training mode, and compares outputs and
running statistics. Where dropouts stand is seen by letting each drop everything. The module itself is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.patching.fusion import Fused, fused_class, give, plain_class

TOLERANCE = 1e-9
"""Relative, in float64: a difference in meaning is larger by far, one in rounding smaller."""

Example = Callable[[nn.Module], tuple[Any, ...]]

_known: dict[object, list[str]] = {}
"""What trials gave; equal blocks of a model are tried once."""


def tried(module: nn.Module, override: type[Fused], example: Example, parts: Mapping[str, type[Fused]]) -> list[str]:
    """Reasons why the override does not give what the module's own forward gives.

    Args:
        module: plain, or fused already.
        override: what is to replace its methods.
        example: gives positional arguments for the forward, tensors in float64 on the CPU, for a module.
        parts: sub-modules that may be fused as well, by name, and their overrides; it is tried with them plain and
            fused.
    """
    key = (override, *parts.items(), *map(_settings, module.modules()))
    if key not in _known:
        _known[key] = _try(module, override, example, parts)
    return _known[key]


def _settings(part: nn.Module) -> tuple[object, ...]:
    """All that a module's results depend on, but for the numbers in its tensors; as text, where it is not code."""
    own = {name: value for name, value in vars(part).items() if name not in _OF_EVERY_MODULE}
    tensors = {**part._parameters, **part._buffers}
    shapes = {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}
    cls = plain_class(part)
    return cls, cls.forward, repr(own), repr(shapes), tuple(part._modules)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _try(module: nn.Module, override: type[Fused], example: Example, parts: Mapping[str, type[Fused]]) -> list[str]:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            plain = _random_copy(module)
            args = example(plain)
            for mode in _modes(plain):
                if not all(_agree(plain, override, args, fused_too) for fused_too in ({}, parts)):
                    return [f"{type(plain).__name__}.forward computes something else than the known one {mode}"]
    except Exception as error:  # the code under trial is not ours: whatever it raises is a reason to leave it alone
        return [f"{plain_class(module).__name__}.forward could not be tried: {type(error).__name__}: {error}"]
    return []


def _modes(module: nn.Module) -> Iterator[str]:
    """Puts the module into one mode after the other, and names it."""
    module.eval()
    yield "in eval mode"
    module.train()
    yield "in training"
    for name, part in module.named_modules():
        if isinstance(part, nn.Dropout):
            part.p = 1.0
            yield f"where {name} drops"
            part.p = 0.0


def _random_copy(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU without hooks, every parameter and buffer random, no dropout dropping."""
    double = copy.deepcopy(module).to("meta").to_empty(device="cpu").double()
    for part in double.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        if isinstance(part, Fused):
            give(part, plain_class(part))
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    for tensor in (*double.parameters(), *double.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)  # positive, as variances must be
            if tensor.dim() > 1:  # matrices keep the size of what they multiply, so that no softmax saturates
                tensor.sub_(1.0).mul_((12 * tensor.shape[0] / tensor.numel()) ** 0.5)
        else:
            tensor.zero_()
    return double


def _agree(plain: nn.Module, override: type[Fused], args: tuple[Any, ...], parts: Mapping[str, type[Fused]]) -> bool:
    fused, expected = copy.deepcopy(plain), copy.deepcopy(plain)
    for part, override_of_part in ((fused, override), *((fused.get_submodule(name), of) for name, of in parts.items())):
        give(part, fused_class(override_of_part, type(part)), "reference")
    results = [_tensors((module(*args), list(module.buffers()))) for module in (expected, fused)]
    return len(results[0]) == len(results[1]) and all(map(_equal, *results))


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _equal(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape:
        return False
    return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())

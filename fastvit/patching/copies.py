"""Copies of a model to run in its place: what is tried out leaves nothing on it and disturbs no other thread."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.patching.fusion import Fused, give, plain_class


def shared_copy(model: nn.Module, hooks: bool = True) -> nn.Module:
    """A copy whose parameters and buffers are the model's own, and its hooks too unless ``hooks`` leaves them out."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return _copied(model, hooks, {id(tensor): tensor for tensor in tensors})


def plain_copy(model: nn.Module, hooks: bool = True) -> nn.Module:
    """:func:`shared_copy` with every module plain."""
    twin = shared_copy(model, hooks)
    for module in twin.modules():
        if isinstance(module, Fused):
            give(module, plain_class(module))
    return twin


def float64_copy(model: nn.Module, hooks: bool = True) -> nn.Module:
    """A copy in float64; what was put over a forward, and is tied to the model itself, runs in the model's dtype."""
    dtype = next(
        (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.get_default_dtype()
    )
    double = _copied(model, hooks, {}).double()
    for module in double.modules():
        forward = vars(module).get("forward")
        # Copies share it, with whatever it holds; but a compiled module makes its own.
        if isinstance(forward, FunctionType) and "_orig_mod" not in module._modules:
            vars(module)["forward"] = functools.partial(_in_dtype, forward, dtype)
    return double


def _copied(model: nn.Module, hooks: bool, shared: dict[int, Any]) -> nn.Module:
    shared |= {id(hook): hook for each in _hooks(model) for hook in each.values()}
    twin = copy.deepcopy(model, shared)
    if not hooks:
        for each in _hooks(twin):
            each.clear()
        for module in twin.modules():  # transformers' own, which collect hidden states, are put on anew by a call
            vars(module).pop("_output_capturing_hooks_installed", None)
    return twin


def _hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                yield value


def _in_dtype(function: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, functools.partial(_converted, to=dtype), (args, kwargs))
    out = function(*args, **kwargs)
    return pytree.tree_map_only(Tensor, functools.partial(_converted, to=torch.float64), out)


def _converted(tensor: Tensor, to: torch.dtype) -> Tensor:
    return tensor.to(to) if tensor.is_floating_point() else tensor

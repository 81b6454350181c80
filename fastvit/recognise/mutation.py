"""Which calls may change a tensor's memory, and which memory that is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["asks_in_place", "may_change", "storages"]

_CHANGES = frozenset({"__setitem__", "__set__", "__delitem__", "__setstate__"})
_LAYS_OPEN = frozenset({"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "_typed_storage"})
"""After these the memory may be changed by code that torch does not see."""


@functools.lru_cache(1024)
def _by_name(func: Callable[..., Any]) -> bool:
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True  # a custom operator may change what it is given
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    return in_place or augmented or name in _CHANGES or name in _LAYS_OPEN


def _places_of_inplace() -> dict[Callable[..., Any], int]:
    found: dict[Callable[..., Any], int] = {}
    for name in dir(F):
        func = getattr(F, name, None)
        if inspect.isfunction(func):
            parameters = list(inspect.signature(func).parameters)
            if "inplace" in parameters:
                found[func] = parameters.index("inplace")
    return found


_INPLACE = _places_of_inplace()
"""By function, where its argument ``inplace`` stands."""


def asks_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether its argument ``inplace`` has a function change the first of its tensors."""
    place = _INPLACE.get(func)
    return bool(kwargs.get("inplace")) or (place is not None and len(args) > place and bool(args[place]))


def may_change(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may change, or lay open, the memory of one of its tensors."""
    if _by_name(func) or kwargs.get("out") is not None or asks_in_place(func, args, kwargs):
        return True
    if func is F.batch_norm:  # running statistics
        return bool(kwargs.get("training", args[5] if len(args) > 5 else False))
    return False


ANY = -1
"""Among addresses: memory of which it is not known where it lies."""


def storages(values: Any) -> set[int]:
    """Addresses of the memory behind all tensors among nested arguments; ANY for one that does not tell."""
    found: set[int] = set()
    _gather(values, found)
    found.discard(0)
    return found


def _gather(value: Any, found: set[int]) -> None:
    if isinstance(value, Tensor):
        if type(value) in (Tensor, torch.nn.Parameter):
            with torch._C.DisableTorchFunction():
                try:
                    found.add(value.untyped_storage().data_ptr())
                except (NotImplementedError, RuntimeError):  # sparse, or a wrapper of torch.func
                    found.add(ANY)
    elif isinstance(value, (tuple, list)):
        for each in value:
            _gather(each, found)
    elif isinstance(value, dict):
        for each in value.values():
            _gather(each, found)

"""Models of other libraries whose head reads the first tokens alone: their last block computes those at inference.

The model runs as it is written. While it does, its last block is asked for so many tokens; a block that does not run
whole then gives all of them, which is the same to the head.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastvit.ops._operator import is_dynamo_compiling
from fastvit.patching.fusion import names_used, plain_class
from fastvit.patching.rows.blocks import whole_backend

_asked: contextvars.ContextVar[tuple[nn.Module, int] | None] = contextvars.ContextVar("asked", default=None)


_all: contextvars.ContextVar[bool] = contextvars.ContextVar("all", default=False)


@contextlib.contextmanager
def all_tokens() -> Iterator[None]:
    """Within it every block computes every token."""
    token = _all.set(True)
    try:
        yield
    finally:
        _all.reset(token)


def count_asked(block: nn.Module) -> int | None:
    """How many tokens of a block's output are read; None: all may be."""
    if is_dynamo_compiling():
        return None
    asked = _asked.get()
    return asked[1] if asked is not None and asked[0] is block else None


def run_for_first(model: Any, block: nn.Module, count: int, *args: Any) -> Tensor:
    """The model's plain forward, which reads ``count`` tokens of the last block."""
    token = _asked.set((block, count))
    try:
        return plain_class(model).forward(model, *args)
    finally:
        _asked.reset(token)


def may_ask(model: nn.Module, x: Tensor, methods: tuple[str, ...]) -> str | None:
    """The backend, where the model may ask its last block for a part: at inference, with its own methods; else None."""
    if is_dynamo_compiling() or _all.get():
        return None
    plain: Any = plain_class(model)
    if any(getattr(plain, name) is not method for name, method in zip(methods, _methods(plain, methods), strict=True)):
        return None
    return whole_backend(model, x) if model.__dict__.keys().isdisjoint(methods) else None


@functools.cache
def _methods(plain: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """As they were when the model was patched, before anybody replaces them."""
    return tuple(getattr(plain, name) for name in names)


def check_methods(model: nn.Module, methods: tuple[str, ...], known_names: frozenset[str]) -> list[str]:
    """Why a model's methods may read more than the first tokens: they use names that are not known."""
    plain: Any = plain_class(model)
    found = []
    for name, method in zip(methods, _methods(plain, methods), strict=True):
        unknown = sorted(names_used(method.__code__) - known_names)
        if unknown:
            found.append(f"{plain.__name__}.{name} of this version uses {', '.join(unknown)}, which is not known")
    return found

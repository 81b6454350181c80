"""Models of other libraries whose head reads the first tokens alone: their last block computes those at inference.

The block finds out who called it: where it stands last in a known model, and nothing but that model's own forward, and
torch's calls of modules without hooks, lies between the two. So ``forward_features``, a wrapper, a hook on what is
around the block, and a class of one's own get all tokens, and the model itself keeps its class.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from fastvit.ops._operator import is_dynamo_compiling
from fastvit.patching.fusion import names_used, plain_class


class Head(NamedTuple):
    """What reads the tokens of a model's last block.

    Attributes:
        methods: of the model's class, as they were when it was first seen.
        between: the code of those functions that may stand between the model's forward and the block.
        blocks: the path of the nn.Sequential in which the block stands last; None where the model calls it itself.
        reads: given the model and the block, how many tokens are read; None: all may be.
    """

    methods: dict[str, Any]
    between: frozenset[CodeType]
    blocks: str | None
    reads: Callable[[Any, nn.Module], int | None]


_CALLS = frozenset(function.__code__ for function in (nn.Module._call_impl, nn.Module._wrapped_call_impl))
"""How torch calls a module that has no hooks."""
_SEQUENTIAL = nn.Sequential.forward.__code__
_heads: dict[tuple[CodeType, type], Head | None] = {}
"""By the code of a forward and the plain class of its module: None where that is no known model."""
_all: contextvars.ContextVar[bool] = contextvars.ContextVar("all", default=False)


@contextlib.contextmanager
def all_tokens() -> Iterator[None]:
    """Within it every block computes every token."""
    token = _all.set(True)
    try:
        yield
    finally:
        _all.reset(token)


def count_read(block: nn.Module, know: Callable[[Any], Head | None]) -> int | None:
    """How many of the first tokens are read of what a block gives, whose forward calls this; None: all may be.

    Args:
        know: given a model of any class, its Head; None where it is not known.
    """
    if is_dynamo_compiling() or _all.get():
        return None
    frame: FrameType | None = sys._getframe(2)
    passed: list[CodeType] = []
    holders: list[Any] = []
    while frame is not None and len(passed) < 3:
        code = frame.f_code
        if code is _SEQUENTIAL:
            holders.append(_module_of(frame))
        elif code not in _CALLS:
            model = _module_of(frame)
            head = None if model is None else _head_of(model, code, know)
            if head is not None:
                as_known = head.between.issuperset(passed) and _stands_last(head, model, block, holders)
                return _count(head, model, block) if as_known else None
            passed.append(code)
        frame = frame.f_back
    return None


def _module_of(frame: FrameType) -> nn.Module | None:
    """The module whose forward a frame is; None of any other function."""
    code = frame.f_code
    model = frame.f_locals.get(code.co_varnames[0]) if code.co_name == "forward" and code.co_varnames else None
    return model if isinstance(model, nn.Module) else None


def _head_of(model: nn.Module, code: CodeType, know: Callable[[Any], Head | None]) -> Head | None:
    plain = plain_class(model)
    key = code, plain
    if key not in _heads:
        _heads[key] = know(model) if getattr(plain.forward, "__code__", None) is code else None
    return _heads[key]


def _stands_last(head: Head, model: nn.Module, block: nn.Module, holders: list[Any]) -> bool:
    """Whether a block is called from where it stands last; one that stands among the others, too, does not count."""
    if head.blocks is None:
        return not holders
    if len(holders) != 1 or holders[0] is not model.get_submodule(head.blocks):
        return False
    *others, last = holders[0]._modules.values()
    return last is block and not any(other is block for other in others)


def _count(head: Head, model: Any, block: nn.Module) -> int | None:
    plain = plain_class(model)
    own = any(getattr(plain, name, None) is not method for name, method in head.methods.items())
    if own or not model.__dict__.keys().isdisjoint(head.methods):
        return None
    return None if model.training else head.reads(model, block)


def methods_of(plain: Any, names: tuple[str, ...], known_names: frozenset[str]) -> dict[str, Any] | None:
    """A class's methods of these names; None where one is not the library's, or not of a version that was read."""
    found = {name: getattr(plain, name) for name in names}
    library = plain.__module__.partition(".")[0]
    for method in found.values():
        theirs = getattr(method, "__module__", "").partition(".")[0] == library and hasattr(method, "__code__")
        if not theirs or method.__code__.co_freevars or not names_used(method.__code__) <= known_names:
            return None
    return found

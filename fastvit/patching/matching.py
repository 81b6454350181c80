"""Which modules can be fused, and why a module that looks like one cannot.

A module is known by the class it is an instance of (itself, or the nearest base class that was registered or stands in
a library's table), else by what it holds and computes (:mod:`fastvit.patching.rows.research`); and then by its
structure: a changed, overridden or hooked class is left alone with a reason, never fused by guess.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from fastvit.patching import register
from fastvit.patching.deferral import OVERRIDES, Recognised
from fastvit.patching.fusion import Row, fused_class, holds_own_method, names_used, parts_of, plain_class
from fastvit.patching.rows import TABLES, research
from fastvit.reference.overrides import is_own, obstacles

_LOOKS_LIKE_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_LOOKS_LIKE_MLP = re.compile(r"mlp|glu$|feed_?forward|ffn", re.IGNORECASE)
_PROJECTIONS = ("qkv", "to_qkv", "in_proj", "qk", "q", "to_q", "q_proj", "query")
_HEADS = ("num_heads", "heads", "n_heads", "num_attention_heads")


class Match(NamedTuple):
    """A module of a known class; ``reasons`` say why it is left alone (none: ``fused`` is the class to give it)."""

    row: Row
    fused: type[nn.Module] | None
    reasons: list[str]


@functools.cache
def _rows() -> dict[str, list[Row]]:
    """The rows of each class path."""
    rows: dict[str, list[Row]] = {}
    for row in itertools.chain(*TABLES):
        rows.setdefault(row.path, []).append(row)
    return rows


def supported() -> list[str]:
    """The classes that can be fused."""
    own = [row.path for row in register.REGISTERED.values()]
    return sorted({*_rows(), *own}) + [row.path for row in research.ROWS]


def operators() -> list[str]:
    """The operators that some row calls, or that take what is recognised."""
    return sorted({*OVERRIDES, *(row.op for row in itertools.chain(*TABLES))})


def recognise(module: nn.Module) -> Match | None:
    """What can be fused about a module, or None where its class is not known. A fused module is seen as it was."""
    plain = plain_class(module)
    if isinstance(module, Recognised):  # by what it computes, since an example or a call told
        return Match(
            Row(plain.__qualname__, OVERRIDES[module.fastvit_op]), fused_class(OVERRIDES[module.fastvit_op], plain), []
        )
    for known in plain.__mro__:
        for row in _rows_of(known):
            if row.applies(module):
                return _match(module, plain, known, row)
    for row in research.ROWS:
        if row.applies(module):
            return _match(module, plain, _definer(plain, "forward"), row)
    return None


def _rows_of(known: type) -> list[Row]:
    registered = register.REGISTERED.get(known)
    return [registered] if registered else _rows().get(f"{known.__module__}.{known.__qualname__}", [])


def _match(module: nn.Module, plain: type[nn.Module], known: type, row: Row) -> Match:
    reasons = list(_reasons(module, plain, known, row))
    return Match(row, None if reasons else fused_class(row.override, plain), reasons)


def _definer(plain: type, name: str) -> type:
    """The class among a class and its bases whose method it is."""
    return next(known for known in plain.__mro__ if name in vars(known))


def _reasons(module: nn.Module, plain: type, known: type, row: Row) -> Iterator[str]:
    """Why this module of a known class is not to be fused; structure is only looked at where the class is unchanged."""
    changed = list(_changed(module, plain, known, row))
    yield from changed
    if changed:
        return
    found = []
    for path, expected in parts_of(row.override.fastvit_reads):
        part: Any = module
        for name in path:
            part = getattr(part, "_modules", {}).get(name)
        found += [f"{'.'.join(path)} {obstacle}" for obstacle in obstacles(part, *expected)]
    yield from found
    yield from row.check(module)


def _changed(module: nn.Module, plain: type, known: type, row: Row) -> Iterator[str]:
    """How the methods to be replaced, or the forward around them, differ from the known ones."""
    replaced = row.methods()
    for name in sorted(replaced | {"forward"}):
        if name in vars(module) and not holds_own_method(module, name):
            yield f"{name} was replaced on the instance"
            continue
        method = inspect.getattr_static(plain, name)
        if method is not inspect.getattr_static(known, name):
            if name in replaced or not _keeps(method, replaced):
                yield f"{plain.__name__} overrides {name}"
        elif row.known_names is not None:
            yield from _foreign_method(known, name, method, row.known_names)
        elif known not in register.REGISTERED and not is_own(method, known, name):
            yield f"{known.__name__}.{name} was replaced by {method!r}"


def _keeps(forward: object, replaced: set[str]) -> bool:
    """Whether a subclass's own forward still comes to the methods that fusing replaces: by name, or through super()."""
    code = getattr(forward, "__code__", None)
    names = set() if code is None else names_used(code)
    return replaced <= names or {"super", "forward"} <= names


def _foreign_method(known: type, name: str, method: object, known_names: frozenset[str]) -> Iterator[str]:
    code = getattr(method, "__code__", None)
    if code is None or getattr(method, "__module__", None) != known.__module__:
        yield f"{known.__name__}.{name} was replaced by {method!r}"
        return
    unknown = sorted(names_used(code) - known_names)
    if unknown:
        yield f"{known.__name__}.{name} of this version uses {', '.join(unknown)}, which is not known"


ATTENTION, CONVOLUTION, MLP, LINEAR = "attention", "convolution", "mlp", "linear"
"""What a block is, known or not."""


def kind_of(op: str) -> str:
    """What the blocks are that an operator stands in."""
    if op.endswith(MLP):
        return MLP
    if op == LINEAR:
        return op
    return ATTENTION if ATTENTION in op else CONVOLUTION


def looks_like(module: nn.Module) -> str | None:
    """The kind that an unknown module seems to be of, so that a report should name it; None where it is of none."""
    if isinstance(module, nn.Conv2d):
        return CONVOLUTION if 1 < module.groups == module.in_channels else None
    name = plain_class(module).__name__
    if _LOOKS_LIKE_ATTENTION.search(name) or _projects_heads(module):
        return ATTENTION
    if isinstance(module, nn.Sequential):
        return MLP if sum(isinstance(part, nn.Linear) for part in module) > 1 else None
    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    return MLP if len(layers) > 1 and _LOOKS_LIKE_MLP.search(name) else None


def _projects_heads(module: nn.Module) -> bool:
    """Whether it counts heads and holds, itself, the layer that makes queries."""
    counts = any(isinstance(getattr(module, name, None), int) for name in _HEADS)
    return counts and any(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)

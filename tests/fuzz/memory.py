"""Tensors described in one line, and laid out in memory that an out-of-bounds access cannot leave unnoticed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Spec:
    """A tensor to be: where its elements lie, and what they hold.

    ``values`` is a name of :func:`_values`, with an argument behind a colon where it takes one. ``at_end``: the guard
    page is right behind the last element, otherwise right before the first one of the storage.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: str
    strides: tuple[int, ...]
    offset: int
    at_end: bool
    seed: int

    def __str__(self) -> str:
        contiguous = torch.empty(self.shape, device="meta").stride() == self.strides
        layout = "" if contiguous else f" strides {self.strides}"
        layout += f" offset {self.offset}" if self.offset else ""
        values = "" if self.values == "normal" else f" {self.values}"
        return f"<{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{values}{layout}>"

    __repr__ = __str__

    @property
    def numel(self) -> int:
        size = 1
        for axis in self.shape:
            size *= axis
        return size

    def storage_and_tensor(self, redraw: int = 0) -> tuple[Tensor, Tensor]:
        """The whole storage, NaN where the tensor has no element, and the tensor; ``redraw``: other random values."""
        length = 0 if self.numel == 0 else self.offset + 1 + _span(self.shape, self.strides)
        storage = guarded(max(length, 1), self.dtype, self.at_end or length == 0)
        storage.fill_(True if self.dtype == torch.bool else torch.nan)
        # A tensor of no elements starts at the guard page.
        tensor = storage.as_strided(self.shape, self.strides, self.offset if length else 1)
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * redraw)
        shape = tuple(1 if stride == 0 else size for size, stride in zip(self.shape, self.strides, strict=True))
        if length:
            # An expanded axis is written once.
            storage.as_strided(shape, self.strides, self.offset).copy_(_values(self, shape, generator))
        return storage, tensor


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def guarded(count: int, dtype: torch.dtype, at_end: bool) -> Tensor:
    """``count`` elements between two pages that must not be touched, adjacent to the second one or to the first."""
    size = count * dtype.itemsize
    inner = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + PAGE + inner):
        if _LIBC.mprotect(ctypes.c_void_p(guard), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=PAGE + (inner - size if at_end else 0))


def _values(spec: Spec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """In float64, or bool."""
    kind, _, argument = spec.values.partition(":")
    if spec.dtype == torch.bool:
        return _mask(kind, argument, shape, generator)
    limits = torch.finfo(spec.dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind in ("nan", "inf", "-inf"):  # in a few places
        x.flatten()[torch.randint(x.numel(), (int(argument),), generator=generator)] = float(kind)
        return x
    if kind == "tail":  # rows of the last axis but one: "tail:nan,3"
        value, _, count = argument.partition(",")
        x[..., max(0, x.shape[-2] - int(count)) :, :] = float(value)
        return x
    if kind == "keys":  # elements of the last axis
        value, _, count = argument.partition(",")
        x[..., max(0, x.shape[-1] - int(count)) :] = float(value)
        return x
    if kind == "masking":  # a bias that is -inf at random
        return x.masked_fill(torch.rand(shape, generator=generator) < float(argument), -torch.inf)
    return {
        "normal": lambda: x,
        "scaled": lambda: x * float(argument),
        "offset": lambda: x + float(argument),
        "constant": lambda: x.flatten()[0].expand(shape),
        "zero": lambda: x * 0,
        "positive": lambda: x.abs() + 0.5,
        "huge": lambda: x * limits.max**0.5,
        "denormal": lambda: x * limits.tiny / 4,
        "near identity": lambda: 0.2 * x + torch.eye(*shape[-2:], dtype=torch.float64),
    }[kind]()


def _mask(kind: str, argument: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    draws = torch.rand(shape, generator=generator)
    if kind == "keys":  # the last so many are masked
        draws.fill_(0.0)[..., max(0, shape[-1] - int(argument)) :] = 1.0
        return draws < 0.5
    allowed = draws < float(argument)
    if kind == "rows":  # of queries, some of them fully masked
        allowed &= torch.rand((*shape[:-1], 1), generator=generator) < 0.7
    return allowed


def is_node(value: Any) -> bool:
    """Whether the value is a named tuple, as BatchNorm and Projection are."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def mapped(tree: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """The tree of dicts and named tuples with ``function(path, leaf)`` for each leaf."""
    if isinstance(tree, dict):
        return {name: mapped(value, function, name) for name, value in tree.items()}
    if is_node(tree):
        return type(tree)(*(mapped(v, function, f"{path}.{name}") for name, v in zip(tree._fields, tree, strict=True)))
    return function(path, tree)


def leaves(tree: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """The leaves of a kind, with their paths."""
    found: list[tuple[str, Any]] = []
    mapped(tree, lambda path, leaf: found.append((path, leaf)) if isinstance(leaf, kind) else None)
    return iter(found)

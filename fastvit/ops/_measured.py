"""Which of several kernels for a GPU is the faster for a shape: measured once, at inference, and remembered on disk.

Where a call has more than one implementation on a GPU (CUDA and Triton), which one wins depends on the chip and the
shape. :func:`fastest_first` times them on the call itself, as ``kernels/_tuning.py`` times configurations, and puts the
winner in front. Where measuring is unwanted or impossible the given order stands: off the GPU, under a named backend,
while gradients or batch statistics are needed (a run would move running statistics), while a graph is traced, exported
or captured, under ``torch.use_deterministic_algorithms``, with ``FASTVIT_AUTOTUNE=0``, and without Triton.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastvit.ops._dispatch import AUTO, Implementation, gradients_needed, left_out, must_be_plain
from fastvit.reference.functional import BatchNorm

__all__ = ["fastest_first", "unmeasured"]

CANDIDATES = ("cuda", "triton")
_OF_THE_INPUT = ("grid", "prefix_tokens")
"""Fields of a call that change with the images: the number of tokens stands for them."""

_unmeasured: contextvars.ContextVar[bool] = contextvars.ContextVar("unmeasured", default=False)


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Within it this thread measures nothing: for a question about the choice that is to compute nothing."""
    token = _unmeasured.set(True)
    try:
        yield
    finally:
        _unmeasured.reset(token)


def fastest_first(
    op: str, implementations: tuple[Implementation, ...], backend: str, x: Tensor, call: Any
) -> tuple[Implementation, ...]:
    """The implementations, the fastest that takes the call on this GPU in front.

    Args:
        op: the operator's name.
        implementations: in the order that stands where nothing is measured; each takes ``call`` alone.
        backend: what the caller asked for.
        x: the tensor (B, N, C) of the call that is computed on.
        call: a NamedTuple of tensors, norms, plain values and further such calls.
    """
    if backend != AUTO or x.device.type != "cuda" or torch.compiler.is_compiling() or must_be_plain():
        return implementations
    if _unmeasured.get() or not x.numel() or _trains(call):
        return implementations
    able = [each for each in implementations if each.name in CANDIDATES and _takes(each, call)]
    if len(able) < 2:
        return implementations
    runs = {each.name: each.run for each in able}
    with torch.cuda.device_of(x):
        (name,) = _tuning().choose(
            op, (_dtype(x), *_key(call)), [(name,) for name in runs], lambda candidate: runs[candidate[0]](call)
        )
    return tuple(sorted(implementations, key=lambda each: each.name != name))


def _takes(implementation: Implementation, call: Any) -> bool:
    return not left_out(implementation.name) and not implementation.reasons(call)


def _tuning() -> Any:
    """Imported when there is a candidate in Triton, and so Triton."""
    return importlib.import_module("fastvit.autotune")


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _trains(call: Any) -> bool:
    for value in call:
        if isinstance(value, BatchNorm):
            if value.use_batch_stats or gradients_needed(*value[:4]):
                return True
        elif isinstance(value, Tensor):
            if gradients_needed(value):
                return True
        elif hasattr(value, "_fields") and _trains(value):
            return True
    return False


def _key(call: Any) -> list[Any]:
    """What the times depend on: sizes and settings, of the tokens how many there are, about."""
    found: list[Any] = []
    for name, value in zip(call._fields, call, strict=True):
        if isinstance(value, BatchNorm):
            found.append(name)
        elif hasattr(value, "_fields"):
            found += _key(value)
        elif isinstance(value, Tensor):
            sizes = value.shape
            if value.dim() == 3:  # tokens (B, N, C)
                sizes = (_tuning().token_bucket(sizes[0] * sizes[1]), sizes[2])
            found += [str(value.dtype), *sizes]
        elif name not in _OF_THE_INPUT:
            found.append(str(value))
    return found

"""Timing of calls on inputs that no cache still holds, by memory that stays in the process."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastvit.patching.timing import interleaved


def keep_memory() -> None:
    """Have glibc's allocator keep freed memory for the rest of the process; elsewhere do nothing.

    Otherwise a candidate is charged with page faults for the memory that its predecessor had the allocator return to
    the system, and they take longer than a small operator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def unchanged(argument: Any) -> Any:
    """The preparation of an input that needs none."""
    return argument


def on_inputs(
    calls: Sequence[Callable[[Any], Any]],
    inputs: Sequence[Any],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    prepare: Sequence[Callable[[Any], Any]] | None = None,
) -> list[list[float]]:
    """Seconds of each call in each round, by :func:`fastvit.patching.timing.interleaved`.

    Args:
        calls: the candidates; each takes one argument.
        inputs: used in turn, one a call, so that no call finds its own or another's input in the cache.
        warmup: rounds that are run but not counted.
        prepare: one function a candidate, which makes, untimed, the argument of its next call from the next input.
    """
    prepare = [unchanged] * len(calls) if prepare is None else prepare
    following, argument = itertools.cycle(inputs), None

    def take(candidate: int) -> None:
        nonlocal argument
        argument = prepare[candidate](next(following))

    on_argument = [lambda call=call: call(argument) for call in calls]
    return interleaved(on_argument, torch.device(device), rounds=rounds, warmup=warmup, prepare=take)

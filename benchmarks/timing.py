"""Timing that survives a noisy machine: candidates take turns within one run, medians and spread are kept."""

from __future__ import annotations

import ctypes
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def _seconds(call: Callable[[Any], Any], argument: Any, device: torch.device) -> float:
    """Wall time of one call, device work included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call(argument)
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call(argument)
    return time.perf_counter() - begin


def keep_memory() -> None:
    """Have glibc's allocator keep what is given back to it, for as long as the process lives; elsewhere, do nothing.

    Otherwise a candidate is timed with the page faults of whatever the one in front of it made the allocator give away,
    which take longer than a small operator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def as_it_is(argument: Any) -> Any:
    """The preparation of what needs none."""
    return argument


def interleaved(
    calls: Sequence[Callable[[Any], Any]],
    arguments: Sequence[Any],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    prepare: Sequence[Callable[[Any], Any]] | None = None,
) -> list[list[float]]:
    """Time ``calls`` in turn, ``rounds`` times each.

    Args:
        calls: the candidates; each is called with one argument.
        arguments: inputs, which take turns call by call, so that none meets its own in the cache, nor another's.
        warmup: rounds that are run and not counted.
        prepare: one per candidate, run untimed in front of each of its calls, which gets what this makes of the input.

    Returns:
        A list of seconds per candidate, one entry a round; entry i of every list belongs to the same round. The order
        within a round is drawn, so that none always finds the caches as the same other one leaves them.
    """
    device = torch.device(device)
    prepare = [as_it_is] * len(calls) if prepare is None else prepare
    seconds: list[list[float]] = [[] for _ in calls]
    order, draws = list(range(len(calls))), random.Random(0)
    for turn in range(-warmup, rounds):
        draws.shuffle(order)
        for place, i in enumerate(order, turn * len(order)):
            elapsed = _seconds(calls[i], prepare[i](arguments[place % len(arguments)]), device)
            if turn >= 0:
                seconds[i].append(elapsed)
    return seconds

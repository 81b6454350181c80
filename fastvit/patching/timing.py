"""Timing on a noisy machine: candidates take turns within one run, so that every round compares like with like."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 200
TOLERATED = 1.02
"""Slower by less than this is within what repeated measurements of one candidate differ by."""


class Times(NamedTuple):
    """Seconds of a fused and a plain run: medians, and the quartiles of fused / plain over the rounds."""

    fused: float
    plain: float
    ratios: tuple[float, float, float]

    @property
    def loses(self) -> bool:
        """Whether the fused one is slower: by its median, and in three rounds of four."""
        low, middle, _ = self.ratios
        return middle > TOLERATED and low > 1.0

    @classmethod
    def of(cls, fused: Sequence[float], plain: Sequence[float]) -> Times:
        """From the seconds of each round."""
        ratios = [mine / other for mine, other in zip(fused, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return cls(statistics.median(fused), statistics.median(plain), (low, middle, high))


def interleaved(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int | None = None,
    budget: float = 0.3,
    prepare: Callable[[int], object] | None = None,
    warmup: int = 2,
) -> list[list[float]]:
    """Seconds of each call in each round; entry i of every list belongs to round i.

    The order within a round is random, so that no candidate always finds the caches as the same other one left them.

    Args:
        calls: the candidates.
        device: where they run; each call is waited for.
        rounds: as many as fit into ``budget`` seconds by default, from 7 to 200.
        prepare: called, untimed, with a candidate's index before each of its calls.
        warmup: rounds that are run but not counted.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    draws = random.Random(0)

    def play() -> list[float]:
        elapsed = [0.0] * len(calls)
        for i in draws.sample(range(len(calls)), len(calls)):
            if prepare is not None:
                prepare(i)
            elapsed[i] = _seconds(calls[i], device)
        return elapsed

    for _ in range(max(1, warmup)):
        last = play()
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / max(sum(last), 1e-9))))
    for _ in range(rounds):
        for record, elapsed in zip(seconds, play(), strict=True):
            record.append(elapsed)
    return seconds


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, work on the device included."""
    _wait_for(device)
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def readable(seconds: float) -> str:
    """A time with its unit, to three digits: "1.31 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    raise AssertionError("unreachable")

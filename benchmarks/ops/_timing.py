"""Shared by the benchmarks of operators: candidates take turns within one run; medians and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.timing import on_inputs, unchanged

Call = Callable[[Any], Any]
FRESH_BYTES = 64 << 20  # more than most caches hold
FRESH_COPIES = 32


class Measured(NamedTuple):
    """Milliseconds of one call: the median of the rounds, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def _measured(seconds: list[float], repeats: int) -> Measured:
    per_call = sorted(1e3 * value / repeats for value in seconds)
    low, high = (per_call[round(share * (len(per_call) - 1))] for share in (0.2, 0.8))
    return Measured(statistics.median(per_call), low, high)


def _each(call: Call) -> Call:
    def run(inputs: Sequence[Any]) -> None:
        for one in inputs:
            call(one)

    return run


def _all(prepare: Call) -> Call:
    """Prepare every input of a round before its first call."""
    return lambda inputs: list(map(prepare, inputs))


def fresh(make: Callable[[], Any], size: int) -> list[Any]:
    """Inputs of ``size`` bytes each for :func:`compare`, so many that each has left the caches when its turn comes.

    There are at most ``FRESH_COPIES``, so that small ones may still be in an outer cache.
    """
    return [make() for _ in range(max(2, min(FRESH_COPIES, FRESH_BYTES // max(1, size))))]


def compare(
    calls: Mapping[str, Call],
    inputs: Sequence[Any],
    *,
    rounds: int = 30,
    repeats: int = 1,
    device: torch.device | str = "cpu",
    prepare: Mapping[str, Call] | None = None,
) -> dict[str, Measured]:
    """Time the candidates in turn, ``rounds`` times each, in random order.

    A round is the average of ``repeats`` calls, each on the next of ``inputs``. For the candidates that it names,
    ``prepare`` makes the argument of each call from the input, untimed, before the round.
    """
    groups = [[inputs[(i * repeats + j) % len(inputs)] for j in range(repeats)] for i in range(len(inputs))]
    first = [_all(prepare[name]) if prepare and name in prepare else unchanged for name in calls]
    timed = list(map(_each, calls.values()))
    seconds = on_inputs(timed, groups, rounds=rounds, device=device, warmup=3, prepare=first)
    return {name: _measured(times, repeats) for name, times in zip(calls, seconds, strict=True)}

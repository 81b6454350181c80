"""What the benchmarks of single operators share: candidates in turn within one run, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.timing import interleaved

Call = Callable[[], Any]


class Measured(NamedTuple):
    """Milliseconds of one call: the median of the rounds, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def _measured(seconds: list[float], repeats: int) -> Measured:
    per_call = sorted(1e3 * value / repeats for value in seconds)
    low, high = (per_call[round(share * (len(per_call) - 1))] for share in (0.2, 0.8))
    return Measured(statistics.median(per_call), low, high)


def _repeated(call: Call, repeats: int) -> Callable[[None], None]:
    def run(_: None) -> None:
        for _ in range(repeats):
            call()

    return run


def compare(
    calls: Mapping[str, Call], *, rounds: int = 30, repeats: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Measured]:
    """Time the candidates in turn, ``rounds`` times each; a round averages over ``repeats`` calls."""
    seconds = interleaved(
        [_repeated(call, repeats) for call in calls.values()], [None], rounds=rounds, device=device, warmup=3
    )
    return {name: _measured(times, repeats) for name, times in zip(calls, seconds, strict=True)}


def is_accurate(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    """At most twice the plain result's own error against float64, plus a few units in the last place."""
    error, own = ((tensor.double() - exact).abs().max() for tensor in (got, plain))
    return bool(error <= 2 * own + 4 * torch.finfo(got.dtype).eps * exact.abs().max())

"""What calls take on a GPU: time, by kernel too, and memory. On a CPU they try the benchmarks themselves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from fastvit import autotune
from fastvit.patching.timing import interleaved

PROFILED = 8
"""Kernels listed."""


def compare(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds of each candidate, in turn, in random order: the median, and the 20th and 80th percentile.

    All are in one process, and on the same tensors. On a GPU replays of CUDA graphs are timed, where calls can be
    captured, so that the host's time is not.
    """
    timed, repeats = list(calls.values()), 1
    if device.type == "cuda":
        timed, repeats = [autotune.replayed(call) for call in timed], autotune.CALLS_A_GRAPH
    seconds = [[each / repeats for each in rounds] for rounds in interleaved(timed, device, rounds=rounds, warmup=3)]
    times = {}
    for name, each in zip(calls, seconds, strict=True):
        low, high = (1e3 * sorted(each)[round(share * (len(each) - 1))] for share in (0.2, 0.8))
        times[name] = {"median": 1e3 * statistics.median(each), "low": low, "high": high}
    return times


def device_kernels(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Microseconds of one call by kernel of the device (on a CPU, by operator); the slowest few."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    times = {
        event.key[:120]: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    return dict(sorted(times.items(), key=lambda item: -item[1])[:PROFILED])


def peak_mebibytes(call: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Memory that is allocated before a call, and its peak during the call; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return {"held": held / 2**20, "peak": torch.cuda.max_memory_allocated(device) / 2**20}


def refusal(error: Exception, device: torch.device) -> str:
    """Why a candidate cannot run, from what it raised.

    Raises:
        RuntimeError: it left the GPU so that nothing can run in this process any more, as an illegal access does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]

"""Choosing a launch configuration by measuring each candidate once, on the device it will run on.

A kernel lists few configurations, the first of which is right everywhere. :func:`choose` times them the first time a
key is met on a GPU, and remembers the fastest: in memory, and on disk for the processes to come, one small JSON file a
key, so that processes that measure at the same time cannot damage each other's results.

The first configuration is taken unmeasured where measuring is impossible or unwanted: off the GPU, while a CUDA graph
is captured, while torch.compile traces, and under ``torch.use_deterministic_algorithms``, where the result must not
depend on what a stopwatch said.

Environment:
    FASTVIT_AUTOTUNE    0 pins the first configuration of every kernel; 1 (the default) measures. Read at import.
    FASTVIT_CACHE_DIR   where results are kept; by default ``fastvit`` in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from fastvit import backends
from fastvit._version import __version__

__all__ = ["cache_directory", "choose", "multiprocessors", "token_bucket"]

Configuration = TypeVar("Configuration", bound="tuple[Any, ...]")

WARMUP_RUNS = 3
ROUNDS = 9
MULTIPROCESSORS_OF_NO_GPU = 4
"""What the interpreter is taken for: few programs, since each takes its time."""

_chosen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_measuring = threading.RLock()


def _enabled(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTVIT_AUTOTUNE: got {value!r}, accepted are '0' and '1'")
    return value != "0"


ENABLED = _enabled(os.environ.get("FASTVIT_AUTOTUNE", ""))


def token_bucket(tokens: int) -> int:
    """The power of two at or above a token count, 16 at least: counts that share it share a configuration."""
    return max(16, 1 << max(tokens - 1, 0).bit_length())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side at least."""
    if device.type != "cuda":
        return MULTIPROCESSORS_OF_NO_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def cache_directory() -> Path:
    """Where measured results are kept: FASTVIT_CACHE_DIR, or ``fastvit`` in the user's cache directory."""
    if chosen := os.environ.get("FASTVIT_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fastvit"


def choose(
    kernel_name: str,
    key: tuple[Hashable, ...],
    configurations: Sequence[Configuration],
    run: Callable[[Configuration], object],
) -> Configuration:
    """The configuration to launch a kernel with, on the current CUDA device.

    Args:
        kernel_name: what is launched; letters, digits and underscores.
        key: everything the best configuration depends on beside the device: the dtype, heads, head dimension,
            :func:`token_bucket` and the flags that make another kernel of it; numbers, strings, bools and dtypes.
        configurations: the candidates, NamedTuples of numbers and bools; the first one is right everywhere.
        run: launches the kernel with a configuration, on buffers of its own.

    Returns:
        One of ``configurations``. A candidate that the device has not the resources for is left out.
    """
    first = configurations[0]
    if len(configurations) == 1 or not ENABLED or torch.are_deterministic_algorithms_enabled():
        return first
    if torch.compiler.is_compiling() or not _has_device():
        return first
    known = (kernel_name, _device_index(), key, tuple(configurations))
    if known in _chosen:
        return _chosen[known]
    with _measuring:
        if known not in _chosen:
            record = _record(kernel_name, key)
            found = _read(record, configurations)
            if found is None and not _capturing():
                found = _fastest(configurations, run)
                if found is not None:
                    _write(record, found)
            if found is None:
                return first
            _chosen[known] = found
    return _chosen[known]


def _has_device() -> bool:
    return not backends.TRITON_INTERPRETED and torch.cuda.is_available()


def _device_index() -> int:
    return torch.cuda.current_device()


def _device_name() -> str:
    return torch.cuda.get_device_name()


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _fastest(configurations: Sequence[Configuration], run: Callable[[Configuration], object]) -> Configuration | None:
    """The candidate with the smallest median time; None where none runs or memory is too short to tell."""
    fitting = []
    try:
        for configuration in configurations:
            with contextlib.suppress(OutOfResources, PTXASError):
                run(configuration)  # compiles, and tells whether the device has the resources
                fitting.append(configuration)
        seconds = _time([functools.partial(run, configuration) for configuration in fitting])
    except torch.OutOfMemoryError:
        return None
    return min(zip(seconds, range(len(fitting)), fitting, strict=True))[2] if fitting else None


def _time(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median device time of each call; they take turns, so that a change of the clock meets all of them."""
    events = [[tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(ROUNDS)] for _ in calls]
    for turn in range(-WARMUP_RUNS, ROUNDS):
        for call, pairs in zip(calls, events, strict=True):
            if turn < 0:
                call()
                continue
            begin, end = pairs[turn]
            begin.record()
            call()
            end.record()
    torch.cuda.synchronize()
    return [statistics.median(begin.elapsed_time(end) for begin, end in pairs) for pairs in events]


def _record(kernel_name: str, key: tuple[Hashable, ...]) -> tuple[Path, dict[str, Any]]:
    """The file of a key, and what identifies it."""
    identity = {
        "kernel": kernel_name,
        "key": [value if isinstance(value, (int, float, str)) else str(value) for value in key],
        "device": _device_name(),
        "triton": triton.__version__,
        "fastvit": __version__,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    return cache_directory() / "autotune" / f"{re.sub(r'[^A-Za-z0-9_]', '_', kernel_name)}-{digest}.json", identity


def _read(record: tuple[Path, dict[str, Any]], configurations: Sequence[Configuration]) -> Configuration | None:
    """What was measured before, if it is readable, about this key, and still one of the candidates."""
    path, identity = record
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    return next((known for known in configurations if list(known) == content.get("configuration")), None)


def _write(record: tuple[Path, dict[str, Any]], configuration: Configuration) -> None:
    """Put the result where others find it whole or not at all; a directory that cannot be written is no error."""
    path, identity = record
    text = json.dumps({"identity": identity, "configuration": list(configuration)}, indent=1) + "\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

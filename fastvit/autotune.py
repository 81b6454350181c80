"""Autotuning: measure each candidate once on the device it will run on, take the fastest, remember it.

- :func:`choose` takes a Triton kernel's launch configuration out of a short list, the first of which is valid
  everywhere.
- :func:`fastest` takes an operator's implementation where a CUDA and a Triton kernel can both run a call.
- :func:`choose` with ``on_cpu`` does so on the CPU, for products, which C++ kernels and the library can both compute.
- :class:`Race` is between two ways of a call that has effects, whose own runs take turns; its result is not kept.

Results are kept in memory, and on disk for later processes: one small JSON file per key, so that processes which
measure at the same time cannot damage each other's results.

Nothing is measured, and the first candidate is taken, where measuring is impossible or unwanted: while a CUDA graph is
captured, while torch.compile traces or a model is exported, and under
``torch.use_deterministic_algorithms``, where the result must not depend on a timer.

Environment:
    FASTVIT_AUTOTUNE    "0" takes the first candidate everywhere; "1" (the default) measures. Read at import.
    FASTVIT_CACHE_DIR   the directory results are kept in; by default ``fastvit`` in the user's cache directory. Read
                        when a key is first seen.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastvit import backends
from fastvit._version import __version__
from fastvit.reference.functional import BatchNorm

__all__ = [
    "Race",
    "cache_directory",
    "choose",
    "fastest",
    "may_measure",
    "multiprocessors",
    "replayed",
    "token_bucket",
    "unmeasured",
]


class Implementation(Protocol):
    """What :func:`fastest` reads of an operator's implementation: its name, and a function that computes a call."""

    @property
    def name(self) -> str: ...

    @property
    def run(self) -> Callable[[Any], Any]: ...


Configuration = TypeVar("Configuration", bound="tuple[Any, ...]")
AnyImplementation = TypeVar("AnyImplementation", bound=Implementation)

WARMUP_RUNS = 3
CALLS_A_GRAPH = 10
ROUNDS = 9
PREFERENCE = 0.9
"""Of the first candidate on the CPU: another has to take less than this part of its time."""
HOPELESS = 1.25
"""Times the fastest: a candidate on the CPU that takes so long is timed no further."""
INTERPRETER_MULTIPROCESSORS = 4
"""Few programs for Triton's interpreter, since each is slow."""

INPUT_DEPENDENT_FIELDS = ("grid", "prefix_tokens")
"""Fields of a call that change with the image size: the token bucket represents them in a key."""

_chosen: dict[tuple[Any, ...], Any] = {}
_measuring = threading.RLock()
_unmeasured: contextvars.ContextVar[bool] = contextvars.ContextVar("unmeasured", default=False)


def _enabled(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTVIT_AUTOTUNE: expected '0' or '1', got {value!r}")
    return value != "0"


ENABLED = _enabled(os.environ.get("FASTVIT_AUTOTUNE", ""))


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Within it nothing is measured in this thread: for queries of the choice that compute nothing."""
    token = _unmeasured.set(True)
    try:
        yield
    finally:
        _unmeasured.reset(token)


def may_measure() -> bool:
    """Whether anything may depend on a timer."""
    return ENABLED and not torch.are_deterministic_algorithms_enabled()


class Race:
    """Of two ways to compute what is called again and again, which takes less time: the calls themselves take turns.

    So each is timed where it is used, with the caches as they are there, and nothing is computed more than once.
    """

    LAPS = 6
    """Of each way, of which the shortest counts: a neighbour on the machine may slow some."""

    def __init__(self) -> None:
        self._seconds: tuple[list[float], list[float]] = [], []

    def turn(self) -> int:
        """The way to go now, 0 or 1."""
        first, second = self._seconds
        return 0 if len(first) <= len(second) else 1

    def went(self, way: int, seconds: float) -> int | None:
        """Tell what it took. Returns the faster way once it is known."""
        self._seconds[way].append(seconds)
        first, second = self._seconds
        if min(len(first), len(second)) < self.LAPS:
            return None
        return 0 if min(first) <= min(second) else 1


def token_bucket(tokens: int) -> int:
    """The token count rounded up to a power of two, at least 16: counts in one bucket share a configuration."""
    return max(16, 1 << max(tokens - 1, 0).bit_length())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cache_directory() -> Path:
    """The directory of measured results: FASTVIT_CACHE_DIR, or ``fastvit`` in the user's cache directory.

    ValueError where FASTVIT_CACHE_DIR is a file.
    """
    if chosen := os.environ.get("FASTVIT_CACHE_DIR"):
        path = Path(chosen).expanduser()
        if path.exists() and not path.is_dir():
            raise ValueError(f"FASTVIT_CACHE_DIR: expected a directory, got {chosen!r}, which is a file")
        return path
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
    on_cpu: bool = False,
    preference: float = PREFERENCE,
) -> Configuration:
    """The configuration to launch a kernel with, on the current CUDA device or on the CPU.

    Args:
        kernel_name: letters, digits and underscores.
        key: everything the best configuration depends on except the device: the dtype, heads, head dimension,
            :func:`token_bucket` of the keys and of all images' queries, and the flags the kernel is specialised on;
            numbers, strings, bools and dtypes.
        configurations: the candidates, tuples of numbers, bools and strings; the first one is valid everywhere.
        run: launches the kernel with a configuration, on output buffers of its own.
        preference: of the first candidate, on the CPU: the part of its time that another one has to take less than.

    Returns:
        One of ``configurations``. Candidates that need more resources than the device has are skipped.
    """
    first = configurations[0]
    if len(configurations) == 1 or not may_measure():
        return first
    if torch.compiler.is_compiling() or not (on_cpu or _has_device()):
        return first
    known = (kernel_name, "cpu" if on_cpu else _device_index(), key, tuple(configurations))
    if known in _chosen:
        return _chosen[known]
    with _measuring:
        if known not in _chosen:
            record = _record(kernel_name, key, cpu_name() if on_cpu else _device_name())
            found = _read(record, configurations)
            if found is None and not _unmeasured.get() and (on_cpu or not _capturing()):
                found = _fastest(configurations, run, functools.partial(_time_on_cpu, preference) if on_cpu else _time)
                if found is not None:
                    _write(record, found)
            if found is None:
                return first
            _chosen[known] = found
    return _chosen[known]


def fastest(op: str, implementations: Sequence[AnyImplementation], call: Any) -> AnyImplementation:
    """The implementation to run a call with: the faster of CUDA and Triton by measuring, else the first.

    It measures only at inference, since a run in training would move running statistics.

    Args:
        op: the operator's name.
        implementations: those that can run ``call``, in order of preference.
        call: a NamedTuple of tensors, norms, numbers, strings and further such tuples; its first tensor is the input
            (B, N, C). Each implementation's ``run`` takes it as its only argument.
    """
    first = implementations[0]
    if len(implementations) == 1 or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return first
    candidates = [each for each in implementations if each.name in backends.GPU_KERNELS]
    if len(candidates) < 2 or _unmeasured.get() or torch.jit.is_tracing():
        return first
    fields = list(_flat(call))
    x = next(value for _, value in fields if isinstance(value, Tensor))
    if x.device.type != "cuda" or not x.numel() or any(_trains(value) for _, value in fields):
        return first
    by_name = {each.name: each for each in candidates}
    with torch.cuda.device_of(x):
        names = [(name,) for name in by_name]
        (name,) = choose(op, _key(x, fields), names, lambda candidate: by_name[candidate[0]].run(call))
    return by_name[name]


def _flat(call: tuple[Any, ...], field: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested tuples with their names; a BatchNorm is one field."""
    for name, value in zip(getattr(call, "_fields", (field,) * len(call)), call, strict=True):
        if isinstance(value, tuple) and not isinstance(value, BatchNorm):
            yield from _flat(value, name)
        else:
            yield name, value


def _trains(value: Any) -> bool:
    """Whether a field of a call needs gradients or batch statistics."""
    if isinstance(value, BatchNorm):
        return value.use_batch_stats or any(map(_trains, value[:4]))
    return isinstance(value, Tensor) and torch.is_grad_enabled() and value.requires_grad


def _key(x: Tensor, fields: Sequence[tuple[str, Any]]) -> tuple[Hashable, ...]:
    """What the times of a call depend on: the dtype of the computation, sizes, settings and the token bucket."""
    device = x.device.type
    key: list[Hashable] = [torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype]
    for name, value in fields:
        if isinstance(value, BatchNorm):
            key.append(name)
        elif isinstance(value, Tensor):
            sizes = value.shape
            if value.dim() == 3:  # tokens (B, N, C)
                sizes = (token_bucket(sizes[0] * sizes[1]), sizes[2])
            key += [str(value.dtype), *sizes]
        elif name not in INPUT_DEPENDENT_FIELDS:
            key.append(str(value))
    return tuple(key)


def _has_device() -> bool:
    return not backends.TRITON_INTERPRETED and torch.cuda.is_available()


def _device_index() -> int:
    return torch.cuda.current_device()


def _device_name() -> str:
    return torch.cuda.get_device_name()


@functools.cache
def cpu_name() -> str:
    """The CPU: its model by name and by numbers, on x86 and on Arm, and the instruction set asked for."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    numbers = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
    number = "/".join(fields[name] for name in numbers if name in fields)
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} {number} {os.environ.get('FASTVIT_CPU_CAPABILITY', '').lower()}".strip()


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _fastest(
    configurations: Sequence[Configuration],
    run: Callable[[Configuration], object],
    time: Callable[[Sequence[Callable[[], object]]], list[float]],
) -> Configuration | None:
    """The candidate with the smallest median time; None where none can run or memory is too short to measure."""
    fitting = []
    try:
        for configuration in configurations:
            with contextlib.suppress(*_resource_errors()):
                run(configuration)  # compiles; raises where the device lacks the resources
                fitting.append(configuration)
        seconds = time([functools.partial(run, configuration) for configuration in fitting])
    except torch.OutOfMemoryError:
        return None
    return min(zip(seconds, range(len(fitting)), fitting, strict=True))[2] if fitting else None


def _resource_errors() -> tuple[type[Exception], ...]:
    """What Triton raises for a configuration that the device has too few registers or too little memory for."""
    if backends.TRITON_VERSION is None:
        return ()
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """Makes CALLS_A_GRAPH of these calls as the replay of a CUDA graph, or one by one where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
            for _ in range(CALLS_A_GRAPH):
                call()
    except RuntimeError:
        return lambda: [call() for _ in range(CALLS_A_GRAPH)]
    return graph.replay


def _time(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median device time of each call, interleaved, so that a change of the clock rate affects all of them alike.

    Replays of CUDA graphs are timed, since a launch takes the host longer than many a kernel takes the GPU.
    """
    calls = [replayed(call) for call in calls]
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


def _time_on_cpu(preference: float, calls: Sequence[Callable[[], object]]) -> list[float]:
    """The shortest time of each call, interleaved; the first one's a little shortened, as it is preferred.

    Calls that are clearly slower are timed no further, and one that is ahead of the first is timed once more beside it:
    a neighbour on the machine may slow either for some rounds.
    """
    seconds = [math.inf] * len(calls)

    def shortest(places: Sequence[int]) -> int:
        for turn in range(-1, ROUNDS):
            for place in places:
                begin = time.perf_counter()
                calls[place]()
                if turn >= 0:
                    passed = (time.perf_counter() - begin) * (preference if place == 0 else 1.0)
                    seconds[place] = min(seconds[place], passed)
            if turn > 0:
                places = [place for place in places if seconds[place] < HOPELESS * min(seconds)]
                if len(places) == 1:
                    break
        return min(places, key=seconds.__getitem__)

    fastest = shortest(range(len(calls)))
    if fastest != 0:
        shortest((0, fastest))
    return seconds


@functools.cache
def _kernel_sources() -> str:
    """A digest of the Triton kernels: what was measured of another version of them does not count."""
    spec = importlib.util.find_spec("fastvit.kernels")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:20]


def _record(kernel_name: str, key: tuple[Hashable, ...], device: str) -> tuple[Path, dict[str, Any]]:
    """The file of a key, and the key with all else that identifies a result."""
    identity = {
        "kernel": kernel_name,
        "key": [value if isinstance(value, (int, float, str)) else str(value) for value in key],
        "device": device,
        "triton": backends.TRITON_VERSION,
        "kernels": _kernel_sources(),
        "fastvit": __version__,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    return cache_directory() / "autotune" / f"{re.sub(r'[^A-Za-z0-9_]', '_', kernel_name)}-{digest}.json", identity


def _read(record: tuple[Path, dict[str, Any]], configurations: Sequence[Configuration]) -> Configuration | None:
    """The recorded result, if it is readable, belongs to this key and is still one of the candidates."""
    path, identity = record
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    return next((known for known in configurations if list(known) == content.get("configuration")), None)


def _write(record: tuple[Path, dict[str, Any]], configuration: Configuration) -> None:
    """Write the result atomically; a directory that cannot be written to is no error."""
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

"""What several test files need: assertions of the accuracy rule, the hang guard, and poisoned allocations."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import accuracy, backends

Result = TypeVar("Result")

HANG_GUARD = 3600.0
"""Seconds after which a process or thread that a test waits for counts as hung. No result is judged by a clock."""

_pool: dict[tuple[int, str], accuracy.Deviation] | None = None
_judged = 0


def on_thread_counts(run: Callable[[], Result]) -> list[Result]:
    """What the plain form gives on one, two and the present number of threads: its sums differ."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in sorted({1, 2, before}):
            torch.set_num_threads(threads)
            results.append(run())
        return results
    finally:
        torch.set_num_threads(before)


def assert_as_accurate(
    fused: Tensor,
    plain: Tensor | Sequence[Tensor],
    exact: Tensor,
    *,
    ulps: float = accuracy.ULPS,
    name: str = "output",
) -> None:
    """Hold ``fused`` to the rule of ``fastvit.accuracy``; within :func:`on_pooled_draws`, add it to the pool.

    Args:
        fused: what is tested, any floating dtype.
        plain: the plain form's result in the same dtype and shape, or several, which add in other orders, as the plain
            form does with each number of threads: it is held to be as wrong as the worst of them.
        exact: the plain form's result in float64, same shape.
    """
    global _judged
    plains = [plain] if isinstance(plain, Tensor) else plain
    assert {fused.dtype} == {each.dtype for each in plains}, f"{name}: got {fused.dtype}, plain is {plains[0].dtype}"
    assert exact.dtype == torch.float64, f"{name}: the oracle must be float64, got {exact.dtype}"
    found = accuracy.deviation(fused.cpu(), [each.cpu() for each in plains], exact.cpu(), ulps=ulps)
    if _pool is not None:
        _judged += 1
        key = (_judged, name)
        _pool[key] = _pool[key].pooled(found) if key in _pool else found
    elif not found.is_accurate:
        got, right = (float(tensor.flatten()[found.worst]) for tensor in (fused, exact))
        index = tuple(map(int, torch.unravel_index(torch.tensor(found.worst), exact.shape)))
        raise AssertionError(f"{_broken(found, name)}; at {index}: fused {got:.9g}, exact {right:.9g}")


def on_pooled_draws(check: Callable[[], object], draws: int = 4) -> None:
    """Call ``check``, which draws its own inputs; where it breaks the rule, judge it and more draws as if one batch.

    There are ``draws`` at most; the first that makes the batch accurate is the last.

    For results of few numbers, at which the plain form's largest error may be small by chance: with errors alike, drawn
    from one normal distribution, the rule breaks for 5 % of results of 8 numbers and for 0.5 % of 32, before the
    allowance for the last places. All of these pass by the fourth draw but for one in 1000 or 10000. A result of one
    number, such as the statistics of one channel, breaks it for 30 %, and for 0.3 % up to the sixteenth draw. What is
    wrong is wrong at every draw. The draws are the same in every run, as the generator is seeded before each test.
    """
    global _pool, _judged
    _pool = pool = {}
    try:
        for _ in range(draws):
            _judged = 0
            check()
            if all(found.is_accurate for found in pool.values()):
                return
    finally:
        _pool = None
    for (_, name), found in pool.items():
        assert found.is_accurate, f"{_broken(found, name)}, over {draws} draws"


def _broken(found: accuracy.Deviation, name: str) -> str:
    if found.special:
        return f"{name}: {found.special} infinities or NaN are not those of the plain form"
    return (
        f"{name}: error {found.excess:.3g} beyond the last places, allowed is "
        f"{accuracy.FACTOR:g} x {found.plain_error:.3g}, the plain form's own"
    )


ISAS = backends.INSTRUCTION_SETS
"""Every instruction set that the C++ kernels are written for."""


def skip_without(isa: str) -> None:
    """Skip the test where the C++ kernels cannot run with this instruction set."""
    if reasons := backends.cpp_reasons():
        pytest.skip("; ".join(reasons))
    from fastvit import _C

    if isa not in backends.extension().info["isa_levels"]:
        pytest.skip(f"the C++ kernels were built without {isa}")
    if isa not in _C.cpu_info()["supported"]:
        pytest.skip(f"this CPU has no {isa}")


def cores() -> int:
    """How many cores this process may keep busy: its share where pytest-xdist runs several."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def spawned(worker: Callable[..., None], arguments: tuple[object, ...], count: int) -> None:
    """Run worker(rank, *arguments) in ``count`` processes to their end; an exception of one is raised here."""
    context = multiprocessing.spawn(worker, arguments, nprocs=count, join=False)
    deadline = time.monotonic() + HANG_GUARD
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{count} processes of {worker.__module__} hang")


_M_PERTURB = -6  # mallopt parameter of glibc: fill what malloc hands out with a byte


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, uninitialised memory holds NaN (bytes 0xff), so that an output element nobody wrote shows.

    Covers ``torch.empty`` and its kin on every device, and on glibc every CPU allocation, those of the C++ extension
    included (glibc fills with the complement of the low byte it is given, and takes 0 for "off", hence 0x100).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if mallopt is not None:
        mallopt(_M_PERTURB, 0x100)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_PERTURB, 0)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class CallCounter(TorchDispatchMode):
    """Names of the operators that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})

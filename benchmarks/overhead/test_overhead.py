"""The time of a call of every public operator, by how its backend is chosen and observed, and of its bare kernels.

``make overhead`` times the calls. Without ``--benchmark-enable`` each runs once. Outputs are checked either way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks.overhead.cases import CALLS, backend_of, kernels_of, runner
from benchmarks.overhead.report import MODES, WAYS
from fastvit import backends, ops
from fastvit.accuracy import is_accurate
from fastvit.reference import functional

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Waking further threads would take longer than the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", CALLS)
def test_overhead(op: str, mode: str, way: str, benchmark: Any, monkeypatch, caplog):
    benchmark.extra_info.update(op=op, mode=mode, way=way)
    training, options = mode == "training", {}
    torch.manual_seed(0)
    call = CALLS[op](training)
    if way in ("named", "kernels"):
        options["backend"] = backend_of(op, training)
    elif way == "requested":
        monkeypatch.setattr(backends, "REQUESTED", frozenset({backend_of(op, training)}))
    elif way == "logged":
        caplog.set_level(logging.DEBUG, "fastvit")
    elif way == "float16":
        call = call.to(torch.float16)
    with torch.set_grad_enabled(training):
        run = runner(getattr(ops, op), call, training, **options)
        if way == "kernels":
            kernels = kernels_of(run)
            assert kernels
            with torch.no_grad():
                benchmark(lambda: [kernel() for kernel in kernels])
            return
        outputs = pytree.tree_leaves(benchmark(run))
    # The gradients behind the outputs are checked in tests/ops.
    twin = getattr(functional, op)
    plain, exact = (pytree.tree_leaves(twin(*each.args, **each.kwargs)) for each in (call, call.to(torch.float64)))
    assert all(map(is_accurate, outputs, plain, exact))

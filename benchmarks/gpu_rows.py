"""One row of the measurements on a GPU: a job of ``benchmarks/jobs.py``, inference or training step, beside its peers.

Peers are the plain code, the plain code under torch.compile's max-autotune, each backend of SDPA, cuDNN's convolution
with its transposes; floors a copy of the same bytes, attention without mixing. A fused result that is less accurate
than the rule allows has no time. A row also has the peak memory, the bytes and floating-point operations that the job
needs, and its slowest kernels: how far it is from the roofline, and where.

``python -m benchmarks.first_contact`` measures rows, a process each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_peers import Call, floors, library_peers, traffic
from benchmarks.gpu_timing import compare, device_kernels, peak_mebibytes, refusal
from benchmarks.jobs import JOBS, Job, Result, Tensors, images, parts, widened
from fastvit import ops
from fastvit.accuracy import is_accurate
from fastvit.reference import functional

COMPILED = {"compile": "default", "compile_max_autotune": "max-autotune-no-cudagraphs"}
"""Modes of torch.compile by candidate: graphs are captured here, of every candidate alike."""

KERNELS = ("triton", "cuda")
JOB = {job.name: job for job in JOBS}


def candidates(job: Job, compiled: Sequence[str]) -> dict[str, Call]:
    """The implementations of a job by name; "fused" is the automatic choice."""

    def fused(backend: str) -> Call:
        return lambda t: job.call(ops, t, backend=backend)

    def plain(t: Tensors) -> Result:
        return job.call(functional, t)

    found = {"fused": fused("auto"), "plain": plain}
    found |= {entry.name: fused(entry.name) for entry in ops.OPERATORS[job.op].implementations if entry.name in KERNELS}
    for name in compiled:
        torch.compiler.reset()
        found[name] = torch.compile(plain, dynamic=False, mode=COMPILED[name])
    return found | library_peers(job)


def _step(job: Job, tensors: Tensors, call: Call, grads: Sequence[Tensor]) -> Callable[[], None]:
    """One forward and backward."""
    leaves = job.leaves(tensors)
    inputs = {**tensors, **leaves}

    def step() -> None:
        torch.autograd.grad(parts(call(inputs)), list(leaves.values()), grads)

    return step


def _inference(tensors: Tensors, call: Call) -> Callable[[], None]:
    def infer() -> None:
        with torch.no_grad():
            call(tensors)

    return infer


def _operations(run: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions in a call of the plain code."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure(
    name: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    training: bool,
    small: bool,
    rounds: int,
    compiled: Sequence[str] = (),
    only: Collection[str] = (),
    without: Collection[str] = (),
    at: Callable[[str], None] = lambda candidate: None,
) -> dict[str, Any]:
    """A job's row: milliseconds and peak memory of every candidate that can run it, and why the others cannot.

    Args:
        compiled: the candidates of ``COMPILED`` to add. only: those to measure; all by default. without: those not to.
        at: told of each candidate before it first runs: a fault of one may end the process.
    """
    job = JOB[name]
    tensors = job.tensors(batch, dtype, device, small=small)
    few = images(tensors, 2)
    with torch.no_grad():
        plain, exact = (parts(job.call(functional, each)) for each in (few, widened(few)))
        out = job.call(functional, tensors)
        grads = [torch.randn_like(part) for part in parts(out)]

    def timed(call: Call) -> Callable[[], None]:
        return _step(job, tensors, call, grads) if training else _inference(tensors, call)

    calls: dict[str, Callable[[], object]] = {}
    peak, refused, inaccurate = {}, {}, []
    for candidate, call in candidates(job, compiled).items():
        if candidate in without or (only and candidate not in only):
            continue
        at(candidate)
        run = timed(call)
        try:
            with torch.no_grad():
                accurate = candidate.startswith("compile") or all(map(is_accurate, parts(call(few)), plain, exact))
            run()
            found = peak_mebibytes(run, device)
        except Exception as error:  # unsupported, out of memory or resources, not to be compiled
            refused[candidate] = refusal(error, device)
            continue
        peak[candidate] = None if found is None else found["peak"] - found["held"]
        if not accurate:
            inaccurate.append(candidate)
        if accurate or candidate not in ("fused", *KERNELS):
            calls[candidate] = run
    at("")
    kernels = device_kernels(calls["fused"], device) if "fused" in calls else {}
    calls |= floors(job, tensors, out, training)
    return {
        "job": name,
        "op": job.op,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "training" if training else "inference",
        "milliseconds": compare(calls, rounds=rounds, device=device),
        "peak_mebibytes": peak,
        "refused": refused,
        "inaccurate": inaccurate,
        "bytes": traffic(tensors, out, training),
        "operations": _operations(timed(lambda t: job.call(functional, t))),
        "kernels_microseconds": kernels,
    }

"""Proof on a GPU in one command: ``python -m benchmarks.gpu``.

1. The parity suite, ``tests/kernels/test_on_gpu.py``: every Triton and CUDA operator, forward and backward.
2. compute-sanitizer over its small forward cases, where it is found.
3. Every operator at the sizes of ``benchmarks/jobs.py``, inference and training step, beside its peers: the plain code,
   the plain code under torch.compile (default and max-autotune), and for plain attention each backend of SDPA. No time
   is given for a result that is less accurate than the rule allows.

Writes a dated JSON into ``benchmarks/results/``; ends with 1 if a test failed or a fused result was inaccurate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.jobs import JOBS, Job, Tensors, widened
from benchmarks.ops._timing import compare, is_accurate
from fastvit import backends, ops
from fastvit.reference import functional

ROOT = Path(__file__).resolve().parents[1]
SUITE = "tests/kernels/test_on_gpu.py"
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
COMPILED = {"compile": {}, "compile_max_autotune": {"mode": "max-autotune"}}
KERNELS = ("triton", "cuda")

Call = Callable[[Tensors], Tensor]


def run_suite(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """The outcome of one command over the suite: its exit status and the end of what it said."""
    arguments = [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SUITE]
    if command:
        arguments += ["-k", "test_forward and small and float16 or test_class_attention and float16"]
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"status": None, "summary": f"stopped after {timeout:.0f} s"}
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "tail": lines[-60:]}


def sanitize(timeout: float) -> dict[str, Any]:
    """compute-sanitizer's verdict on the small forward cases, or why there is none."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"status": None, "summary": "compute-sanitizer was not found"}
    return run_suite([tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"], timeout)


def _sdpa(backend: SDPBackend) -> Call:
    def call(t: Tensors) -> Tensor:
        mask, bias = t.get("mask"), t.get("bias")
        allowed = bias if mask is None else mask[:, None, None, :]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], allowed)

    return call


def candidates(job: Job, compiled: Sequence[str]) -> dict[str, Call]:
    """Who computes the job, by name: "fused" is the automatic choice."""

    def fused(backend: str) -> Call:
        return lambda t: job.call(ops, t, backend=backend)

    def plain(t: Tensors) -> Tensor:
        return job.call(functional, t)

    found = {"fused": fused("auto"), "plain": plain}
    found |= {entry.name: fused(entry.name) for entry in ops.IMPLEMENTATIONS[job.op] if entry.name in KERNELS}
    for name in compiled:
        torch.compiler.reset()
        found[name] = torch.compile(plain, dynamic=False, **COMPILED[name])
    if job.op == "masked_attention":
        found |= {f"sdpa_{name}": _sdpa(backend) for name, backend in SDPA_BACKENDS.items()}
    return found


def _step(job: Job, tensors: Tensors, call: Call, grad: Tensor) -> Callable[[], Tensor]:
    """One forward and backward; returns the output."""
    leaves = job.leaves(tensors)
    inputs = {**tensors, **leaves}

    def step() -> Tensor:
        out = call(inputs)
        torch.autograd.grad(out, list(leaves.values()), grad)
        return out.detach()

    return step


def _inference(tensors: Tensors, call: Call) -> Callable[[], Tensor]:
    def infer() -> Tensor:
        with torch.no_grad():
            return call(tensors)

    return infer


def _peak_mebibytes(call: Callable[[], Tensor], device: torch.device) -> float | None:
    """What a call allocates at its height, above what is there before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(
    job: Job, batch: int, dtype: torch.dtype, device: torch.device, options: argparse.Namespace, training: bool
) -> dict[str, Any]:
    """One row: milliseconds and peak memory of every candidate that takes the call, and why the others do not."""
    tensors = job.tensors(batch, dtype, device, small=options.small)
    with torch.no_grad():
        few = {name: t[:2] if t.shape[:1] == (batch,) else t for name, t in tensors.items()}
        plain, exact = job.call(functional, few), job.call(functional, widened(few))
        grad = torch.randn_like(job.call(functional, tensors))
    calls, peak, refused, inaccurate = {}, {}, {}, []
    for name, call in candidates(job, options.compiled).items():
        run = _step(job, tensors, call, grad) if training else _inference(tensors, call)
        try:
            with torch.no_grad():
                accurate = name.startswith("compile") or is_accurate(call(few), plain, exact)
            run()
            peak[name] = _peak_mebibytes(run, device)
        except (RuntimeError, ValueError) as error:  # it does not take the call, or not this much memory
            refused[name] = str(error).splitlines()[0][:300]
            continue
        if accurate:
            calls[name] = run
        else:
            inaccurate.append(name)
    times = compare(calls, rounds=options.rounds, device=device)
    return {
        "job": job.name,
        "op": job.op,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "training" if training else "inference",
        "milliseconds": {name: measured._asdict() for name, measured in times.items()},
        "peak_mebibytes": peak,
        "refused": refused,
        "inaccurate": inaccurate,
    }


def describe_row(row: dict[str, Any]) -> str:
    """A line of the report: the fused time, and how many times it each other one takes."""
    start = f"{row['job']:<20} {row['batch']:>3} {row['dtype']:<8} {row['mode']:<9}"
    times = {name: measured["median"] for name, measured in row["milliseconds"].items()}
    if "fused" not in times:
        return f"{start} no fused time: {row['refused'].get('fused', 'inaccurate')}"
    others = "  ".join(f"{name} {time / times['fused']:.2f}x" for name, time in times.items() if name != "fused")
    return f"{start} {times['fused']:8.3f} ms  {others}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself out")
    parser.add_argument("--jobs", nargs="+", choices=[job.name for job in JOBS], default=[job.name for job in JOBS])
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float16", "bfloat16"), default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compiled", nargs="*", choices=list(COMPILED), default=list(COMPILED))
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--skip", nargs="*", choices=("suite", "sanitizer", "benchmarks"), default=[])
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for the suite, and for the sanitizer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device (--device cpu tries the command itself out)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.date.today().isoformat(),
        "device": name,
        "machine": {key: value for key, value in backends.describe().items() if key != "location"},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = options.out / f"{result['date']}-gpu-{slug}.json"

    def save() -> None:  # after every step, so that a run that is cut off leaves what it found
        path.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")

    if "suite" not in options.skip:
        result["suite"] = run_suite([], options.timeout)
        print("suite:", result["suite"]["summary"], flush=True)
        save()
    if "sanitizer" not in options.skip:
        result["sanitizer"] = sanitize(options.timeout)
        print("sanitizer:", result["sanitizer"]["summary"], flush=True)
        save()
    rows = result["rows"] = []
    torch.manual_seed(0)
    for job in JOBS if "benchmarks" not in options.skip else ():
        for dtype in options.dtype if job.name in options.jobs else ():
            for batch in options.batch:
                for training in (False, True):
                    row = measure(job, batch, getattr(torch, dtype), device, options, training)
                    rows.append(row)
                    print(describe_row(row), flush=True)
                    save()
    save()
    print("written:", path)
    failed = any(result.get(step, {}).get("status") not in (0, None) for step in ("suite", "sanitizer"))
    return int(failed or any("fused" in row["inaccurate"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

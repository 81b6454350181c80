"""All tests and measurements on a GPU in one command: ``python -m benchmarks.gpu``.

1. The parity suite, every test marked ``gpu``: each Triton and CUDA operator, forward and backward, against float64.
2. compute-sanitizer, memcheck and racecheck, over the small cases of the CUDA extension, forward and backward, and
   memcheck over the small forward cases of the Triton kernels, if it is installed.
3. Every operator at the sizes of ``benchmarks/jobs.py``, inference and training step, compared with its peers: the
   plain code, the plain code under torch.compile (default and max-autotune), each backend of SDPA, cuDNN's convolution
   with its transposes; and with floors: a copy of the same bytes, attention without mixing. A fused result that is less
   accurate than the rule allows has no time. A row also has the peak memory, the bytes and floating-point operations
   that the job needs, and its slowest kernels: how far it is from the roofline, and where.
4. Whole training steps, ``benchmarks/gpu_models.py``: peak memory and time of the fused and the plain model.
5. The goals, ``benchmarks/gpu_goals.py``.

Rows and steps are measured in a process each, under a time limit, and on a GPU as replays of CUDA graphs.

Writes a dated JSON into ``benchmarks/results/``; exits with 1 if a test failed or a fused result was inaccurate.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_goals import describe_goal, judge
from benchmarks.gpu_models import MODELS, describe_steps, measure_steps, peak_mebibytes
from benchmarks.gpu_peers import Call, floors, library_peers, traffic
from benchmarks.jobs import JOBS, Job, Result, Tensors, images, parts, widened
from fastvit import autotune, backends, ops
from fastvit.accuracy import is_accurate
from fastvit.patching.timing import interleaved
from fastvit.reference import functional

ROOT = Path(__file__).resolve().parents[1]
SUITE = (
    "tests/kernels/test_on_gpu.py",
    "tests/ops/test_token_depthwise_conv_cuda.py",
    "tests/compat/test_running.py",
    "tests/compat/test_state.py",
)
SANITIZED = {
    "memcheck of the extension": ("memcheck", "small and cuda and (test_forward or test_gradients)"),
    "racecheck of the extension": ("racecheck", "small and cuda and (test_forward or test_gradients)"),
    "memcheck of Triton": ("memcheck", "small and triton and test_forward and float16"),
}
"""By name: compute-sanitizer's tool, and the tests it runs, as for ``pytest -k``."""

COMPILED = {"compile": {}, "compile_max_autotune": {"mode": "max-autotune"}}
KERNELS = ("triton", "cuda")
TAIL = 60
"""Lines of a command's output that are kept."""

JOB = {job.name: job for job in JOBS}

PROFILED = 8
"""Kernels listed in a row."""


def run_suite(command: Sequence[str], timeout: float, only: str = "") -> dict[str, Any]:
    """Run the suite; its exit status and the end of its output.

    Args:
        command: prefix of pytest's command line.
        timeout: in seconds.
        only: the tests, as for ``pytest -k``.
    """
    files = SUITE[:1] if only else SUITE
    arguments = [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files]
    arguments += ["-k", only] if only else []
    # Every tensor is then an allocation of its own, whose bounds the sanitizer knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command else None
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as stopped:
        lines = (stopped.stdout or b"").decode(errors="replace").strip().splitlines()
        return {"status": None, "summary": f"stopped after {timeout:.0f} s", "tail": lines[-TAIL:]}
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "tail": lines[-TAIL:]}


def sanitize(timeout: float) -> dict[str, Any]:
    """The outcome of every run under compute-sanitizer, or why there is none."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"status": None, "summary": "compute-sanitizer was not found"}
    found = {}
    for name, (kind, only) in SANITIZED.items():
        command = [tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all"]
        found[name] = run_suite(command, timeout, only)
    failed = [outcome["status"] for outcome in found.values() if outcome["status"] not in (0, None)]
    summary = "; ".join(f"{name}: {outcome['summary']}" for name, outcome in found.items())
    return {"status": failed[0] if failed else 0, "summary": summary, "runs": found}


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
        found[name] = torch.compile(plain, dynamic=False, **COMPILED[name])
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


def _operations(run: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions in a call of the plain code."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


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


def _send(pipe: Connection, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    try:
        pipe.send(function(*arguments))
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {error}"[:300]})


def apart(function: Callable[..., dict[str, Any]], *arguments: Any, timeout: float) -> dict[str, Any]:
    """What a function returns in a process of its own, or as "failed" why it does not.

    A crash, a hang or an illegal access, which poisons a process, so cost no more than this result.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, function, arguments))
    process.start()
    sending.close()
    try:
        return receiving.recv() if receiving.poll(timeout) else {"failed": f"stopped after {timeout:.0f} s"}
    except EOFError:
        process.join()
        return {"failed": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def measure(
    name: str, batch: int, dtype: torch.dtype, device: torch.device, options: argparse.Namespace, training: bool
) -> dict[str, Any]:
    """A job's row: milliseconds and peak memory of every candidate that can run it, and why the others cannot."""
    job = JOB[name]
    tensors = job.tensors(batch, dtype, device, small=options.small)
    few = images(tensors, 2)
    with torch.no_grad():
        plain, exact = (parts(job.call(functional, each)) for each in (few, widened(few)))
        out = job.call(functional, tensors)
        grads = [torch.randn_like(part) for part in parts(out)]

    def timed(call: Call) -> Callable[[], None]:
        return _step(job, tensors, call, grads) if training else _inference(tensors, call)

    calls: dict[str, Callable[[], object]] = {}
    peak, refused, inaccurate = {}, {}, []
    for name, call in candidates(job, options.compiled).items():
        run = timed(call)
        try:
            with torch.no_grad():
                accurate = name.startswith("compile") or all(map(is_accurate, parts(call(few)), plain, exact))
            run()
            found = peak_mebibytes(run, device)
        except Exception as error:  # unsupported, out of memory or resources, not to be compiled
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        peak[name] = None if found is None else found["peak"] - found["held"]
        if not accurate:
            inaccurate.append(name)
        if accurate or name not in ("fused", *KERNELS):
            calls[name] = run
    kernels = device_kernels(calls["fused"], device) if "fused" in calls else {}
    calls |= floors(job, tensors, out, training)
    times = compare(calls, rounds=options.rounds, device=device)
    return {
        "milliseconds": times,
        "peak_mebibytes": peak,
        "refused": refused,
        "inaccurate": inaccurate,
        "bytes": traffic(tensors, out, training),
        "operations": _operations(timed(lambda t: job.call(functional, t))),
        "kernels_microseconds": kernels,
    }


def describe_row(row: dict[str, Any]) -> str:
    """A line of the report: the fused time, and the others as multiples of it."""
    start = f"{row['job']:<20} {row['batch']:>3} {row['dtype']:<8} {row['mode']:<9}"
    if "failed" in row:
        return f"{start} FAILED: {row['failed']}"
    times = {name: measured["median"] for name, measured in row["milliseconds"].items()}
    if "fused" not in times:
        return f"{start} no fused time: {row['refused'].get('fused', 'inaccurate')}"
    fused = times.pop("fused")
    others = "  ".join(f"{name} {time / fused:.2f}x" for name, time in times.items())
    rates = f"{row['bytes'] / fused / 1e6:.0f} GB/s {row['operations'] / fused / 1e9:.1f} TFLOP/s"
    return f"{start} {fused:8.3f} ms  {others}  {rates}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tests the command itself")
    parser.add_argument("--jobs", nargs="+", choices=[job.name for job in JOBS], default=[job.name for job in JOBS])
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float16", "bfloat16"), default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compiled", nargs="*", choices=list(COMPILED), default=list(COMPILED))
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="whole training steps")
    parser.add_argument("--skip", nargs="*", choices=("suite", "sanitizer", "benchmarks", "models"), default=[])
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for the suite, and each sanitizer")
    parser.add_argument("--row-timeout", type=float, default=600.0, help="seconds for each row")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device (--device cpu tests the command itself)")
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

    def save() -> None:  # after every step, so that an interrupted run keeps its results
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
    for job in JOBS if "benchmarks" not in options.skip else ():
        for dtype in options.dtype if job.name in options.jobs else ():
            for batch in options.batch:
                for training in (False, True):
                    what = {"job": job.name, "op": job.op, "batch": batch, "dtype": dtype}
                    row = what | {"mode": "training" if training else "inference"}
                    settings = (getattr(torch, dtype), device, options, training)
                    row |= apart(measure, job.name, batch, *settings, timeout=options.row_timeout)
                    rows.append(row)
                    print(describe_row(row), flush=True)
                    save()
    steps = result["steps"] = []
    for model in options.models if "models" not in options.skip else ():
        for batch in options.batch:
            measuring = functools.partial(measure_steps, rounds=options.rounds, small=options.small)
            step = apart(measuring, model, batch, device, timeout=options.row_timeout)
            steps.append({"model": model, "batch": batch, **step})
            print(f"{model} {batch}: {step['failed']}" if "failed" in step else describe_steps(step), flush=True)
            save()
    result["goals"] = judge(*([row for row in found if "failed" not in row] for found in (rows, steps)))
    print(*map(describe_goal, result["goals"]), sep="\n")
    save()
    print("written:", path)
    failed = any(result.get(step, {}).get("status") not in (0, None) for step in ("suite", "sanitizer"))
    failed = failed or any("failed" in row for row in (*rows, *steps))
    return int(failed or any("fused" in row["inaccurate"] for row in rows if "failed" not in row))


if __name__ == "__main__":
    sys.exit(main())

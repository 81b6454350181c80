"""The steps that other programs do: build the extension, run tests, count, look for races, pack. They need no torch.

Each ``<step>(item, options, tell)`` yields its rows; see ``processes.py``.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_contact.processes import ROOT, Options, Tell, stream
from benchmarks.gpu_model.rows import ROWS

Rows = Iterator[dict[str, Any]]

CACHES = ROOT / "build" / "first_contact"
"""What is compiled and measured on the device; on a later run of the same tree it is found again."""
MOST_CACHED = 14 << 20
"""Bytes of the packed caches: a lent machine may give back files of 16 MiB."""
FIRST_CACHED = ("fastvit", "triton")

SUITE = (
    "tests/kernels/test_on_gpu.py",
    "tests/test_graphs.py",
    "tests/ops/test_token_depthwise_conv_cuda.py",
    "tests/compat/test_running.py",
    "tests/compat/test_state.py",
)
WORKERS = 12
SANITIZED = {
    "memcheck of the extension": ("memcheck", "small and cuda and (test_forward or test_gradients)"),
    "racecheck of the extension": ("racecheck", "small and cuda and (test_forward or test_gradients)"),
    "memcheck of Triton": ("memcheck", "small and triton and test_forward and float16"),
}
"""By name: compute-sanitizer's tool, and the tests it runs, as for ``pytest -k``."""

COUNTED = ("deepvit_s", "vit_b_padding", "ceit_s_leff", "cpvt_s_peg_cuda")
"""Rows of the model whose slowest kernel is looked at by ncu."""
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis")
CUDA_KERNEL = "run_block"
"""The function that every CUDA kernel of the extension is an instance of."""


# --- The extension --------------------------------------------------------------------------------------------------


def extension_items(options: Options) -> Sequence[str]:
    return ["build"]


def extension(item: str, options: Options, tell: Tell) -> Rows:
    """Make the checkout runnable: the link to the Triton kernels, and the native part where none loads for this GPU.

    A binary for this Python that was carried along is taken as it is, if its operators run on this GPU.
    """
    program = "import importlib.util as i, sys; sys.exit(i.find_spec('fastvit.kernels') is None)"
    link = ROOT / "fastvit" / "kernels"
    if stream([sys.executable, "-c", program], options.seconds / 3, tell)[0] and not link.exists():
        link.symlink_to(Path("..", "kernels"))
        yield {"linked": "fastvit/kernels"}
    begin, why = time.monotonic(), _why_to_build(options, tell)
    if not why:
        yield {"extension": "as it is here"}
        return
    environment = {"MAX_JOBS": str(os.cpu_count()), "FASTVIT_ISA_LIST": "portable,avx2", "FASTVIT_BUILD_EXT": "1"}
    if capability := _capability():
        environment["FASTVIT_CUDA_ARCH_LIST"] = capability
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status, text = stream(command, options.seconds - (time.monotonic() - begin) - 10.0, tell, environment)
    left = why if status else _why_to_build(options, tell)
    row = {"extension": "built", "because": why, "seconds": round(time.monotonic() - begin, 1)}
    yield row if not left else {**row, "failed": left if not status else _last(text), "output": text[-2000:]}


def _why_to_build(options: Options, tell: Tell) -> str:
    """Why the native part cannot be used on the device, asked of a fresh process; "" if it can."""
    device = "cuda_reasons(torch.device('cuda'))" if options.device == "cuda" else "cpp_reasons()"
    program = f"import torch; from fastvit import backends; print('; '.join(backends.{device}))"
    status, text = stream([sys.executable, "-c", program], options.seconds / 3, tell)
    return _last(text) if status or text.strip() else ""


def _capability() -> str:
    """Of the first GPU, as "9.0"; "" if nvidia-smi does not tell."""
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _last(text: str) -> str:
    """The last line of a program's output."""
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"


# --- Tests ----------------------------------------------------------------------------------------------------------


def _pytest(
    files: Sequence[str], only: str, options: Options, tell: Tell, *, prefix: Sequence[str] = (), workers: int = 0
) -> Rows:
    """Run tests marked gpu, each of which is a row as soon as it is known; a last row says how the run ended."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN, "-m", "gpu"]
    command += [*files, "-k", only]
    if workers and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    # Every tensor is then an allocation of its own, whose bounds the sanitizer knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {}
    status, text = stream(command, options.seconds - 2.0, tell, environment)
    row = {"status": status, "summary": _last(text)}
    if status not in (0, 1, 5) and not (prefix and status == ERRORS_FOUND):  # 5: there was no such test
        row["failed"] = "stopped by its time limit" if status == -1 else f"ended with status {status}: {_last(text)}"
    elif status == ERRORS_FOUND:
        found = [line for line in text.splitlines() if line.startswith("=========")]
        row |= {"failed": "compute-sanitizer found errors", "errors": found[:60]}
    yield row


PLUGIN = "benchmarks.first_contact.suite"
ERRORS_FOUND = 9


def parity_items(options: Options) -> Sequence[str]:
    return ["suite"]


def parity(item: str, options: Options, tell: Tell) -> Rows:
    """The parity suite without the tests that compile by torch.compile, which take minutes."""
    yield from _pytest(SUITE, "not compiled", options, tell, workers=WORKERS)


def sanitizers_items(options: Options) -> Sequence[str]:
    return list(SANITIZED)


def sanitizers(item: str, options: Options, tell: Tell) -> Rows:
    """compute-sanitizer over small cases."""
    tool = _tool("compute-sanitizer")
    if tool is None:
        yield {"absent": "compute-sanitizer was not found"}
        return
    kind, only = SANITIZED[item]
    prefix = [tool, "--tool", kind, "--error-exitcode", str(ERRORS_FOUND), "--target-processes", "all"]
    yield from _pytest(SUITE[:1], only, options, tell, prefix=prefix)


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit; None if there is none."""
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


# --- Counters -------------------------------------------------------------------------------------------------------


def counters_items(options: Options) -> Sequence[str]:
    return COUNTED


def counters(item: str, options: Options, tell: Tell) -> Rows:
    """What ncu counts in the slowest kernel of a call, beside what the model predicts of its first configuration."""
    tool = _tool("ncu")
    if tool is None:
        yield {"absent": "ncu was not found"}
        return
    (row,) = (row for row in ROWS if row.name == item)
    predicted = slowest_predicted(item)
    kernel = CUDA_KERNEL if row.backend == "cuda" else predicted["kernel"]
    program = f"from benchmarks.first_contact.measured import call_once; call_once({row.job!r}, {row.backend!r})"
    command = [tool, "--csv", "--page", "details", "--target-processes", "all", "--clock-control", "none"]
    command += ["--cache-control", "none", "--kernel-name", f"regex:^{kernel}", "--launch-count", "1"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    # The configuration that was predicted, and not a measured one.
    status, text = stream([*command, sys.executable, "-c", program], options.seconds, tell, {"FASTVIT_AUTOTUNE": "0"})
    counted = parse_counters(text)
    found = {"kernel": kernel, "predicted": predicted, "counted": counted}
    if not counted:
        refused = "ERR_NVGPUCTRPERM" in text
        found |= {"absent": "profiling is not permitted here"} if refused else {"failed": f"{status}: {_last(text)}"}
    yield found


def slowest_predicted(name: str) -> dict[str, Any]:
    """The slowest kernel of a row's first configuration, in the newest predictions."""
    (row,) = (row for row in predictions() if row["name"] == name)
    kernels = [kernel for kernel in row["configurations"][0]["kernels"] if "grid" in kernel]
    return {key: kernels[0][key] for key in ("kernel", "microseconds", "limiter", "registers", "grid", "busy")}


def predictions() -> list[dict[str, Any]]:
    """The rows of the newest predictions in ``benchmarks/results/``."""
    newest = max((ROOT / "benchmarks" / "results").glob("*-gpu-predictions.json"))
    return json.loads(newest.read_text(encoding="utf-8"))["rows"]


def parse_counters(text: str) -> dict[str, str]:
    """By "name [unit]", the values of ncu's CSV in a text with other lines before it."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name") and row.get("Metric Value"):
            unit = f" [{row['Metric Unit']}]" if row.get("Metric Unit") else ""
            found[f"{row['Metric Name']}{unit}"] = row["Metric Value"]
    return found


# --- Caches ---------------------------------------------------------------------------------------------------------


def caches_items(options: Options) -> Sequence[str]:
    return ["pack"]


def caches(item: str, options: Options, tell: Tell) -> Rows:
    """Pack what was measured and compiled, what is measured first, as far as it may be brought home."""
    target, packed, left_out = Path(options.out, "caches.tar.gz"), 0, 0
    files = [path for path in sorted(CACHES.rglob("*")) if path.is_file()]
    order = {name: place for place, name in enumerate(FIRST_CACHED)}
    files.sort(key=lambda path: order.get(path.relative_to(CACHES).parts[0], len(order)))
    with tarfile.open(target, "w:gz") as archive:
        for path in files:
            if target.stat().st_size + path.stat().st_size > MOST_CACHED:
                left_out += 1
                continue
            archive.add(path, str(path.relative_to(CACHES)))
            packed += 1
    yield {"packed": packed, "left_out": left_out, "bytes": target.stat().st_size}

"""Launches of the CUDA kernels: compiled by nvcc for sm_90, with the arguments that their own host code works out.

The kernels' headers compile for the host as well: a small program makes the kernel's object for a row's sizes, and says
how many blocks it wants, how much shared memory, and the object's bytes, which are the launch's parameters.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.machine_code import Binary, disassemble

CSRC = Path(__file__).resolve().parents[2] / "csrc"
WARPS = 8
"""kThreads of cuda_block_kernel.h."""

DEVICE = """
#include "common/cuda_launch.cuh"
#include "token_depthwise_conv/cuda_passes.h"
using namespace fastvit;
using namespace fastvit::tokens;
void* kernel = reinterpret_cast<void*>(&blocks::run_block<{kernel}>);
"""
HOST = """
#include <cstdio>
#include "token_depthwise_conv/cuda_passes.h"
using namespace fastvit;
using namespace fastvit::tokens;
int main() {{
  char* const data = reinterpret_cast<char*>(1 << 20);
  TokenDepthwiseConv op{{}};
  {setting}
  const {kernel} kernel(op, nullptr);
  static_assert(kThreads == {threads});
  std::printf("%lld %lld ", (long long)kernel.grid(), (long long)kernel.shared_bytes());
  for (size_t i = 0; i < sizeof(kernel); ++i) std::printf("%02x", reinterpret_cast<const unsigned char*>(&kernel)[i]);
}}
"""


def convolution(batch: int, side: int, channels: int, *, residual: bool) -> tuple[str, str, int]:
    """(kernel, C++ that sets its sizes, bytes of memory) of a 3x3 convolution of bfloat16 tokens, with a bias."""
    sizes = {
        "batch": batch, "channels": channels, "height": side, "width": side, "out_height": side, "out_width": side,
        "kernel": 3, "stride": 1, "padding": 1, "x_batch_stride": side * side * channels, "x_token_stride": channels,
    }  # fmt: skip
    setting = [f"op.{name} = {value};" for name, value in sizes.items()]
    setting += [f"op.residual = {int(residual)};", "op.x = data; op.out = data; op.element = Element::bfloat16;"]
    setting += ["op.weight = op.bias = {data, Element::bfloat16};"]
    return "Forward<BFloat16, 8, 3, 1>", "\n  ".join(setting), 4 * batch * side**2 * channels + 20 * channels


CALLS = {"cpvt_s_peg": functools.partial(convolution, side=14, channels=384, residual=True)}
"""By job, what its one launch computes."""


def missing() -> str | None:
    """Why CUDA kernels cannot be predicted here."""
    if nvcc() is None:
        return "nvcc was not found (CUDACXX, PATH)"
    return None if shutil.which("c++") else "there is no c++"


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def compiled(command: list[str], source: str, suffix: str, out: Path) -> None:
    path = out.with_suffix(suffix)
    path.write_text(source, encoding="utf-8")
    subprocess.run([*command, "-std=c++20", f"-I{CSRC}", "-o", str(out), str(path)], check=True, capture_output=True)


def launch(job: str, batch: int) -> Launch:
    """The launch of a job.

    ValueError for a job without one; RuntimeError where nvcc is absent.
    """
    if job not in CALLS:
        raise ValueError(f"job: expected one of {sorted(CALLS)}, got {job!r}")
    compiler, reason = nvcc(), missing()
    if compiler is None or reason is not None:
        raise RuntimeError(reason)
    kernel, setting, traffic = CALLS[job](batch)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "host"
        source = HOST.format(kernel=kernel, setting=setting, threads=32 * WARPS)
        compiled(["c++", "-O0", "-w"], source, ".cpp", program)
        grid, shared, parameters = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()

    def build() -> tuple[Binary, int]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "device.cubin"
            compiled([compiler, "-arch", "sm_90", "-cubin", "-w"], DEVICE.format(kernel=kernel), ".cu", cubin)
            return disassemble(cubin.read_bytes()), int(shared)

    return Launch(kernel, f"{kernel} {grid}", traffic, (int(grid), 1, 1), WARPS, bytes.fromhex(parameters), build)

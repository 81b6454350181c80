"""Launches of the CUDA kernels: compiled by nvcc for sm_90, with the arguments that their own host code works out.

The kernels' headers compile for the host as well: a small program has them choose the kernel for a call's sizes, and
says which it is, how many blocks it wants, how much shared memory, and its bytes, which are the launch's parameters.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.gpu_model.launch import Launch, size_of, tensors_of
from benchmarks.gpu_model.machine_code import Binary, disassemble

CSRC = Path(__file__).resolve().parents[2] / "csrc"
WARPS = 8
"""kThreads of cuda_block_kernel.h."""

DEVICE = """
#include "common/cuda_launch.cuh"
#include "token_depthwise_conv/cuda_passes.h"
void* kernel = reinterpret_cast<void*>(&fastvit::blocks::run_block<{kernel}>);
"""
HOST = """
#include <cstdio>
#include "token_depthwise_conv/cuda_passes.h"
using namespace fastvit;
struct Printer {{
  template <class Kernel>
  void run(const Kernel& kernel) {{
    std::printf("%s\\n%lld %lld ", __PRETTY_FUNCTION__, (long long)kernel.grid(), (long long)kernel.shared_bytes());
    const auto* bytes = reinterpret_cast<const unsigned char*>(&kernel);
    for (size_t i = 0; i < sizeof(kernel); ++i) std::printf("%02x", bytes[i]);
  }}
}};
int main() {{
  char* const data = reinterpret_cast<char*>(1 << 20);
  TokenDepthwiseConv op{{}};
  {setting}
  static_assert(blocks::kThreads == {threads});
  Printer printer;
  tokens::with_element(op.element, [&]<class T>() {{ tokens::convolve_tokens<T>(op, nullptr, printer); }});
}}
"""


def _parameter(tensor: Tensor | None) -> str:
    return "{}" if tensor is None else f"{{data, {_element(tensor)}}}"


def _element(tensor: Tensor) -> str:
    return f"Element::{str(tensor.dtype).removeprefix('torch.')}"


def _setting(a: Any, out: Tensor) -> str:
    """C++ that describes a call, of the arguments of ``fastvit::token_depthwise_conv``."""
    size, padding = a.weight.shape[-1], a.padding
    rows, columns = ((side + 2 * padding - size) // a.stride + 1 for side in (a.height, a.width))
    sizes = {
        "batch": a.x.shape[0], "channels": a.x.shape[2], "prefix_tokens": a.prefix_tokens, "height": a.height,
        "width": a.width, "out_height": rows, "out_width": columns, "kernel": size, "stride": a.stride,
        "padding": padding, "x_batch_stride": a.x.stride(0), "x_token_stride": a.x.stride(1),
        "residual": int(a.residual),
    }  # fmt: skip
    lines = [f"op.{name} = {value};" for name, value in sizes.items()]
    lines += [f"op.x = data; op.out = data; op.element = {_element(a.x)};"]
    lines += [f"op.weight = {_parameter(a.weight)}; op.bias = {_parameter(a.bias)};"]
    for name, activation in (("pre_norm", "pre_activation"), ("norm", "activation")):
        parts = (_parameter(getattr(a, f"{name}_{part}")) for part in ("weight", "bias", "mean", "var"))
        lines += [f"op.{name} = {{{', '.join(parts)}, {getattr(a, f'{name}_eps')}f}};"]
        lines += [f"op.{activation} = static_cast<Activation>({getattr(a, activation)});"]
    return "\n  ".join(lines)


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


@functools.cache
def _chosen(setting: str) -> tuple[str, int, int, bytes]:
    """(kernel, blocks, bytes of shared memory, parameters) of a call."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "host"
        compiled(["c++", "-O0", "-w"], HOST.format(setting=setting, threads=32 * WARPS), ".cpp", program)
        printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    name, _, numbers = printed.partition("\n")
    grid, shared, parameters = numbers.split()
    return name.split("Kernel = ")[1].rstrip("]"), int(grid), int(shared), bytes.fromhex(parameters)


def launch(a: Any, out: Tensor) -> Launch:
    """The launch of a call of ``fastvit::token_depthwise_conv``, of its arguments and its result.

    RuntimeError where nvcc is absent.
    """
    compiler, reason = nvcc(), missing()
    if compiler is None or reason is not None:
        raise RuntimeError(reason)
    kernel, grid, shared, parameters = _chosen(_setting(a, out))

    def build() -> tuple[Binary, int]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "device.cubin"
            compiled([compiler, "-arch", "sm_90", "-cubin", "-w"], DEVICE.format(kernel=kernel), ".cu", cubin)
            return disassemble(cubin.read_bytes()), shared

    traffic = size_of(tensors_of([tuple(a), out]))
    # The last thread of the first warp: it computes outputs, of any tile, but copies no prefix token as the first does.
    facts = (traffic, (grid, 1, 1), WARPS, parameters, build)
    return Launch(kernel.replace("fastvit::", ""), f"{kernel} {parameters.hex()}", *facts, thread=31)

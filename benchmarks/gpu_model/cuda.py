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
import types
from collections.abc import Sequence
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
#include "conv_projection/cuda_forward.h"
void* kernel = reinterpret_cast<void*>(&fastvit::blocks::run_block<{kernel}>);
"""
HOST = """
#include <cstdio>
#include "conv_projection/cuda_forward.h"
using namespace fastvit;
struct Printer {{
  template <class Kernel>
  void run(const Kernel& kernel) {{
    std::printf("%s\\n%lld %lld ", __PRETTY_FUNCTION__, (long long)kernel.grid(), (long long)kernel.shared_bytes());
    const auto* bytes = reinterpret_cast<const unsigned char*>(&kernel);
    for (size_t i = 0; i < sizeof(kernel); ++i) std::printf("%02x", bytes[i]);
    std::printf("\\n");
  }}
  template <class T>
  void convolve(const TokenDepthwiseConv& op, void* conv) {{
    tokens::convolve_tokens<T>(op, conv, *this);
  }}
}};
int main() {{
  char* const data = reinterpret_cast<char*>(1 << 20);
  Projections ops{{}};
  {settings}
  static_assert(blocks::kThreads == {threads});
  Printer device;
  tokens::with_element(ops[0].element, [&]<class T>() {{ {call}; }});
}}
"""
CONVOLUTION, PROJECTION = "device.convolve<T>(ops[0], nullptr)", "tokens::project_tokens<T>(ops, device)"


def _parameter(tensor: Tensor | None) -> str:
    return "{}" if tensor is None else f"{{data, {_element(tensor)}}}"


def _element(tensor: Tensor) -> str:
    return f"Element::{str(tensor.dtype).removeprefix('torch.')}"


def _setting(a: Any, place: int = 0) -> str:
    """C++ that describes a convolution at a place of ``ops``, of the arguments of ``fastvit::token_depthwise_conv``."""
    size, padding = a.weight.shape[-1], a.padding
    rows, columns = ((side + 2 * padding - size) // a.stride + 1 for side in (a.height, a.width))
    sizes = {
        "batch": a.x.shape[0], "channels": a.x.shape[2], "prefix_tokens": a.prefix_tokens, "height": a.height,
        "width": a.width, "out_height": rows, "out_width": columns, "kernel": size, "stride": a.stride,
        "padding": padding, "x_batch_stride": a.x.stride(0), "x_token_stride": a.x.stride(1),
        "residual": int(a.residual),
    }  # fmt: skip
    lines = [f"{name} = {value};" for name, value in sizes.items()]
    lines += ["x = data;", "out = data;", f"element = {_element(a.x)};"]
    lines += [f"weight = {_parameter(a.weight)};", f"bias = {_parameter(a.bias)};"]
    for name, activation in (("pre_norm", "pre_activation"), ("norm", "activation")):
        parts = (_parameter(getattr(a, f"{name}_{part}")) for part in ("weight", "bias", "mean", "var"))
        lines.append(f"{name} = {{{', '.join(parts)}, {getattr(a, f'{name}_eps')}f}};")
        lines.append(f"{activation} = static_cast<Activation>({getattr(a, activation)});")
    return "\n  ".join(f"ops[{place}].{line}" for line in lines)


def _convolution_of(a: Any, name: str) -> Any:
    """The arguments of ``token_depthwise_conv`` for one of q, k and v of ``fastvit::conv_projection``."""
    parts = ("weight", "bias", "norm_weight", "norm_bias", "norm_mean", "norm_var", "norm_eps", "stride", "padding")
    absent = dict.fromkeys(f"pre_norm_{part}" for part in ("weight", "bias", "mean", "var"))
    return types.SimpleNamespace(
        **{part: getattr(a, f"{name}_{part}") for part in parts},
        **{part: getattr(a, part) for part in ("x", "height", "width", "prefix_tokens")},
        **absent, pre_norm_eps=0.0, pre_activation=0, activation=0, residual=False,
    )  # fmt: skip


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
def _chosen(settings: str, call: str) -> list[tuple[str, int, int, bytes]]:
    """(kernel, blocks, bytes of shared memory, parameters) of each launch of a call."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "host"
        source = HOST.format(settings=settings, call=call, threads=32 * WARPS)
        compiled(["c++", "-O0", "-w"], source, ".cpp", program)
        printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for name, numbers in zip(printed[::2], printed[1::2], strict=True):
        grid, shared, parameters = numbers.split()
        kernel = name.split("Kernel = ")[1].rstrip("]")
        found.append((kernel, int(grid), int(shared), bytes.fromhex(parameters)))
    return found


def _launches(settings: str, call: str, traffic: int) -> list[Launch]:
    compiler, reason = nvcc(), missing()
    if compiler is None or reason is not None:
        raise RuntimeError(reason)
    chosen = _chosen(settings, call)
    found = []
    for kernel, grid, shared, parameters in chosen:

        def build(kernel: str = kernel, shared: int = shared) -> tuple[Binary, int]:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "device.cubin"
                compiled([compiler, "-arch", "sm_90", "-cubin", "-w"], DEVICE.format(kernel=kernel), ".cu", cubin)
                return disassemble(cubin.read_bytes()), shared

        # The last thread of the first warp: it computes outputs, of any tile, but copies no prefix token as the first
        # does.
        facts = (traffic // len(chosen), (grid, 1, 1), WARPS, parameters, build)
        name = kernel.replace("fastvit::", "")
        found.append(Launch(name, f"{kernel} {parameters.hex()}", *facts, thread=31))
    return found


def convolution(a: Any, out: Tensor) -> list[Launch]:
    """The launch of a call of ``fastvit::token_depthwise_conv``, of its arguments and its result.

    RuntimeError where nvcc is absent.
    """
    return _launches(_setting(a), CONVOLUTION, size_of(tensors_of([tuple(a), out])))


def projection(a: Any, outs: Sequence[Tensor]) -> list[Launch]:
    """The launches of a call of ``fastvit::conv_projection``; errors as in :func:`convolution`."""
    settings = "\n  ".join(_setting(_convolution_of(a, name), place) for place, name in enumerate("qkv"))
    return _launches(settings, PROJECTION, size_of(tensors_of([tuple(a), list(outs)])))

"""Compiling Triton kernels without a GPU, and reading from the binaries what they will take and do.

``triton.compile`` needs a target, no device; the resource report comes from the tools inside the triton wheel.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tests.helpers import cores

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"cuda": 99 * 1024, "hip": 64 * 1024}
"""Shared memory a block may have: sm_86 and sm_89, the smallest of the CUDA chips meant; gfx942."""

SAMPLED = 29
"""One in so many cases is compiled by default; prime to the chips and dtypes, so that each has its turn."""

Case = TypeVar("Case")


class Build(NamedTuple):
    """One kernel to compile.

    ``types`` gives a Triton type per run-time argument ("*bf16", "i32", ...; with ":16" behind it, a multiple of 16),
    or for an argument that is a NamedTuple one of types, None where a field is None; ``constants`` a value per
    constexpr argument, and per run-time argument that a launch makes one (None, a stride 1).
    """

    kernel: Any
    target: str
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


class Report(NamedTuple):
    """What a binary takes and holds. ``tensor_cores`` counts matrix instructions, ``float64`` says whether any is."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: int
    float64: bool


def compile_kernel(build: Build) -> Report:
    """Compile for the target and read the report."""
    names = build.kernel.arg_names
    missing = set(names) ^ {*build.types, *build.constants}
    assert not missing, f"arguments neither typed nor constant, or unknown: {sorted(missing)}"
    signature, constants, multiples = {}, {}, {}
    for index, name in enumerate(names):
        if name in build.constants:
            signature[name], constants[index,] = "constexpr", build.constants[name]
        elif isinstance(types := build.types[name], tuple):
            signature[name] = type(types)(*("constexpr" if kind is None else kind.split(":")[0] for kind in types))
            constants |= {(index, field): None for field, kind in enumerate(types) if kind is None}
            fields = [field for field, kind in enumerate(types) if kind is not None and kind.endswith(":16")]
            multiples |= {(index, field): [["tt.divisibility", 16]] for field in fields}
        else:
            signature[name] = types.split(":")[0]
            multiples |= {(index,): [["tt.divisibility", 16]]} if types.endswith(":16") else {}
    kind = GluonASTSource if build.kernel.is_gluon() else triton.compiler.ASTSource
    source = kind(build.kernel, signature, constants, multiples)
    target = TARGETS[build.target]
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if build.maxnreg is not None:
        options["maxnreg"] = build.maxnreg
    compiled = triton.compile(source, target=target, options=options)
    read = _read_cuda if target.backend == "cuda" else _read_hip
    return read(compiled)


def assert_fits(report: Report | str, target: str, *, tensor_cores: bool, shared: int | None = None) -> None:
    """Hold a build to its chip: no spills, shared memory within the limit, no float64, tensor cores where meant.

    ``shared``: the limit, where it is not that of the smallest chip.
    """
    assert isinstance(report, Report), report
    assert report.spilled == 0
    assert report.shared <= (shared or SHARED_LIMIT[TARGETS[target].backend])
    assert not report.float64
    assert report.tensor_cores > 0 or not tensor_cores


def sample(cases: Sequence[Case], one_in: int = SAMPLED) -> list[Case]:
    """A few of the cases, spread evenly; all of them with FASTVIT_TEST_AOT=all, which takes minutes."""
    return list(cases) if os.environ.get("FASTVIT_TEST_AOT") == "all" else list(cases[::one_in])


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the report"
    return int(found[1])


def _read_cuda(compiled: Any) -> Report:
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        arguments = [str(cuobjdump), "-res-usage", "-sass", file.name]
        text = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    return Report(
        registers=_number(r"REG:(\d+)", text),
        spilled=_number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text),
        shared=compiled.metadata.shared,
        tensor_cores=len(re.findall(r"\b(?:H?G?MMA|UTC\w*MMA)\b", text)),
        float64=".f64" in compiled.asm["ptx"],
    )


def _read_hip(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]
    return Report(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spilled=_number(r"\.vgpr_spill_count:\s+(\d+)", text),
        shared=compiled.metadata.shared,
        tensor_cores=len(re.findall(r"\bv_mfma_", text)),
        float64=bool(re.search(r"_f64\b", text)),
    )


def compile_all(builds: Sequence[Callable[[], Build]]) -> list[Report | str]:
    """A report, or the error as text, per build. Builds come as picklable calls: kernels themselves do not pickle."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores(), mp_context=context) as pool:
        return list(pool.map(_compile_made, builds, chunksize=4))


def _compile_made(make: Callable[[], Build]) -> Report | str:
    try:
        return compile_kernel(make())
    except Exception as error:  # a failure belongs to its own test, not to the pool
        return f"{type(error).__name__}: {error}"

"""The products' inner loops keep the multipliers of recent CPUs busy, by llvm-mca's models of those CPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLDEST = 19
"""Of LLVM: before, its models have no Zen 4, and other pipes for loads of Ice Lake."""


def find_mca() -> str | None:
    for path in filter(None, map(shutil.which, ("llvm-mca-20", "llvm-mca-19", "llvm-mca"))):
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"LLVM version (\d+)", told)
        if version is not None and int(version[1]) >= OLDEST:
            return path
    return None


MCA = find_mca()
COMPILER = shutil.which("g++")
FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}
# llvm-mca has a 512-bit broadcast of Zen 4 wait for the pipes of the multipliers, which the CPU's load ports make.
CPUS = (
    ("avx2", "haswell"),
    ("avx2", "znver3"),
    ("avx2", "znver4"),
    ("avx2", "icelake-server"),
    ("avx512", "icelake-server"),
    ("avx512", "sapphirerapids"),
)
LEAST = 0.95
"""Of the rate of the multiply-adds alone."""


def straight_lines(assembly: str) -> list[list[str]]:
    """Instructions that run one after the other: what lies between labels and jumps."""
    found: list[list[str]] = [[]]
    for line in assembly.splitlines():
        if re.match(r"\.?\w+:|\s+j", line):
            found.append([])
        elif re.match(r"\s+[a-z]", line):
            found[-1].append(line)
    return found


def cycles(body: list[str], cpu: str) -> float:
    """Of one turn of a loop."""
    turns = 200
    command = [str(MCA), "-mtriple=x86_64", f"-mcpu={cpu}", f"-iterations={turns}"]
    run = subprocess.run(command, input="\n".join(body), capture_output=True, text=True, check=True)
    total = re.search(r"Total Cycles:\s+(\d+)", run.stdout)
    assert total is not None, run.stdout
    return int(total[1]) / turns


@pytest.fixture(scope="module", params=FLAGS)
def loop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """An instruction set, and the body of the loop with the most multiply-adds that it is compiled to."""
    if MCA is None or COMPILER is None:
        pytest.skip(f"needs llvm-mca of LLVM {OLDEST} (Debian: llvm-19) and g++")
    target = tmp_path_factory.mktemp("assembly") / f"{request.param}.s"
    command = [COMPILER, "-std=c++20", "-O3", "-DNDEBUG", "-fno-math-errno", "-ffp-contract=fast", "-Icsrc", "-S"]
    options = [*FLAGS[request.param], f"-DFASTVIT_ISA={request.param}", "csrc/linear/cpu.cpp", "-o", str(target)]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    lines = straight_lines(target.read_text(encoding="utf-8"))
    return request.param, max(lines, key=lambda body: sum("vfmadd" in line for line in body))


def test_the_loop_of_products_is_bound_by_its_multiply_adds(loop: tuple[str, list[str]]) -> None:
    isa, body = loop
    alone = [line for line in body if "vfmadd" in line]
    assert len(alone) == {"avx2": 16 * 12, "avx512": 16 * 28}[isa]  # 16 steps of a whole tile
    shares = {cpu: cycles(alone, cpu) / cycles(body, cpu) for of, cpu in CPUS if of == isa}
    assert all(share >= LEAST for share in shares.values()), shares

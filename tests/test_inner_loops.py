"""The products' inner loops keep the multipliers of recent CPUs busy, by llvm-mca's models of those CPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.standalone.program import build_rules

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


class Target(NamedTuple):
    """What the loop is compiled by, and for."""

    compiler: str
    triple: str
    multiply_add: str
    steps: int  # 16 of a whole tile
    cpus: tuple[str, ...]


TARGETS = {
    "avx2": Target("g++", "x86_64", "vfmadd", 16 * 12, ("haswell", "znver3", "znver4", "icelake-server")),
    # llvm-mca has a 512-bit broadcast of Zen 4 wait for the pipes of the multipliers, which the CPU's load ports make.
    "avx512": Target("g++", "x86_64", "vfmadd", 16 * 28, ("icelake-server", "sapphirerapids")),
    "neon": Target(
        *("aarch64-linux-gnu-g++", "aarch64", "fmla", 16 * 24),
        ("neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2", "apple-m1"),
    ),
}
LEAST = 0.95
"""Of the rate of the multiply-adds alone."""


def straight_lines(assembly: str) -> list[list[str]]:
    """Instructions that run one after the other: what lies between labels and jumps."""
    found: list[list[str]] = [[]]
    for line in assembly.splitlines():
        if re.match(r"\.?\w+:|\s+(j|b\W|b\w\w\s|b\.|cbn?z|tbn?z|ret)", line):
            found.append([])
        elif re.match(r"\s+[a-z]", line):
            found[-1].append(line)
    return found


def cycles(body: list[str], target: Target, cpu: str) -> float:
    """Of one turn of a loop."""
    turns = 200
    command = [str(MCA), f"-mtriple={target.triple}", f"-mcpu={cpu}", f"-iterations={turns}"]
    run = subprocess.run(command, input="\n".join(body), capture_output=True, text=True, check=True)
    total = re.search(r"Total Cycles:\s+(\d+)", run.stdout)
    assert total is not None, run.stdout
    return int(total[1]) / turns


@pytest.mark.parametrize("isa", TARGETS)
def test_the_loop_of_products_is_bound_by_its_multiply_adds(isa: str, tmp_path: Path) -> None:
    target = TARGETS[isa]
    if MCA is None or shutil.which(target.compiler) is None:
        pytest.skip(f"needs llvm-mca of LLVM {OLDEST} (Debian: llvm-19) and {target.compiler}")
    command = [
        target.compiler,
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        "-fno-math-errno",
        "-ffp-contract=fast",
        "-Icsrc",
        "-S",
    ]
    options = [
        *build_rules().ISA_FLAGS[isa],
        f"-DFASTVIT_ISA={isa}",
        "csrc/linear/cpu.cpp",
        "-o",
        str(tmp_path / "linear.s"),
    ]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    lines = straight_lines((tmp_path / "linear.s").read_text(encoding="utf-8"))
    # The loop with the most multiply-adds.
    body = max(lines, key=lambda line: sum(target.multiply_add in word for word in line))
    alone = [line for line in body if target.multiply_add in line]
    assert len(alone) == target.steps
    shares = {cpu: cycles(alone, target, cpu) / cycles(body, target, cpu) for cpu in target.cpus}
    assert all(share >= LEAST for share in shares.values()), shares

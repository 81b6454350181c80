"""A cubin's machine code: instructions with their control codes, and what the compiler allotted."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia as nvidia

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
LOW = re.compile(
    r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_\.a-z]*)([^;]*);\s*/\* 0x([0-9a-f]{16}) \*/"
)
HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
CONTROL_BIT = 41
"""Of the upper half of an instruction: where its control code begins."""

KINDS = {
    **dict.fromkeys(("HMMA", "HGMMA", "MUFU", "LDS", "LDSM", "LDG", "LDGSTS", "STG", "BAR", "SHFL", "IMAD", "NOP")),
    **dict.fromkeys(("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2"), "FP32"),
    **dict.fromkeys(("FMNMX", "FSEL", "FSETP", "FSET", "FCHK"), "FALU"),
    **dict.fromkeys(("STS", "STSM"), "STS"),
    **dict.fromkeys(("LDL", "STL"), "LOCAL"),
    **dict.fromkeys(("MOV", "CS2R", "S2R", "S2UR"), "MOV"),
    **dict.fromkeys(("F2FP", "F2F", "F2I", "I2F", "HADD2", "PRMT", "I2FP"), "CONVERT"),
    **dict.fromkeys(("UTMALDG", "UBLKCP", "UBLKPF"), "BULK"),
}
"""By an instruction's name its kind, where that is not the name."""

BYTES = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


class Instruction(NamedTuple):
    """An instruction; ``predicate`` and ``operands`` as cuobjdump writes them.

    ``stall``: cycles to the warp's next one; ``writes`` and ``reads``: the scoreboard that its end, and the reading of
    its operands, frees (7: none); ``waits``: a bit for each scoreboard that must be free. ``bytes``: a thread's.
    """

    address: int
    predicate: str
    name: str
    operands: tuple[str, ...]
    stall: int
    writes: int
    reads: int
    waits: int
    kind: str
    bytes: int

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def matrices(self) -> int:
        """Of LDSM and STSM: how many 8x8 matrices."""
        found = re.search(r"\.([24])$", self.name)
        return int(found[1]) if found else 1

    @property
    def target(self) -> int:
        """Of a branch: the address it goes to."""
        return int(self.operands[-1].split()[-1], 16)


class Binary(NamedTuple):
    """A kernel's machine code; bytes of ``stack`` are spills."""

    registers: int
    stack: int
    instructions: tuple[Instruction, ...]


def kind_of(name: str) -> str:
    base = name.split(".")[0]
    if base in KINDS:
        return KINDS[base] or base
    return "UNIFORM" if base.startswith("U") else "INTEGER"


def bytes_of(name: str) -> int:
    return next((size for mark, size in BYTES.items() if mark in name), 4)


def operands_of(text: str) -> tuple[str, ...]:
    """The operands between commas, without marks of register reuse."""
    return tuple(part.strip().removesuffix(".reuse") for part in text.split(",")) if text.strip() else ()


def disassemble(cubin: bytes) -> Binary:
    """Read the one kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> Binary:
    """Read what cuobjdump writes of a cubin."""
    found: list[Instruction] = []
    low = None
    for line in text.splitlines():
        if match := LOW.search(line):
            low = match
        elif low is not None and (high := HIGH.search(line)):
            control = int(high[1], 16) >> CONTROL_BIT
            name = low[3]
            found.append(
                Instruction(
                    address=int(low[1], 16),
                    predicate=low[2] or "",
                    name=name,
                    operands=operands_of(low[4]),
                    stall=control & 15,
                    writes=control >> 5 & 7,
                    reads=control >> 8 & 7,
                    waits=control >> 11 & 63,
                    kind=kind_of(name),
                    bytes=bytes_of(name),
                )
            )
            low = None
    usage = [re.search(rf"{field}:(\d+)", text) for field in ("REG", "STACK")]
    registers, stack = (int(match[1]) if match else 0 for match in usage)
    return Binary(registers, stack, tuple(found))

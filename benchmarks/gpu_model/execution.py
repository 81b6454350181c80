"""Which instructions one warp runs: machine code executed for its integers, so that loops run as often as they would.

Registers hold a known integer or None. Arguments come from the constant bank, the thread is one of the first block's;
what comes from memory or out of floating-point arithmetic is unknown, except for the reciprocals that integer divisions
are made of. A branch that depends on something unknown falls through, unless a call (the slow path of a division) lies
in between; loops that do so run given numbers of times, and are gone around where that is none.
"""

from __future__ import annotations

import collections
import contextlib
import re
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.gpu_model.machine_code import Instruction

PARAMETERS = 0x210
"""Where a kernel's parameters begin in the constant bank of sm_90."""

WORD = (1 << 32) - 1
LONGEST = 2_000_000
"""Instructions of a warp, at most."""

SLOW_PATH = 16
"""Instructions up to the call in a branch to a slow path, at most."""

Value = int | None
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]$")
REGISTER = re.compile(r"(U?R)(\d+|Z)(\.64)?$")
PREDICATE = re.compile(r"!?U?P(\d|T)$")
NO_RESULT = frozenset(
    "STG STS STSM STL ST RED BAR BRA EXIT RET CALL BSSY BSYNC NOP DEPBAR LDGDEPBAR LDGSTS MEMBAR WARPSYNC SYNCS "
    "UTMALDG UTMASTG UBLKCP BREAK ERRBAR CCTL FENCE WARPGROUP YIELD UTMACMDFLUSH".split()
)


class Loop(NamedTuple):
    """One entry of a loop: the places in the trace behind each of its iterations."""

    ends: tuple[int, ...]


class Trace(NamedTuple):
    """What a warp runs. Instructions whose predicate is known to be false have the kind "NOP".

    ``unknown``: how many loops ran an assumed number of times.
    """

    instructions: list[Instruction]
    loops: list[Loop]
    unknown: int


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 & 1 else value


def as_float(value: int) -> float:
    return struct.unpack("<f", struct.pack("<I", value & WORD))[0]


def as_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


class Warp:
    """A warp of the first block of a launch: that of ``thread``."""

    def __init__(
        self, parameters: bytes, threads: int, grid: Sequence[int], trips: Sequence[int], thread: int = 0
    ) -> None:
        sizes = (threads, 1, 1, *grid)
        self.constants = struct.pack("<6I", *sizes).ljust(PARAMETERS, b"\0") + parameters
        self.trips, self.thread = trips, thread
        self.registers: dict[tuple[str, int], Value] = {}
        self.predicates: dict[str, bool | None] = {}

    # --- Operands ---

    def constant(self, place: int, size: int) -> Value:
        end = place + size
        return int.from_bytes(self.constants[place:end], "little") if end <= len(self.constants) else None

    def read(self, text: str, size: int = 4) -> Value:
        """An operand, of 4 or 8 bytes, as an unsigned number."""
        mask = (1 << 8 * size) - 1
        if text[:1] in "-~" and not text[1:2].isdigit():
            value = self.read(text[1:], size)
            return None if value is None else (-value if text[0] == "-" else ~value) & mask
        if found := REGISTER.match(text):
            if found[2] == "Z":
                return 0
            number = int(found[2])
            words = [self.registers.get((found[1], number + i)) for i in range(size // 4)]
            known = [word for word in words if word is not None]
            return sum(word << 32 * i for i, word in enumerate(known)) if len(known) == len(words) else None
        if found := CONSTANT.match(text):
            return self.constant(int(found[1], 16), size)
        try:
            return int(text, 0) & mask
        except ValueError:
            return None

    def holds(self, text: str) -> bool | None:
        """A predicate; None where it is not known."""
        name = text.lstrip("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return None if value is None else value != text.startswith("!")

    def write(self, text: str, value: Value, words: int = 1) -> None:
        if (found := REGISTER.match(text)) and found[2] != "Z":
            for i in range(words):
                self.registers[found[1], int(found[2]) + i] = None if value is None else value >> 32 * i & WORD

    # --- Instructions ---

    def step(self, i: Instruction) -> None:
        """Carry out one instruction's integer results."""
        base = i.base.removeprefix("U") if i.base in UNIFORM else i.base
        compute = OPERATIONS.get(base)
        if compute is not None:
            compute(self, i)
        elif i.base not in NO_RESULT:
            self.forget(i)

    def forget(self, i: Instruction) -> None:
        """Make what an instruction writes unknown."""
        words = 4 if ".128" in i.name or i.base in ("HMMA", "LDSM") else 2 if ".64" in i.name or "WIDE" in i.name else 1
        if i.base == "HGMMA":
            words = int(i.name.split("x")[1]) // 2
        for text in i.operands:
            if REGISTER.match(text):
                return self.write(text, None, words)
            if not PREDICATE.match(text):
                return None
            self.predicates[text] = None
        return None

    def split(self, i: Instruction) -> tuple[str, list[str], list[str]]:
        """(result, predicates that are written, sources)."""
        result, *rest = i.operands
        written = []
        if PREDICATE.match(result):
            written.append(result)
            result, *rest = rest
        while rest and PREDICATE.match(rest[0]) and i.base != "SEL":
            written.append(rest.pop(0))
        return result, written, rest

    def move(self, i: Instruction) -> None:
        words = 2 if ".64" in i.name or i.base == "CS2R" else 1
        source = i.operands[1]
        if source == "SR_TID.X":
            return self.write(i.operands[0], self.thread, words)
        if source == "SRZ" or source.startswith(("SR_TID", "SR_CTAID", "SR_LANEID", "SR_Cga")):
            return self.write(i.operands[0], 0, words)
        value = self.read(source, 4 * words)
        if value is not None and ".U8" in i.name:
            value &= 255
        return self.write(i.operands[0], value, words)

    def add(self, i: Instruction) -> None:
        result, carries, sources = self.split(i)
        values = [self.read(text) for text in sources if not PREDICATE.match(text)]
        carried: list[bool | None] = []
        if ".X" in i.name:
            carried = [self.holds(text) for text in sources if PREDICATE.match(text)]
        if any(value is None for value in values) or None in carried:
            total = None
        else:
            # A negated operand adds its complement and one, whose carry counts.
            total = sum(value for value in values if value is not None) + sum(map(bool, carried))
            total += sum(1 << 32 for text in sources if text.startswith("-") and self.read(text[1:]) == 0)
        self.write(result, total)
        for number, carry in enumerate(carries):
            self.predicates[carry] = None if total is None else total >> 32 > number

    def multiply(self, i: Instruction) -> None:
        result, carries, sources = self.split(i)
        wide, high = ".WIDE" in i.name, ".HI" in i.name
        factors = [self.read(text) for text in sources[:2]]
        addend = self.read(sources[2], 8 if wide or high else 4)
        carry: bool | None = False
        if ".X" in i.name:
            carry = self.holds(sources[3])
        if None in factors:
            zero = 0 in factors
            factors = [0, 0] if zero else factors
        if None in factors or addend is None or carry is None:
            total = None
        else:
            a, b = (value or 0 for value in factors)
            if ".U32" not in i.name:
                a, b = signed(a), signed(b)
            total = a * b + addend + carry
            total = total >> 32 if high else total
        self.write(result, total, 2 if wide else 1)
        for name in carries:
            self.predicates[name] = None if total is None else total >> (64 if wide else 32) > 0

    def compare(self, i: Instruction) -> None:
        first, second, *sources = i.operands
        a, b = (self.read(text) for text in sources[:2])
        _, relation, *marks = i.name.split(".")
        found: bool | None = None
        if a is not None and b is not None:
            if "U32" not in marks:
                a, b = signed(a), signed(b)
            sign = (a > b) - (a < b)
            if "EX" in marks and sign == 0:  # of the upper words, behind that of the lower ones
                found = self.holds(sources[3])
            elif "EX" in marks and relation in ("EQ", "NE"):
                found = relation == "NE"
            else:
                found = (
                    sign in {"LT": (-1,), "LE": (-1, 0), "EQ": (0,), "NE": (-1, 1), "GE": (0, 1), "GT": (1,)}[relation]
                )
        other = self.holds(sources[2])
        self.combine(first, found, other, marks)
        self.combine(second, None if found is None else not found, other, marks)

    def combine(self, name: str, found: bool | None, other: bool | None, marks: Sequence[str]) -> None:
        if name in ("PT", "UPT"):
            return
        decisive = "OR" in marks  # the value that settles it alone
        if "XOR" in marks:
            self.predicates[name] = None if found is None or other is None else found != other
        elif decisive in (found, other):
            self.predicates[name] = decisive
        else:
            self.predicates[name] = None if None in (found, other) else not decisive

    def table(self, i: Instruction) -> None:
        """LOP3: a truth table of three operands, bit by bit."""
        result, written, sources = self.split(i)
        values = [self.read(text) for text in sources[:3]]
        lut, total = int(sources[3], 16), None
        if lut == 0xC0 and 0 in values[:2]:
            total = 0
        elif None not in values:
            total = 0
            for place in (place for place in range(8) if lut >> place & 1):
                bits = WORD
                for number, value in enumerate(values):
                    bits &= (value or 0) if place >> (2 - number) & 1 else ~(value or 0)
                total |= bits & WORD
        self.write(result, total)
        before = self.holds(sources[4]) if len(sources) > 4 else False  # as when 64 bits are looked at half by half
        for name in written:
            self.predicates[name] = True if before or total else None if None in (before, total) else False

    def predicate_table(self, i: Instruction) -> None:
        first, second, *sources = i.operands
        values = [self.holds(text) for text in sources[:3]]
        for name, lut in ((first, sources[3]), (second, sources[4])):
            if name not in ("PT", "UPT"):
                places = [
                    place
                    for place in range(8)
                    if all(value in (None, bool(place >> 2 - n & 1)) for n, value in enumerate(values))
                ]
                results = {int(lut, 16) >> place & 1 for place in places}
                self.predicates[name] = bool(results.pop()) if len(results) == 1 else None

    def shift(self, i: Instruction) -> None:
        result, _, sources = self.split(i)
        low, count, high = (self.read(text) for text in sources[:3])
        if None in (low, count, high):
            return self.write(result, None)
        assert low is not None and count is not None and high is not None
        both = high << 32 | low
        if ".L." in i.name:
            value = (both << count) >> 32 if ".HI" in i.name else low << count
        elif ".HI" in i.name:
            value = (signed(high) if ".S32" in i.name or ".S64" in i.name else high) >> count
        else:
            value = both >> count
        return self.write(result, value)

    def scaled_add(self, i: Instruction) -> None:
        result, carries, sources = self.split(i)
        a, b = (self.read(text) for text in sources[:2])
        high = 0
        if ".HI" in i.name and ".SX32" not in i.name:
            upper = self.read(sources[2])
            count_at = 3
        else:
            upper, count_at = 0, 2
        count = self.read(sources[count_at])
        carry: bool | None = self.holds(sources[count_at + 1]) if ".X" in i.name else False
        if None in (a, b, upper, count) or carry is None:
            total = None
        else:
            assert a is not None and b is not None and upper is not None and count is not None
            whole = signed(a) & (1 << 64) - 1 if ".SX32" in i.name else upper << 32 | a
            high = (whole << count) >> 32 & WORD
            total = (high if ".HI" in i.name else a << count & WORD) + b + carry
        self.write(result, total)
        for name in carries:
            self.predicates[name] = None if total is None else total >> 32 > 0

    def select(self, i: Instruction) -> None:
        result, first, second, which = i.operands
        holds = self.holds(which)
        self.write(result, None if holds is None else self.read(first if holds else second))

    def extreme(self, i: Instruction) -> None:
        """The smaller or larger of two numbers; VIADDMNMX: the first is the sum of two."""
        result, *sources, which = i.operands
        *values, b = (self.read(text) for text in sources)
        smaller = self.holds(which)
        if b is None or smaller is None or None in values:
            return self.write(result, None)
        a = sum(value for value in values if value is not None) & WORD
        if ".U32" not in i.name:
            a, b = signed(a), signed(b)
        return self.write(result, (min(a, b) if smaller else max(a, b)) & WORD)

    def absolute(self, i: Instruction) -> None:
        value = self.read(i.operands[1])
        self.write(i.operands[0], None if value is None else abs(signed(value)))

    def extend(self, i: Instruction) -> None:
        """SGXT: the lowest bits, with their sign."""
        value, bits = self.read(i.operands[1]), self.read(i.operands[2])
        if value is not None and bits:
            value &= (1 << bits) - 1
            if ".U32" not in i.name and value >> bits - 1:
                value -= 1 << bits
        self.write(i.operands[0], value)

    def half_constants(self, i: Instruction) -> None:
        """HFMA2 of zeros: how a compiler writes two halves as a constant."""
        halves = bytearray()
        if i.operands[1].lstrip("-") == i.operands[2].lstrip("-") == "RZ":
            for text in (i.operands[4], i.operands[3]):
                with contextlib.suppress(ValueError):
                    halves += struct.pack("<e", float(text))
        self.write(i.operands[0], int.from_bytes(halves, "little") if len(halves) == 4 else None)

    def to_float(self, i: Instruction) -> None:
        value = self.read(i.operands[1])
        if value is not None:
            value = as_bits(float(value if ".U32" in i.name else signed(value)))
        self.write(i.operands[0], value)

    def reciprocal(self, i: Instruction) -> None:
        value = self.read(i.operands[1]) if i.name == "MUFU.RCP" else None
        number = as_float(value) if value is not None else 0.0
        self.write(i.operands[0], as_bits(1.0 / number) if number else None)

    def to_integer(self, i: Instruction) -> None:
        value = self.read(i.operands[1])
        number = as_float(value) if value is not None else float("nan")
        self.write(i.operands[0], int(number) if 0 <= number < 1 << 32 else None)

    def permute(self, i: Instruction) -> None:
        """PRMT with an immediate selector."""
        result, a, selector, b = i.operands
        low, chosen, high = self.read(a), self.read(selector), self.read(b)
        if low is None or chosen is None or high is None:
            return self.write(result, None)
        both = high << 32 | low
        return self.write(result, sum((both >> 8 * (chosen >> 4 * n & 7) & 255) << 8 * n for n in range(4)))


OPERATIONS: dict[str, Callable[[Warp, Instruction], None]] = {
    **dict.fromkeys(("MOV", "S2R", "S2UR", "CS2R", "LDC", "R2UR"), Warp.move),
    **dict.fromkeys(("IADD3", "IADD", "VIADD"), Warp.add),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX"), Warp.extreme),
    "HFMA2": Warp.half_constants,
    "IMAD": Warp.multiply,
    "ISETP": Warp.compare,
    "LOP3": Warp.table,
    "PLOP3": Warp.predicate_table,
    "SHF": Warp.shift,
    "LEA": Warp.scaled_add,
    "SEL": Warp.select,
    "IABS": Warp.absolute,
    "SGXT": Warp.extend,
    "I2F": Warp.to_float,
    "MUFU": Warp.reciprocal,
    "F2I": Warp.to_integer,
    "PRMT": Warp.permute,
}
UNIFORM = frozenset("U" + name for name in OPERATIONS) | {"ULDC"}


def goes_back(i: Instruction) -> bool:
    return i.base == "BRA" and i.target <= i.address


def trace(instructions: Sequence[Instruction], warp: Warp) -> Trace:
    """Run a kernel to its end.

    RuntimeError for one that runs longer than ``LONGEST`` instructions.
    """
    place_of = {i.address: place for place, i in enumerate(instructions)}
    loops_at = {place_of[i.target]: place for place, i in enumerate(instructions) if goes_back(i)}
    ran: list[Instruction] = []
    loops: list[Loop] = []
    ends: dict[int, list[int]] = collections.defaultdict(list)
    returns: list[int] = []
    place = unknown = 0
    while place < len(instructions):
        i = instructions[place]
        holds = warp.holds(i.predicate) if i.predicate else True
        place += 1
        if len(ran) > LONGEST:
            raise RuntimeError(f"a warp runs more than {LONGEST} instructions")
        if holds is False:
            ran.append(i._replace(kind="NOP"))
        else:
            ran.append(i)
        if i.base == "BRA":
            # A second condition stands in front of the target.
            conditions = [holds, *(warp.holds(text) for text in i.operands[:-1] if PREDICATE.match(text))]
            taken: bool | None = (
                False if False in conditions or ".DIV" in i.name else None if None in conditions else True
            )
            backward = goes_back(i)
            if taken is None and backward:
                unknown += not ends[i.address]
                taken = len(ends[i.address]) + 1 < warp.trips[min(unknown, len(warp.trips)) - 1]
            elif taken is None:
                between = instructions[place : min(place_of[i.target], place + SLOW_PATH)]
                taken = any(each.base == "CALL" for each in between)
                around = any(place <= begin <= end < place_of[i.target] for begin, end in loops_at.items())
                if around and warp.trips[min(unknown, len(warp.trips) - 1)] == 0:
                    taken = True
                    unknown += 1
            if backward:
                ends[i.address].append(len(ran))
                if not taken:
                    loops.append(Loop(tuple(ends.pop(i.address))))
            if taken:
                place = place_of[i.target]
        elif holds is False:
            continue
        elif i.base == "CALL":
            returns.append(place)
            place = place_of[i.target]
        elif i.base == "RET":
            place = returns.pop()
        elif i.base == "EXIT":
            if holds:
                break
        elif holds:
            warp.step(i)
        else:  # it may or may not write
            warp.forget(i) if i.base not in NO_RESULT else None
    return Trace(ran, loops, unknown)

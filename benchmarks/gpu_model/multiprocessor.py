"""One Hopper multiprocessor, in order, over real machine code with its real control codes (stalls, scoreboards).

Optimistic: no bank conflicts, no instruction cache, equal warps, a fixed latency and bandwidth of the L2. Good to
perhaps 30 % in absolute terms, better between two versions of one kernel.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.gpu_model.execution import Trace
from benchmarks.gpu_model.machine_code import Instruction

CLOCK, MULTIPROCESSORS, REGISTERS, SHARED, WARPS, BLOCKS = 1.755e9, 132, 65536, 228 * 1024, 64, 32
QUARTERS = 4
BANDWIDTH = 4.3e12
"""Bytes a second of an H200's memory, read and written."""
PRODUCTS = 600e12
"""FLOP/s of cuBLAS's 16-bit products at the models' sizes: three quarters of what it reaches with large matrices."""
L2_READ = L2_WRITE = 64.0
"""Bytes a cycle of a multiprocessor."""
LEAST = 1.7e-6
"""Seconds of the smallest kernel in the replay of a CUDA graph."""

LATENCY = {
    "LDS": 30, "LDSM": 33, "STS": 20, "SHFL": 25, "MUFU": 22, "HMMA": 33, "CONVERT": 16, "STG": 30, "IMAD": 10,
    "LDG": 280, "LDGSTS": 300, "BULK": 500,
}  # fmt: skip
"""Cycles to the result; of loads from the L2. An asynchronous copy is written to shared memory behind its load."""
OTHER_LATENCY, BARRIER, MEMORY_QUEUE = 14, 22, 24

KEPT = 4
"""Iterations of the longest loop that are simulated; the others take as long as those behind the first."""


class Use(NamedTuple):
    """A part that an instruction occupies: one of a quarter, or of the whole multiprocessor."""

    part: str
    cycles: float
    quarter: bool


@functools.cache
def occupied(name: str, kind: str, size: int, matrices: int) -> tuple[Use, ...]:
    """What a warp's instruction occupies, and for how many cycles."""
    shared = Use("shared memory", max(1, size * 32 / 128), False)
    if kind == "IMAD":
        return (Use("fma", 1 if ".MOV" in name else 2, True),)
    if kind == "CONVERT":
        slow = name.split(".")[0] in ("F2F", "I2F", "F2I")
        return (Use("special", 8, True) if slow else Use("alu", 2, True),)
    if kind == "HGMMA":
        columns = int(re.findall(r"64x(\d+)x", name)[0])
        return (Use("tensor", max(8, columns / 64 * 32 * 1.1), True),)
    if kind in ("LDSM", "SHFL"):
        return (Use("shared memory", matrices if kind == "LDSM" else 1, False),)
    if kind == "STS":
        return (Use("shared memory", matrices, False) if "STSM" in name else shared,)
    if kind == "LDG":
        return shared, Use("L2 reads", size * 32 / L2_READ, False)
    if kind == "LDGSTS":  # past the registers: shared memory is written as the data arrive
        return shared, Use("L2 reads", size * 32 / L2_READ, False)
    if kind == "STG":
        return shared, Use("L2 writes", size * 32 / L2_WRITE, False)
    simple = {
        "FP32": ("fma", 1), "FALU": ("alu", 2), "INTEGER": ("alu", 2), "MUFU": ("special", 8), "HMMA": ("tensor", 6),
        "UNIFORM": ("uniform", 2), "BULK": ("uniform", 2),
    }  # fmt: skip
    part, cycles = simple.get(kind, ("other", 1))
    return (shared,) if kind == "LDS" else (Use(part, cycles, True),)


def uses(i: Instruction) -> tuple[Use, ...]:
    return occupied(i.name, i.kind, i.bytes, i.matrices)


def resident(registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    per_warp = math.ceil(registers * 32 / 256) * 256
    return max(1, min(REGISTERS // (per_warp * warps), SHARED // (shared + 1024), WARPS // warps, BLOCKS))


def pressure(instructions: Sequence[Instruction], warps: int) -> dict[str, float]:
    """Cycles that each part is busy when ``warps`` warps run these instructions: no run can be shorter."""
    busy: dict[str, float] = collections.defaultdict(float)
    for i in instructions:
        for part, cycles, quarter in uses(i):
            busy[part] += cycles * warps / (QUARTERS if quarter else 1)
    busy["issue slots"] = len(instructions) * warps / QUARTERS
    busy.pop("other", None)
    return dict(sorted(busy.items(), key=lambda item: -item[1]))


class _Warp:
    __slots__ = ("at", "blocked", "bulk", "finished", "group", "groups", "pending", "ready", "scoreboards")

    def __init__(self) -> None:
        self.at, self.ready, self.blocked, self.finished = 0, 0.0, False, False
        self.scoreboards = [0.0] * 6
        self.pending = 0.0  # its HGMMAs
        self.group = 0.0  # copies since the last LDGDEPBAR
        self.groups: list[float] = []
        self.bulk = 0.0


def waits_for_copies(i: Instruction, warp: _Warp) -> float:
    """When DEPBAR lets a warp with asynchronous copies or HGMMAs on."""
    if i.base == "DEPBAR" and warp.groups:
        left = int(i.operands[1], 16) if len(i.operands) > 1 else 0
        done = warp.groups[: len(warp.groups) - left]
        return max(done, default=0.0)
    if i.base == "SYNCS":
        return warp.bulk
    return warp.pending if i.name.startswith(("DEPBAR", "WARPGROUP.DEPBAR")) else 0.0


def simulate(
    run: Sequence[Instruction], warps: int, blocks: int, marks: Sequence[int] = ()
) -> tuple[float, dict[int, float]]:
    """(cycles, {mark: the cycle in which the last warp issues that place of ``run``}) of so many equal blocks."""
    all_uses = [uses(i) for i in run]
    everyone = [_Warp() for _ in range(warps * blocks)]
    quarter_free: list[dict[str, float]] = [collections.defaultdict(float) for _ in range(QUARTERS)]
    free: dict[str, float] = collections.defaultdict(float)
    arrived: list[list[_Warp]] = [[] for _ in range(blocks)]
    reached: dict[int, float] = {}
    marked = set(marks)
    turn = [[(n, warp) for n, warp in enumerate(everyone) if n % QUARTERS == q] for q in range(QUARTERS)]
    now, done = 0.0, 0
    while done < len(everyone):
        progress, soonest = False, math.inf
        for q, waiting in enumerate(turn):
            for position, (number, warp) in enumerate(waiting):  # noqa: B007 - the one that issues
                if warp.finished or warp.blocked or warp.ready > now:
                    if not (warp.finished or warp.blocked):
                        soonest = min(soonest, warp.ready)
                    continue
                i = run[warp.at]
                possible = warp.ready
                if i.waits:
                    for n, scoreboard in enumerate(warp.scoreboards):
                        if i.waits >> n & 1 and scoreboard > possible:
                            possible = scoreboard
                if i.base in ("DEPBAR", "WARPGROUP", "SYNCS"):
                    possible = max(possible, waits_for_copies(i, warp))
                for part, _, of_quarter in all_uses[warp.at]:
                    if of_quarter:
                        possible = max(possible, quarter_free[q][part])
                    elif part == "shared memory":
                        possible = max(possible, free[part] - MEMORY_QUEUE)
                if possible <= now:
                    break
                soonest = min(soonest, possible)
            else:
                continue
            progress, begun = True, now
            turn[q] = waiting[position + 1 :] + waiting[: position + 1]
            for part, cycles, of_quarter in all_uses[warp.at]:
                if of_quarter:
                    quarter_free[q][part] = max(quarter_free[q][part], now) + cycles
                else:
                    free[part] = max(free[part], now) + cycles
                    begun = max(begun, free[part])
            finish = begun + LATENCY.get(i.kind, OTHER_LATENCY)
            if i.kind == "HGMMA":
                finish = max(now, quarter_free[q]["tensor"]) + 30
                warp.pending = max(warp.pending, finish)
            elif i.kind == "LDGSTS":
                warp.group = max(warp.group, finish)
            elif i.kind == "BULK":
                for other in everyone[number // warps * warps : (number // warps + 1) * warps]:
                    other.bulk = max(other.bulk, finish)
            elif i.base == "LDGDEPBAR":
                warp.groups.append(warp.group)
            if i.writes < 6:
                warp.scoreboards[i.writes] = max(warp.scoreboards[i.writes], finish)
            if i.reads < 6:
                warp.scoreboards[i.reads] = max(warp.scoreboards[i.reads], begun + 12)
            warp.ready = now + max(1, i.stall)
            if i.kind == "BAR":
                here = arrived[number // warps]
                here.append(warp)
                warp.blocked = True
                if len(here) == warps:
                    for other in here:
                        other.blocked, other.ready = False, now + BARRIER
                    here.clear()
            if warp.at in marked:
                reached[warp.at] = now
            warp.at += 1
            if warp.at >= len(run):
                warp.finished = True
                done += 1
        now = now + 1 if progress or soonest == math.inf else max(now + 1, soonest)
    busy = [cycle for parts in (*quarter_free, free) for cycle in parts.values()]
    return max(now, *busy), reached


def shorten(trace: Trace) -> tuple[list[Instruction], tuple[int, int], int]:
    """A run with few iterations of the longest loop.

    Returns:
        The run; the places behind the first iteration and the last but one; by how many iterations it is short.
    """
    gains = {
        (loop.ends[-2] - loop.ends[0]) * (1 - (KEPT - 2) / (len(loop.ends) - 2)): loop
        for loop in trace.loops
        if len(loop.ends) > KEPT
    }
    if not gains:
        return trace.instructions, (0, 0), 0
    ends = gains[max(gains)].ends
    kept = [*trace.instructions[: ends[KEPT - 2]], *trace.instructions[ends[-2] :]]
    return kept, (ends[0] - 1, ends[KEPT - 2] - 1), len(ends) - KEPT


class Prediction(NamedTuple):
    """Of one launch: seconds, what limits it, and the facts behind that."""

    seconds: float
    limiter: str
    blocks: int
    waves: float
    instructions: int
    busy: dict[str, float]


def predict(trace: Trace, registers: int, shared: int, warps: int, programs: int, traffic: int) -> Prediction:
    """How long a kernel takes.

    Args:
        registers: of a thread. shared: bytes of a block. warps: of a block. programs: blocks of the grid.
        traffic: bytes of memory that it reads and writes.
    """
    blocks = min(resident(registers, shared, warps), math.ceil(programs / MULTIPROCESSORS))
    run, (first, last), missing = shorten(trace)
    cycles, reached = simulate(run, warps, blocks, (first, last))
    if missing:
        cycles += missing * (reached[last] - reached[first]) / (KEPT - 2)
    waves = programs / (MULTIPROCESSORS * blocks)
    computing, moving = max(1.0, waves) * cycles / CLOCK, traffic / BANDWIDTH
    busy = {part: used / cycles for part, used in pressure(trace.instructions, warps * blocks).items()}
    part, share = next(iter(busy.items()))
    seconds = max(computing, moving, LEAST)
    limiter = f"{part} {100 * share:.0f} %" if share > 0.6 else f"latency, {part} {100 * share:.0f} %"
    if seconds == moving:
        limiter = "memory"
    elif seconds == LEAST:
        limiter = "launch"
    return Prediction(seconds, limiter, blocks, waves, len(trace.instructions), busy)

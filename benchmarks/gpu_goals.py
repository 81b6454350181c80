"""The goals on a GPU, in bfloat16 at batch 64, and whether ``benchmarks.first_contact`` met them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BATCH, DTYPE = 64, "bfloat16"


class Goal(NamedTuple):
    """The fused form must be ``at_least`` times as fast as the fastest candidate whose name starts with ``over``.

    For a floor that is less than 1: ``at_least=1 / 1.3`` allows 1.3 times its time.
    """

    job: str
    mode: str
    over: str
    at_least: float


class MemoryGoal(NamedTuple):
    """The peak memory of a fused model's training step must be at most this fraction of the plain model's."""

    model: str
    at_most: float


_COMPILED = "compile_max_autotune"
_CONVOLUTIONS = ("cpvt_s_peg", "cvt13_stage1_q", "cvt13_stage1_kv")
_MODES = ("inference", "training")

GOALS = (
    Goal("deepvit_s", "inference", _COMPILED, 4.0),
    Goal("deepvit_s_training", "training", _COMPILED, 3.0),
    Goal("cait_s24", "inference", _COMPILED, 4.0),
    Goal("cait_s24", "training", _COMPILED, 3.0),
    Goal("vit_b_padding", "inference", "sdpa", 1.3),
    Goal("vit_b_512_padding", "inference", "sdpa", 1.3),
    Goal("vit_b", "inference", "sdpa", 1.0),
    Goal("vit_s", "inference", "sdpa", 1.0),
    Goal("cait_s_class", "inference", "sdpa", 1.0),
    *(Goal(job, mode, "floor_copy", 1 / 1.3) for job in _CONVOLUTIONS for mode in _MODES),
    *(Goal(job, mode, "cudnn_nchw", 3.0) for job in _CONVOLUTIONS for mode in _MODES),
    Goal("ceit_s_leff", "inference", _COMPILED, 2.0),
    Goal("cvt13_stage1_projection", "inference", _COMPILED, 2.0),
    Goal("cvt13_stage3_projection", "inference", _COMPILED, 2.0),
)
MEMORY_GOALS = (MemoryGoal("deepvit_s", 1 / 3),)


def _speed(goal: Goal, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """How many times as fast as its peer, in the best row that measured both; None if none did."""
    found = []
    for row in rows:
        if (row["job"], row["mode"], row["batch"], row["dtype"]) == (goal.job, goal.mode, BATCH, DTYPE):
            times = {name: measured["median"] for name, measured in row["milliseconds"].items()}
            peers = [time for name, time in times.items() if name.startswith(goal.over)]
            if peers and "fused" in times:
                found.append(min(peers) / times["fused"])
    return max(found, default=None)


def _fraction(goal: MemoryGoal, steps: Sequence[Mapping[str, Any]]) -> float | None:
    for step in steps:
        peaks = step["peak_mebibytes"]
        if (step["model"], step["batch"]) == (goal.model, BATCH) and peaks["fused"] is not None:
            return peaks["fused"]["peak"] / peaks["plain"]["peak"]
    return None


def judge(rows: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal, what was reached (None if it was not measured), and whether it is met."""
    found = []
    for goal in GOALS:
        reached = _speed(goal, rows)
        found.append({**goal._asdict(), "reached": reached, "met": reached is not None and reached >= goal.at_least})
    for memory in MEMORY_GOALS:
        reached = _fraction(memory, steps)
        found.append({**memory._asdict(), "reached": reached, "met": reached is not None and reached <= memory.at_most})
    return found


def describe_goal(goal: Mapping[str, Any]) -> str:
    """A line of the report."""
    if "model" in goal:
        name, wanted = f"{goal['model']} step's peak memory over plain's", f"at most {goal['at_most']:.2f}"
    else:
        name, wanted = f"{goal['job']} {goal['mode']} over {goal['over']}", f"at least {goal['at_least']:.2f}"
    reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.2f}"
    return f"{'met   ' if goal['met'] else 'NOT MET'} {name}: {reached}, {wanted}"

"""The depthwise family on the CPU and its goals: ``python -m benchmarks.depthwise_goals``.

    python -m benchmarks.depthwise_goals [--isa avx2] [--threads 2] [--batch 1 8] [--dtype float32] [--only ceit]
                                         [--rounds N] [--json FILE]

1. ``token_depthwise_conv`` at inference, compared with eager, the library's convolutions and a copy of its bytes.
2. ``conv_projection`` at inference, compared with eager and the library's convolutions.
3. A training step of ``token_depthwise_conv`` and its backward pass alone, compared with eager.
4. The goals, each of which is met if all of its rows meet it.

``benchmarks/ops/token_depthwise_conv.py`` and ``benchmarks/ops/conv_projection.py`` describe the columns. The exit
status is 0 whether or not a goal is met.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.ops import _table, conv_projection, token_depthwise_conv
from benchmarks.ops._table import Row
from benchmarks.timing import keep_memory

TABLES = {
    ("token_depthwise_conv", "inference"): token_depthwise_conv.INFERENCE,
    ("conv_projection", "inference"): conv_projection.TABLE,
    ("token_depthwise_conv", "training"): token_depthwise_conv.TRAINING,
}
"""What is measured, by operator and mode."""


class Rows(NamedTuple):
    """The rows of a goal: those of a table whose names start with one of ``names``; and which of their times count."""

    what: str
    op: str
    mode: str
    names: tuple[str, ...] = ("",)
    times: str = "ms"


class Goal(NamedTuple):
    """In every row fastvit must be at least ``wanted`` times as fast as the fastest of ``over``.

    If that is a ``floor``, fastvit must take at most ``wanted`` times as long.
    """

    rows: Rows
    dtype: str
    batch: int
    over: tuple[str, ...]
    wanted: float
    floor: bool = False

    def reached(self, row: Row) -> float | None:
        """What one row reached; None if its result is inaccurate."""
        times = {name: measured["median"] for name, measured in row[self.rows.times].items()}
        peer, ours = min(times[name] for name in self.over), times["fastvit"]
        if not row["accurate"]:
            return None
        return ours / peer if self.floor else peer / ours

    def is_met_by(self, reached: float | None) -> bool:
        return reached is not None and (reached <= self.wanted if self.floor else reached >= self.wanted)


_LEFF = Rows("LeFF middle", "token_depthwise_conv", "inference", ("ceit LeFF middle",))
_BARE = Rows("bare convolution", "token_depthwise_conv", "inference", ("cpvt PEG", "ceit depthwise", "cvt"))
_PROJECTION = Rows("conv_projection", "conv_projection", "inference")
_BACKWARD = Rows("backward pass", "token_depthwise_conv", "training", times="backward_ms")
_LEFF_WANTED = {"float32": 4.0, "bfloat16": 8.0}
_LIBRARY = ("nchw", "channels-last")
_EVERY = tuple(itertools.product(("float32", "bfloat16"), (8, 1)))

GOALS = (
    *(Goal(_LEFF, dtype, batch, ("eager",), _LEFF_WANTED[dtype]) for dtype, batch in _EVERY),
    Goal(_BARE, "float32", 8, ("copy",), 1.6, floor=True),
    Goal(_LEFF, "float32", 8, ("copy",), 3.0, floor=True),
    *(Goal(_BARE, *each, ("eager", *_LIBRARY), 1.0) for each in _EVERY),
    *(Goal(_PROJECTION, *each, ("eager",), 2.0) for each in _EVERY),
    *(Goal(_PROJECTION, *each, _LIBRARY, 1.2) for each in _EVERY),
    *(Goal(_BACKWARD, *each, ("eager",), 2.0) for each in _EVERY),
)


def _rows_of(goal: Goal, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What the rows of a goal reached."""
    found = []
    for row in rows:
        wanted = (goal.rows.op, goal.rows.mode, goal.dtype, goal.batch)
        name = row["shape"]["name"]
        if tuple(row[key] for key in ("op", "mode", "dtype", "batch")) == wanted and name.startswith(goal.rows.names):
            reached = goal.reached(row)
            found.append({"name": name, "reached": reached, "met": goal.is_met_by(reached)})
    return found


def judge(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every goal, what its rows reached (no rows if it was not measured), and whether it is met."""
    judged = []
    for goal in GOALS:
        found = _rows_of(goal, rows)
        met = bool(found) and all(row["met"] for row in found)
        judged.append({"what": goal.rows.what, **goal._asdict(), "rows": found, "met": met})
    return judged


def describe_goal(goal: Mapping[str, Any]) -> str:
    """A line of the report: the range of the rows, and the names of those that miss the goal."""
    peers = f"the fastest of {', '.join(goal['over'])}" if len(goal["over"]) > 1 else goal["over"][0]
    wanted = f"{'at most' if goal['floor'] else 'at least'} {goal['wanted']:.2f}"
    name = f"{goal['what']} over {peers}, batch {goal['batch']}, {goal['dtype']}"
    return f"{'met   ' if goal['met'] else 'NOT MET'} {name}: {_spread(goal['rows'])}, {wanted}{_count(goal['rows'])}"


def _spread(rows: Sequence[Mapping[str, Any]]) -> str:
    reached = [row["reached"] for row in rows if row["reached"] is not None]
    if not reached:
        return "inaccurate" if rows else "not measured"
    return f"{min(reached):.2f} to {max(reached):.2f}"


def _count(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many rows meet the goal, and which do not."""
    if not rows:
        return ""
    missed = [
        f"{row['name']} ({'inaccurate' if row['reached'] is None else format(row['reached'], '.2f')})"
        for row in rows
        if not row["met"]
    ]
    return f"; {len(rows) - len(missed)} of {len(rows)} rows{', not ' if missed else ''}{', '.join(missed)}"


def main(arguments: Sequence[str] | None = None) -> None:
    options, machine = _table.start(_table.make_parser(__doc__), arguments)
    rows = []
    for (op, mode), table in TABLES.items():
        print(f"\n{op}, {mode}")
        rows += [{"op": op, "mode": mode, **row} for row in _table.fill(table, options)]
    goals = judge(rows)
    print("", *map(describe_goal, goals), sep="\n")
    _table.write(options.json, machine=machine, goals=goals, rows=rows)


if __name__ == "__main__":
    keep_memory()
    main()
